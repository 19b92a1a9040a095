import json
import os
import platform
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparseinst_jax import cli
from sparseinst_jax.data._index import cache
from sparseinst_jax.runtime import process


def test_threads_and_cache_are_set_unless_the_user_has_set_them(monkeypatch, tmp_path):
    limit = "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"
    for name in ("PJRT_NPROC", "NPROC", "JAX_COMPILATION_CACHE_DIR", limit):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("NPROC", "3")
    monkeypatch.delitem(process.sys.modules, "jax", raising=False)  # as before JAX is imported
    process.set_environment()
    assert int(os.environ["PJRT_NPROC"]) >= 2
    assert os.environ["NPROC"] == "3"
    assert os.environ["JAX_COMPILATION_CACHE_DIR"] == str(tmp_path / "sparseinst_jax" / "xla")
    assert os.environ[limit] == "0"
    monkeypatch.setenv(limit, "2.5")
    process.set_environment()
    assert os.environ[limit] == "2.5"


@pytest.mark.parametrize(
    ("variables", "arguments", "is_several"),
    [
        ({}, [], False),
        ({"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}, [], True),
        ({"JAX_NUM_CPU_DEVICES": "4"}, [], True),
        ({"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "0"}, [], True),
        ({}, ["train.py", "--distributed"], True),
    ],
    ids=["one device", "virtual devices", "JAX's devices", "a job", "--distributed"],
)
def test_one_device_gets_a_thread_for_each_core_and_collectives_get_32(
    monkeypatch, variables, arguments, is_several
):
    for name in ("PJRT_NPROC", "NPROC", "XLA_FLAGS", "JAX_NUM_CPU_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("os.cpu_count", lambda: 3)
    monkeypatch.setattr("sys.argv", arguments)
    process.set_environment()
    expected = "32" if is_several else "3"
    assert (os.environ["PJRT_NPROC"], os.environ["NPROC"]) == (expected, expected)


# Once 24 MiB are freed, glibc by itself takes 16 MiB from a heap; prints how much it maps alone.
LARGE_BLOCK = """
import ctypes
from sparseinst_jax.runtime import process
process.set_environment()
process.unmap_freed_blocks()
c = ctypes.CDLL(None)
c.malloc.restype, c.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
c.free.argtypes = [ctypes.c_void_p]
class Info(ctypes.Structure):
    _fields_ = [(f"field_{number}", ctypes.c_size_t) for number in range(10)]
c.mallinfo2.restype = Info
c.free(c.malloc(24 << 20))
before = c.mallinfo2().field_4  # hblkhd, bytes in blocks that are mapped alone
c.malloc(16 << 20)
print((c.mallinfo2().field_4 - before) >> 20)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="about glibc")
@pytest.mark.parametrize(
    "variables, mapped", [({}, 16), ({"GLIBC_TUNABLES": "glibc.malloc.mmap_threshold=33554432"}, 0)]
)
def test_training_gives_large_blocks_back_when_they_are_freed_unless_the_user_says_otherwise(
    variables, mapped
):
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")} | variables
    command = [sys.executable, "-c", LARGE_BLOCK]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert int(run.stdout) == mapped


def test_training_keeps_the_ends_of_one_heap_for_each_core_unless_the_user_says_otherwise(
    monkeypatch,
):
    for name in ("MALLOC_ARENA_MAX", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "33554432")
    monkeypatch.setattr("os.cpu_count", lambda: 3)
    calls = []
    glibc = types.SimpleNamespace(mallopt=lambda *call: calls.append(call))
    monkeypatch.setattr(process.ctypes, "CDLL", lambda _: glibc)
    process.unmap_freed_blocks()
    assert calls == [(-1, 128 << 20), (-8, 3)]  # M_TRIM_THRESHOLD, M_ARENA_MAX
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "0")
    process.unmap_freed_blocks()
    assert calls[2:] == [(-8, 3)]


# Counts calls of glibc while one program, and then none, is compiled.
TRIMMED = """
import ctypes, types
calls = []
ctypes.CDLL = lambda _: types.SimpleNamespace(malloc_trim=calls.append)
import jax, numpy
from sparseinst_jax.runtime import process
process.trim_after_compiling()
process.trim_after_compiling()
double = jax.jit(lambda x: x * 2)
for _ in range(2):
    double(numpy.ones(3)).block_until_ready()
    print(calls)
"""


def test_memory_is_given_back_once_for_each_program_compiled():
    command = [sys.executable, "-c", TRIMMED]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert run.stdout.split("\n") == ["[0]", "[0]", ""]


@pytest.mark.parametrize("home", [None, "not writable"])
def test_without_a_home_nothing_is_kept(monkeypatch, tmp_path, home):
    def nobody(*_):
        raise KeyError("getpwuid(): uid not found")

    for name in ("HOME", "XDG_CACHE_HOME", "JAX_COMPILATION_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", nobody)
    if home is not None:
        (tmp_path / "file").write_text("")  # the administrator may write in every folder
        monkeypatch.setenv("HOME", str(tmp_path / "file"))
    monkeypatch.delitem(process.sys.modules, "jax", raising=False)
    process.set_environment()
    assert "JAX_COMPILATION_CACHE_DIR" not in os.environ
    assert cache._root() is None


START_ERRORS = {
    # The environment, then what the one line says.
    ("JAX_PLATFORMS", "cuda"): "no such device was found. Cure: unset JAX_PLATFORMS=cuda, or ",
    ("JAX_PLATFORMS", "tpu"): "Unable to initialize backend 'tpu'",
    ("JAX_PLATFORMS", "nonsense"): "Backend 'nonsense' is not in the list of known backends",
    ("JAX_TRACEBACK_FILTERING", "off"): "no such device was found",
    ("JAX_TRACEBACK_FILTERING", "remove_frames"): "no such device was found",
}


# Importing takes most of a start: one process does it and starts no device, its children do.
STARTS = """
import json, os, sys
import jax
from sparseinst_jax import cli
from sparseinst_jax.cli import summary
for name, value in json.loads(sys.argv[1]):
    child = os.fork()
    if child == 0:
        os.environ[name] = value
        jax.config.update(name.lower(), value)
        os.dup2(os.open(f"{name}={value}", os.O_WRONLY | os.O_CREAT, 0o644), 2)
        sys.argv = ["sparseinst", "summary", "--config", "tiny"]
        sys.exit(cli.main())
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.fixture(scope="module")
def starts(tmp_path_factory):
    """The exit code and the messages of the command with each variable, and no GPU."""
    folder = tmp_path_factory.mktemp("starts")
    path = os.pathsep.join([os.getcwd(), *sys.path])
    environment = {**os.environ, "JAX_PLATFORMS": "cuda", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-c", STARTS, json.dumps(list(START_ERRORS))]
    run = subprocess.run(
        command, cwd=folder, env=environment | {"PYTHONPATH": path}, capture_output=True, text=True
    )
    codes = [int(line) for line in run.stdout.splitlines()]
    said = [(folder / "=".join(variable)).read_text() for variable in START_ERRORS]
    return dict(zip(START_ERRORS, zip(codes, said, strict=True), strict=True))


@pytest.mark.parametrize("variable", START_ERRORS)
def test_a_device_that_is_asked_for_and_absent_is_one_line_with_a_cure(starts, variable):
    code, said = starts[variable]
    assert code == 1
    (line,) = said.splitlines()
    assert line.startswith("error: JAX cannot start: ") and START_ERRORS[variable] in line
    assert "(docs: gpu-not-seen)" in line and "JAX_PLATFORMS=cpu to do without the GPU" in line


def test_full_memory_and_an_unusable_gpu_are_one_line_with_a_cure(capsys):
    def fill(_):
        return jnp.zeros(10**13).sum()

    def fill_host(_):
        return np.zeros(10**15)

    def fail(_):
        raise jax.errors.JaxRuntimeError("FAILED_PRECONDITION: DNN library initialization failed.")

    assert [cli.run(function, []) for function in (fill, fill_host, fail)] == [1, 1, 1]
    device, host, gpu = capsys.readouterr().err.splitlines()
    assert device.startswith("error: the memory of the device is full (RESOURCE_EXHAUSTED: Out of")
    assert "--config.train.micro_batches=2" in device and "--config.eval.batch_size=1" in device
    assert host.startswith("error: the memory of the machine is full (Unable to allocate")
    assert gpu.startswith("error: the GPU cannot be used: FAILED_PRECONDITION: DNN library")
    with pytest.raises(RuntimeError, match="ours"):  # a fault of the program keeps its traceback
        cli.run(lambda _: _raise(RuntimeError("ours")), [])


def _raise(error):
    raise error


def test_a_plugin_that_does_not_fit_is_one_line(tmp_path):
    plugin = tmp_path / "jax_plugins" / "xla_other"
    plugin.mkdir(parents=True)
    fault = "Found cuDNN version 8907, but JAX was built against version 9800."
    (plugin / "__init__.py").write_text(f"def initialize(): raise RuntimeError({fault!r})")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    command = [sys.executable, "-m", "sparseinst_jax", "summary", "--config", "tiny"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0 and run.stdout
    (line,) = run.stderr.splitlines()
    assert (
        f"JAX goes on without a plugin, which says: {fault} Cure: run `sparseinst doctor`" in line
    )
