"""What a data set of COCO's size costs: its index, a second start, workers, a day of plans.

Draws a json of the number of images and objects, the sizes and the polygons of COCO train2017
(about 450 MB; no image is made) into a folder outside of the repository, and measures every part in
a process of its own:

    taskset -c 0 python benchmarks/coco_size.py ~/coco_size
"""

import argparse
import json
import multiprocessing
import os
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

NUM_IMAGES, NUM_ANNOTATIONS, NUM_CROWD = 118_287, 860_001, 10_052
NUM_WITHOUT = 1021  # images without an annotation
CATEGORY_IDS = sorted({*range(1, 91)} - {12, 26, 29, 30, 45, 66, 68, 69, 71, 83})
SIZES = ((480, 640), (640, 480), (427, 640), (640, 427), (426, 640), (375, 500))
SIZE_WEIGHTS = (0.35, 0.13, 0.28, 0.1, 0.1, 0.04)
BATCH_SIZE, NUM_WORKERS = 64, 4


def draw_json(path: Path) -> None:
    """Write a json in the form, the order of keys and about the size of train2017's."""
    random = np.random.default_rng(0)
    sizes = np.array(SIZES)[random.choice(len(SIZES), NUM_IMAGES, p=SIZE_WEIGHTS)].tolist()
    ids = (random.permutation(581_930)[:NUM_IMAGES] + 1).tolist()
    categories = [{"supercategory": "thing", "id": n, "name": f"class {n}"} for n in CATEGORY_IDS]
    parts = {
        "images": (_image(n, *size) for n, size in zip(ids, sizes, strict=True)),
        "annotations": _annotations(random, ids, sizes),
        "categories": iter(categories),
    }
    with open(path, "w") as file:
        file.write('{"info": {"description": "drawn"},"licenses": []')
        for name, entries in parts.items():
            file.write(f',"{name}": [{json.dumps(next(entries))}')
            file.writelines("," + json.dumps(entry, separators=(",", ": ")) for entry in entries)
            file.write("]")
        file.write("}")


def _image(number: int, height: int, width: int) -> dict[str, Any]:
    name = f"{number:012d}"
    links = {"coco_url": f"http://images.example.org/train2017/{name}.jpg"}
    size = {"height": height, "width": width, "date_captured": "2013-11-14 11:18:45"}
    links |= size | {"flickr_url": f"http://farm9.example.com/8186/{name}_4e622c8349_z.jpg"}
    return {"license": 3, "file_name": f"{name}.jpg", **links, "id": number}


def _annotations(random: np.random.Generator, ids: list, sizes: list) -> Iterator[dict[str, Any]]:
    """Objects of 7.3 to an image in the mean and 93 at most, the crowd regions last."""
    weights = random.gamma(1.0, 1.0, NUM_IMAGES)
    weights[random.permutation(NUM_IMAGES)[:NUM_WITHOUT]] = 0
    owners = random.choice(NUM_IMAGES, NUM_ANNOTATIONS, p=weights / weights.sum())
    categories = random.choice(CATEGORY_IDS, NUM_ANNOTATIONS).tolist()
    corners = np.clip(random.lognormal(3.05, 0.65, NUM_ANNOTATIONS), 4, 400).astype(int).tolist()
    for number, owner in enumerate(owners.tolist()):
        height, width = sizes[owner]
        tail = {"image_id": ids[owner], "category_id": categories[number], "id": number + 1}
        if number >= NUM_ANNOTATIONS - NUM_CROWD:
            runs = random.multinomial(height * width, np.full(301, 1 / 301)).tolist()
            shape = {"segmentation": {"counts": runs, "size": [height, width]}}
            shape |= {"area": sum(runs[1::2]), "iscrowd": 1, "bbox": [0, 0, width, height]}
        else:
            angle = np.linspace(0, 2 * np.pi, corners[number], endpoint=False)
            radius = random.uniform(0.7, 1.0, len(angle)) * random.uniform(0.02, 0.5)
            x = np.clip((0.5 + radius * np.cos(angle)) * width, 0, width).round(2)
            y = np.clip((0.5 + radius * np.sin(angle)) * height, 0, height).round(2)
            box = [x.min(), y.min(), np.ptp(x).round(2), np.ptp(y).round(2)]
            shape = {"segmentation": [np.stack([x, y], 1).reshape(-1).tolist()]}
            shape |= {"area": x.std() * y.std() * 4, "iscrowd": 0, "bbox": box}
        yield shape | tail


