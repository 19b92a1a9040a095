"""The recorded cases of the original, and the measuring of an error against its tolerance.

Weights and inputs are drawn again from the seeds of a case's manifest (`golden_weights.py`), so a
case holds only what the original PyTorch code computed from them on a CPU in float32.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from sparseinst_jax.data.batch import Batch
from sparseinst_jax.models import ops
from sparseinst_jax.models.families import FAMILIES
from sparseinst_jax.models.family import Family
from sparseinst_jax.models.trees import functional
from sparseinst_jax.setup.builders import build_model
from sparseinst_jax.setup.config import load_config
from sparseinst_jax.weights.convert import original_to_ours
from tests.parity import golden_weights

GOLDEN = Path(__file__).parent / "golden"
CONFIGS = Path(__file__).parents[2] / "configs"
# Networks whose final detections are recorded, too.
DETECTION_CASES = (
    "r50_base",
    "r50_giam",
    "r50_giam_soft",
    "r50_giam_odd",
    "r50vd_giam",
    "r50vd_dcn_giam",
    "r50_dcn_giam",
    "r101_giam",
    "cspdarknet53_giam",
    "darknet53_giam",
    "pvt_b1_giam",
    "pvt_b2_li_giam",
)
CONFIG_OF_ORIGINALS = {
    "sparse_inst_r50_base.yaml": "iam_r50.py",
    "sparse_inst_r50_giam.yaml": "giam_r50.py",
    "sparse_inst_r50_giam_soft.yaml": "giam_softmax_r50.py",
    "sparse_inst_r50_dcn_giam_aug.yaml": "giam_r50_dcn_aug.py",
    "sparse_inst_r50vd_giam.yaml": "giam_r50vd.py",
    "sparse_inst_r50vd_dcn_giam.yaml": "giam_r50vd_dcn.py",
    "sparse_inst_r101_giam.yaml": "giam_r101.py",
    "sparse_inst_cspdarknet53_giam.yaml": "giam_cspdarknet53.py",
    "sparse_inst_darknet53_giam.yaml": "giam_darknet53.py",
    "sparse_inst_pvt_b1_giam.yaml": "giam_pvt_b1.py",
    "sparse_inst_pvt_b2_li_giam.yaml": "giam_pvt_b2_linear.py",
    "fastinst_R50_ppm-fpn_x1_576.yaml": "fastinst_r50_x1.py",
    "fastinst_R50_ppm-fpn_x3_640.yaml": "fastinst_r50_x3.py",
    "fastinst_R101_ppm-fpn_x3_640.yaml": "fastinst_r101_x3.py",
    "fastinst_R50-vd-dcn_ppm-fpn_x1_576.yaml": "fastinst_r50vd_dcn_x1.py",
}


_WEIGHTS: dict[str, tuple[Any, Any]] = {}  # of the last case alone: hundreds of megabytes


class Errors:
    """Collects the errors of one test, for the parity table, and fails once with all of them."""

    def __init__(self, case: str, record: Callable[[str, object], None]):
        self.case, self.record, self.faults = case, record, []

    def check(self, group: str, quantity: str, error: float, tolerance: float) -> None:
        """Note an error that must not exceed its tolerance; `group` is its row in the table."""
        error = float(error)
        self.record("parity", [self.case, group, quantity, error, float(tolerance)])
        if not error <= tolerance:
            self.faults.append(f"{quantity}: error {error:.3g}, tolerance {tolerance:.3g}")

    def raise_if_any(self) -> None:
        """Fail with every fault noted."""
        assert not self.faults, f"{self.case}:\n" + "\n".join(self.faults)


@dataclasses.dataclass(frozen=True)
class Case:
    """A recorded case: its manifest and its tensors by the original's names."""

    name: str
    manifest: dict[str, Any]
    tensors: dict[str, np.ndarray]

    @property
    def config_path(self) -> Path:
        """The file of the configuration of the same network."""
        return CONFIGS / CONFIG_OF_ORIGINALS[self.manifest["config"]]

    @property
    def config(self) -> Any:
        """The configuration of the same network."""
        return load_config(self.config_path)

    @property
    def num_classes(self) -> int:
        """K; the recordings are of COCO's classes where they do not say."""
        return self.manifest.get("num_classes", 80)

    @property
    def family(self) -> Family:
        """The family of the network."""
        return FAMILIES[self.config.model.family]

    @property
    def padded_size(self) -> tuple[int, int]:
        """The largest height and width of the batch, rounded up to multiples of 32."""
        sizes = np.array([image["net_hw"] for image in self.manifest["images"]])
        height, width = -(-sizes.max(0) // 32) * 32
        return int(height), int(width)

    @functools.cached_property
    def _functional(self) -> tuple[Any, Any, Any]:
        return functional(build_model(self.config.model, self.num_classes, None))

    @property
    def apply(self) -> Any:
        """The network as a pure function."""
        return self._functional[0]

    def model(self) -> tuple[Any, Any, Any]:
        """The network as a pure function, with the case's weights: apply, params, statistics."""
        if self.name not in _WEIGHTS:
            _WEIGHTS.clear()
            _, params, statistics = self._functional
            shapes, seed = self.manifest["state_dict"], self.manifest["weights_seed"]
            state_dict, names = golden_weights.make(shapes, seed), self.family.weights
            converted = original_to_ours(state_dict, params, statistics, names, source=self.name)
            _WEIGHTS[self.name] = converted
        return self.apply, *_WEIGHTS[self.name]

    @functools.cached_property
    def batch(self) -> Batch:
        """The images with their objects, padded to the batch's largest size."""
        height, width = self.padded_size
        entries = self.manifest["images"]
        count, most = len(entries), max(max(e.get("num_gt", 0) for e in entries), 1)
        images = np.zeros((count, height, width, 3), np.uint8)
        labels = np.zeros((count, most), np.int32)
        masks = np.zeros((count, most, height, width), bool)
        is_target = np.zeros((count, most), bool)
        for i, entry in enumerate(entries):
            h, w = entry["net_hw"]
            images[i, :h, :w] = golden_weights.image(h, w, entry["image_seed"])
            n = entry.get("num_gt", 0)
            if n:
                labels[i, :n], masks[i, :n, :h, :w] = golden_weights.instances(
                    h, w, n, self.num_classes, entry["gt_seed"]
                )
                masks[i, entry.get("empty_masks", [])] = False
                is_target[i, :n] = True
        sizes = np.array([entry["net_hw"] for entry in entries], np.int32)
        ids = np.arange(count, dtype=np.int64)
        is_sparseinst = self.config.model.family == "sparseinst"
        encoded = quarter(masks) if is_sparseinst else np.packbits(masks, axis=-1)
        return Batch(images, sizes, labels, encoded, is_target, ids)


def quarter(masks: np.ndarray) -> np.ndarray:
    """Sum the inner 2x2 pixels of every 4x4 block: bool [..., H, W] to uint8 [..., H/4, W/4]."""
    rows = masks[..., 1::4, :].astype(np.uint8) + masks[..., 2::4, :]
    return rows[..., 1::4] + rows[..., 2::4]


@functools.cache
def load(name: str) -> Case:
    """Read a case, or "case/batch" of one with several batches; nothing is unpickled."""
    folder, _, batch = name.partition("/")
    manifest = json.loads((GOLDEN / folder / "manifest.json").read_text())
    with np.load(GOLDEN / folder / "tensors.npz", allow_pickle=False) as archive:
        tensors = {key: archive[key] for key in archive.files}
    if batch:
        manifest |= manifest.pop("batches")[batch]
        tensors = {
            key.removeprefix(f"{batch}/"): x for key, x in tensors.items() if key.startswith(batch)
        }
    return Case(name, manifest, tensors)


@functools.cache
def forward(name: str) -> dict[str, np.ndarray]:
    """Run our network on a case: every named tensor in the original's layout and by its name."""
    outputs, ours = run(load(name))
    ours["pred_logits"] = np.asarray(outputs.class_logits)
    ours["pred_scores"] = np.asarray(outputs.objectness_logits)[..., None]
    ours["pred_masks"] = np.asarray(outputs.mask_logits)
    return ours


def run(case: Case, train: bool = False) -> tuple[Any, dict[str, np.ndarray]]:
    """Run our network on a case: its outputs, and the tensors on the way by the original's names.

    Maps are NCHW.
    """
    apply, params, statistics = case.model()
    batch = case.batch

    @jax.jit
    def forward(params, statistics, images, valid_size):
        named: dict[str, Any] = {}
        inputs = ops.normalize_images(images, valid_size)
        outputs, _ = apply(params, statistics, inputs, train=train, intermediates=named)
        return inputs, outputs, named

    inputs, outputs, named = forward(params, statistics, batch.images, batch.valid_size)
    ours = {key: to_nchw(np.asarray(value)) for key, value in named.items()}
    ours |= {theirs: ours[key] for theirs, key in OUR_NAMES.items() if key in ours}
    ours["input"] = to_nchw(np.asarray(inputs))
    return outputs, ours


OUR_NAMES = {
    **{f"backbone.{name}": name for name in ("res3", "res4", "res5")},
    **{f"backbone.{name}": name for name in ("csp2", "csp3", "csp4", "p2", "p3", "p4")},
    **{"stem_pool": "stem", "layer1": "res2", "backbone.res2": "res2"},  # of variant d
    "pred_kernel": "mask_kernels",
}


def to_nchw(value: np.ndarray) -> np.ndarray:
    """Channels before rows, for maps; other arrays stay."""
    return value.transpose(0, 3, 1, 2) if value.ndim == 4 else value
