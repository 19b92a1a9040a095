"""Whatever a json, a mask, an image or a checkpoint holds: read, or refused in one way.

Weight files have such a test of their own in `test_weights_files`.
"""

from __future__ import annotations

import copy
import io
import json
import shutil

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as coco_mask

from sparseinst_jax.checkpoints.limits import check_meta
from sparseinst_jax.checkpoints.store import Checkpoints
from sparseinst_jax.data import coco
from sparseinst_jax.data._index.json_stream import JsonError, read_object
from sparseinst_jax.data.images import name_fault, read_header, read_image
from sparseinst_jax.data.segmentations import compressed_length
from sparseinst_jax.evaluation.coco_metrics import evaluate
from sparseinst_jax.runtime.messages import acting_character, printable
from tests.fuzzing import cases
from tests.unit.test_checkpoints import META, make_state

SIZE = 12
odd_number = st.sampled_from(
    [0, -1, 1e308, 1e400, -1e400, float("nan"), 2**53 + 1, 2**63, 10**30, 10**4000, True, 0.5, 1e7]
)
odd_text = st.sampled_from(
    ["", "..", "../a.png", "/etc/passwd", "a\0.png", "\x1b[2J", "\u202egnp", "\ud83d", "x" * 5000]
)
odd = st.one_of(
    odd_number,
    odd_text,
    st.text(max_size=8),
    st.none(),
    st.just([]),
    st.just({}),
    st.lists(st.floats(-1e9, 1e9), max_size=9),
    st.just([[[[[[[]]]]]]]),
    st.just({"size": [SIZE, SIZE], "counts": "_" * 9}),
    st.just({"size": [10**9, 10**9], "counts": [10**18]}),
)
KEYS = ["images", "annotations", "categories", "info", "id", "file_name", "height", "width", "name"]
KEYS += ["image_id", "category_id", "segmentation", "iscrowd", "area", "bbox", "counts", "size"]
KEYS += ["score"]


def _content() -> dict:
    square = [2.0, 2.0, 9.0, 2.0, 9.0, 9.0, 2.0, 9.0]
    runs = {"size": [SIZE, SIZE], "counts": [24, 20, 100]}
    text = coco_mask.encode(np.asfortranarray(np.eye(SIZE, dtype=np.uint8)))["counts"].decode()
    masks = [[square], runs, {"size": [SIZE, SIZE], "counts": text}]
    return {
        "images": [
            {"id": i, "file_name": f"{i}.png", "height": SIZE, "width": SIZE} for i in (1, 2)
        ],
        "annotations": [
            {"id": i + 1, "image_id": 1 + i % 2, "category_id": 3, "iscrowd": 0, "area": 49.0}
            | {"bbox": [2, 2, 7, 7], "segmentation": mask}
            for i, mask in enumerate(masks)
        ],
        "categories": [{"id": 3, "name": "cat"}, {"id": 5, "name": "dog"}],
    }


def _mutated(node, steps):
    """Change values at drawn places of a tree; a step is (way down, key or value)."""
    for way, action, value in steps:
        value, here = copy.deepcopy(value), node
        for turn in way[:-1]:
            children = list(here.values()) if isinstance(here, dict) else here
            if not children or not isinstance(children[turn % len(children)], dict | list):
                break
            here = children[turn % len(children)]
        if not here:
            continue
        keys = list(here) if isinstance(here, dict) else list(range(len(here)))
        key = keys[way[-1] % len(keys)]
        if action == "set":
            here[key] = value
        elif action == "delete":
            del here[key]
        elif isinstance(here, dict):
            here[value if isinstance(value, str) else "extra"] = copy.deepcopy(here[key])
        else:
            here.append(copy.deepcopy(here[key]))
    return node


step = st.tuples(
    st.lists(st.integers(0, 20), min_size=1, max_size=5),
    st.sampled_from(["set", "set", "delete", "copy"]),
    odd,
)
steps = st.lists(step, min_size=1, max_size=4)


def _is_message(error: Exception) -> bool:
    return len(str(error)) < 30_000 and "\x1b" not in str(error) and "\u202e" not in str(error)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz")
    for i in (1, 2):
        Image.fromarray(np.zeros((SIZE, SIZE, 3), np.uint8)).save(folder / f"{i}.png")
    return folder


