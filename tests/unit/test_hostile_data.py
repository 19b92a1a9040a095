"""Data sets made to do harm: refused with one message, in little time and memory."""

from __future__ import annotations

import json
import os
import socket
import struct
import time
import tracemalloc
import zlib

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from sparseinst_jax.cli.predict import list_images
from sparseinst_jax.data import coco, images, segmentations
from sparseinst_jax.data._index import cache as index_cache
from sparseinst_jax.data._index import json_stream
from sparseinst_jax.data.check_dataset import find_overlap
from sparseinst_jax.drawing.fonts import drawable, own_font, shorten
from sparseinst_jax.evaluation.coco_metrics import evaluate
from sparseinst_jax.evaluation.report import write_confusion_table
from sparseinst_jax.runtime.files import read_json
from sparseinst_jax.runtime.messages import MAX_MESSAGE, brief, printable

SIDE = 16
SQUARE = [2.0, 2.0, 9.0, 2.0, 9.0, 9.0, 2.0, 9.0]


def content(**changes):
    """A COCO content; `image__id=3` sets a key of the first image."""
    found = {
        "images": [{"id": 1, "file_name": "a.png", "height": SIDE, "width": SIDE}],
        "annotations": [
            {"id": 1, "image_id": 1, "category_id": 3, "iscrowd": 0, "segmentation": [SQUARE]}
        ],
        "categories": [{"id": 3, "name": "cat"}],
    }
    lists = {"image": "images", "annotation": "annotations", "category": "categories"}
    for name, value in changes.items():
        part, _, key = name.partition("__")
        found[lists[part]][0][key] = value
    return found


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    Image.fromarray(np.full((SIDE, SIDE, 3), 7, np.uint8)).save(folder / "a.png")
    return folder


def load(folder, made, **options):
    text = made if isinstance(made, str) else json.dumps(made)
    path = folder.parent / "any.json"
    path.write_text(text, encoding="utf-8", errors="surrogatepass")
    return coco.load_coco(path, folder, **options)


def refusal(folder, made, **options):
    start = time.monotonic()
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        load(folder, made, **options)
    assert time.monotonic() - start < 10
    message = str(caught.value)
    assert len(message) < MAX_MESSAGE
    return message


# ---- file names


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("/etc/passwd", "is an absolute path"),
        ("C:\\photos\\a.png", "is an absolute path"),
        ("\\\\server\\share\\a.png", "is an absolute path"),
        ("C:a.png", "names a drive"),
        ("../a.png", "leads upwards"),
        ("sub/../../a.png", "leads upwards"),
        ("sub\\..\\..\\a.png", "leads upwards"),
        ("https://example.org/a.png", "nothing is downloaded"),
        ("file:///etc/passwd", "nothing is downloaded"),
        ("", "is empty"),
        ("a\0.png", "control character '\\x00'"),
        ("a\x1b]0;title\x07.png", "control character '\\x1b'"),
        ("a\u202egnp.exe", "control character '\\u202e'"),
        ("half \ud83d.png", "control character '\\ud83d'"),
        ("x" * 10_000_000, "has 10000000 characters"),
    ],
)
def test_a_file_name_that_does_not_lie_in_the_folder_is_refused(folder, name, reason):
    message = refusal(folder, content(image__file_name=name))
    assert reason in message and "image 1: file_name" in message
    assert printable(message) == message


@pytest.mark.parametrize(
    "name", ["..a.png", "a..b.png", "日本/猫 (1).png", "sub/./a.png", "~/a.png"]
)
def test_odd_names_that_stay_in_the_folder_are_taken(folder, name):
    assert load(folder, content(image__file_name=name)).records[0].file_name == name


@pytest.mark.parametrize("way", ["file", "folder"])
def test_a_symbolic_link_out_of_the_folder_is_refused_when_checked_and_when_read(folder, way):
    outside = folder.parent / "outside"
    outside.mkdir()
    (folder / "a.png").rename(outside / "a.png")
    if way == "file":
        (folder / "a.png").symlink_to(outside / "a.png")
        made = content()
    else:
        (folder / "sub").symlink_to(outside)
        made = content(image__file_name="sub/a.png")
    assert "by a symbolic link" in refusal(folder, made, check_files=True)
    record = load(folder, made).records[0]
    with pytest.raises(ValueError, match="out of the image folder"):
        coco.read_record(record)


