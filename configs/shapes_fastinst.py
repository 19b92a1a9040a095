"""The demo's drawn shapes with a small FastInst from random weights.

Command: python train.py --config shapes_fastinst   (draws its data if missing)
Hardware: 2 CPU cores, nine minutes of both. Expected AP: 24.9, with classes aside 25.0, recall
  0.52; SparseInst's demo reaches 58.6 in about the same time.
Table: none, there is no published counterpart.
"""

from sparseinst_jax.configs import fastinst_base, shapes


def get_config():
    """Return the demo's configuration with the other family."""
    config = shapes.get_config()
    recipe = fastinst_base.get_config()
    with config.unlocked():
        backbone, config.model = config.model.backbone, recipe.model
        config.model.backbone = backbone
        config.objective, config.eval = recipe.objective, recipe.eval
    config.model.update(dict(channels=32, num_queries=20, num_heads=4, ffn_width=128))
    config.objective.num_points = 256  # of a mask of 16 x 20 cells
    # As long as the other demo takes on the same processor.
    config.train.update(dict(num_steps=3600, eval_every=900, milestones=(2400, 3250)))
    return config
