"""The command `convert`, with networks of width 8 under every implementation's names."""

from __future__ import annotations

import argparse
import hashlib
import json
import pickle
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

import sparseinst_jax
from sparseinst_jax.checkpoints.state import TrainState
from sparseinst_jax.checkpoints.store import Checkpoints
from sparseinst_jax.cli import convert
from sparseinst_jax.cli.arguments import add_model_arguments, open_model
from sparseinst_jax.data.classes import COCO_CLASS_NAMES
from sparseinst_jax.models.sparseinst.weights import NAMES
from sparseinst_jax.models.trees import functional
from sparseinst_jax.setup import builders
from sparseinst_jax.setup.config import load_config
from sparseinst_jax.weights.convert import original_shapes, original_to_ours, ours_to_original
from sparseinst_jax.weights.initial_weights import load_initial_weights
from tests.unit import foreign_names

CONFIGS = Path(__file__).parents[2] / "configs"
TINY = str(CONFIGS / "tiny.py")
FROZEN = "--config.model.backbone.norm=frozen_batch_norm"


def random_state(num_classes: int, **backbone: object) -> dict[str, np.ndarray]:
    """An original state dict with random numbers."""
    config = load_config(TINY)
    with config.unlocked():
        config.model.backbone.update(backbone)
    _, *trees = functional(builders.build_model(config.model, num_classes, seed=None))
    rng = np.random.default_rng(0)
    shapes = original_shapes(*trees, NAMES)
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


@pytest.fixture
def source(tmp_path) -> Path:
    np.savez(tmp_path / "model.npz", **random_state(80))
    return tmp_path / "model.npz"


def run(*arguments: object) -> int:
    return convert.main([str(argument) for argument in arguments])


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert found[name].tobytes() == array.tobytes(), name
        assert found[name].shape == array.shape


def test_a_checkpoint_opens_without_a_run_and_says_where_it_comes_from(source, tmp_path, capsys):
    assert run(source, "--config", TINY, "--output", tmp_path / "new/giam_v1.0") == 0
    out = capsys.readouterr().out
    sha256 = hashlib.sha256(source.read_bytes()).hexdigest()
    assert f"{source} (npz, sha256 {sha256})" in out
    assert "names of the original release: it has backbone.stem.conv1.weight" in out
    assert "class head  2 (5,200)" in out  # 80 x 64 and 80
    folder = tmp_path / "new/giam_v1.0"
    predictor = sparseinst_jax.load(folder)
    assert predictor.class_names == COCO_CLASS_NAMES
    assert predictor.category_ids[-1] == 90 and len(predictor.category_ids) == 80
    assert predictor.class_names[11:13] == ("stop sign", "parking meter")
    assert predictor.category_ids[11:13] == (13, 14)
    with Checkpoints(folder, read_only=True) as checkpoints:
        params, statistics, meta = checkpoints.restore_model()
    assert_same(ours_to_original(params, statistics, NAMES), dict(np.load(source)))
    facts = meta["converted_from"]
    assert facts["sha256"] == sha256 and facts["file"] == str(source)
    assert facts["ecosystem"] == "the original release" and facts["kind"] == "npz"
    assert facts["date"][:2] == "20" and facts["converted_by"].startswith("sparseinst_jax ")
    assert meta["step"] == 0 and meta["config"]["model"]["num_masks"] == 10


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_back_to_the_original_is_bit_identical(source, tmp_path, suffix):
    folder, back = tmp_path / "checkpoint", tmp_path / f"back{suffix}"
    run(source, "--config", TINY, "--output", folder)
    run(folder, "--to", "original", "--output", back)
    if suffix == ".npz":
        assert_same(dict(np.load(back, allow_pickle=False)), dict(np.load(source)))
    else:
        assert_same(load_file(back), dict(np.load(source)))
        with safe_open(back, "np") as file:
            facts = json.loads(file.metadata()["converted_from"])
        assert facts["file"] == str(folder) and facts["kind"] == "checkpoint of step 0"


