"""`sparseinst build-tfds`: turn a COCO folder into shards that TFDS reads."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from sparseinst_jax.cli import command_parser
from sparseinst_jax.cli.next_command import train_command
from sparseinst_jax.runtime.files import check_writable

DESCRIPTION = """\
Turn COCO jsons and their image folders into a TFDS data set, coco_instances: ArrayRecord files of
about 128 MB with the images as they are, beside them the index of the annotations. It trains with
the same batches as the folder, from a few large files instead of many small ones. TensorFlow is
not needed.

  sparseinst build-tfds train.json --images photos --output tfds_data
  sparseinst build-tfds train.json --images train --val-json val.json --val-images val --output DIR
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    parser = command_parser("build-tfds", DESCRIPTION)
    add = parser.add_argument
    add("json", metavar="JSON", help="COCO instance annotations; become the split `train`")
    add("--images", metavar="DIR", required=True, help="folder that file_name is relative to")
    add("--val-json", metavar="JSON", help="more annotations, of the same classes; split `val`")
    add("--val-images", metavar="DIR", help="their folder; default: --images")
    add("--split", metavar="NAME", default="train", help="another name than `train`")
    add("--output", metavar="DIR", required=True, help="TFDS folder, made if missing")
    arguments = parser.parse_args(argv)
    if arguments.val_images and not arguments.val_json:
        parser.error("--val-images needs --val-json JSON")
    if not re.fullmatch(r"[a-z]\w*", arguments.split) or arguments.split == "all":
        parser.error(f"--split must be a name such as train or test, got {arguments.split!r}")
    if arguments.val_json and arguments.split == "val":
        parser.error("--split val and --val-json name two splits `val`")
    check_writable(arguments.output, "--output")
    from sparseinst_jax.data import tfds  # takes seconds to import

    sources = {arguments.split: tfds.SplitSource(arguments.json, arguments.images)}
    if arguments.val_json:
        images = arguments.val_images or arguments.images
        sources["val"] = tfds.SplitSource(arguments.val_json, images)
    folder = tfds.build(arguments.output, sources, progress=sys.stderr)
    print("\n".join(_summary(folder, list(sources), arguments.output)))
    return 0


def _summary(folder: Path, splits: Sequence[str], output: str) -> list[str]:
    """What was written, and the command that trains on it."""
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    number = len(list(folder.glob("*.array_record*")))
    keys = [f"--config.data.tfds_dir={shlex.quote(output)}"]
    keys += [
        f"--config.data.{part}.tfds=coco_instances/{split}"
        for part, split in zip(("train", "val"), splits, strict=False)
    ]
    if len(splits) == 1:
        keys.append("--config.train.eval_every=0  # or build it with --val-json")
    title = f"{folder}: {number} shards, {size / 1e6:.1f} MB"
    return [title, "Next:", train_command(keys)]