def test_links_inside_the_folder_and_to_the_folder_are_followed(folder):
    (folder / "b.png").symlink_to("a.png")
    link = folder.parent / "link"
    link.symlink_to(folder)
    dataset = load(link, content(image__file_name="b.png"), check_files=True)
    assert coco.read_record(dataset.records[0]).max() == 7


def test_pipes_devices_sockets_and_folders_are_refused_at_once(folder, monkeypatch):
    os.mkfifo(folder / "pipe.png")
    (folder / "folder.png").mkdir()
    monkeypatch.chdir(folder)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket.png")
    start = time.monotonic()
    for name, kind in (("pipe", "a pipe"), ("folder", "a folder"), ("socket", "a socket")):
        made = content(image__file_name=f"{name}.png")
        message = refusal(folder, made, check_files=True)
        assert f"is {kind}; expected a file" in message
        with pytest.raises(ValueError, match=f"is {kind}"):
            coco.read_record(load(folder, made).records[0])
    for path in ("/dev/zero", "/dev/stdin", "/dev/full"):
        with pytest.raises(ValueError, match=r"cannot|is a"):
            images.read_image(path)
    assert time.monotonic() - start < 5
    assert list_images([folder], folder.parent / "out")[0] == [folder / "a.png"]


def test_a_link_to_a_device_is_not_hashed_when_two_data_sets_are_compared(folder):
    for name in ("x.png", "y.png"):
        (folder / name).symlink_to("/dev/zero")
    first = load(folder, content(image__file_name="x.png"))
    second = load(folder, content(image__file_name="y.png"))
    assert find_overlap(first, second, every_file=True) == []


# ---- images


def _png(width, height, *chunks):
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(b"\0" * 64)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in parts
    )


def _refused_image(tmp_path, raw, name="bomb.png"):
    (tmp_path / name).write_bytes(raw)
    tracemalloc.start()
    start = time.monotonic()
    try:
        with pytest.raises(ValueError, match=f"image .*{name}") as caught:
            images.read_image(tmp_path / name)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert time.monotonic() - start < 5 and peak < 2e8
    return str(caught.value)


def test_an_image_that_claims_ten_billion_pixels_is_refused_by_its_header(tmp_path, monkeypatch):
    raw = _png(100_000, 100_000)
    assert "decompression bomb" in _refused_image(tmp_path, raw)
    # Also where a program has lifted Pillow's own limit.
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert f"expected {images.MAX_PIXELS}" in _refused_image(tmp_path, raw)


def test_text_chunks_that_inflate_without_end_are_not_inflated(tmp_path):
    bomb = zlib.compress(b"\0" * (1 << 24))
    texts = [(b"zTXt", b"k%d\0\0" % i + bomb) for i in range(40)]
    assert "cannot be read" in _refused_image(tmp_path, _png(9, 9, *texts))  # pixels are missing
    (tmp_path / "bomb.png").write_bytes(_png(4, 4, *texts))
    assert images.read_image(tmp_path / "bomb.png").shape == (4, 4, 3)
    info = PngInfo()
    info.add_text("k", "harmless")
    Image.new("RGB", (3, 3)).save(tmp_path / "text.png", pnginfo=info)
    assert images.read_image(tmp_path / "text.png").shape == (3, 3, 3)


def test_a_header_that_claims_more_than_the_file_holds_is_refused(tmp_path):
    assert "cannot be read" in _refused_image(tmp_path, _png(4000, 4000))


def test_an_image_of_another_size_than_the_json_says_is_refused(folder):
    record = load(folder, content(image__height=8)).records[0]
    with pytest.raises(ValueError, match=r"is \(16, 16\).*the json says \(8, 16\)"):
        coco.read_record(record)


