"""FastInst's published recipe: one decoder layer, ResNet-50; its other configurations start here.

The number and names of classes come from the annotations, never from here.

Source: FastInst, arXiv:2303.08594, and `fastinst_R50_ppm-fpn_x1_576.yaml` of its release.
Differs from the reference: float32 (model.dtype=bfloat16 is for accelerators), where it trains in
float16; batches are padded to a few fixed shapes (static shapes compile once).
"""

from ml_collections import ConfigDict

from sparseinst_jax.configs import base


def get_config():
    """Return the published recipe."""
    config = base.get_config()
    with config.unlocked():
        config.model = _model(config.model.backbone)
        config.objective = _objective()
        config.eval = _eval()
    config.data.augmentation = "flip_resize_crop"
    config.data.eval_size = (576, 777)
    config.train.update(dict(batch_size=16, base_batch_size=16, num_steps=368_750))
    config.train.update(dict(learning_rate=1e-4, warmup_steps=0))  # a tenth of it in the backbone
    config.train.milestones = (327_778, 355_092)
    return config


def _model(backbone: ConfigDict) -> ConfigDict:
    model = ConfigDict()
    model.family = "fastinst"
    model.backbone = backbone
    model.channels = 256  # of the pixel decoder, queries and pixels
    model.num_layers = 1  # of the decoder; 3 in the larger networks
    model.num_queries = 100  # proposed from the image; the most objects that can be matched
    model.num_auxiliary = 8  # learned queries that take part in attention alone
    model.num_heads = 8  # of attention
    model.ffn_width = 1024
    model.dtype = "float32"  # of computation; "bfloat16" keeps weights and losses in float32
    return model


def _objective() -> ConfigDict:
    objective = ConfigDict()
    objective.class_weight = 2.0  # cross entropy, weighted mean over queries
    objective.mask_weight = 5.0  # binary cross entropy in points, over the number of objects
    objective.dice_weight = 5.0  # in points, over the number of objects
    objective.proposal_weight = 20.0  # cross entropy, mean over places
    objective.location_weight = 1000.0  # of matching: a query's place lies in its object
    objective.no_object_weight = 0.1  # of the class of queries without an object
    objective.num_points = 12544  # in which a mask is compared
    return objective


def _eval() -> ConfigDict:
    evaluation = ConfigDict()
    evaluation.num_detections = 100  # pairs of a query and a class for an image
    evaluation.score_threshold = 0.0  # of the class, before the mask's factor
    evaluation.mask_threshold = 0.5
    evaluation.batch_size = 1  # images of equal padded size that run together
    evaluation.zoom = 1.0  # above 1 photos are looked at in overlapping parts, so much larger
    evaluation.protocol = "original"
    return evaluation
