"""One optimizer step of a narrow backbone as a published recipe trains it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sparseinst_jax.models.trees import Tree, functional
from sparseinst_jax.setup import builders
from sparseinst_jax.setup.config import load_config
from sparseinst_jax.training.optimizer import make_optimizer, rules_of


def take_step(config_path: Path, overrides: Mapping[str, Any]) -> tuple[Tree, Tree, Tree, Tree]:
    """Take a step along the gradient of the sum of the squared features of one image.

    Returns:
      The parameters before and after, the statistics before and after.
    """
    config = load_config(config_path, overrides)
    model = builders.build_model(config.model, 3, 0, config.train.frozen_stages)
    apply, params, statistics = functional(model.backbone)
    optimizer = make_optimizer(
        {"backbone": params}, 1e-3, config.train.weight_decay, 0.0, rules_of(model)
    )
    images = np.random.default_rng(1).normal(size=(1, 32, 32, 3)).astype(np.float32)

    @jax.jit
    def step(params, statistics):
        def loss(params):
            features, moved = apply(params, statistics, images, train=True)
            return sum(jnp.square(f).sum() for f in features), moved

        gradients, moved = jax.grad(loss, has_aux=True)(params)
        tree = {"backbone": params}
        updates, _ = optimizer.update({"backbone": gradients}, optimizer.init(tree), tree)
        return optax.apply_updates(tree, updates)["backbone"], moved

    after, moved = step(params, statistics)
    return params, after, statistics, moved


def same(before: Tree, after: Tree) -> list[bool]:
    """Whether each array is the same."""
    return jax.tree.leaves(jax.tree.map(np.array_equal, before, after))