def test_a_safetensors_file_of_ours_is_read_by_weights_and_goes_back(source, tmp_path):
    ours, back = tmp_path / "ours.safetensors", tmp_path / "back.npz"
    run(source, "--config", TINY, "--output", ours)
    with safe_open(ours, "np") as file:
        metadata = file.metadata()
        assert "params/backbone/stem/conv1/kernel" in file.keys()
    assert json.loads(metadata["class_names"])[0] == "person"
    assert json.loads(metadata["converted_from"])["kind"] == "npz"
    run(ours, "--config", TINY, "--to", "original", "--output", back)
    assert_same(dict(np.load(back)), dict(np.load(source)))
    # No annotations are there: with 80 classes they are COCO's.
    arguments = ["--weights", str(ours), "--config", TINY]
    overrides = {"data.generator": "", "data.val.annotations": str(tmp_path / "nowhere.json")}
    predictor = open_model(_parse(arguments, overrides)).predictor
    assert predictor.class_names == COCO_CLASS_NAMES
    weights = jax.tree.map(np.asarray, predictor._weights)
    assert_same(ours_to_original(*weights, NAMES), dict(np.load(source)))


def _parse(arguments, overrides):
    parser = argparse.ArgumentParser()
    add_model_arguments(parser)
    namespace = parser.parse_args(arguments)
    namespace.overrides = overrides
    return namespace


def test_a_run_goes_to_the_original_with_its_averages(tmp_path):
    state = random_state(3)
    config = load_config(TINY)
    _, *trees = functional(builders.build_model(config.model, 3, seed=None))
    average = original_to_ours(state, *trees, NAMES)
    other = jax.tree.map(lambda x: x + 1, average)
    with Checkpoints(tmp_path / "run") as checkpoints:
        meta = {"config": config.to_dict(), "class_names": ["a", "b", "c"]}
        checkpoints.save(TrainState(np.int32(5), *other, {"m": np.zeros(1)}, average), meta)
    run(tmp_path / "run", "--to", "original", "--output", tmp_path / "back.npz")
    assert_same(dict(np.load(tmp_path / "back.npz")), state)


@pytest.mark.parametrize("name", ["paddledetection", "mmdetection", "mmdetection_d"])
def test_a_foreign_file_becomes_the_original_release_file_of_the_same_network(
    tmp_path, capsys, name
):
    variant = "d" if name == "mmdetection_d" else "b"
    state = random_state(80, norm="frozen_batch_norm", variant=variant)
    pairs = {
        "paddledetection": lambda: foreign_names.paddle((1, 1, 1, 1), "b"),
        "mmdetection": lambda: foreign_names.torchvision((1, 1, 1, 1)),
        "mmdetection_d": lambda: foreign_names.mmdetection_d((1, 1, 1, 1)),
    }[name]()
    foreign = {n: array for n, array in state.items() if not n.startswith("backbone.")}
    foreign |= {f"backbone.{theirs}": state[f"backbone.{ours}"] for theirs, ours in pairs}
    if name == "paddledetection":
        foreign = {n: a.T if a.ndim == 2 else a for n, a in foreign.items()}
    else:
        foreign["backbone.layer1.0.bn1.num_batches_tracked"] = np.array(3)
    np.savez(tmp_path / "foreign.npz", **foreign)
    options = ("--config", TINY, FROZEN, f"--config.model.backbone.variant={variant}")
    run(tmp_path / "foreign.npz", *options, "--to", "original", "--output", tmp_path / "o.npz")
    assert_same(dict(np.load(tmp_path / "o.npz")), state)
    out = capsys.readouterr().out
    counter = "a counter that no forward pass reads: backbone.layer1.0.bn1.num_batches_tracked"
    assert (f"  ignored, {counter}" in out) == (name != "paddledetection")
    assert f"names of {name.partition('_')[0]}".lower() in out.lower()


def write_config(folder: Path, name: str, line: str) -> Path:
    folder.mkdir(exist_ok=True)
    lines = ("config = tiny.get_config()", line, "return config")
    text = "\n    ".join(("from sparseinst_jax.configs import tiny\n\ndef get_config():", *lines))
    (folder / name).write_text(text)
    return folder / name


