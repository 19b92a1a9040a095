"""Files of torch.save, written by hand: today's zip and the legacy format."""

from __future__ import annotations

import io
import pickle
import struct
import tarfile
import zipfile

import numpy as np
import pytest

from tests.foreign_files import (
    Call,
    Global,
    Persistent,
    Storages,
    pickle_of,
    tensor,
    torch_legacy,
    torch_zip,
    zip_of,
)

WRITERS = {"PyTorch zip": (torch_zip, False), "PyTorch legacy": (torch_legacy, True)}
kinds = pytest.mark.parametrize("kind", WRITERS)


def _write(kind: str, make) -> bytes:
    """A checkpoint of what `make` describes, given the storages to put arrays into."""
    writer, is_legacy = WRITERS[kind]
    storages = Storages(is_legacy)
    return writer(make(storages), storages)


@kinds
@pytest.mark.parametrize(
    "dtype", ["float64", "float32", "float16", "int64", "int32", "uint8", "bool"]
)
def test_each_dtype_comes_out_bit_for_bit(kind, dtype, read, rng):
    array = (rng.standard_normal((3, 4, 5)) * 100).astype(dtype)
    scalar = np.array(7).astype(dtype)
    found = read(_write(kind, lambda to: {"a": to.tensor(array), "n": to.tensor(scalar)}))
    assert found.kind == kind
    assert found.arrays.keys() == {"a", "n"}
    np.testing.assert_array_equal(found.arrays["a"], array)
    assert found.arrays["a"].dtype == array.dtype and found.arrays["n"].shape == ()
    assert found.arrays["n"] == scalar


@kinds
def test_bfloat16_is_widened_exactly_and_said(kind, read):
    # 1, -2, 2**-7, the largest below infinity, infinity
    bits = np.array([0x3F80, 0xC000, 0x3C00, 0x7F7F, 0x7F80], np.uint16)
    found = read(_write(kind, lambda to: {"a": to.tensor(bits, "bfloat16")}))
    values = found.arrays["a"]
    assert values.dtype == np.float32
    np.testing.assert_array_equal(values.view(np.uint32), bits.astype(np.uint32) << 16)
    np.testing.assert_array_equal(values[:3], [1, -2, 2**-7])
    assert "1 arrays of bfloat16 widened to float32: a" in found.notes


@kinds
def test_views_of_a_shared_storage_keep_their_strides_and_offsets(kind, read):
    base = np.arange(24, dtype=np.float32).reshape(4, 6)

    def make(to):
        storage = to.add(base)
        return {
            "whole": tensor(storage, (4, 6)),
            "transposed": tensor(storage, (6, 4), (1, 6)),
            "part": tensor(storage, (2, 2), (12, 3), 7),
            "one": tensor(storage, (), (), 23),
            "none": tensor(storage, (0, 6)),
            "sizes": tensor(storage, Call("torch.Size", ((2, 3),)), (3, 1)),
        }

    found = read(_write(kind, make)).arrays
    np.testing.assert_array_equal(found["whole"], base)
    np.testing.assert_array_equal(found["transposed"], base.T)
    np.testing.assert_array_equal(found["part"], [[7, 10], [19, 22]])
    assert found["one"] == 23 and found["none"].shape == (0, 6)
    np.testing.assert_array_equal(found["sizes"], [[0, 1, 2], [3, 4, 5]])
    assert all(array.flags.c_contiguous for array in found.values())


@kinds
def test_parameters_and_tensors_with_attributes_are_their_tensors(kind, read):
    array = np.arange(3, dtype=np.float32)
    hooks = Call("collections.OrderedDict")

    def make(to):
        inner = to.tensor(array)
        return {
            "parameter": Call("torch._utils._rebuild_parameter", (inner, True, hooks)),
            "stateful": Call(
                "torch._utils._rebuild_parameter_with_state", (inner, True, hooks, {"x": 1})
            ),
            "subclass": Call(
                "torch._tensor._rebuild_from_type_v2",
                (Global(inner.path), Global("my.Tensor"), inner.arguments, {"x": 1}),
            ),
            "old": Call("torch._utils._rebuild_tensor", inner.arguments[:4]),
        }

    for found in read(_write(kind, make)).arrays.values():
        np.testing.assert_array_equal(found, array)


def test_dtypes_without_a_storage_class_of_their_own_are_read(read):
    storages = Storages()
    key = storages.add(np.array([1, 65535], np.uint16), "int32").identity[2]
    untyped = Persistent(("storage", Global("torch.storage.UntypedStorage"), key, "cpu", 4))
    arguments = (untyped, 0, (2,), (1,), False, {}, Global("torch.uint16"))
    content = {"a": Call("torch._utils._rebuild_tensor_v3", arguments)}
    np.testing.assert_array_equal(read(torch_zip(content, storages)).arrays["a"], [1, 65535])


