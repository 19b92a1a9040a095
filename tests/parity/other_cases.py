"""The recorded cases of PaddleDetection and mmdetection: their weights as files, photos, tensors.

As with the original (`cases.py`), weights are drawn again from seeds, under the implementation's
own names and in its layouts; photos come with `--data`.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import pickle
import re
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from sparseinst_jax.data.coco import CocoDataset, load_coco
from sparseinst_jax.models.sparseinst.weights import NAMES
from sparseinst_jax.models.trees import functional
from sparseinst_jax.setup.builders import build_model
from sparseinst_jax.setup.config import load_config
from sparseinst_jax.weights.convert import (
    original_to_ours,
    ours_to_original,
    rename_to_original,
)
from tests.foreign_files import Storages, torch_zip
from tests.parity import golden_weights
from tests.parity.cases import CONFIGS

GOLDEN = Path(__file__).parent / "golden_others"
CONFIG_OF_THEIRS = {
    "": "mmdet_iam_r50",
    "sparseinst_r50_giam_150e_coco": "paddle_giam_r50",
    "sparseinst_r50vd_ssld_giam_150_coco_aug": "paddle_giam_r50vd_ssld_aug",
    "sparseinst_r50vd_ssld_dcn_giam_150e_coco_aug": "paddle_giam_r50vd_ssld_dcn_aug",
}
# How names are read by the rules of `golden_weights`.
_RULE_NAMES = (
    (r"branch2c\.norm\.weight$", "bn3.weight"),
    (r"short\.(conv\.)?conv\.weight$", "shortcut.weight"),
    (r"(branch2b|conv2)\.conv_offset\.", "conv2_offset."),
    (r"\._mean$", ".running_mean"),
    (r"\._variance$", ".running_var"),
)


@dataclasses.dataclass(frozen=True)
class OtherCase:
    """A recorded case: its manifest and its tensors by the implementation's names."""

    name: str
    manifest: dict[str, Any]
    tensors: dict[str, np.ndarray]

    @property
    def config_name(self) -> str:
        """The configuration of the same row."""
        return CONFIG_OF_THEIRS[self.manifest.get("config", "")]

    @property
    def config(self) -> Any:
        """The configuration of the same row, for training as for a test."""
        return load_config(CONFIGS / f"{self.config_name}.py")

    @property
    def is_paddle(self) -> bool:
        """Whether it is PaddleDetection's; else it is mmdetection's."""
        return self.config_name.startswith("paddle")

    def state_dict(self) -> dict[str, np.ndarray]:
        """The weights under their names and in their layouts."""
        linear = self.manifest.get("linear", ())
        seed = self.manifest["seed"]
        state = {
            key: _draw(key, tuple(shape), seed, key in linear)
            for key, shape in self.manifest["state_dict"].items()
        }
        override = self.manifest["override"].items()
        return state | {key: np.array(values, np.float32) for key, values in override}

    def write_weights(self, folder: Path) -> Path:
        """Write the weights as the implementation saves them: a .pdparams or a .pth."""
        state = self.state_dict()
        if self.is_paddle:
            table = {"StructuredToParameterName@@": {key: f"p_{i}" for i, key in enumerate(state)}}
            path = folder / f"{self.name}.pdparams"
            path.write_bytes(pickle.dumps(state | table, 2))
            return path
        storages = Storages()
        content = {
            "meta": {"mmengine_version": "0.10.7", "epoch": 1},
            "state_dict": {key: storages.tensor(array) for key, array in state.items()},
            "message_hub": {},
        }
        path = folder / f"{self.name}.pth"
        path.write_bytes(torch_zip(content, storages))
        return path

    def model(self, frozen_stages: int = 0) -> tuple[Any, Any, Any, Any]:
        """The network with the case's weights: module, pure function, params, statistics."""
        module = build_model(self.config.model, 80, None, frozen_stages)
        apply, *trees = functional(module)
        arrays = rename_to_original(self.state_dict(), NAMES).arrays
        return module, apply, *original_to_ours(arrays, *trees, NAMES, source=self.name)

    def theirs(self, params: Any, statistics: Any = None) -> dict[str, np.ndarray]:
        """Arrays of our trees' form, under their names and in their layouts."""
        shapes = self.manifest["state_dict"].items()
        empty = {key: np.broadcast_to(np.float32(0), shape) for key, shape in shapes}
        file_names = rename_to_original(empty, NAMES).file_names
        linear = self.manifest.get("linear", ())
        ours = ours_to_original(params, statistics or {}, NAMES)
        arrays = {file_names[name]: array for name, array in ours.items()}
        return {name: a.T if name in linear else a for name, a in arrays.items()}

    def compare(self, errors: Any, key: str, value: np.ndarray, bound: float, group: str) -> None:
        """Note the largest error of a recorded tensor, whole or sampled, and of what sums it up."""
        if key in self.tensors:
            want = self.tensors[key]
            assert value.shape == want.shape
            error = np.abs(value.astype(np.float64) - want).max()
        else:
            assert value.shape == tuple(self.tensors[f"{key}/shape"])
            got = value.ravel()[self.tensors[f"{key}/idx"]].astype(np.float64)
            wide = value.astype(np.float64)
            seen = np.array([wide.mean(), wide.std(), wide.min(), wide.max()])
            error = max(
                np.abs(got - self.tensors[f"{key}/val"]).max(),
                np.abs(seen - self.tensors[f"{key}/stats"]).max(),
            )
        errors.check(group, key, error, bound)


