"""What users get wrong, through the real command line: a message, a cure, nothing half-made."""

import json
import os
import shutil
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image

from sparseinst_jax.checkpoints.state import TrainState
from sparseinst_jax.checkpoints.store import Checkpoints
from sparseinst_jax.data.plan import TrainPlan
from sparseinst_jax.data.shapes import draw_shapes_dataset
from sparseinst_jax.models.sparseinst.weights import NAMES
from sparseinst_jax.models.trees import functional
from sparseinst_jax.setup import builders
from sparseinst_jax.setup.config import load_config
from sparseinst_jax.weights.convert import ours_to_original
from tests.end_to_end import forked as forked_commands

ROOT = Path(__file__).parents[2]
TINY = ROOT / "configs" / "tiny.py"
NUM_IMAGES, BATCH_SIZE = 6, 2


class Case(NamedTuple):
    """A command line and what must come of it.

    Attributes:
        arguments: `{w}` stands for the folder of bad inputs, `{out}` for a new empty folder.
        message: parts of what is printed to stderr.
        made: names in `{out}` afterwards, by default none.
        is_first: whether the message is all that stderr holds; not where progress is shown.
    """

    arguments: str
    message: tuple[str, ...]
    made: tuple[str, ...] = ()
    is_first: bool = True


TRAIN = "train --config={tiny} --workdir={out}/run "
DATA = (
    "--config.data.generator= --config.data.train.images={w}/d/images/train "
    "--config.data.train.annotations={w}/d/train.json --config.data.val.images={w}/d/images/val "
    "--config.data.val.annotations={w}/d/val.json "
)
TRAIN_JSON = TRAIN + DATA + "--config.data.train.annotations={w}/"
EVAL = "eval --workdir={w}/run --output={out} "
EVAL_WEIGHTS = "eval --config={tiny} --output={out} " + DATA
IS_FILE = "{w}/file is a file, not a folder. Give another one by "
CASES = {
    "unknown key": Case(
        TRAIN + "--config.train.learnin_rate=1",
        ("--config.train.learnin_rate is not a key", "Did you mean --config.train.learning_rate?"),
    ),
    "unknown key in a configuration file": Case(
        "train --config={w}/mine.py --workdir={out}/run",
        ('mine.py, line 4: there is no key "learnin_rate". Did you mean "learning_rate"?',),
    ),
    "impossible values": Case(
        TRAIN + DATA + "--config.model.backbone.norm=layer --config.model.num_masks=0",
        ("model.backbone.norm must be one of", "got 'layer'", "model.num_masks must be at least 1"),
    ),
    "json of 0 bytes": Case(
        TRAIN_JSON + "zero.json",
        ("annotations file {w}/zero.json is empty (0 bytes)", "to a COCO instance json"),
    ),
    "json without keys": Case(
        TRAIN_JSON + "bare.json",
        ("{w}/bare.json is not a COCO annotation file", "expected lists under 'images'", "{}"),
    ),
    "json of another tool": Case(
        TRAIN_JSON + "labelme.json",
        ("labelme.json is not a COCO annotation file", "sparseinst import-data labelme"),
    ),
    "json without images": Case(TRAIN_JSON + "no_images.json", ("'images' is empty",)),
    "json cut off": Case(TRAIN_JSON + "cut.json", ("cut.json is not a whole json", "line 1")),
    "only crowd regions": Case(
        TRAIN_JSON + "crowd.json --config.data.keep_empty=False",
        ("nothing to learn: none of the 6 images", "crowd regions", "Annotate some"),
    ),
    "no objects": Case(
        TRAIN_JSON + "empty.json",
        ("nothing to learn: {w}/empty.json has 6 images and no object", "Annotate some"),
    ),
    "no objects to validate with": Case(
        TRAIN + DATA + "--config.data.val.annotations={w}/crowd.json --config.data.val.images="
        "{w}/d/images/train --config.train.eval_every=2",
        ("crowd.json has no object to score against", "--config.train.eval_every=0"),
    ),
    "missing image": Case(
        TRAIN_JSON + "missing.json",
        (
            "image 3: the file {w}/d/images/train/gone.png does not exist",
            "config.data.train.images",
        ),
    ),
    "truncated JPEG in training": Case(
        TRAIN_JSON.replace("{tiny}", "tests/smallest.py")
        + "jpg.json --config.data.train.images={w}/jpg "
        "--config.train.checkpoint_every=0",
        ("{w}/jpg/{last}.jpg cannot be read", "truncated", "replace the file", "check-data"),
        made=("run/checkpoints/2", "run/config.json", "run/metrics.csv"),
    ),
    "workdir is a file": Case(
        "train --config={tiny} --workdir={w}/file " + DATA, (IS_FILE + "--workdir",)
    ),
    "workdir below a file": Case(
        "train --config={tiny} --workdir={w}/file/run " + DATA, (IS_FILE + "--workdir",)
    ),
    "nothing to start from": Case(
        TRAIN + DATA + "--init-from={w}/nowhere.npz",
        ("no weights to start from at {w}/nowhere.npz", ".npz or .safetensors"),
    ),
    "start from another network": Case(
        TRAIN + DATA + "--init-from={w}/weights.npz --config.model.backbone.width=16",
        ("does not fit the backbone", "at least 90%", "--config.model.backbone.width=8"),
    ),
    "continue with another network": Case(
        "train --config={tiny} --workdir={w}/run --config.model.num_masks=11 " + DATA,
        ("model.num_masks: 10 in the run, 11 now", "Give another --workdir"),
    ),
    "weights with missing and extra names": Case(
        EVAL_WEIGHTS + "--weights={w}/strange.npz",
        (
            "1 in the file but not in the model: extra.weight",
            "in the model but not in the file: decoder.mask_branch.projection.bias (8,)",
        ),
    ),
    "weights of another class count": Case(
        EVAL_WEIGHTS + "--weights={w}/weights.npz --config.data.val.annotations={w}/four.json",
        ("model with 3 classes, {w}/four.json has 4", "--config.data.val.annotations"),
    ),
    "checkpoint of other classes": Case(
        EVAL + "--config.data.val.annotations={w}/foreign.json",
        ("foreign.json has none of the model's classes", "is it the right json?"),
    ),
    "checkpoint as another network": Case(
        EVAL + "--config.model.num_groups=2",
        ("another network than the checkpoint", "leave the other overrides out"),
    ),
    "no checkpoint": Case(
        "predict --workdir={w}/d {w}/jpg --output={out}",
        ("no checkpoint in {w}/d", "Train first, or give the right path"),
    ),
    "images that are missing in evaluation": Case(
        EVAL + "--config.data.val.images={w}/jpg",
        ("2 of 2 images of {w}/d/val.json are missing", "config.data.val.images"),
    ),
    "truncated JPEG in evaluation": Case(
        EVAL + "--config.data.val.annotations={w}/jpg.json --config.data.val.images={w}/jpg",
        ("{w}/jpg/{last}.jpg cannot be read", "truncated", "replace the file"),
        is_first=False,
    ),
    "output is a file": Case(
        "eval --workdir={w}/run --output={w}/file", (IS_FILE + "--output", "move the file away")
    ),
    "images that lead out of their folder": Case(
        TRAIN_JSON + "outside.json",
        (
            "file_name '../file' leads upwards by '..'; move the images into the image folder",
            "file_name '/etc/passwd' is an absolute path",
            "is an address, not a file: nothing is downloaded",
            "file_name 'a\\x1b[2J' holds the control character",
        ),
    ),
    "masks and numbers made to do harm": Case(
        TRAIN_JSON + "harm.json",
        (
            "run lengths sum to 18446744073709551616, not to height x width",
            "compressed run lengths that cannot be decoded",
            "a coordinate is NaN or infinite",
            "the name '\\x1b[31mred' holds the control character",
        ),
    ),
    "results made to do harm": Case(
        EVAL + "--predictions={w}/harm_results.json",
        (
            "3 of 3 detections",
            "detection 0 has a mask that cannot be read: compressed run lengths",
            "detection 1 has the score inf",
            "detection 2 is of image",
        ),
    ),
    "a checkpoint with a link in it": Case(
        "predict --workdir={w}/linked {w}/jpg --output={out}",
        ("it holds a symbolic link", "copy the checkpoint with its files"),
        is_first=False,
    ),
    "images that are bombs, pipes and programs": Case(
        "predict --workdir={w}/run {w}/bomb.png {w}/pipe.png {w}/program.png --output={out}",
        (
            "bomb.png cannot be read (Image size (10000000000 pixels) exceeds limit",
            "pipe.png is a pipe; expected a file",
            "program.png cannot be read: it is damaged, no image, or of a kind that is not read",
        ),
        made=("predictions.json",),
        is_first=False,
    ),
    "results that are none": Case(
        EVAL + "--predictions={w}/results.json",
        ("2 of 2 detections", "detection 0 is a int", "detection 1 has the score 'high'"),
    ),
    "results against crowd regions": Case(
        EVAL + "--predictions={w}/nothing.json --config.data.val.annotations={w}/crowd.json",
        ("annotations with objects to score against", "crowd.json"),
    ),
    "unreadable sources in prediction": Case(
        "predict --workdir={w}/run {w}/text.png {w}/jpg --output={out}",
        (
            "failed: image {w}/text.png cannot be read",
            "failed: image {w}/jpg/{last}.jpg cannot be read",
        ),
        made=("predictions.json", "{first}.png"),
        is_first=False,
    ),
    "missing sources in prediction": Case(
        "predict --workdir={w}/run {w}/jpg {w}/nowhere.png {w}/*.heif --output={out}",
        (
            "2 of the images do not exist, so nothing was predicted",
            "{w}/nowhere.png",
            "{w}/*.heif (no file matches)",
        ),
    ),
    "an address in prediction": Case(
        "predict --workdir={w}/run https://example.org/a.jpg --output={out}",
        ("'https://example.org/a.jpg' is an address, not a file, and nothing is downloaded",),
    ),
    "a threshold in percent": Case(
        "predict --workdir={w}/run {w}/jpg --output={out} --score-threshold=30",
        ("--score-threshold: a score threshold must be 0 to 1, got 30: 30 percent is 0.3",),
    ),
    "a threshold in percent in evaluation": Case(
        EVAL + "--score-threshold=30", ("must be 0 to 1, got 30: 30 percent is 0.3",)
    ),
    "a stored threshold in percent": Case(
        EVAL + "--config.eval.score_threshold=30", ("eval.score_threshold must be 0 to 1, got 30",)
    ),
    "no image to predict": Case(
        "predict --workdir={w}/run {w}/run --output={out}",
        ("no image in {w}/run: give image files or folders",),
    ),
    "output of prediction is a file": Case(
        "predict --workdir={w}/run {w}/jpg --output={w}/file", (IS_FILE + "--output",)
    ),
    "check of a json that is none": Case(
        "check-data {w}/zero.json --images {w}/jpg --output {out}/page",
        ("zero.json is empty (0 bytes)",),
    ),
    "import from nowhere": Case(
        "import-data yolo {w}/nowhere --output {out}/train.json", ("{w}/nowhere",)
    ),
}

