"""What `sparseinst zoo` prints."""

import json

import pytest

from sparseinst_jax import cli


def run(capsys, *arguments: str) -> str:
    assert cli.main(["zoo", *arguments]) == 0
    return capsys.readouterr().out


def test_a_row_shows_its_scores_sizes_and_files(capsys):
    text = run(capsys, "giam_r50vd_aug", "sparseinst")
    lines = text.splitlines()
    header = "config model input AP val AP test-dev FPS params M GMAC GFLOPs"
    assert lines[0].split() == header.split()
    row = "giam_r50vd_aug G-IAM, R-50-vd, crops 608 35.6 36.1 42.8 32.81 102.4 204.7"
    assert lines[1].split() == row.split()
    assert lines[2] == ""
    assert "https://drive.google.com/file/d/1dlamg7ych_BdWpPUCuiBXbwE0SXpsfGx" in text
    assert "resnet50d_ra2-464e36ba.pth (sha256 begins with 464e36ba)" in text
    assert "sparseinst convert FILE --config configs/NAME.py --output NAME.safetensors" in text


def test_words_choose_rows_that_hold_all_of_them_in_any_case(capsys):
    names = [row["config"] for row in json.loads(run(capsys, "R-101", "dcn", "--json"))]
    assert names == ["configs/giam_r101_dcn.py"]
    names = [row["config"] for row in json.loads(run(capsys, "paddledetection", "--json"))]
    assert len(names) == 7
    assert all(name.startswith("configs/paddle_") for name in names)


def test_json_holds_all_31_rows_and_null_for_what_is_not_published(capsys):
    rows = json.loads(run(capsys, "--json"))
    assert len(rows) == 31
    assert len({row["config"] for row in rows}) == 30, "one configuration has two rows"
    (mmdet,) = [row for row in rows if row["source"] == "mmdetection"]
    assert (mmdet["ap_val2017"], mmdet["ap_test_dev2017"], mmdet["fps"]) == (32.9, None, 44.3)
    assert (mmdet["parameters"], mmdet["parameters_with_norm_affine"]) == (31584373, 31637493)
    assert (mmdet["weights"], mmdet["convert"]) == (None, None)
    assert mmdet["gflops_640x864"] == 2 * mmdet["gmacs_640x864"] == 197.88
    assert mmdet["backbone"]["sha256_prefix"] == "19c8e357"


def test_a_word_that_no_row_holds_is_refused_with_the_names_there_are(capsys):
    assert cli.main(["zoo", "swin"]) == 1
    message = capsys.readouterr().err
    assert message.startswith("error: no published model is of swin; there are iam_r50, iam_r50vd")
    assert message.strip().endswith("mmdet_iam_r50.")


@pytest.mark.parametrize("prefix", ["1pXU7Dsa1L7nUiLU9ULG2F6Pl5m5NEguL", "giam_r50.py"])
def test_markdown_links_weights_and_configurations(capsys, prefix):
    (line,) = [x for x in run(capsys, "--markdown").splitlines() if x.startswith("| [giam_r50]")]
    assert f"{prefix})" in line
