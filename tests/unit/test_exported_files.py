"""Exported files as data: what they say, what is refused, what runs them, what is left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper

from sparseinst_jax.export import sparseinst as sparseinst_writer
from sparseinst_jax.inference import masks as device_masks
from sparseinst_jax.runner import metadata as file_metadata
from sparseinst_jax.runner.file_predictor import FilePredictor
from sparseinst_jax.runner.masks import MaskCut, upsample_masks
from sparseinst_jax.runner.metadata import KEY
from sparseinst_jax.runner.onnx_file import read_metadata
from sparseinst_jax.setup.load import load
from tests import exporting

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def model() -> onnx.ModelProto:
    return exporting.written(exporting.narrow("iam_r50"))


@pytest.fixture(scope="module")
def file(model, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("exported") / "model.onnx"
    path.write_bytes(model.SerializeToString())
    return path


def changed(model: onnx.ModelProto, change) -> bytes:
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    change(copy)
    return copy.SerializeToString()


def say(model: onnx.ModelProto, **values) -> bytes:
    """The model with other values in its metadata; `...` leaves one out."""

    def change(copy):
        (entry,) = [entry for entry in copy.metadata_props if entry.key == KEY]
        plain = {**json.loads(entry.value), **values}
        entry.value = json.dumps({key: value for key, value in plain.items() if value is not ...})

    return changed(model, change)


def test_the_metadata_is_what_the_network_is(model):
    found = read_metadata(model.SerializeToString())
    config = exporting.narrow("iam_r50")
    assert found.class_names == tuple(f"class {i}" for i in range(5))
    assert found.category_ids == (1, 2, 3, 4, 5)
    assert (found.shortest_side, found.longest_side) == config.data.eval_size == exporting.SIZE
    assert (found.num_masks, found.mask_stride, found.size_multiple) == (12, 4, 32)
    assert (found.score_threshold, found.mask_threshold) == (0.005, 0.45)
    assert found.config == json.loads(json.dumps(config.to_dict()))
    assert len(found.weights_sha256) == 64 and found.precision == "float32"
    assert file_metadata.from_json(found.to_json(), "it") == found


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"schema": 2}, "has the schema 2, this version of the package reads 1"),
        ({"schema": ...}, "has the schema None"),
        ({"class_names": []}, "class_names: expected a list of texts, got"),
        ({"class_names": ["a"]}, "as many of one as of the other"),
        ({"class_names": ["a", 1, "b", "c", "d"]}, "class_names: expected a list of texts"),
        ({"category_ids": [1, 2, 3, 4, 2**70]}, "category_ids: expected"),
        ({"category_ids": [1, 2, 3, 4, True]}, "category_ids: expected"),
        ({"shortest_side": 1 << 40}, "shortest_side: expected a whole number of 1 to"),
        ({"longest_side": -1}, "longest_side: expected a whole number"),
        ({"size_multiple": 8}, "size_multiple: expected 32, got 8"),
        ({"fixed_size": [100, 64]}, "fixed_size: expected null or two multiples of 32"),
        ({"num_masks": 1 << 30}, "num_masks: expected a whole number of 1 to"),
        ({"mask_stride": 0}, "mask_stride: expected"),
        ({"score_threshold": float("nan")}, "NaN is no JSON"),
        ({"mask_threshold": "0.5"}, "mask_threshold: expected a number of 0 to 1, got '0.5'"),
        ({"masks_are_logits": 1}, "masks_are_logits: expected true or false, got 1"),
        ({"config": [1]}, "config: expected an object"),
        ({"protocol": "other"}, "config.eval.protocol must be one of"),
        ({"version": "x" * (1 << 22)}, "characters, too many"),
    ],
)
def test_metadata_beyond_its_bounds_is_refused_with_the_value(model, values, message):
    with pytest.raises(ValueError, match=r"(?s).+") as caught:
        FilePredictor(say(model, **values))
    assert message in str(caught.value)


def _huge(copy):
    copy.graph.initializer[0].dims[:] = [1 << 40, 1 << 40]


def _negative(copy):
    copy.graph.initializer[0].dims[:] = [-1]


def _outside(copy):
    tensor = copy.graph.initializer[0]
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../../etc/passwd")


def _other_operators(copy):
    copy.graph.node[0].domain = "com.example"


def _loop(copy):
    body = helper.make_graph([], "body", [], [])
    copy.graph.node.append(helper.make_node("If", [], [], then_branch=body, else_branch=body))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda copy: copy.ClearField("metadata_props"), "no metadata of this package"),
        (lambda copy: copy.ClearField("graph"), "no metadata of this package"),
        (lambda copy: copy.metadata_props.add(key=KEY, value="{}"), "no metadata of this package"),
        (lambda copy: setattr(copy.opset_import[0], "version", 9), "operator set 9, not one of"),
        (lambda copy: setattr(copy.opset_import[0], "version", 99), "operator set 99"),
        (lambda copy: copy.ClearField("opset_import"), "operator set None"),
        (lambda copy: copy.functions.add(name="f"), "defines operators of its own"),
        (_huge, "an array is larger than the file"),
        (_negative, "an array is larger than the file"),
        (_outside, "an array lies in another file"),
        (_other_operators, "is of 'com.example'"),
        (_loop, "a node holds a graph"),
    ],
)
def test_a_file_that_is_not_ours_is_refused_before_a_runtime_sees_it(model, change, message):
    with pytest.raises(ValueError, match="sparseinst export") as caught:
        read_metadata(changed(model, change))
    assert message in str(caught.value)


def test_a_file_that_is_cut_off_or_mutated_is_refused_in_words_or_read(model, rng):
    content = model.SerializeToString()
    for length in rng.integers(1, len(content), 60).tolist():
        with pytest.raises(ValueError, match="sparseinst export"):
            read_metadata(content[:length])
    for _ in range(300):
        mutated = bytearray(content)
        for place in rng.integers(0, len(content), 5).tolist():
            mutated[place] = int(rng.integers(0, 256))
        try:
            read_metadata(bytes(mutated))
        except ValueError as error:
            assert "\n\n" not in str(error) and len(str(error)) < 3000


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_what_a_runtime_refuses_comes_in_words(model, runtime):
    def break_it(copy):
        copy.graph.node[5].op_type = "NoSuchOperator"

    with pytest.raises(ValueError, match=f"{runtime} cannot open the content: "):
        FilePredictor(changed(model, break_it), runtime)


def test_a_graph_that_is_not_what_the_metadata_says_is_refused(model):
    exported = FilePredictor(say(model, num_masks=3, mask_stride=8))
    with pytest.raises(ValueError, match="its graph is not what its metadata says"):
        exported(exporting.photos()[0])


def test_paths_that_lead_to_no_file_are_refused(tmp_path):
    (tmp_path / "empty.onnx").touch()
    (tmp_path / "folder.onnx").mkdir()
    with pytest.raises(FileNotFoundError, match=r"none\.onnx does not exist"):
        load(tmp_path / "none.onnx")
    with pytest.raises(ValueError, match=r"empty\.onnx is an empty file"):
        load(tmp_path / "empty.onnx")
    with pytest.raises(ValueError, match=r"folder\.onnx is no file"):
        load(tmp_path / "folder.onnx")


def test_options_that_do_not_fit_a_file_are_refused(file, tmp_path):
    with pytest.raises(ValueError, match="holds its configuration and one state"):
        load(file, step=3)
    with pytest.raises(ValueError, match="runtime must be one of onnxruntime, openvino"):
        load(file, runtime="tensorrt")
    with pytest.raises(ValueError, match="is computed by JAX"):
        load(tmp_path, runtime="openvino")


BLOCKED = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BLOCKED:
            raise ImportError("blocked: " + name)
BLOCKED = {"jax", "jaxlib", "flax", "optax", "orbax", "grain", "scipy", "ml_collections", "onnx"}
BLOCKED |= {"tensorflow_datasets", "matplotlib", "absl", "yaml", "safetensors"}
sys.meta_path.insert(0, Blocker())
import numpy as np, sparseinst_jax
found = sparseinst_jax.load(sys.argv[1], runtime=sys.argv[2])(np.load(sys.argv[3]))
found.plot(), found.boxes_xyxy
np.savez(sys.argv[4], scores=found.scores, labels=found.labels, masks=found.masks)
assert not BLOCKED & {name.partition(".")[0] for name in sys.modules}
"""


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_a_file_runs_where_neither_jax_nor_flax_can_be_imported(file, tmp_path, runtime):
    photo, result = tmp_path / "photo.npy", tmp_path / "result.npz"
    np.save(photo, exporting.photos()[1])
    command = [sys.executable, "-c", BLOCKED, str(file), runtime, str(photo), str(result)]
    subprocess.run(command, cwd=ROOT, check=True)
    ours = exporting.predictor_of(exporting.narrow("iam_r50"))(exporting.photos()[1])
    with np.load(result) as found:
        np.testing.assert_allclose(found["scores"], ours.scores, atol=1e-5)
        np.testing.assert_array_equal(found["labels"], ours.labels)
        assert len(ours) > 3 and (found["masks"] != ours.masks).mean() <= 1e-5