def _draw(key: str, shape: tuple[int, ...], seed: int, in_out: bool) -> np.ndarray:
    """A tensor by the first rule of `golden_weights` that fits; [in, out] is drawn transposed."""
    if key.endswith("num_batches_tracked"):
        return np.zeros(shape, np.int64)
    drawn, name = shape[::-1] if in_out else shape, key
    for pattern, to in _RULE_NAMES:
        name = re.sub(pattern, to, name)
    rng = np.random.default_rng([seed, zlib.crc32(key.encode())])
    kind, a, b = next(
        rule
        for pattern, ranks, *rule in golden_weights.RULES
        if len(drawn) in ranks and re.search(pattern, name)
    )
    if kind == "uni":
        x = rng.uniform(a, b, drawn)
    elif kind == "abs":
        x = a + b * rng.standard_normal(drawn)
    else:
        x = rng.standard_normal(drawn) * (a / np.sqrt(np.prod(drawn[1:])))
    x = x.astype(np.float32)
    return np.ascontiguousarray(x.T) if in_out else x


@functools.cache
def load(name: str) -> OtherCase:
    """Read a case; nothing is unpickled."""
    manifest = json.loads((GOLDEN / name / "manifest.json").read_text())
    path, tensors = GOLDEN / name / "tensors.npz", {}
    if path.exists():
        with np.load(path, allow_pickle=False) as archive:
            tensors = {key: archive[key] for key in archive.files}
    return OtherCase(name, manifest, tensors)


def photos(data_dir: Path, **options: Any) -> CocoDataset:
    """The data set of the photos; `options` are those of `load_coco`."""
    folder = data_dir / "coco_train160"
    path = next((folder / "images").rglob("000000262145.jpg"))
    return load_coco(folder / "train.json", path.parent, **options)


def write_json_of(data_dir: Path, image_ids: list[int], path: Path) -> None:
    """Write the annotations of some photos alone, in this order."""
    content = json.loads((data_dir / "coco_train160" / "train.json").read_text())
    by_id = {entry["id"]: entry for entry in content["images"]}
    content["images"] = [by_id[i] for i in image_ids]
    content["annotations"] = [e for e in content["annotations"] if e["image_id"] in image_ids]
    path.write_text(json.dumps(content))
