"""Load, override, store and compare configurations.

A configuration is a tree of plain values (bool, int, float, str, tuples of them). It comes from a
Python file that the user names (`get_config()` is called), from one of this package's own, named
without its folder, or from the JSON stored in a run. A Python file is never run because it lies
beside a checkpoint.
"""

import ast
import difflib
import json
import os
import re
import runpy
import traceback
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from sparseinst_jax import configs
from sparseinst_jax.setup import config_history
from sparseinst_jax.weights.zoo import published

_DATA_PATHS = (
    *("data.train.images", "data.train.annotations", "data.val.images", "data.val.annotations"),
    "data.tfds_dir",
)
PATH_KEYS = (*_DATA_PATHS, "train.init_from")
# A run may be continued with other values of these: they move no weight. Data may lie elsewhere by
# now; whether they are the same is compared by their content, see `refusals.refuse_changed_data`.
FREE_KEYS = (
    *(*_DATA_PATHS, "data.root"),
    "train.num_steps",
    "train.micro_batches",  # fewer devices have less memory; the gradient is that of the batch
    "train.log_every",
    "train.checkpoint_every",
    "train.eval_every",
    "train.early_stopping",
    "train.skip_nonfinite",
    "data.on_error",
    "data.on_change",
    "data.num_workers",
)
_MISSING = "(not set)"


def load_config(
    source: str | os.PathLike | Mapping[str, Any] | ConfigDict,
    overrides: Mapping[str, Any] | None = None,
) -> ConfigDict:
    """Load a configuration and apply overrides.

    In paths `~` is the home folder. Relative paths that a run has stored lead from where it was
    started (`data.root`), if anything is there; those of overrides from where the command runs.

    Args:
      source: a name such as "giam_r50", a `.py` file with `get_config()`, a stored `.json` file, a
        stored mapping, or a configuration, which is copied.
      overrides: dotted key to a value, or to its text: `{"train.batch_size": "8"}`.

    Returns:
      The configuration, locked: unknown keys can be neither read nor written.

    Raises:
      FileNotFoundError: there is neither such a file nor such a name.
      ValueError: the file is no configuration, or overrides name unknown keys or carry values of
        another type; all faults in one message.
    """
    if isinstance(source, ConfigDict | Mapping):
        plain = source.to_dict() if isinstance(source, ConfigDict) else source
        config = _from_plain(config_history.complete(plain)[0])
    else:
        path = find_config(source)
        if path.suffix == ".py":
            config = _run_config_file(path)
        elif path.suffix == ".json":
            try:
                config = from_json(path.read_text())
            except ValueError as error:
                raise ValueError(f"{path}: {error}") from error
        else:
            raise ValueError(f"--config must name a .py or a stored .json file, got {path}.")
    apply_overrides(config, overrides or {})
    _locate(config, overrides or {})
    config.lock()
    return config


def _locate(config: ConfigDict, overrides: Collection[str]) -> None:
    """Make paths such that they can be opened from where the command runs."""
    flat = flatten(config)
    root = os.path.expanduser(flat.get("data.root", ""))
    if root and os.path.abspath(root) == os.getcwd():
        root = ""  # they are as good as they are, and shorter to read
    for key in PATH_KEYS:
        given = flat.get(key) or ""
        if key == "train.init_from" and given.split("+")[0] in published():
            continue  # a name, which is the same everywhere
        path = os.path.expanduser(given)
        if root and path and key not in overrides:
            there = os.path.join(root, path)
            if "data.root" in overrides or os.path.exists(there) or not os.path.exists(path):
                path = there
        if path != given:
            with config.unlocked():
                config.update_from_flattened_dict({key: path})


