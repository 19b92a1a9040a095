"""The class head that sees the backbone's features under each predicted mask."""

import jax
import jax.numpy as jnp
import numpy as np

from sparseinst_jax.models.sparseinst.model import _under_masks
from sparseinst_jax.models.trees import functional
from sparseinst_jax.setup import builders
from sparseinst_jax.setup.config import load_config


def _network(is_on: bool):
    config = load_config("tiny", {"model.class_from_backbone": str(is_on)})
    model = builders.build_model(config.model, 3, 0)
    return model, *functional(model)


def test_without_weights_it_changes_nothing_and_with_some_only_the_classes(rng):
    images = rng.normal(size=(2, 64, 96, 3)).astype(np.float32)
    _, apply, params, statistics = _network(False)
    model, apply_more, more, _ = _network(True)
    head = more["decoder"].pop("cls_backbone")
    assert jax.tree.map(np.shape, more) == jax.tree.map(np.shape, params)
    assert model.class_layers == ("decoder/inst_branch/cls_score", "decoder/cls_backbone")
    zero = params | {
        "decoder": params["decoder"] | {"cls_backbone": jax.tree.map(np.zeros_like, head)}
    }
    some = params | {"decoder": params["decoder"] | {"cls_backbone": head}}
    plain, same, other = (
        function(tree, statistics, images)[0]
        for function, tree in ((apply, params), (apply_more, zero), (apply_more, some))
    )
    for before, after in zip(plain, same, strict=True):
        np.testing.assert_allclose(before, after, atol=1e-6)
    assert np.abs(plain.class_logits - other.class_logits).max() > 1e-3
    np.testing.assert_allclose(plain.mask_logits, other.mask_logits, atol=1e-6)


def test_features_are_means_under_the_mask_of_one_length_and_leave_the_mask_alone(rng):
    features = rng.normal(size=(1, 4, 6, 5)).astype(np.float32)
    logits = np.full((1, 2, 4, 6), -30, np.float32)
    logits[0, 0, 1:3, 2:5] = 30
    found = np.asarray(_under_masks(features, logits))
    mean = features[0, 1:3, 2:5].mean((0, 1))
    np.testing.assert_allclose(found[0, 0], mean / np.sqrt((mean**2).mean()), rtol=1e-4)
    assert np.isfinite(found).all()  # of a mask without a pixel, too
    slope = jax.grad(lambda x: jnp.sum(_under_masks(features, x) ** 3))(logits)
    assert (np.asarray(slope) == 0).all()
