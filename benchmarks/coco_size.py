"""What a data set of COCO's size costs: its index, a second start, workers, a day of plans.

Draws a json of the number of images and objects, the sizes and the polygons of COCO train2017
(about 450 MB; no image is made) into a folder outside of the repository, and measures every part in
a process of its own:

    taskset -c 0 python benchmarks/coco_size.py ~/coco_size
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

NUM_IMAGES, NUM_ANNOTATIONS, NUM_CROWD = 118_287, 860_001, 10_052
NUM_WITHOUT = 1021  # images without an annotation
CATEGORY_IDS = [number for number in range(1, 91) if number not in
                (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)]  # fmt: skip
SIZES = ((480, 640), (640, 480), (427, 640), (640, 427), (426, 640), (375, 500))
SIZE_WEIGHTS = (0.35, 0.13, 0.28, 0.1, 0.1, 0.04)
BATCH_SIZE, NUM_WORKERS, NUM_STEPS = 64, 4, 100_000


def main() -> None:
    """Measure and print a table and its numbers as json."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path, help="of the json and the cache; made if missing")
    parser.add_argument("--part", choices=sorted(PARTS), help=argparse.SUPPRESS)
    parser.add_argument("--steps", type=int, default=NUM_STEPS, help="steps to plan")
    arguments = parser.parse_args()
    path = arguments.folder / "train.json"
    if arguments.part:
        print(json.dumps(PARTS[arguments.part](path, arguments.steps)))
        return
    arguments.folder.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        draw_json(path)
    os.environ["SPARSEINST_INDEX_CACHE"] = str(arguments.folder / "index")
    for entry in (arguments.folder / "index").glob("*/*"):
        entry.unlink()
    found: dict[str, Any] = {
        "images": NUM_IMAGES,
        "annotations": NUM_ANNOTATIONS,
        "json bytes": path.stat().st_size,
        "cores": len(os.sched_getaffinity(0)),
        "load before": os.getloadavg()[0],
    }
    for part in PARTS:
        command = [sys.executable, __file__, str(arguments.folder), "--part", part]
        command += ["--steps", str(arguments.steps)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        found |= {f"{part}: {name}": value for name, value in json.loads(done.stdout).items()}
    print("| | |\n|---|---|")
    for name, value in found.items():
        print(f"| {name} | {value if isinstance(value, int) else round(value, 2)} |")
    print(json.dumps(found))


def draw_json(path: Path) -> None:
    """Write a json in the form, the order of keys and about the size of train2017's."""
    random = np.random.default_rng(0)
    sizes = np.array(SIZES)[random.choice(len(SIZES), NUM_IMAGES, p=SIZE_WEIGHTS)]
    ids = random.permutation(581_930)[:NUM_IMAGES] + 1
    with open(path, "w") as file:
        file.write('{"info": {"description": "drawn"},"licenses": [],"images": [')
        for place, (number, (height, width)) in enumerate(
            zip(ids.tolist(), sizes.tolist(), strict=True)
        ):
            name = f"{number:012d}"
            file.write(
                f'{"," * bool(place)}{{"license": 3,"file_name": "{name}.jpg","coco_url": '
                f'"http://images.example.org/train2017/{name}.jpg","height": {height},"width": '
                f'{width},"date_captured": "2013-11-14 11:18:45","flickr_url": '
                f'"http://farm9.example.com/8186/{name}_4e622c8349_z.jpg","id": {number}}}'
            )
        file.write('],"annotations": [')
        for place, text in enumerate(_annotations(random, ids, sizes)):
            file.write("," * bool(place) + text)
        names = ",".join(
            f'{{"supercategory": "thing","id": {number},"name": "class {number}"}}'
            for number in CATEGORY_IDS
        )
        file.write(f'],"categories": [{names}]}}')


def _annotations(random: np.random.Generator, ids: np.ndarray, sizes: np.ndarray) -> Iterator[str]:
    """Objects of 7.3 to an image in the mean and 93 at most, the crowd regions last."""
    weights = random.gamma(1.0, 1.0, NUM_IMAGES)
    weights[random.permutation(NUM_IMAGES)[:NUM_WITHOUT]] = 0
    owners = random.choice(NUM_IMAGES, NUM_ANNOTATIONS, p=weights / weights.sum())
    categories = random.choice(CATEGORY_IDS, NUM_ANNOTATIONS)
    corners = np.clip(random.lognormal(3.05, 0.65, NUM_ANNOTATIONS), 4, 400).astype(int)
    for number, owner in enumerate(owners.tolist()):
        height, width = sizes[owner].tolist()
        tail = f'"image_id": {ids[owner]},"category_id": {categories[number]},"id": {number + 1}}}'
        if number >= NUM_ANNOTATIONS - NUM_CROWD:
            runs = random.multinomial(height * width, np.full(301, 1 / 301)).tolist()
            yield (
                f'{{"segmentation": {{"counts": {json.dumps(runs)},"size": [{height},{width}]}},'
                f'"area": {sum(runs[1::2])},"iscrowd": 1,"bbox": [0,0,{width},{height}],' + tail
            )
            continue
        part = int(corners[number])
        angle = np.linspace(0, 2 * np.pi, part, endpoint=False)
        radius = random.uniform(0.7, 1.0, part) * random.uniform(0.02, 0.5)
        x = np.clip((0.5 + radius * np.cos(angle)) * width, 0, width)
        y = np.clip((0.5 + radius * np.sin(angle)) * height, 0, height)
        text = ",".join(map("%.2f".__mod__, np.stack([x, y], 1).reshape(-1).tolist()))
        yield (
            f'{{"segmentation": [[{text}]],"area": {x.std() * y.std() * 4},"iscrowd": 0,"bbox": '
            f"[{x.min():.2f},{y.min():.2f},{np.ptp(x):.2f},{np.ptp(y):.2f}]," + tail
        )


def _load(path: Path) -> Any:
    from sparseinst_jax.data import coco

    start = time.perf_counter(), time.process_time()
    dataset = coco.load_coco(path, None, keep_empty=False)
    seconds = time.perf_counter() - start[0], time.process_time() - start[1]
    assert dataset.num_targets.sum() == NUM_ANNOTATIONS - NUM_CROWD
    return dataset, {"seconds": seconds[0], "CPU seconds": seconds[1], "peak GB": _peak()}


def measure_index(path: Path, _: int) -> dict[str, float]:
    """Read the json, with nothing kept of it."""
    return _load(path)[1]


def measure_start(path: Path, _: int) -> dict[str, float]:
    """Start again: hash the json and open what is kept."""
    return _load(path)[1]


def measure_workers(path: Path, _: int) -> dict[str, float]:
    """Open the records in worker processes and read all of them there, as batches would."""
    from multiprocessing import get_context

    dataset, _ = _load(path)
    os.sync()  # file pages that are not on the disk yet count as a process's own
    context = get_context("spawn")
    found: dict[str, float] = {}
    for name, records in (("without records", []), ("with records", dataset.records)):
        with tempfile.TemporaryDirectory() as folder:
            workers = [
                context.Process(target=_read_all, args=(records, number, folder))
                for number in range(NUM_WORKERS)
            ]
            for worker in workers:
                worker.start()
            for worker in workers:
                worker.join()
            memory = [json.loads(file.read_text()) for file in Path(folder).iterdir()]
        assert len(memory) == NUM_WORKERS
        for key in memory[0]:
            found[f"{NUM_WORKERS} workers {name}, sum of {key}"] = sum(m[key] for m in memory)
    return found


def _read_all(records: Any, number: int, folder: str) -> None:
    """Make every fourth record, then write down this process's memory."""
    for place in range(number, len(records), NUM_WORKERS):
        _ = records[place].targets
    (Path(folder) / str(number)).write_text(json.dumps(_memory()))


def measure_plan(path: Path, steps: int) -> dict[str, float]:
    """Plan steps of a training run; its memory at the start, half way and at the end."""
    from sparseinst_jax.data.plan import TrainPlan

    dataset, _ = _load(path)
    plan = TrainPlan(
        dataset.image_sizes,
        dataset.num_targets,
        seed=0,
        batch_size=BATCH_SIZE,
        train_sizes=tuple(range(416, 641, 32)),
        train_max_size=853,
    )
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
    return {
        "private MB": sizes["Private_Dirty:"],
        "file pages of one process alone MB": sizes["Private_Clean:"],
        "shared MB": sizes["Shared_Clean:"] + sizes["Shared_Dirty:"],
    }


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


PARTS: dict[str, Callable[[Path, int], dict[str, float]]] = {
    "first start": measure_index,
    "second start": measure_start,
    "workers": measure_workers,
    "plans": measure_plan,
}

if __name__ == "__main__":
    main()
