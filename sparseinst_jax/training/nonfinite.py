"""Steps whose loss or gradient is NaN or infinite: skipped and counted, or the end of the run."""

import math
from collections.abc import Iterable, Mapping

COLUMN = "nonfinite_steps"  # in metrics.csv: how many steps of the run were skipped so far


class NonFiniteLossError(RuntimeError):
    """A loss or the gradient became NaN or infinite; training on would only spread it."""


class NonFiniteSteps:
    """Counts the steps that were skipped, and stops the run when there are too many.

    Args:
      limit: steps in a row that may be skipped (the step itself must skip them, see
        `step.TrainStep`); 0 allows none.
      rows: metrics of the steps done before, in order.
    """

    def __init__(self, limit: int, rows: Iterable[Mapping[str, float]] = ()):
        self.limit, self.total, self.in_a_row = limit, 0, 0
        for row in rows:
            total = int(row.get(COLUMN, self.total))
            self.in_a_row = self.in_a_row + 1 if total > self.total else 0
            self.total = total

    def judge(self, values: Mapping[str, float]) -> tuple[dict[str, float], list[str], bool]:
        """Judge the metrics of one step.

        Returns:
          What goes into its row (without values that are not finite, with the counter where steps
          may be skipped); the names of the values that are not finite; whether the run has to stop.
        """
        bad = [name for name, value in values.items() if not math.isfinite(value)]
        kept = {name: value for name, value in values.items() if name not in bad}
        self.in_a_row = self.in_a_row + 1 if bad else 0
        self.total += bool(bad)
        if self.limit:
            kept[COLUMN] = self.total
        return kept, bad, self.in_a_row > self.limit
