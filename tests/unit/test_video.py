"""Videos in and out: times, colours, what is dropped, what is left after a stop."""

from __future__ import annotations

import os
import signal
import struct
import sys
import time
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from sparseinst_jax import cli
from sparseinst_jax.cli import predict
from sparseinst_jax.drawing.frames import SteadyColours, draw_frame
from sparseinst_jax.drawing.pictures import instance_colour
from sparseinst_jax.runner import run_lengths, video
from sparseinst_jax.runtime.progress import Ahead
from tests.unit.test_predictor import CLASS_NAMES, draw_image, predictor, weights  # noqa: F401

av = pytest.importorskip("av")
HEIGHT, WIDTH = 66, 91  # odd: the codecs take even sides alone
UNEVEN = [Fraction(n, 10) for n in (0, 1, 3, 4, 8, 9, 10, 13)]


def write_clip(path: Path, times, rng) -> list[np.ndarray]:
    """A clip of smooth pictures at these seconds."""
    form, codec, options = video._CODECS[path.suffix]
    images = [draw_image(rng, HEIGHT, WIDTH) for _ in times]
    with video.VideoWriter(path, form, codec, options, Fraction(10)) as writer:
        for image, second in zip(images, times, strict=True):
            writer.write(image, second)
    return images


def read_clip(path: Path) -> list[video.Frame]:
    with video.VideoSource(path) as source:
        return list(source)


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".webm"])
def test_frames_come_back_at_their_times(suffix, tmp_path, rng):
    images = write_clip(tmp_path / f"clip{suffix}", UNEVEN, rng)
    frames = read_clip(tmp_path / f"clip{suffix}")
    assert [float(frame.time) for frame in frames] == pytest.approx(UNEVEN, abs=2e-3)
    assert frames[0].image.shape == (HEIGHT + HEIGHT % 2, WIDTH + 1, 3)
    for image, frame in zip(images, frames, strict=True):
        assert np.abs(frame.image[:HEIGHT, :WIDTH].astype(int) - image).mean() < 12


def test_a_phones_rotation_is_applied(tmp_path, rng):
    (image,) = write_clip(tmp_path / "clip.mp4", UNEVEN[:1], rng)
    content = (tmp_path / "clip.mp4").read_bytes()
    one, none = struct.pack(">i", 1 << 16), bytes(4)
    upright = one + none * 3 + one
    # What a phone that is held upright writes: to be turned to the right by a quarter.
    turned = none + one + none + struct.pack(">i", -(1 << 16)) + none
    start = content.index(upright, content.index(b"tkhd"))
    content = content[:start] + turned + content[start + len(upright) :]
    (tmp_path / "clip.mp4").write_bytes(content)
    (frame,) = read_clip(tmp_path / "clip.mp4")
    wanted = np.rot90(np.pad(image, ((0, 0), (0, WIDTH % 2), (0, 0)), mode="edge"), -1)
    assert frame.image.shape == wanted.shape
    assert np.abs(frame.image.astype(int) - wanted).mean() < 12


def test_a_video_is_drawn_at_the_rate_it_had(predictor, tmp_path, rng, capsys):  # noqa: F811
    write_clip(tmp_path / "clip.mp4", UNEVEN, rng)
    done = video.predict_video(predictor, tmp_path / "clip.mp4", tmp_path / "new" / "out.mp4")
    assert done == (8, 0, 0, False)
    frames = read_clip(tmp_path / "new" / "out.mp4")
    assert [float(frame.time) for frame in frames] == pytest.approx(UNEVEN, abs=2e-3)
    assert os.listdir(tmp_path / "new") == ["out.mp4"]
    # Each picture is what the predictor finds in its frame, drawn; but for the codec.
    colours, drawn = SteadyColours(), 0
    for before, after in zip(read_clip(tmp_path / "clip.mp4"), frames, strict=True):
        found = predictor(before.image, score_threshold=0.4)
        found = found[np.argsort(-found.scores, kind="stable")]
        drawn += len(found)
        captions = [f"{each.class_name} {each.score:.2f}" for each in found]
        chosen = colours(found.rles, found.labels.tolist())
        wanted = draw_frame(before.image, found.rles, captions, chosen)
        assert np.abs(after.image.astype(int) - wanted).mean() < 6
    assert drawn


