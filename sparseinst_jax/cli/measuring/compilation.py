"""How long compilation takes, and how often it happens, by what JAX itself reports."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache

from sparseinst_jax.runtime.process import COMPILED

_SETTINGS = {
    "jax_persistent_cache_min_compile_time_secs": 0,
    "jax_persistent_cache_min_entry_size_bytes": -1,
}


class Compilations:
    """Numbers that grow while `watched` is open.

    Attributes:
      number: programs that were compiled or taken from the persistent cache.
      seconds: what that took, without tracing and lowering.
    """

    def __init__(self):
        self.number, self.seconds = 0, 0.0

    def __call__(self, event: str, duration_secs: float, **kwargs: Any) -> None:
        """Take a report of JAX."""
        if event == COMPILED:
            self.number += 1
            self.seconds += duration_secs


@contextmanager
def watched() -> Iterator[Compilations]:
    """Count the compilations of this process while open."""
    compilations = Compilations()
    jax.monitoring.register_event_duration_secs_listener(compilations)
    try:
        yield compilations
    finally:
        jax.monitoring.unregister_event_duration_listener(compilations)


@contextmanager
def empty_cache() -> Iterator[None]:
    """While open, the persistent compilation cache is a new folder that takes every program."""
    before = {name: getattr(jax.config, name) for name in (*_SETTINGS, "jax_compilation_cache_dir")}
    with tempfile.TemporaryDirectory(prefix="compilation-cache-") as folder:
        try:
            _use({**_SETTINGS, "jax_compilation_cache_dir": folder})
            yield
        finally:
            _use(before)


def _use(settings: dict[str, Any]) -> None:
    for name, value in settings.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()  # opened at the first compilation, it would keep its folder


def first_calls(run: Callable[[], Any], clock: Callable[[], float]) -> dict[str, Any]:
    """Call a function twice as if for the first time: nothing compiled, then all in the cache.

    Args:
      run: works to the end; what it has compiled before is forgotten.
      clock: seconds.

    Returns:
      Seconds of both calls (tracing, compiling and running), seconds of compilation alone in
      both, and the number of programs.
    """
    found: dict[str, Any] = {}
    with empty_cache():
        for name in ("cold", "cached"):
            jax.clear_caches()
            with watched() as compilations:
                start = clock()
                run()
                found[f"first_call_{name}_s"] = clock() - start
            found[f"compile_{name}_s"] = compilations.seconds
            found["num_programs"] = compilations.number
    return found
