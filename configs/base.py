"""The published recipe: G-IAM with a ResNet-50, as in the paper's main table.

Every other configuration starts from this one and replaces a few values. The number and names of
classes come from the annotations, never from here.

Source: SparseInst, arXiv:2203.12827, section 4 and the G-IAM R-50 configuration of its release.
Differs from the reference: batches are padded to a few fixed shapes (static shapes compile once).
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Return the locked configuration."""
    config = ConfigDict()
    config.seed = 0  # initial weights, order of images, augmentation
    config.model = _model()
    config.objective = _objective()
    config.data = _data()
    config.train = _train()
    config.eval = _eval()
    config.lock()
    return config


def _model() -> ConfigDict:
    model = ConfigDict()
    model.family = "sparseinst"
    model.backbone = ConfigDict()
    model.backbone.name = "resnet"
    model.backbone.stage_depths = (3, 4, 6, 3)  # blocks of res2, res3, res4, res5: ResNet-50
    model.backbone.width = 64  # channels of the stem; res5 has 32 times as many
    model.backbone.norm = "frozen_batch_norm"  # or "batch_norm", "group_norm" (from scratch)
    model.backbone.variant = "b"  # or "d": R50-vd, deep stem and average-pooled shortcuts
    model.backbone.deformable_stages = ()  # with deformable 3x3 convolutions: ("res4", "res5")
    model.backbone.modulated = False  # True: these also weight their samples (DCN version 2)
    model.encoder_channels = 256
    model.decoder_channels = 256
    model.decoder_convs = 4  # 3x3 convolutions in the instance and in the mask branch
    model.num_masks = 100  # instance activation maps: the largest number of objects in an image
    model.num_groups = 4  # maps per object; 1 is the plain IAM decoder
    model.kernel_dim = 128  # channels of mask kernels and mask features
    model.normalizer = "sigmoid"  # of the activation maps; or "softmax"
    model.class_from_backbone = False  # ours: res3 and res4 have a say in the class, too
    model.dtype = "float32"  # of computation; "bfloat16" keeps weights and losses in float32
    return model


def _objective() -> ConfigDict:
    objective = ConfigDict()
    objective.class_weight = 2.0  # focal loss over the number of objects
    objective.mask_weight = 5.0  # binary cross entropy, mean over matched pixels
    objective.dice_weight = 2.0  # over the number of objects
    objective.objectness_weight = 1.0  # binary cross entropy against the IoU of masks
    return objective


def _data() -> ConfigDict:
    data = ConfigDict()
    data.train = ConfigDict()
    data.train.images = "datasets/coco/train2017"  # folder
    data.train.annotations = "datasets/coco/annotations/instances_train2017.json"
    data.val = ConfigDict()
    data.val.images = "datasets/coco/val2017"
    data.val.annotations = "datasets/coco/annotations/instances_val2017.json"
    data.train.tfds = ""  # in place of both: "coco_instances/train", see `sparseinst build-tfds`
    data.val.tfds = ""
    data.tfds_dir = ""  # where that was built; "" is TFDS's default, ~/tensorflow_datasets
    data.root = ""  # where relative paths lead from; "" is where the command runs, and is stored
    data.classes = ()  # names of the classes to keep; () keeps all that the json has
    data.exclude_classes = ()  # names of the classes to leave out
    data.class_map = ()  # merge and rename before that: ("van=car", "bus=car", "ped=person")
    data.generator = ""  # "shapes" draws the demo's data when it is missing
    data.keep_empty = False  # train on images without objects too
    data.augmentation = "flip_resize"  # or "flip_resize_crop" (the `aug` rows), "lsj" (jitter)
    data.lsj_range = (0.1, 2.0)  # lsj: scale relative to the largest size that fits train_sizes
    data.copy_paste = 0.0  # probability that an image gets objects of another one
    data.flip_label_pairs = ()  # classes that swap in a mirrored image: ("left_x=right_x",)
    data.crowd = "drop"  # crowd regions train as background; "ignore": neither right nor wrong
    data.train_sizes = tuple(range(416, 641, 32))  # short side in pixels, one is drawn per image
    data.train_max_size = 853  # long side in pixels, at most
    data.resize_rule = "detectron2"  # of training; or "paddledetection", "mmdetection"
    data.annotation_filter = "detectron2"  # objects to learn; or "paddledetection", "mmdetection"
    data.eval_size = (640, 853)  # short side, and the most that the long side may have
    data.on_error = "stop"  # if an image cannot be read; or "skip": use an empty one instead
    data.on_change = "stop"  # if the data of a continued run have changed; or "continue"
    data.num_workers = 8  # processes that read images; 0 reads in the training process
    return data


def _train() -> ConfigDict:
    train = ConfigDict()
    train.batch_size = 64  # images per step, over all devices and hosts
    train.micro_batches = 1  # parts into which a step is cut to fit the memory
    train.num_steps = 270_000  # about 146 epochs of COCO train2017 at the base batch
    train.init_from = ""  # weights to start from: .npz, .safetensors, run or checkpoint folder
    train.base_batch_size = 64  # the batch that the rate and steps here are for; with another batch
    train.lr_scaling = "linear"  # they are scaled: "linear", "sqrt" or "none"
    train.frozen_stages = 0  # stages of the backbone not trained; ResNet: 1 stem, 2 also res2, ...
    train.learning_rate = 5e-5  # AdamW
    train.backbone_rate = 1.0  # what the learning rate is multiplied by in the backbone
    train.class_rate = 1.0  # the same for the class layer
    train.weight_decay = 0.05  # not on parameters of norms
    train.gradient_clip_norm = 0.0  # largest gradient norm, over all parameters; 0 is off
    train.ema_decay = 0.0  # use a moving average of the weights with this decay; 0 is off
    train.warmup_steps = 1000  # linear
    train.warmup_factor = 0.001  # of the learning rate, at step 0
    train.milestones = (210_000, 250_000)  # steps at which the learning rate falls
    train.lr_decay = 0.1  # factor at each milestone
    train.log_every = 50  # steps
    train.checkpoint_every = 5000  # steps; and three minutes after the last save
    train.eval_every = 10_000  # steps; 0 is never
    train.early_stopping = 0  # stop after this many evaluations without a better AP; 0 is off
    train.skip_nonfinite = 0  # NaN or infinite steps in a row to skip before stopping
    train.tensorboard = False  # needs the extra `tensorboard`
    return train


def _eval() -> ConfigDict:
    evaluation = ConfigDict()
    evaluation.score_threshold = 0.005  # sqrt(class * objectness), before rescoring by the mask
    evaluation.mask_threshold = 0.45
    evaluation.batch_size = 1  # images of equal padded size that run together
    evaluation.zoom = 1.0  # above 1 photos are looked at in overlapping parts, so much larger
    evaluation.protocol = "original"  # or "paddledetection": its resize, mask crop and lost query
    return evaluation