def test_a_wrong_configuration_is_told_the_one_that_fits(source, tmp_path):
    folder = tmp_path / "few"
    wrong = write_config(folder, "wrong.py", "config.model.num_groups = 1")
    write_config(folder, "right.py", "config.seed = 3")
    write_config(folder, "same.py", "config.train.num_steps = 9")
    (folder / "broken.py").write_text("raise ValueError('no configuration')")
    output = tmp_path / "out"
    with pytest.raises(ValueError) as caught:
        run(source, "--config", wrong, "--output", output)
    message = str(caught.value)
    assert message.startswith(f"{source} does not fit the model:\n  2 in the file but not")
    assert "decoder.inst_branch.fc.weight" in message
    assert f"what fit every array of the file, of {folder}: right.py, same.py" in message
    (folder / "right.py").unlink()
    (folder / "same.py").unlink()
    write_config(folder, "close.py", "config.model.num_masks = 9")
    with pytest.raises(ValueError, match=r"the closest is close\.py: (\d+) of its \d+ arrays") as c:
        run(source, "--config", wrong, "--output", output)
    total = len(np.load(source).files)
    assert f"{total - 2} of its {total} arrays agree" in str(c.value)
    assert not output.exists()


def test_nothing_is_overwritten_and_nothing_is_left_half_written(source, tmp_path, monkeypatch):
    taken = tmp_path / "taken.npz"
    taken.write_bytes(b"precious")
    with pytest.raises(ValueError, match=r"taken\.npz exists: give another"):
        run(source, "--config", TINY, "--to", "original", "--output", taken)
    assert taken.read_bytes() == b"precious"
    with pytest.raises(ValueError, match=r"a folder for a checkpoint, or a \.safetensors .*o\.pth"):
        run(source, "--config", TINY, "--output", tmp_path / "o.pth")

    def fail(*_, **__):
        raise OSError("disk full")

    monkeypatch.setattr(Checkpoints, "save", fail)
    monkeypatch.setattr(np, "savez", fail)
    before = set(tmp_path.iterdir())
    for output in (("--output", tmp_path / "dir"), ("--to", "original", "--output", "o.npz")):
        with pytest.raises(OSError, match="disk full"):
            monkeypatch.chdir(tmp_path)
            run(source, "--config", TINY, *output)
    assert set(tmp_path.iterdir()) == before


def test_classes_come_from_a_list_or_annotations_and_must_be_as_many(tmp_path):
    np.savez(tmp_path / "m.npz", **random_state(3))
    options = (tmp_path / "m.npz", "--config", TINY)
    with pytest.raises(ValueError, match=r"m\.npz finds 3 classes .* by --classes FILE\.json"):
        run(*options, "--output", tmp_path / "out")
    (tmp_path / "names.json").write_text('["ant", "bee"]')
    with pytest.raises(ValueError, match=r"m\.npz has 3 classes, .*names\.json has 2"):
        run(*options, "--output", tmp_path / "out", "--classes", tmp_path / "names.json")
    (tmp_path / "names.json").write_text('["ant", "bee", "cat"]')
    categories = [{"id": i, "name": name} for i, name in ((7, "x"), (2, "y"), (9, "z"))]
    images = [{"id": 1, "file_name": "a.jpg", "width": 8, "height": 8}]
    (tmp_path / "coco.json").write_text(
        json.dumps({"images": images, "annotations": [], "categories": categories})
    )
    for file, names, ids in (
        ("names.json", ["ant", "bee", "cat"], [1, 2, 3]),
        ("coco.json", ["y", "x", "z"], [2, 7, 9]),
    ):
        run(*options, "--output", tmp_path / f"of_{file[:-5]}", "--classes", tmp_path / file)
        with Checkpoints(tmp_path / f"of_{file[:-5]}", read_only=True) as checkpoints:
            meta = checkpoints.read_meta()
        assert (meta["class_names"], meta["category_ids"]) == (names, ids)
    with pytest.raises(FileNotFoundError, match=r"--classes .*absent\.json"):
        run(*options, "--output", tmp_path / "out", "--classes", tmp_path / "absent.json")


def _beside(state: dict, path: Path, **beside: object) -> Path:
    """A checkpoint of a trainer: the weights and what it writes beside them."""
    path.write_bytes(pickle.dumps({"state_dict": state, **beside}))
    return path


