"""Every command: what its errors look like, and its exit codes."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from sparseinst_jax import cli
from sparseinst_jax.setup import config


def test_a_users_error_is_a_message_and_an_exit_code(capsys):
    assert cli.run(lambda _: config.load_config("no/such.py"), []) == 1
    assert capsys.readouterr().err.startswith("error: --config must name a file, got no/such.py")


def test_errors_of_the_program_keep_their_traceback(monkeypatch):
    with pytest.raises(ValueError, match="invalid literal"):
        cli.run(lambda _: int("x"), [])
    monkeypatch.setenv("SPARSEINST_TRACEBACK", "1")
    with pytest.raises(FileNotFoundError):
        cli.run(lambda _: config.load_config("no/such.py"), [])


@pytest.mark.parametrize("result, code", [(None, 0), (0, 0), (143, 143)])
def test_the_exit_code_is_the_commands(result, code):
    assert cli.run(lambda _: result, []) == code


def test_the_cli_lists_its_commands_and_refuses_others(capsys):
    assert cli.main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"  {name} " in text for name in ("train", "eval", "predict"))
    assert cli.main(["help"]) == 0 and capsys.readouterr().out == text
    assert cli.main(["trian"]) == 2
    assert "unknown command 'trian': did you mean train?" in capsys.readouterr().err
    assert cli.main(["frobnicate"]) == 2
    assert "unknown command 'frobnicate'\nusage: sparseinst" in capsys.readouterr().err
    assert cli.main(["--version"]) == 0
    assert re.match(r"sparseinst_jax \S.*, jax \d+\.\d+.*, Python 3\.", capsys.readouterr().out)


@pytest.mark.parametrize("name", cli._COMMANDS)
def test_the_usage_of_a_command_is_that_of_the_program(name, capsys):
    with pytest.raises(SystemExit):
        cli.main(["help", name])
    text = capsys.readouterr().out
    assert text.startswith(f"usage: sparseinst {name} ")
    assert not re.search(r"\b(train|eval|predict)\.py", text)


def test_the_package_runs_as_a_module():
    command = [sys.executable, "-m", "sparseinst_jax", "zoo", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)[0]["config"]


def test_a_reader_that_leaves_is_no_traceback():
    command = [sys.executable, "-u", "-m", "sparseinst_jax", "zoo"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout.readline().startswith(b"config ")
        process.stdout.close()  # as `zoo | head -1`
        assert b"Traceback" not in process.stderr.read()


@pytest.mark.parametrize(
    "given, meant",
    [
        ("--train.batch_size=4", "--config.train.batch_size=4"),
        ("--data.val.images", "--config.data.val.images"),
        ("train.batch_size=4", "--config.train.batch_size=4"),
        ("--learning-rate=1", "--config.train.learning_rate=1"),
        ("--batch_size=4", "--config.eval.batch_size=4 or --config.train.batch_size=4"),
        ("--workdr=x", "--workdir=x"),
    ],
)
def test_an_unknown_argument_is_answered_with_what_was_meant(given, meant, capsys):
    try:
        assert cli.main(["train", "--config", "shapes", given]) == 1
    except SystemExit as exit:
        assert exit.code == 2
    assert capsys.readouterr().err.rstrip().endswith(f"did you mean {meant}?")


def test_the_cli_passes_the_arguments_on(capsys):
    assert cli.main(["train", "--config", "missing.py"]) == 1
    assert "got missing.py" in capsys.readouterr().err
    assert not Path("runs/missing").exists()


def test_what_the_machine_refuses_is_a_message_with_the_path(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert cli.run(lambda _: (tmp_path / "file" / "x").mkdir(), []) == 1
    message = capsys.readouterr().err
    assert message.startswith(f"error: Not a directory at {tmp_path / 'file' / 'x'}: give another")
    assert cli.run(lambda _: (_ for _ in ()).throw(OSError(28, "No space left")), []) == 1
    assert "No space left: free some space" in capsys.readouterr().err
    with pytest.raises(ConnectionResetError):
        cli.run(lambda _: (_ for _ in ()).throw(ConnectionResetError(104, "reset")), [])


def test_an_interruption_is_no_traceback(capsys):
    def interrupted(_):
        raise KeyboardInterrupt

    assert cli.run(interrupted, []) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_the_home_folder_may_be_named_where_a_shell_does_not_expand_it(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    seen = []
    cli.run(seen.extend, ["--workdir=~/a=b", "--config.data.train.images=~/x", "~/y", "~", "a~/b"])
    home = str(tmp_path)
    assert seen == [
        f"--workdir={home}/a=b",
        f"--config.data.train.images={home}/x",
        f"{home}/y",
        home,
        "a~/b",
    ]


def test_what_the_machine_refuses_in_the_middle_is_one_message(tmp_path, monkeypatch, capsys):
    for number, cure in ((24, "ulimit -n"), (27, "ulimit -f"), (5, "look after the disk")):
        error = OSError(number, "It failed")
        assert cli.run(lambda _, error=error: (_ for _ in ()).throw(error), []) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: It failed: ") and cure in line
    folder = tmp_path / "gone"
    folder.mkdir()
    monkeypatch.chdir(folder)
    folder.rmdir()
    assert cli.run(lambda _: Path("x").resolve(), []) == 1
    assert "error: the working directory was removed" in capsys.readouterr().err


def test_a_command_ends_soon_after_a_failure_whatever_threads_wait_for():
    program = (
        "import threading, time; from sparseinst_jax import cli; from sparseinst_jax.runtime"
        " import hosts; threading.Thread(target=time.sleep, args=(600,)).start();"
        "hosts.end_within(0.5, 7); print('said')"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=60)
    assert (done.returncode, done.stdout) == (7, b"said\n")
