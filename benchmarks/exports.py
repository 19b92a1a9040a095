"""Export every published network, and compare each file with the package in both runtimes.

Weights are those of the golden checks (`tests/parity/golden_weights.py`): they find objects where
random ones make masks without an edge.

  python -m benchmarks.exports narrow     all published networks x norms x normalizers, minutes
  python -m benchmarks.exports full       as published, at full width, on photos at eval size
  python -m benchmarks.exports full --short-side 256        the same on smaller ones, sooner
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Iterator
from typing import Any

import jax

from sparseinst_jax.export import verify
from sparseinst_jax.models.layers import NORMS
from sparseinst_jax.runner.file_predictor import FilePredictor
from sparseinst_jax.runtime import process
from sparseinst_jax.setup.config import load_config
from tests import exporting
from tests.parity import golden_weights

RUNTIMES = ("onnxruntime", "openvino")
PHOTOS = ((449, 640), (640, 480), (500, 500))


def narrow() -> Iterator[tuple[str, Any, list[Any]]]:
    """Name, configuration and photos of every published network with every norm and normalizer."""
    for name in exporting.published():
        published = exporting.narrow(name)
        norms = NORMS if "norm" in published.model.backbone else [None]
        normalizers = ("sigmoid", "softmax") if "normalizer" in published.model else (None,)
        for norm, normalizer in itertools.product(norms, normalizers):
            changes = {} if normalizer is None else {"normalizer": normalizer}
            config = exporting.narrow(name, norm=norm, **changes)
            yield f"{name} {norm or ''} {normalizer or ''}", config, exporting.photos()


def full(short_side: int) -> Iterator[tuple[str, Any, list[Any]]]:
    """The same of every published network at full size."""
    for name in exporting.published():
        config = load_config(name, {"model.dtype": "float32"})
        if short_side:
            longest = config.data.eval_size[1] * short_side // config.data.eval_size[0]
            config.data.eval_size = (short_side, longest)
        yield name, config, [golden_weights.image(*size, 3) for size in PHOTOS]


def main() -> int:
    """Print one line for each network and runtime; returns 1 where one disagrees."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("which", choices=("narrow", "full"))
    parser.add_argument("--only", default="", help="a part of the name")
    parser.add_argument("--short-side", type=int, default=0, help="of resized photos, pixels")
    arguments = parser.parse_args()
    failed = 0
    networks = narrow() if arguments.which == "narrow" else full(arguments.short_side)
    for name, config, photos in networks:
        if arguments.only not in name:
            continue
        source = exporting.predictor_of(config).exportable()
        start = time.monotonic()
        content = exporting.written(config).SerializeToString()
        print(f"{name}: {len(content) / 1e6:.1f} MB in {time.monotonic() - start:.1f} s")
        for runtime in RUNTIMES:
            agreement = verify.compare(source.model, FilePredictor(content, runtime), photos)
            if runtime == "openvino":  # it adds in another order than onnxruntime; seen: 1.1e-5
                scores = agreement.scores if agreement.scores > 3e-5 else 0.0
                faults = agreement._replace(scores=scores).faults()
            else:
                faults = agreement.faults()
            failed += bool(faults)
            print(f"  {runtime}: {'; '.join(faults) or 'agrees'}: {agreement}", flush=True)
        jax.clear_caches()
    return int(failed > 0)


if __name__ == "__main__":
    process.prepare_process()
    raise SystemExit(main())
