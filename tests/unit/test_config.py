import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sparseinst_jax.cli.arguments import add_config_arguments, parse_command_line, split_overrides
from sparseinst_jax.setup import config as configs

ROOT = Path(__file__).parents[2]
SHAPES = ROOT / "configs" / "shapes.py"
TINY = ROOT / "configs" / "tiny.py"

PLAIN = """
from ml_collections import ConfigDict

def get_config():
    return ConfigDict(dict(
        rate=0.5, count=3, name="a", flag=False, size=(640, 853), part=dict(weights=(1.0, 2.0))
    ))
"""


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    path = tmp_path / "plain.py"
    path.write_text(PLAIN)
    return path


def test_overrides_take_the_type_of_the_value_they_replace(plain):
    overrides = {
        "rate": "2",
        "count": "7",
        "name": "7",
        "flag": "true",
        "size": "(352, 469)",
        "part.weights": "[3, 0.5, 1]",
    }
    config = configs.load_config(plain, overrides)
    assert configs.flatten(config) == {
        "rate": 2.0,
        "count": 7,
        "name": "7",
        "flag": True,
        "size": (352, 469),
        "part.weights": (3.0, 0.5, 1.0),
    }
    assert type(config.rate) is float
    assert [type(x) for x in config.part.weights] == [float] * 3


@pytest.mark.parametrize(
    "text, expected", [("352,469", (352, 469)), ("416", (416,)), ("(1,)", (1,))]
)
def test_tuples_are_read_without_brackets_too(plain, text, expected):
    assert configs.load_config(plain, {"size": text}).size == expected


def test_every_fault_of_the_overrides_is_reported_at_once(plain):
    with pytest.raises(ValueError) as caught:
        configs.load_config(
            plain, {"count": "1.5", "flag": "maybe", "size": "(1.5, 2)", "cuont": "1", "part": "1"}
        )
    message = str(caught.value)
    assert "--config.count=1.5: expected an integer" in message
    assert "--config.flag=maybe: expected true or false" in message
    assert "[1.5] must be of type int" in message
    assert (
        "--config.cuont is not a key of the configuration. Did you mean --config.count?" in message
    )
    assert "Keys: count, flag, name, part.weights, rate, size." in message
    assert "--config.part is a group: set one of part.weights" in message


def test_a_key_in_the_wrong_group_is_found(plain):
    with pytest.raises(ValueError, match=r"Did you mean --config\.part\.weights\?"):
        configs.load_config(plain, {"weights": "1"})


def test_unknown_keys_in_a_variant_are_refused_with_the_valid_ones(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "from sparseinst_jax.configs import base\n\n"
        "def get_config():\n"
        "    config = base.get_config()\n"
        "    config.train.batchsize = 8\n"
        "    return config\n"
    )
    with pytest.raises(ValueError, match=r'(?s)mine\.py.*batchsize.*Did you mean "batch_size"'):
        configs.load_config(path)


def test_a_file_without_get_config_or_of_another_kind_is_refused(tmp_path):
    (tmp_path / "empty.py").write_text("")
    with pytest.raises(ValueError, match=r"must define get_config\(\)"):
        configs.load_config(tmp_path / "empty.py")
    (tmp_path / "c.yaml").write_text("")
    with pytest.raises(ValueError, match=r"must name a \.py or a stored \.json"):
        configs.load_config(tmp_path / "c.yaml")
    with pytest.raises(FileNotFoundError, match=r"did you mean .*empty\.py"):
        configs.load_config(tmp_path / "emty.py")


