"""Reading a json piece by piece gives what Python's own parser gives, right and wrong."""

import io
import json
import random
from collections.abc import Iterator

import pytest

from sparseinst_jax.data._index import json_stream

SCALARS = (
    1,
    -2.5e-7,
    12345678901234567890,
    'é"\\x\n',
    "",
    True,
    None,
    float("-inf"),
    "😀",
    1e300,
    0,
)


def _read(text):
    pairs = json_stream.read_object(io.BytesIO(text), ("images", "annotations"))
    return {key: list(value) if isinstance(value, Iterator) else value for key, value in pairs}


def _value(rng, depth=0):
    choice = rng.random()
    if depth > 3 or choice < 0.4:
        return rng.choice(SCALARS)
    if choice < 0.7:
        return [_value(rng, depth + 1) for _ in range(rng.randint(0, 5))]
    return {"abé"[: rng.randint(0, 3)]: _value(rng, depth + 1) for _ in range(rng.randint(0, 4))}


def _content(rng):
    keys = rng.sample(["images", "annotations", "categories", "info", ""], 4)
    return {
        key: [_value(rng) for _ in range(rng.randint(0, 4))] if key.endswith("s") else _value(rng)
        for key in keys
    }


@pytest.mark.parametrize("window", [1, 3, 50, 1 << 20])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32-le"])
def test_a_window_of_any_size_gives_what_the_whole_text_gives(monkeypatch, window, encoding):
    monkeypatch.setattr(json_stream, "WINDOW", window)
    rng = random.Random(window)
    for _ in range(60):
        content = _content(rng)
        text = json.dumps(content, ensure_ascii=rng.random() < 0.5, indent=rng.choice([None, 1]))
        assert repr(_read(text.encode(encoding))) == repr(content)


@pytest.mark.parametrize("window", [2, 60, 1 << 20])
def test_broken_text_is_told_with_the_reason_and_place_of_the_whole_text(monkeypatch, window):
    monkeypatch.setattr(json_stream, "WINDOW", window)
    rng = random.Random(window)
    num_broken = 0
    for _ in range(300):
        text = json.dumps(_content(rng), indent=rng.choice([None, 1])).encode()
        place = rng.randrange(1, len(text))
        end = text[place + 1 :] if rng.random() < 0.5 else b""
        text = text[:place] + rng.choice([b"", b"#", b"]", b"}", b",", b'"', b"1"]) + end
        try:
            json.loads(text)
        except json.JSONDecodeError as error:
            num_broken += 1
            with pytest.raises(json_stream.JsonError) as found:
                _read(text)
            assert (found.value.reason, found.value.line, found.value.column) == (
                error.msg, error.lineno, error.colno
            ), text  # fmt: skip
        else:
            _read(text)
    assert num_broken > 150


def test_a_text_that_just_ends_is_cut_and_another_is_not():
    with pytest.raises(json_stream.JsonError) as found:
        _read(b'{"images": [{"id": 1}, {"i')
    assert found.value.is_cut
    with pytest.raises(json_stream.JsonError) as found:
        _read(b'{"images": [{"id": 1} {"id": 2}]}')
    assert (found.value.is_cut, found.value.column) == (False, 23)


@pytest.mark.parametrize(
    ("text", "reason"),
    [(b'{"a": ' + b"[" * 100_000, "nested too deeply"), (b'{"a": "\xff"}', "not in utf-8")],
)
def test_deep_nesting_and_undecodable_text_are_refused(text, reason):
    with pytest.raises(json_stream.JsonError, match=reason):
        _read(text)


def test_elements_are_read_one_at_a_time(monkeypatch):
    monkeypatch.setattr(json_stream, "WINDOW", 100)
    file = io.BytesIO(json.dumps({"images": [{"id": i} for i in range(1000)]}).encode())
    key, elements = next(json_stream.read_object(file, ("images",)))
    assert (key, next(elements)) == ("images", {"id": 0})
    assert file.tell() < 500


def test_another_value_than_an_object_comes_alone():
    assert _read(b"[1, 2") == {"": []}
    assert _read(b" 3 ") == {"": 3}
    assert _read(b"{}") == {}
