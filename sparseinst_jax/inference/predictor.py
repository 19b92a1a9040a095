"""Turn images into instances: the one path that evaluation, prediction and notebooks share.

An image is resized by the test rule, padded to the next multiple of 32 and goes through the network
with images of the same padded size; what is kept is brought back to the original size on the device
and packed as RLE on the host.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, overload

import jax
import jax.numpy as jnp
import numpy as np

from sparseinst_jax.data.ecosystems import find_protocol
from sparseinst_jax.data.images import ImageLike, as_rgb
from sparseinst_jax.data.transforms import padded_size
from sparseinst_jax.inference import masks
from sparseinst_jax.inference.activations import Activations
from sparseinst_jax.inference.prediction import Prediction, score_fault
from sparseinst_jax.models.family import Family, Selection
from sparseinst_jax.models.ops import normalize_images
from sparseinst_jax.models.trees import PureModel, Tree
from sparseinst_jax.runtime.messages import brief
from sparseinst_jax.runtime.process import refuse_forked

Size = tuple[int, int]
# Pixels, images: far above what devices hold; they bound what a stored configuration can ask for.
MAX_EVAL_SIZE, MAX_BATCH_SIZE = 1 << 14, 1 << 12


class Prepared(NamedTuple):
    """An image at network size.

    Attributes:
        image: uint8 [h, w, 3], resized by the test rule, not padded.
        original_size: (height, width) before the resize.
        mask_size: (height, width) of the part that masks are cut to: the image.
    """

    image: np.ndarray
    original_size: Size
    mask_size: Size


class Pending(NamedTuple):
    """A batch on its way through the device: positions in the caller's list, and the selection."""

    positions: list[int]
    items: list[Prepared]
    selection: Selection


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
            rles.extend(masks.encode_transposed(chunk))
            scores.append(its_scores)
        return rles, np.concatenate(scores)


class Forward(NamedTuple):
    """What a network computes on its way, for one image.

    Attributes:
        outputs: what it returns: of SparseInst `class_logits` [1, N, K], `mask_logits`
            [1, N, H/4, W/4] and `objectness_logits` [1, N].
        intermediates: the named tensors in the order of the network, NHWC: "res3", "encoder",
            "instance_activation_maps", "mask_features" and so on.
        image: uint8 [H, W, 3], the resized and padded image.
        valid_size: (height, width) of the part of it that is no padding.
    """

    outputs: Any
    intermediates: dict[str, jax.Array]
    image: np.ndarray
    valid_size: Size


