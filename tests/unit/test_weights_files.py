"""Weight files of every kind: what is taken from them, what is said, what is refused."""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import struct
import subprocess
import sys
import tracemalloc
import zipfile
from collections.abc import Callable

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sparseinst_jax.weights.convert import read_state_dict
from sparseinst_jax.weights.reading import read_weights_file
from sparseinst_jax.weights.reading.stored_arrays import WeightsFileError
from tests.foreign_files import (
    Call,
    Global,
    Raw,
    Storages,
    npy,
    pickle_of,
    safetensors,
    tensor,
    torch_legacy,
    torch_zip,
    zip_of,
)

A = np.arange(6, dtype=np.float32).reshape(2, 3)
B = np.array([1.5, -2], np.float32)


def _npz(**arrays) -> bytes:
    return zip_of({f"{name}.npy": npy(array) for name, array in arrays.items()})


def _checkpoint(**entries: dict) -> bytes:
    """A PyTorch zip of dicts of arrays; other values stay."""
    storages = Storages()
    content = {
        key: {
            name: storages.tensor(value) if isinstance(value, np.ndarray) else value
            for name, value in entry.items()
        }
        if isinstance(entry, dict)
        else entry
        for key, entry in entries.items()
    }
    return torch_zip(content, storages)


def _valid_files() -> dict[str, bytes]:
    """One small file of each kind."""
    compressed = io.BytesIO()
    np.savez_compressed(compressed, a=A, b=B)
    paddle = {"a": A, "b": ("linear_0.w", B), "StructuredToParameterName@@": {"a": "x"}}
    files = {
        "npz": _npz(a=A, b=B),
        "compressed npz": compressed.getvalue(),
        "safetensors": safetensors({"a": A, "b": B}),
        "detectron2 pickle": pickle.dumps({"model": {"a": A, "b": B}, "__author__": "x"}, 2),
        "long pickle": pickle.dumps({"model": {"a": np.tile(A, 100)}}, 2),
    }
    files |= {f"Paddle {n}": pickle.dumps(paddle, n) for n in range(6)}
    for kind, writer in (("PyTorch zip", torch_zip), ("PyTorch legacy", torch_legacy)):
        storages = Storages(is_legacy=writer is torch_legacy)
        content = {
            "model": {"a": storages.tensor(A), "b": storages.tensor(B)},
            "optimizer": {"state": {0: {"step": 1, "exp_avg": storages.tensor(A)}}},
            "meta": Call("mmengine.HistoryBuffer", (1.5, None), {"x": [True]}),
        }
        files[kind] = writer(content, storages)
    return files


@pytest.mark.parametrize("name", ["weights.pth", "weights", "weights.npz", "weights.safetensors"])
@pytest.mark.parametrize("kind", ["npz", "safetensors", "PyTorch zip", "PyTorch legacy"])
def test_the_content_says_what_a_file_is_and_not_its_name(kind, name, read):
    content = _valid_files()[kind]
    found = read(content, name)
    assert found.kind == kind
    np.testing.assert_array_equal(found.arrays["a"], A)
    np.testing.assert_array_equal(found.arrays["b"], B)
    assert found.sha256 == hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize("protocol", range(6))
def test_pickles_of_detectron2_and_paddle_are_told_apart(protocol, read):
    found = read(pickle.dumps({"model": {"a": A}, "__author__": "third party"}, protocol))
    assert found.kind == "detectron2 pickle"
    assert found.notes == [
        "took the weights under model",
        "not read, beside the weights: __author__",
    ]
    np.testing.assert_array_equal(found.arrays["a"], A)
    found = read(pickle.dumps({"a": A, "b": B}, protocol))
    assert (found.kind, found.notes) == ("Paddle", [])
    np.testing.assert_array_equal(found.arrays["b"], B)


def test_caffe2_weights_of_detectron_lie_under_blobs(read):
    assert read(pickle.dumps({"blobs": {"conv1_w": A}}, 2)).arrays.keys() == {"conv1_w"}


def test_paddles_own_table_is_left_out_and_its_pairs_are_arrays(read):
    pair = Raw(
        b"c__builtin__\ntuple\n" + pickle_of((("linear_0.w_0", Raw(_array_code(B))),))[2:-1] + b"R"
    )
    plain = pickle.dumps({"a": A, "b": ("name", B), "StructuredToParameterName@@": {"a": "x"}}, 4)
    for content in (plain, pickle_of({"a": Raw(_array_code(A)), "b": pair})):
        found = read(content)
        np.testing.assert_array_equal(found.arrays["a"], A)
        np.testing.assert_array_equal(found.arrays["b"], B)
        assert found.arrays.keys() == {"a", "b"}
    note = "left out StructuredToParameterName@@, Paddle's table of internal names"
    assert read(plain).notes == [note]


