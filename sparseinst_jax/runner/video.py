"""Video: reading, the network, drawing and writing at the same time, a few frames in memory."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import stat
import sys
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import closing
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np

from sparseinst_jax.drawing.frames import SteadyColours, draw_frame, leave_signals_to_parent
from sparseinst_jax.runner.prediction import SHOWN_SCORE
from sparseinst_jax.runner.predictor import BasePredictor, Pending, Ready
from sparseinst_jax.runner.run_lengths import areas_of
from sparseinst_jax.runtime.files import written_whole
from sparseinst_jax.runtime.pages import page
from sparseinst_jax.runtime.progress import Ahead, ImageProgress, map_ahead

# What is written: suffix -> format and codec of FFmpeg, and the codec's options.
_FAST = {"preset": "veryfast", "crf": "20"}
_CODECS = {
    ".mp4": ("mp4", "libx264", _FAST),
    ".m4v": ("mp4", "libx264", _FAST),
    ".mov": ("mov", "libx264", _FAST),
    ".mkv": ("matroska", "libx264", _FAST),
    ".avi": ("avi", "mpeg4", {"qscale": "3"}),
    ".webm": ("webm", "libvpx-vp9", {"deadline": "realtime", "cpu-used": "8", "crf": "32"}),
}
WRITTEN = tuple(_CODECS)
# What is taken for a video by its name; whether FFmpeg reads it shows when it is opened.
READ = (*WRITTEN, ".mpg", ".mpeg", ".wmv", ".flv", ".ts", ".mts", ".m2ts", ".3gp", ".ogv", ".vob")
_DEFAULT_RATE = Fraction(30)
_CAMERAS = {"linux": "v4l2", "darwin": "avfoundation"}


class Frame(NamedTuple):
    """A frame: uint8 [h, w, 3] RGB, upright, and its seconds since the first one."""

    image: np.ndarray
    time: Fraction


class VideoResult(NamedTuple):
    """What became of a video.

    Attributes:
        frames: written.
        dropped: frames of a camera that came too fast.
        damaged: pieces of the file that could not be decoded.
        is_stopped: whether it was asked to stop before the end.
    """

    frames: int
    dropped: int
    damaged: int
    is_stopped: bool


class VideoSource:
    """An open video file or camera; `with` closes it.

    Args:
        source: a file, or a camera: its number, such as "0", or a device, such as "/dev/video0".

    Attributes:
        is_live: a camera, whose frames do not wait.
        total: number of frames, as far as the file says so; None where it does not.
        rate: frames a second, as the file says.
        damaged: pieces that could not be decoded so far.

    Raises:
        FileNotFoundError: there is no such file or camera.
        ValueError: PyAV is missing, or the file holds no video.
    """

    def __init__(self, source: str | os.PathLike):
        av = _import_av()
        name, self.damaged = os.fspath(source), 0
        self.is_live = is_camera(name)
        path = _camera_path(name) if self.is_live else name
        form = _CAMERAS.get(sys.platform) if self.is_live else None
        if not os.path.exists(path) and sys.platform != "darwin":
            what = "camera" if self.is_live else "file"
            raise FileNotFoundError(f"there is no {what} {path} {page('video')}")
        try:
            self._container = av.open(path, format=form)
        except av.error.FFmpegError as error:
            raise ValueError(f"{path} cannot be read as a video: {error.strerror}") from error
        if not self._container.streams.video:
            self._container.close()
            raise ValueError(f"{path} holds no video")
        self._stream: Any = self._container.streams.video[0]
        self._stream.thread_type = "AUTO"
        self.rate = Fraction(self._stream.average_rate or _DEFAULT_RATE)
        seconds = self._container.duration and self._container.duration / av.time_base
        guessed = round(seconds * self.rate) if seconds and not self.is_live else None
        self.total = self._stream.frames or guessed or None

    def __enter__(self) -> VideoSource:
        return self

    def __exit__(self, *_: object) -> None:
        self._container.close()

    def __iter__(self) -> Iterator[Frame]:
        av = _import_av()
        first, number = None, 0
        for packet in self._container.demux(self._stream):
            try:
                decoded = packet.decode()
            except av.error.InvalidDataError:
                self.damaged += 1
                continue
            for frame in decoded:
                time = number / self.rate if frame.pts is None else frame.pts * frame.time_base
                first = time if first is None else first
                number += 1
                image = frame.to_ndarray(format="rgb24")
                turns = round(frame.rotation / 90) % 4  # as a phone was held
                image = np.ascontiguousarray(np.rot90(image, turns)) if turns else image
                yield Frame(image, Fraction(time - first))


class VideoWriter:
    """Write pictures to a video file, each at its time; opened by the first picture."""

    def __init__(self, path: Path, form: str, codec: str, options: dict[str, str], rate: Fraction):
        self._av = _import_av()
        self._container = self._av.open(os.fspath(path), "w", format=form)
        self._stream: Any = self._container.add_stream(
            codec, rate=rate.limit_denominator(65535), options=options
        )
        self._stream.pix_fmt = "yuv420p"
        # Times between those of an even rate are kept, as far as the codec knows them.
        self._base = Fraction(1, 60000) if codec != "mpeg4" else 1 / rate.limit_denominator(65535)
        self._stream.codec_context.time_base = self._base
        self._last, self._size = -1, (0, 0)

    def write(self, picture: np.ndarray, time: Fraction) -> None:
        """Write a picture uint8 [h, w, 3]; its time in seconds is later than that before."""
        height, width = picture.shape[:2]
        even = ((0, height % 2), (0, width % 2), (0, 0))  # the codecs halve the colours' sides
        picture = np.pad(picture, even, mode="edge") if height % 2 or width % 2 else picture
        if self._last < 0:
            self._size = picture.shape[1], picture.shape[0]
            self._stream.width, self._stream.height = self._size
        frame = self._av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
        if (frame.width, frame.height) != self._size:  # it changed within the file
            frame = frame.reformat(*self._size)
        self._last = max(self._last + 1, round(time / self._base))
        frame.pts, frame.time_base = self._last, self._base
        self._container.mux(self._stream.encode(frame))

    def __enter__(self) -> VideoWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: TracebackType | object) -> None:
        if kind is None and self._last >= 0:
            self._container.mux(self._stream.encode())
        self._container.close()


def is_camera(source: str) -> bool:
    """Whether a text means a camera: a number, or a device; a file of that name comes first."""
    if os.path.exists(source):
        return stat.S_ISCHR(os.stat(source).st_mode)
    return source.isdecimal()


def is_video(source: str) -> bool:
    """Whether a text means a video, by its name, or a camera."""
    return is_camera(source) or Path(source).suffix.lower() in READ


def _camera_path(name: str) -> str:
    if sys.platform not in _CAMERAS:
        raise ValueError(f"cameras are read on Linux and macOS, not here ({sys.platform})")
    return f"/dev/video{name}" if name.isdecimal() and sys.platform == "linux" else name


def _import_av() -> Any:
    try:
        import av
    except ImportError as error:
        raise ValueError(
            f'videos need PyAV: pip install "sparseinst_jax[video]" {page("video")}'
        ) from error
    return av


def predict_video(
    predictor: BasePredictor,
    source: str | os.PathLike,
    output: str | os.PathLike,
    score_threshold: float = SHOWN_SCORE,
    *,
    should_stop: Callable[[], bool] = lambda: False,
    num_processes: int = 0,
    stream: Any = sys.stderr,
) -> VideoResult:
    """Draw what is found in a video into another one, of the same rate; sound is left out.

    Objects keep their colour, see `SteadyColours`. The file is there whole, also where it is asked
    to stop, or not at all.

    Args:
        predictor: the model; `batch_size` frames go through it together, of a camera better one.
        source: a file or a camera, see `VideoSource`.
        output: a file with a suffix of `WRITTEN`.
        score_threshold: lowest score that is drawn.
        should_stop: asked after each frame.
        num_processes: that draw; 0 draws in threads, which is enough for a network on a CPU.
            Processes need a script that can be imported (`if __name__ == "__main__"`).
        stream: of the progress; None for silence.

    Raises:
        FileNotFoundError: there is no such file or camera.
        ValueError: the video cannot be read, or the output has another suffix.
    """
    output = Path(output)
    if output.suffix.lower() not in _CODECS:
        raise ValueError(f"a video is written as one of {', '.join(WRITTEN)}, got {output}")
    codec = _CODECS[output.suffix.lower()]
    if output.exists() and os.path.exists(source) and output.samefile(source):
        raise ValueError(f"{output} is the video itself, which would be lost: give another output")
    with (
        VideoSource(source) as video,
        ImageProgress(video.total, stream, "predicted", "frame") as line,
        written_whole(output) as temporary,
        VideoWriter(temporary, *codec, video.rate) as writer,
        closing(Ahead(video, 2 * predictor.num_together, video.is_live)) as frames,
        closing(
            draw_frames(predictor, frames, score_threshold, num_processes, video.is_live)
        ) as drawn,
    ):
        is_stopped = False
        for picture, time in drawn:
            writer.write(picture, time)
            line.advance(1)
            if is_stopped := should_stop():
                break
        if not line.done:
            raise ValueError(f"{source} holds no frame that can be decoded")
        return VideoResult(line.done, frames.dropped, video.damaged, is_stopped)


def draw_frames(
    predictor: BasePredictor,
    frames: Iterable[Frame],
    score_threshold: float,
    num_processes: int = 0,
    is_live: bool = False,
) -> Generator[tuple[np.ndarray, Fraction], None, None]:
    """Pictures uint8 [h, w, 3] of frames and their times, a few frames ahead of use."""
    together, cores = predictor.num_together, os.cpu_count() or 1
    if num_processes:
        spawn = multiprocessing.get_context("spawn")  # JAX's threads do not survive a fork
        drawers: Any = ProcessPoolExecutor(num_processes, spawn, leave_signals_to_parent)
    else:
        drawers = ThreadPoolExecutor(min(cores, 4))
    colours = SteadyColours()

    def prepare(frame: Frame) -> tuple[Frame, Ready]:
        return frame, predictor.prepare(frame.image)

    def submit(item: tuple[Frame, list[Any], np.ndarray, np.ndarray]) -> Any:
        frame, rles, scores, labels = item
        names = [predictor.class_names[label] for label in labels]
        captions = [f"{name} {score:.2f}" for name, score in zip(names, scores, strict=True)]
        colour = colours(rles, labels.tolist())
        return drawers.submit(draw_frame, frame.image, rles, captions, colour), frame.time

    with ThreadPoolExecutor(min(cores, 4)) as preparers:
        prepared = map_ahead(preparers, prepare, frames, 1 if is_live else 2 * together)
        found = Ahead(_found(predictor, prepared, score_threshold, is_live), 1 if is_live else 2)
        waiting: list[Any] = []
        most = 1 if is_live else 2 * (num_processes or min(cores, 4))
        try:
            for item in found:
                waiting.append(submit(item))
                if len(waiting) >= most:
                    future, time = waiting.pop(0)
                    yield future.result(), time
            for future, time in waiting:
                yield future.result(), time
        finally:
            found.close()
            drawers.shutdown(cancel_futures=True)


def _found(
    predictor: BasePredictor,
    frames: Iterator[tuple[Frame, Ready]],
    score_threshold: float,
    is_live: bool,
) -> Iterator[tuple[Frame, list[Any], np.ndarray, np.ndarray]]:
    """What is shown of each frame, the surest first: its RLEs, scores and labels.

    The device works on a batch while the host brings back the masks of the one before.
    """

    def finish(batch: list[Frame], pending: list[Pending]) -> Iterator[Any]:
        for frame, found in zip(batch, predictor.finish(pending, score_threshold), strict=True):
            rles, scores = found.encode()
            order = np.argsort(-scores, kind="stable")
            is_shown = (scores[order] >= score_threshold) & (areas_of(rles)[order] > 0)
            shown = order[is_shown]
            yield frame, [rles[i] for i in shown], scores[shown], found.labels[shown]

    before = None
    while items := list(itertools.islice(frames, predictor.num_together)):
        now = [frame for frame, _ in items], predictor.start([ready for _, ready in items])
        if is_live:
            yield from finish(*now)
            continue
        if before is not None:
            yield from finish(*before)
        before = now
    if before is not None:
        yield from finish(*before)