@pytest.mark.parametrize("count", [3, 80])
def test_class_names_in_the_file_are_those_of_the_checkpoint(tmp_path, capsys, count):
    names = [f"kind {i}" for i in range(count)]
    meta = {"dataset_meta": {"classes": tuple(names)}, "mmengine_version": "0.10.7"}
    state = random_state(count)
    options = (_beside(state, tmp_path / "m.pkl", meta=meta), "--config", TINY, "--output")
    run(*options, tmp_path / "out")
    with Checkpoints(tmp_path / "out", read_only=True) as checkpoints:
        stored = checkpoints.read_meta()
    assert stored["class_names"] == names
    assert stored["category_ids"] == list(range(1, count + 1))
    assert "classes of the file, meta.dataset_meta.classes: kind 0, kind 1" in (
        capsys.readouterr().out
    )
    # Those that are asked for win, and the others are told.
    (tmp_path / "names.json").write_text(json.dumps([f"own {i}" for i in range(count)]))
    run(*options, tmp_path / "own", "--classes", tmp_path / "names.json")
    assert "names.json, not the kind 0, kind 1" in capsys.readouterr().out
    # The weights alone give the same to every other command, and keep them when written again.
    for weights in (tmp_path / "m.pkl", tmp_path / "again.safetensors"):
        if weights.suffix == ".safetensors":
            run(*options, weights)
        arguments = ["--weights", str(weights), "--config", TINY]
        predictor = open_model(_parse(arguments, {"data.generator": ""})).predictor
        assert predictor.class_names == tuple(names)
    config = load_config(TINY)
    _, *own = functional(builders.build_model(config.model, count, seed=1))
    initial = load_initial_weights(tmp_path / "m.pkl", *own, names, NAMES)
    assert not initial.fresh and f"the same {count} classes" in initial.lines[-1]
    initial = load_initial_weights(tmp_path / "m.pkl", *own, ["x"] * count, NAMES)
    assert set(initial.fresh.values()) == {"other classes"}


def test_names_of_cocos_classes_get_its_ids_and_other_numbers_of_names_are_refused(tmp_path):
    state = random_state(80)
    meta = {"CLASSES": COCO_CLASS_NAMES}
    run(_beside(state, tmp_path / "m.pkl", meta=meta), "--config", TINY, "--output", tmp_path / "o")
    with Checkpoints(tmp_path / "o", read_only=True) as checkpoints:
        assert checkpoints.read_meta()["category_ids"][-1] == 90
    path = _beside(state, tmp_path / "n.pkl", names={0: "cat", 1: "dog"})
    with pytest.raises(
        ValueError, match=r"finds 80 classes and names 2 classes \(under names: cat, "
    ):
        run(path, "--config", TINY, "--output", tmp_path / "n")
    (tmp_path / "names.json").write_text(json.dumps([str(i) for i in range(80)]))
    classes = ("--classes", tmp_path / "names.json")
    assert run(path, "--config", TINY, "--output", tmp_path / "n", *classes) == 0
    path = _beside(state, tmp_path / "t.pkl", names=["cat", *map(str, range(78)), "cat"])
    with pytest.raises(
        ValueError, match=r"names 80 classes .*, of these cat twice: give the right"
    ):
        run(path, "--config", TINY, "--output", tmp_path / "t")


