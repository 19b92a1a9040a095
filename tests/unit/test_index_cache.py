"""The index of a json: in memory, in files, from the cache, in other processes."""

import ast
import hashlib
import inspect
import json
import os
import pickle
import time

import numpy as np
import pytest

from sparseinst_jax.data import faults, images, segmentations
from sparseinst_jax.data._index import cache as index_cache
from sparseinst_jax.data._index import columns, json_stream, reader
from sparseinst_jax.data.coco import DatasetSelection, index_coco, load_coco
from sparseinst_jax.data.loader import train_batches
from sparseinst_jax.data.plan import TrainPlan
from sparseinst_jax.data.shapes import draw_shapes_dataset
from sparseinst_jax.runtime import class_names, messages


def _content():
    square = [[2.5, 1, 6, 1, 6, 5.25, 2, 5], [0, 0, 1, 0, 1, 1]]
    entries = [
        (11, 7, 90, square, {"area": 16, "bbox": [2, 1, 4, 4]}),
        (12, 3, 0, {"size": [8, 8], "counts": [20, 5, 39]}, {"iscrowd": 1}),
        (13, 7, 0, {"size": [10, 12], "counts": "h3"}, {"area": None}),
        (10, 3, 90, [[1, 1, 2, 2], *square], {"area": 3.5, "ignore": 1}),
        (14, 5, 0, [[1, 1, 2, 2]], {}),
    ]
    return {
        "info": {"year": 2017},
        "images": [
            {"id": 7, "file_name": "ä.png", "height": 10, "width": 12},
            {"id": 5, "file_name": "empty.png", "height": 4, "width": 4.0},
            {"id": 3, "file_name": "sub/b✓.png", "height": 8, "width": 8},
        ],
        "annotations": [
            {"id": i, "image_id": image, "category_id": c, "segmentation": mask, **more}
            for i, image, c, mask, more in entries
        ],
        "categories": [{"id": 90, "name": "pear"}, {"id": 0, "name": "apple"}],
    }


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "train.json"
    path.write_text(json.dumps(_content()))
    return path


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache that keeps small jsons, too."""
    monkeypatch.setattr(index_cache, "MIN_SIZE", 0)
    monkeypatch.setenv(index_cache.VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache"


def _known(dataset):
    return (
        list(dataset.records),
        dataset.class_names,
        dataset.num_without_mask,
        dataset.num_left_out,
        dataset.crowd_per_class.tolist(),
        dataset.num_targets.tolist(),
        dataset.image_sizes.tolist(),
        dataset.targets_per_class.tolist(),
        dataset.files,
    )


def test_records_hold_what_the_json_says(path):
    first, empty, last = load_coco(path, path.parent).records
    assert (first.image_id, first.file_name) == (7, "ä.png")
    assert first.path == str(path.with_name("ä.png"))
    assert (empty.annotations, empty.height, empty.width) == ([], 4, 4)
    assert last.file_name == "sub/b✓.png"
    assert [tuple(a) for a in first.annotations] == [
        (1, [[2.5, 1, 6, 1, 6, 5.25, 2, 5], [0, 0, 1, 0, 1, 1]], False, 16.0, 11, None),
        (0, {"size": [10, 12], "counts": "h3"}, False, 0.0, 13, None),
    ]
    assert [tuple(a) for a in last.annotations] == [
        (0, {"size": [8, 8], "counts": [20, 5, 39]}, True, 0.0, 12, None),
        (1, [[2.5, 1, 6, 1, 6, 5.25, 2, 5], [0, 0, 1, 0, 1, 1]], False, 3.5, 10, None),
    ]


def test_columns_count_what_the_records_hold(path):
    for options in ({}, {"classes": ("pear",)}, {"keep_empty": False}):
        dataset = load_coco(path, None, **options)
        records, number = list(dataset.records), len(dataset.class_names)
        objects = [a for record in records for a in record.annotations]
        for labels, counted in (
            ([a.label for a in objects if not a.iscrowd], dataset.targets_per_class),
            ([a.label for a in objects if a.iscrowd], dataset.crowd_per_class),
        ):
            assert counted.tolist() == [labels.count(label) for label in range(number)]
        assert dataset.num_targets.tolist() == [len(record.targets) for record in records]
        assert dataset.image_ids.tolist() == [record.image_id for record in records]
        assert dataset.image_sizes.tolist() == [[r.height, r.width] for r in records]
        assert dataset.files == [(record.file_name, record.path) for record in records]
    assert [record.image_id for record in dataset.records] == [7, 3]
    assert dataset.num_without_mask == 1
    assert [r.image_id for r in dataset.records[-1:]] == [dataset.records[-1].image_id] == [3]


@pytest.mark.parametrize("order", ["abci", "ciab", "icba", "bai"])
def test_the_keys_of_a_json_may_come_in_any_order(path, order):
    expected, faults = index_coco(path, None)
    content = _content()
    keys = {"a": "annotations", "b": "images", "c": "categories", "i": "info"}
    text = ", ".join(f'"{keys[k]}": {json.dumps(content[keys[k]])}' for k in order)
    if "c" not in order:
        text += f', "categories": {json.dumps(content["categories"])}'
    path.write_text("{" + text + "}")
    found, again = index_coco(path, None)
    assert _known(found) == _known(expected)
    assert list(again) == list(faults)


def test_of_a_key_that_comes_twice_the_last_counts(path, cache):
    content = _content()
    parts = [f'"{key}": {json.dumps(value)}' for key, value in content.items()]
    wrong = ['"images": [1, 2]', '"annotations": [{}, 5]', '"categories": [7]', '"annotations": 3']
    path.write_text("{" + ", ".join([*wrong, *parts]) + "}")
    dataset, faults = index_coco(path, None)
    assert [fault.is_fatal for fault in faults] == [False, False]
    assert [len(record.annotations) for record in dataset.records] == [2, 0, 2]


def test_faults_of_classes_that_are_left_out_are_none(path):
    content = _content()
    content["annotations"][0]["segmentation"] = {"size": [1, 1], "counts": [1]}
    path.write_text(json.dumps(content))
    _, faults = index_coco(path, None, DatasetSelection(classes=("apple",)))
    assert faults.fatal == []
    _, faults = index_coco(path, None)
    assert [fault.kind for fault in faults.fatal] == ["run lengths"]


def test_a_second_start_reads_no_json_and_gives_the_same(path, cache, monkeypatch, capsys):
    first = load_coco(path, path.parent, classes=("pear",))
    said = capsys.readouterr().err
    assert f"indexing {path} (" in said and "indexed 3 images, 4 annotations in" in said
    assert str(cache) in said
    monkeypatch.setattr(index_cache, "build_index", None)  # would fail
    assert _known(load_coco(path, path.parent, classes=("pear",))) == _known(first)
    # The classes are chosen, and the faults told, when the data set is made.
    dataset, faults = index_coco(path, None, DatasetSelection(class_map=("pear=apple",)))
    assert dataset.targets_per_class.tolist() == [3]
    assert [fault.kind for fault in faults] == ["polygon with fewer than 3 points"] * 2
    copy = path.with_name("copy.json")
    copy.write_bytes(path.read_bytes())
    assert len(load_coco(copy, None).records) == 3
    assert capsys.readouterr().err == ""


def test_a_json_that_changed_is_indexed_anew(path, cache):
    load_coco(path, None)
    before = path.stat()
    text = path.read_text()
    path.write_text(text.replace('"file_name": "empty.png"', '"file_name": "other.png"'))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size
    assert load_coco(path, None).records[1].file_name == "other.png"
    assert len(list(cache.iterdir())) == 2


def test_what_was_kept_under_other_rules_is_not_used(path, cache, monkeypatch):
    load_coco(path, None)
    monkeypatch.setattr(index_cache, "RULES", 0xABCD)
    load_coco(path, None)
    assert sorted(f.name.endswith("abcd") for f in cache.iterdir()) == [False, True]


@pytest.mark.parametrize("name", [*columns.DTYPES, "description"])
@pytest.mark.parametrize("damage", ["cut", "gone", "zeros", "one bit"])
def test_a_damaged_cache_is_built_anew(path, cache, capsys, name, damage):
    expected = _known(load_coco(path, None))
    capsys.readouterr()
    (folder,) = cache.iterdir()
    file = folder / (columns.DESCRIPTION if name == "description" else f"{name}.bin")
    content = file.read_bytes()
    flipped = bytes([content[0] ^ 1]) + content[1:]
    if damage == "gone":
        file.unlink()
    else:
        new = {"cut": content[:-1], "zeros": bytes(len(content)), "one bit": flipped}[damage]
        file.write_bytes(new)
    # A column may hold zeros only, such as `is_ignored` of most data sets.
    is_damaged = not file.exists() or file.read_bytes() != content
    assert _known(load_coco(path, None)) == expected
    told = [line for line in capsys.readouterr().err.splitlines() if "it is built again" in line]
    assert len(told) == is_damaged
    assert file.read_bytes() == content


def test_without_a_place_for_the_cache_one_message_says_so(path, cache, capsys):
    cache.write_text("a file, no folder")
    dataset = load_coco(path, None)
    assert len(dataset.records) == 3
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 3
    assert f"the index cannot be kept in {cache} (" in said[1]
    assert "kept in" not in said[2]
    folder = dataset.records.__getstate__()["_folder"]
    assert os.path.isdir(folder)
    del dataset
    assert not os.path.exists(folder)


def test_a_disk_that_is_full_is_got_over(path, cache, monkeypatch, capsys):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(reader, "save_index", full)
    assert [len(record.annotations) for record in load_coco(path, None).records] == [2, 0, 2]
    assert "No space left on device" in capsys.readouterr().err
    assert list(cache.iterdir()) == []


def test_the_cache_can_be_turned_off(path, cache, monkeypatch, capsys):
    monkeypatch.setenv(index_cache.VARIABLE, "off")
    load_coco(path, None)
    assert not cache.exists()
    assert len(capsys.readouterr().err.splitlines()) == 2


def test_small_jsons_are_not_kept(path, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv(index_cache.VARIABLE, str(tmp_path / "cache"))
    load_coco(path, None)
    assert not (tmp_path / "cache").exists()
    assert capsys.readouterr().err == ""


def test_two_processes_may_build_the_same_index(path, cache, monkeypatch):
    build = index_cache.build_index

    def build_twice(*arguments):
        monkeypatch.setattr(index_cache, "build_index", build)
        assert len(load_coco(path, None).records) == 3  # another one is faster
        return build(*arguments)

    monkeypatch.setattr(index_cache, "build_index", build_twice)
    assert len(load_coco(path, None).records) == 3
    assert len(list(cache.iterdir())) == 1


def test_what_was_not_used_for_long_makes_room(path, cache, monkeypatch):
    load_coco(path, None)
    (first,) = cache.iterdir()
    left_over = cache / ".sparseinst-new-abc_1"
    for folder in (cache / "my-photos-1", left_over):
        folder.mkdir()
    old = time.time() - 2 * index_cache.MIN_AGE
    for folder in (first, cache / "my-photos-1", left_over):
        os.utime(folder, (old, old))
    monkeypatch.setattr(index_cache, "MAX_SIZE", 1)
    path.write_text(path.read_text() + " ")
    load_coco(path, None)
    assert not first.exists() and not left_over.exists()
    assert (cache / "my-photos-1").exists()  # not ours
    path.write_text(path.read_text() + " ")
    load_coco(path, None)
    assert len(list(cache.iterdir())) == 3  # the younger ones stay


def test_worker_processes_open_the_files_and_give_the_same_batches(tmp_path, monkeypatch):
    root = draw_shapes_dataset(tmp_path / "shapes", 7, 1, seed=2)
    in_memory = load_coco(root / "train.json", root / "images/train", keep_empty=False)
    monkeypatch.setattr(index_cache, "MIN_SIZE", 0)
    monkeypatch.setenv(index_cache.VARIABLE, str(tmp_path / "cache"))
    kept = load_coco(root / "train.json", root / "images/train", keep_empty=False)
    sent = pickle.dumps(kept.records)
    assert len(sent) < 2000 < len(pickle.dumps(in_memory.records))
    assert list(pickle.loads(sent)) == list(in_memory.records)
    plan = TrainPlan(
        kept.image_sizes, kept.num_targets, seed=1, batch_size=2, train_sizes=(64,),
        train_max_size=96,
    )  # fmt: skip
    batches = [
        list(train_batches(dataset, plan, 0, 3, num_workers=workers))
        for dataset, workers in ((in_memory, 0), (kept, 0), (kept, 1))
    ]
    for first, *others in zip(*batches, strict=True):
        for other in others:
            for a, b in zip(first, other, strict=True):
                np.testing.assert_array_equal(a, b)


# What decides what becomes of a json: whole modules, or single definitions of one.
RULES = {
    reader: None,
    json_stream: None,
    columns: {"FORMAT", "DTYPES", "POLYGONS", "Growing", "save_index"},
    faults: {"Fault"},
    class_names: None,
    images: {"MAX_PIXELS", "MAX_NAME", "_SUSPECT", "_CURE", "name_fault"},
    segmentations: {
        *("MIN_POLYGON", "MAX_COORDINATE", "MAX_BORDER", "MAX_CORNERS", "MAX_LETTERS", "MAX_RUN"),
        *("MAX_TEXT", "usable_polygons", "_border", "_vast", "_left_out", "sum_runs"),
        *("compressed_length", "read_runs", "read_numbers", "other_form", "_lists_pixels"),
        *("MIN_LISTED_PIXELS", "SHARES", "are_shares"),
    },
    messages: {"_ACTS", "_ACTING", "_brief", "acting_character", "brief", "listed", "printable"},
}
KNOWN_RULES = 2, "231087c8a13d6d3b"


def _names(node):
    """The names that a statement of a module defines or changes."""
    targets = getattr(node, "targets", [getattr(node, "target", None)])
    inner = [part for target in targets if target for part in ast.walk(target)]
    return {getattr(part, "id", None) for part in inner} | {getattr(node, "name", None)}


def _written(node):
    """A syntax tree without docstrings and places, written the same by every Python."""
    if isinstance(node, list):
        is_text = isinstance(node[0], ast.Expr) and isinstance(node[0].value, ast.Constant)
        return [_written(part) for part in (node[1:] if is_text else node)]
    if not isinstance(node, ast.AST):
        return repr(node)
    fields = [(name, value) for name, value in ast.iter_fields(node) if value not in (None, [])]
    return [type(node).__name__, *((name, _written(value)) for name, value in fields)]


def test_other_rules_have_another_number():
    digest = hashlib.sha256()
    for module, wanted in RULES.items():
        body = ast.parse(inspect.getsource(module)).body
        body = [node for node in body if not isinstance(node, ast.Import | ast.ImportFrom)]
        found = body if wanted is None else [node for node in body if _names(node) & wanted]
        assert wanted is None or wanted <= set().union(*map(_names, found)), module
        digest.update(repr(_written(found)).encode())
    assert (index_cache.RULES, digest.hexdigest()[:16]) == KNOWN_RULES, (
        "code that decides what an index holds has changed. If another index can come of a json (a "
        "rule, a fault or its text), raise RULES in data/_index/cache.py, and if it is stored in "
        "another way, FORMAT in data/_index/columns.py. In any case KNOWN_RULES is the new pair."
    )


@pytest.mark.parametrize(
    ("before", "after", "is_same"),
    [
        (
            'def f(x):\n    """A."""\n    return x',
            'def f(x):\n    """B."""\n    return x  # C',
            True,
        ),
        ("def f(x): return x + 1", "def f(x): return x + 2", False),
        ("LIMIT = 1", "LIMIT = 2", False),
        ("f('a fault')", "f('another fault')", False),
    ],
)
def test_the_reminder_sees_code_and_texts_but_no_comments(before, after, is_same):
    first, second = (_written(ast.parse(text).body) for text in (before, after))
    assert (first == second) == is_same
