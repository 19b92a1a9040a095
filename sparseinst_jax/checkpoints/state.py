"""The state of a run at a step: what a checkpoint stores and a training step changes."""

from __future__ import annotations

from typing import Any, NamedTuple


class TrainState(NamedTuple):
    """Everything that a step changes.

    Attributes:
      step: int32, the number of finished steps.
      params: nested dict of float32 arrays, trained.
      statistics: nested dict of float32 arrays: frozen norms and running statistics.
      opt_state: the optimizer's.
      average: (params, statistics), their exponential moving averages; None where none is kept.
    """

    step: Any
    params: dict[str, Any]
    statistics: dict[str, Any]
    opt_state: Any
    average: tuple[dict[str, Any], dict[str, Any]] | None = None

    @property
    def to_use(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """The parameters and statistics to evaluate and predict with: the averages, if any."""
        return (self.params, self.statistics) if self.average is None else self.average
