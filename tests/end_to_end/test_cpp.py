"""The C++ program: its parts equal Pillow's and the package's, and it finds what Python finds."""

import importlib.util
import io
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import PIL
import pytest
from PIL import Image

import sparseinst_jax
from sparseinst_jax.data.images import read_image
from sparseinst_jax.data.transforms import padded_size, resized_size
from sparseinst_jax.runner import masks, run_lengths

SOURCE = Path(__file__).parents[2] / "examples" / "cpp"
HAS_OPENVINO = importlib.util.find_spec("openvino") is not None
# Before, a resize always began with the columns.
PILLOW_13 = pytest.mark.skipif(int(PIL.__version__.split(".")[0]) < 13, reason="Pillow 13's order")
pytestmark = pytest.mark.skipif(
    not (shutil.which("cmake") and shutil.which("c++")), reason="needs cmake and a C++ compiler"
)


def run(*words, **kwargs):
    return subprocess.run([str(word) for word in words], capture_output=True, text=True, **kwargs)


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    folder, runtime = tmp_path_factory.mktemp("build"), "openvino" if HAS_OPENVINO else "none"
    settings = [f"-DRUNTIME={runtime}", f"-DPython3_EXECUTABLE={sys.executable}"]
    settings.append(f"-DCHECK={Path(__file__).parent / 'cpp_parts.cpp'}")
    for command in (
        ["cmake", "-S", SOURCE, "-B", folder, "-DCMAKE_CXX_FLAGS=-Werror", *settings],
        ["cmake", "--build", folder, "--parallel", "2"],
    ):
        done = run(*command)
        assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture(scope="module")
def parts(build):
    def call(*words, **kwargs):
        return run(build / "check_parts", *words, **kwargs)

    return call


def noise(rng, height, width, channels=3):
    """A picture of sharp edges and smooth parts, odd in every way."""
    coarse = rng.integers(0, 256, (5, 7, channels), np.uint8).squeeze()
    smooth = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))
    is_noisy = rng.random((height, width)) < 0.3
    result = smooth.copy()
    result[is_noisy] = rng.integers(0, 256, result[is_noisy].shape)
    return result


@pytest.mark.parametrize(
    "size, new_size",
    [
        ((480, 640), (608, 811)),
        ((97, 131), (64, 86)),
        ((61, 40), (97, 64)),
        ((700, 900), (64, 83)),
        ((50, 50), (50, 31)),
        ((50, 50), (77, 50)),
        ((1, 5), (64, 320)),
        pytest.param((400, 3), (2, 1), marks=PILLOW_13),
        pytest.param((103, 61), (62, 41), marks=PILLOW_13),
        pytest.param((103, 61), (63, 41), marks=PILLOW_13),
        ((33, 47), (33, 47)),
    ],
)
def test_resize_equals_pillow_to_the_bit(size, new_size, parts, tmp_path, rng):
    image = Image.fromarray(noise(rng, *size))
    image.save(tmp_path / "in.png")
    assert parts("resize", tmp_path / "in.png", *new_size, tmp_path / "out.png").returncode == 0
    expected = image.resize(new_size[::-1], Image.Resampling.BILINEAR)
    made = np.asarray(Image.open(tmp_path / "out.png"))
    np.testing.assert_array_equal(made, np.asarray(expected))


def turned(orientation):
    exif = Image.Exif()
    exif[0x010F] = "a maker"  # entries before and after
    exif[0x0112] = orientation
    exif[0x8298] = "nobody"
    return exif.tobytes()