def test_a_jpeg_of_very_many_scans_is_refused(tmp_path):
    path = tmp_path / "scans.jpg"
    Image.fromarray(np.arange(192, dtype=np.uint8).reshape(8, 8, 3)).save(path, progressive=True)
    assert images.read_image(path).shape == (8, 8, 3)
    raw = path.read_bytes()
    last = raw.rindex(b"\xff\xda")
    scan = raw[last:-2]
    raw = raw[:-2] + scan * 200 + raw[-2:]
    assert "JPEG of 2" in _refused_image(tmp_path, raw, "scans.jpg")


def test_kinds_that_are_handed_to_other_programs_are_refused(tmp_path):
    raw = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(x) run\n%%EOF\n"
    assert "of a kind that is not read" in _refused_image(tmp_path, raw, "run.png")
    assert not {"EPS", "WMF", "HDF5", "GRIB", "BUFR"} & set(images.FORMATS)
    assert {".jpg", ".png", ".webp"} <= images.image_suffixes()
    assert not {".eps", ".pdf"} & images.image_suffixes()


# ---- the json


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"images": ' + "[" * 100_000, "nested too deeply"),
        ('{"info": ' + '{"a": ' * 100_000, "nested too deeply"),
        ('{"images": [' + "9" * 10_000 + "]}", "Exceeds the limit"),
        ('{"images": [{"id": "\udc80"}]}', "not a COCO annotation file"),
        ('{"images": [{"file_name": "a\0b"}]}', "Invalid control character"),
    ],
)
def test_a_json_that_would_break_a_parser_is_refused(folder, text, reason):
    message = refusal(folder, text)
    assert reason in message and "any.json" in message


def test_bytes_that_are_no_letters_are_refused(folder):
    path = folder.parent / "bytes.json"
    path.write_bytes(b'{"images": [{"file_name": "\xff\xfe"}]}')
    with pytest.raises(ValueError, match=r"bytes\.json is not a json: the text is not in utf-8"):
        coco.load_coco(path, folder)


def test_a_value_without_end_is_refused_before_it_is_held_whole(folder, monkeypatch):
    monkeypatch.setattr(json_stream, "MAX_VALUE", 1000)
    monkeypatch.setattr(json_stream, "WINDOW", 100)
    message = refusal(folder, '{"info": "' + "x" * 100_000 + '"}')
    assert "a value is longer than 1000 characters" in message


@pytest.mark.parametrize("text", ["[" * 100_000, "9" * 10_000])
def test_results_that_would_break_a_parser_are_refused(tmp_path, text):
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(ValueError, match=r"results\.json is not a json: .*check the path"):
        read_json(tmp_path / "results.json", "json file", "check the path")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"image__id": True}, "id must be an integer, got True"),
        ({"image__id": 1.0}, "id must be an integer, got 1.0"),
        ({"image__id": 2**63}, "id must be at most 9223372036854775807"),
        ({"annotation__category_id": -(2**70)}, "must be at most"),
        ({"image__height": True}, "height True"),
        ({"image__height": 10**4000}, "must be > 0 and at most"),
        ({"image__height": float("inf")}, "must be > 0"),
        ({"image__height": 10**6, "image__width": 10**6}, "such images are not read"),
        ({"annotation__iscrowd": "yes"}, "iscrowd must be 0 or 1, got 'yes'"),
        ({"annotation__area": 10**4000}, "area must be a number"),
        ({"category__name": True}, "the name must be a text, got True"),
        ({"category__name": {"a": [[[[[]]]]]}}, "the name must be a text"),
        ({"category__name": " "}, "the name is empty"),
        ({"category__name": "c\x1b[2Jat"}, "holds the control character '\\x1b'"),
        ({"category__name": "tac\u202e"}, "holds the control character '\\u202e'"),
        ({"category__name": "a" * 10_000_000}, "the name has 10000000 characters"),
        ({"annotation__segmentation": [[float("nan"), *SQUARE[1:]]]}, "NaN or infinite"),
        ({"annotation__segmentation": [[10**400, *SQUARE[1:]]]}, "must be numbers"),
        ({"annotation__segmentation": [[1e300, *SQUARE[1:]]]}, "has the coordinate 1e+300 px"),
        ({"annotation__segmentation": [[0, 0, 9e5, 9e5] * 100]}, "a border of 1.8e+08 px"),
        ({"annotation__segmentation": [["1"] * 8]}, "coordinates must be numbers"),
        ({"annotation__segmentation": 5}, "not polygons"),
    ],
)
def test_a_value_that_cannot_be_is_named_with_what_was_expected(folder, changes, reason):
    assert reason in refusal(folder, content(**changes))