def find_config(source: str | os.PathLike) -> Path:
    """Find the file of a configuration.

    Args:
      source: a path, or where no file is there, the name of a configuration of this package:
        `giam_r50`, `giam_r50.py` and `configs/giam_r50.py` are the same.

    Raises:
      FileNotFoundError: there is neither; names similar files and configurations.
      ValueError: it is a folder.
    """
    path = Path(source)
    if path.is_file():
        return path
    ours = {
        file.stem: file
        for file in Path(configs.__path__[0]).glob("*.py")
        if file.stem != "__init__"
    }
    if path.suffix in ("", ".py") and path.parent in (Path(), Path("configs")):
        if path.stem in ours:
            return ours[path.stem]
    if path.is_dir():
        raise ValueError(f"--config must name a file, got the folder {path}.")
    beside = path.parent.iterdir() if path.parent.is_dir() else ()
    files = {file.name: str(file) for file in beside if file.suffix in (".py", ".json")}
    close = [files[name] for name in difflib.get_close_matches(path.name, files, n=1)]
    close = close or difflib.get_close_matches(path.stem, ours)
    hint = f" (did you mean {' or '.join(close)}?)" if close else ""
    raise FileNotFoundError(
        f"--config must name a file, got {path}, which does not exist{hint}. Give a file, or a"
        f" configuration of this package by its name, such as giam_r50 or finetune."
    )


def apply_overrides(config: ConfigDict, overrides: Mapping[str, Any]) -> None:
    """Replace values in place, each read as the type that the key has now.

    Raises:
      ValueError: unknown keys, groups of keys and values of another type, all in one message.
    """
    known = flatten(config)
    faults, values = [], {}
    for key, given in overrides.items():
        text = given if isinstance(given, str) else repr(given)
        if key in known:
            try:
                values[key] = _parse(text, known[key])
            except ValueError as error:
                faults.append(f"--config.{key}={text}: {error}")
        else:
            faults.append(_unknown_key(key, known))
    if faults:
        raise ValueError("\n".join(faults))
    with config.unlocked():
        for key, value in values.items():
            config.update_from_flattened_dict({key: value})


def flatten(config: ConfigDict) -> dict[str, Any]:
    """Dotted key to value, in the order of the file."""
    flat: dict[str, Any] = {}

    def visit(node: Any, prefix: str) -> None:
        for key, value in node.items():
            if isinstance(value, Mapping | ConfigDict):
                visit(value, f"{prefix}{key}.")
            else:
                flat[prefix + key] = value

    visit(config.to_dict(), "")
    return flat


def from_json(text: str) -> ConfigDict:
    """Read a stored configuration; lists become tuples, the only sequence in use.

    Raises:
      ValueError: the text is not a JSON object.
    """
    try:
        plain = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"a stored configuration must be JSON: {error}") from error
    if not isinstance(plain, dict):
        raise ValueError(f"a stored configuration must be a JSON object, got {type(plain)}.")
    return _from_plain(config_history.complete(plain)[0])


def diff(first: ConfigDict, second: ConfigDict) -> dict[str, tuple[Any, Any]]:
    """Keys whose values differ, with both values; `(not set)` where only one has the key."""
    a, b = flatten(first), flatten(second)
    pairs = {key: (a.get(key, _MISSING), b.get(key, _MISSING)) for key in {**a, **b}}
    return {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}


def forbidden_changes(stored: ConfigDict, wanted: ConfigDict) -> dict[str, tuple[Any, Any]]:
    """The part of `diff` with which a run cannot be continued."""
    return {
        key: pair
        for key, pair in diff(stored, wanted).items()
        if key not in FREE_KEYS
        and not (key in PATH_KEYS and all(pair) and len(set(map(os.path.abspath, pair))) == 1)
    }


def default_workdir(source: str | Path) -> Path:
    """`runs/<name of the configuration>`: one run folder for each."""
    return Path("runs") / Path(source).stem


def _parse(text: str, current: Any) -> Any:
    """Read text as the type of `current`."""
    if isinstance(current, str):
        return text
    if isinstance(current, tuple):
        return _parse_tuple(text, current)
    if isinstance(current, bool):
        if text.lower() in ("true", "1", "false", "0"):
            return text.lower() in ("true", "1")
        raise ValueError("expected true or false.")
    try:
        return type(current)(text)
    except ValueError:
        expected = "an integer" if isinstance(current, int) else "a number"
        raise ValueError(f"expected {expected}.") from None


