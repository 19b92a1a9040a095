"""Every command: what its errors look like, and its exit codes."""

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
    assert cli.main(["trian"]) == 2
    assert "unknown command 'trian'" in capsys.readouterr().err


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
