"""Every network as an ONNX file finds what the package finds, in both runtimes."""

from __future__ import annotations

import contextlib

import jax
import numpy as np
import onnx
import pytest

from sparseinst_jax.export import quantize, verify
from sparseinst_jax.runner.file_predictor import FilePredictor
from tests import exporting

pytestmark = pytest.mark.usefixtures("quick_compilation")
# Every writer and every form that it has. All published networks with all norms and normalizers,
# narrow and at full size: tests/every_export.py, which takes minutes.
CASES = [
    ("giam_r50", {}),
    ("giam_softmax_r50", {"norm": "group_norm"}),
    ("iam_r50vd", {"norm": "batch_norm"}),
    ("giam_r50vd_dcn", {}),
    ("giam_r50_dcn_aug", {"norm": "group_norm"}),
    ("giam_cspdarknet53", {}),
    ("giam_darknet53", {"norm": "group_norm"}),
    ("giam_pvt_b1", {}),
    ("giam_pvt_b2_linear", {}),
    ("giam_lite0", {}),
    ("fastinst_r50_x1", {}),
    ("fastinst_r50vd_dcn_x3", {"num_layers": 2}),
]
# Sizes are computed in the same way for all, and compiling the package's side takes the time.
NUM_SIZES = {"giam_r50": 3, "giam_pvt_b2_linear": 2, "fastinst_r50_x1": 2}


@pytest.mark.parametrize(("name", "changes"), CASES, ids=lambda value: str(value or ""))
def test_a_file_finds_what_the_package_finds(name, changes):
    config = exporting.narrow(name, **changes)
    source = exporting.predictor_of(config).exportable()
    content = exporting.written(config).SerializeToString()
    onnx.checker.check_model(onnx.load_from_string(content), full_check=True)
    photos = exporting.photos()[: NUM_SIZES.get(name, 1)]
    for runtime in ("onnxruntime", "openvino"):
        agreement = verify.compare(source.model, FilePredictor(content, runtime), photos)
        assert agreement.faults() == [], f"{runtime}: {agreement}"
        assert agreement.candidates >= 4 * len(photos)
    # A file of one size: a photo that does not fit is made smaller than the rule says.
    size = (96, 128)
    exported = FilePredictor(exporting.written(config, size).SerializeToString())
    agreement = verify.compare(source.model, exported, exporting.photos()[:2])
    assert agreement.faults() == [] and agreement.sizes == [[96, 128]] * 2
    with pytest.raises(ValueError, match=r"takes images padded to \(96, 128\) only.*\(64, 96\)"):
        exported.run_graph(np.zeros((1, 64, 96, 3), np.uint8), np.array([[64, 96]]))


def test_where_rounding_decides_a_file_agrees_with_the_model_as_it_rounds_otherwise(monkeypatch):
    model, wrong = (exporting.predictor_of(exporting.narrow("giam_lite0")) for _ in range(2))
    before = jax.device_get(model.weights)
    with model.rounded_otherwise(3):
        moved = jax.device_get(model.weights)
    changes = jax.tree.map(lambda a, b: np.abs(a - b) / np.spacing(np.abs(a)), before, moved)
    steps = np.concatenate([change.ravel() for change in jax.tree.leaves(changes)])
    assert set(np.unique(steps)) <= {0.5, 1.0}  # half where a power of two is left downwards
    jax.tree.map(np.testing.assert_array_equal, before, jax.device_get(model.weights))

    # A file of other weights is refused however the model rounds; unless that is its rounding.
    wrong.set_weights(*jax.tree.map(lambda x: 1.05 * x, before))
    photos = exporting.photos()[:2]
    found = verify.compare(model, wrong, photos)
    assert found.faults() != [] and found.ties == 0

    @contextlib.contextmanager
    def rounded_otherwise(seed):
        model.set_weights(*(wrong if seed == 2 else model).weights)
        yield
        model.set_weights(*before)

    monkeypatch.setattr(model, "rounded_otherwise", rounded_otherwise)
    found = verify.compare(model, wrong, photos)
    assert found.faults() == [] and found.ties == 2 and "2 by other rounding" in str(found)