@pytest.mark.parametrize("source", ["tiny", "tiny.py", "configs/tiny.py", "configs/tiny"])
def test_a_configuration_is_found_by_its_name_anywhere(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert configs.load_config(source).to_dict() == configs.load_config(TINY).to_dict()
    (tmp_path / "tiny").mkdir()  # a folder of the name is no configuration
    assert configs.find_config(source) == TINY


def test_a_file_wins_over_a_configuration_of_the_same_name(plain, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    plain.rename(tmp_path / "tiny.py")
    assert configs.load_config("tiny.py").count == 3
    assert "count" not in configs.load_config("tiny")
    (tmp_path / "elsewhere").mkdir()
    with pytest.raises(FileNotFoundError, match=r"elsewhere/tiny\.py, which does not exist"):
        configs.load_config("elsewhere/tiny.py")


def test_an_unknown_name_lists_those_that_are_close(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError) as caught:
        configs.load_config("giam_50")
    assert str(caught.value).startswith(
        "--config must name a file, got giam_50, which does not exist"
        " (did you mean giam_r50 or iam_r50 or giam_r50vd?)."
    )


def test_a_configuration_is_loaded_from_another_or_with_values_in_place_of_texts():
    first = configs.load_config("tiny", {"data.eval_size": (32, 48), "train.lr_scaling": "none"})
    assert first.data.eval_size == (32, 48) and first.train.lr_scaling == "none"
    second = configs.load_config(first, {"data.keep_empty": False, "train.learning_rate": 1})
    assert (second.data.keep_empty, first.data.keep_empty) == (False, True)
    assert second.data.eval_size == (32, 48) and type(second.train.learning_rate) is float
    with pytest.raises(ValueError, match=r"train\.num_steps=1\.5: expected an integer"):
        configs.load_config(first, {"train.num_steps": 1.5})


STARTS_FROM_OURS = """
from sparseinst_jax.configs import giam_r50

def get_config():
    config = giam_r50.get_config()
    config.train.num_steps = 7
    return config
"""


def test_outside_of_the_checkout_a_file_starts_from_ours_and_no_path_is_changed(tmp_path):
    (tmp_path / "mine.py").write_text(STARTS_FROM_OURS)
    code = (
        "import sys; before = list(sys.path)\n"
        "from sparseinst_jax.setup.config import load_config\n"
        "config = load_config('mine.py')\n"
        "assert (config.train.num_steps, config.data.eval_size) == (7, (608, 853))\n"
        "assert sys.path == before\n"
        "from sparseinst_jax.configs import giam_r50\n"
        "print(giam_r50.__file__)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}  # not installed
    command = [sys.executable, "-c", code]
    options: dict = dict(cwd=tmp_path, env=environment, capture_output=True, text=True)
    run = subprocess.run(command, check=True, **options)
    assert run.stdout.strip() == str(ROOT / "configs" / "giam_r50.py")


def test_json_round_trip_keeps_values_types_and_tuples():
    config = configs.load_config(SHAPES)
    again = configs.from_json(json.dumps(config.to_dict()))
    assert configs.flatten(again) == configs.flatten(config)
    assert again.data.eval_size == (128, 160)
    assert type(again.data.eval_size) is tuple
    assert configs.diff(config, again) == {}


def test_stored_json_is_read_without_running_a_file_beside_it(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(configs.load_config(SHAPES).to_dict()))
    (tmp_path / "config.py").write_text("raise RuntimeError('must not run')")
    config = configs.load_config(tmp_path / "config.json", {"train.num_steps": "7"})
    assert config.train.num_steps == 7


def test_diff_names_the_keys_with_both_values_and_the_free_ones_are_let_through():
    first = configs.load_config(SHAPES)
    second = configs.load_config(
        SHAPES, {"train.learning_rate": "1", "train.num_steps": "5", "train.log_every": "3"}
    )
    changed = configs.diff(first, second)
    assert set(changed) == {"train.learning_rate", "train.num_steps", "train.log_every"}
    assert changed["train.learning_rate"] == (first.train.learning_rate, 1.0)
    assert set(configs.forbidden_changes(first, second)) == {"train.learning_rate"}


def test_a_loaded_configuration_is_locked(plain):
    with pytest.raises(AttributeError):
        configs.load_config(plain).part.unknown = 1


def test_command_line_splits_overrides_from_other_arguments():
    parser = argparse.ArgumentParser()
    add_config_arguments(parser)
    parser.add_argument("images", nargs="*")
    arguments = parse_command_line(
        parser,
        [
            "a.png",
            "--config.x.y=(1, 2)",
            "--config=c.py",
            "--config.z",
            "-3",
            "--workdir",
            "w",
            "b",
        ],
    )
    assert arguments.overrides == {"x.y": "(1, 2)", "z": "-3"}
    assert (arguments.config, arguments.workdir) == ("c.py", "w")
    assert arguments.images == ["a.png", "b"]


def test_an_override_without_a_value_is_refused():
    with pytest.raises(ValueError, match=r"--config\.x needs a value"):
        split_overrides(["--config.x"])


def test_run_folder_is_named_after_the_configuration_file():
    assert configs.default_workdir("some/where/giam_r50.py") == Path("runs/giam_r50")


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("[!_]*.py")), ids=lambda p: p.stem)
def test_variants_have_the_keys_and_types_of_the_base_of_their_family(path):
    flat = configs.flatten(configs.load_config(path))
    of_family = {"sparseinst": "base", "fastinst": "fastinst_base"}[flat["model.family"]]
    base = configs.flatten(configs.load_config(ROOT / "configs" / f"{of_family}.py"))
    if flat["model.backbone.name"] != base["model.backbone.name"]:  # has options of its own
        base, flat = (
            {key: value for key, value in keys.items() if not key.startswith("model.backbone.")}
            for keys in (base, flat)
        )
    assert {k: type(v) for k, v in flat.items()} == {k: type(v) for k, v in base.items()}


@pytest.mark.parametrize(
    "body, message",
    [
        ("def get_config(:", r"mine\.py, line 1: SyntaxError: invalid syntax"),
        ("import nonsense", r"mine\.py, line 1: ModuleNotFoundError: No module named 'nonsense'"),
        ("from configs.x import y", r"line 1: .*No module named 'configs\.x'\. .* sparseinst_jax"),
        ("import os\nos.no\n", r"mine\.py, line 2: AttributeError: module 'os' has no attribute"),
        ("def get_config():\n    return 1 / 0", r"mine\.py, line 2: ZeroDivisionError: division"),
        ("def get_config(): return 3", r"must return an ml_collections\.ConfigDict, got int"),
    ],
)
def test_a_fault_in_a_configuration_file_is_told_with_its_line(tmp_path, body, message):
    (tmp_path / "mine.py").write_text(body)
    with pytest.raises(ValueError, match=message):
        configs.load_config(tmp_path / "mine.py")


def test_a_stored_configuration_that_is_damaged_is_named(tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json: a stored configuration must be JSON"):
        configs.load_config(tmp_path / "config.json")


def test_moved_data_are_no_other_run_and_weights_are_compared_by_place(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    stored = configs.load_config("tiny", {"train.init_from": "a.npz"})
    moved = {"data.train.images": "elsewhere", "data.val.annotations": "/val.json"}
    wanted = configs.load_config(stored, {**moved, "train.init_from": str(tmp_path / "a.npz")})
    assert configs.forbidden_changes(stored, wanted) == {}
    other = configs.load_config(stored, {"train.init_from": "", "data.train.tfds": "coco/x"})
    assert configs.forbidden_changes(stored, other).keys() == {"train.init_from", "data.train.tfds"}
    at_home = configs.load_config("tiny", {"data.train.images": "~/photos"})
    assert at_home.data.train.images == str(Path.home() / "photos")