def _array_code(array: np.ndarray) -> bytes:
    """The operations of a pickle that make an array."""
    return pickle.dumps(array, 2)[2:-1]


def test_arrays_that_paddle_cut_are_put_together(read, refusal):
    whole = np.arange(10, dtype=np.float32).reshape(5, 2)
    content = {
        "w@@.0": whole.ravel()[:4],
        "w@@.1": whole.ravel()[4:],
        "a": A,
        "UnpackBigParamInfor@@": {"w": {"OriginShape": (5, 2), "slices": ["w@@.0", "w@@.1"]}},
    }
    found = read(pickle.dumps(content, 2)).arrays
    assert found.keys() == {"a", "w"}
    np.testing.assert_array_equal(found["w"], whole)
    del content["w@@.1"]
    assert "slices of w are not all there" in refusal(pickle.dumps(content, 2))
    content["w@@.1"] = B
    assert "have 6 numbers, expected shape (5, 2)" in refusal(pickle.dumps(content, 2))
    content["UnpackBigParamInfor@@"] = {"w": {"OriginShape": (-5, 2), "slices": []}}
    assert "table of slices, is damaged" in refusal(pickle.dumps(content, 2))


@pytest.mark.parametrize("wrapper", ["model", "state_dict", "model_state", "model_state_dict"])
def test_wrappers_are_taken_off_and_named(wrapper, read):
    found = read(_checkpoint(**{wrapper: {"a": A}, "epoch": 3}))
    assert found.arrays.keys() == {"a"}
    assert found.notes[0] == f"took the weights under {wrapper}"
    assert "not read, beside the weights: epoch" in found.notes


@pytest.mark.parametrize("ema", ["model_ema", "ema_state_dict", "ema_state", "state_dict_ema"])
def test_the_moving_average_is_taken_if_asked_for_or_alone(ema, read):
    both = _checkpoint(model={"a": A}, **{ema: {"a": A + 1}})
    found = read(both)
    np.testing.assert_array_equal(found.arrays["a"], A)
    assert any(f"left out the moving average under {ema}" in note for note in found.notes)
    found = read(both, prefer_ema=True)
    np.testing.assert_array_equal(found.arrays["a"], A + 1)
    assert f"took the weights under {ema}, a moving average" in found.notes
    alone = read(_checkpoint(**{ema: {"a": A + 1}}))
    np.testing.assert_array_equal(alone.arrays["a"], A + 1)
    nested = Storages()
    content = {ema: {"decay": 0.9, "module": {"a": nested.tensor(A)}}}
    np.testing.assert_array_equal(read(torch_zip(content, nested)).arrays["a"], A)


def test_a_prefix_of_all_names_is_stripped_and_of_some_is_not(read):
    found = read(_checkpoint(state_dict={"module.a": A, "module.module.b": B}))
    assert found.arrays.keys() == {"a", "module.b"}
    assert "stripped the prefix module. from all names" in found.notes
    assert read(_checkpoint(state_dict={"module.a": A, "b": B})).arrays.keys() == {"module.a", "b"}


def test_entries_that_are_no_arrays_are_listed(read):
    found = read(_checkpoint(model={"a": A, "version": 3, "names": ["x"], 7: A, "note": None}))
    assert found.arrays.keys() == {"a"}
    assert found.notes[1] == (
        "left out 4 entries that are no arrays: version (int), names (list), int (a single array), "
        "note (NoneType)"
    )


def test_objects_of_foreign_classes_among_the_weights_are_refused_by_name(refusal):
    message = refusal(_checkpoint(model={"a": A, "b": Call("my.Weight"), "c": Global("my.name")}))
    assert "b (an object of my.Weight); c (an object of my.name)" in message


def test_weights_that_are_not_numbers_are_warned_of_by_name(read):
    wrong = np.array([1, np.nan, np.inf], np.float32)
    found = read(_npz(good=A, bad=wrong, half=wrong.astype(np.float16), count=np.array(3)))
    assert found.notes == ["WARNING: 2 arrays hold NaN or infinity: bad, half"]
    np.testing.assert_array_equal(found.arrays["bad"], wrong)


