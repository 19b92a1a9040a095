"""What a perfect network could reach: the AP that input size, mask stride and num_masks leave.

The annotations themselves are sent through the mask grids: resized with the image, reduced to a
stride, brought back to the original size as predictions are, and scored. What they lose, no
training wins back. Masks are predicted at stride 8 and doubled, so a network lies near the column
of stride 8; the targets that it learns from have stride 4.

    python benchmarks/mask_ceiling.py val.json --sizes 256 352 512 --num-masks 50 100
"""

import argparse
import itertools

import numpy as np

from sparseinst_jax.data import coco, transforms
from sparseinst_jax.evaluation import coco_metrics
from sparseinst_jax.inference import masks
from sparseinst_jax.models import ops
from sparseinst_jax.runner import run_lengths
from sparseinst_jax.runtime.messages import in_percent

NAMES = ("AP", "AP50", "AP75", "APs", "APm", "AR100")
CUT = masks.MaskCut(0.45, stride=4)


def through_grid(record, category_ids, size, num_masks, stride) -> list[dict]:
    """Turn the largest `num_masks` objects of an image into the best predictions of a grid."""
    original = (record.height, record.width)
    resized = transforms.resized_size(original, *size)
    shape = [side // 4 for side in transforms.padded_size(resized)]
    transform = transforms.Transform(False, None, None, resized)
    grids, labels = [], []
    for target in sorted(record.targets, key=lambda target: -target.area)[:num_masks]:
        levels = transforms.mask_levels(target.segmentation, original, transform)
        if levels is not None:
            grid = np.zeros(shape, np.float32)
            grid[: levels.shape[0], : levels.shape[1]] = levels / 4
            grids.append(grid if stride == 4 else _at_stride_8(grid))
            labels.append(target.label)
    if not grids:
        return []
    kept = np.arange(len(grids))
    chunks = masks.upsample_masks(np.stack(grids)[None], 0, kept, resized, original, CUT)
    rles = [rle for chunk, _ in chunks for rle in run_lengths.encode_transposed(chunk)]
    return [
        {"image_id": record.image_id, "category_id": category_ids[label], "score": 1.0}
        | {"segmentation": rle}
        for label, rle in zip(labels, rles, strict=True)
    ]


def _at_stride_8(grid: np.ndarray) -> np.ndarray:
    """Average 2x2 cells and double them bilinearly, as the decoder doubles its masks."""
    coarse = grid.reshape(grid.shape[0] // 2, 2, grid.shape[1] // 2, 2).mean((1, 3))
    rows, columns = (ops.bilinear_matrix(side, 2 * side) for side in coarse.shape)
    return (rows @ coarse @ columns.T).astype(np.float32)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("annotations", help="COCO json; no image is opened")
    parser.add_argument("--sizes", type=int, nargs="+", default=(640,), help="shortest sides")
    parser.add_argument("--max-size", type=int, default=1333, help="longest side at most")
    parser.add_argument("--num-masks", type=int, nargs="+", default=(100,))
    given = parser.parse_args()
    dataset = coco.load_coco(given.annotations, None)
    print("| shortest side | num_masks | stride | AP | AP50 | AP75 | small | medium | recall |")
    print("|---|---|---|---|---|---|---|---|---|")
    for size, number, stride in itertools.product(given.sizes, given.num_masks, (4, 8)):
        options = dataset.category_ids, (size, given.max_size), number, stride
        found = [entry for each in dataset.records for entry in through_grid(each, *options)]
        scores = coco_metrics.evaluate(given.annotations, found)
        row = " | ".join(in_percent(scores[name]) for name in NAMES)
        print(f"| {size} | {number} | {stride} | {row} |", flush=True)
