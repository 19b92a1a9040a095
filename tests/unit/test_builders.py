"""Values that no network can have are refused together."""

import pytest

from configs import tiny
from sparseinst_jax import builders


def test_every_value_that_no_network_can_have_is_named_with_its_choices():
    model = tiny.get_config().model
    model.update(dict(family="x", dtype="float16", normalizer="tanh", num_masks=0, num_groups=-1))
    model.backbone.update(dict(name="vgg", norm="layer", width=1, stage_depths=(1, 1, 0, 1)))
    with pytest.raises(ValueError) as caught:
        builders.build_model(model, 3, seed=0)
    assert str(caught.value).splitlines() == [
        "this network cannot be built:",
        "  model.family must be one of sparseinst, got 'x'",
        "  model.backbone.name must be one of resnet, got 'vgg'",
        "  model.backbone.norm must be one of frozen_batch_norm, batch_norm, group_norm, got"
        " 'layer'",
        "  model.normalizer must be one of sigmoid, softmax, got 'tanh'",
        "  model.dtype must be one of float32, bfloat16, got 'float16'",
        "  model.num_masks must be at least 1, got 0",
        "  model.num_groups must be at least 1, got -1",
        "  model.backbone.width must be at least 2, got 1",
        "  model.backbone.stage_depths must be the blocks of four stages, such as (3, 4, 6, 3), got"
        " (1, 1, 0, 1)",
    ]