def test_bfloat16_of_safetensors_is_widened_exactly(read):
    bits = np.array([0x3F80, 0xC000], np.uint16)
    entry = {"dtype": "BF16", "shape": [2], "data_offsets": [0, 4]}
    found = read(safetensors({}, a=entry, __metadata__={"format": "pt"}) + bits.tobytes())
    np.testing.assert_array_equal(found.arrays["a"], [1, -2])
    assert found.arrays["a"].dtype == np.float32


def test_what_the_library_of_safetensors_writes_is_read_back(tmp_path):
    from safetensors.numpy import save_file

    arrays = {"a": A, "i": np.arange(3), "h": A.astype(np.float16), "t": np.array([True])}
    save_file(arrays, tmp_path / "w.safetensors")
    found = read_weights_file(tmp_path / "w.safetensors").arrays
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(found[name], array)
        assert found[name].dtype == array.dtype


def test_npz_arrays_in_fortran_order_and_of_big_endian_come_out_alike(read):
    found = read(_npz(a=np.asfortranarray(A), b=B.astype(">f4"), n=np.float32(3))).arrays
    np.testing.assert_array_equal(found["a"], A)
    np.testing.assert_array_equal(found["b"], B)
    assert found["a"].flags.c_contiguous and found["b"].dtype.isnative
    assert found["n"].shape == ()


def test_the_short_form_gives_the_arrays(tmp_path):
    path = tmp_path / "w.npz"
    path.write_bytes(_npz(a=A))
    np.testing.assert_array_equal(read_state_dict(path)["a"], A)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "it is empty"),
        (b"<!DOCTYPE html><html>", "a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "git lfs pull"),
        (b"\x1f\x8b\x08\x00", "compressed by gzip"),
        (b"\x89HDF\r\n", "HDF5"),
        (npy(A), "a single .npy array"),
        (b"some text that is nothing", "expected one of"),
        (pickle.dumps([A]), "it holds list"),
        (pickle.dumps(A), "it holds a single array"),
        (pickle.dumps({}), "it has: nothing"),
        (pickle.dumps({"epoch": 3}), "it has: epoch"),
        (zip_of({}), "holds no arrays"),
        (zip_of({"readme.txt": b"x"}), "neither part of a PyTorch checkpoint nor a .npy"),
    ],
)
def test_files_of_other_kinds_are_refused_with_what_they_are(content, reason, refusal):
    assert reason in refusal(content)


def test_missing_files_and_folders_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no weights file .*absent\.pth"):
        read_weights_file(tmp_path / "absent.pth")
    with pytest.raises(WeightsFileError, match="is a folder"):
        read_weights_file(tmp_path)


def _npy_header(shape: tuple, dtype: str = "<f4") -> bytes:
    text = (
        repr({"descr": dtype, "fortran_order": False, "shape": shape}).encode().ljust(117) + b"\n"
    )
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text


BAD_NPZ = {
    "claims 100 GB": (_npy_header((25_000_000_000,)), "needs 100000000000 bytes"),
    "claims too much for 64 bits": (_npy_header((2**40, 2**40)), "bytes"),
    "a negative shape": (_npy_header((-1,)), "negative shape"),
    "holds less than its shape": (_npy_header((3,)) + B.tobytes(), "needs 12 bytes"),
    "holds more than its shape": (_npy_header((1,)) + B.tobytes(), "but its data are 8 bytes"),
    "objects": (npy(np.array([{"a": 1}], object)), "array of objects"),
    "records": (npy(np.zeros(2, [("x", "f4")])), "dtype"),
    "texts": (npy(np.array(["x"])), "dtype"),
    "no header": (b"nothing", "not a readable .npy array"),
    "a header without end": (b"\x93NUMPY\x01\x00\xff\xff{", "not a readable .npy array"),
    "a header that is a program": (
        b"\x93NUMPY\x01\x00" + struct.pack("<H", 30) + b"__import__('os').system('ls')\n",
        "not a readable .npy array",
    ),
    "a header that is nested": (
        b"\x93NUMPY\x01\x00" + struct.pack("<H", 9000) + b"[" * 9000,
        "not a readable .npy array",
    ),
}


@pytest.mark.parametrize("name", BAD_NPZ)
def test_npz_arrays_that_lie_about_themselves_are_refused(name, refusal):
    content, reason = BAD_NPZ[name]
    assert reason in refusal(zip_of({"good.npy": npy(A), "bad.npy": content}))


