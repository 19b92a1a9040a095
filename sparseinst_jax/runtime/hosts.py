"""Join the hosts of a job, exchange bytes, and detect a host that stops responding.

A host is one process with its local devices. Alone, everything here does nothing: `gather` gives
back what it was given, `report` and `leave` return at once.
"""

import argparse
import contextlib
import multiprocessing
import os
import socket
import sys
import threading
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from sparseinst_jax.runtime.host_watch import LOST_HOST, HostWatch

TIMEOUT_VARIABLE = "SPARSEINST_HOST_TIMEOUT"
_DEFAULT_TIMEOUT = 300.0  # seconds
# JAX's own time-outs end a process without our message: they come after ours.
_SPARE = 30
_SHUTDOWN_TIMEOUT = 24 * 3600  # the first host may be drawing pictures; `HostWatch` sees if it dies
# Number of processes of this job step, and the place of this one among them.
_NUMBERS = (
    ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID"),
    ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID"),
    ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
)
_TPU_HOSTS = ("TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES")
_BY_HAND = (
    "set JAX_COORDINATOR_ADDRESS (host:port of the first host), JAX_NUM_PROCESSES and"
    " JAX_PROCESS_ID (0, 1, ...) on each"
)

_watch: HostWatch | None = None


class PlaceInJob(NamedTuple):
    """What the environment says: where from, the number of hosts and the place of this one."""

    source: str
    number: int
    index: int


def place_in_environment() -> PlaceInJob | None:
    """Find out from the environment whether this process is one of several.

    Returns:
      None where the environment says nothing or the process is alone. The numbers are those of
      the job step, not of the allocation: a script that runs alone inside a large Slurm job is
      alone.

    Raises:
      ValueError: the environment contradicts itself.
    """
    for number, index in _NUMBERS:
        if number in os.environ:
            place = PlaceInJob(number, _integer(number), _integer(index))
            if place.number < 1 or not 0 <= place.index < place.number:
                raise ValueError(
                    f"the environment says that this is process {place.index} of {place.number}"
                    f" ({index} and {number}): expected 0 to number - 1."
                )
            return place if place.number > 1 else None
    for name in _TPU_HOSTS:
        number = len(os.environ.get(name, "").split(","))
        if number > 1 and "TPU_WORKER_ID" in os.environ:
            return PlaceInJob(name, number, _integer("TPU_WORKER_ID"))
    return None


def may_be_one_of_several() -> bool:
    """Whether the environment says so; also where it contradicts itself, which `join` reports."""
    try:
        return place_in_environment() is not None
    except ValueError:
        return True


def add_argument(parser: argparse.ArgumentParser) -> None:
    """Add `--distributed` and `--no-distributed`, for `join`."""
    parser.add_argument(
        "--distributed",
        action=argparse.BooleanOptionalAction,
        help="work with the other hosts of the job: start the same command on each. Default:"
        f" if {', '.join(number for number, _ in _NUMBERS)} or {_TPU_HOSTS[1]} show that there"
        " are several. Elsewhere " + _BY_HAND,
    )


def join(wanted: bool | None = None) -> None:
    """Join the other hosts of the job, before anything else uses JAX; once joined do nothing.

    Args:
      wanted: True joins and False does not; None joins where the environment says that this
        process is one of several (`place_in_environment`).

    Raises:
      ValueError: it is not known where the others are.
    """
    if are_joined():
        return
    place = place_in_environment()
    if wanted is False or (wanted is None and place is None):
        return
    if place is None and any(os.environ.get(number) == "1" for number, _ in _NUMBERS):
        return  # asked for, but alone: there is nothing to wait for
    timeout = _timeout()
    late = threading.Timer(timeout, _die_of_not_joining, [place, timeout])
    late.daemon = True
    late.start()
    try:
        _initialize(place, timeout)
    except ValueError as error:  # of JAX, where no cluster is known to it
        raise ValueError(
            f"--distributed: the other hosts cannot be found ({error}): {_BY_HAND}."
        ) from None
    finally:
        late.cancel()
    _start_watch(timeout)


def _initialize(place: PlaceInJob | None, timeout: float) -> None:
    import jax

    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # Its handler would swallow SIGTERM; the trainer makes the hosts agree on a step.
    jax.config.update("jax_enable_preemption_service", False)
    is_complete = place is not None and "JAX_COORDINATOR_ADDRESS" in os.environ
    jax.distributed.initialize(
        num_processes=place.number if place else None,
        process_id=place.index if place else None,
        # Everything is given: keep JAX from asking cloud services.
        cluster_detection_method="deactivate" if is_complete else None,
        initialization_timeout=round(timeout) + _SPARE,
        heartbeat_timeout_seconds=round(timeout) + _SPARE,
        shutdown_timeout_seconds=_SHUTDOWN_TIMEOUT,
    )
    if _is_alone_on_its_machine() and "JAX_LOCAL_DEVICE_IDS" not in os.environ:
        # Under Slurm and Open MPI JAX takes one device for each process.
        for kind in ("cuda", "rocm"):
            jax.config.update(f"jax_{kind}_visible_devices", "all")