def kinds_of_photos(rng):
    colour, grey = Image.fromarray(noise(rng, 43, 58)), Image.fromarray(noise(rng, 43, 58, 1))
    yield from (("plain.jpg", colour, {}), ("grey.jpg", grey, {}))
    for subsampling in (0, 1, 2):
        yield f"sub{subsampling}.jpg", colour, {"subsampling": subsampling, "quality": 90}
    yield "progressive.jpg", colour, {"progressive": True}
    for orientation in range(9):
        yield f"turned{orientation}.jpg", colour, {"exif": turned(orientation)}
    yield from (("turned.png", colour, {"exif": turned(6)}), ("grey.png", grey, {}))
    alpha = Image.fromarray(noise(rng, 43, 58, 4))
    yield from (("alpha.png", alpha, {}), ("grey_alpha.png", alpha.convert("LA"), {}))
    yield from (("palette.png", colour.quantize(50), {}), ("bits.png", grey.convert("1"), {}))
    yield "few.png", colour.quantize(3), {"transparency": 1}
    deep = rng.integers(0, 1 << 16, (43, 58), np.uint16)
    yield "deep.png", Image.fromarray(deep), {}


def test_photos_are_read_as_the_package_reads_them(parts, tmp_path, rng):
    for name, image, settings in kinds_of_photos(rng):
        image.save(tmp_path / name, **settings)
        done = parts("read", tmp_path / name, tmp_path / "out.png")
        assert done.returncode == 0, (name, done.stderr)
        made = np.asarray(Image.open(tmp_path / "out.png"))
        np.testing.assert_array_equal(made, read_image(tmp_path / name), err_msg=name)