def _parse_tuple(text: str, current: tuple) -> tuple:
    """Read `(352, 469)`, `[352, 469]`, `352,469`, one element `352`, or names `cat,dog`."""
    kind = type(current[0]) if current else None
    expected = f'a tuple like "{current}"'
    try:
        value = ast.literal_eval(text.strip())
    except (ValueError, SyntaxError):
        if kind not in (None, str) or text.strip()[:1] in "([":
            raise ValueError(f"expected {expected}.") from None
        value = tuple(item.strip() for item in text.split(","))  # names: cat,dog
    items = tuple(value) if isinstance(value, tuple | list) else (value,)
    if kind is float:
        items = tuple(float(x) if type(x) is int else x for x in items)
    wrong = [x for x in items if kind is not None and type(x) is not kind]
    if kind is not None and wrong:
        raise ValueError(f"expected {expected}: {wrong} must be of type {kind.__name__}.")
    return items


def _unknown_key(key: str, known: Mapping[str, Any]) -> str:
    inside = [name for name in known if name.startswith(f"{key}.")]
    if inside:
        return f"--config.{key} is a group: set one of {', '.join(inside)}."
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.4)
    if not close:  # the right name in the wrong group
        close = [name for name in known if name.split(".")[-1] == key.split(".")[-1]][:1]
    hint = f" Did you mean --config.{close[0]}?" if close else ""
    group = key.partition(".")[0] + "."
    keys = [name for name in known if name.startswith(group)] or list(known)
    return f"--config.{key} is not a key of the configuration.{hint} Keys: {', '.join(keys)}."


def _from_plain(plain: Mapping[str, Any]) -> ConfigDict:
    def convert(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: convert(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return tuple(convert(item) for item in value)
        return value

    config = ConfigDict({key: convert(value) for key, value in plain.items()})
    config.lock()
    return config


def _run_config_file(path: Path) -> ConfigDict:
    try:
        names = runpy.run_path(str(path))
        config = names["get_config"]() if "get_config" in names else None
    except Exception as error:  # the file is the user's program: anything can be raised
        raise ValueError(f"{path}{_place(error, path)}: {_reason(error)}") from error
    if "get_config" not in names:
        raise ValueError(f"{path} must define get_config(); see configs/base.py.")
    if not isinstance(config, ConfigDict):
        raise ValueError(
            f"get_config() in {path} must return an ml_collections.ConfigDict, got "
            f"{type(config).__name__}; see configs/tiny.py."
        )
    return _from_plain(config.to_dict())


def _place(error: Exception, path: Path) -> str:
    """The last line of a configuration file that an error went through."""
    if isinstance(error, SyntaxError):
        return f", line {error.lineno}"
    lines = [
        frame.lineno
        for frame in traceback.extract_tb(error.__traceback__)
        if Path(frame.filename) == path
    ]
    return f", line {lines[-1]}" if lines else ""


def _reason(error: Exception) -> str:
    """What went wrong in a configuration file; ml_collections names the closest key itself."""
    inner = error.args[0] if error.args else error
    if isinstance(error, KeyError) or isinstance(inner, KeyError):
        text = str(inner.args[0] if isinstance(inner, KeyError) and inner.args else inner)
        # The list of the group's fields comes with their values, half a page of them.
        unknown = re.match(r"\W*(?:Key \W)?(\w+)", text)
        close = re.search(r'Did you mean "(\w+)"', text)
        return (
            f'there is no key "{unknown[1] if unknown else text}".'
            + (f' Did you mean "{close[1]}"?' if close else "")
            + " The keys and their meaning: configs/base.py."
        )
    text = str(inner)
    if isinstance(error, ModuleNotFoundError) and (error.name or "").partition(".")[0] == "configs":
        text += ". A configuration is imported by `from sparseinst_jax.configs import giam_r50`"
    if isinstance(error, (TypeError, ValueError)):
        return text
    return f"{type(error).__name__}: {text}"
