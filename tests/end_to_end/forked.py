"""Run many command lines, each in a process of its own: for `test_bad_input`.

    python tests/end_to_end/forked.py TASKS.json

The file holds a list of [words, stem], words as for the shell without the interpreter: a script and
its arguments, or `sparseinst` and its. To `<stem>.out` and `.err` goes what it prints, to `.code`
its exit code. A process is forked from this one, in which everything is imported but no device is
started: an import of jax takes most of a command that fails.
"""

import gc
import json
import os
import runpy
import sys
from pathlib import Path

from sparseinst_jax import cli
from sparseinst_jax.runtime import process


def run(words: list[str], stem: str) -> None:
    """Become the process of a command line, and end as it does."""
    for number, ending in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{stem}.{ending}", os.O_WRONLY | os.O_CREAT, 0o644), number)
    sys.argv = words
    if words[0] == "sparseinst":
        sys.exit(cli.main())
    runpy.run_path(words[0], run_name="__main__")


def main(file: str) -> None:
    """Run the tasks one after the other."""
    process.set_environment()
    from sparseinst_jax.cli import check_data, eval, import_data, predict, train  # noqa: F401

    gc.freeze()  # or each would go through all of these when it ends
    for words, stem in json.loads(Path(file).read_text()):
        child = os.fork()
        if child == 0:
            run(words, stem)
            return
        _, status = os.waitpid(child, 0)
        Path(f"{stem}.code").write_text(str(os.waitstatus_to_exitcode(status)))


if __name__ == "__main__":
    main(sys.argv[1])
