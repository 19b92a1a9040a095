"""Turn images into instances, whatever computes the network: what all predictors share.

An image is resized by the test rule, padded to the next multiple of 32 and goes through the network
with images of the same padded size; what is kept is brought back to the original size and packed as
run lengths.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, overload

import numpy as np

from sparseinst_jax.data.ecosystems import find_protocol
from sparseinst_jax.data.images import ImageLike, as_rgb
from sparseinst_jax.data.transforms import padded_size
from sparseinst_jax.runner import run_lengths
from sparseinst_jax.runner.masks import MaskCut
from sparseinst_jax.runner.parts import Joined, Part, join, parts_of
from sparseinst_jax.runner.prediction import Prediction, score_fault

Size = tuple[int, int]


class Prepared(NamedTuple):
    """An image at network size.

    Attributes:
        image: uint8 [h, w, 3], resized by the test rule, not padded.
        original_size: (height, width) before the resize.
        mask_size: (height, width) of what masks are cut to: the image.
        part: of a photo that the image is; None for a whole one.
    """

    image: np.ndarray
    original_size: Size
    mask_size: Size
    part: Part | None = None


Ready = Prepared | list[Prepared]  # a photo, or all of its parts


class Pending(NamedTuple):
    """A batch on its way: positions in the caller's list, and what is selected of it."""

    positions: list[int]
    items: list[Prepared]
    selection: Any


class FoundInstances(NamedTuple):
    """What is found in one image; masks are made, a chunk at a time, when they are asked for.

    Attributes:
        labels: int32 [D] in 0...K-1.
        query_index: int32 [D], the mask of each.
        chunks: masks uint8 [D', width, height] at the original size, and scores float32 [D'], in
            the same order.
        original_size: (height, width).
    """

    labels: np.ndarray
    query_index: np.ndarray
    chunks: Iterator[tuple[np.ndarray, np.ndarray]]
    original_size: Size

    def encode(self) -> tuple[list[dict[str, Any]], np.ndarray]:
        """Make every mask: D compressed RLEs, and the scores float32 [D]."""
        rles, scores = [], [np.zeros(0, np.float32)]
        for chunk, its_scores in self.chunks:
            rles.extend(run_lengths.encode_transposed(chunk))
            scores.append(its_scores)
        return rles, np.concatenate(scores)


class Fetched(NamedTuple):
    """The selection of a batch on the host.

    Attributes:
        scores: float32 [B, D].
        labels: int [B, D].
        query_index: int [B, D], the mask of each.
        is_kept: bool [B, D].
        masks: float32 [B, N, H/S, W/S], where they are.
        upsample: brings masks of an image to its size: (row of the batch, query_index [D'], item)
            to chunks as of `masks.upsample_masks`.
    """

    scores: np.ndarray
    labels: np.ndarray
    query_index: np.ndarray
    is_kept: np.ndarray
    masks: Any
    upsample: Callable[[int, np.ndarray, Prepared], Iterator[Any]]


