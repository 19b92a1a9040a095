"""Published weights by name, from a server on this machine that does everything wrong."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import threading
from pathlib import Path

import numpy as np
import pytest

import sparseinst_jax
from sparseinst_jax import cli
from sparseinst_jax.cli import arguments
from sparseinst_jax.data.classes import COCO_CLASS_NAMES
from sparseinst_jax.setup import published
from sparseinst_jax.weights import download, zoo
from tests.published_server import PublishedServer
from tests.unit.test_convert_command import random_state


@pytest.fixture(scope="module")
def content() -> bytes:
    """The weights of a small network, as the original publishes them."""
    buffer = io.BytesIO()
    np.savez(buffer, **random_state(80))
    return buffer.getvalue()


@pytest.fixture
def server(content, monkeypatch, tmp_path):
    """Publishes `tiny`, whose configuration is `tiny`, and the backbone `r50`."""
    server = PublishedServer(content)
    monkeypatch.setenv("SPARSEINST_WEIGHTS", str(tmp_path / "weights"))
    monkeypatch.setattr(download, "_PAUSE", 0.0)
    monkeypatch.setattr(download, "_CHUNK", 500)
    monkeypatch.setitem(zoo._PUBLISHERS, server.url, ("a test", "MIT"))
    publish(monkeypatch, server, "/file")
    yield server
    server.close()


def publish(monkeypatch, server, path: str, prefix: str = "") -> None:
    address = f"{server.url}{path}"
    row = zoo.ROWS[0]._replace(config="tiny", weights=address)
    monkeypatch.setattr(zoo, "ROWS", (row,))
    backbone = zoo.Backbone("resnet50-19c8e357.pth", address, prefix)
    monkeypatch.setattr(zoo, "BACKBONES", {"r50": backbone})


def folder(tmp_path: Path) -> Path:
    return tmp_path / "weights"


def test_a_network_is_fetched_and_converted_once(server, content, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    predictor = sparseinst_jax.load("tiny")
    assert predictor.class_names == COCO_CLASS_NAMES and len(server.asked) == 1
    said = capsys.readouterr().err
    sha256 = hashlib.sha256(content).hexdigest()
    assert f"tiny: {server.url}/file, of a test (MIT)" in said and f"tiny: sha256 {sha256}" in said
    assert sorted(path.name for path in folder(tmp_path).iterdir()) == [
        ".tiny.lock",
        "tiny.json",
        "tiny.safetensors",
    ]
    record = json.loads((folder(tmp_path) / "tiny.json").read_text())
    assert record["sha256"] == sha256 and record["address"] == f"{server.url}/file"
    again = sparseinst_jax.load("tiny", overrides={"data.eval_size": (64, 96)})
    assert again.eval_size == (64, 96) and len(server.asked) == 1
    # What exists is no name.
    (tmp_path / "tiny").mkdir()
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        sparseinst_jax.load("tiny")


def test_a_backbone_is_kept_as_it_is_and_known_by_the_name_of_its_file(server, content, tmp_path):
    path = published.local_weights("resnet50-19c8e357.pth")
    assert path == published.local_weights("r50") == folder(tmp_path) / "resnet50-19c8e357.pth"
    assert path.read_bytes() == content and len(server.asked) == 1
    assert published.local_weights(path) == path and published.config_of("r50") == ""


@pytest.mark.parametrize("path", ["/moved", "/form"])
def test_redirects_and_the_page_before_a_large_file_are_followed(
    path, server, content, monkeypatch
):
    publish(monkeypatch, server, path)
    assert published.download("r50").read_bytes() == content


def test_a_cut_connection_is_continued(server, content, capsys):
    server.cut_after = [1000, 3000]
    assert published.download("r50").read_bytes() == content
    assert [asked for _, asked in server.asked] == ["", "bytes=1000-", "bytes=3000-"]
    assert "was cut" in capsys.readouterr().err


def test_what_has_arrived_is_continued_by_the_next_process(server, content, tmp_path):
    server.cut_after = [1000] * 9
    with pytest.raises(ValueError, match=r"was cut[\s\S]*What has arrived is kept"):
        published.download("r50")
    assert (folder(tmp_path) / "resnet50-19c8e357.pth.new.part").stat().st_size == 1000
    server.cut_after = []
    assert published.download("r50").read_bytes() == content
    assert server.asked[-1] == ("/file", "bytes=1000-")


@pytest.mark.parametrize("validator", ['"two"', ""])
def test_a_file_that_has_changed_meanwhile_is_fetched_from_its_start(validator, server, tmp_path):
    server.cut_after = [1000] * 4
    with pytest.raises(ValueError, match="was cut"):
        published.download("r50")
    server.content, server.validator = b"other" * 1000, validator
    assert published.download("r50").read_bytes() == b"other" * 1000


@pytest.mark.parametrize(
    "path, fault",
    [
        ("/404", "127.0.0.1 does not have it any more (404)"),
        ("/403", "127.0.0.1 refuses it (403)"),
        ("/refused", "127.0.0.1 refuses it (403): 'Too many users have viewed"),
        ("/429", "127.0.0.1 was asked too often (429)"),
        ("/503", "127.0.0.1 has a fault of its own (503)"),
        ("/quota", "127.0.0.1 sends a page in place of the file: 'Too many users have"),
        ("/login", "127.0.0.1 sends a page in place of the file: 'Sign in - Google Accounts'"),
        ("/plain", "127.0.0.1 leads to 'http://example.invalid/file', which is not https"),
        ("/round", "127.0.0.1 leads on and on (10 times)"),
        ("/endless", "has more than 0 MB, the most that is taken"),
        ("/file", "has more than 0 MB, the most that is taken"),
    ],
)
def test_every_fault_is_one_message_with_the_way_around_it(
    path, fault, server, monkeypatch, capsys, tmp_path
):
    publish(monkeypatch, server, path)
    if path in ("/endless", "/file"):
        monkeypatch.setattr(download.fetch, "__defaults__", (10_000,))
    assert cli.main(["download", "tiny"]) == 1
    said = capsys.readouterr().err
    assert f"error: tiny could not be downloaded: {fault}" in said.replace("the file has", "has")
    assert f"Open {server.url}{path} in a browser" in said
    assert "\n  sparseinst download tiny --file FILE" in said and "Traceback" not in said
    assert "(docs: cannot-download)" in said
    assert not list(folder(tmp_path).glob("*.safetensors"))


def test_without_a_network_the_message_is_the_same(server, capsys, monkeypatch):
    server.close()
    assert cli.main(["download", "r50"]) == 1
    said = capsys.readouterr().err
    assert "could not be downloaded: no connection to 127.0.0.1" in said
    assert "sparseinst download r50 --file FILE" in said


def test_a_full_disk_is_seen_before_and_while_writing(server, monkeypatch, capsys):
    usage = download.shutil.disk_usage
    monkeypatch.setattr(download.shutil, "disk_usage", lambda path: usage(path)._replace(free=10))
    with pytest.raises(ValueError, match="are still to come and 0 MB are free"):
        published.download("r50")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(published, "fetch", full)
    with pytest.raises(ValueError, match=r"the disk of .* is full[\s\S]*SPARSEINST_WEIGHTS"):
        published.download("r50")


def test_another_file_than_published_or_than_last_time_is_refused(server, monkeypatch, tmp_path):
    publish(monkeypatch, server, "/file", "19c8e357")
    with pytest.raises(ValueError, match=r"is another file: its sha256 begins with \w{8}, the pub"):
        published.download("r50")
    publish(monkeypatch, server, "/file", hashlib.sha256(server.content).hexdigest()[:8])
    path = published.download("r50")
    path.unlink()
    publish(monkeypatch, server, "/file")
    before, server.content = server.content, b"other"
    with pytest.raises(ValueError, match=r"another file: .*last time it was \w{64}.* remove .*r50"):
        published.download("r50")
    server.content = before
    assert published.download("r50") == path
    path.write_bytes(b"changed here")
    with pytest.raises(ValueError, match="has changed since it was downloaded"):
        published.download("r50")


def test_a_file_fetched_by_hand_is_taken(server, content, tmp_path, capsys):
    (tmp_path / "by_hand.pth").write_bytes(content)
    assert cli.main(["download", "tiny", "--file", str(tmp_path / "by_hand.pth")]) == 0
    assert server.asked == [] and "predict --weights=tiny" in capsys.readouterr().out
    assert published.stored("tiny") == folder(tmp_path) / "tiny.safetensors"
    assert published.stored("r50") is None
    (tmp_path / "page.html").write_text("<!DOCTYPE html><p>Sign in")
    assert cli.main(["download", "r50", "--file", str(tmp_path / "page.html")]) == 1
    assert "is a web page, not the file" in capsys.readouterr().err
    assert cli.main(["download", "r50", "--file", str(tmp_path / "none")]) == 1
    assert "is no file" in capsys.readouterr().err


def test_a_file_that_is_no_such_network_is_kept_and_named(server, tmp_path):
    server.content = b"no weights at all"
    with pytest.raises(ValueError, match=r"is not what its configuration expects[\s\S]*report"):
        published.download("tiny")
    assert (folder(tmp_path) / "tiny.download").read_bytes() == server.content


def test_two_at_once_fetch_once(server, content):
    found = []
    threads = [
        threading.Thread(target=lambda: found.append(published.download("r50"))) for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 1 and len(found) == 3 and len(server.asked) == 1


def test_names_are_checked_before_anything_is_fetched(server, capsys):
    assert cli.main(["download", "r50", "tine"]) == 1
    assert "no published weights are called tine: did you mean tiny?" in capsys.readouterr().err
    assert server.asked == []
    assert cli.main(["download", "--all"]) == 0
    assert cli.main(["download", "--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines if line.endswith("  yes")] == ["tiny", "r50"]


def test_of_several_the_others_are_fetched(server, monkeypatch, capsys):
    publish(monkeypatch, server, "/404")
    monkeypatch.setitem(
        zoo.BACKBONES, "r50", zoo.BACKBONES["r50"]._replace(address=f"{server.url}/file")
    )
    assert cli.main(["download", "--all"]) == 1
    out = capsys.readouterr().out
    assert "1 of 2 files are here\nnot here: tiny" in out


def test_every_published_name_is_a_configuration_or_a_backbone():
    for name, source in zoo.published().items():
        assert source.address.startswith("https://") and source.licence
        assert (name in zoo.BACKBONES) != bool(source.config)
    with pytest.raises(ValueError, match=r"published for giam_r50_bf16; of the same .* giam_r50,"):
        published.config_of("giam_r50_bf16")


def test_commands_take_names(server, monkeypatch):
    monkeypatch.setattr(arguments, "draw_missing_data", lambda _: None)  # those of `tiny`
    parser = arguments.argparse.ArgumentParser()
    arguments.add_model_arguments(parser)
    given = arguments.parse_command_line(parser, ["--weights", "tiny"])
    arguments.check_arguments(given)
    model = arguments.open_model(given)
    assert given.config == "tiny" and model.title.startswith("weights tiny, class names from ")
    assert arguments.words_of_model(given) == ["--config=tiny", "--weights=tiny"]


@pytest.mark.parametrize(
    "address, start, is_refused",
    [
        ("https://b.org/x", "https://a.org/x", False),
        ("http://a.org/x", "https://a.org/x", True),
        ("ftp://a.org/x", "https://a.org/x", True),
        ("file:///etc/passwd", "https://a.org/x", True),
        ("http://127.0.0.1/x", "https://a.org/x", True),  # no way into this machine
        ("http://a.org/x", "http://127.0.0.1:80/x", True),
        ("http://localhost/x", "http://127.0.0.1:80/x", False),
    ],
)
def test_only_https_is_followed(address, start, is_refused):
    if not is_refused:
        return download._refuse_plain(address, start)
    with pytest.raises(download.DownloadFault, match="not https"):
        download._refuse_plain(address, start)


def test_a_folder_that_cannot_be_written_is_one_message(server, monkeypatch, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SPARSEINST_WEIGHTS", str(tmp_path / "file" / "weights"))
    assert cli.main(["download", "r50"]) == 1
    assert "Give another one by SPARSEINST_WEIGHTS" in capsys.readouterr().err
    monkeypatch.delenv("SPARSEINST_WEIGHTS")
    monkeypatch.setattr(published, "cache_folder", lambda _: None)
    assert cli.main(["download", "r50"]) == 1
    assert "set SPARSEINST_WEIGHTS to a folder (docs: caches)" in capsys.readouterr().err
    assert cli.main(["download", "--list"]) == 0


def test_a_published_configuration_alone_is_answered_with_its_weights(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["predict", "--config", "giam_r50_aug", "--output", "o", __file__]) == 1
    said = capsys.readouterr().err
    assert "no run runs/giam_r50_aug: for the published weights give --weights=giam_r50_aug" in said
