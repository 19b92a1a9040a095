"""Files written whole, folders refused with a cure, json files read with a reason."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from sparseinst_jax.runtime import files


def test_a_file_is_replaced_whole_and_nothing_else_is_left(tmp_path):
    path = tmp_path / "new" / "a.txt"
    files.replace_file(path, b"one")
    files.replace_file(path, b"two")
    assert path.read_bytes() == b"two"
    assert list(path.parent.iterdir()) == [path]
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError):
        files.replace_file(tmp_path / "folder", b"three")
    assert sorted(child.name for child in tmp_path.iterdir()) == ["folder", "new"]


def test_a_file_in_place_of_a_folder_is_refused_before_anything_is_made(tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below" / "it"):
        with pytest.raises(ValueError) as caught:
            files.make_folder(folder, "--workdir")
        assert str(caught.value) == (
            f"the folder {folder} cannot be written: {tmp_path / 'file'} is a file, not a folder."
            " Give another one by --workdir, or move the file away."
        )
    files.check_writable(tmp_path / "a" / "b", "--workdir")
    assert [child.name for child in tmp_path.iterdir()] == ["file"]


def test_only_folders_that_were_made_and_stayed_empty_are_removed(tmp_path):
    made = files.make_folder(tmp_path / "a" / "b" / "c", "--workdir")
    assert made == [tmp_path / "a" / "b" / "c", tmp_path / "a" / "b", tmp_path / "a"]
    (tmp_path / "a" / "kept.txt").write_text("")
    files.remove_empty(made)
    assert list(tmp_path.rglob("*")) == [tmp_path / "a", tmp_path / "a" / "kept.txt"]


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", r"list of things .*a\.json is empty \(0 bytes\); cure"),
        (b" \n", r"is empty \(2 bytes\)"),
        (b'{"a": [1, 2', r"whole json: it ends in the middle, after .*column 12; copy .*, or cure"),
        (b'{"a": "text', r"it ends in the middle"),
        (b'{"a": 1,\n b}', r"Expecting property name .* at line 2, column 2"),
        (b"\x89PNG\xff\xfe", r"is not a json: .*codec"),
    ],
)
def test_what_is_wrong_with_a_json_is_told(tmp_path, content, message):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        files.read_json(tmp_path / "a.json", "list of things", "cure")


def test_a_json_is_read_and_a_missing_one_or_a_folder_is_named(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps({"name": "Äpfel"}))
    assert files.read_json(tmp_path / "a.json", "list", "cure") == {"name": "Äpfel"}
    with pytest.raises(FileNotFoundError, match=r"list .*b\.json does not exist; cure"):
        files.read_json(tmp_path / "b.json", "list", "cure")
    with pytest.raises(ValueError, match="is a folder; cure"):
        files.read_json(tmp_path, "list", "cure")


def test_a_folder_without_permission_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(files.os, "access", lambda *_: False)  # an administrator may do anything
    with pytest.raises(ValueError) as caught:
        files.check_writable(tmp_path / "run", "--workdir")
    assert str(caught.value) == (
        f"the folder {tmp_path / 'run'} cannot be written: no permission to write in {tmp_path}."
        " Give another one by --workdir, or change the permissions."
    )


@pytest.mark.parametrize("is_folder", [False, True])
def test_what_is_written_appears_whole_or_not_at_all(tmp_path, is_folder):
    output = tmp_path / "new" / "output"

    def write(text):
        with files.written_whole(output) as temporary:
            if is_folder:
                temporary.mkdir()
            (temporary / "part" if is_folder else temporary).write_text(text)
            if text == "broken":
                raise RuntimeError

    with pytest.raises(RuntimeError):
        write("broken")
    assert list(output.parent.iterdir()) == []
    write("good")
    assert (output / "part" if is_folder else output).read_text() == "good"
    assert list(output.parent.iterdir()) == [output]


def test_a_folder_is_locked_until_its_holder_ends_however_that_happens(tmp_path):
    program = (
        "import pathlib, sys, time; from sparseinst_jax.runtime.files import FolderLock;"
        "lock = FolderLock(pathlib.Path(sys.argv[1]), '--workdir'); print(flush=True);"
        "time.sleep(60)"
    )
    words = [sys.executable, "-c", program, str(tmp_path)]
    root = Path(files.__file__).parents[2]
    with subprocess.Popen(words, stdout=subprocess.PIPE, cwd=root) as holder:
        holder.stdout.readline()
        with pytest.raises(files.FolderInUseError, match=rf"process {holder.pid}, since 2"):
            files.FolderLock(tmp_path, "--workdir")
        holder.send_signal(signal.SIGSTOP)  # a process that hangs still holds it
        with pytest.raises(files.FolderInUseError):
            files.FolderLock(tmp_path, "--workdir")
        holder.kill()
        holder.wait()
        lock = files.FolderLock(tmp_path, "--workdir")
    assert f"process {os.getpid()}, " in (tmp_path / "run.lock").read_text()
    with pytest.raises(files.FolderInUseError):  # of the same process, too
        files.FolderLock(tmp_path, "--workdir")
    lock.release()
    assert list(tmp_path.iterdir()) == []


def test_where_there_are_no_locks_a_line_says_so(tmp_path, monkeypatch, capsys):
    def refuse(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(files.fcntl, "flock", refuse)
    files.FolderLock(tmp_path, "--workdir").release()
    assert "cannot be locked (Operation not supported)" in capsys.readouterr().err
