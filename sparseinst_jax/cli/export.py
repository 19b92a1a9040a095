"""The command `export`: a trained network as one file that runs without this package."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from sparseinst_jax.cli.arguments import (
    add_model_arguments,
    check_arguments,
    open_model,
    parse_command_line,
    parse_size,
    size_fault,
)
from sparseinst_jax.cli.predict import list_images
from sparseinst_jax.data.images import as_rgb
from sparseinst_jax.export.files import check_output
from sparseinst_jax.runtime.messages import next_commands

DESCRIPTION = """\
Write a network as one ONNX file that onnxruntime, OpenVINO, TensorRT and browsers run without this
package, classes and thresholds within. It is compared with the model on photos before it is
written: what does not find the same objects is not handed over.

  sparseinst export --workdir RUN --output model.onnx
  sparseinst export --config giam_r50 --weights model.pth --output model.onnx --verify photos

`sparseinst predict`, `eval` and `benchmark` take it as --checkpoint model.onnx.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="sparseinst export",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_model_arguments(parser)
    parser.add_argument("--output", metavar="FILE", required=True, help="model.onnx")
    parser.add_argument(
        "--size",
        type=parse_size,
        metavar="HxW",
        help="padded size of the images, such as 640x864: a file for one image of that size, as"
        " TFLite and TensorRT without profiles need it; default: any number, any size",
    )
    parser.add_argument(
        "--verify",
        nargs="+",
        metavar="PHOTO",
        default=[],
        help="photos or folders to compare on; default: two drawn ones",
    )
    arguments = parse_command_line(parser, argv)
    check_arguments(arguments)
    if fault := size_fault("--size", arguments.size):
        raise ValueError(fault)
    output = Path(arguments.output)
    check_output(output)
    photos = list_images(arguments.verify, output.parent)[0] if arguments.verify else []
    source = open_model(arguments)
    print(f"{source.title}", flush=True)
    start = time.monotonic()
    images = [as_rgb(path) for path in photos]
    agreement = source.predictor.export(output, size=arguments.size, photos=images)
    size = output.stat().st_size / 1e6
    print(f"compared on {agreement}")
    print(f"{output}: {size:.1f} MB in {time.monotonic() - start:.0f} s", file=sys.stderr)
    checkpoint = f"--checkpoint={output}"
    print(next_commands(["sparseinst", "predict", checkpoint, "PHOTO.jpg"]))
    return 0
