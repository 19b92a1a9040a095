"""What is printed is a courtesy: a stream that fails ends nothing. In processes of their own."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from sparseinst_jax.runtime import output

ROOT = Path(__file__).parents[2]
PROGRAM = """
import pathlib, sys, time
from sparseinst_jax.runtime import output
output.guard_output()
output.guard_output()  # once is enough
with output.lost_output_noted(pathlib.Path(sys.argv[1])):
    for number in range(3):
        print("class \\u00e9 \\U0001f34e", number, flush=True)
        print("warning", file=sys.stderr)
        time.sleep(float(sys.argv[2]))
    pathlib.Path(sys.argv[1], "done").write_text("")
"""


def run(shell: str, folder: Path, seconds: float = 0.0, **environment: str) -> int:
    words = f'"{sys.executable}" -c "$PROGRAM" "{folder}" {seconds}'
    environment = {
        "PROGRAM": PROGRAM,
        "PYTHONPATH": str(ROOT),
        "PATH": "/usr/bin:/bin",
        **environment,
    }
    return subprocess.run(["bash", "-c", shell.replace("RUN", words)], env=environment).returncode


@pytest.mark.parametrize(
    ("shell", "reason"),
    [
        ("RUN > /dev/full", "stdout cannot be written (No space left on device)"),
        ("RUN > /dev/full 2>&1", "stdout cannot be written (No space left on device)"),
        ("set -o pipefail; RUN | head -0", "stdout cannot be written (Broken pipe)"),
        ("RUN >&- 2>&- <&-", None),
        ("RUN >&- 2> /dev/null", None),
    ],
)
def test_a_stream_that_fails_is_noted_once_and_the_work_goes_on(tmp_path, shell, reason):
    assert run(shell, tmp_path, 0.3 if "head" in shell else 0.0) == 0
    assert (tmp_path / "done").exists()
    note = tmp_path / output.LOST_OUTPUT
    assert note.exists() == (reason is not None)
    if reason is not None:
        (line,) = note.read_text().splitlines()
        assert reason in line and line.endswith("may be lost, the work goes on")


def test_a_closed_stream_gives_its_number_to_no_file_of_ours(tmp_path):
    # The file that is opened next would get number 1, and what is printed would go into it.
    program = PROGRAM.replace("import pathlib", "import os, pathlib")
    program += "\nassert os.open(sys.argv[1], os.O_RDONLY) > 2\n"
    assert run("RUN >&-", tmp_path, PROGRAM=program) == 0


@pytest.mark.parametrize(
    ("encoding", "written"), [("ascii", rb"class \xe9 \U0001f34e 0"), ("utf-8", "class é 🍎 0")]
)
def test_characters_that_the_encoding_lacks_are_written_as_numbers(tmp_path, encoding, written):
    written = written if isinstance(written, bytes) else written.encode()
    assert run(f"RUN > {tmp_path}/log", tmp_path, PYTHONIOENCODING=encoding) == 0
    assert (tmp_path / "log").read_bytes().splitlines()[0] == written


def test_a_pipe_that_is_full_and_does_not_block_loses_nothing(tmp_path):
    program = PROGRAM.replace("range(3)", "range(20000)").replace(
        "import pathlib", "import os, pathlib"
    )
    program = program.replace("output.guard", "os.set_blocking(1, False); output.guard", 1)
    start = time.monotonic()
    shell = f"set -o pipefail; RUN 2> /dev/null | (sleep 1; cat) > {tmp_path}/log"
    assert run(shell, tmp_path, PROGRAM=program) == 0
    assert len((tmp_path / "log").read_text().splitlines()) == 20000
    assert time.monotonic() - start < 60


def test_streams_that_others_put_in_place_stay(capsys, monkeypatch):
    before = sys.stdout, sys.stderr
    output.guard_output()
    assert (sys.stdout, sys.stderr) == before
