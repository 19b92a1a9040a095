"""Stop a run whose evaluations no longer improve."""

import math
from collections.abc import Iterable, Mapping

from sparseinst_jax.runtime.messages import in_percent


class EarlyStopping:
    """Counts the evaluations since the best one.

    Args:
      patience: evaluations without a better AP after which the run stops; 0 never stops it.
      rows: metrics of the steps done before, in order; those with an `AP` are evaluations.
    """

    def __init__(self, patience: int, rows: Iterable[Mapping[str, float]] = ()):
        self.patience = patience
        self.best, self.waited = -math.inf, 0
        for row in rows:
            if "AP" in row:
                self.add(row["AP"])

    def add(self, score: float) -> None:
        """Add the AP of an evaluation; an undefined one does not count as better."""
        score = float(f"{score:.9g}")  # as it is stored: a continued run must count the same
        if score > self.best:
            self.best, self.waited = score, 0
        else:
            self.waited += 1

    @property
    def is_over(self) -> bool:
        """Whether the run has to stop."""
        return 0 < self.patience <= self.waited

    def explain(self, step: int, best_step: int | None) -> str:
        """Explain why the run stops after `step`, and how to use it."""
        return (
            f"stopped early after step {step}: no better AP in the last {self.waited} evaluations."
            f" The best checkpoint is of step {best_step}, AP {in_percent(self.best)} %:"
            " add --step best to `sparseinst eval` or `predict` to use it. To train on, raise"
            " --config.train.early_stopping or set it to 0."
        )
