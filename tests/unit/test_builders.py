"""Values that no network can have are refused together."""

import dataclasses

import pytest
from ml_collections import ConfigDict

from sparseinst_jax.configs import tiny
from sparseinst_jax.models import SparseInst
from sparseinst_jax.setup import builders


def test_every_value_that_no_network_can_have_is_named_with_its_choices():
    model = tiny.get_config().model
    model.update(dict(dtype="float16", normalizer="tanh", num_masks=0, num_groups=-1))
    model.backbone.update(dict(norm="layer", width=1, stage_depths=(1, 1, 0, 1)))
    assert refusal(model) == [
        "this network cannot be built:",
        "  model.dtype must be one of float32, bfloat16, got 'float16'",
        "  model.normalizer must be one of sigmoid, softmax, got 'tanh'",
        "  model.num_masks must be at least 1, got 0",
        "  model.num_groups must be at least 1, got -1",
        "  model.backbone.norm must be one of frozen_batch_norm, batch_norm, group_norm, got"
        " 'layer'",
        "  model.backbone.width must be at least 2, got 1",
        "  model.backbone.stage_depths must be the blocks of four stages, such as (3, 4, 6, 3), got"
        " (1, 1, 0, 1)",
    ]


def test_an_unknown_family_is_refused_with_those_there_are_and_the_rest_is_looked_at():
    model = tiny.get_config().model
    model.family = "x"
    model.backbone.width = 1
    assert refusal(model)[1:] == [
        "  model.family must be one of sparseinst, fastinst, got 'x'",
        "  model.backbone.width must be at least 2, got 1",
    ]


def test_an_option_that_the_family_does_not_have_is_refused_with_those_it_has():
    model = tiny.get_config().model
    with model.unlocked():
        model.num_queries = 100
    assert refusal(model)[1:] == [
        "  model.family is 'sparseinst', which has no num_queries; it has encoder_channels,"
        " decoder_channels, decoder_convs, num_masks, num_groups, kernel_dim, normalizer,"
        " class_from_backbone. Start from a configuration of that family"
    ]


def test_an_unknown_backbone_is_refused_with_those_there_are():
    model = tiny.get_config().model
    model.backbone.name = "vgg"
    assert refusal(model)[1:] == [
        "  model.backbone.name must be one of resnet, cspdarknet, pvt, efficientnet_lite, got 'vgg'"
    ]


def test_another_backbones_name_alone_is_refused_with_a_configuration_to_start_from():
    model = tiny.get_config().model
    model.backbone = ConfigDict(dict(name="pvt", stage_depths=(2, 2, 2, 2), width=64))
    assert refusal(model)[1:] == [
        "  model.backbone.name is 'pvt', which has no width; it has stage_depths, embed_dims,"
        " linear, drop_path. Start from a configuration of that backbone, such as"
        " giam_pvt_b1"
    ]


def test_every_backbone_names_its_own_faults():
    model = tiny.get_config().model
    model.backbone = ConfigDict(dict(name="cspdarknet", stage_depths=(1, 1, 1, 1), width=0))
    assert refusal(model)[1:] == [
        "  model.backbone.width must be at least 2, got 0",
        "  model.backbone.stage_depths must be the blocks of five stages, such as (1, 2, 8, 8, 4),"
        " got (1, 1, 1, 1)",
    ]
    model.backbone = ConfigDict(dict(name="pvt", embed_dims=(8, 9, 10, 12), drop_path=1.0))
    assert refusal(model)[1:] == [
        "  model.backbone.embed_dims must be positive multiples of the stages' heads (1, 2, 5, 8),"
        " such as (64, 128, 320, 512), got (8, 9, 10, 12)",
        "  model.backbone.drop_path must be at least 0 (off) and below 1, got 1.0",
    ]


class Plain:
    """A backbone of a notebook: one option without a value, nothing about faults or stages."""

    def __init__(self, *, channels, dtype, rng):
        self.out_channels = (channels, channels, channels)


def test_a_backbone_from_elsewhere_needs_neither_faults_nor_stages(monkeypatch):
    monkeypatch.setitem(builders.BACKBONES, "plain", Plain)
    model = tiny.get_config().model
    model.backbone = ConfigDict(dict(name="plain"))
    assert refusal(model)[1:] == [
        "  model.backbone.name is 'plain', which needs a value of channels"
    ]
    model.backbone = ConfigDict(dict(name="plain", channels=8, width=3))
    assert refusal(model)[1:] == [
        "  model.backbone.name is 'plain', which has no width; it has channels. Start from a"
        " configuration of that backbone"
    ]
    model.backbone = ConfigDict(dict(name="plain", channels=8))
    assert builders.build_model(model, 3, seed=0).backbone.out_channels == (8, 8, 8)


class Narrow(SparseInst):
    """A subclass whose options are its own and, unnamed, those of the network it extends."""

    def __init__(self, backbone, *, sharpness=1.0, **options):
        super().__init__(backbone, **options)
        self.sharpness = sharpness


def test_a_subclass_has_the_options_of_its_base_and_its_own(monkeypatch):
    family = dataclasses.replace(builders.FAMILIES["sparseinst"], model=Narrow)
    monkeypatch.setitem(builders.FAMILIES, "narrow", family)
    model = tiny.get_config().model
    model.family = "narrow"
    with model.unlocked():
        model.sharpness = 3.0
    assert builders.build_model(model, 3, seed=0).sharpness == 3.0
    with model.unlocked():
        model.blunt = True
    assert "which has no blunt; it has encoder_channels, " in refusal(model)[1]


def refusal(model) -> list[str]:
    with pytest.raises(ValueError) as caught:
        builders.build_model(model, 3, seed=0)
    return str(caught.value).splitlines()