def test_a_file_of_a_big_endian_machine_is_turned_round(read):
    storages = Storages()
    big = np.array([1.5, -2.25], ">f4")
    content = torch_zip({"a": storages.tensor(big)}, storages)
    entries = {entry.filename: data for entry, data in _entries(content)}
    entries["archive/byteorder"] = b"big"
    found = read(zip_of(entries)).arrays["a"]
    np.testing.assert_array_equal(found, [1.5, -2.25])
    assert found.dtype.isnative


def _entries(content: bytes):
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return [(entry, archive.read(entry)) for entry in archive.infolist()]


def test_a_zip_that_was_packed_again_with_compression_is_read(read, rng):
    storages = Storages()
    array = rng.standard_normal((20, 30)).astype(np.float32)
    content = torch_zip({"a": storages.tensor(array)}, storages)
    entries = {entry.filename: data for entry, data in _entries(content)}
    found = read(zip_of(entries, zipfile.ZIP_DEFLATED))
    np.testing.assert_array_equal(found.arrays["a"], array)


def test_legacy_files_of_another_pickle_protocol_are_known_by_their_number(read):
    storages = Storages(is_legacy=True)
    content = torch_legacy({"a": storages.tensor(np.ones(3, np.float32))}, storages)
    first = pickle_of(0x1950A86A20F9469CFC6C)
    assert content.startswith(first)
    framed = pickle.dumps(0x1950A86A20F9469CFC6C, 4)
    found = read(framed + content[len(first) :])
    assert found.kind == "PyTorch legacy"
    np.testing.assert_array_equal(found.arrays["a"], [1, 1, 1])


def test_tensors_in_a_plain_pickle_are_refused_by_name(refusal):
    inner = Call("torch.storage._load_from_bytes", ("...",))
    message = refusal(pickle_of({"model": {"a": tensor(inner, (3,))}}))
    assert "a (an object of torch.storage._load_from_bytes)" in message


def test_a_legacy_view_of_a_storage_starts_where_it_says(read):
    storages = Storages(is_legacy=True)
    key = storages.add(np.arange(10, dtype=np.float32)).identity[2]
    view = storages.refer(key, "FloatStorage", 10, ("view", 4, 3))
    found = read(torch_legacy({"a": tensor(view, (3,))}, storages)).arrays["a"]
    np.testing.assert_array_equal(found, [4, 5, 6])


def test_a_checkpoint_of_mmengine_loads_without_mmengine(read, rng):
    """Loggers, configurations and methods of classes lie beside the weights."""
    weights = rng.standard_normal((4, 3)).astype(np.float32)
    history = rng.standard_normal(400)
    dtype = Call("numpy.dtype", ("f8", False, True), (3, "<", None, None, None, -1, -1, 0))
    text = history.tobytes().decode("latin-1")
    data = Call("_codecs.encode", (text, "latin1"))
    array = Call(
        "numpy.core.multiarray._reconstruct",
        (Global("numpy.ndarray"), (0,), "b"),
        (1, (400,), dtype, False, data),
    )
    buffer = Call(
        "copy_reg._reconstructor",
        (
            Global("mmengine.logging.history_buffer.HistoryBuffer"),
            Global("__builtin__.object"),
            None,
        ),
        {
            "_log_history": array,
            "mean": Call(
                "__builtin__.getattr",
                (Global("mmengine.logging.history_buffer.HistoryBuffer"), "mean"),
            ),
        },
    )
    storages = Storages()
    state = Call(
        "collections.OrderedDict",
        (),
        {"_metadata": {}},
        (("conv.weight", storages.tensor(weights)),),
    )
    content = {
        "meta": {
            "mmengine_version": "0.10",
            "dataset_meta": {"classes": ("a",)},
            "cfg": "x" * 3000,
        },
        "state_dict": state,
        "message_hub": {"log_scalars": {"loss": buffer}},
        "ema_state_dict": {"module.conv.weight": storages.tensor(weights + 1)},
    }
    found = read(torch_zip(content, storages))
    np.testing.assert_array_equal(found.arrays["conv.weight"], weights)
    assert found.notes == [
        "took the weights under state_dict, where mmengine keeps the moving average",
        "left out ema_state_dict: with mmengine, the last weights, not averaged",
        "not read, beside the weights: meta, message_hub",
    ]


