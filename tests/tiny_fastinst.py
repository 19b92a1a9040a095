"""A FastInst that trains in seconds and learns nothing useful."""

from __future__ import annotations

from collections.abc import Mapping

from ml_collections import ConfigDict

from sparseinst_jax.configs import shapes_fastinst, tiny


def get_config(**data: Mapping[str, str]) -> ConfigDict:
    """Return the demo's FastInst, smaller; the data's parts are given."""
    config, small = shapes_fastinst.get_config(), tiny.get_config()
    config.model.backbone.width = small.model.backbone.width
    config.model.update(dict(channels=8, num_layers=1, num_queries=6, num_heads=2, ffn_width=16))
    config.objective.num_points = 48
    config.train, config.data = small.train, small.data
    config.data.generator = ""
    for part, values in data.items():
        config.data[part].update(values)
    return config
