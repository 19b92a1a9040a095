"""The random points of a recorded FastInst case, in the place of `points.random_points`."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from sparseinst_jax.models.fastinst.points import Draw
from tests.parity.cases import Case

NUM_POINTS = 12544
_GUIDED = (Draw.MATCH_GUIDED, Draw.CANDIDATES_GUIDED, Draw.ANYWHERE_GUIDED)
_FIRST_OF_MASK = (Draw.CANDIDATES, Draw.CANDIDATES_GUIDED)


class RecordedPoints:
    """Gives each use the numbers that the original's random source returned there.

    The source is called in the order of the original's losses; the call's number and the step seed
    its numbers. Rows of masks' losses belong to matched pairs, images in order, queries ascending:
    `note_matches` says which these are.
    """

    def __init__(self, case: Case):
        self.start(case)

    def start(self, case: Case) -> None:
        """Begin with the first step of a case; of the same shapes, where functions are compiled."""
        manifest = case.manifest
        self._seed = manifest.get("points_seed", manifest["points"].get("seed"))
        self._num_layers = case.config.model.num_layers
        self._batch = len(manifest["images"])
        self._num_matched = 0  # steps whose matches are known
        self._matches: dict[str, np.ndarray] = {}

    def note_matches(self, matches: dict[str, np.ndarray]) -> None:
        """Note the matches of the next step: int32 [B, M] for each matching."""
        self._num_matched, self._matches = self._num_matched + 1, matches

    def __call__(self, keys: Any, use: Draw, head: int, shape: tuple[int, ...]) -> jax.Array:
        """Return [B, *shape, 2], see `models.fastinst.points.random_points`."""
        result = jax.ShapeDtypeStruct((self._batch, *shape, 2), np.float32)
        return jax.pure_callback(lambda: self._draw(use, head, shape), result)

    def _draw(self, use: Draw, head: int, shape: tuple[int, ...]) -> np.ndarray:
        call = self._first_call(use, head)
        if use in (Draw.MATCH, Draw.MATCH_GUIDED):
            images = range(call, call + self._batch)
            step = self._num_matched
            return np.stack([self._numbers(step, k, (1, *shape[1:])) for k in images])
        name = "guided" if use in _GUIDED else f"head_{head}"
        pairs = [
            (image, target)
            for image, index in enumerate(self._matches[name])
            for _, target in sorted((q, t) for t, q in enumerate(index.tolist()) if q >= 0)
        ]
        points = np.zeros((self._batch, *shape, 2), np.float32)
        rows = self._numbers(self._num_matched - 1, call, (len(pairs), *shape[1:]))
        for pair, row in zip(pairs, rows, strict=True):
            points[pair] = row
        return points

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

    def _numbers(self, step: int, call: int, shape: tuple[int, ...]) -> np.ndarray:
        source = np.random.default_rng([self._seed, step, call])
        return source.random((*shape, 2), dtype=np.float32)