@kinds
@pytest.mark.parametrize(
    ("shape", "strides", "offset", "reason"),
    [
        ((4, 4), (4, 1), 0, "needs 64 bytes, but its data are 40 bytes"),
        ((10,), (1,), 1, "needs 44 bytes, but its data are 40 bytes"),
        ((4,), (3,), 1, "needs 44 bytes, but its data are 40 bytes"),
        ((5,), (-1,), 4, "negative strides"),
        ((5,), (1,), -1, "negative strides or offset"),
        ((-5,), (1,), 0, "negative shape"),
        ((10**11,), (0,), 0, "needs 400000000000 bytes, but its data are 40 bytes"),
        ((10**6, 10**6, 10**6), (1, 1, 1), 0, "bytes, but its data are 40 bytes"),
        ((2**70,), (1,), 0, "not whole numbers of 64 bits"),
        ((2, 2), (1,), 0, "2 axes with 1 strides"),
        ((1,) * 40, (1,) * 40, 0, "40 axes"),
        ((2.0,), (1,), 0, "not whole numbers"),
        (("x",), (1,), 0, "not whole numbers"),
    ],
)
def test_tensors_that_do_not_lie_in_their_storage_are_refused(
    kind, shape, strides, offset, reason, refusal
):
    ten = np.zeros(10, np.float32)
    message = refusal(_write(kind, lambda to: {"bad": tensor(to.add(ten), shape, strides, offset)}))
    assert "bad has" in message and reason in message


@kinds
def test_a_storage_that_is_shorter_than_it_claims_is_refused(kind, refusal):
    def make(to):
        key = to.add(np.zeros(4, np.float32)).identity[2]
        return {"a": tensor(to.refer(key, "FloatStorage", 25 * 10**9), (4,))}

    message = refusal(_write(kind, make))
    assert "the storage 0" in message and ("100000000000" in message or "25000000000" in message)


@kinds
def test_dtypes_that_weights_do_not_have_are_refused_by_name(kind, refusal):
    def make(to):
        key = to.add(np.zeros(4, np.float64), "float64").identity[2]
        return {"a": tensor(to.refer(key, "ComplexFloatStorage", 4), (4,))}

    assert "torch.ComplexFloatStorage" in refusal(_write(kind, make))


@kinds
def test_quantised_and_sparse_tensors_are_refused_by_name(kind, refusal):
    content = _write(
        kind,
        lambda to: {
            "a": to.tensor(np.zeros(2, np.float32)),
            "q": Call("torch._utils._rebuild_qtensor", (to.add(np.zeros(2, np.float32)), 0)),
        },
    )
    assert "q (an object of torch._utils._rebuild_qtensor)" in refusal(content)


@kinds
def test_a_whole_model_is_refused_with_the_way_to_save_its_weights(kind, refusal):
    model = Call("torch.nn.modules.linear.Linear", (), {"weight": 1})
    for content in (model, {"model": model, "epoch": 3}):
        message = refusal(_write(kind, lambda to, content=content: content))
        assert "torch.nn.modules.linear.Linear" in message and "state_dict()" in message


@kinds
def test_an_attack_is_refused_wherever_it_stands(kind, refusal, tmp_path):
    canary = tmp_path / "canary"
    attack = Call("os.system", (f"touch {canary}",))
    for place in ("model", "meta"):
        content = _write(
            kind,
            lambda to, place=place: {
                "model": {"a": to.tensor(np.zeros(2, np.float32))},
                "meta": {},
                place: {"a": to.tensor(np.zeros(2, np.float32)), "x": [attack]},
            },
        )
        assert "os.system" in refusal(content)
    assert not canary.exists()


@kinds
def test_a_file_that_is_cut_off_anywhere_is_refused(kind, refusal):
    array = np.ones((4, 4), np.float32)
    content = _write(kind, lambda to: {"a": to.tensor(array), "b": to.tensor(array)})
    for size in range(0, len(content), 7):
        assert refusal(content[:size])


def test_a_zip_without_the_data_of_a_tensor_is_refused(refusal):
    storages = Storages()
    content = {"a": storages.tensor(np.zeros(2, np.float32))}
    storages.contents.clear()
    assert "no entry archive/data/0" in refusal(torch_zip(content, storages))


@pytest.mark.parametrize(
    "name", ["../../evil", "/etc/evil", "archive/data/../../../evil", "C:\\evil", "..\\evil"]
)
def test_zip_entries_that_lead_out_of_the_file_are_refused(name, refusal, tmp_path):
    storages = Storages()
    content = torch_zip({"a": storages.tensor(np.zeros(2, np.float32))}, storages, **{name: b"x"})
    message = refusal(content)
    assert "evil" in message and "path" in message
    assert [path.name for path in tmp_path.iterdir()] == ["weights.bin"]


def test_zip_entries_that_are_there_twice_are_refused(refusal):
    with pytest.warns(UserWarning, match="Duplicate name"):
        content = zip_of([("archive/data.pkl", pickle_of({})), ("archive/data.pkl", b"x")])
    assert "archive/data.pkl is there twice" in refusal(content)


