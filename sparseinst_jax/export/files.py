"""Write an exported file: made, compared with the model, and only then given its name."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sparseinst_jax.export import verify
from sparseinst_jax.export.verify import Agreement
from sparseinst_jax.runner.file_predictor import FilePredictor
from sparseinst_jax.runner.masks import MaskCut
from sparseinst_jax.runner.metadata import KEY, PILLOW_BILINEAR, SIZE_MULTIPLE, Metadata
from sparseinst_jax.runner.onnx_file import SUFFIX
from sparseinst_jax.runner.predictor import BasePredictor, Size
from sparseinst_jax.runtime import process
from sparseinst_jax.runtime.files import check_output, replace_file

if TYPE_CHECKING:
    import onnx

RUNTIME = "onnxruntime"  # which a file is compared by


@dataclasses.dataclass(frozen=True)
class Exportable:
    """A network and what belongs to it.

    Attributes:
      module: the network, computing in float32.
      weights: its parameters and statistics, nested dicts of arrays.
      family: name of the family.
      select: of the family, outputs to a selection.
      options: of `select`.
      protocol: name of the test procedure.
      config: the whole configuration, plain values.
      model: what the file is compared with, on the CPU and in float32.
      cut: how masks are brought back.
      size: padded (height, width) of a file for one image of that size; None for any.
    """

    module: Any
    weights: tuple[Any, Any]
    family: str
    select: Callable[[Any], Any]
    options: Mapping[str, Any]
    protocol: str
    config: Mapping[str, Any]
    model: BasePredictor
    cut: MaskCut
    size: Size | None

    def metadata(self) -> Metadata:
        """What the file says of itself, before it is compared.

        Raises:
          ValueError: the network has no writer, or the package `onnx` is not installed.
        """
        with _needs_packages():
            from sparseinst_jax.export.writer import num_masks, weights_sha256

        shortest, longest = self.model.eval_size
        return Metadata(
            version=process.version(),
            family=self.family,
            precision="float32",
            class_names=self.model.class_names,
            category_ids=self.model.category_ids,
            shortest_side=shortest,
            longest_side=longest,
            resize=PILLOW_BILINEAR if self.protocol == "original" else "other",
            protocol=self.protocol,
            size_multiple=SIZE_MULTIPLE,
            fixed_size=self.size,
            num_masks=num_masks(self.module),
            mask_stride=self.cut.stride,
            score_threshold=float(self.options["score_threshold"]),
            mask_threshold=float(self.cut.threshold),
            masks_are_logits=self.cut.are_logits,
            scores_at_original_size=self.cut.measures,
            config=self.config,
            weights_sha256=weights_sha256(*self.weights),
            verification=None,
        )


def export_onnx(
    source: Exportable,
    path: Path,
    photos: Sequence[np.ndarray] | None,
    calibration: Sequence[np.ndarray] = (),
) -> Agreement | None:
    """Write an ONNX file whole or not at all.

    Args:
      source: the network.
      path: of the new file.
      photos: uint8 [h, w, 3], to compare on; drawn ones where there are none, or where they have
        one padded size. None writes without comparing.
      calibration: photos that make the file int8. It is compared too, but no bound refuses it.

    Raises:
      ValueError: no writer, a missing package, a folder that cannot be written, or the file does
        not find what the model finds.
    """
    check_output(path, SUFFIX)
    metadata = source.metadata()
    from sparseinst_jax.export.writer import write_onnx  # `metadata` has seen that it is there

    model = write_onnx(source.module, source.options, metadata, source.size)
    exported = FilePredictor(model.SerializeToString(), RUNTIME)
    if calibration:
        from sparseinst_jax.export.quantize import quantized

        metadata = metadata._replace(precision="int8")
        model = quantized(model, exported, calibration)
        _set_metadata(model, metadata)
        exported = FilePredictor(model.SerializeToString(), RUNTIME)
    agreement = None
    if photos is not None:
        roundings = 0 if calibration else verify.ROUNDINGS  # int8 is more than rounding
        photos = verify.photos_of_two_sizes(exported, photos)
        agreement = verify.compare(source.model, exported, photos, sys.stderr, roundings)
        if not calibration:
            _refuse_difference(agreement)
        verification = _record(agreement, RUNTIME)
        _set_metadata(model, metadata._replace(verification=verification))
    replace_file(path, model.SerializeToString())
    return agreement


def export_stablehlo(
    source: Exportable, path: Path, photos: Sequence[np.ndarray] | None
) -> Agreement | None:
    """Write a StableHLO artefact and its JSON, whole or not at all; see `export_onnx`."""
    from sparseinst_jax.export import stablehlo

    check_output(path, stablehlo.SUFFIX)
    assert source.size is not None  # the caller chooses one
    metadata = source.metadata()
    with _needs_packages():
        content = stablehlo.artefact(source.module, source.select, source.size)
    agreement = None
    if photos is not None:
        exported = stablehlo.predictor(content, metadata)
        agreement = verify.compare(
            source.model, exported, photos or verify.drawn_photos(), sys.stderr
        )
        _refuse_difference(agreement)
        metadata = metadata._replace(verification=_record(agreement, "jax"))
    replace_file(stablehlo.sidecar(path), stablehlo.sidecar_text(content, metadata).encode())
    replace_file(path, content)
    return agreement


def _refuse_difference(agreement: Agreement) -> None:
    if faults := agreement.faults():
        raise ValueError(
            f"the exported network does not find what the model finds, so no file was written:"
            f" {'; '.join(faults)}. Compared on {agreement}"
        )


def _record(agreement: Agreement, runtime: str) -> dict[str, Any]:
    """The comparison, for the metadata."""
    return {"passed": not agreement.faults(), "runtime": runtime, **agreement._asdict()}


@contextlib.contextmanager
def _needs_packages() -> Iterator[None]:
    """Say how to install what an import within does not find."""
    try:
        yield
    except ImportError as error:
        raise ValueError(
            f"export needs a package that is not installed ({error}): pip install"
            " 'sparseinst_jax[export]'"
        ) from error


def _set_metadata(model: onnx.ModelProto, metadata: Metadata) -> None:
    """Replace what a model says of itself."""
    others = [entry for entry in model.metadata_props if entry.key != KEY]
    del model.metadata_props[:]
    model.metadata_props.extend(others)
    model.metadata_props.add(key=KEY, value=metadata.to_json())