def test_a_literal_of_infinity_and_a_number_beyond_all_floats_are_refused(folder):
    for literal in ("NaN", "-Infinity", "1e400"):
        text = json.dumps(content()).replace("[[2.0", f"[[{literal}")
        assert "NaN or infinite" in refusal(folder, text)


def test_a_polygon_of_more_than_a_million_corners_is_refused(folder, monkeypatch):
    monkeypatch.setenv(index_cache.VARIABLE, "off")
    text = json.dumps(content())
    corners = ",".join(["1,2,3,4,5,6,7,8,9,1"] * 201_000)
    message = refusal(folder, text.replace("[[2.0", f"[[{corners},2.0"))
    assert "have 1005004 corners" in message and "draw it with fewer" in message


@pytest.mark.parametrize("number", [2**53 + 1, 2**63 - 1, -(2**63) + 1])
def test_ids_beyond_the_whole_numbers_of_floats_stay_exact(folder, number):
    made = content(image__id=number, annotation__image_id=number, annotation__id=number)
    record = load(folder, made).records[0]
    assert record.image_id == number and record.annotations[0].id == number
    made["annotations"][0]["area"] = 49
    found = [{"image_id": number, "category_id": 3, "score": 1.0, "segmentation": [SQUARE]}]
    assert evaluate(made, found)["AP"] == pytest.approx(1, abs=1e-9)


def test_of_a_key_that_is_there_twice_the_last_counts_here_and_in_scoring(folder):
    text = json.dumps(content())
    twice = text[:-1] + ', "categories": [{"id": 3, "name": "dog"}]}'
    dataset = load(folder, twice)
    assert dataset.class_names == ("dog",)
    found = [{"image_id": 1, "category_id": 3, "score": 1.0, "segmentation": [SQUARE]}]
    assert list(evaluate(dataset.annotations_path, found).per_class) == ["dog"]


def test_ids_that_are_there_twice_are_refused(folder):
    made = content()
    made["images"] *= 2
    made["annotations"] *= 2
    made["categories"] *= 2
    message = refusal(folder, made)
    assert message.count("occurs more than once") == 3


def test_the_keys_of_a_json_of_another_kind_cannot_steer_the_terminal(folder):
    message = refusal(folder, {"images": None, "\x1b[2J": 1, "k" * 10**6: 2})
    assert "it has the keys \\x1b[2J, images, kkk" in message and len(message) < 1000


# ---- masks

BROKEN_RUNS = [
    ([SIDE * SIDE + 1], "sum to 257, not to"),
    ([2**70], "not to"),
    ([-1, 257], "integers of 0 or more"),
    ([True, 255], "integers of 0 or more"),
    ([1.5, 254.5], "integers of 0 or more"),
    ("o", "cannot be decoded"),  # says that more follows: pycocotools would read on
    ("ooooooooooooooooo1", "cannot be decoded"),
    ("\x00", "cannot be decoded"),
    ("", "cannot be decoded"),
    (None, "without counts"),
    ({}, "without counts"),
]


@pytest.mark.parametrize(("counts", "reason"), BROKEN_RUNS)
def test_broken_run_lengths_never_reach_pycocotools(folder, monkeypatch, counts, reason):
    runs = {"size": [SIDE, SIDE], "counts": counts}
    assert reason in refusal(folder, content(annotation__segmentation=runs))
    found = [{"image_id": 1, "category_id": 3, "score": 1.0, "segmentation": runs}]
    with pytest.raises(ValueError, match="1 of 1 detections"):
        evaluate(content(annotation__area=49), found)
    for name in ("frPyObjects", "merge", "decode"):
        monkeypatch.setattr(segmentations.rle, name, None)  # would fail in another way
    with pytest.raises(ValueError, match=reason):
        coco.encode_segmentation(runs, SIDE, SIDE)