def test_two_checkpoints_in_one_zip_are_refused(refusal):
    content = zip_of({"a/data.pkl": pickle_of({}), "b/data.pkl": pickle_of({})})
    assert "two checkpoints in one zip" in refusal(content)


def test_a_damaged_number_is_found_by_its_checksum(refusal, read):
    storages = Storages()
    array = np.full(100, 3, np.float32)
    content = torch_zip({"a": storages.tensor(array)}, storages)
    damaged = content.replace(array.tobytes(), array.tobytes()[:-1] + b"\x00")
    assert len(damaged) == len(content) and "checksum" in refusal(damaged)


def test_checksums_of_zero_were_never_computed(read):
    """PyTorch can leave them out."""
    storages = Storages()
    array = np.full(100, 3, np.float32)
    content = bytearray(torch_zip({"a": storages.tensor(array)}, storages))
    for entry, _ in _entries(bytes(content)):
        checksum = struct.pack("<I", entry.CRC)
        content = bytearray(bytes(content).replace(checksum, bytes(4)))
    np.testing.assert_array_equal(read(bytes(content)).arrays["a"], array)


def test_an_entry_that_inflates_beyond_its_claim_is_refused(refusal):
    content = bytearray(zip_of({"a/data.pkl": b"\0" * 5000}, zipfile.ZIP_DEFLATED))
    with zipfile.ZipFile(io.BytesIO(bytes(content))) as archive:
        assert archive.infolist()[0].file_size == 5000
    at = content.rfind(b"PK\x01\x02") + 24
    content[at : at + 4] = struct.pack("<I", 50)
    assert "another size than the 50 bytes it claims" in refusal(bytes(content))


@pytest.mark.parametrize("claim", [2**31, 10**11])
def test_an_entry_that_claims_more_than_the_file_could_hold_is_refused(claim, refusal):
    """A zip bomb: 5 kB that would grow to gigabytes."""
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", b"\0" * 5000)
        archive.infolist()[0].file_size = claim
    assert "zip bomb" in refusal(target.getvalue())


def test_stored_entries_that_overlap_are_refused(refusal):
    content = bytearray(zip_of({"a/data.pkl": b"x" * 600, "a/data/0": b"y" * 600}))
    at = content.find(b"PK\x01\x02") + 20  # the two sizes of the first entry
    content[at : at + 8] = struct.pack("<II", 1200, 1200)
    assert "entries that overlap" in refusal(bytes(content))


def test_encrypted_and_oddly_compressed_entries_are_refused(refusal):
    content = bytearray(zip_of({"a/data.pkl": b"x"}))
    at = content.find(b"PK\x01\x02")
    encrypted = content[: at + 8] + b"\x01\x00" + content[at + 10 :]
    assert "encrypted" in refusal(bytes(encrypted))
    packed = zip_of({"a/data.pkl": b"x" * 100}, zipfile.ZIP_LZMA)
    assert "compressed by method 14" in refusal(packed)


def test_a_zip_of_very_many_entries_is_refused(refusal):
    content = zip_of({f"archive/data/{n:0100}": b"" for n in range(14_000)})
    assert "zip directory takes more than" in refusal(content)


def test_torchscript_and_the_old_tar_format_are_refused_with_the_way_out(refusal):
    script = zip_of({"a/data.pkl": pickle_of({}), "a/code/model.py": b"", "a/constants.pkl": b""})
    assert "TorchScript" in refusal(script)
    target = io.BytesIO()
    with tarfile.open(fileobj=target, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("storages"))
    assert "save it again with torch.save" in refusal(target.getvalue())


def test_legacy_storages_of_another_list_or_count_are_refused(refusal):
    storages = Storages(is_legacy=True)
    content = torch_legacy({"a": storages.tensor(np.zeros(3, np.float32))}, storages)
    at = len(content) - 12 - 8
    wrong = content[:at] + struct.pack("<q", 4) + content[at + 8 :]
    assert "has 4 numbers, but its tensors expect 3" in refusal(wrong)
    negative = content[:at] + struct.pack("<q", -3) + content[at + 8 :]
    assert "has -3 numbers" in refusal(negative)
    storages.contents["7"], storages.item_sizes["7"] = b"1234", 4
    both = torch_legacy({"a": tensor(storages.refer("0", "FloatStorage", 3), (3,))}, storages)
    assert "list of storages is another" in refusal(both)


def test_a_legacy_view_that_leaves_its_storage_is_refused(refusal):
    for view in [("v", 8, 3), ("v", -1, 3), ("v", 0, 10**11), ("v", None, 3)]:
        storages = Storages(is_legacy=True)
        key = storages.add(np.arange(10, dtype=np.float32)).identity[2]
        content = {"a": tensor(storages.refer(key, "FloatStorage", 10, view), (3,))}
        assert "view of the storage" in refusal(torch_legacy(content, storages))
