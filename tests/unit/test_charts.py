"""Charts and the characters in them."""

import itertools
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from sparseinst_jax.drawing import charts, fonts


def lines_of(axes):
    """Label -> points of the lines that stand in the legend."""
    handles, labels = axes.get_legend_handles_labels()
    return dict(zip(labels, (line.get_xydata() for line in handles), strict=True))


def test_curves_show_losses_their_means_ap_and_the_learning_rate():
    rows = [
        {"step": i, "loss/total": 10.0 + (-1) ** i, "learning_rate": 1e-3} for i in range(1, 101)
    ]
    rows[49]["loss/total"] = float("nan")  # left out
    rows[39] |= {"AP": 0.25, "AP50": 0.5}
    rows[99] |= {"AP": 0.125, "AP50": 0.25}
    losses, scores, rates = charts.training_curves(rows).axes
    faint, mean = (line.get_xydata() for line in losses.lines)
    assert faint.shape == mean.shape == (99, 2) and 50 not in faint[:, 0]
    assert faint[1].tolist() == [2, 11]
    # Of three steps around each, fewer at the ends.
    assert mean[[0, 1, 2], 1] == pytest.approx([(9 + 11) / 2, (2 * 9 + 11) / 3, (9 + 2 * 11) / 3])
    assert mean[-1].tolist() == [100, 10]
    assert list(lines_of(losses)) == ["total 10"] and losses.get_ylabel() == "loss"
    assert lines_of(scores)["AP 12.5"].tolist() == [[40, 25], [100, 12.5]]
    assert lines_of(scores)["AP50 25.0"].tolist() == [[40, 50], [100, 25]]
    assert scores.get_ylim() == (0, pytest.approx(54)), "the axis fits"
    assert scores.get_title(loc="left") == "best AP 25.0 at step 40"
    assert set(lines_of(rates)["now 0.001"][:, 1]) == {1e-3}
    assert rates.get_ylabel() == "learning rate" and rates.get_xlabel() == "step"


def test_one_spike_does_not_flatten_a_loss_and_ap_ends_at_one():
    rows = [{"step": i, "loss/total": 1.0, "AP": 1.0} for i in range(1, 1001)]
    rows[500]["loss/total"] = 1001.0
    losses, scores = charts.training_curves(rows).axes
    assert losses.get_ylim()[1] == pytest.approx(1.08 * (1 + 1000 / 41))
    assert scores.get_ylim()[1] == 100


def test_long_series_are_averaged_down():
    rows = [{"step": i, "loss/total": float(i)} for i in range(10_000)]
    (losses,) = charts.training_curves(rows).axes
    assert losses.lines[0].get_xydata()[:2].tolist() == [[2, 2], [7, 7]]


def test_curves_without_rows_are_still_a_picture(tmp_path):
    charts.save(charts.training_curves([]), tmp_path / "curves.png")
    assert Image.open(tmp_path / "curves.png").width > 800


@pytest.mark.parametrize(("number", "small", "panels"), [(3, False, 3), (9, True, 9)])
def test_precision_lies_over_recall_in_a_panel_for_each_class(number, small, panels):
    curve = np.array([1.0, 0.5, 0.25])
    given = [
        (f"{i} $W" + 99 * "W", {"IoU 0.50": curve, "IoU 0.75": curve / 2}) for i in range(number)
    ]
    figure = charts.precision_recall(given, "note", small)
    assert len(figure.axes) == panels and figure.texts[0].get_text() == "note"
    lines = lines_of(figure.axes[-1])
    assert lines["IoU 0.50"].tolist() == [[0, 1], [0.5, 0.5], [1, 0.25]]
    assert lines["IoU 0.75"].tolist() == [[0, 0.5], [0.5, 0.25], [1, 0.125]]
    assert figure.axes[0].get_xlim() == (0, 1)
    assert figure.axes[0].get_ylabel() == "precision, percent"
    for axes in figure.axes:  # each has axes of its own
        assert (
            axes.get_xlabel() == "recall, percent" and axes.xaxis.get_tick_params()["labelbottom"]
        )
        assert axes.yaxis.get_tick_params()["labelleft"]
        assert axes._left_title.get_fontsize() >= 11
    figure.draw_without_rendering()  # a dollar sign is no formula
    first, second = (
        axes.title if axes.get_title() else axes._left_title for axes in figure.axes[:2]
    )
    assert first.get_window_extent().x1 < second.get_window_extent().x0, "titles are cut"


def test_a_matrix_is_darker_where_a_row_has_its_larger_share_and_writes_counts():
    counts = np.array([[8, 0], [1, 1]])
    axes = charts.matrix(counts, ["cat", "dog"], [1, 2], "notes").axes[0]
    shade = np.asarray(axes.images[0].get_array())
    assert shade[0].tolist() == [1, 0] and shade[1, 0] == shade[1, 1] == pytest.approx(0.5**0.6)
    written = {text.get_gid(): (text.get_text(), text.get_color()) for text in axes.texts}
    assert written == {"0,0": ("8", "white"), "1,0": ("1", "white"), "1,1": ("1", "white")}
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("predicted", "annotated")


@pytest.mark.parametrize("number", [3, 81])
def test_names_beside_a_matrix_do_not_overlap(number):
    names = [f"a long name of class {index}" for index in range(number)]
    figure = charts.matrix(np.diag(np.full(number, 123456)), names, list(range(number)), "")
    figure.draw_without_rendering()
    (axes,) = figure.axes
    boxes = [label.get_window_extent() for label in axes.get_yticklabels()]
    assert len(boxes) == number and max(box.width for box in boxes) < 190
    assert all(above.y0 >= below.y1 - 1 for above, below in itertools.pairwise(boxes))
    boxes = [label.get_window_extent() for label in axes.get_xticklabels()]
    assert all(left.x1 <= right.x0 + 1 for left, right in itertools.pairwise(boxes))
    cells = axes.get_window_extent().width / number
    assert all(text.get_window_extent().width < cells for text in axes.texts)


def test_drawing_changes_nothing_in_the_process(tmp_path):
    code = (
        "import os, sys\n"
        "from sparseinst_jax.drawing import charts\n"
        "assert 'matplotlib' not in sys.modules\n"
        "before = dict(os.environ)\n"
        "import matplotlib\n"
        "settings = dict(dict.items(matplotlib.rcParams))\n"
        f"charts.save(charts.training_curves([]), {str(tmp_path / 'c.png')!r})\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
        "assert dict(dict.items(matplotlib.rcParams)) == settings\n"
        "assert dict(os.environ) == before\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_characters_that_a_font_lacks_are_replaced_and_line_breaks_too():
    font = fonts.own_font(14)
    assert fonts.drawable("cat\n dog\t1", font) == "cat dog 1"
    assert fonts.drawable("Äpfel, señor", font) == "Apfel, senor"
    assert fonts.drawable("苹果 1", font) == "?? 1"
    assert fonts.labels(["cat?", "苹果", ""], [1, 2, 3], font) == ["cat?", "2 ??", "3"]


def test_long_texts_lose_their_middle():
    font = fonts.own_font(14)
    short = fonts.shorten("a" * 50 + "_001", font, 90)
    assert short.startswith("aaa") and short.endswith("_001") and "..." in short
    assert 60 < font.getlength(short) <= 90
    assert fonts.shorten("cat", font, 90) == "cat"
    assert fonts.shorten("cat", font, 2) == ""