F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
BAD_SAFETENSORS = {
    "claims a header of 100 GB": (struct.pack("<Q", 10**9) + b"{}", "header claims 1000000000"),
    "is cut off": (safetensors({"a": A})[:-1], "claims the bytes 0 to 24 of 23"),
    "lies outside": (safetensors({}, a={**F32, "data_offsets": [0, 10**11]}), "100000000000 of 0"),
    "lies before itself": (safetensors({"a": A}, b={**F32, "data_offsets": [8, 0]}), "8 to 0"),
    "has another size": (safetensors({"a": A}, b={**F32, "shape": [3]}), "needs 12 bytes"),
    "has a size below zero": (safetensors({"a": A}, b={**F32, "shape": [-2]}), "negative shape"),
    "has a shape of fractions": (safetensors({"a": A}, b={**F32, "shape": [2.0]}), "claims"),
    "is of an unknown dtype": (safetensors({"a": A}, b={**F32, "dtype": "F8_E4M3"}), "F8_E4M3"),
    "lacks its place": (safetensors({"a": A}, b={"dtype": "F32"}), "lacks dtype, shape"),
    "is no dict": (safetensors({"a": A}, b=[1]), "lacks dtype, shape"),
    "is no json": (struct.pack("<Q", 4) + b"{abc", "not a json"),
    "is nested": (struct.pack("<Q", 10**6) + b'{"a":' * 200_000, "not a json"),
    "is there twice": (
        struct.pack("<Q", 131)
        + (b'{"a": %s, ' % (text := json.dumps(F32).encode()) + b'"a": %s}' % text).ljust(131)
        + bytes(8),
        "the name a is there twice",
    ),
}


@pytest.mark.parametrize("name", BAD_SAFETENSORS)
def test_safetensors_that_lie_about_themselves_are_refused(name, refusal):
    content, reason = BAD_SAFETENSORS[name]
    assert reason in refusal(content)


def test_all_bad_arrays_are_named_in_one_message(refusal):
    bad = {f"bad{n}.npy": _npy_header((n + 9,)) for n in range(12)}
    message = refusal(zip_of({"good.npy": npy(A), **bad}))
    assert all(f"bad{n} has" in message for n in range(10)) and "and 2 more" in message
    assert "good" not in message


@pytest.mark.parametrize("kind", ["npz", "safetensors", "detectron2 pickle", "long pickle"])
def test_files_that_are_cut_off_anywhere_are_refused(kind, refusal):
    content = _valid_files()[kind]
    for size in range(0, len(content), 23):
        assert refusal(content[:size])


def test_names_for_messages_are_short_and_printable(refusal):
    odd = {"a\x1b[31m\n" + "x" * 500: _npy_header((9,))}
    message = refusal(zip_of({f"{name}.npy": data for name, data in odd.items()}))
    assert message.isprintable() and len(message) < 500


def test_arrays_of_ml_dtypes_bfloat16_in_pickles_are_widened(read):
    array = np.array([1, -2], ml_dtypes.bfloat16)
    np.testing.assert_array_equal(read(pickle.dumps({"a": array})).arrays["a"], [1, -2])


def _bomb(name: str, num_bytes: int) -> bytes:
    """A zip of zeros."""
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        archive.writestr(name, b"\0" * num_bytes)
    return target.getvalue()


def _under_many_names() -> bytes:
    """A megabyte that 2000 tensors claim."""
    storages = Storages()
    storage = storages.add(np.zeros(1 << 18, np.float32))
    names = {f"w{n}": tensor(storage, (1 << 18,)) for n in range(2000)}
    return torch_zip({"model": names}, storages)


def _json_bomb() -> bytes:
    header = b'{"a":[' + b"{}," * 650_000 + b"{}]}"
    return struct.pack("<Q", len(header)) + header


def _greedy_files() -> dict[str, Callable[[], bytes]]:
    """Files that ask for much more time or memory than they have bytes."""
    texts = (b"X\xe8\x03\x00\x00" + b"%08d" % n + b"x" * 992 for n in range(20_000))
    return {
        "zip bomb": lambda: _bomb("a.npy", 66 << 20),
        "zip bomb below the limit": lambda: _bomb("a/data.pkl", 60 << 20),
        "one storage under many names": _under_many_names,
        "memo": lambda: (
            b"\x80\x02" + b"".join(b"}r" + struct.pack("<I", n) for n in range(400_000)) + b"."
        ),
        "marks": lambda: b"\x80\x02" + b"(" * (4 << 20),
        "lists": lambda: b"\x80\x02" + b"]\x94" * (2 << 20),
        "tuples": lambda: b"\x80\x02)" + b"\x85" * (4 << 20) + b".",
        "texts": lambda: b"\x80\x02" + b"".join(texts) + b".",
        "names": lambda: b"\x80\x02" + b"".join(b"cm\nn%d\n" % n for n in range(400_000)) + b".",
        "pickle of 100 GB": lambda: b"\x80\x04\x8e" + struct.pack("<Q", 10**11),
        "npz of 100 GB": lambda: zip_of({"a.npy": _npy_header((25 * 10**9,))}),
        "json": _json_bomb,
        "entries": lambda: zip_of({f"archive/data/{n:0100}": b"" for n in range(14_000)}),
    }


