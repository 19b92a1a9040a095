"""What a perfect network could reach: the AP that input size, mask stride and num_masks leave.

The annotations themselves are sent through the mask grids: resized with the image, reduced to a
stride, brought back to the original size as predictions are, and scored. What they lose, no
training wins back. Masks are predicted at stride 8 and doubled, so a network lies near the column
of stride 8; the targets that it learns from have stride 4.

    python benchmarks/mask_ceiling.py val.json --sizes 256 352 512 --num-masks 50 100
"""

import argparse

import numpy as np

from sparseinst_jax.data import coco, transforms
from sparseinst_jax.evaluation import coco_metrics
from sparseinst_jax.inference import masks
from sparseinst_jax.models import ops

CUT = masks.MaskCut(0.45, stride=4)


def main() -> None:
    """Print one row for each size and number of masks."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("annotations", help="COCO json; no image is opened")
    parser.add_argument("--sizes", type=int, nargs="+", default=(640,), help="shortest sides")
    parser.add_argument("--max-size", type=int, default=1333, help="longest side at most")
    parser.add_argument("--num-masks", type=int, nargs="+", default=(100,))
    arguments = parser.parse_args()
    dataset = coco.load_coco(arguments.annotations, None)
    print("| shortest side | num_masks | stride | AP | AP50 | AP75 | small | medium | recall |")
    print("|---|---|---|---|---|---|---|---|---|")
    for size in arguments.sizes:
        for num_masks in arguments.num_masks:
            for stride in (4, 8):
                found = [
                    entry
                    for record in dataset.records
                    for entry in through_grid(
                        record, dataset.category_ids, (size, arguments.max_size), num_masks, stride
                    )
                ]
                scores = coco_metrics.evaluate(arguments.annotations, found)
                names = ("AP", "AP50", "AP75", "APs", "APm", "AR100")
                row = " | ".join(f"{scores[name]:.3f}" for name in names)
                print(f"| {size} | {num_masks} | {stride} | {row} |", flush=True)


def through_grid(
    record: coco.ImageRecord,
    category_ids: tuple[int, ...],
    size: tuple[int, int],
    num_masks: int,
    stride: int,
) -> list[dict]:
    """Turn the largest `num_masks` objects of an image into the best predictions of a grid."""
    original = (record.height, record.width)
    resized = transforms.resized_size(original, *size)
    padded = transforms.padded_size(resized)
    kept = sorted(record.targets, key=lambda annotation: -annotation.area)[:num_masks]
    grids, labels = [], []
    for annotation in kept:
        levels = transforms.mask_levels(
            annotation.segmentation, original, transforms.Transform(False, None, None, resized)
        )
        if levels is None:
            continue
        grid = np.zeros((padded[0] // 4, padded[1] // 4), np.float32)
        grid[: levels.shape[0], : levels.shape[1]] = levels / 4
        grids.append(grid if stride == 4 else _at_stride_8(grid))
        labels.append(annotation.label)
    if not grids:
        return []
    chunks = masks.upsample_masks(
        np.stack(grids)[None], 0, np.arange(len(grids)), resized, original, CUT
    )
    rles = [rle for chunk, _ in chunks for rle in masks.encode_transposed(chunk)]
    return [
        {
            "image_id": record.image_id,
            "category_id": category_ids[label],
            "segmentation": rle,
            "score": 1.0,
        }
        for label, rle in zip(labels, rles, strict=True)
    ]


def _at_stride_8(grid: np.ndarray) -> np.ndarray:
    """Average 2x2 cells and double them bilinearly, as the decoder doubles its masks."""
    coarse = grid.reshape(grid.shape[0] // 2, 2, grid.shape[1] // 2, 2).mean((1, 3))
    rows, columns = (ops.bilinear_matrix(side, 2 * side) for side in coarse.shape)
    return (rows @ coarse @ columns.T).astype(np.float32)


if __name__ == "__main__":
    main()
