import io
import struct
import time

import numpy as np
import pytest

from sparseinst_jax.data.batch import Batch
from sparseinst_jax.training import progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_rows_are_appended_and_read_back_exactly(tmp_path):
    file = progress.MetricsFile(tmp_path / "metrics.csv", 0)
    loss = float(np.float32(1) / np.float32(3))
    file.write([{"step": 1, "loss/total": loss}, {"step": 2, "loss/total": 0.5}])
    file.write([{"step": 3, "loss/total": 0.25}])
    rows = progress.read_metrics(tmp_path / "metrics.csv")
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert np.float32(rows[0]["loss/total"]) == np.float32(loss)
    assert (tmp_path / "metrics.csv").read_text().splitlines()[0] == "step,loss/total"


def test_rows_after_the_resumed_step_and_cut_off_lines_are_dropped(tmp_path):
    path = tmp_path / "metrics.csv"
    path.write_text("step,loss/total\n1,4\n2,3\n3,2\n4,1.2")
    assert [row["step"] for row in progress.read_metrics(path)] == [1, 2, 3]
    file = progress.MetricsFile(path, 2)
    file.write([{"step": 3, "loss/total": 2.5}])
    assert path.read_text() == "step,loss/total\n1,4\n2,3\n3,2.5\n"


def test_a_new_metric_becomes_a_column_and_older_rows_stay(tmp_path):
    path = tmp_path / "metrics.csv"
    file = progress.MetricsFile(path, 0)
    file.write([{"step": 1, "loss/total": 2.0}])
    file.write([{"step": 2, "loss/total": 1.0, "AP": 0.5}, {"step": 3, "loss/total": 0.5}])
    assert path.read_text() == "step,loss/total,AP\n1,2,\n2,1,0.5\n3,0.5,\n"


def test_a_run_started_anew_drops_old_rows(tmp_path):
    path = tmp_path / "metrics.csv"
    path.write_text("step,loss/total\n1,4\n")
    progress.MetricsFile(path, 0)
    assert progress.read_metrics(path) == []


ROW = {"step": 10, "loss/total": 1.5, "loss/class": 0.5, "learning_rate": 0.001}


def batch_of(height: int = 8, width: int = 12) -> Batch:
    one = np.ones((4, 1))
    return Batch(np.zeros((4, height, width, 3), np.uint8), one, one, one, one, one[:, 0])


class Clock:
    """Time that passes when it is told to."""

    def __init__(self, monkeypatch):
        self.now = 100.0
        monkeypatch.setattr(progress.time, "monotonic", lambda: self.now)

    def step(self, line: progress.Progress, seconds: float, waited: float = 0.0, **size: int):
        self.now += waited
        with line.stepping(batch_of(**size), waited):
            self.now += seconds


def test_off_a_terminal_there_is_one_whole_line_per_report():
    stream = io.StringIO()
    line = progress.Progress(100, 20, 4, stream=stream)
    for _ in range(10):
        with line.stepping(batch_of(), 0.0):
            pass
    line.add([ROW])
    line.report()
    (text,) = stream.getvalue().splitlines()
    names = [part.split()[0] for part in text.split("  ")]
    assert names[:2] == ["step", "ETA"] and names[3:-1] == ["total", "class", "lr", "data", "epoch"]
    for words in (
        "step 10/100",
        "images/s",
        "total 1.500",
        "lr 0.001",
        "data wait 0%",
        "epoch 0.5",
    ):
        assert words in text
    assert text.endswith("GiB") and "\r" not in text


def test_losses_are_means_over_the_steps_since_the_last_report():
    stream = io.StringIO()
    line = progress.Progress(100, 20, 4, stream=stream)
    line.add([{"step": 1, "loss/total": 9.0}, {"step": 2, "loss/total": 2.0, "loss/new": 1.0}])
    line.add([{"step": 3, "loss/total": 1.0}])  # as collected for a checkpoint between reports
    line.report()
    line.add([{"step": 4, "loss/total": 3.0}])
    line.report()
    first, second = stream.getvalue().splitlines()
    assert "total 4.000  new 1.000" in first and "total 3.000" in second


@pytest.mark.parametrize("columns", [40, 60, 80, 100, 156])
def test_the_live_line_fits_the_terminal_and_shows_the_important_first(columns, monkeypatch):
    monkeypatch.setattr(progress, "_terminal_width", lambda _: columns)
    stream, clock = Terminal(), Clock(monkeypatch)
    line = progress.Progress(12345, 7393.0, 16, 9999, stream)
    for _ in range(3):
        clock.step(line, 1.25)
    names = ("total", "class", "dice", "mask", "objectness")
    line.add([{**{f"loss/{name}": 1.2345 for name in names}, "learning_rate": 5e-5}])
    line.report()
    drawn = stream.getvalue().rsplit("\r", 1)[1]
    assert len(drawn) == columns - 1
    parts = drawn.rstrip().split("  ")
    assert parts[:2] == ["step 10002/12345", "ETA 48:49"]
    if columns >= 60:
        assert parts[2:4] == ["12.8 images/s", "total 1.234"]
    assert all(part.count(" ") >= 1 for part in parts), "no part is cut"
    assert len(parts) == {40: 2, 60: 4, 80: 5, 100: 7}.get(columns, len(parts))


def test_steps_that_are_compiled_count_neither_for_speed_nor_for_time_left(monkeypatch):
    stream, clock = io.StringIO(), Clock(monkeypatch)
    line = progress.Progress(101, 20, 4, stream=stream)
    clock.step(line, 90.0, waited=10.0)
    assert line.rates().keys() == {"memory_gib"}
    line.report()
    assert "ETA" not in stream.getvalue() and "images/s" not in stream.getvalue()
    for _ in range(9):
        clock.step(line, 0.4, waited=0.1)
    clock.step(line, 60.0, height=16)
    clock.step(line, 0.5)
    assert line.rates()["images_per_second"] == pytest.approx(8.0)
    assert line.rates()["data_wait"] == pytest.approx(9 * 0.1 / 5)
    line.report()
    assert "ETA 0:44  8 images/s" in stream.getvalue()  # 89 steps of half a second


