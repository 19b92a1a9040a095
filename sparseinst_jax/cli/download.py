"""`sparseinst download`: published weights by name."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from sparseinst_jax.cli import command_parser
from sparseinst_jax.runtime.messages import columns, counted, next_commands, printable
from sparseinst_jax.setup import published
from sparseinst_jax.weights import zoo

DESCRIPTION = """\
Fetch published weights by name, once: whole networks, which are converted, and ImageNet backbones
to start training from. Every command and `sparseinst_jax.load` take the same names, and fetch what
is missing. Nothing else of this package uses the network.

  sparseinst download giam_r50_aug
  sparseinst download --list
  sparseinst download giam_r50_aug --file ~/Downloads/MODEL.pth

SPARSEINST_WEIGHTS moves the folder where they are kept, ~/.cache/sparseinst_jax/weights.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code, 1 where a file could not be fetched."""
    parser = command_parser("download", DESCRIPTION)
    parser.add_argument("names", metavar="NAME", nargs="*", help="see --list")
    parser.add_argument("--list", action="store_true", help="every name, and what is here already")
    parser.add_argument(
        "--all", action="store_true", help="fetch and convert all of them, several GB: a check"
    )
    parser.add_argument("--file", metavar="FILE", help="take this file, downloaded by hand")
    arguments = parser.parse_args(argv)
    if arguments.list:
        print("\n".join(listing()))
        return 0
    names = [*zoo.published()] if arguments.all else arguments.names
    if not names:
        parser.error("give a NAME, or --list to see them")
    if arguments.file and len(names) > 1:
        parser.error("--file is the file of one NAME")
    for name in names:
        published.find_published(name)  # all names are checked before the first is fetched
    faults = {}
    for name in names:
        try:
            print(f"{name}: {published.download(name, arguments.file)}")
        except ValueError as error:
            if len(names) == 1:
                raise
            faults[name] = str(error)
            print(f"failed: {printable(str(error))}", file=sys.stderr)
    if faults:
        print(f"{len(names) - len(faults)} of {counted(len(names), 'file')} are here")
        print(f"not here: {', '.join(faults)}")
        return 1
    print(next_commands(*_uses(names[0])))
    return 0


def listing() -> list[str]:
    """Every name: what it is, whose, under which licence, and whether it is here."""
    rows = [("name", "what", "AP val", "publisher", "licence", "here")]
    tables = {row.config: row for row in reversed(zoo.ROWS)}
    for name, source in zoo.published().items():
        row = tables.get(source.config)
        what = row.model if row else f"ImageNet backbone, {zoo.BACKBONES[name].file}"
        score = f"{row.ap_val:.1f}" if row and row.ap_val else "-"
        here = "yes" if published.stored(name) else "-"
        rows.append((name, what, score, source.publisher, source.licence, here))
    return columns(rows, len(rows[0]))


def _uses(name: str) -> list[list[str]]:
    train = ["sparseinst", "train", "--config=finetune", f"--init-from={name}"]
    if published.find_published(name).config:
        return [["sparseinst", "predict", f"--weights={name}", "PHOTO.jpg"], train]
    users = [row.config for row in zoo.ROWS if row.backbone == name]
    return [["sparseinst", "train", f"--config={users[0]}", f"--init-from={name}"]]
