"""The random points of a recorded FastInst case, in the place of `points.random_points`."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import numpy as np

from sparseinst_jax.models.fastinst.objective import GUIDED, FastInstObjective
from sparseinst_jax.models.fastinst.points import Draw
from tests.parity.cases import Case

_GUIDED = (Draw.MATCH_GUIDED, Draw.CANDIDATES_GUIDED, Draw.ANYWHERE_GUIDED)
_FIRST_OF_MASK = (Draw.CANDIDATES, Draw.CANDIDATES_GUIDED)

Drawn = dict[tuple[int, int], np.ndarray]


def given_points(
    drawn: Mapping[tuple[int, int], jax.Array], use: Draw, head: int, shape: tuple[int, ...]
) -> jax.Array:
    """Take the points from what an objective is given in the place of random keys."""
    points = drawn[use, head]
    assert points.shape[1:-1] == shape
    return points


class RecordedPoints:
    """Gives each use the numbers that the original's random source returned there.

    The source is called in the order of the original's losses; the call's number and the step seed
    its numbers. Rows of masks' losses belong to matched pairs, images in order, queries ascending.
    """

    def __init__(self, case: Case, objective: FastInstObjective):
        manifest = case.manifest
        self._seed = manifest.get("points_seed", manifest["points"].get("seed"))
        self._objective, self._num_layers = objective, objective.num_layers
        self._batch = len(manifest["images"])
        self._step = -1

    def of_matching(self) -> Drawn:
        """The points of the next step's costs: [B, 1, P, 2] for each use and head."""
        self._step += 1
        last = self._num_layers
        uses = [(Draw.MATCH_GUIDED, last), *((Draw.MATCH, head) for head in range(last + 1))]
        shape = 1, self._objective.num_points
        return {
            (use, head): np.stack(
                [self._numbers(self._first_call(use, head) + i, shape) for i in range(self._batch)]
            )
            for use, head in uses
        }

    def of_losses(self, matches: Mapping[str, np.ndarray]) -> Drawn:
        """The points of the step's losses: [B, M, P, 2]; matches are [B, M] for each matching."""
        objective = self._objective
        candidates = objective.oversampling * objective.num_points
        anywhere = objective.num_points - int(objective.certain_share * objective.num_points)
        numbers = {
            **dict.fromkeys(_FIRST_OF_MASK, candidates),
            **dict.fromkeys((Draw.ANYWHERE, Draw.ANYWHERE_GUIDED), anywhere),
        }
        result = {}
        for use, number in numbers.items():
            is_guided = use in _GUIDED
            for head in range(int(is_guided), self._num_layers + 1):
                index = matches[GUIDED if is_guided else f"head_{head}"]
                pairs = [
                    (image, target)
                    for image, row in enumerate(index)
                    for _, target in sorted((q, t) for t, q in enumerate(row.tolist()) if q >= 0)
                ]
                points = np.zeros((*index.shape, number, 2), np.float32)
                rows = self._numbers(self._first_call(use, head), (len(pairs), number))
                for pair, row in zip(pairs, rows, strict=True):
                    points[pair] = row
                result[use, head] = points
        return result

    def _first_call(self, use: Draw, head: int) -> int:
        """Count the calls before this use: guided matcher, last head, guided, other heads."""
        of_last, last = self._batch, self._num_layers
        of_guided = of_last + self._batch + 2
        of_others = of_guided + 2 * last
        second = 0 if use in (*_FIRST_OF_MASK, Draw.MATCH, Draw.MATCH_GUIDED) else 1
        if use == Draw.MATCH_GUIDED:
            return 0
        if use in _GUIDED:
            return of_guided + 2 * (head - 1) + second
        start = of_last if head == last else of_others + (self._batch + 2) * head
        return start if use == Draw.MATCH else start + self._batch + second

    def _numbers(self, call: int, shape: tuple[int, ...]) -> np.ndarray:
        source = np.random.default_rng([self._seed, self._step, call])
        return source.random((*shape, 2), dtype=np.float32)
