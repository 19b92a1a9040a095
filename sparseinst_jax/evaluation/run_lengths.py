"""Measure many compressed run lengths at once.

A results file may hold half a million masks. pycocotools reads past the end of its memory, or never
ends, where the runs of a mask do not sum to its image, so each of them has to be added up first;
one at a time that takes longer than the scoring.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sparseinst_jax.data.segmentations import MAX_LETTERS, MAX_RUN

INVALID = -1
# Letters that are read together: few calls, and what they make stays in the processor's cache.
LETTERS_TOGETHER = 1 << 17
# The lowest five bits of a letter count, this one says that more follow, this one is the sign.
MORE, SIGN = 32, 16


def lengths_and_areas(texts: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """Add up compressed run lengths.

    Args:
        texts: `counts` of COCO's compressed RLE, each at most `segmentations.MAX_TEXT` long.

    Returns:
        lengths: int64 [D], pixels of each mask and its background; `INVALID` where the text is none
            that can be decoded (see `segmentations.compressed_length`).
        areas: int64 [D], pixels of each mask; without meaning where the text is invalid.
    """
    lengths = np.full(len(texts), INVALID, np.int64)
    areas = np.zeros(len(texts), np.int64)
    first = num_letters = 0
    for place, text in enumerate(texts, start=1):
        num_letters += len(text)
        if num_letters >= LETTERS_TOGETHER or place == len(texts):
            _measure(texts[first:place], lengths[first:place], areas[first:place])
            first, num_letters = place, 0
    return lengths, areas


def _measure(texts: Sequence[bytes], lengths: np.ndarray, areas: np.ndarray) -> None:
    """Fill in lengths and areas; where one text is wrong, each of them by itself."""
    read = _read(texts)
    if read is not None:
        lengths[:], areas[:] = read
    elif len(texts) > 1:
        for place in range(len(texts)):
            one = slice(place, place + 1)
            _measure(texts[one], lengths[one], areas[one])


def _read(texts: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray] | None:
    """Lengths and areas of a few texts; None where one of them is wrong."""
    if not all(texts):
        return None
    text_ends = np.cumsum([len(text) for text in texts])
    # What is below "0" becomes large.
    letters = np.frombuffer(b"".join(texts), np.uint8) - np.uint8(48)
    if letters.max() >= 2 * MORE or (letters[text_ends - 1] >= MORE).any():
        return None
    ends = np.flatnonzero(letters < MORE)
    values = _run_values(letters, ends)
    if values is None:
        return None
    num_runs = np.diff(np.searchsorted(ends, text_ends), prepend=0)
    runs, starts = _undo_differences(values, num_runs)
    if runs.min() < 0 or runs.max() > MAX_RUN:
        return None
    background, areas = np.add.reduceat(runs, starts, axis=0).T
    return background + areas, areas


def _run_values(letters: np.ndarray, ends: np.ndarray) -> np.ndarray | None:
    """The number that ends at each place: int64 [R]; None where one has too many letters.

    Source: `rleFrString` of cocoapi's maskApi: five bits a letter, the lowest first; the sign is
    the fifth bit of the last.
    """
    starts = np.zeros_like(ends)
    starts[1:] = ends[:-1] + 1
    if (ends - starts).max() > MAX_LETTERS:
        return None
    values = letters[ends].astype(np.int64)
    values -= (values & SIGN) << 1
    # Most have one letter. The others take the letters before their last, from the right.
    which = np.flatnonzero(ends > starts)
    places = ends[which] - 1
    while len(which):
        values[which] = values[which] << 5 | letters[places] & (MORE - 1)
        goes_on = places > starts[which]
        which, places = which[goes_on], places[goes_on] - 1
    return values


def _undo_differences(values: np.ndarray, num_runs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Add to each run the one two before, from the fourth of a text on.

    Returns:
        runs: int64 [rows, 2], background and mask in turn; a text with an odd number of runs is
            filled up with 0.
        starts: first row of each text.
    """
    num_rows = (num_runs + 1) // 2
    starts = np.cumsum(num_rows) - num_rows
    is_odd = num_runs % 2
    filled_up_before = np.cumsum(is_odd) - is_odd
    runs = np.zeros((int(num_rows.sum()), 2), np.int64)
    runs.reshape(-1)[np.arange(len(values)) + np.repeat(filled_up_before, num_runs)] = values
    # The third is stored as it is, so the first stays out of the sum. What a sum over all texts has
    # gathered before a text is taken off again, exactly, even where it ran over 64 bits.
    first_runs = runs[starts, 0]
    runs[starts, 0] = 0
    sums = np.cumsum(runs, axis=0)
    before = np.zeros((len(starts), 2), np.int64)
    before[1:] = sums[starts[1:] - 1]
    sums -= np.repeat(before, num_rows, axis=0)
    sums[starts, 0] = first_runs
    sums[(starts + num_rows - 1)[is_odd == 1], 1] = 0
    return sums, starts