MEASURE = """
import pathlib, sys, time
from sparseinst_jax.weights.reading import read_weights_file
def peak():  # in MB, of this program alone; the getrusage of a child begins at its parent's
    status = pathlib.Path("/proc/self/status")
    return int(status.read_text().split("VmHWM:")[1].split()[0]) // 1024 if status.exists() else 0
before = peak()
for path in sys.argv[1:]:
    start = time.process_time()
    try:
        read_weights_file(path)
        print("was read:", path)
    except ValueError:
        print(peak() - before, time.process_time() - start)
"""


def test_greedy_files_are_refused_within_a_second_and_200_megabytes(tmp_path):
    paths = [tmp_path / name for name in _greedy_files()]
    for path in paths:
        path.write_bytes(_greedy_files()[path.name]())
    command = [sys.executable, "-c", MEASURE, *map(str, paths)]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "was read" not in run.stdout
    rows = [line.split() for line in run.stdout.splitlines()]
    figures = {path.name: row for path, row in zip(paths, rows, strict=True)}
    assert {name: peak for name, (peak, _) in figures.items() if int(peak) > 200} == {}
    assert {name: seconds for name, (_, seconds) in figures.items() if float(seconds) > 1} == {}


def test_a_large_file_takes_little_more_memory_than_its_bytes(tmp_path):
    storages = Storages()
    arrays = {f"w{n}": np.full((1 << 19,), n, np.float32) for n in range(10)}
    path = tmp_path / "weights.pth"
    path.write_bytes(
        torch_zip({name: storages.tensor(array) for name, array in arrays.items()}, storages)
    )
    tracemalloc.start()
    try:
        found = read_weights_file(path).arrays
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert all(np.array_equal(found[name], array) for name, array in arrays.items())
    assert peak < 1.1 * path.stat().st_size


VALID = _valid_files()
# FUZZ_EXAMPLES=100000 pytest tests/unit/test_weights_files.py -k mutated    throws new ones
EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "150"))
FILL = [
    b"\xff" * 8,
    b"\0" * 8,
    b"\xff\xff\xff\x7f",
    (10**11).to_bytes(8, "little"),
    b"}",
    b"R",
    b"(",
]
place = st.integers(0, 1 << 16)
mutation = st.one_of(
    st.tuples(st.just("flip"), place, st.integers(0, 7)),
    st.tuples(st.just("cut"), place, st.just(0)),
    st.tuples(st.just("delete"), place, st.integers(1, 16)),
    st.tuples(st.just("fill"), place, st.sampled_from(FILL)),
    st.tuples(st.just("splice"), place, st.tuples(st.sampled_from(sorted(VALID)), place, place)),
)


def _mutate(content: bytes, steps) -> bytes:
    for kind, at, detail in steps:
        at %= len(content) + 1
        head, tail = content[:at], content[at:]
        if kind == "flip":
            content = head + bytes(byte ^ (1 << detail) for byte in tail[:1]) + tail[1:]
        elif kind == "cut":
            content = head
        elif kind == "delete":
            content = head + tail[detail:]
        elif kind == "fill":
            content = head + detail + tail[len(detail) :]
        else:
            other = VALID[detail[0]]
            start = detail[1] % len(other)
            content = head + other[start : start + detail[2] % 200] + tail
    return content


@pytest.fixture(scope="module")
def mutated_path(tmp_path_factory):
    return tmp_path_factory.mktemp("mutated") / "weights.bin"


@settings(
    max_examples=EXAMPLES,
    derandomize="FUZZ_EXAMPLES" not in os.environ,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
@given(kind=st.sampled_from(sorted(VALID)), steps=st.lists(mutation, min_size=1, max_size=6))
def test_mutated_files_are_read_or_refused_by_one_type_of_error(mutated_path, kind, steps):
    mutated_path.write_bytes(_mutate(VALID[kind], steps))
    try:
        found = read_weights_file(mutated_path)
    except WeightsFileError as error:
        assert str(error).isprintable() and len(str(error)) < 3000
    else:
        assert all(isinstance(array, np.ndarray) for array in found.arrays.values())
