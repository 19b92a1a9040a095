"""Networks with each of their blocks, but few of a kind: what is traced of the rest is the same."""

from ml_collections import ConfigDict


def shallow(config: ConfigDict) -> ConfigDict:
    """Make a network shallow, in place: a block in each stage, in a ResNet's second two.

    Of these the first halves the size and has a shortcut of its own, the second has neither.
    """
    model = config.model
    with config.unlocked():
        most = (1, 2, 1, 1) if model.backbone.name == "resnet" else (1,) * 9
        pairs = zip(model.backbone.stage_depths, most, strict=False)
        model.backbone.stage_depths = tuple(min(pair) for pair in pairs)
        for key in ("decoder_convs", "num_layers"):  # of SparseInst, of FastInst
            if key in model:
                model[key] = min(model[key], 2)
    return config