class BasePredictor:
    """Find instances with a trained network.

    Args:
        class_names: names of the K classes.
        category_ids: the data set's id of each class; None for one that is left out.
        eval_size: (shortest, longest): the short side images are resized to, and the most that the
            long side may have, in pixels.
        cut: how masks are brought back and cut.
        batch_size: images that go through the network together; fewer are filled up.
        protocol: the test procedure, a key of `data.ecosystems.PROTOCOLS`.
        zoom: above 1, a photo is looked at in overlapping parts, see `runner.parts`.
    """

    def __init__(
        self,
        class_names: Sequence[str],
        category_ids: Sequence[int | None],
        eval_size: Size,
        cut: MaskCut,
        batch_size: int,
        protocol: str,
        zoom: float = 1.0,
    ) -> None:
        if len(class_names) != len(category_ids):
            raise ValueError(
                f"expected one category id for each class, got {len(class_names)} class names and "
                f"{len(category_ids)} category ids"
            )
        self.class_names = tuple(class_names)
        self.category_ids = tuple(None if i is None else int(i) for i in category_ids)
        self._is_wanted = np.array([i is not None for i in category_ids], bool)
        self.eval_size, self.batch_size, self.cut, self.zoom = eval_size, batch_size, cut, zoom
        self.protocol = find_protocol(protocol)

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({len(self.class_names)} classes, eval_size={self.eval_size}, "
            f"batch_size={self.batch_size})"
        )

    @property
    def num_together(self) -> int:
        """Images that go through the network together."""
        return self.batch_size

    def use_devices(self, devices: Sequence[Any]) -> None:
        """Send images through these devices; a runtime with threads of its own has no choice."""

    def select(self, items: Sequence[Prepared], size: Size) -> Any:
        """Send images of one padded size through the network."""
        raise NotImplementedError

    def rounded_otherwise(self, seed: int) -> AbstractContextManager[None]:
        """Use weights that differ by rounding alone, within a `with` block."""
        raise NotImplementedError

    def fetch(self, selection: Any) -> Fetched:
        """Wait for what `select` gave."""
        raise NotImplementedError

    def padded_size(self, item: Prepared) -> Size:
        """The next multiples of 32."""
        return padded_size((item.image.shape[0], item.image.shape[1]))

    @overload
    def __call__(self, image: ImageLike, score_threshold: float = 0.0) -> Prediction: ...

    @overload
    def __call__(
        self, image: list[Any] | tuple[Any, ...], score_threshold: float = 0.0
    ) -> list[Prediction]: ...

    def __call__(self, image: Any, score_threshold: float = 0.0) -> Any:
        """Find the instances of an image, or of a list of images.

        Args:
            image: a path, the bytes of an image file, a file open for reading, a Pillow image or a
                uint8 RGB array, see `as_rgb`; or a list or tuple of these.
            score_threshold: the lowest score of what is returned, 0...1.

        Returns:
            A `Prediction`, or a list of them.

        Raises:
            FileNotFoundError: a path does not exist.
            ValueError: an image cannot be read or is none.
        """
        if isinstance(image, list | tuple):
            return self.predict_batch(image, score_threshold)
        return self.predict_batch([image], score_threshold)[0]

    def predict_batch(
        self, images: Iterable[ImageLike], score_threshold: float = 0.0
    ) -> list[Prediction]:
        """Find the instances of many images of any sizes, a few in memory at a time.

        Images of one padded size go through the network `batch_size` at a time. The results are
        those of a call for each, and so are the arguments and errors.
        """
        if fault := score_fault(score_threshold):
            raise ValueError(fault)
        predictions, waiting = [], iter(images)
        together = self.num_together if self.num_together == 1 else 4 * self.num_together
        while arrays := [as_rgb(image) for image in itertools.islice(waiting, together)]:
            pending = self.start(list(map(self.prepare, arrays)))
            for array, found in zip(arrays, self.finish(pending, score_threshold), strict=True):
                rles, scores = found.encode()
                prediction = Prediction(
                    array,
                    rles,
                    scores,
                    found.labels,
                    self.class_names,
                    self.category_ids,
                    found.query_index,
                )
                is_kept = (run_lengths.areas_of(rles) > 0) & (scores >= score_threshold)
                predictions.append(prediction[is_kept])
        return predictions

    def prepare(self, image: np.ndarray) -> Ready:
        """Resize a photo uint8 [h, w, 3], or its parts (on the host; safe in threads)."""
        if self.zoom == 1:
            return self.prepare_whole(image)
        made = []
        for part in parts_of((image.shape[0], image.shape[1]), self.zoom):
            (y, x), (height, width) = part.corner, part.size
            piece = np.ascontiguousarray(image[y : y + height, x : x + width])
            made.append(self.prepare_whole(piece)._replace(part=part))
        return made

    def prepare_whole(self, image: np.ndarray) -> Prepared:
        """Resize an image uint8 [h, w, 3] by the test rule."""
        resized, mask_size = self.protocol.resize(image, self.eval_size)
        return Prepared(resized, (image.shape[0], image.shape[1]), mask_size)

    def run(self, items: Sequence[Ready]) -> list[FoundInstances | Joined]:
        """Send prepared images through the network; see `start` and `finish`."""
        return self.finish(self.start(items))

    def start(self, items: Sequence[Ready]) -> list[Pending]:
        """Hand images to the device, those of equal padded size together; does not wait."""
        items = [one for item in items for one in (item if isinstance(item, list) else [item])]
        groups: dict[Size, list[int]] = {}
        for position, item in enumerate(items):
            groups.setdefault(self.padded_size(item), []).append(position)
        pending = []
        for size, members in groups.items():
            for first in range(0, len(members), self.num_together):
                positions = members[first : first + self.num_together]
                chosen = [items[position] for position in positions]
                pending.append(Pending(positions, chosen, self.select(chosen, size)))
        return pending

    def finish(
        self, pending: Sequence[Pending], score_threshold: float = 0.0
    ) -> list[FoundInstances | Joined]:
        """Wait for the network and fetch what is kept, in the order of `start`'s images.

        What scores less than `score_threshold` already, before its mask makes it less, is left out.
        """
        found: dict[int, FoundInstances] = {}
        parts: dict[int, Part | None] = {}
        for positions, items, selection in pending:
            scores, labels, query_index, is_kept, _, upsample = self.fetch(selection)
            for row, (position, item) in enumerate(zip(positions, items, strict=True)):
                parts[position] = item.part
                (kept,) = np.nonzero(is_kept[row])
                if self.protocol.drops_last:
                    kept = kept[:-1]
                kept = kept[scores[row, kept] >= score_threshold]
                kept = kept[self._is_wanted[labels[row, kept]]]
                found[position] = FoundInstances(
                    labels[row, kept],
                    query_index[row, kept],
                    _with_scores(upsample(row, query_index[row, kept], item), scores[row, kept]),
                    item.original_size,
                )
        rest: Iterator[Any] = ((parts[position], found[position]) for position in range(len(found)))
        return [
            one if part is None else join([(part, one), *itertools.islice(rest, part.number - 1)])
            for part, one in rest
        ]


def _with_scores(
    chunks: Iterator[tuple[np.ndarray, np.ndarray | None]], scores: np.ndarray
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Pair each chunk of masks with its scores, multiplied by the masks' own."""
    first = 0
    for chunk, factors in chunks:
        part = scores[first : first + len(chunk)]
        yield chunk, part if factors is None else part * factors
        first += len(chunk)
