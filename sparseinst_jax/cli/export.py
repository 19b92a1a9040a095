"""The command `export`: a trained network as one file that runs without this package."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sparseinst_jax.cli import command_parser
from sparseinst_jax.cli.arguments import (
    add_model_arguments,
    check_arguments,
    is_exported,
    open_model,
    parse_command_line,
    parse_size,
    size_fault,
)
from sparseinst_jax.cli.predict import list_images
from sparseinst_jax.data.images import as_rgb
from sparseinst_jax.runtime.files import check_output
from sparseinst_jax.runtime.messages import next_commands

FORMATS = {"onnx": ".onnx", "stablehlo": ".stablehlo"}
DESCRIPTION = """\
Write a network as one ONNX file that onnxruntime, OpenVINO, TensorRT and browsers run without this
package, classes and thresholds within. It is compared with the model on photos before it is
written: what does not find the same objects is not handed over.

  sparseinst export --workdir RUN --output model.onnx
  sparseinst export --config giam_r50 --weights model.pth --output model.onnx --verify photos
  sparseinst export --workdir RUN --output int8.onnx --int8 --calibrate photos

`sparseinst predict`, `eval` and `benchmark` take it as --checkpoint model.onnx.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    arguments = parse_command_line(_parser(), argv)
    _check(arguments)
    output = Path(arguments.output)
    check_output(output, FORMATS[arguments.format])
    photos, calibration = (
        [as_rgb(path) for path in list_images(given, output)[0]] if given else []
        for given in (arguments.verify, arguments.calibrate)
    )
    source, start = open_model(arguments), time.monotonic()
    predictor: Any = source.predictor
    print(f"{source.title}: writing and comparing", file=sys.stderr, flush=True)
    agreement = predictor.export(
        output,
        size=arguments.size,
        photos=photos,
        verifies=not arguments.no_verify,
        calibration=calibration,
    )
    kind = "int8" if calibration else "float32"
    seconds, megabytes = time.monotonic() - start, output.stat().st_size / 1e6
    print(f"{output}: {kind}, {megabytes:.1f} MB, in {seconds:.0f} s")
    print(f"compared on {agreement}" if agreement else "not compared with the model")
    if arguments.format == "onnx":
        exported = [f"--checkpoint={output}"]
        predict = ["sparseinst", "predict", *exported, "PHOTO.jpg"]
        print(next_commands(predict, *[["sparseinst", "eval", *exported]] * bool(calibration)))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = command_parser("export", DESCRIPTION)
    add = parser.add_argument
    add_model_arguments(parser)
    add("--output", metavar="FILE", required=True, help="such as model.onnx")
    add(
        "--format",
        choices=tuple(FORMATS),
        default="onnx",
        help="stablehlo: an artefact of jax.export for CPU, CUDA and TPU; default: %(default)s",
    )
    add(
        "--size",
        type=parse_size,
        metavar="HxW",
        help="padded size of the images, such as 640x864: a file for one image of that size, as"
        " TFLite and TensorRT without profiles need it; default: any number, any size",
    )
    add(
        "--verify",
        nargs="+",
        metavar="PHOTO",
        default=[],
        help="photos or folders to compare on; default: two drawn ones",
    )
    add("--no-verify", action="store_true", help="write without comparing")
    add("--int8", action="store_true", help="convolutions in int8, by --calibrate")
    add(
        "--calibrate",
        nargs="+",
        metavar="PHOTO",
        default=[],
        help="photos or folders like those to come, 20 to 200, which give the ranges of int8",
    )
    return parser


def _check(arguments: argparse.Namespace) -> None:
    """Refuse what does not go together, all faults in one message."""
    check_arguments(arguments)
    faults = [size_fault("--size", arguments.size)]
    if is_exported(arguments):
        faults.append(f"{arguments.checkpoint} is exported already: name the run it came from")
    if arguments.int8 != bool(arguments.calibrate):
        faults.append("--int8 and --calibrate PHOTOS go together: photos give the ranges")
    if arguments.int8 and arguments.format != "onnx":
        faults.append("--int8 is for --format onnx")
    if arguments.verify and arguments.no_verify:
        faults.append("give --verify or --no-verify, not both")
    if any(faults):
        raise ValueError("\n".join(filter(None, faults)))
