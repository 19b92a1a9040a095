"""The state of a run at a step: what a checkpoint stores and a training step changes."""

from __future__ import annotations

from typing import Any, NamedTuple


class TrainState(NamedTuple):
    """Everything that a step changes."""

    step: Any  # int32, the number of finished steps
    params: dict[str, Any]  # nested dict of float32 arrays, trained
    statistics: dict[str, Any]  # nested dict of float32 arrays: frozen norms and running statistics
    opt_state: Any  # the optimizer's
    # (params, statistics), their exponential moving averages; None where none is kept
    average: tuple[dict[str, Any], dict[str, Any]] | None = None

    @property
    def to_use(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """The parameters and statistics to evaluate and predict with: the averages, if any."""
        return (self.params, self.statistics) if self.average is None else self.average