def _is_alone_on_its_machine() -> bool:
    if "SLURM_STEP_NUM_NODES" in os.environ:
        return os.environ.get("SLURM_STEP_NUM_TASKS") == os.environ["SLURM_STEP_NUM_NODES"]
    return os.environ.get("OMPI_COMM_WORLD_LOCAL_SIZE") == "1"


def _start_watch(timeout: float) -> None:
    global _watch
    import jax
    from jax._src import distributed  # the board of the job has no public name

    board = distributed.global_state.client
    if board is not None and jax.process_count() > 1:
        _watch = HostWatch(
            board, jax.process_index(), jax.process_count(), socket.gethostname(), timeout, _end
        )
        _watch.start()


def gather(payload: bytes) -> list[bytes]:
    """Exchange bytes of any length: what each host gave, in the order of the hosts, on all.

    All hosts must call it, in the same order among the other things that they do together.
    """
    import jax

    if jax.process_count() == 1:
        return [payload]
    from jax.experimental.multihost_utils import process_allgather

    lengths = np.ravel(process_allgather(np.int32(len(payload))))
    padded = np.zeros(max(int(lengths.max()), 1), np.uint8)
    padded[: len(payload)] = np.frombuffer(payload, np.uint8)
    rows = process_allgather(padded)
    return [row[:length].tobytes() for row, length in zip(rows, lengths, strict=True)]


def first_alone(function: Callable[[], object]) -> None:
    """Call a function on the first host while the others wait for it to return."""
    import jax

    if jax.process_index() == 0:
        function()
    gather(b"")


def refuse_differences(what: str, text: str) -> None:
    """Refuse to continue if the hosts were started with different values.

    Raises:
      ValueError: on all hosts, if the text is not the same on all.
    """
    texts = gather(text.encode())
    others = [str(index) for index, other in enumerate(texts) if other != texts[0]]
    if others:
        raise ValueError(
            f"the hosts of this job have a different {what} (host 0 against host"
            f" {', '.join(others)}): start the same command on all of them, with the same files."
        )


def are_joined() -> bool:
    """Whether this process is one of several."""
    return _watch is not None


def report(doing: str) -> None:
    """Record what this host is doing; one that makes no progress is stopped, see `HostWatch`."""
    if _watch is not None:
        _watch.report(doing)


def leave(message: str, code: int) -> None:
    """Stop this process at once if it is one of several, after reporting why to the others.

    A process that ended in the ordinary way would first wait for the others, which wait for it.
    """
    if _watch is not None:
        _watch.report_failure(message)
        _end(code)


def end_within(seconds: float, code: int) -> None:
    """Let this process end by itself, but no later: threads of libraries may wait for ever.

    One of several hosts stays: it waits for the others, which are watched.
    """
    if _watch is None:
        timer = threading.Timer(seconds, _end, [code])
        timer.daemon = True
        timer.start()


def _end(code: int) -> None:
    """End the process and those that read images for it, from any thread."""
    for stream in filter(None, (sys.stdout, sys.stderr)):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    for child in multiprocessing.active_children():
        child.kill()
    os._exit(code)


def _die_of_not_joining(place: PlaceInJob | None, timeout: float) -> None:
    address = os.environ.get("JAX_COORDINATOR_ADDRESS", "the address that JAX found out")
    me = f"host {place.index} of {place.number} ({place.source})" if place else "this host"
    if place is not None and place.index == 0:
        why = f"as the first it waited for the other {place.number - 1}, and not all came"
    elif ":" in address and not _answers(address):
        why = f"the first host does not answer at {address}"
    else:
        why = f"the first host at {address} waits for others, or belongs to another job"
    print(
        f"error: {me} could not join the job within {timeout:g} s: {why}. Start the same command"
        f" on every host; {_BY_HAND}; let the port through; {TIMEOUT_VARIABLE} (seconds) waits"
        " longer. One process alone: --no-distributed.",
        file=sys.stderr,
    )
    _end(LOST_HOST)


def _answers(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=2).close()
    except (OSError, ValueError):
        return False
    return True


def _timeout() -> float:
    text = os.environ.get(TIMEOUT_VARIABLE, str(_DEFAULT_TIMEOUT))
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < 1e6:
        raise ValueError(
            f"the environment variable {TIMEOUT_VARIABLE} must be seconds above 0, got {text!r}"
        )
    return seconds


def _integer(name: str) -> int:
    text = os.environ.get(name, "")
    if not text.isdecimal():
        raise ValueError(f"the environment variable {name} must be an integer, got {text!r}")
    return int(text)