# Each script once as users start it; all others in processes forked from one, see `forked.py`.
ALONE = ("unknown key", "truncated JPEG in evaluation", "unreadable sources in prediction")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Make every bad input once, and a run with a checkpoint of random weights."""
    folder = tmp_path_factory.mktemp("bad")
    draw_shapes_dataset(folder / "d", num_train=NUM_IMAGES, num_val=2, image_size=(64, 64))
    (folder / "file").write_text("not a folder")
    (folder / "text.png").write_text("not an image")
    (folder / "mine.py").write_text(
        "from sparseinst_jax.configs import tiny\n"
        "def get_config():\n    config = tiny.get_config()\n"
        "    config.train.learnin_rate = 1\n    return config\n"
    )
    _write_jsons(folder)
    _write_harm(folder)
    names = _write_jpegs(folder)
    _write_run(folder)
    shutil.copytree(folder / "run", folder / "linked")
    (folder / "linked" / "checkpoints" / "1" / "model" / "link").symlink_to(folder / "file")
    return folder, names


def _write_jsons(folder):
    train = json.loads((folder / "d" / "train.json").read_text())
    images, objects = train["images"], train["annotations"]
    foreign = [{**c, "name": f"foreign {c['id']}"} for c in train["categories"]]
    contents = {
        "bare": {},
        "labelme": {"version": "5.0", "shapes": [], "imagePath": "a.png", "imageHeight": 3},
        "no_images": {**train, "images": [], "annotations": []},
        "crowd": {**train, "annotations": [{**entry, "iscrowd": 1} for entry in objects]},
        "empty": {**train, "annotations": []},
        "missing": {
            **train,
            "images": [e | {"file_name": "gone.png"} if e["id"] == 3 else e for e in images],
        },
        "four": {**train, "categories": [*train["categories"], {"id": 99, "name": "fourth"}]},
        "foreign": {**train, "categories": foreign},
        "results": [
            1,
            {"image_id": 1, "category_id": 1, "score": "high", "segmentation": {"size": [64, 64]}},
        ],
        "nothing": [],
    }
    for name, content in contents.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    (folder / "zero.json").write_text("")
    (folder / "cut.json").write_text(json.dumps(train)[:-40])


def _write_harm(folder):
    """Write data sets, results and images that are made to do harm."""
    train = json.loads((folder / "d" / "train.json").read_text())
    names = ("../file", "/etc/passwd", "https://example.org/a.png", "a\x1b[2J")
    outside = [e | {"file_name": n} for e, n in zip(train["images"], names, strict=False)]
    (folder / "outside.json").write_text(json.dumps({**train, "images": outside}))
    size = [64, 64]
    masks = [
        {"size": size, "counts": [2**64]},
        {"size": size, "counts": "o"},
        [[float("inf"), 1, 2, 3, 4, 5]],
    ]
    entries = [e | {"segmentation": m} for e, m in zip(train["annotations"], masks, strict=False)]
    categories = [train["categories"][0] | {"name": "\x1b[31mred"}, *train["categories"][1:]]
    harm = {**train, "annotations": entries, "categories": categories}
    (folder / "harm.json").write_text(json.dumps(harm))
    image_id = json.loads((folder / "d" / "val.json").read_text())["images"][0]["id"]
    found = {"image_id": image_id, "category_id": 1, "score": 0.5, "segmentation": masks[1]}
    results = [found, found | {"score": float("inf")}, found | {"image_id": 2**70}]
    (folder / "harm_results.json").write_text(json.dumps(results))
    header = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    check = struct.pack(">I", zlib.crc32(b"IHDR" + header))
    start = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", len(header))
    end = struct.pack(">I", 0) + b"IDAT" + struct.pack(">I", zlib.crc32(b"IDAT"))
    (folder / "bomb.png").write_bytes(start + b"IHDR" + header + check + end)
    (folder / "program.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n(x) run\n")
    os.mkfifo(folder / "pipe.png")


def _write_jpegs(folder):
    """Write the images as JPEG, that which training reads last cut in half; names of two."""
    content = json.loads((folder / "d" / "train.json").read_text())
    (folder / "jpg").mkdir()
    for entry in content["images"]:
        image = Image.open(folder / "d" / "images" / "train" / entry["file_name"]).convert("RGB")
        entry["file_name"] = Path(entry["file_name"]).stem + ".jpg"
        image.save(folder / "jpg" / entry["file_name"])
    (folder / "jpg.json").write_text(json.dumps(content))
    sizes = [(entry["height"], entry["width"]) for entry in content["images"]]
    plan = TrainPlan(
        np.array(sizes),
        np.ones(len(sizes)),
        seed=0,
        batch_size=BATCH_SIZE,
        train_sizes=(64,),
        train_max_size=96,
    )
    last = content["images"][plan.batch(2).images[-1].position]["file_name"]
    first = content["images"][plan.batch(0).images[0].position]["file_name"]
    whole = (folder / "jpg" / last).read_bytes()
    (folder / "jpg" / last).write_bytes(whole[: len(whole) // 2])
    return {"first": Path(first).stem, "last": Path(last).stem}


def _write_run(folder):
    overrides = {
        f"data.{split}.{key}": str(folder / "d" / name)
        for split in ("train", "val")
        for key, name in (("annotations", f"{split}.json"), ("images", f"images/{split}"))
    }
    config = load_config(TINY, {**overrides, "data.generator": ""})
    categories = json.loads((folder / "d" / "train.json").read_text())["categories"]
    model = builders.build_model(config.model, len(categories), seed=3)
    _, params, statistics = functional(model)
    meta = {
        "config": config.to_dict(),
        "class_names": [entry["name"] for entry in categories],
        "category_ids": [entry["id"] for entry in categories],
        "code_version": "0",
    }
    with Checkpoints(folder / "run") as checkpoints:
        state = TrainState(np.int32(1), params, statistics, {"count": np.int32(0)})
        checkpoints.save(state, meta)
    weights = ours_to_original(params, statistics, NAMES)
    np.savez(folder / "weights.npz", **weights)
    del weights["decoder.mask_branch.projection.bias"]
    np.savez(folder / "strange.npz", **weights, **{"extra.weight": np.zeros(3)})


def _listing(folder):
    # A folder's time changes when a lock in it comes and goes.
    return {
        str(path.relative_to(folder)): 0 if path.is_dir() else path.stat().st_mtime_ns
        for path in sorted(folder.rglob("*"))
        if "__pycache__" not in path.parts
    }


class Outcome(NamedTuple):
    """What a command left behind."""

    code: int
    errors: str
    made: list[str]


@pytest.fixture(scope="module")
def outcomes(world, tmp_path_factory):
    """Run every command; name of the case -> outcome."""
    folder, names = world
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    environment.pop("SPARSEINST_TRACEBACK", None)
    printed = tmp_path_factory.mktemp("printed")
    outs = {name: tmp_path_factory.mktemp("out") for name in CASES}
    lines, forked = {}, []
    for number, (name, case) in enumerate(CASES.items()):
        command, *rest = _fill(case.arguments, folder, names, outs[name]).split()
        script = ROOT / f"{command}.py"
        words = [str(script), *rest] if script.exists() else ["sparseinst", command, *rest]
        lines[name] = words, printed / str(number)
        if name not in ALONE:
            forked.append((words, str(printed / str(number))))
    before = _listing(folder)
    (printed / "tasks.json").write_text(json.dumps(forked))
    command = [sys.executable, forked_commands.__file__, str(printed / "tasks.json")]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=250
    )
    assert done.returncode == 0, done.stderr
    found = {}
    for name, (words, stem) in lines.items():
        if name in ALONE:
            done = subprocess.run(
                [sys.executable, *words], cwd=ROOT, env=environment, capture_output=True, text=True
            )
            code, errors = done.returncode, done.stderr
        else:
            code, errors = int(Path(f"{stem}.code").read_text()), Path(f"{stem}.err").read_text()
        found[name] = Outcome(code, errors, sorted(_listing(outs[name])))
    assert _listing(folder) == before, "a command changed its inputs"
    return found


def _fill(text, folder, names, out=""):
    values = {"{w}": folder, "{out}": out, "{tiny}": TINY} | {
        f"{{{key}}}": name for key, name in names.items()
    }
    for key, value in values.items():
        text = text.replace(key, str(value))
    return text


@pytest.mark.parametrize("name", CASES)
def test_a_users_mistake_is_one_message_with_a_cure_and_leaves_nothing_behind(
    name, world, outcomes
):
    case, outcome = CASES[name], outcomes[name]
    assert outcome.code == 1, outcome.errors
    assert "Traceback" not in outcome.errors, outcome.errors
    for part in case.message:
        assert _fill(part, *world) in outcome.errors
    if case.is_first:
        assert outcome.errors.startswith("error: ")
    wanted = {_fill(part, *world) for part in case.made}
    if wanted:
        assert wanted <= set(outcome.made), outcome.made
    else:
        assert outcome.made == []
    assert not [path for path in outcome.made if "tmp" in path]


@pytest.mark.skipif(os.geteuid() == 0, reason="the administrator may write everywhere")
def test_a_folder_without_permission_is_refused(world, tmp_path):
    tmp_path.chmod(0o555)
    arguments = _fill(f"--config={{tiny}} --workdir={tmp_path}/run {DATA}", *world).split()
    command = [sys.executable, str(ROOT / "train.py"), *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert f"no permission to write in {tmp_path}" in done.stderr
