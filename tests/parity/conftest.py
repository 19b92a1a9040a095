"""The parity table: for each recorded case, the largest error against its tolerance."""

from __future__ import annotations

import pytest

from tests.parity.cases import Errors


@pytest.fixture
def errors(request, record_property):
    """Collect errors for the table; fail at the end of the test with all that are too large."""
    callspec = getattr(request.node, "callspec", None)  # of a test with parameters
    case = callspec.params.get("name") if callspec else request.node.name.removeprefix("test_")
    collected = Errors(case or request.node.name, record_property)
    yield collected
    collected.raise_if_any()


def pytest_terminal_summary(terminalreporter, config) -> None:
    """Print a line for each case and kind of quantity; with -v one for each quantity."""
    rows: dict[tuple[str, str], tuple[float, str, float, float]] = {}
    for reports in terminalreporter.stats.values():
        for report in reports:
            for kind, value in getattr(report, "user_properties", ()):
                if kind == "parity":
                    case, group, quantity, error, tolerance = value
                    share = error / tolerance if tolerance else float(error > 0)
                    key = (case, quantity if config.option.verbose > 0 else group)
                    row = (share, quantity, error, tolerance)
                    rows[key] = max(rows.get(key, row), row)
    if not rows:
        return
    terminalreporter.section("parity with the original: the largest error against its tolerance")
    header = f"{'case':40} {'kind':27} {'worst quantity':44} {'error':>9} {'tolerance':>9}  share"
    terminalreporter.write_line(header)
    for (case, kind), (share, quantity, error, tolerance) in rows.items():
        row = f"{case[:40]:40} {kind[:27]:27} {quantity:44} {error:9.3g} {tolerance:9.3g}"
        terminalreporter.write_line(f"{row} {share:6.1%}")