def test_processes_draw_the_same(predictor, tmp_path, rng):  # noqa: F811
    write_clip(tmp_path / "clip.mp4", UNEVEN[:3], rng)
    for name, number in (("threads", 0), ("processes", 1)):
        video.predict_video(
            predictor,
            tmp_path / "clip.mp4",
            tmp_path / f"{name}.mp4",
            num_processes=number,
            stream=None,
        )
    assert (tmp_path / "threads.mp4").read_bytes() == (tmp_path / "processes.mp4").read_bytes()


def test_few_frames_are_in_memory_at_once(predictor, rng):  # noqa: F811
    image, given, most = draw_image(rng, 64, 96), 0, 0

    def frames():
        nonlocal given
        for given in range(1, 61):
            yield video.Frame(image, Fraction(given))

    for done, (_, second) in enumerate(video.draw_frames(predictor, frames(), 0.4), 1):
        most = max(most, given - done)
        assert second == done
    assert given == 60 and most <= 12


def test_a_camera_drops_frames_instead_of_lagging(predictor, rng):  # noqa: F811
    image, given = draw_image(rng, 64, 96), 0
    predictor(image)

    def camera():
        nonlocal given
        for given in range(100):
            yield video.Frame(image, Fraction(given))
            time.sleep(0.02)

    lags, frames = [], Ahead(camera(), 1, is_live=True)
    for _, second in video.draw_frames(predictor, frames, 0.4, is_live=True):
        time.sleep(0.2)  # long beside the network, on a busy machine too
        lags.append(given - second)
    assert frames.dropped >= 50 and len(lags) + frames.dropped == 100
    assert max(lags) < 60  # four that were under way when the last came; not all hundred


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_what_was_drawn_before_a_stop_can_be_played(suffix, predictor, tmp_path, rng):  # noqa: F811
    write_clip(tmp_path / "clip.mp4", UNEVEN, rng)
    asked = iter([False, False, True])
    out = tmp_path / f"out{suffix}"
    done = video.predict_video(
        predictor, tmp_path / "clip.mp4", out, should_stop=lambda: next(asked), stream=None
    )
    assert done.is_stopped and done.frames == len(read_clip(out)) == 3


def test_a_fault_in_the_middle_leaves_nothing(predictor, tmp_path, rng):  # noqa: F811
    write_clip(tmp_path / "clip.mp4", UNEVEN, rng)

    def fail():
        raise RuntimeError("of the program")

    with pytest.raises(RuntimeError, match="of the program"):
        video.predict_video(predictor, tmp_path / "clip.mp4", tmp_path / "o.mp4", should_stop=fail)
    assert os.listdir(tmp_path) == ["clip.mp4"]


def test_of_a_damaged_file_the_rest_is_drawn(predictor, tmp_path, rng):  # noqa: F811
    path = tmp_path / "clip.mkv"
    write_clip(path, [Fraction(n, 10) for n in range(40)], rng)
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 300] = bytes(300)
    path.write_bytes(content)
    done = video.predict_video(predictor, path, tmp_path / "out.mp4", stream=None)
    assert 5 < done.frames <= 40


@pytest.mark.parametrize(
    "name, content, fault",
    [
        ("text.mp4", b"no video", "cannot be read as a video: Invalid data"),
        ("none.mp4", None, "there is no file"),
        ("7321", None, "there is no camera /dev/video7321"),
    ],
)
def test_what_is_no_video_is_one_message(name, content, fault, predictor, tmp_path):  # noqa: F811
    path = tmp_path / name if "." in name else name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises((ValueError, FileNotFoundError), match=fault):
        video.predict_video(predictor, path, tmp_path / "out.mp4")
    assert not (tmp_path / "out.mp4").exists()