@pytest.mark.parametrize("measures", [False, True])
@pytest.mark.parametrize("are_logits", [False, True])
@pytest.mark.parametrize(
    ("grid", "valid", "original"),
    [((24, 32), (91, 122), (200, 131)), ((8, 8), (5, 3), (1, 2)), ((8, 40), (31, 155), (7, 311))],
)
def test_masks_by_numpy_are_those_of_the_device(rng, grid, valid, original, are_logits, measures):
    smooth = np.linspace(-3, 3, grid[1]) * np.linspace(2, -1, grid[0])[:, None]
    logits = (smooth + 0.3 * rng.standard_normal((20, *grid))).astype(np.float32)
    logits[3] = -9  # no pixel
    values = logits if are_logits else 1 / (1 + np.exp(-logits))
    cut = MaskCut(0.45, 4, are_logits, measures)
    chosen = np.array([7, 3, *range(17)])
    ours = list(upsample_masks(values, chosen, valid, original, cut))
    theirs = list(device_masks.upsample_masks(values[None], 0, chosen, valid, original, cut))
    a, b = (np.concatenate([chunk for chunk, _ in found]) for found in (ours, theirs))
    assert a.dtype == np.uint8 and a.shape == b.shape == (19, original[1], original[0])
    assert (a != b).mean() <= 1e-5
    if measures:
        scores = [np.concatenate([one for _, one in found]) for found in (ours, theirs)]
        np.testing.assert_allclose(*scores, atol=1e-5)


def test_a_network_that_finds_something_else_is_not_handed_over(tmp_path, monkeypatch):
    predictor = exporting.predictor_of(exporting.narrow("iam_r50"))

    def rough(g, x):
        return g.add("Add", g.add("Sigmoid", x), 0.001)

    monkeypatch.setattr(sparseinst_writer, "sigmoid", rough)
    with pytest.raises(ValueError, match=r"so no file was written: mask_probs: .*at most 0\.0002"):
        predictor.export(tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []


KILLED = """
import os, pathlib, sys
from sparseinst_jax.runtime import files
def pause(*given, **options):
    print("writing", flush=True)
    sys.stdin.read()
os.link = pause
files.replace_file(pathlib.Path(sys.argv[1]) / "model.onnx", bytes(1 << 20))
"""


def test_killed_while_writing_nothing_is_left(tmp_path):
    command = [sys.executable, "-c", KILLED, str(tmp_path)]
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    with subprocess.Popen(command, cwd=ROOT, **pipes) as process:
        assert process.stdout.readline() == b"writing\n"
        os.kill(process.pid, signal.SIGKILL)
    assert list(tmp_path.iterdir()) == []
