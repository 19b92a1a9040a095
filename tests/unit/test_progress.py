import io
import struct

import numpy as np
import pytest

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


def test_off_a_terminal_there_is_one_whole_line_per_report():
    stream = io.StringIO()
    line = progress.Progress(100, 20, 4, stream=stream)
    for step in range(1, 11):
        line.stepped(step, 0.0)
    line.report({**ROW, **line.rates()})
    (text,) = stream.getvalue().splitlines()
    assert text.startswith("step 10/100  epoch 0.5  total 1.5000  class 0.5000  lr 0.001  ")
    for word in ("images/s", "data wait 0%", "GiB", "ETA"):
        assert word in text
    assert "\r" not in text


def test_on_a_terminal_the_line_is_drawn_over():
    stream = Terminal()
    line = progress.Progress(100, 20, 4, stream=stream)
    line.stepped(1, 0.0)
    line.report(ROW)
    assert stream.getvalue().count("\r") == 2
    assert "\n" not in stream.getvalue()
    line.print_line("evaluating")
    assert stream.getvalue().endswith("\nevaluating\n")


def test_closing_ends_the_live_line_once():
    stream = Terminal()
    line = progress.Progress(100, 20, 4, stream=stream)
    line.close()  # nothing is open yet
    assert stream.getvalue() == ""
    line.report(ROW)
    line.close()
    line.close()
    print("error: told by another", file=stream)
    *_, drawn, told = stream.getvalue().splitlines()
    assert drawn.startswith("step 0/100") and told == "error: told by another"
    assert stream.getvalue().count("\n") == 2


def test_rates_count_images_waiting_and_leave_out_pauses(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    line = progress.Progress(100, 20, 4, first_step=50, stream=io.StringIO())
    now[0] = 110.0
    line.paused(8.0)
    line.stepped(53, 0.5)
    rates = line.rates()
    assert rates["images_per_second"] == pytest.approx(3 * 4 / 2)
    assert rates["data_wait"] == pytest.approx(0.25)
    assert rates["memory_gib"] > 0.01
    line.report({**ROW, **rates})
    now[0] = 111.0
    line.stepped(54, 0.0)
    assert line.rates()["images_per_second"] == pytest.approx(4.0)


def test_durations_are_written_for_people():
    assert [progress.format_seconds(s) for s in (5, 65, 3723, float("inf"))] == [
        "0:05",
        "1:05",
        "1:02:03",
        "?",
    ]


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
