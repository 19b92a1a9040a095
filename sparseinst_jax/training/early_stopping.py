"""End a run whose evaluations no longer get better."""

import math
from collections.abc import Iterable, Mapping


class EarlyStopping:
    """Counts the evaluations since the best one.

    Args:
      patience: evaluations without a better AP after which the run ends; 0 never ends it.
      rows: metrics of the steps done before, in order; those with an `AP` are evaluations.
    """

    def __init__(self, patience: int, rows: Iterable[Mapping[str, float]] = ()):
        self.patience = patience
        self.best, self.waited = -math.inf, 0
        for row in rows:
            if "AP" in row:
                self.add(row["AP"])

    def add(self, score: float) -> None:
        """Note the AP of an evaluation; one that is not defined is no better."""
        score = float(f"{score:.9g}")  # as it is stored: a continued run must count the same
        if score > self.best:
            self.best, self.waited = score, 0
        else:
            self.waited += 1

    @property
    def is_over(self) -> bool:
        """Whether the run has to end."""
        return 0 < self.patience <= self.waited

    def explain(self, step: int, best_step: int | None) -> str:
        """Say why the run ends after `step`, and what to do with it."""
        return (
            f"stopped early after step {step}: no better AP in the last {self.waited} evaluations."
            f" The best checkpoint is of step {best_step}, AP {self.best:.4f}: add --step best to"
            " eval.py or predict.py to use it. To train on, raise --config.train.early_stopping"
            " or set it to 0."
        )