@pytest.mark.parametrize(
    "size", [[10**9, 10**9], [SIDE], [-SIDE, -SIDE], "16", 5, None, [[SIDE], [SIDE]]]
)
def test_run_lengths_of_another_size_are_refused(folder, size):
    runs = {"size": size, "counts": [SIDE * SIDE]}
    assert "run lengths of size" in refusal(folder, content(annotation__segmentation=runs))
    with pytest.raises(ValueError, match="they must be equal"):
        coco.encode_segmentation(runs, SIDE, SIDE)


def test_sums_that_run_over_64_bits_are_refused():
    # Differences to the run two before, each of 44 bits, add up to more than 64 bits can hold.
    counts = "o" * 8 + "?"
    assert segmentations.compressed_length(counts) is None
    assert segmentations.compressed_length(counts * 2**21) is None
    message = segmentations.sum_runs("0" * (segmentations.MAX_TEXT + 1))[1]
    assert message is not None and "characters or numbers, expected" in message


@pytest.mark.parametrize(
    ("polygons", "reason"),
    [
        ([{"size": [10**6, 10**6], "counts": [10**12]}], "must be lists of numbers"),
        ([[1e9, 0, 0, 1, 1, 1]], r"has the coordinate 1e\+09 px"),
        ([[float("nan")] * 6], "has the coordinate nan px"),
        ([[0, 0, 9e7, 9e7, 0, 9e7]], "a border of 2.7e"),
        ([], "without a polygon"),
        ([[]], "must be lists of 6 numbers"),
        ([[0, 0, 0, 0]], "must be lists of 6 numbers"),  # a box to pycocotools, which fails on it
        ([[[1, 2], [3, 4]]], "must be lists of 6 numbers"),
        ([[10**400] * 6], "must be lists of 6 numbers"),
    ],
)
def test_polygons_that_would_take_all_memory_never_reach_pycocotools(polygons, reason):
    with pytest.raises(ValueError, match=reason):
        coco.encode_segmentation(polygons, SIDE, SIDE)


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        ({"score": float("nan")}, "has the score nan, not a number"),
        ({"score": float("inf")}, "has the score inf, not a number"),
        ({"score": 10**4000}, "not a number"),
        ({"score": True}, "has the score True, not a number"),
        ({"image_id": True}, "has the image_id True, not an integer"),
        ({"image_id": 2**80}, "not in the json"),
        ({"category_id": [[[[[[[1]]]]]]]}, "has the category_id"),
        ({"segmentation": {"size": 3}}, "has a mask of (height, width) 3"),
        ({"segmentation": [[1, 2], 3]}, "cannot be read"),
    ],
)
def test_a_detection_that_cannot_be_is_refused_by_its_number(entry, reason):
    found = {"image_id": 1, "category_id": 3, "score": 0.5, "segmentation": [SQUARE]} | entry
    with pytest.raises(ValueError, match="1 of 1 detections") as caught:
        evaluate(content(annotation__area=49), [found])
    assert f"detection 0 {reason}" in str(caught.value) or reason in str(caught.value)


# ---- names that are shown


def test_a_message_cannot_steer_the_terminal_nor_fill_it():
    assert printable("a\x1b[31m\u202eb\r\n\tc") == "a\\x1b[31m\\u202eb\\r\n\tc"
    assert len(printable("x" * 10_000_000)) < MAX_MESSAGE + 100
    deep: list = []
    for _ in range(100_000):
        deep = [deep]
    assert len(brief(deep)) < 100 and len(brief("x" * 10**7)) < 100


def test_names_fit_a_picture_in_bounded_time():
    start = time.monotonic()
    font = own_font(12)
    assert font.getlength(shorten(drawable("W\n" * 10**6, font), font, 300)) <= 300
    assert time.monotonic() - start < 2


def test_a_table_holds_no_formula(tmp_path):
    names = ["=1+1", "@SUM(A1)", "-cat", "cat"]
    write_confusion_table(np.zeros((5, 5), np.int64), names, tmp_path / "t.csv")
    rows = (tmp_path / "t.csv").read_text().splitlines()
    assert [row.split(",")[0] for row in rows[1:]] == [
        "'=1+1",
        "'@SUM(A1)",
        "'-cat",
        *names[3:],
        "background",
    ]