def test_a_backbone_alone_and_other_networks_are_refused_with_what_to_do(tmp_path):
    state = random_state(3)
    backbone = {name: a for name, a in state.items() if name.startswith("backbone.")}
    np.savez(tmp_path / "imagenet.npz", **backbone)
    with pytest.raises(
        ValueError, match=r"a backbone alone \(detectron2: .*sparseinst train --init-from"
    ):
        run(tmp_path / "imagenet.npz", "--config", TINY, "--output", tmp_path / "out")
    np.savez(tmp_path / "other.npz", **{"encoder.layers.0.weight": np.zeros((2, 2))})
    with pytest.raises(ValueError, match=r"has no decoder\.inst_branch\.cls_score\.bias"):
        run(tmp_path / "other.npz", "--config", TINY, "--output", tmp_path / "out")
    with pytest.raises(ValueError, match="--config FILE must describe the network"):
        run(tmp_path / "imagenet.npz", "--output", tmp_path / "out")
    with pytest.raises(FileNotFoundError, match=r"absent\.pth"):
        run(tmp_path / "absent.pth", "--config", TINY, "--output", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_moving_average_is_taken_where_it_is_asked_for(tmp_path):
    state = random_state(80)
    average = {name: array + 1 for name, array in state.items()}
    path = _beside(state, tmp_path / "both.pkl", ema_state_dict=average)
    options = (path, "--config", TINY, "--to", "original", "--output")
    run(*options, tmp_path / "plain.npz")
    run(*options, tmp_path / "ema.npz", "--ema")
    assert_same(dict(np.load(tmp_path / "plain.npz")), state)
    assert_same(dict(np.load(tmp_path / "ema.npz")), average)


def test_mmengines_average_and_torchs_averaged_model_are_taken(tmp_path):
    state = random_state(80)
    last = {f"module.{name}": array + 1 for name, array in state.items()}
    mmengine = {"message_hub": {}, "ema_state_dict": {"steps": np.array(7), **last}}
    path = _beside(state, tmp_path / "mmengine.pkl", **mmengine)
    averaged = {"n_averaged": np.array(7), **{f"module.{n}": a for n, a in state.items()}}
    other = {name: array + 1 for name, array in state.items()}
    torch = _beside(other, tmp_path / "torch.pkl", model_ema=averaged)
    for source in (path, torch):
        back = source.with_suffix(".npz")
        run(source, "--config", TINY, "--to", "original", "--output", back, "--ema")
        assert_same(dict(np.load(back)), state)


def test_bfloat16_of_paddle_and_whole_numbers_in_a_whole_network(tmp_path, capsys):
    state = random_state(80)
    half = {name: array.astype(ml_dtypes.bfloat16) for name, array in state.items()}
    bits = {name: array.view(np.uint16) for name, array in half.items()}
    (tmp_path / "half.pdparams").write_bytes(pickle.dumps(bits))
    options = ("--config", TINY, "--to", "original", "--output")
    run(tmp_path / "half.pdparams", *options, tmp_path / "half.npz")
    expected = {name: array.astype(np.float32) for name, array in half.items()}
    assert_same(dict(np.load(tmp_path / "half.npz")), expected)
    assert f"{len(state)} arrays of bfloat16 widened to float32" in capsys.readouterr().out
    name = "decoder.inst_branch.fc.weight"
    np.savez(tmp_path / "whole.npz", **{**state, name: np.ones_like(state[name], np.int8)})
    with pytest.raises(ValueError, match=rf"in 1 of its arrays: {name} \(int8, expected float32\)"):
        run(tmp_path / "whole.npz", *options, tmp_path / "whole_back.npz")
    assert not (tmp_path / "whole_back.npz").exists()


def test_training_starts_from_a_converted_checkpoint_but_for_the_class_head(source, tmp_path):
    run(source, "--config", TINY, "--output", tmp_path / "out")
    config = load_config(TINY)
    _, *own = functional(builders.build_model(config.model, 3, seed=1))
    initial = load_initial_weights(tmp_path / "out", *own, ("a", "b", "c"), NAMES)
    head = {f"decoder.inst_branch.cls_score.{leaf}" for leaf in ("weight", "bias")}
    assert initial.fresh == dict.fromkeys(head, "other classes")
    loaded = ours_to_original(initial.params, initial.statistics, NAMES)
    given = {name: array for name, array in np.load(source).items() if name not in head}
    assert_same({name: array for name, array in loaded.items() if name not in head}, given)


def test_a_converted_checkpoint_cannot_be_continued_as_a_run(source, tmp_path):
    run(source, "--config", TINY, "--output", tmp_path / "out")
    with Checkpoints(tmp_path / "out") as checkpoints:
        abstract = TrainState(np.int32(0), {}, {}, {})
        with pytest.raises(ValueError, match=r"only weights.*--init-from"):
            checkpoints.restore_state(abstract)
        assert checkpoints.steps == (0,)
