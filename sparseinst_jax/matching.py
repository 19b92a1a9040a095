"""One-to-one matching of predictions to targets, by SciPy on the host."""

from __future__ import annotations

import numpy as np

UNMATCHED = -1


def match(match_score: np.ndarray, is_target: np.ndarray, minimise: bool = False) -> np.ndarray:
    """Return for every target the prediction that has to learn it.

    Maximises (or minimises) the sum of scores of each image. With more targets than predictions the
    best N targets are matched. A score that is not finite counts as the worst, so that the matcher
    never raises while devices wait for it; the loss then shows the fault.

    Source: SparseInst (arXiv:2203.12827), bipartite matching; reference `loss.py`.

    Args:
      match_score: float [..., N, M], larger is better.
      is_target: bool [..., M]; columns of padding are ignored.
      minimise: smaller is better.

    Returns:
      int32 [..., M] in 0..N-1, or -1 (`UNMATCHED`) where there is no target or none is left for it.
    """
    # Importing it takes as long as importing JAX, and prediction needs no matching.
    from scipy.optimize import linear_sum_assignment

    num_masks, num_targets = match_score.shape[-2:]
    scores = np.asarray(match_score, np.float32).reshape(-1, num_masks, num_targets)
    scores = np.nan_to_num(scores, nan=1e6 if minimise else -1e6, posinf=1e6, neginf=-1e6)
    valid = np.asarray(is_target).reshape(-1, num_targets)
    query_index = np.full(valid.shape, UNMATCHED, np.int32)
    for image, (score, columns) in enumerate(zip(scores, valid, strict=True)):
        (targets,) = np.nonzero(columns)
        queries, chosen = linear_sum_assignment(score[:, targets], maximize=not minimise)
        query_index[image, targets[chosen]] = queries
    return query_index.reshape(is_target.shape)
