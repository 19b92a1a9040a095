"""The predictor of this package: the network and the way of masks back, compiled by JAX.

What is kept is brought back to the original size on the device and packed as RLE on the host; all
else of the path from images to instances is `runner.predictor`'s.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sparseinst_jax.data.images import ImageLike, as_rgb
from sparseinst_jax.data.transforms import padded_size, resized_size
from sparseinst_jax.export import stablehlo
from sparseinst_jax.export.files import Exportable, export_onnx, export_stablehlo
from sparseinst_jax.export.verify import Agreement
from sparseinst_jax.inference import masks
from sparseinst_jax.models.families import FAMILIES
from sparseinst_jax.models.family import Family, Selection
from sparseinst_jax.models.ops import normalize_images
from sparseinst_jax.models.trees import PureModel, Tree, functional
from sparseinst_jax.runner.activations import Activations
from sparseinst_jax.runner.masks import MaskCut
from sparseinst_jax.runner.predictor import BasePredictor, Fetched, Pending, Prepared, Size
from sparseinst_jax.runtime.messages import brief
from sparseinst_jax.runtime.process import refuse_forked

# Pixels, images: far above what devices hold; they bound what a stored configuration can ask for.
MAX_EVAL_SIZE, MAX_BATCH_SIZE, MAX_ZOOM = 1 << 14, 1 << 12, 32


class Forward(NamedTuple):
    """What a network computes on its way, for one image.

    Attributes:
        outputs: what it returns, for a batch of one.
        intermediates: the named tensors in the order of the network, such as "res3", NHWC.
        image: uint8 [H, W, 3], the resized and padded image.
        valid_size: (height, width) of the part of it that is no padding.
    """

    outputs: Any
    intermediates: dict[str, jax.Array]
    image: np.ndarray
    valid_size: Size


class Predictor(BasePredictor):
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
        protocol: the test procedure, a key of `data.ecosystems.PROTOCOLS`.
        config: the whole configuration as plain values, for those who are handed an exported file.
        zoom: above 1, a photo is looked at in overlapping parts, see `runner.parts`.
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
        config: Mapping[str, Any] | None = None,
        zoom: float = 1.0,
    ) -> None:
        self._family, self._protocol_name, self._config = family, protocol, dict(config or {})
        options = dict(options or {})
        eval_size = checked_settings(eval_size, batch_size, options, zoom)
        self.mask_threshold = options.get("mask_threshold", family.mask_threshold)
        cut = MaskCut(
            self.mask_threshold,
            family.mask_stride,
            family.masks_are_logits,
            family.scores_at_original_size,
        )
        super().__init__(class_names, category_ids, eval_size, cut, batch_size, protocol, zoom)
        self._apply, self._options = apply, options
        self._select_outputs = functools.partial(family.select, **options)
        self._weights = params, statistics
        self.use_devices(jax.local_devices()[:1])

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

    def release_weights(self) -> None:
        """Hold no weights until `set_weights` gives new ones; nothing is compiled again."""
        self._weights = self._placed = ({}, {})

    def export(
        self,
        path: str | os.PathLike,
        *,
        size: Size | None = None,
        photos: Sequence[ImageLike] = (),
        verifies: bool = True,
        calibration: Sequence[ImageLike] = (),
    ) -> Agreement | None:
        """Write the network as an ONNX file that runs without JAX, see `sparseinst_jax.load`.

        Or with the suffix .stablehlo as an artefact of `jax.export`, of one size.

        The file is compared with this predictor on photos before it gets its name.

        Args:
            path: of the new file; an older one is replaced.
            size: padded (height, width) for a file that takes one image of that size; by default
                any number of images of any size.
            photos: to compare on, see `__call__`; drawn ones by default.
            verifies: whether it is compared.
            calibration: photos that make it int8: smaller and faster, and less exact.

        Returns:
            How far the file is from the model, within the bounds of rounding.

        Raises:
            ValueError: a part of the network has no writer, a package of the extra `export` is not
                installed, or the file does not find what the model finds: then none is left.
        """
        path, compared = Path(path), list(map(as_rgb, photos)) if verifies else None
        if path.suffix == stablehlo.SUFFIX:
            if calibration:
                raise ValueError("int8 is for .onnx files: leave out calibration")
            size = size or padded_size(resized_size((3, 4), *self.eval_size))
            return export_stablehlo(self.exportable(size), path, compared)
        source = self.exportable(size)
        return export_onnx(source, path, compared, list(map(as_rgb, calibration)))

    def exportable(self, size: Size | None = None) -> Exportable:
        """What `export` needs: the network as a module, and a float32 predictor on the CPU."""
        if not isinstance(self._apply, PureModel):
            raise ValueError(
                "only a network that is a module can be exported: make its predictor with what"
                " `models.functional(module)` gives"
            )
        params, statistics = jax.device_get(self._weights)
        module = self._apply.module(params, statistics)
        for _, node in nnx.iter_graph(module):
            if isinstance(node, nnx.Module) and hasattr(node, "dtype"):
                setattr(node, "dtype", jnp.float32)  # noqa: B010  (pyright knows no such attribute)
        model = Predictor(
            *functional(module),
            self.class_names,
            self.category_ids,
            self.eval_size,
            family=self._family,
            options=self._options,
            protocol=self._protocol_name,
        )
        with contextlib.suppress(RuntimeError):  # a process may have been given no CPU
            model.use_devices(jax.local_devices(backend="cpu")[:1])
        return Exportable(
            module=module,
            weights=(params, statistics),
            family=next((name for name, one in FAMILIES.items() if one is self._family), "own"),
            select=self._select_outputs,
            options={**_defaults(self._family.select), **self._options},
            protocol=self._protocol_name,
            config=self._config,
            model=model,
            cut=self.cut,
            size=size,
        )

    def __reduce__(self) -> Any:
        raise TypeError(
            "a Predictor cannot be pickled or copied: it holds compiled functions and arrays on a "
            "device. Load it anew in each process, by sparseinst_jax.load(...), and start these by "
            'multiprocessing\'s "spawn"'
        )

    def forward(self, image: ImageLike) -> Forward:
        """Run the network on one whole image and keep everything it computes on the way."""
        resized = self.prepare_whole(as_rgb(image)).image
        height, width = resized.shape[:2]
        padded = np.zeros((*padded_size((height, width)), 3), np.uint8)
        padded[:height, :width] = resized
        images = normalize_images(jnp.asarray(padded[None]), jnp.array([[height, width]]))
        params, statistics = self._weights
        intermediates: dict[str, jax.Array] = {}
        outputs, _ = self._apply(params, statistics, images, intermediates=intermediates)
        return Forward(outputs, intermediates, padded, (height, width))

    @contextlib.contextmanager
    def rounded_otherwise(self, seed: int) -> Iterator[None]:
        """Use weights that each lie one float32 higher or lower, by chance, within a `with` block.

        Such a network is as right as this one. What both find does not hang on rounding.
        """
        rng, weights = np.random.default_rng(seed), self._weights

        def move(values: Any) -> np.ndarray:
            values = np.asarray(values)
            if values.dtype != np.float32:
                return values
            towards = np.where(rng.random(values.shape) < 0.5, -np.inf, np.inf)
            return np.nextafter(values, towards.astype(np.float32))

        self.set_weights(*jax.tree.map(move, jax.device_get(weights)))
        try:
            yield
        finally:
            self.set_weights(*weights)

    def activations(self, image: ImageLike) -> Activations:
        """Find the instances of one image, and where the network looked for each of them.

        Raises:
            ValueError: networks of this family have no activation maps, or photos are looked at in
                parts.
        """
        if self.zoom != 1:
            raise ValueError(
                f"the maps of a photo are of the whole of it, and eval.zoom is {self.zoom:g}: "
                'load(path, overrides={"eval.zoom": 1}), or give a part of the photo'
            )
        if self._family.activations is None:
            raise ValueError(
                "networks of this family have no activation maps: its Family says no `activations`;"
                " see what forward(image).intermediates holds"
            )
        prediction, forward = self(image), self.forward(image)
        maps = self._family.activations(forward.outputs, forward.intermediates)
        return Activations.of(prediction, maps, forward.image.shape[:2], forward.valid_size)

    def start(self, items: Sequence[Prepared]) -> list[Pending]:
        """Hand images to the device, those of equal padded size together; does not wait."""
        refuse_forked()
        return super().start(items)

    def select(self, items: Sequence[Prepared], size: Size) -> Selection:
        """Send images of one padded size through the network; does not wait."""
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

    def fetch(self, selection: Selection) -> Fetched:
        """Wait for the device; masks are upsampled there, when they are asked for."""
        scores, labels, query_index, is_kept = (
            np.reshape(array, (self.num_together, -1)) for array in jax.device_get(selection[:4])
        )
        by_device = self._masks_by_device(selection.masks)

        def upsample(row: int, chosen: np.ndarray, item: Prepared) -> Any:
            device, place = divmod(row, self.batch_size)
            sizes = item.mask_size, item.original_size
            return masks.upsample_masks(by_device[device], place, chosen, *sizes, self.cut)

        return Fetched(scores, labels, query_index, is_kept, by_device[0], upsample)

    def _masks_by_device(self, masks: jax.Array) -> list[jax.Array]:
        """Give what each device made, [B, N, H/S, W/S], on the first device.

        There the masks of all are upsampled: it takes far less than packing them on the host, and
        on its own each device would compile the upsampling again.
        """
        if len(self._devices) == 1:
            return [masks]
        parts = [masks.addressable_data(row) for row in range(len(self._devices))]
        return [jax.device_put(part, self._devices[0])[0] for part in parts]


def _defaults(function: Callable[..., Any]) -> dict[str, Any]:
    parameters = inspect.signature(function).parameters.values()
    return {one.name: one.default for one in parameters if one.default is not one.empty}


def _is_accelerator(device: Any) -> bool:
    return device.platform != "cpu"


def checked_settings(
    eval_size: Sequence[Any], batch_size: Any, options: Mapping[str, Any], zoom: Any = 1.0
) -> tuple[int, int]:
    """Check settings that may come from an untrusted checkpoint; returns `eval_size`."""
    sizes = tuple(eval_size)
    if len(sizes) != 2 or not all(1 <= int(size) <= MAX_EVAL_SIZE for size in sizes):
        raise ValueError(
            f"data.eval_size must be two lengths of 1 to {MAX_EVAL_SIZE} pixels, got {brief(sizes)}"
        )
    if not 1 <= batch_size <= MAX_BATCH_SIZE:
        raise ValueError(f"eval.batch_size must be 1 to {MAX_BATCH_SIZE}, got {brief(batch_size)}")
    if not 1 <= zoom <= MAX_ZOOM:
        raise ValueError(f"eval.zoom must be 1 to {MAX_ZOOM}, got {brief(zoom)}")
    for key in ("score_threshold", "mask_threshold"):
        if not 0 <= options.get(key, 0) <= 1:
            raise ValueError(f"eval.{key} must be 0 to 1, got {brief(options[key])}")
    return int(sizes[0]), int(sizes[1])