class Predictor:
    """Find instances with a trained network.

    The compiled functions live as long as the object, one for each padded size; `set_weights`
    changes the weights without compiling again. It belongs to its process: it cannot be pickled,
    nor used after a fork.

    Args:
        apply: the network's pure function, `(params, statistics, images, train=False)` to
            (outputs, statistics).
        params: nested dict of arrays.
        statistics: nested dict of arrays.
        class_names: names of the K classes.
        category_ids: the data set's id of each class; None for one that is left out.
        eval_size: (shortest, longest): the short side images are resized to, and the most that the
            long side may have, in pixels.
        family: of the network: how its outputs are scored, and its masks brought back and cut.
        options: of `family.select`; `mask_threshold` among them also cuts the masks.
        batch_size: images that go through the network together on a device; fewer are filled up.
        protocol: the test procedure, a key of `data.ecosystems.eval_protocols.PROTOCOLS`.
    """

    def __init__(
        self,
        apply: Callable[..., Any],
        params: Tree,
        statistics: Tree,
        class_names: Sequence[str],
        category_ids: Sequence[int | None],
        eval_size: tuple[int, int],
        *,
        family: Family,
        options: Mapping[str, Any] | None = None,
        batch_size: int = 1,
        protocol: str = "original",
    ) -> None:
        if len(class_names) != len(category_ids):
            raise ValueError(
                f"expected one category id for each class, got {len(class_names)} class names and "
                f"{len(category_ids)} category ids"
            )
        self.class_names = tuple(class_names)
        self.category_ids = tuple(None if i is None else int(i) for i in category_ids)
        self._is_wanted = np.array([i is not None for i in category_ids], bool)
        options = dict(options or {})
        self.eval_size = checked_settings(eval_size, batch_size, options)
        self.mask_threshold = options.get("mask_threshold", family.mask_threshold)
        self.batch_size = batch_size
        self.protocol = find_protocol(protocol)
        self._cut = masks.MaskCut(
            self.mask_threshold,
            family.mask_stride,
            family.masks_are_logits,
            family.scores_at_original_size,
        )

        self._apply, self.family = apply, family
        self._select_outputs = functools.partial(family.select, **options)
        self._weights = params, statistics
        self.use_devices(jax.local_devices()[:1])

    def __repr__(self) -> str:
        return (
            f"Predictor({len(self.class_names)} classes, eval_size={self.eval_size}, "
            f"batch_size={self.batch_size})"
        )

    def use_devices(self, devices: Sequence[Any]) -> None:
        """Send images through these local devices, `batch_size` at a time through each.

        One device is used at first. Results do not depend on how many there are.
        """
        self._devices, apply, self._made = list(devices), self._apply, None
        if _is_accelerator(self._devices[0]) and isinstance(apply, PureModel):
            apply, self._made = apply.for_inference()

        def forward(
            params: Tree, statistics: Tree, images: jax.Array, valid_size: jax.Array
        ) -> Selection:
            outputs, _ = apply(
                params, statistics, normalize_images(images, valid_size), train=False
            )
            return self._select_outputs(outputs)

        if len(self._devices) == 1:
            self._forward = jax.jit(forward)
        else:
            # Compiled once for all of them; `jit` would compile once for each.
            self._forward = jax.pmap(forward, in_axes=(0, 0, 0, 0), devices=self._devices)
        self.set_weights(*self._weights)

    @property
    def num_together(self) -> int:
        """Images that go through the network together, over all devices."""
        return self.batch_size * len(self._devices)

    @property
    def weights(self) -> tuple[Tree, Tree]:
        """The parameters and statistics in use: nested dicts of arrays."""
        return self._weights

    def set_weights(self, params: Tree, statistics: Tree) -> None:
        """Use other weights of the same network; nothing is compiled again."""
        self._weights, make = (params, statistics), self._made
        if len(self._devices) == 1:
            # The arrays that were given are not kept beside their copies.
            self._weights = self._placed = jax.device_put(self._weights, self._devices[0])
            if make is not None:
                self._placed = jax.jit(make)(*self._placed)
        else:
            copy = jax.pmap(
                lambda _, trees: trees if make is None else make(*trees),
                in_axes=(0, None),
                devices=self._devices,
            )
            self._placed = copy(np.arange(len(self._devices)), self._weights)

    def __reduce__(self) -> Any:
        raise TypeError(
            "a Predictor cannot be pickled or copied: it holds compiled functions and arrays on a "
            "device. Load it anew in each process, by sparseinst_jax.load(...), and start these by "
            'multiprocessing\'s "spawn"'
        )

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
            for array, found in zip(arrays, self.run(list(map(self.prepare, arrays))), strict=True):
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
                is_kept = (masks.areas_of(rles) > 0) & (scores >= score_threshold)
                predictions.append(prediction[is_kept])
        return predictions

    def forward(self, image: ImageLike) -> Forward:
        """Run the network on one image and keep everything it computes on the way."""
        resized = self.prepare(as_rgb(image)).image
        height, width = resized.shape[:2]
        padded = np.zeros((*padded_size((height, width)), 3), np.uint8)
        padded[:height, :width] = resized
        images = normalize_images(jnp.asarray(padded[None]), jnp.array([[height, width]]))
        params, statistics = self._weights
        intermediates: dict[str, jax.Array] = {}
        outputs, _ = self._apply(params, statistics, images, intermediates=intermediates)
        return Forward(outputs, intermediates, padded, (height, width))

    def activations(self, image: ImageLike) -> Activations:
        """Find the instances of one image, and where the network looked for each of them.

        Raises:
            ValueError: networks of this family have no activation maps.
        """
        if self.family.activations is None:
            raise ValueError(
                "networks of this family have no activation maps: its Family says no `activations`;"
                " see what forward(image).intermediates holds"
            )
        prediction, forward = self(image), self.forward(image)
        maps = self.family.activations(forward.outputs, forward.intermediates)
        return Activations.of(prediction, maps, forward.image.shape[:2], forward.valid_size)

    def prepare(self, image: np.ndarray) -> Prepared:
        """Resize an image uint8 [h, w, 3] by the test rule (on the host; safe in threads)."""
        resized, mask_size = self.protocol.resize(image, self.eval_size)
        return Prepared(resized, (image.shape[0], image.shape[1]), mask_size)

    def run(self, items: Sequence[Prepared]) -> list[FoundInstances]:
        """Send prepared images through the network; see `start` and `finish`."""
        return self.finish(self.start(items))

    def start(self, items: Sequence[Prepared]) -> list[Pending]:
        """Hand images to the device, those of equal padded size together; does not wait."""
        refuse_forked()
        groups: dict[Size, list[int]] = {}
        for position, item in enumerate(items):
            groups.setdefault(padded_size(item.image.shape[:2]), []).append(position)
        pending = []
        for size, members in groups.items():
            for first in range(0, len(members), self.num_together):
                positions = members[first : first + self.num_together]
                chosen = [items[position] for position in positions]
                pending.append(Pending(positions, chosen, self._select(chosen, size)))
        return pending

    def _select(self, items: Sequence[Prepared], size: Size) -> Selection:
        images = np.zeros((self.num_together, *size, 3), np.uint8)
        valid_size = np.zeros((self.num_together, 2), np.int32)
        for row, item in enumerate(items):
            height, width = item.image.shape[:2]
            images[row, :height, :width] = item.image
            valid_size[row] = height, width
        if len(self._devices) > 1:
            shape = len(self._devices), self.batch_size
            images = images.reshape(*shape, *images.shape[1:])
            valid_size = valid_size.reshape(*shape, 2)
        return self._forward(*self._placed, images, valid_size)

    def finish(self, pending: Sequence[Pending]) -> list[FoundInstances]:
        """Wait for the device and fetch what is kept, in the order of `start`'s images."""
        found: dict[int, FoundInstances] = {}
        for positions, items, selection in pending:
            scores, labels, query_index, is_kept = (
                np.reshape(array, (self.num_together, -1))
                for array in jax.device_get(selection[:4])
            )
            by_device = self._masks_by_device(selection.masks)
            for row, (position, item) in enumerate(zip(positions, items, strict=True)):
                (kept,) = np.nonzero(is_kept[row])
                if self.protocol.drops_last:
                    kept = kept[:-1]
                kept = kept[self._is_wanted[labels[row, kept]]]
                chunks = masks.upsample_masks(
                    by_device[row // self.batch_size],
                    row % self.batch_size,
                    query_index[row, kept],
                    item.mask_size,
                    item.original_size,
                    self._cut,
                )
                found[position] = FoundInstances(
                    labels[row, kept],
                    query_index[row, kept],
                    _with_scores(chunks, scores[row, kept]),
                    item.original_size,
                )
        return [found[position] for position in range(len(found))]

    def _masks_by_device(self, masks: jax.Array) -> list[jax.Array]:
        """Give what each device made, [B, N, H/S, W/S], on the first device.

        There the masks of all are upsampled: it takes far less than packing them on the host, and
        on its own each device would compile the upsampling again.
        """
        if len(self._devices) == 1:
            return [masks]
        parts = [masks.addressable_data(row) for row in range(len(self._devices))]
        return [jax.device_put(part, self._devices[0])[0] for part in parts]


def _is_accelerator(device: Any) -> bool:
    return device.platform != "cpu"


def _with_scores(
    chunks: Iterator[tuple[np.ndarray, np.ndarray | None]], scores: np.ndarray
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Pair each chunk of masks with its scores, multiplied by the masks' own."""
    first = 0
    for chunk, factors in chunks:
        part = scores[first : first + len(chunk)]
        yield chunk, part if factors is None else part * factors
        first += len(chunk)


def checked_settings(
    eval_size: Sequence[Any], batch_size: Any, options: Mapping[str, Any]
) -> tuple[int, int]:
    """Check settings that may come from an untrusted checkpoint; returns `eval_size`."""
    sizes = tuple(eval_size)
    if len(sizes) != 2 or not all(1 <= int(size) <= MAX_EVAL_SIZE for size in sizes):
        raise ValueError(
            f"data.eval_size must be two lengths of 1 to {MAX_EVAL_SIZE} pixels, got {brief(sizes)}"
        )
    if not 1 <= batch_size <= MAX_BATCH_SIZE:
        raise ValueError(f"eval.batch_size must be 1 to {MAX_BATCH_SIZE}, got {brief(batch_size)}")
    for key in ("score_threshold", "mask_threshold"):
        if not 0 <= options.get(key, 0) <= 1:
            raise ValueError(f"eval.{key} must be 0 to 1, got {brief(options[key])}")
    return int(sizes[0]), int(sizes[1])
