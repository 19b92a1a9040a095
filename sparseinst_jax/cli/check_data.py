"""`sparseinst check-data`: what a data set holds, its faults, and what training would lose."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

from sparseinst_jax.cli import command_parser
from sparseinst_jax.cli.arguments import parse_command_line, words_of_overrides
from sparseinst_jax.cli.next_command import train_words
from sparseinst_jax.data.check_report import DataReport, make_report
from sparseinst_jax.data.faults import Fault, grouped
from sparseinst_jax.drawing import data_page
from sparseinst_jax.models.families import FAMILIES
from sparseinst_jax.runtime.files import check_writable
from sparseinst_jax.runtime.messages import next_commands
from sparseinst_jax.setup.builders import num_masks
from sparseinst_jax.setup.config import load_config
from sparseinst_jax.setup.datasets import draw_missing_data, index_both, name_of

MAX_LINES = 10  # of one kind of fault in the terminal; the page has them all
DESCRIPTION = """\
Look at every entry of a COCO json and at every image before training: counts, sizes, classes,
objects that are lost, shared images, and every fault with its id. Writes a page with all of it
and a sheet of images with their labels drawn.

  sparseinst check-data train.json --images photos
  sparseinst check-data train.json --images photos --val-json val.json --val-images photos
  sparseinst check-data --config NAME            config.data.train and config.data.val
Exit code: 0 training would start (there may be warnings), 1 it would fail.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code, 1 where training would fail."""
    parser = command_parser("check-data", DESCRIPTION)
    add = parser.add_argument
    add("json", metavar="JSON", nargs="?", help="COCO instance annotations")
    add("--images", metavar="DIR", help="folder that its file names are relative to")
    add("--val-json", metavar="JSON", help="validation annotations, to compare with")
    add("--val-images", metavar="DIR", help="their folder; default: --images")
    add(
        "--config",
        metavar="NAME",
        help="configuration to be trained; default: sizes and masks of the published one",
    )
    add("--output", metavar="DIR", help="of the page; default: runs/check/<name of the json>")
    parser.epilog = (
        "Keys of the configuration can be set: --config.model.num_masks=200, --config.data.classes="
        "cat,dog"
    )
    arguments = parse_command_line(parser, argv)
    config = _config(arguments)
    output = Path(arguments.output or Path("runs/check") / Path(name_of(config.data.train)).stem)
    check_writable(output, "--output")
    report = check(config, sys.stderr)
    data_page.write_page(report, output)
    print("\n".join(map(_printable, lines_of(report))))
    print(f"\n{_verdict(report)}")
    print(f"page: {output / data_page.PAGE}, sheet: {output / data_page.SHEET}")
    if report.fatal:
        return 1
    words, remark = train_words()
    if arguments.config:
        words, remark = ["sparseinst", "train", f"--config={arguments.config}"], ""
    if arguments.json:
        parts = ("train", "val") if arguments.val_json else ("train",)
        words += [
            f"--config.data.{part}.{key}={config.data[part][key]}"
            for part in parts
            for key in ("annotations", "images")
        ]
        words += ["--config.train.eval_every=0"] * (not arguments.val_json)
    print(next_commands(words + words_of_overrides(arguments)))
    print(f"  {remark}\n" * bool(remark), end="")
    return 0


def check(config: Any, progress: TextIO | None = None) -> DataReport:
    """Check the training data of a configuration, and its validation data where it names some.

    Args:
        config: `model.family`, `model.num_masks` and the keys of `data`.
        progress: where progress is written while images are opened.

    Raises:
        ValueError: a json, a folder, a size or the choice of classes is such that nothing can be
            checked; all such faults in one message.
    """
    data = config.data
    sizes, longest = data.train_sizes, data.train_max_size
    if not sizes or min(sizes) < 1 or longest < max(sizes):
        raise ValueError(
            "config.data.train_sizes must be pixels > 0, none above config.data.train_max_size; "
            f"got {sizes} and {longest}"
        )
    return make_report(
        index_both(config),
        num_masks(config),
        FAMILIES[config.model.family].map_stride,
        sizes,
        longest,
        data.num_workers,
        progress,
        data.flip_label_pairs,
    )


def _config(arguments: argparse.Namespace) -> Any:
    """Load the configuration, with the data that the arguments name.

    Raises:
        ValueError: too few or contradicting arguments, all in one message.
    """
    faults = []
    if not arguments.json and not arguments.config:
        faults.append("no data named: give a COCO json and --images DIR, or --config FILE")
    if arguments.json and not arguments.images:
        faults.append(f"give the folder of the images of {arguments.json}: --images DIR")
    if not arguments.json and (arguments.images or arguments.val_json):
        faults.append("--images and --val-json belong to a json: give it before them")
    if arguments.val_images and not arguments.val_json:
        faults.append("--val-images needs --val-json JSON")
    if faults:
        raise ValueError("\n".join(faults))
    config: Any = load_config(arguments.config or "base", arguments.overrides)
    if not arguments.json:
        draw_missing_data(config)
        return config
    with config.unlocked():
        named = dict(annotations=arguments.json, images=arguments.images, tfds="")
        config.data.train.update(named)
        images = arguments.val_images or arguments.images
        named = dict(annotations=arguments.val_json or "", images=images, tfds="")
        config.data.val.update(named)
    return config


def lines_of(report: DataReport) -> list[str]:
    """Write a report for the terminal."""
    lines = []
    for split in report.splits:
        lines += [f"{split.title}: {split.lines[0]}", *(f"  {line}" for line in split.lines[1:])]
        lines += [f"  WARNING: {line}" for line in split.warnings]
        lines += [f"  {line}" for line in _fault_lines(split.faults)]
    return lines + [f"WARNING: {line}" for line in report.warnings]


def _fault_lines(faults: Sequence[Fault]) -> list[str]:
    lines = []
    for kind, found in grouped(list(faults)).items():
        word = "FAULT" if found[0].is_fatal else "WARNING"
        lines.append(f"{word}: {kind}: {len(found)}")
        lines += [f"    {fault.message}" for fault in found[:MAX_LINES]]
        if len(found) > MAX_LINES:
            lines.append(f"    ... and {len(found) - MAX_LINES} more, all on the page")
    return lines


def _printable(line: str) -> str:
    """Names from a json may hold line breaks, control codes and what the terminal cannot show."""
    line = "".join(c if c.isprintable() else "?" for c in line)
    encoding = sys.stdout.encoding or "utf-8"
    return line.encode(encoding, "replace").decode(encoding)


def _verdict(report: DataReport) -> str:
    if report.fatal:
        return (
            f"training would FAIL: {len(report.fatal)} fault(s) marked FAULT must be corrected, "
            f"{report.num_warnings} warning(s)"
        )
    return f"training can start; {report.num_warnings} warning(s)"