def test_what_cannot_be_done_is_said_before_anything_is_written(predictor, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ValueError, match=r'pip install "sparseinst_jax\[video\]" \(docs: video\)'):
        video.predict_video(predictor, "clip.mp4", tmp_path / "out.mp4")
    assert not (tmp_path / "out.mp4").exists()
    (tmp_path / "clip.mp4").write_bytes(b"mine")
    with pytest.raises(ValueError, match="is the video itself, which would be lost"):
        video.predict_video(predictor, tmp_path / "clip.mp4", tmp_path / "clip.mp4")
    assert (tmp_path / "clip.mp4").read_bytes() == b"mine"
    with pytest.raises(ValueError, match=r"one of \.mp4, .*, got out\.gif"):
        video.predict_video(predictor, "clip.mp4", "out.gif")


def box(top: int, left: int, size: int = 10):
    mask = np.zeros((1, 40, 60), bool)
    mask[0, top : top + size, left : left + size] = True
    return run_lengths.encode_masks(mask)[0]


def test_an_object_keeps_its_colour_by_overlap_within_its_class():
    colours = SteadyColours(least_overlap=0.2, remembered=2)
    first, second, third = map(instance_colour, range(3))
    assert colours([box(0, 0), box(20, 20)], [0, 0]) == [first, second]
    assert colours([box(21, 22), box(2, 1)], [0, 0]) == [second, first]  # in another order
    assert colours([box(3, 2), box(21, 22)], [0, 1]) == [first, third]  # of another class
    assert colours([], []) == []
    assert colours([box(21, 22)], [0]) == [instance_colour(3)]  # forgotten by now
    # The largest sum of both, not the nearest of one.
    colours = SteadyColours(least_overlap=0.1)
    assert colours([box(0, 0), box(0, 8)], [0, 0]) == [first, second]
    assert colours([box(0, 5), box(0, 13)], [0, 0]) == [first, second]


def test_the_command_draws_videos_and_lists(stored_run, tmp_path, rng, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_clip(Path("clip.mp4"), UNEVEN[:4], rng)
    arguments = ["predict", "--workdir", str(stored_run), "--score-threshold", "0.1"]
    assert cli.main([*arguments, "clip.mp4", "--output", "out.mp4"]) == 0
    said = capsys.readouterr().out
    assert "out.mp4: 4 frames, " in said and "config.eval" not in said  # set for this call alone
    assert len(read_clip(Path("out.mp4"))) == 4
    image = stored_run.parent / "data/images/train/000001.png"
    Path("list.txt").write_text(f"{image}\n\nclip.mp4\n")
    assert cli.main([*arguments, "list.txt", "--output", "out"]) == 0
    assert sorted(os.listdir("out")) == ["000001.png", "clip.mp4", "predictions.json"]
    assert cli.main([*arguments, "list.txt", "--output", "two.mp4"]) == 1
    assert "two.mp4 is one video, and there are 2 inputs" in capsys.readouterr().err
    with pytest.raises(FileNotFoundError, match=r"there is no list other\.txt"):
        predict.expand_inputs(["other.txt"])
    assert predict.expand_inputs(["c*.mp4", "list.txt", "no*.mp4"]) == [
        "clip.mp4",
        str(image),
        "no*.mp4",
    ]
    assert cli.main([*arguments, "gone.mp4", "gone.png", "--output", "x"]) == 1
    said = capsys.readouterr().err
    assert "2 of the images do not exist" in said and "gone.mp4" in said and "gone.png" in said
    assert cli.main([*arguments, "https://example.org/a.mp4", "--output", "x"]) == 1
    assert "is an address, not a file" in capsys.readouterr().err


def test_a_signal_ends_a_video_and_leaves_it_playable(stored_run, tmp_path, rng, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_clip(Path("clip.mp4"), [Fraction(n, 10) for n in range(200)], rng)
    write, number = video.VideoWriter.write, 0

    def interrupted(self, *given):
        nonlocal number
        write(self, *given)
        number += 1
        if number == 5:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(video.VideoWriter, "write", interrupted)
    arguments = ["predict", "--workdir", str(stored_run), "clip.mp4", "--output", "out.mp4"]
    assert cli.main(arguments) == 143
    assert 5 <= len(read_clip(Path("out.mp4"))) < 200


def test_what_is_meant_by_an_input(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert video.is_video("a/b.MP4") and video.is_video("0") and not video.is_video("a.jpg")
    Path("0").write_bytes(b"")
    assert not video.is_camera("0") and not video.is_video("0")
    assert CLASS_NAMES