@cases(200)
@given(steps=steps)
def test_any_json_is_read_or_refused_and_what_is_read_can_be_drawn(folder, steps):
    path = folder / "any.json"
    path.write_text(json.dumps(_mutated(_content(), steps)))
    try:
        dataset = coco.load_coco(path, folder, keeps_boxes=True, check_files=True)
    except (ValueError, FileNotFoundError) as error:
        assert _is_message(error)
        return
    for record in dataset.records:
        assert name_fault(record.file_name) is None
        for annotation in record.annotations:
            mask = coco.decode_mask(annotation.segmentation, record.height, record.width)
            assert mask.shape == (record.height, record.width)
    assert not any(acting_character(name) for name in dataset.class_names)


@cases(100)
@given(
    data=st.one_of(
        st.binary(max_size=60),
        st.text(alphabet='{}[]":,0123456789.eE+-tfn \\u', max_size=60).map(str.encode),
        st.tuples(st.integers(0, 700), st.integers(0, 255), st.integers(0, 3)).map(
            lambda cut: _cut(json.dumps(_content()).encode(), *cut)
        ),
    )
)
def test_any_bytes_are_a_json_as_python_reads_it_or_an_error(data):
    try:
        found = {
            key: list(value) if hasattr(value, "__next__") else value
            for key, value in read_object(io.BytesIO(data), ("images", "annotations"))
        }
    except JsonError as error:
        assert len(str(error)) < 1000
        return
    if found == {"": []}:  # a list is none of ours, whatever comes in it
        return
    expected = json.loads(data.decode(json.detect_encoding(data), "surrogatepass"))
    if isinstance(expected, dict):
        assert repr(found) == repr(expected)  # NaN equals nothing, itself included
    else:
        assert repr(found) == repr({"": expected})


def _cut(content: bytes, place: int, byte: int, length: int) -> bytes:
    place %= len(content)
    return content[:place] + bytes([byte]) + content[place + length :]


number = st.one_of(odd_number, st.integers(-5, 200), st.floats(-30, 30))
run_lengths = st.fixed_dictionaries(
    {
        "size": st.one_of(st.just([SIZE, SIZE]), st.lists(number, max_size=3), odd),
        "counts": st.one_of(
            st.text(alphabet=[chr(c) for c in range(48, 112)], max_size=12),
            st.binary(max_size=12),
            st.lists(st.integers(0, 60), max_size=6).map(
                lambda runs: [*runs, max(0, SIZE * SIZE - sum(runs))]
            ),
            st.lists(number, max_size=6),
            odd,
        ),
    }
)
polygons = st.lists(st.one_of(st.lists(number, max_size=12), run_lengths, odd), max_size=3)


@cases(150)
@given(mask=st.one_of(run_lengths, polygons))
def test_any_mask_is_drawn_within_the_image_or_refused(mask):
    try:
        drawn = coco.decode_mask(mask, SIZE, SIZE)
    except ValueError as error:
        assert _is_message(error)
        return
    assert drawn.shape == (SIZE, SIZE)


@cases(100)
@given(runs=st.lists(st.integers(0, 40), min_size=1, max_size=8), cut=st.integers(1, 30))
def test_run_lengths_in_letters_add_up_as_pycocotools_decodes_them(runs, cut):
    runs = [*runs, max(0, SIZE * SIZE - sum(runs))]
    if sum(runs) != SIZE * SIZE:
        return
    counts = coco_mask.frPyObjects({"size": [SIZE, SIZE], "counts": runs}, SIZE, SIZE)["counts"]
    assert compressed_length(counts) == SIZE * SIZE
    if (part := compressed_length(counts[:cut])) is not None:
        assert part <= SIZE * SIZE


@cases(60)
@given(steps=steps, entry=st.fixed_dictionaries({}, optional={key: odd for key in KEYS[-8:]}))
def test_any_results_file_is_scored_or_refused(steps, entry):
    content = _content()
    results = [
        {"image_id": 1, "category_id": 3, "score": 0.5, "segmentation": a["segmentation"]}
        for a in _content()["annotations"]
    ]
    results = [{**results[0], **entry}, *_mutated(results, steps)]
    try:
        metrics = evaluate(content, results)
    except ValueError as error:
        assert _is_message(error)
    else:
        assert -1 <= metrics["AP"] <= 1