def test_a_graph_of_one_size_computes_no_sizes():
    for name in ("giam_r50vd_dcn", "giam_pvt_b2_linear", "fastinst_r50_x1"):
        model = exporting.written(exporting.narrow(name), (96, 128))
        kinds = {node.op_type for node in model.graph.node}
        assert not kinds & {"Range", "Less", "Div"} - {"Less", "Div"}


@pytest.mark.parametrize("name", ["giam_r50", "fastinst_r50_x1"])
def test_a_batch_of_two_is_two_of_one_to_the_bit_and_padding_is_cleared(name, rng):
    exported = FilePredictor(exporting.written(exporting.narrow(name)).SerializeToString())
    images = rng.integers(0, 256, (2, 96, 128, 3), dtype=np.uint8)
    valid_size = np.array([[90, 128], [96, 100]])
    both = exported.run_graph(images, valid_size)
    for row in (0, 1):
        cleared = images[row].copy()
        cleared[valid_size[row, 0] :], cleared[:, valid_size[row, 1] :] = 0, 0
        alone = exported.run_graph(cleared[None], valid_size[row : row + 1])
        for key, value in alone.items():
            np.testing.assert_array_equal(value[0], both[key][row], err_msg=key)


def test_odd_sizes_are_refused_in_words():
    exported = FilePredictor(exporting.written(exporting.narrow("giam_r50")).SerializeToString())
    with pytest.raises(ValueError, match=r"multiples of 32, got \(90, 128\).*to \(96, 128\)"):
        exported.run_graph(np.zeros((1, 90, 128, 3), np.uint8), np.array([[90, 128]]))


def test_several_images_together_are_those_alone():
    content = exporting.written(exporting.narrow("giam_r50")).SerializeToString()
    alone, together = FilePredictor(content), FilePredictor(content, batch_size=2)
    images = [exporting.photos()[0][:, ::-1], *exporting.photos()]
    for image, found in zip(images, together(images), strict=True):
        expected = alone(image)
        np.testing.assert_array_equal(found.masks, expected.masks)
        np.testing.assert_array_equal(found.scores, expected.scores)


def test_nodes_are_named_after_modules():
    names = {node.name for node in exporting.written(exporting.narrow("giam_r50")).graph.node}
    assert {"backbone/res3/0/conv2/Conv", "decoder/inst_branch/iam_conv/Conv"} <= names


def test_int8_leaves_alone_what_it_would_spoil_and_convolves_coordinates_beside(monkeypatch):
    model = exporting.written(exporting.narrow("giam_lite0"))
    exported = FilePredictor(model.SerializeToString())
    graph = quantize.quantized(model, exported, exporting.photos()[:1]).graph
    readers = {node.name: node for node in graph.node if node.op_type == "Conv"}
    made = [node.output[0] for node in graph.node if node.op_type == "DequantizeLinear"]
    in_int8 = {name for name, node in readers.items() if node.input[1] in made}
    kept = {name for name in readers if name.startswith((*quantize.FLOAT_PARTS, "coordinates/"))}
    assert len(kept) == 3 + 6 + 1 + 2 and in_int8 == readers.keys() - kept
    # With everything left alone, what was taken apart gives the same sums.
    monkeypatch.setattr(quantize, "FLOAT_PARTS", ("backbone", "encoder", "decoder"))
    apart = quantize.quantized(model, exported, exporting.photos()[:1])
    item = exported.prepare(exporting.photos()[0])
    size = exported.padded_size(item)
    ours, whole = (
        FilePredictor(m.SerializeToString()).select([item], size) for m in (apart, model)
    )
    np.testing.assert_allclose(ours["mask_probs"], whole["mask_probs"], atol=2e-5)