def test_a_compilation_is_announced_with_its_seconds(monkeypatch):
    monkeypatch.setattr(progress, "_REDRAW_SECONDS", 0.01)
    monkeypatch.setattr(progress, "_SECONDS_WITHOUT_A_WORD", 0.02)
    live, log = Terminal(), io.StringIO()
    for stream in (live, log):
        line = progress.Progress(100, 20, 4, stream=stream)
        for _ in range(2):
            with line.stepping(batch_of(), 0.0):
                time.sleep(0.2)
    assert live.getvalue().startswith("\rstep 1/100  compiling for images of 8 x 12  0:00 ")
    assert "step 2/100  compiling" not in live.getvalue()
    assert log.getvalue() == "step 1/100  compiling for images of 8 x 12\ncompiled in 0:00\n"


def test_on_a_terminal_the_line_is_drawn_over():
    stream = Terminal()
    line = progress.Progress(100, 20, 4, stream=stream)
    line.report()
    line.report()
    assert stream.getvalue().count("\r") == 2
    assert "\n" not in stream.getvalue()
    line.print_line("evaluating")
    assert stream.getvalue().endswith("\nevaluating\n")


def test_closing_ends_the_live_line_once():
    stream = Terminal()
    line = progress.Progress(100, 20, 4, stream=stream)
    line.close()  # nothing is open yet
    assert stream.getvalue() == ""
    line.report()
    line.close()
    line.close()
    print("error: told by another", file=stream)
    *_, drawn, told = stream.getvalue().splitlines()
    assert drawn.startswith("step 0/100") and told == "error: told by another"
    assert stream.getvalue().count("\n") == 2


def test_rates_count_images_waiting_and_leave_out_pauses(monkeypatch):
    clock = Clock(monkeypatch)
    line = progress.Progress(100, 20, 4, first_step=50, stream=io.StringIO())
    clock.step(line, 30.0)
    clock.now += 8.0
    line.paused(8.0)
    clock.step(line, 0.75, waited=0.25)
    clock.step(line, 0.75, waited=0.25)
    rates = line.rates()
    assert rates["images_per_second"] == pytest.approx(4.0)
    assert rates["data_wait"] == pytest.approx(0.25)
    assert rates["memory_gib"] > 0.01
    line.report()
    clock.step(line, 0.5)
    assert line.rates()["images_per_second"] == pytest.approx(8.0)


def test_durations_are_written_for_people():
    assert [progress.format_seconds(s) for s in (5, 65, 3723)] == ["0:05", "1:05", "1:02:03"]


def test_missing_tensorboard_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(progress.sys.modules, "tensorboardX", None)
    with pytest.raises(ValueError, match=r"pip install .*tensorboard"):
        progress.TensorBoard(tmp_path, 0)


def test_tensorboard_gets_each_value_at_its_step(tmp_path):
    from tensorboardX.proto.event_pb2 import Event

    board = progress.TensorBoard(tmp_path, 0)
    board.write([{"step": 3, "loss/total": 1.5, "AP": 0.25}, {"step": 4, "loss/total": 1.25}])
    board.close()
    (file,) = tmp_path.iterdir()
    content, found = file.read_bytes(), []
    while content:  # records: length (8 bytes), its checksum (4), an event, its checksum (4)
        (length,) = struct.unpack("<Q", content[:8])
        event = Event.FromString(content[12 : 12 + length])
        found += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
        content = content[16 + length :]
    assert found == [(3, "loss/total", 1.5), (3, "AP", 0.25), (4, "loss/total", 1.25)]


def test_a_metrics_file_removed_or_altered_gets_its_header_and_no_row_is_lost_in_silence(
    tmp_path, capsys
):
    path = tmp_path / "metrics.csv"
    file = progress.MetricsFile(path, 0)
    file.write([{"step": 1, "loss/total": 2.0}])
    path.unlink()
    file.write([{"step": 2, "loss/total": 1.5}, {"step": 3, "loss/total": 1.0}])
    assert path.read_text() == "step,loss/total\n2,1.5\n3,1\n"
    assert "was removed; it begins again at step 2" in capsys.readouterr().err
    # The header is lost, as when an earlier version went on writing.
    path.write_text("2,1.5\n3,1\n")
    file.write([{"step": 4, "loss/total": 0.5}])
    assert path.read_text() == "step,loss/total\n4,0.5\n"
    assert (tmp_path / "metrics.csv.unreadable").read_text() == "2,1.5\n3,1\n"
    assert "line 1 names no column step, got '2,1.5'" in capsys.readouterr().err
    # Saved by a spreadsheet: a mark in front, other line ends, one cell that is no number.
    path.write_bytes(b"\xef\xbb\xbfstep,loss/total\r\n4,0.5\r\n5,a lot\r\n6,0.25,\r\n7,0.125\r\n")
    with pytest.raises(ValueError, match=r"metrics.csv cannot be read: line 3: loss/total is 'a"):
        progress.read_metrics(path)
    progress.MetricsFile(path, 7)
    assert [row["step"] for row in progress.read_metrics(path)] == [4, 7]
    told = capsys.readouterr().err
    assert "line 3: loss/total is 'a lot', expected a number; line 4: 3 cells, expected 2" in told
    assert "is now metrics.csv.unreadable1" in told
    assert "lacks the rows of 5 of the 7 steps done" in told
