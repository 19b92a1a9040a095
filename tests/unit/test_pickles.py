"""The interpreter of pickles: what it makes of them, and that nothing in them runs."""

from __future__ import annotations

import io
import os
import pickle
import pickletools
import struct
import sys

import numpy as np
import pytest

from sparseinst_jax.weights.reading.pickled_values import Foreign, Name, PickledArray
from sparseinst_jax.weights.reading.pickles import MAX_OPERATIONS, Unpickler
from sparseinst_jax.weights.reading.stored_arrays import WeightsFileError
from tests.foreign_files import Call, Global, Persistent, Raw, pickle_of


def _load(content: bytes, **options):
    return Unpickler(io.BytesIO(content), len(content), **options).load()


def _refusal(content: bytes) -> str:
    with pytest.raises(WeightsFileError) as caught:
        _load(content)
    return str(caught.value)


@pytest.mark.parametrize("protocol", range(6))
def test_plain_values_come_out_as_python_itself_reads_them(protocol):
    shared = [1, 2]
    value = {
        "text": "naïve ☃ 'quoted' \\ \n line",
        "numbers": [0, -1, 255, 256, 65535, 65536, -(2**31), 2**31, 2**100, -(2**100)],
        "floats": (1.5, -0.0, 1e300, float("inf")),
        "flags": (True, False, None, ()),
        "nested": [{"deep": [[], {}, ({"x": 1},)]}],
        "long tuple": (1, 2, 3, 4, 5),
        "shared": [shared, shared],
        7: "an integer key",
        "many": list(range(2500)),
    }
    found = _load(pickle.dumps(value, protocol))
    assert found == value
    assert found["shared"][0] is found["shared"][1]
    assert isinstance(found["flags"][0], bool)
    assert _load(pickletools.optimize(pickle.dumps(value, protocol))) == value


@pytest.mark.parametrize("protocol", range(6))
def test_bytes_come_out_of_every_protocol(protocol):
    assert _load(pickle.dumps([b"", b"\x00\xff" * 5], protocol)) == [b"", b"\x00\xff" * 5]


def test_pickles_of_python_2_are_read_their_strings_as_latin_1():
    # {'name': 'caf\xe9', u'key': 3L} of Python 2, protocol 2, and an ordered dict given by pairs
    content = (
        b"\x80\x02}q\x00(U\x04nameq\x01U\x04caf\xe9q\x02X\x03\x00\x00\x00keyq\x03\x8a\x01\x03u."
    )
    assert _load(content) == {"name": "café", "key": 3}
    pairs = Call("collections.OrderedDict", ([["a", 1], ["b", 2]],))
    assert _load(pickle_of(pairs)) == {"a": 1, "b": 2}


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("order", ["C", "F"])
def test_arrays_of_numpy_come_out_of_every_protocol(protocol, order):
    array = np.array(np.arange(6).reshape(2, 3), np.float32, order=order)
    values = [array, array.astype(">f8"), np.float64(2.5), np.array([True]), np.zeros((0, 4), "i2")]
    found = [entry.stored().read() for entry in _load(pickle.dumps(values, protocol))]
    for entry, value in zip(found, values, strict=True):
        np.testing.assert_array_equal(entry, value)
        assert entry.dtype == value.dtype.newbyteorder("=")


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_a_long_array_stays_in_the_file_until_it_is_asked_for(protocol):
    array = np.arange(5000, dtype=np.float32)
    content = pickle.dumps({"a": array, "after": 1}, protocol)
    found = _load(content)
    assert found["after"] == 1
    np.testing.assert_array_equal(found["a"].stored().read(), array)