def measure_start(path: Path, _: int) -> dict[str, float]:
    """Read the json, or hash it and open what is kept; nothing else."""
    return _load(path)[1]


def _load(path: Path) -> Any:
    from sparseinst_jax.data import coco

    start = time.perf_counter()
    dataset = coco.load_coco(path, None, keep_empty=False)
    seconds = time.perf_counter() - start
    assert dataset.num_targets.sum() == NUM_ANNOTATIONS - NUM_CROWD
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    return dataset, {"seconds": seconds, "peak GB": peak}


def measure_workers(path: Path, _: int) -> dict[str, float]:
    """Open the records in worker processes and read all of them there, as batches would."""
    dataset, _ = _load(path)
    os.sync()  # file pages that are not on the disk yet count as a process's own
    found: dict[str, float] = {}
    for name, records in (("without records", []), ("with records", dataset.records)):
        parts = [(records, number) for number in range(NUM_WORKERS)]
        with multiprocessing.get_context("spawn").Pool(NUM_WORKERS) as pool:
            memory = pool.starmap(_read_part, parts, chunksize=1)
        for key in memory[0]:
            found[f"{NUM_WORKERS} workers {name}, sum of {key}"] = sum(m[key] for m in memory)
    return found


def _read_part(records: Any, number: int) -> dict[str, float]:
    """Make every fourth record; returns this process's memory."""
    for place in range(number, len(records), NUM_WORKERS):
        _ = records[place].targets
    time.sleep(1)  # so that every process takes one part
    return _memory()


def measure_plan(path: Path, steps: int) -> dict[str, float]:
    """Plan steps of a training run; its memory at the start, half way and at the end."""
    from sparseinst_jax.data.plan import TrainPlan

    dataset, _ = _load(path)
    sizes = {"train_sizes": tuple(range(416, 641, 32)), "train_max_size": 853}
    images = dataset.image_sizes, dataset.num_targets
    plan = TrainPlan(*images, seed=0, batch_size=BATCH_SIZE, **sizes)
    found: dict[str, float] = {}
    start = time.perf_counter()
    for step in range(steps):
        plan.batch(step)
        if step + 1 in (steps // 50, steps // 2, steps):
            found[f"private MB after {step + 1} steps"] = _memory()["private MB"]
    return {**found, "ms a step": 1e3 * (time.perf_counter() - start) / steps}


def _memory() -> dict[str, float]:
    """What this process holds.

    Pages of a file that no other process happens to have read count as private; they are the
    system's to drop, and no copies.
    """
    text = Path(f"/proc/{os.getpid()}/smaps_rollup").read_text()
    sizes = {line.split()[0]: int(line.split()[1]) / 1e3 for line in text.splitlines()[1:]}
    alone = {"file pages of one process alone MB": sizes["Private_Clean:"]}
    return {"private MB": sizes["Private_Dirty:"], **alone}


PARTS = {
    "first start": measure_start,
    "second start": measure_start,
    "workers": measure_workers,
    "plans": measure_plan,
}


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path, help="of the json and the cache; made if missing")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--steps", type=int, default=100_000, help="steps to plan")
    given = parser.parse_args()
    path, index = given.folder / "train.json", given.folder / "index"
    if given.part:
        print(json.dumps(PARTS[given.part](path, given.steps)))
        return
    given.folder.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        draw_json(path)
    os.environ["SPARSEINST_INDEX_CACHE"] = str(index)
    for entry in index.glob("*/*"):
        entry.unlink()
    found = {"json bytes": path.stat().st_size, "cores": len(os.sched_getaffinity(0))}
    found["load before"] = os.getloadavg()[0]
    for part in PARTS:
        command = [sys.executable, __file__, str(given.folder), "--part", part]
        command += ["--steps", str(given.steps)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        found |= {f"{part}: {name}": value for name, value in json.loads(done.stdout).items()}
    print("| | |\n|---|---|")
    for name, value in found.items():
        print(f"| {name} | {value if isinstance(value, int) else round(value, 2)} |")


if __name__ == "__main__":
    main()
