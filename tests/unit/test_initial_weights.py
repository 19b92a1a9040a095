from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from sparseinst_jax.checkpoints.state import TrainState
from sparseinst_jax.checkpoints.store import Checkpoints
from sparseinst_jax.models.sparseinst.weights import NAMES
from sparseinst_jax.models.trees import functional
from sparseinst_jax.setup import builders
from sparseinst_jax.setup.config import load_config
from sparseinst_jax.setup.published import THINGS, local_weights
from sparseinst_jax.weights.convert import ours_to_original
from sparseinst_jax.weights.initial_weights import load_initial_weights

TINY = Path(__file__).parents[2] / "configs" / "tiny.py"
CLASSES = ("a", "b", "c")
HEAD = ["decoder.inst_branch.cls_score.weight", "decoder.inst_branch.cls_score.bias"]


def fresh(num_classes: int, seed: int, **overrides: object):
    config = load_config(TINY, {f"model.{k.replace('__', '.')}": v for k, v in overrides.items()})
    _, params, statistics = functional(builders.build_model(config.model, num_classes, seed))
    # Norms start at zeros and ones: other values show whether they were loaded.
    return jax.tree.map(lambda x: x + np.float32(0.25 * seed), (params, statistics))


@pytest.fixture(scope="module")
def given() -> dict[str, np.ndarray]:
    return ours_to_original(*fresh(3, seed=1), NAMES)


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    with Checkpoints(folder) as checkpoints:
        for step in (3, 7):
            params, statistics = fresh(3, seed=step)
            state = TrainState(np.int32(step), params, statistics, {"m": np.zeros(1)})
            checkpoints.save(state, {"config": {}, "class_names": list(CLASSES)})
    return folder


def load(path: Path, *, classes=CLASSES, **overrides: object):
    own = fresh(len(classes), seed=2, **overrides)
    initial = load_initial_weights(path, *own, classes, NAMES)
    return ours_to_original(initial.params, initial.statistics, NAMES), initial


def test_of_several_sources_the_later_goes_first_and_the_head_is_new(tmp_path, given):
    decoder = {name: array + 1 for name, array in given.items() if name.startswith("decoder.")}
    np.savez(tmp_path / "decoder.npz", **decoder)
    sources = [write(tmp_path, given), tmp_path / "decoder.npz"]
    loaded, initial = load(sources, classes=("a", "b"))
    assert set(initial.fresh) == set(HEAD) and not initial.ignored
    for name in set(given) - set(HEAD):
        np.testing.assert_array_equal(loaded[name], decoder.get(name, given[name]), name)


def test_the_decoder_of_the_package_fits_its_configuration(tmp_path):
    config = load_config("finetune_lite")
    own = functional(builders.build_model(config.model, 3, 0))[1:]
    backbone = {n: a for n, a in ours_to_original(*own, NAMES).items() if n.startswith("backbone.")}
    sources = [write(tmp_path, backbone), local_weights(THINGS)]
    initial = load_initial_weights(sources, *own, CLASSES, NAMES)
    new = {f"decoder.cls_backbone.{leaf}" for leaf in ("weight", "bias")}  # no class was learned
    assert initial.fresh.keys() == new and not initial.ignored
    assert "  the class head begins as that of any thing, for each class" in initial.lines
    head = ours_to_original(initial.params, initial.statistics, NAMES)[HEAD[0]]
    assert head.any() and (head == head[:1]).all()


def write(folder: Path, arrays: dict[str, np.ndarray]) -> Path:
    np.savez(folder / "weights.npz", **arrays)
    return folder / "weights.npz"


def assert_taken(loaded, given, initial, num_classes=3, **overrides):
    """Each array is the file's or, where the report says so, the fresh one."""
    own = ours_to_original(*fresh(num_classes, seed=2, **overrides), NAMES)
    assert loaded.keys() == own.keys()
    for name, array in loaded.items():
        expected = own if name in initial.fresh else given
        np.testing.assert_array_equal(array, expected[name], err_msg=name)


def test_a_file_of_the_same_network_gives_every_weight_and_a_table_of_the_parts(tmp_path, given):
    save_file(given, tmp_path / "weights.safetensors")
    loaded, initial = load(tmp_path / "weights.safetensors")
    assert initial.fresh == {} and initial.ignored == {}
    assert_taken(loaded, given, initial)
    rows = {line[2:12].strip(): line[12:].split() for line in initial.lines[3:7]}
    for part in ("backbone", "encoder"):
        sizes = [array.size for name, array in given.items() if name.startswith(part)]
        assert rows[part] == [str(len(sizes)), f"({sum(sizes):,})", "-", "-"]
    assert rows["class head"][:2] == ["2", f"({sum(given[name].size for name in HEAD)})"]
    assert "class head was taken over: 3 classes in the file too" in initial.lines[-1]


def test_another_number_of_classes_starts_the_head_afresh_and_nothing_else(tmp_path, given):
    loaded, initial = load(write(tmp_path, given), classes="abcde")
    assert initial.fresh == dict.fromkeys(HEAD, "3 classes in the file, 5 here")
    assert_taken(loaded, given, initial, num_classes=5)
    assert any(line.startswith("  re-initialised, 3 classes") for line in initial.lines)


@pytest.mark.parametrize("classes", ["abd", "bac"])
def test_a_run_of_as_many_classes_under_other_names_does_not_give_its_head(run_folder, classes):
    loaded, initial = load(run_folder, classes=tuple(classes))
    assert initial.fresh == dict.fromkeys(HEAD, "other classes")
    assert_taken(loaded, ours_to_original(*fresh(3, seed=7), NAMES), initial)
    assert f"a, b, c there, {', '.join(classes)} here" in initial.lines[-1]


