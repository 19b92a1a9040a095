from .batch import Batch as Batch
from .coco import CocoDataset as CocoDataset
from .coco import decode_mask as decode_mask
from .coco import load_coco as load_coco
from .loader import train_batches as train_batches
from .plan import TrainPlan as TrainPlan
from .shapes import draw_shapes_dataset as draw_shapes_dataset
