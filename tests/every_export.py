"""Export every published network, and compare each file with the package in both runtimes.

Weights are those of the golden checks (`tests/parity/golden_weights.py`): they find objects where
random ones make masks without an edge. Each file also computes two images together, which must give
what each gives alone.

  python -m tests.every_export narrow     all published networks x norms x normalizers, minutes
  python -m tests.every_export full       as published, at full width, on photos at eval size
  python -m tests.every_export full --short-side 256        the same on smaller ones, sooner
  python -m tests.every_export full --table table.md        also writes the table of docs/export.md
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from sparseinst_jax.export import verify
from sparseinst_jax.models.layers import NORMS
from sparseinst_jax.runner.file_predictor import FilePredictor
from sparseinst_jax.runtime import process
from sparseinst_jax.setup.config import load_config
from tests import exporting
from tests.parity import golden_weights

RUNTIMES = ("onnxruntime", "openvino")
PHOTOS = ((449, 640), (640, 480), (500, 500))
TOGETHER = {"onnxruntime": 0.0, "openvino": 2e-4}  # how far two images may differ from one
TABLE = """\
| | MB | objects | onnxruntime: masks | scores | pixels | two = one | openvino: masks | scores \
| pixels | two = one |
|---|---|---|---|---|---|---|---|---|---|---|
"""


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
    for name in exporting.published(load_config):
        config = load_config(name, {"model.dtype": "float32"})
        if short_side:
            longest = config.data.eval_size[1] * short_side // config.data.eval_size[0]
            config.data.eval_size = (short_side, longest)
        yield name, config, [golden_weights.image(*size, 3) for size in PHOTOS]


def together_against_alone(exported: FilePredictor, photo: np.ndarray) -> float:
    """Largest difference that an image beside it makes to a photo's results."""
    items = [exported.prepare(image) for image in (photo, photo[:, ::-1])]
    size = exported.padded_size(items[0])
    together = exported.select(items, size)
    alone = [exported.select([item], size) for item in items]
    worst = 0.0
    for name, values in together.items():
        single = np.concatenate([one[name] for one in alone])
        worst = max(worst, float(np.abs(np.subtract(values, single, dtype=np.float64)).max()))
    return worst


def main() -> int:
    """Print one line for each network and runtime; returns 1 where one disagrees."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("which", choices=("narrow", "full"))
    parser.add_argument("--only", nargs="+", default=[""], help="parts of names, in this order")
    parser.add_argument("--short-side", type=int, default=0, help="of resized photos, pixels")
    parser.add_argument("--table", type=Path, help="a file that gets a row for each network")
    arguments = parser.parse_args()
    failed, rows = 0, [TABLE]
    networks = list(narrow() if arguments.which == "narrow" else full(arguments.short_side))
    chosen = {
        network[0]: network for part in arguments.only for network in networks if part in network[0]
    }
    for name, config, photos in chosen.values():
        source = exporting.predictor_of(config).exportable()
        start = time.monotonic()
        content = exporting.written(config).SerializeToString()
        print(f"{name}: {len(content) / 1e6:.1f} MB in {time.monotonic() - start:.1f} s")
        cells = [f"`{name}`", f"{len(content) / 1e6:.0f}"]
        for runtime in RUNTIMES:
            exported = FilePredictor(content, runtime)
            agreement = verify.compare(source.model, exported, photos)
            if runtime == "openvino":  # it adds in another order than onnxruntime; seen: 1.1e-5
                scores = agreement.scores if agreement.scores > 3e-5 else 0.0
                faults = agreement._replace(scores=scores).faults()
            else:
                faults = agreement.faults()
            gap = together_against_alone(exported, photos[0])
            faults += [f"two images together differ by {gap:.2g}"] * (gap > TOGETHER[runtime])
            failed += bool(faults)
            print(f"  {runtime}: {'; '.join(faults) or 'agrees'}: {agreement}", end="")
            print(f"; two together within {gap:.1e}", flush=True)
            cells += [str(agreement.candidates)] * (runtime == RUNTIMES[0])
            cells += [f"{value:.1e}" for value in (agreement.mask_probs, agreement.scores)]
            cells += [f"{agreement.pixels:.1e}", f"{gap:.0e}" if gap else "0"]
        rows.append(f"| {' | '.join(cells)} |\n")
        if arguments.table:  # after each: a run takes long
            arguments.table.write_text("".join(rows))
        jax.clear_caches()
    return int(failed > 0)


if __name__ == "__main__":
    process.prepare_process()
    raise SystemExit(main())
