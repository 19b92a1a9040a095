"""Checkpoints made to do harm: nothing of them is run or followed, numbers are not believed."""

from __future__ import annotations

import json
import os
import shutil
import time

import numpy as np
import pytest

from sparseinst_jax.checkpoints import limits
from sparseinst_jax.checkpoints.limits import check_meta, refuse_huge_arrays
from sparseinst_jax.checkpoints.store import Checkpoints
from sparseinst_jax.inference import predictor
from sparseinst_jax.models.sparseinst.family import SPARSEINST
from sparseinst_jax.setup import loading
from sparseinst_jax.setup.builders import check_model
from sparseinst_jax.setup.config import load_config
from tests.unit.test_checkpoints import META, make_state


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(make_state(1), META)
    return folder


@pytest.fixture
def step(saved, tmp_path):
    """A copy of the folder of a step."""
    shutil.copytree(saved, tmp_path / "run")
    return tmp_path / "run" / "checkpoints" / "1"


def _read(step):
    with Checkpoints(step, read_only=True) as checkpoints:
        return checkpoints.restore_model()


def _refusal(step):
    start = time.monotonic()
    with pytest.raises(ValueError, match="no checkpoint can be read") as caught:
        _read(step)
    assert time.monotonic() - start < 10
    return str(caught.value)


def test_planted_programs_and_pickles_are_neither_run_nor_opened(step, tmp_path):
    canary = tmp_path / "canary"
    program = f"open({str(canary)!r}, 'w').close()"
    # `cos.system` with a canary, as a pickle of protocol 0 says it.
    pickle = f"cposix\nsystem\n(S'touch {canary}'\ntR.".encode()
    for folder in (step, step / "model", step / "meta", step.parent, step.parent.parent):
        for name in ("config.py", "__init__.py", "conftest.py", "sitecustomize.py", "jax.py"):
            (folder / name).write_text(program)
        for name in ("params.pkl", "checkpoint.pickle", "data.pickle", "model.pt"):
            (folder / name).write_bytes(pickle)
            (folder / name).chmod(0)
    before = {path: path.stat().st_atime_ns for path in step.parent.parent.rglob("*.p[ky]*")}
    params, _, meta = _read(step)
    np.testing.assert_array_equal(params["b"], np.ones(1))
    assert meta["class_names"] == ["x"]
    assert not canary.exists()
    assert {path: path.stat().st_atime_ns for path in before} == before


def test_a_planted_file_of_arrays_in_orbaxs_old_form_is_refused(step):
    (step / "model" / "checkpoint").write_bytes(b"\x81\xa1w\xc0")
    assert "a format that Orbax no longer writes" in _refusal(step)


@pytest.mark.parametrize("place", ["model/stray", "meta/metadata", "model/_METADATA", "model"])
def test_a_link_in_a_checkpoint_is_refused_and_what_it_leads_to_is_not_told(step, tmp_path, place):
    secret = tmp_path / "secret"
    target = step / place
    if target.is_dir():
        target.rename(secret)
    else:
        secret.write_text('{"password": "1234"}')
        target.unlink(missing_ok=True)
    target.symlink_to(secret)
    message = _refusal(step)
    assert "it holds a symbolic link" in message and "1234" not in message


def test_a_step_that_is_a_link_is_refused_in_a_run_and_taken_by_its_name(step, tmp_path):
    elsewhere = tmp_path / "elsewhere" / "1"
    elsewhere.parent.mkdir()
    step.rename(elsewhere)
    step.symlink_to(elsewhere)
    assert "is a symbolic link; name the folder" in _refusal(step.parent)
    assert _read(elsewhere)[2]["step"] == 1


