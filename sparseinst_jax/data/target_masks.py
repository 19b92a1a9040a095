"""The forms in which masks of objects travel to the device: quarter levels, or bits at full size.

The original SparseInst reduces a mask by bilinear ÷4, which is the mean of the inner 2x2 pixels of
each 4x4 block, so a level 0 ... 4 says it all. Levels are made from run lengths; no mask at full
size is drawn.

Source: sparseinst/loss.py of the original.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

MASK_STRIDE = 4  # of quarter levels
_INNER = (1, 2)  # rows and columns of a block that count


class InnerPixels(NamedTuple):
    """Which pixels of a source mask [h, w] are the inner ones of the blocks of a result.

    A row or a column of the source can be several of the result, or none.
    """

    shape: tuple[int, int]  # of the result, (ceil(height/4), ceil(width/4))
    source_height: int  # h
    num_rows: int  # of the result's inner rows inside the border
    rows_before: np.ndarray  # int64 [h], how many of these are of source rows before one
    # int64 [w + 1], `num_rows` times the number of source columns before one that are inner
    # columns of the result
    column_start: np.ndarray
    # int64 [w + 1], 1 where the source column is an inner column of the result
    is_inner: np.ndarray
    # int64 [2 * ceil(width/4)], which of those source columns each inner column of the result is;
    # -1 beyond the border
    column_index: np.ndarray


def inner_pixels(
    source_size: tuple[int, int], rows: np.ndarray, columns: np.ndarray
) -> InnerPixels:
    """Prepare ``levels_of_runs`` for all masks of an image.

    Args:
        source_size: (h, w) of the masks.
        rows: source row of each row of the result, [height], ascending.
        columns: source column of each column of the result, [width], in any order.
    """
    height, width = source_size
    shape = -(-len(rows) // MASK_STRIDE), -(-len(columns) // MASK_STRIDE)
    inner_rows = np.sort(np.concatenate([rows[first::MASK_STRIDE] for first in _INNER]))
    is_inner = np.zeros(width + 1, np.int64)
    for first in _INNER:
        is_inner[columns[first::MASK_STRIDE]] = 1
    before = np.cumsum(is_inner) - is_inner
    index = np.full((shape[1], len(_INNER)), -1)
    for place, first in enumerate(_INNER):
        part = columns[first::MASK_STRIDE]
        index[: len(part), place] = before[part]
    return InnerPixels(
        shape,
        height,
        len(inner_rows),
        np.searchsorted(inner_rows, np.arange(height)),
        before * len(inner_rows),
        is_inner,
        index.reshape(-1),
    )


def levels_of_runs(runs: np.ndarray, pixels: InnerPixels) -> np.ndarray:
    """Quarter levels of a mask given as run lengths, as ``reduce_mask`` of the moved mask.

    Where a run ends among all pixels says where it ends among the inner ones; these alone are
    written, and only in the columns that the object has. Runs, int64, are of zeros and ones
    alternately, column by column, and sum to h * w; levels are uint8 [ceil(height/4),
    ceil(width/4)] in 0 ... 4.
    """
    levels = np.zeros(pixels.shape, np.uint8)
    ends = np.cumsum(runs[: len(runs) // 2 * 2])  # zeros at the end say nothing
    column, row = np.divmod(ends, pixels.source_height)
    ends = pixels.column_start[column] + pixels.is_inner[column] * pixels.rows_before[row]
    if not len(ends) or ends[0] == ends[-1]:
        return levels
    num_rows = pixels.num_rows
    first, last = int(ends[0]) // num_rows, -(-int(ends[-1]) // num_rows)
    # One column more than the object has: empty, for what lies beside it.
    ends = np.concatenate([[first * num_rows], ends, [(last + 1) * num_rows]])
    values = np.arange(len(ends) - 1, dtype=np.uint8) & 1
    inner = np.repeat(values, np.diff(ends)).reshape(-1, num_rows)
    by_row = np.zeros((len(inner), pixels.shape[0]), np.uint8)
    for place in range(len(_INNER)):
        part = inner[:, place :: len(_INNER)]
        by_row[:, : part.shape[1]] += part
    is_there = (pixels.column_index >= first) & (pixels.column_index < last)
    blocks = np.flatnonzero(is_there)[[0, -1]] // len(_INNER)
    chosen = slice(blocks[0] * len(_INNER), (blocks[1] + 1) * len(_INNER))
    index = np.where(is_there[chosen], pixels.column_index[chosen] - first, -1)
    levels[:, blocks[0] : blocks[1] + 1] = (by_row[index[::2]] + by_row[index[1::2]]).T
    return levels


def reduce_mask(mask: np.ndarray) -> np.ndarray:
    """Quarter levels of a mask: the sum of the inner 2x2 pixels of each 4x4 block.

    Of bool or 0/1 [H, W], 0 beyond its border, uint8 [ceil(H/4), ceil(W/4)] in 0 ... 4, four times
    what bilinear ÷4 gives.
    """
    height, width = mask.shape
    rows, columns = -(-height // MASK_STRIDE), -(-width // MASK_STRIDE)
    mask = mask.view(np.uint8) if mask.dtype == bool else mask
    levels = np.zeros((rows, columns), np.uint8)
    for y in _INNER:
        for x in _INNER:
            part = mask[y::MASK_STRIDE, x::MASK_STRIDE]
            levels[: part.shape[0], : part.shape[1]] += part
    return levels


def at_least_half(levels: np.ndarray) -> np.ndarray:
    """Where at least two of the four inner pixels of a block are set: bool in the same shape."""
    return levels >= 2


def pack_bits(mask: np.ndarray) -> np.ndarray:
    """Pack bool or 0/1 [..., H, W] into uint8 [..., H, ceil(W/8)], the first pixel highest.

    `jnp.unpackbits(batch.masks, axis=-1)` gives a batch of them back on the device: a padded width
    is a multiple of 8.
    """
    return np.packbits(mask.astype(bool), axis=-1)


def unpack_bits(bits: np.ndarray) -> np.ndarray:
    """Unpack uint8 [..., H, W/8] into bool [..., H, W], W a multiple of 8."""
    return np.unpackbits(bits, axis=-1).astype(bool)


class TargetForm(NamedTuple):
    """A form of target masks: what the loader makes and `Batch.masks` holds."""

    cell: tuple[int, int]  # (rows, columns) of pixels in one byte
    # bool or 0/1 [H, W] to the form, uint8 of `shape((H, W))`
    encode: Callable[[np.ndarray], np.ndarray]
    # of arrays in the form, to bool at `stride`: what belongs to the object
    decode: Callable[[np.ndarray], np.ndarray]
    stride: int  # pixels of the image in one of what `decode` gives, and of `Batch.is_ignored`
    # whether an object of which a crop leaves nothing stays a target, with an empty mask; else it
    # is dropped
    keeps_empty: bool = False

    def shape(self, size: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of bytes for an image of (height, width) pixels."""
        return -(-size[0] // self.cell[0]), -(-size[1] // self.cell[1])


QUARTER_LEVELS = TargetForm((MASK_STRIDE, MASK_STRIDE), reduce_mask, at_least_half, MASK_STRIDE)
FULL_BITS = TargetForm((1, 8), pack_bits, unpack_bits, 1)