class _Attack:
    """An object that has Python's own unpickler call a function."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("place", ["weights", "beside"])
def test_a_pickle_that_opens_a_shell_is_refused_by_name_and_nothing_runs(tmp_path, protocol, place):
    canary = tmp_path / "canary"
    attack = _Attack(os.system, f"touch {canary}")
    value = {"model": {"a": np.ones(2)}, "meta": {"x": [attack]}}
    if place == "weights":
        value["model"]["b"] = attack
    content = pickle.dumps(value, protocol)
    message = _refusal(content)
    assert "posix.system" in message and "nothing was run" in message
    assert not canary.exists()
    pickle.loads(content)  # the attack is a real one
    assert canary.exists()


@pytest.mark.parametrize(
    "path",
    [
        "os.system",
        "nt.system",
        "subprocess.Popen",
        "builtins.eval",
        "builtins.exec",
        "__builtin__.eval",
        "builtins.__import__",
        "builtins.open",
        "builtins.compile",
        "builtins.list.__class__",
        "importlib.import_module",
        "sys.modules",
        "operator.attrgetter",
        "pickle.loads",
        "_pickle.Unpickler",
        "shutil.rmtree",
        "socket.socket",
        "ctypes.CDLL",
        "numpy.core.os.system.__globals__",
        "collections.OrderedDict.__class__",
        "timeit.timeit",
    ],
)
def test_names_of_attacks_are_refused_wherever_they_stand(path):
    assert "which no weights need" in _refusal(pickle_of({"meta": Global(path)}))
    assert "which no weights need" in _refusal(pickle_of({"a": Call(path, ("x",))}))
    module, _, name = path.rpartition(".")
    instance = f"(S'x'\ni{module}\n{name}\n.".encode()
    assert "which no weights need" in _refusal(instance)
    by_stack = pickle_of(Raw(pickle_of(module)[2:-1] + pickle_of(name)[2:-1] + b"\x93"))
    assert "which no weights need" in _refusal(by_stack)


@pytest.mark.parametrize(
    "path",
    [
        "torch.load",
        "torch.hub.load",
        "torch.jit._script.load",
        "numpy.load",
        "numpy.testing._private.utils.runstring",
        "types.FunctionType",
        "pip._internal.main",
    ],
)
def test_other_names_that_could_run_programs_are_empty_and_refused_among_the_weights(path, refusal):
    before = set(sys.modules)
    found = _load(pickle_of({"named": Global(path), "called": Call(path, ("x",), {"a": 1})}))
    assert (type(found["named"]), type(found["called"])) == (Name, Foreign)
    assert found["named"].path == found["called"].path == path
    weights = {"a": Call("numpy.core.multiarray._reconstruct"), "b": Call(path, ("x",))}
    message = refusal(pickle_of({"model": weights}))
    assert f"b (an object of {path}); nothing of them was run" in message
    assert set(sys.modules) == before


def test_a_name_of_several_lines_or_spaces_is_refused():
    assert "which no weights need" in _refusal(
        b"\x80\x02X\x03\x00\x00\x00a;bX\x01\x00\x00\x00c\x93."
    )


def test_objects_of_unknown_classes_become_empty_stand_ins(tmp_path, monkeypatch):
    canary = tmp_path / "imported"
    (tmp_path / "planted_module.py").write_text(
        f"open({str(canary)!r}, 'w').close()\n"
        "class Thing(dict):\n"
        f"    def __setstate__(self, state): open({str(canary)!r}, 'w').close()\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    thing = Call("planted_module.Thing", (1,), {"state": 1}, (("a", 1),))
    value = {
        "made": thing,
        "new": Raw(b"cplanted_module\nThing\n)\x81}b"),
        "with keywords": Raw(b"cplanted_module\nThing\n)}\x92"),
        "old": Raw(b"(cplanted_module\nThing\nK\x01o"),
        "named": Global("planted_module.Thing"),
        "list": Raw(b"cplanted_module\nThing\n)R(K\x01K\x02e"),
    }
    found = _load(pickle_of(value))
    assert isinstance(found.pop("named"), Name)
    assert {type(entry) for entry in found.values()} == {Foreign}
    assert {entry.path for entry in found.values()} == {"planted_module.Thing"}
    assert not canary.exists() and "planted_module" not in sys.modules


def test_a_method_of_a_foreign_class_is_a_name_and_other_uses_of_getattr_are_refused():
    method = Call("__builtin__.getattr", (Global("mmengine.logging.HistoryBuffer"), "mean"))
    assert _load(pickle_of(method)).path == "mmengine.logging.HistoryBuffer.mean"
    for arguments in [
        (Global("mmengine.HistoryBuffer"), "__class__"),
        (Global("collections.OrderedDict"), "a;b"),
        ([1], "append"),
        (Call("mmengine.HistoryBuffer"), "mean"),
    ]:
        assert "nothing was run" in _refusal(pickle_of(Call("builtins.getattr", arguments)))


def test_calling_the_result_of_a_call_gives_a_stand_in_too():
    inner = pickle_of(Call("functools.partial", (Global("a.b"),)))[2:-1]
    assert isinstance(_load(b"\x80\x02" + inner + b")R."), Foreign)


@pytest.mark.parametrize(
    ("code", "claim"),
    [
        (b"\x8d" + struct.pack("<Q", 10**11), "100000000000 bytes"),
        (b"\x8e" + struct.pack("<Q", 10**11), "100000000000 bytes"),
        (b"\x96" + struct.pack("<Q", 10**11), "100000000000 bytes"),
        (b"\x95" + struct.pack("<Q", 10**11), "frame of 100000000000 bytes"),
        (b"X" + struct.pack("<I", 2**32 - 1), "4294967295 bytes"),
        (b"B" + struct.pack("<I", 2**32 - 1), "4294967295 bytes"),
        (b"T" + struct.pack("<i", -5), "count < 0: -5"),
        (b"\x8b" + struct.pack("<i", 2**31 - 1), "2147483647 bytes"),
        (b"\x8b" + struct.pack("<i", -1), "count < 0: -1"),
        (b"\x8b" + struct.pack("<i", 100) + b"\x01" * 100, "integer of 793 bits"),
        (b"L" + b"9" * 1000 + b"L\n", "integer of 3322 bits"),
        (b"V" + b"x" * 10**6 + b"\n", "line of more than 4096 bytes"),
        (b"\x82\x01", "a name from a registry"),
        (b"\x84\x01\x00\x00\x00", "a name from a registry"),
        (b"Pstorage\n", "a persistent id of text"),
        (b"\x97", "a buffer outside of the file"),
        (b"\xff", "opcode b'\\xff' unknown"),
        (b"\x80\x06", "protocol 6"),
        (b"N" * (MAX_OPERATIONS + 1), f"more than {MAX_OPERATIONS} operations"),
        (pickle_of(Persistent(("storage",)))[2:-1], "refers to data outside of it"),
    ],
)
def test_claims_that_the_file_cannot_hold_are_refused(code, claim):
    assert claim in _refusal(b"\x80\x02" + code + b".")


@pytest.mark.parametrize(
    "code", [b"R", b"b", b"s", b"u", b"t", b"\x86", b"0", b"h\x07", b"NNR", b"Ns"]
)
def test_a_pickle_that_takes_what_is_not_there_is_called_damaged(code):
    assert "damaged" in _refusal(b"\x80\x02" + code + b".")


def test_a_pickle_that_is_cut_off_anywhere_is_refused():
    content = pickle.dumps({"a": np.ones(3), "b": [1, 2.5, "x"]}, 2)
    for size in range(len(content)):
        assert _refusal(content[:size])


def test_a_pickle_may_not_run_on_into_what_follows_it():
    content = pickle.dumps([1, 2], 2)
    with pytest.raises(WeightsFileError, match="ends in the middle"):
        Unpickler(io.BytesIO(content), len(content) - 1).load()


@pytest.mark.parametrize("code", [b"\x85", b"\x85\x85", b"]("])
def test_depth_takes_no_stack(code):
    found = _load(b"\x80\x02N" + code * 50_000 + (b"." if b"(" not in code else b"N."))
    assert found is None or type(found) is tuple


def test_lists_that_hold_themselves_many_times_take_no_memory():
    laughs = b"\x80\x02]" + b"".join(b"q%c](" % n + b"h%c" % n * 100 + b"e" for n in range(100))
    assert type(_load(laughs + b".")) is list


def test_texts_that_are_encoded_again_and_again_are_counted():
    text = b"X" + struct.pack("<I", 1000) + b"x" * 1000
    code = b"(c_codecs\nencode\nq\x00" + text + b"X\x06\x00\x00\x00latin1\x86q\x01R"
    message = _refusal(b"\x80\x02" + code + b"h\x00h\x01R" * 50_000 + b"t.")
    assert "makes more bytes of its texts than it has" in message


def test_a_name_that_is_there_twice_is_refused():
    items = b"X\x01\x00\x00\x00aK\x01"
    assert "the name a is there twice" in _refusal(b"\x80\x02}(" + items * 2 + b"u.")
    assert "the name a is there twice" in _refusal(b"\x80\x02}" + (items + b"s") * 2 + b".")
    pairs = Call("collections.OrderedDict", ([["a", 1], ["a", 2]],))
    assert "the name a is there twice" in _refusal(pickle_of(pairs))


def test_keys_whose_hash_could_recurse_become_stand_ins():
    deep = b"N" + b"\x85" * 100_000
    (key,) = _load(b"\x80\x02}" + deep + b"K\x01s.")
    assert isinstance(key, Foreign)


def test_an_array_that_never_got_its_content_has_a_fault():
    array = _load(pickle_of(Call("numpy.core.multiarray._reconstruct", (Global("numpy.ndarray"),))))
    assert isinstance(array, PickledArray)
    assert array.stored().fault()


def test_arrays_of_objects_and_of_records_have_a_fault():
    for array in [np.array([{"a": 1}], object), np.zeros(2, [("x", "f4")]), np.array(["text"])]:
        fault = _load(pickle.dumps(array)).stored().fault()
        assert fault and "dtype" in fault
