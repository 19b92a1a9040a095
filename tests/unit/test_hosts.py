"""What the environment says about several hosts; a job of one host."""

import argparse
import json
import os
import socket
import subprocess
import sys

import pytest

from sparseinst_jax.runtime import hosts
from sparseinst_jax.runtime.hosts import PlaceInJob

SLURM = {
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_NODELIST": "node[01-04]",
    "SLURM_NTASKS": "4",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_NUM_NODES": "4",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "0",
}


@pytest.fixture
def environment(monkeypatch):
    for name in list(os.environ):
        if name.startswith(("JAX_", "SLURM_", "OMPI_", "TPU_", "SPARSEINST_")):
            monkeypatch.delenv(name)

    def set_all(values):
        for name, value in values.items():
            monkeypatch.setenv(name, value)

    return set_all


@pytest.mark.parametrize(
    "values, place",
    [
        ({}, None),
        ({"JAX_NUM_PROCESSES": "3", "JAX_PROCESS_ID": "1"}, PlaceInJob("JAX_NUM_PROCESSES", 3, 1)),
        ({"JAX_NUM_PROCESSES": "1", "JAX_PROCESS_ID": "0", **SLURM}, None),
        (SLURM, PlaceInJob("SLURM_STEP_NUM_TASKS", 4, 3)),
        # A shell or script that runs alone in an allocation of four tasks.
        ({**SLURM, "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, None),
        ({"SLURM_JOB_ID": "4711", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"}, None),
        (
            {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "0"},
            PlaceInJob("OMPI_COMM_WORLD_SIZE", 2, 0),
        ),
        (
            {"TPU_WORKER_HOSTNAMES": "t0,t1", "TPU_WORKER_ID": "1"},
            PlaceInJob("TPU_WORKER_HOSTNAMES", 2, 1),
        ),
        ({"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"}, None),
    ],
)
def test_the_place_is_that_in_the_job_step(environment, values, place):
    environment(values)
    assert hosts.place_in_environment() == place


@pytest.mark.parametrize(
    "values, message",
    [
        ({"JAX_NUM_PROCESSES": "two", "JAX_PROCESS_ID": "0"}, "JAX_NUM_PROCESSES must be an int"),
        ({"JAX_NUM_PROCESSES": "2"}, "JAX_PROCESS_ID must be an integer, got ''"),
        ({"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "2"}, "process 2 of 2 .*expected 0 to"),
        (
            {"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1", "SPARSEINST_HOST_TIMEOUT": "soon"},
            "SPARSEINST_HOST_TIMEOUT must be seconds above 0, got 'soon'",
        ),
    ],
)
def test_an_environment_that_cannot_be_is_refused_by_name(environment, values, message):
    environment(values)
    with pytest.raises(ValueError, match=message):
        hosts.join()


@pytest.mark.parametrize("wanted", [None, False, True])
def test_one_task_of_slurm_waits_for_nobody(environment, wanted):
    environment({**SLURM, "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"})
    hosts.join(wanted)
    assert not hosts.are_joined()


def test_no_distributed_stays_alone_in_a_job_of_many(environment):
    environment(SLURM)
    hosts.join(False)
    assert not hosts.are_joined()


def test_the_flag_has_three_states():
    parser = argparse.ArgumentParser()
    hosts.add_argument(parser)
    assert parser.parse_args([]).distributed is None
    assert parser.parse_args(["--distributed"]).distributed is True
    assert parser.parse_args(["--no-distributed"]).distributed is False


def test_alone_everything_is_said_to_oneself(capsys):
    assert hosts.gather(b"abc") == [b"abc"]
    hosts.refuse_differences("configuration", json.dumps({"a": 1}))
    called = []
    hosts.first_alone(lambda: called.append(1))
    assert called == [1]
    hosts.report("step 1")
    hosts.leave("an error", 1)  # returns: this process goes on


JOBS = {
    # What `join` is given, the process's number in the job, and the message.
    "no address": ("True", None, "--distributed: the other hosts cannot be found"),
    "no coordinator": (
        *("None", "1"),
        "host 1 of 2 (JAX_NUM_PROCESSES) could not join the job within 2 s: the",
    ),
    "no other host": ("None", "0", "as the first it waited for the other 1, and not all came"),
}


def _start(arguments, index, port):
    values = {"SPARSEINST_HOST_TIMEOUT": "2", "JAX_PLATFORMS": "cpu"}
    if index is not None:
        values |= {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}"}
        values |= {"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": index}
    program = (
        "import sys, jax\nfrom sparseinst_jax import cli\n"
        "from sparseinst_jax.runtime import hosts\n"
        f"sys.exit(cli.run(lambda _: hosts.join({arguments}), []))"
    )
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "JAX_"))}
    return subprocess.Popen(
        [sys.executable, "-c", program],
        env={**environment, **values},
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture(scope="module")
def jobs():
    """Start all of them: each waits for others for seconds."""
    probes = [socket.create_server(("127.0.0.1", 0)) for _ in JOBS]
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    jobs = zip(JOBS.items(), ports, strict=True)
    processes = {name: _start(*job[:2], port) for (name, job), port in jobs}
    yield processes
    for process in processes.values():
        process.kill()
        process.wait()


@pytest.mark.parametrize("name", JOBS)
def test_a_job_that_does_not_come_together_ends_with_a_message(jobs, name):
    _, index, message = JOBS[name]
    _, said = jobs[name].communicate(timeout=60)
    assert jobs[name].returncode == (1 if index is None else 75), said
    assert said.count("error: ") == 1 and message in said
    assert "JAX_COORDINATOR_ADDRESS (host:port of the first host)" in said
