"""How many cases the property-based tests throw: few and always the same ones in the suite.

`FUZZ_EXAMPLES=2500 pytest ...`, or `make fuzz`, throws so many new ones at each test.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from hypothesis import HealthCheck, settings

VARIABLE = "FUZZ_EXAMPLES"


def cases(in_suite: int) -> Callable[[Any], Any]:
    """Decorate a property-based test; in the suite it has `in_suite` cases."""
    return settings(
        max_examples=int(os.environ.get(VARIABLE, in_suite)),
        derandomize=VARIABLE not in os.environ,
        deadline=None,  # the machine may be busy
        database=None,
        suppress_health_check=list(HealthCheck),
    )
