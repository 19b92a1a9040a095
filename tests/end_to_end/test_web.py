"""The page: its parts equal Pillow's and the package's, and a browser finds what Python finds.

The parts need node. The page itself needs a browser and two packages: see `make web-test`.
"""

import base64
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import pytest
from PIL import Image

import sparseinst_jax
from sparseinst_jax.data.transforms import padded_size, resized_size
from sparseinst_jax.runner import masks, run_lengths
from sparseinst_jax.runner.metadata import KEY

PAGE = Path(__file__).parents[2] / "examples" / "web"
# Before, a resize always began with the columns.
PILLOW_13 = pytest.mark.skipif(int(PIL.__version__.split(".")[0]) < 13, reason="Pillow 13's order")
pytestmark = pytest.mark.skipif(not shutil.which("node"), reason="needs node")


def part(name: str, **task: Any) -> Any:
    """Run a part of the page in node."""
    script = Path(__file__).parent / "web_parts.mjs"
    text = json.dumps({"part": name, **task})
    done = subprocess.run(["node", script], input=text, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def text_of(content: bytes) -> str:
    return base64.b64encode(content).decode()


@pytest.mark.parametrize(
    "size, new_size",
    [
        ((240, 320), (608, 811)),
        ((97, 131), (64, 86)),
        ((700, 300), (83, 36)),
        ((50, 50), (50, 31)),
        ((50, 50), (77, 50)),
        pytest.param((400, 3), (2, 1), marks=PILLOW_13),
        pytest.param((103, 61), (62, 41), marks=PILLOW_13),
        pytest.param((103, 61), (63, 41), marks=PILLOW_13),
        ((33, 47), (33, 47)),
    ],
)
def test_resize_equals_pillow_to_the_bit(size, new_size, rng):
    image = rng.integers(0, 256, (*size, 3), np.uint8)
    image[: size[0] // 2] = image[: size[0] // 2] // 128 * 255
    rgba = np.concatenate([image, np.full((*size, 1), 255, np.uint8)], axis=2)
    made = part(
        "resize", height=size[0], width=size[1], rgba=text_of(rgba.tobytes()), size=new_size
    )
    made = np.frombuffer(base64.b64decode(made), np.uint8).reshape(*new_size, 3)
    expected = Image.fromarray(image).resize(new_size[::-1], Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(made, np.asarray(expected))


def test_sizes_equal_the_package(rng):
    sizes = [tuple(map(int, size)) for size in rng.integers(1, 4000, (500, 2))]
    metadata = {"shortest_side": 640, "longest_side": 853, "size_multiple": 32, "fixed_size": None}
    resized = [resized_size(size, 640, 853) for size in sizes]
    expected = [[*size, *padded_size(size)] for size in resized]
    assert part("sizes", sizes=sizes, metadata=metadata) == expected
    fitting = part(
        "sizes", sizes=[(480, 640), (640, 480)], metadata=metadata | {"fixed_size": [640, 864]}
    )
    assert fitting == [[640, 853, 640, 864], [640, 480, 640, 864]]


@pytest.mark.parametrize(
    "values", [(24, 4, 96, 131), (24, 4, 90, 40), (152, 4, 601, 3000), (2, 4, 5, 9), (1, 8, 3, 1)]
)
def test_taps_equal_the_package(values):
    made = part("taps", arguments=values)
    expected = masks.upsampling_operator(*values, values[-1])
    index = np.minimum(np.array(made["first"])[:, None] + np.arange(3), values[0] - 1)
    np.testing.assert_array_equal(index, expected.index)
    np.testing.assert_array_equal(np.float32(made["weights"]).reshape(-1, 3), expected.weight)


@pytest.mark.parametrize("are_logits", [False, True])
def test_masks_equal_the_package(are_logits, rng):
    grid, valid, size, threshold = (16, 24), (61, 90), (131, 97), 0.5 if are_logits else 0.45
    coarse = rng.random((4, 6)).astype(np.float32)
    values = np.asarray(Image.fromarray(coarse).resize(grid[::-1], Image.Resampling.BICUBIC))
    values = np.log(np.clip(values, 0.01, 0.99) / 0.5) if are_logits else values
    cut = masks.MaskCut(threshold, 4, are_logits, measures=True)
    ((expected, mean),) = masks.upsample_masks(values[None], np.array([0]), valid, size, cut)
    metadata = {"mask_threshold": threshold, "masks_are_logits": are_logits}
    task = {"grid": grid, "stride": 4, "valid": valid, "size": size, "metadata": metadata}
    made = part("masks", values=values.ravel().tolist(), **task)
    rle = run_lengths.encode_transposed(expected)[0]
    assert made["counts"] == rle["counts"]
    assert made["area"] == expected.sum() > 100
    assert made["mean"] == pytest.approx(float(mean[0]), abs=1e-6)


def test_metadata_are_read_and_other_files_refused_in_words(stored_model):
    content = stored_model[1].read_bytes()
    place = content.rindex(KEY.encode())
    files = [content, content[:place], content[: place + 40], b"", b"\x00\x01", b"text" * 100]
    files += [
        content.replace(b'"schema": 1', b'"schema": 2'),
        b"\x72\xff\xff\xff\xff\xff\xff\xff\x7f",
    ]
    read, *refused = part("metadata", files=[text_of(file) for file in files])
    assert read["class_names"] == list(stored_model[0].class_names)
    assert read["mask_threshold"] == stored_model[0].mask_threshold
    assert all(isinstance(message, str) and len(message) > 20 for message in refused), refused
    assert "schema is 2" in refused[5]


# The page in a browser.

FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-background-networking"]
FLAGS += ["--use-fake-ui-for-media-stream", "--use-fake-device-for-media-stream"]


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="see `make web-test`")
    program = shutil.which("chromium") or shutil.which("google-chrome")
    if not program:
        pytest.skip("needs chromium, see `make web-test`")
    if not (PAGE / "node_modules" / "onnxruntime-web").exists():
        pytest.skip("needs onnxruntime-web, see `make web-test`")
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=program, args=FLAGS)
        yield opened
        opened.close()


def serve(path):
    """Start the server of the page; gives the process and the page's address."""
    words = ["node", PAGE / "serve.mjs", "--model", path, "--port", "0"]
    server = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    return server, server.stdout.readline().strip()


@pytest.fixture
def page(browser, stored_model):
    server, address = serve(stored_model[1])
    opened = browser.new_page()
    requests: list[str] = []
    opened.on("request", lambda request: requests.append(request.url))
    opened.goto(address)
    wait_for(opened, r"^Ready: 3 classes, \d+ thread")
    yield opened
    opened.close()
    server.terminate()
    server.wait()
    assert [url for url in requests if not url.startswith((address, "blob:", "data:"))] == []


def wait_for(page, pattern):
    from playwright.sync_api import expect

    expect(page.locator("#status")).to_have_text(re.compile(pattern), timeout=60_000)


def saved(page):
    with page.expect_download() as download:
        page.click("#save")
    return json.loads(Path(download.value.path()).read_text())


@pytest.fixture(params=["png", "jpg"])
def photo(request, stored_run, tmp_path):
    path = tmp_path / f"photo.{request.param}"
    drawn = Image.open(sorted((stored_run.parent / "data/images/train").glob("*.png"))[0])
    drawn.convert("RGB").resize((131, 97), Image.Resampling.BICUBIC).save(path)
    return path


def assert_equal_results(made, found, atol=1e-4, iou=0.999):
    expected = sorted(found.to_coco(1), key=lambda entry: -entry["score"])
    assert len(expected) > 4
    labels = [[entry["category_id"] for entry in entries] for entries in (made, expected)]
    assert labels[0] == labels[1]
    scores = [[entry["score"] for entry in entries] for entries in (made, expected)]
    np.testing.assert_allclose(*scores, atol=atol)
    for one, other in zip(made, expected, strict=True):
        both = run_lengths.decode_masks(
            [one["segmentation"], other["segmentation"]], found.image.shape[:2]
        )
        assert (both[0] & both[1]).sum() > iou * (both[0] | both[1]).sum()


def test_the_page_finds_what_python_finds(page, photo, stored_model):
    page.set_input_files("#photo", photo)
    wait_for(page, r"^\d+ objects? in ")
    found = stored_model[0](photo)
    assert_equal_results(saved(page), found)
    shown = found.above(0.4)
    order = np.argsort(-shown.scores, kind="stable")
    listed = page.locator("#list button").all_inner_texts()
    names = [f"{shown.class_names[i]} {shown.scores[i]:.2f}" for i in order]
    assert [re.sub(r"\s+", " ", text).strip() for text in listed] == names
    pixels = "document.getElementById('overlay').getContext('2d').getImageData(0, 0, 131, 97).data"
    drawn = np.array(page.evaluate(f"[...{pixels}]")).reshape(97, 131, 4)
    is_drawn = drawn[..., 3] > 0
    np.testing.assert_array_equal(is_drawn, shown.masks.any(0))


@pytest.mark.parametrize("kind", ["int8", "fastinst"])
def test_other_files_find_what_python_finds(
    kind, page, stored_model, fastinst_model, stored_run, tmp_path
):
    photos, path = sorted((stored_run.parent / "data/images/train").glob("*.png")), fastinst_model
    if kind == "int8":
        path = tmp_path / "int8.onnx"
        stored_model[0].export(path, verifies=False, calibration=photos)
    page.set_input_files("#model", path)
    wait_for(page, r"^Ready: 3 classes")
    predictor = sparseinst_jax.load(path, runtime="onnxruntime")
    for photo in photos:
        page.evaluate("document.getElementById('status').textContent = ''")
        page.set_input_files("#photo", photo)
        wait_for(page, r"^\d+ objects? in ")
        assert_equal_results(saved(page), predictor(photo))


def test_photos_come_by_drop_paste_and_camera(page, stored_run):
    photo = sorted((stored_run.parent / "data/images/train").glob("*.png"))[0]
    events = {
        "drop": "new DragEvent('drop', { dataTransfer, cancelable: true })",
        "paste": "new ClipboardEvent('paste', { clipboardData: dataTransfer })",
    }
    for name, event in events.items():
        page.evaluate(
            f"""base64 => {{
              const bytes = Uint8Array.from(atob(base64), letter => letter.charCodeAt(0));
              const dataTransfer = new DataTransfer();
              dataTransfer.items.add(new File([bytes], "{name}.png", {{ type: "image/png" }}));
              document.getElementById("status").textContent = "";
              document.dispatchEvent({event});
            }}""",
            text_of(photo.read_bytes()),
        )
        wait_for(page, r"^\d+ objects? in ")
    page.click("#camera")
    wait_for(page, r"\d images a second")
    page.click("#camera")
    assert page.get_attribute("#camera", "aria-pressed") == "false"


def test_the_keyboard_reaches_everything_and_moves_the_threshold(page, photo):
    page.set_input_files("#photo", photo)
    wait_for(page, r"^\d+ objects? in ")
    reached = []
    page.focus("body")
    for _ in range(7):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.id || document.activeElement.tagName"))
    assert reached[:6] == ["photo", "camera", "save", "model", "score", "BUTTON"]
    page.focus("#list button")
    page.keyboard.press("Enter")
    assert page.get_attribute("#list button >> nth=0", "aria-pressed") == "true"
    page.focus("#score")
    page.keyboard.press("Home")
    everything = page.locator("#list button").count()
    assert everything == len(saved(page))
    page.focus("#score")
    page.keyboard.press("End")
    assert page.locator("#list button").count() < everything
    assert page.inner_text("#score-value") == "1.00"


def test_a_phone_shows_it_in_one_column(browser, page, photo):
    page.set_viewport_size({"width": 360, "height": 740})
    page.set_input_files("#photo", photo)
    wait_for(page, r"^\d+ objects? in ")
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    for control in page.locator("button, .button, input[type=range]").all():
        assert control.bounding_box()["height"] >= 44
    picture, listed = (page.locator(name).bounding_box() for name in ("#picture", "#list"))
    assert listed["y"] >= picture["y"] + picture["height"]


def test_what_cannot_be_opened_is_said(browser, page, photo, tmp_path):
    (tmp_path / "text.png").write_text("not a photo")
    (tmp_path / "other.onnx").write_bytes(b"\x08\x08")
    page.set_input_files("#photo", tmp_path / "text.png")
    wait_for(page, r"^text.png cannot be read as an image")
    page.set_input_files("#model", tmp_path / "other.onnx")
    wait_for(page, r"was not written by `sparseinst export`")
    page.set_input_files("#photo", photo)  # the model of before is still there
    wait_for(page, r"^\d+ objects? in ")
    server, address = serve(tmp_path / "absent.onnx")
    empty = browser.new_page()
    empty.goto(address)
    wait_for(empty, r"There is no model.onnx")
    empty.route("**/onnxruntime-web/**", lambda route: route.abort())
    empty.goto(address)
    wait_for(empty, r"run `npm install`")
    empty.close()
    server.terminate()
    server.wait()