def test_a_run_gives_its_last_checkpoint_and_a_step_folder_that_step(run_folder):
    for path, step in ((run_folder, 7), (run_folder / "checkpoints" / "3", 3)):
        loaded, initial = load(path)
        assert initial.fresh == {}
        assert_taken(loaded, ours_to_original(*fresh(3, seed=step), NAMES), initial)
        assert initial.lines[0] == f"weights of {path}, step {step}:"


def test_a_file_of_the_backbone_alone_leaves_the_rest_fresh(tmp_path, given):
    backbone = {n: array for n, array in given.items() if n.startswith("backbone.")}
    bare = {name.removeprefix("backbone."): array for name, array in backbone.items()}
    bare["fc.weight"] = np.zeros((10, 4), np.float32)  # the classifier of such a file
    for number, arrays in enumerate((backbone, bare)):
        loaded, initial = load(write(tmp_path, arrays))
        assert {name.partition(".")[0] for name in initial.fresh} == {"encoder", "decoder"}
        assert set(initial.fresh.values()) == {"not in the file"}
        assert initial.ignored == ({"fc.weight": "the classifier of ImageNet"} if number else {})
        assert_taken(loaded, backbone, initial)


def test_layers_of_another_shape_and_missing_ones_start_afresh_and_strangers_are_ignored(
    tmp_path, given
):
    changed = dict(given)
    del changed["encoder.fusion.bias"]
    changed["decoder.unknown.weight"] = np.zeros((2, 2), np.float32)
    changed["num_batches"] = np.zeros(3)
    loaded, initial = load(write(tmp_path, changed), num_masks="5", kernel_dim="4")
    assert initial.fresh["encoder.fusion.bias"] == "not in the file"
    assert initial.fresh["decoder.inst_branch.mask_kernel.bias"] == "(8,) in the file, (4,) here"
    assert {name for name, why in initial.fresh.items() if "(40," in why} == {
        "decoder.inst_branch.iam_conv.weight",  # 10 masks in 4 groups, 5 masks in 4 groups
        "decoder.inst_branch.iam_conv.bias",
    }
    assert not any(name.startswith("backbone.") or name in HEAD for name in initial.fresh)
    assert list(initial.ignored) == ["decoder.unknown.weight", "num_batches"]
    assert_taken(loaded, changed, initial, num_masks="5", kernel_dim="4")
    text = "\n".join(initial.lines)
    assert "  ignored, not in the model: decoder.unknown.weight, num_batches" in text
    assert "  re-initialised, not in the file: encoder.fusion.bias" in text


@pytest.mark.parametrize("there", ["frozen_batch_norm", "batch_norm"])
def test_frozen_and_trainable_batch_norms_take_each_others_numbers(tmp_path, there):
    here = {"frozen_batch_norm": "batch_norm", "batch_norm": "frozen_batch_norm"}[there]
    given = ours_to_original(*fresh(3, seed=1, backbone__norm=there), NAMES)
    loaded, initial = load(write(tmp_path, given), backbone__norm=here)
    assert initial.fresh == {} and "WARNING" not in "".join(initial.lines)
    assert_taken(loaded, given, initial, backbone__norm=here)
    norm = initial.params["backbone"]["stem"]["conv1"].get("norm", {})
    assert (set(norm) == {"scale", "bias"}) == (here == "batch_norm")


def test_group_norm_under_weights_of_batch_norm_is_warned_of(tmp_path, given):
    _, initial = load(write(tmp_path, given), backbone__norm="group_norm")
    assert "batch norm in the file, group norm here" in initial.lines[-1]
    assert "--config.model.backbone.norm=frozen_batch_norm" in initial.lines[-1]


def test_another_backbone_is_refused_with_the_share_the_names_and_the_config_that_fits(
    tmp_path, given
):
    with pytest.raises(ValueError) as caught:
        load(write(tmp_path, given), backbone__width="16")
    message = str(caught.value)
    assert "does not fit the backbone: 0.0% of its" in message and "at least 90%" in message
    assert "backbone.res2.0.conv1.weight ((8, 8, 1, 1) in the file, (16, 16, 1, 1) here)" in message
    assert '--config.model.backbone.stage_depths="(1, 1, 1, 1)"' in message
    assert "--config.model.backbone.width=8" in message


@pytest.mark.parametrize("lost", [0.08, 0.12])
def test_ninety_percent_of_the_backbones_numbers_are_enough(tmp_path, given, lost):
    sizes = {name: a.size for name, a in given.items() if name.startswith("backbone.")}
    left, budget = dict(given), lost * sum(sizes.values())
    for name in sorted(sizes, key=sizes.__getitem__, reverse=True):
        if sizes[name] <= budget:
            budget -= sizes[name]
            del left[name]
    path = write(tmp_path, left)
    if lost < 0.1:
        _, initial = load(path)
        assert set(initial.fresh) == given.keys() - left.keys()
    else:
        with pytest.raises(ValueError, match=r"88\.\d% of its [\s\S]* but not all: download"):
            load(path)


def test_names_of_another_library_are_shown(tmp_path):
    path = write(tmp_path, {"features.0.weight": np.zeros((1, 1, 1, 1), np.float32)})
    with pytest.raises(ValueError, match=r"0\.0% .*[\s\S]*in the file: features\.0\.weight"):
        load(path)


def test_a_path_that_does_not_exist_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"--init-from takes a weights file .* run folder"):
        load(tmp_path / "nowhere")
