"""The plan of training batches, a pure function of the settings and the step.

The images run by as an endless stream of epochs, each a permutation of its own. The stream is cut
into chunks of CHUNK_STEPS steps; inside a chunk the images are sorted into landscape and portrait,
and a batch is made whenever one of the two has enough (as the original groups them). What is left
of both at the end of a chunk makes its last batch. So every image is used once per epoch, with
nothing dropped or repeated, any step can be planned without its predecessors, and a data set
smaller than the batch works (a batch then holds several epochs).

Copy-paste (off by default) draws from a stream of its own, one generator per place in the stream of
images, so that it changes nothing else of the plan.

Source: Ghiasi et al., arXiv:2012.07177 (simple copy-paste).
Differs from the reference: the pasted objects are at least one and never more than the batch's
static shapes have room for; what falls outside the first image is cut off (there the canvas is the
padded image); borders are not smoothed.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from sparseinst_jax.data.ecosystems import DEFAULT_RULES, RESIZE_RULES
from sparseinst_jax.data.records import CocoDataset
from sparseinst_jax.data.target_masks import QUARTER_LEVELS, TargetForm
from sparseinst_jax.data.transforms import (
    AUGMENTATIONS,
    LSJ_RANGE,
    NUM_DRAWS,
    PADDING_MULTIPLE,
    Recipe,
    Size,
    Transform,
    padded_size,
    resized_size,
)

CHUNK_STEPS = 256
TARGET_MULTIPLE = 8
SMALL_NUM_TARGETS = 32
MAX_SHORT_SIDE, MAX_LONG_SIDE = 640, 853  # of the published recipe
# Streams of random numbers under one seed.
_ORDER, _DRAWS, _PASTE = 0, 1, 2
CROWD = ("drop", "ignore")


class Paste(NamedTuple):
    """Objects to paste: ``targets`` index those of the image at ``position``, in its order."""

    position: int
    transform: Transform
    targets: tuple[int, ...]


class ImagePlan(NamedTuple):
    """One image of a step: its ``position`` in the data set and what happens to it."""

    position: int
    transform: Transform
    paste: Paste | None = None


class StepPlan(NamedTuple):
    """One step: the images of this host, and what all hosts share.

    ``padded_size`` (height, width) in pixels and ``num_targets`` (M) are static shapes; ``epoch``
    is that of the step's first image. ``flip_labels[label]`` is the label of a flipped object;
    empty where a flip changes none. ``ignores_crowd``: the batch marks where crowd regions are.
    ``targets``: the form of the masks.
    """

    step: int
    epoch: int
    padded_size: Size
    num_targets: int
    images: tuple[ImagePlan, ...]
    flip_labels: tuple[int, ...] = ()
    ignores_crowd: bool = False
    targets: TargetForm = QUARTER_LEVELS


class TrainPlan:
    """Plans for every step which images are read and how they are transformed and padded.

    Differs from the reference: it pads to the largest image of a batch; here to the smallest of six
    fixed shapes (landscape and portrait at three scales), because each shape compiles once.
    """

    def __init__(
        self,
        image_sizes: np.ndarray,
        num_targets: np.ndarray,
        *,
        seed: int,
        batch_size: int,
        train_sizes: tuple[int, ...],
        train_max_size: int,
        augmentation: str = "flip_resize",
        lsj_range: tuple[float, float] = LSJ_RANGE,
        copy_paste: float = 0.0,
        flip_labels: tuple[int, ...] = (),
        crowd: str = "drop",
        resize_rule: str = DEFAULT_RULES,
        boxes_xyxy: Sequence[np.ndarray] | None = None,
        targets: TargetForm = QUARTER_LEVELS,
    ) -> None:
        """Check and store the settings.

        Args:
            image_sizes: [images, 2], (height, width) in pixels.
            num_targets: [images], objects to learn of each image.
            seed: of order and transforms.
            batch_size: images of a step over all hosts and micro-batches.
            train_sizes: choices of the shortest side, pixels.
            train_max_size: limit of the longest side, pixels.
            augmentation: one of ``transforms.AUGMENTATIONS``.
            lsj_range: smallest and largest factor of the augmentation ``lsj``.
            copy_paste: probability that objects of another image are pasted onto an image.
            flip_labels: label of each label's object in a flipped image; empty for the same.
            crowd: one of CROWD.
            resize_rule: whose sizes, crops and pixels, one of ``ecosystems.RESIZE_RULES``.
            boxes_xyxy: of the objects of each image, [objects, 4]; where a rule crops by them.
            targets: form of the masks of objects.

        Raises:
            ValueError: lists every setting that cannot be.
        """
        self.image_sizes = np.asarray(image_sizes, np.int64).reshape(-1, 2)
        self._counts = np.asarray(num_targets, np.int64)
        self.seed, self.batch_size = seed, batch_size
        self.train_sizes = tuple(sorted(int(size) for size in train_sizes))
        self.train_max_size, self.augmentation = int(train_max_size), augmentation
        self.lsj_range: Any = tuple(lsj_range)  # of two numbers, see `_check`
        self.copy_paste = float(copy_paste)
        self.flip_labels, self.crowd = tuple(flip_labels), crowd
        self.resize_rule, self._boxes, self.targets = resize_rule, boxes_xyxy, targets
        self._check()
        self._rule = RESIZE_RULES[resize_rule]
        longest = self._longest_side()
        self.buckets = training_buckets(self.train_sizes, longest)
        if augmentation == "lsj":
            self.buckets = self.buckets[-1:]  # the jitter's canvas has one size
        most = longest if augmentation == "lsj" else self.train_max_size
        self._recipe = Recipe(self.train_sizes, most, augmentation, self.lsj_range)
        self.target_levels = target_levels(self._most_targets())
        self._pasted_from = np.flatnonzero(self._counts)
        # Bound to the instance, so that two plans do not share or evict each other's cache.
        self._chunk = lru_cache(maxsize=2)(self._plan_chunk)

    @classmethod
    def of(
        cls, dataset: CocoDataset, batch_size: int = 8, seed: int = 0, **settings: Any
    ) -> TrainPlan:
        """Plan for a data set: images at their own size, mirrored at random.

        Args:
            dataset: from ``load_coco``.
            batch_size: images of a step.
            seed: of order and mirroring.
            settings: any others, see the constructor. By default the short side is the median of
                the data set's, and sides have at most 640 and 853 pixels, as the published recipe
                has them.
        """
        sides = np.sort(dataset.image_sizes, axis=1)
        short = min(int(np.median(sides[:, 0])), MAX_SHORT_SIDE) if len(sides) else MAX_SHORT_SIDE
        longest = max(min(int(sides.max(initial=0)), MAX_LONG_SIDE), short)
        defaults = dict(train_sizes=(short,), train_max_size=longest, boxes_xyxy=dataset.boxes_xyxy)
        given: Any = {**defaults, **settings}
        counts = dataset.num_targets
        return cls(dataset.image_sizes, counts, seed=seed, batch_size=batch_size, **given)

    def __getstate__(self) -> dict:
        """Leave the cache behind: worker processes get a plan by pickle."""
        return {key: value for key, value in self.__dict__.items() if key != "_chunk"}

    def __setstate__(self, state: dict) -> None:
        """Restore with an empty cache."""
        self.__dict__.update(state)
        self._chunk = lru_cache(maxsize=2)(self._plan_chunk)

    def _check(self) -> None:
        faults = []
        if not len(self.image_sizes):
            faults.append("the data set has no image")
        if len(self.image_sizes) != len(self._counts):
            faults.append(f"{len(self.image_sizes)} image sizes, {len(self._counts)} counts")
        if self.batch_size < 1:
            faults.append(f"config.train.batch_size must be at least 1, got {self.batch_size}")
        if not self.train_sizes or self.train_sizes[0] < 1:
            faults.append(f"config.data.train_sizes must be pixels > 0, got {self.train_sizes}")
        elif self.train_max_size < self.train_sizes[-1]:
            faults.append(
                f"config.data.train_max_size {self.train_max_size} is below the largest of "
                f"config.data.train_sizes, {self.train_sizes[-1]}"
            )
        if self.augmentation not in AUGMENTATIONS:
            faults.append(
                f"config.data.augmentation must be one of {AUGMENTATIONS}, got "
                f"{self.augmentation!r}"
            )
        if len(self.lsj_range) != 2 or not 0 < self.lsj_range[0] <= self.lsj_range[1]:
            faults.append(
                "config.data.lsj_range must be (smallest, largest) factor with 0 < smallest <= "
                f"largest, got {self.lsj_range}"
            )
        if not 0 <= self.copy_paste <= 1:
            faults.append(
                f"config.data.copy_paste must be a probability 0 ... 1, got {self.copy_paste}"
            )
        if self.crowd not in CROWD:
            faults.append(f"config.data.crowd must be one of {CROWD}, got {self.crowd!r}")
        if self.resize_rule not in RESIZE_RULES:
            faults.append(
                f"config.data.resize_rule must be one of {tuple(RESIZE_RULES)}, got "
                f"{self.resize_rule!r}"
            )
        elif self.augmentation not in (known := RESIZE_RULES[self.resize_rule].augmentations):
            faults.append(
                f"config.data.augmentation={self.augmentation} is none of {self.resize_rule}, "
                f"which has {', '.join(known)}: set config.data.resize_rule={DEFAULT_RULES}"
            )
        if faults:
            raise ValueError("training cannot be planned: " + "; ".join(faults))

    def _most_targets(self) -> int:
        most = int(self._counts.max())
        if not self.copy_paste:
            return most
        # Small sets get room for twice their objects; crowded ones do not grow: memory would.
        return max(most, min(2 * most, SMALL_NUM_TARGETS))

    def _longest_side(self) -> int:
        """Longest side that a transform can give, so that no padding is wasted on a uniform set."""
        size_of = self._rule.resized_size
        longest = max(
            max(size_of((height, width), self.train_sizes[-1], self.train_max_size))
            for height, width in np.unique(self.image_sizes, axis=0).tolist()
        )
        # A crop can have any shape.
        is_cropped = self.augmentation == "flip_resize_crop"
        return max(longest, self.train_max_size) if is_cropped else longest

    @property
    def steps_per_epoch(self) -> float:
        """Steps in which as many images are used as the data set has; rarely whole."""
        return len(self.image_sizes) / self.batch_size

    def epoch_of(self, step: int) -> int:
        """Epoch of the stream at a step's first image."""
        return step * self.batch_size // len(self.image_sizes)

    def batch(self, step: int, host_index: int = 0, host_count: int = 1) -> StepPlan:
        """Plan a step.

        Args:
            step: from 0.
            host_index: which contiguous slice of the global batch to return.
            host_count: number of slices; must divide the batch size.

        Returns:
            the plan with this host's images; joined over hosts it is the same for any host count.
        """
        if self.batch_size % host_count or not 0 <= host_index < host_count:
            raise ValueError(
                f"a batch of {self.batch_size} images cannot be cut for host {host_index} of "
                f"{host_count}; make config.train.batch_size a multiple of the number of hosts"
            )
        slots, positions, transforms = self._chunk(step // CHUNK_STEPS)[step % CHUNK_STEPS]
        transforms, bucket = self._fit(positions, transforms)
        # Of all hosts' images, because they share the number of targets.
        pastes = [
            self._draw_paste(step // CHUNK_STEPS, slot, int(self._counts[position]))
            for slot, position in zip(slots, positions, strict=True)
        ]
        added = [len(paste.targets) if paste else 0 for paste in pastes]
        most = int((self._counts[positions] + added).max())
        level = next(level for level in self.target_levels if level >= most)
        per_host = self.batch_size // host_count
        mine = slice(host_index * per_host, (host_index + 1) * per_host)
        images = tuple(
            ImagePlan(int(position), transform, paste)
            for position, transform, paste in zip(
                positions[mine], transforms[mine], pastes[mine], strict=True
            )
        )
        return StepPlan(
            step,
            self.epoch_of(step),
            bucket,
            level,
            images,
            self.flip_labels,
            self.crowd == "ignore",
            self.targets,
        )

    def _draw(self, draws: np.ndarray, position: int) -> Transform:
        size = tuple(self.image_sizes[position].tolist())
        boxes = None if self._boxes is None else self._boxes[position]
        return self._rule.draw(draws, size, self._recipe, boxes)

    def _draw_paste(self, chunk: int, slot: int, num_present: int) -> Paste | None:
        """Draw what is pasted onto the image in a slot of a chunk, which has objects of its own."""
        if not self.copy_paste or not len(self._pasted_from):
            return None
        random = np.random.default_rng([self.seed, _PASTE, chunk, slot])
        room = self.target_levels[-1] - num_present
        if random.random() >= self.copy_paste or not room:
            return None
        position = int(self._pasted_from[random.integers(len(self._pasted_from))])
        transform = self._draw(random.random(NUM_DRAWS), position)
        there = int(self._counts[position])
        number = min(int(random.integers(1, there + 1)), room)
        chosen = random.permutation(there)[:number]
        return Paste(position, transform, tuple(sorted(chosen.tolist())))

    def _plan_chunk(self, chunk: int) -> list[tuple[list[int], np.ndarray, list[Transform]]]:
        """Slots, positions and transforms of each step, before a mixed batch is made to fit."""
        number = CHUNK_STEPS * self.batch_size
        positions = self._stream(chunk * number, number)
        draws = np.random.default_rng([self.seed, _DRAWS, chunk]).random((number, NUM_DRAWS))
        transforms = [
            self._draw(row, position) for row, position in zip(draws, positions, strict=True)
        ]
        waiting: dict[bool, list[int]] = {False: [], True: []}
        batches = []
        for slot, transform in enumerate(transforms):
            group = waiting[_is_portrait(transform.size)]
            group.append(slot)
            if len(group) == self.batch_size:
                batches.append(list(group))
                group.clear()
        left = waiting[False] + waiting[True]  # none, or exactly one batch
        if left:
            batches.append(left)
        return [
            (slots, positions[slots], [transforms[slot] for slot in slots]) for slots in batches
        ]

    def _stream(self, start: int, number: int) -> np.ndarray:
        """Positions ``start ... start + number - 1`` of the endless stream of permutations."""
        num_images = len(self.image_sizes)
        parts = []
        for epoch in range(start // num_images, (start + number - 1) // num_images + 1):
            order = np.random.default_rng([self.seed, _ORDER, epoch]).permutation(num_images)
            first = max(start - epoch * num_images, 0)
            parts.append(order[first : start + number - epoch * num_images])
        return np.concatenate(parts)

    def _fit(
        self, positions: np.ndarray, transforms: list[Transform]
    ) -> tuple[list[Transform], Size]:
        """The bucket of a step; in a mixed batch the rarer orientation is made to fit it.

        A square bucket for both orientations would be a third larger than any other, so memory
        would run out at an unpredictable step. Instead the images of the rarer orientation
        are resized to a longest side of the bucket's short side, once in CHUNK_STEPS steps.
        """
        portrait = [_is_portrait(transform.size) for transform in transforms]
        upright = 2 * sum(portrait) > len(portrait)
        if any(is_portrait != upright for is_portrait in portrait):
            longest = min(self.buckets[-1])
            transforms = [
                transform if is_portrait == upright else self._shrunk(transform, position, longest)
                for transform, is_portrait, position in zip(
                    transforms, portrait, positions, strict=True
                )
            ]
        height = max(transform.size[0] for transform in transforms)
        width = max(transform.size[1] for transform in transforms)
        for bucket in self.buckets:
            if upright:
                bucket = bucket[1], bucket[0]
            if height <= bucket[0] and width <= bucket[1]:
                return transforms, bucket
        raise AssertionError(f"no bucket of {self.buckets} holds {(height, width)}")

    def _shrunk(self, transform: Transform, position: int, longest: int) -> Transform:
        before = tuple(self.image_sizes[position].tolist())
        if transform.crop is not None:
            before = transform.crop[2:]
        return transform._replace(size=resized_size(before, min(transform.size), longest))


def _is_portrait(size: Size) -> bool:
    return size[0] > size[1]


def training_buckets(train_sizes: tuple[int, ...], longest_side: int) -> tuple[Size, ...]:
    """Landscape padded sizes, smallest first; portrait ones are these turned.

    Two smaller scales of a 4:3 image, and the largest, which holds every image.
    """
    sizes = sorted(train_sizes)
    last = len(sizes) - 1
    buckets = []
    for index in (round(last / 3), round(2 * last / 3)):
        longest = min(longest_side, -(-sizes[index] * 4 // 3))
        buckets.append(padded_size((sizes[index], longest), PADDING_MULTIPLE))
    buckets.append(padded_size((sizes[-1], longest_side), PADDING_MULTIPLE))
    return tuple(sorted(set(buckets)))


def target_levels(most: int) -> tuple[int, ...]:
    """Choices of M, the padded number of targets, for at most ``most`` objects in an image."""
    largest = max(-(-most // TARGET_MULTIPLE), 1) * TARGET_MULTIPLE
    return (SMALL_NUM_TARGETS, largest) if most > SMALL_NUM_TARGETS else (largest,)
