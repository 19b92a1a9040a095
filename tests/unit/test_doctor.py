"""`sparseinst doctor`: what it says of this machine, and of GPUs that JAX does not see."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from sparseinst_jax import cli
from sparseinst_jax.cli import doctor
from sparseinst_jax.cli.gpu_causes import NvidiaParts, why_not_seen

FITTING = NvidiaParts(True, "580.65.06", "NVIDIA H100", {"cuda13": "0.10.2"}, "0.10.2", {})


@pytest.mark.parametrize(
    "changes, fault, cure",
    [
        ({"driver": ""}, "nvidia-smi does not answer", "--gpus all"),
        ({"driver": "470.82"}, "the driver 470.82 is older", "install 525 or newer"),
        ({"plugins": {}}, "are not installed", 'pip install -U "sparseinst_jax[cuda13]"'),
        ({"plugins": {}, "driver": "535.1"}, "not installed", "sparseinst_jax[cuda12]"),
        (
            {"plugins": {"cuda13": "0.10.2", "cuda12": "0.10.2"}},
            "two versions of CUDA",
            'uninstall -y jax-cuda12-plugin jax-cuda12-pjrt && pip install -U "sparseinst_jax[cud',
        ),
        ({"driver": "535.1"}, "cuda13 needs driver 580 or newer, this one is 535.1", "[cuda12]"),
        ({"jaxlib": "0.10.1"}, "jax-cuda13-plugin 0.10.2 and jaxlib 0.10.1", "[cuda13]"),
        ({"environment": {"JAX_PLATFORMS": "cpu"}}, "JAX_PLATFORMS=cpu", "unset JAX_PLATFORMS"),
        ({"environment": {"CUDA_VISIBLE_DEVICES": ""}}, "hides every GPU", "unset CUDA_VISIBLE"),
        ({"environment": {"CUDA_VISIBLE_DEVICES": "-1"}}, "hides every GPU", "unset CUDA_VISIBLE"),
        ({"environment": {"LD_LIBRARY_PATH": "/x"}}, "another CUDA", "unset LD_LIBRARY_PATH"),
    ],
)
def test_each_cause_is_named_with_its_cure(changes, fault, cure):
    found = why_not_seen(FITTING._replace(**changes), ask=lambda: pytest.fail("asked"))
    assert any(fault in each.fault and cure in each.cure for each in found)
    assert all(each.page == "gpu-not-seen" for each in found)


def test_only_what_nothing_else_explains_is_asked_of_jax():
    assert why_not_seen(FITTING) == []
    found = why_not_seen(FITTING, ask=lambda: "cuInit failed: 999")
    assert found[0].fault == "the GPU is not used: asked for the GPU, JAX says: cuInit failed: 999"
    fine = {"JAX_PLATFORMS": "cuda,cpu", "CUDA_VISIBLE_DEVICES": "1"}
    assert why_not_seen(FITTING._replace(environment=fine)) == []
    assert why_not_seen(FITTING._replace(has_gpu=False, plugins={})) == []


def test_the_report_names_what_is_here_and_no_home(monkeypatch, tmp_path, capsys):
    home = tmp_path / "home" / "anna"
    (home / ".cache/sparseinst_jax/index").mkdir(parents=True)
    (home / ".cache/sparseinst_jax/index/a").write_bytes(bytes(3_000_000))
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("SPARSEINST_INDEX_CACHE", raising=False)
    monkeypatch.setenv("SPARSEINST_WEIGHTS", str(home / "weights"))
    monkeypatch.setattr(doctor, "LITTLE_MEMORY", 1)
    monkeypatch.setattr(doctor, "LITTLE_DISK", 1)
    assert doctor.main([]) == 0
    text = capsys.readouterr().out
    assert "~/.cache/sparseinst_jax/index, 3 MB (SPARSEINST_INDEX_CACHE moves it)" in text
    assert "~/weights, 0 MB" in text and str(home) not in text
    assert "compiles" in text and "matches    100 predictions with 40 objects" in text
    assert text.endswith("no fault found\n")


def test_what_is_wrong_comes_with_a_cure_and_an_exit_code(monkeypatch, tmp_path, capsys):
    shared = tmp_path / "xla"
    shared.mkdir()
    shared.chmod(0o777)
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(shared))
    monkeypatch.setattr(doctor, "LITTLE_MEMORY", 2**60)
    assert doctor.main([]) == 1
    text = capsys.readouterr().out
    assert "GiB of memory are free" in text and "(docs: memory)" in text
    assert f"Cure: chmod o-w {shared}, and empty it (docs: caches)" in text


def test_a_jax_that_does_not_start_is_described():
    environment = {**os.environ, "JAX_PLATFORMS": "cuda"}
    command = [sys.executable, "-m", "sparseinst_jax", "doctor"]
    done = subprocess.run(
        command,
        env=environment,
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "JAX        does not start" in done.stdout and "unset JAX_PLATFORMS" in done.stdout


def test_help_says_where_a_short_name_leads(capsys):
    assert cli.main(["help", "gpu-not-seen"]) == 0
    assert capsys.readouterr().out == 'docs/gpu.md, "jax does not see my gpu"\n'