def _image_files() -> dict[str, bytes]:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 255, (17, 23, 3), np.uint8)
    files = {}
    for kind, options in {
        "PNG": {},
        "JPEG": {"exif": _turned()},
        "JPEG progressive": {"progressive": True},
        "GIF": {"save_all": True, "append_images": [Image.fromarray(pixels // 2)]},
        "TIFF": {"compression": "tiff_lzw"},
        "WEBP": {},
        "BMP": {},
        "PPM": {},
        "TGA": {"compression": "tga_rle"},
        "JPEG2000": {},
    }.items():
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, kind.split()[0], **options)
        files[kind] = buffer.getvalue()
    buffer = io.BytesIO()
    Image.fromarray(pixels[:, :, 0].astype(np.uint16) * 256).save(buffer, "PNG")
    return {**files, "PNG 16 bit": buffer.getvalue()}


def _turned() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


IMAGES = _image_files()
change = st.tuples(
    st.integers(0, 4000),
    st.one_of(
        st.binary(min_size=1, max_size=4),
        st.sampled_from([b"\xff\xff\xff\xff", b"\0\0\0\0", b"\x7f\xff\xff\xff", b"\xff\xda"]),
    ),
    st.booleans(),
)


@cases(200)
@given(kind=st.sampled_from(sorted(IMAGES)), changes=st.lists(change, min_size=1, max_size=4))
def test_any_image_file_is_decoded_or_refused(kind, changes):
    content = IMAGES[kind]
    for place, new, is_near in changes:
        place %= min(len(content), 64) if is_near else len(content)  # headers are at the beginning
        content = content[:place] + new + content[place + len(new) :]
    for read in (read_header, read_image):
        try:
            found = read(io.BytesIO(content), "any image")
        except ValueError as error:
            assert str(error).startswith("image any image") and _is_message(error)
        else:
            assert read is read_header or (found.dtype == np.uint8 and found.ndim == 3)


@cases(200)
@given(steps=steps)
def test_any_meta_of_a_checkpoint_is_used_or_refused(steps):
    meta = {"step": 3, "config": {"model": {"num_masks": 5, "sizes": (1, 2)}}, **META}
    meta = _mutated(json.loads(json.dumps(meta)), steps)
    try:
        found = check_meta(meta)
    except ValueError as error:
        assert _is_message(error) and str(error).startswith("its meta")
    else:
        assert isinstance(found.get("config", {}), dict)
        assert not any(acting_character(name) for name in found.get("class_names", []))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(make_state(1), META)
    return folder


@cases(25)
@given(
    which=st.integers(0, 40),
    place=st.integers(0, 5000),
    new=st.one_of(st.binary(max_size=8), st.sampled_from([b"", b"9" * 30, b"[" * 2000, b"null"])),
    is_cut=st.booleans(),
)
def test_any_checkpoint_is_read_or_refused(run, tmp_path_factory, which, place, new, is_cut):
    broken = tmp_path_factory.mktemp("copy") / "run"
    shutil.copytree(run, broken)
    step = broken / "checkpoints" / "1"
    files = sorted(path for path in step.rglob("*") if path.is_file())
    file = files[which % len(files)]
    content = file.read_bytes()
    place %= len(content) + 1
    file.write_bytes(content[:place] + new + (b"" if is_cut else content[place + len(new) :]))
    try:
        with Checkpoints(broken, read_only=True) as checkpoints:
            params, _, meta = checkpoints.restore_model()
    except (ValueError, FileNotFoundError) as error:
        assert "checkpoint" in str(error)
    else:
        assert isinstance(meta, dict) and isinstance(params, dict)
    finally:
        shutil.rmtree(broken.parent)


@cases(50)
@given(text=st.text(max_size=40), name=odd_text)
def test_any_text_can_be_shown(text, name):
    shown = printable(text + name)
    assert acting_character(shown.replace("\n", "").replace("\t", "")) is None
    assert printable("plain ä 東京 \u200f") == "plain ä 東京 \u200f"