def test_a_pipe_in_a_checkpoint_is_refused_before_it_is_opened(step):
    (step / "meta" / "metadata").unlink()
    os.mkfifo(step / "meta" / "metadata")
    assert "holds a device or a pipe" in _refusal(step)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[" * 100_000, "recursion"),
        ("[]", "its meta must be a JSON object, got []"),
        ('"text"', "its meta must be a JSON object"),
        ("9" * 10_000, "Exceeds the limit"),
        ("{", "cannot be read"),
        ("\0\0", "cannot be read"),
    ],
)
def test_a_meta_that_is_none_is_refused(step, text, reason):
    (step / "meta" / "metadata").write_text(text)
    assert reason in _refusal(step)


def test_a_vast_meta_is_refused_by_its_size(step, monkeypatch):
    monkeypatch.setattr(limits, "MAX_JSON", 1000)
    (step / "meta" / "metadata").write_text(json.dumps({**META, "x": "y" * 2000}))
    assert "bytes, expected 1000 at most" in _refusal(step)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"step": "1"}, "step must be of type int, got '1'"),
        ({"config": [1]}, "config must be of type dict"),
        ({"config": {"a": {"b": 10**30}}}, "config: a.b is 1000000000000000000000000000000"),
        ({"config": {"a": float("nan")}}, "config: a is nan"),
        ({"class_names": "cat"}, "class_names must be of type list"),
        ({"class_names": ["c\x1b[31mat"]}, "holds the control character"),
        ({"class_names": [["cat"]]}, "class_names: no string"),
        ({"category_ids": [True]}, "category_ids must be a list of integers"),
        ({"category_ids": [2**80]}, "category_ids must be a list of integers"),
    ],
)
def test_values_of_other_types_in_a_meta_are_refused_by_name(changes, reason):
    with pytest.raises(ValueError, match="its meta is wrong") as caught:
        check_meta({**META, "step": 1, **changes})
    assert reason in str(caught.value) and str(caught.value).isprintable()


def test_a_configuration_that_is_nested_deeply_is_refused():
    config: dict = {}
    for _ in range(500):
        config = {"a": config}
    with pytest.raises(ValueError, match="is nested deeper than 12"):
        check_meta({**META, "config": config})


def test_arrays_that_claim_all_memory_are_refused_before_they_are_made(step):
    shapes = {"model": {"params": {"w": np.broadcast_to(np.float32(0), (1 << 20, 1 << 20))}}}
    with pytest.raises(ValueError, match=r"the arrays of model have 1\.1e\+12 numbers"):
        refuse_huge_arrays(shapes, ["model"])
    file = step / "model" / "_METADATA"
    text = file.read_text()
    assert '"write_shape"' in text or "kernel" in text
    assert _read(step)[2]["step"] == 1


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("num_masks", 10**12, "model.num_masks must be at most 65536, got 1000000000000"),
        ("decoder_convs", 10**9, "model.decoder_convs must be at most 256"),
        ("num_groups", "4", "model.num_groups must be an integer, got '4'"),
        ("kernel_dim", 1.5, "model.kernel_dim must be an integer, got 1.5"),
        ("num_masks", True, "model.num_masks must be an integer, got True"),
    ],
)
def test_a_network_of_hostile_sizes_is_refused(key, value, reason):
    config = load_config("configs/tiny.py")
    plain = json.loads(config.to_json())
    plain["model"][key] = value
    with pytest.raises(ValueError) as caught:
        check_model(load_config(plain).model)
    assert reason in str(caught.value)


@pytest.mark.parametrize("eval_size", [(10**9, 10**9), (0, 64), (64,), (64, 10**5)])
def test_a_stored_test_size_that_would_take_all_memory_is_refused(eval_size):
    with pytest.raises(
        ValueError, match=r"data\.eval_size must be two lengths of 1 to 16384 pixels"
    ):
        predictor.Predictor(lambda *_: None, {}, {}, ["x"], [1], eval_size, family=SPARSEINST)


def test_a_stored_configuration_of_something_else_is_a_message(step):
    with pytest.raises(ValueError, match=r"stored with the checkpoint in .* is not one of this"):
        loading.load_checkpoint(step)