def bad_photos(rng):
    stream = io.BytesIO()
    Image.fromarray(noise(rng, 43, 58)).save(stream, "JPEG")
    jpeg, stream = stream.getvalue(), io.BytesIO()
    yield "cut.jpg", jpeg[: len(jpeg) // 2], "Premature end"
    yield "head.jpg", jpeg[:30], ""
    Image.fromarray(noise(rng, 43, 58, 4), "CMYK").save(stream, "JPEG")
    print_colours, stream = stream.getvalue(), io.BytesIO()
    yield "print.jpg", print_colours, "CMYK"
    Image.fromarray(noise(rng, 43, 58)).save(stream, "PNG")
    png = stream.getvalue()
    yield "cut.png", png[: len(png) // 2], ""
    yield "flipped.png", png[:60] + bytes([png[60] ^ 255]) + png[61:], ""
    huge = (100_000).to_bytes(4)
    yield "huge.png", png[:16] + huge + huge + png[24:], ""
    yield "text.jpg", b"not a photo", "neither JPEG nor PNG"
    yield "empty.jpg", b"", "neither JPEG nor PNG"


def test_what_is_no_photo_is_refused_in_words(parts, tmp_path, rng):
    for name, content, reason in bad_photos(rng):
        (tmp_path / name).write_bytes(content)
        done = parts("read", tmp_path / name, tmp_path / "out.png")
        assert done.returncode == 1, (name, done)
        assert done.stderr.startswith(f"image {tmp_path / name} cannot be read: "), done.stderr
        assert reason in done.stderr
    assert "No such file" in parts("read", tmp_path / "absent.jpg", tmp_path / "out.png").stderr


@pytest.mark.parametrize(
    "grid, stride, valid, length",
    [
        (24, 4, 96, 131),
        (24, 4, 90, 40),
        (152, 4, 601, 3000),
        (2, 4, 5, 9),
        (1, 8, 3, 1),
        (8, 8, 64, 64),
    ],
)
def test_taps_equal_the_package(grid, stride, valid, length, parts):
    done = parts("taps", grid, stride, valid, length)
    made = np.array([line.split() for line in done.stdout.splitlines()], float)
    expected = masks.upsampling_operator(grid, stride, valid, length, length)
    index = np.minimum(made[:, :1] + np.arange(3), grid - 1)
    np.testing.assert_array_equal(index, expected.index)
    np.testing.assert_array_equal(made[:, 1:].astype(np.float32), expected.weight)


@pytest.mark.parametrize("are_logits", [False, True])
def test_masks_equal_the_package(are_logits, parts, rng):
    grid, valid, size, threshold = (16, 24), (61, 90), (131, 97), 0.5 if are_logits else 0.45
    coarse = rng.random((4, 6)).astype(np.float32)
    values = np.asarray(Image.fromarray(coarse).resize(grid[::-1], Image.Resampling.BICUBIC))
    values = np.log(np.clip(values, 0.01, 0.99) / 0.5) if are_logits else values
    cut = masks.MaskCut(threshold, 4, are_logits, measures=True)
    ((expected, mean),) = masks.upsample_masks(values[None], np.array([0]), valid, size, cut)
    text = " ".join(f"{value:.9g}" for value in values.ravel())
    words = [*grid, 4, *valid, *size, threshold, int(are_logits)]
    counts, area, made_mean = parts("masks", *words, input=text).stdout.split()
    assert counts == run_lengths.encode_transposed(expected)[0]["counts"]
    assert int(area) == expected.sum() > 100
    assert float(made_mean) == pytest.approx(float(mean[0]), abs=1e-6)


METADATA = {
    "schema": 1,
    "class_names": ['a "quoted" \\ name', "naïve\n\t", "\U0001f9a5 sloth", "/\b\f\r\x01"],
    "category_ids": [1, None, -3, 90],
    "resize": "pillow_bilinear",
    "protocol": "original",
    "shortest_side": 640,
    "longest_side": 853,
    "size_multiple": 32,
    "fixed_size": None,
    "num_masks": 100,
    "mask_stride": 4,
    "mask_threshold": 0.45,
    "masks_are_logits": False,
    "scores_at_original_size": False,
    "config": {"a": [1.5e-3, -2, {"b": []}, {}, True, False, None]},
}


def test_sizes_equal_the_package(parts, rng):
    for size in [tuple(map(int, size)) for size in rng.integers(1, 4000, (50, 2))]:
        resized = resized_size(size, 640, 853)
        made = parts("sizes", *size, input=json.dumps(METADATA)).stdout.split()
        assert list(map(int, made)) == [*resized, *padded_size(resized)]
    fixed = json.dumps(METADATA | {"fixed_size": [640, 864]})
    for size, expected in [((480, 640), "640 853 640 864"), ((640, 480), "640 480 640 864")]:
        assert parts("sizes", *size, input=fixed).stdout.strip() == expected


@pytest.mark.parametrize("ascii_only", [True, False])
def test_metadata_are_read_as_python_reads_them(ascii_only, parts):
    done = parts("metadata", input=json.dumps(METADATA, ensure_ascii=ascii_only))
    assert done.returncode == 0, done.stderr
    assert [json.loads(line) for line in done.stdout.splitlines()] == METADATA["class_names"]


def test_hostile_metadata_are_refused_in_words(parts):
    text = json.dumps(METADATA)
    broken = [text[:cut] for cut in range(0, len(text), 7)]
    broken += [text + "x", "[" * 100_000, '{"a":' * 5000, "[]", text.replace("640", "6_4_0")]
    broken += [text.replace("640", "NaN"), '"' + "\\u12", '"\\ud83e"', " " * (1 << 23)]
    changes = {
        "schema": 2,
        "class_names": [],
        "category_ids": [1],
        "resize": "other",
        "shortest_side": 1e9,
        "mask_stride": 0,
        "mask_threshold": "0.5",
        "fixed_size": [64],
        "masks_are_logits": 1,
        "num_masks": 1.5,
    }
    broken += [json.dumps(METADATA | {key: value}) for key, value in changes.items()]
    broken += [
        json.dumps({key: value for key, value in METADATA.items() if key != left_out})
        for left_out in METADATA
        if left_out != "config"
    ]
    for text in broken:
        done = parts("metadata", input=text)
        assert done.returncode == 1, (text[:200], done)
        assert done.stderr.startswith("the model"), (text[:200], done.stderr)


def assert_equal_results(made, expected):
    """Of a COCO results file: labels, scores within 1e-5, one pixel of 1e5."""
    labels = [(entry["image_id"], entry["category_id"]) for entry in made]
    assert labels == [(entry["image_id"], entry["category_id"]) for entry in expected]
    scores = [[entry["score"] for entry in entries] for entries in (made, expected)]
    np.testing.assert_allclose(*scores, atol=1e-5)
    different = total = 0
    for pair in zip(made, expected, strict=True):
        rles = [entry["segmentation"] for entry in pair]
        both = run_lengths.decode_masks(rles, tuple(rles[1]["size"]))
        different, total = different + (both[0] != both[1]).sum(), total + both[0].size
    assert different <= 1e-5 * total, f"{different} of {total} pixels"


@pytest.fixture(scope="module")
def photos(stored_run, tmp_path_factory):
    """Photos of three sizes: wide, tall, and larger than the network's."""
    drawn = sorted((stored_run.parent / "data/images/train").glob("*.png"))
    made, folder = [], tmp_path_factory.mktemp("photos")
    for photo, size in zip(drawn, ((131, 97), (97, 140), (300, 311)), strict=False):
        made.append(folder / f"{len(made)}.jpg")
        Image.open(photo).convert("RGB").resize(size, Image.Resampling.BICUBIC).save(made[-1])
    return made


@pytest.mark.skipif(not HAS_OPENVINO, reason="needs openvino (pip install openvino)")
def test_the_program_finds_what_python_finds(stored_model, photos, build, tmp_path):
    predictor, path = stored_model
    results = tmp_path / "results.json"
    options = ["--score", 0.3, "--json", results, "--output", tmp_path / "out"]
    done = run(build / "segment", path, *photos, *options)
    assert done.returncode == 0, done.stderr

    expected, names = [], []
    for number, photo in enumerate(photos, 1):
        found = predictor(photo)
        expected += found.to_coco(number)
        shown = found.above(0.3)
        names += [shown.class_names[i] for i in np.argsort(-shown.scores, kind="stable")]
        drawn_on = np.asarray(Image.open(tmp_path / "out" / f"{photo.stem}.png"))
        is_changed = (drawn_on != found.image).any(-1)
        np.testing.assert_array_equal(is_changed & ~shown.masks.any(0), False)
        assert is_changed[shown.masks.any(0)].mean() > 0.95
    assert len(expected) > 10 and len(names) > 5
    assert_equal_results(json.loads(results.read_text()), expected)
    printed = re.findall(r"^  (\S.*?)\s+0\.\d{4} .*#[0-9a-f]{6}$", done.stdout, re.MULTILINE)
    assert printed == names


@pytest.mark.skipif(not HAS_OPENVINO, reason="needs openvino (pip install openvino)")
def test_fastinst_masks_that_are_logits_become_the_same(fastinst_model, photos, build, tmp_path):
    done = run(build / "segment", fastinst_model, *photos, "--json", tmp_path / "results.json")
    assert done.returncode == 0, done.stderr
    # The same runtime, so that near ties keep their order.
    predictor = sparseinst_jax.load(fastinst_model, runtime="openvino")
    expected = [entry for n, photo in enumerate(photos, 1) for entry in predictor(photo).to_coco(n)]
    assert len(expected) > 10
    assert_equal_results(json.loads((tmp_path / "results.json").read_text()), expected)


@pytest.mark.skipif(not HAS_OPENVINO, reason="needs openvino (pip install openvino)")
def test_wrong_arguments_and_files_are_refused_in_words(stored_model, build, tmp_path):
    path = stored_model[1]
    (tmp_path / "broken.onnx").write_bytes(path.read_bytes()[:1000])
    photo = tmp_path / "photo.png"
    Image.new("RGB", (40, 30)).save(photo)
    for code, words, message in [
        (2, [], "expected a model"),
        (2, [path], "at least one photo"),
        (2, [path, photo, "--score", "40"], "--score: expected a number"),
        (2, [path, photo, "--scores", "0.4"], "unknown option --scores"),
        (2, [path, photo, "--json"], "--json needs a value"),
        (1, [tmp_path / "absent.onnx", photo], f"there is no file {tmp_path / 'absent.onnx'}"),
        (
            1,
            [tmp_path / "broken.onnx", photo],
            f"model {tmp_path / 'broken.onnx'} cannot be opened",
        ),
        (1, [path, tmp_path / "absent.jpg"], "No such file"),
        (1, [path, path], "neither JPEG nor PNG"),
    ]:
        done = run(build / "segment", *words)
        assert done.returncode == code, (words, done)
        assert message in done.stderr, done.stderr
