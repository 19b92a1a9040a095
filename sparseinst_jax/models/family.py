"""What a model family is: the record that training, evaluation and prediction work with.

They read it and nothing else of a family, so a new family is a folder with such a record and one
line in `models.families`; a program outside the package adds its own in the same way.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

from sparseinst_jax.data.target_masks import TargetForm
from sparseinst_jax.models.weight_names import UNPUBLISHED, WeightNames

# Nobody needs more; a configuration that came with a checkpoint may hold any number.
MAX_SIZE = 1 << 16


class Selection(NamedTuple):
    """Scored candidates of a batch, on the device: D of them in each image, of N masks.

    Attributes:
        scores: float32 [B, D].
        labels: int32 [B, D] in 0...K-1.
        query_index: int32 [B, D] in 0...N-1, the mask of each; one may appear with several classes.
        is_kept: bool [B, D], which candidates are results.
        masks: float32 [B, N, H/S, W/S] at the family's mask stride S: probabilities or logits, see
            `Family.masks_are_logits`.
    """

    scores: jax.Array
    labels: jax.Array
    query_index: jax.Array
    is_kept: jax.Array
    masks: jax.Array


@dataclasses.dataclass(frozen=True)
class Family:
    """One model family; only facts and functions, no weights.

    `options` below is `config.model` without `family`, `backbone` and `dtype`: their meaning
    is up to the family, and so is that of `config.objective` and, except for `batch_size`,
    `protocol` and `zoom`, of `config.eval`.

    Attributes:
      model: makes the network: (backbone, *, num_classes, dtype, rng, **options) to a module that
        maps (images, train, intermediates) to the outputs and keeps the backbone as `backbone`. Of
        its parameters it may say `undecayed` (words: no weight decay where a path holds one) and
        `learning_rate_factors` (pairs of a path, such as "backbone", and a factor), and its
        `class_layers` (paths) for `train.class_rate`.
      objective: makes the training objective (`training.step.Objective`) of the network's pure
        function: (apply, options, **config.objective).
      select: scores the outputs of a batch, (outputs, **options of config.eval) to `Selection`.
      faults: (**options) to what is wrong with them; each fault starts with the option's name.
        Options that `model` does not take are refused before.
      num_masks: the largest number of objects that such a network finds in an image.
      targets: the form in which the loader sends the masks of objects.
      mask_stride: pixels of the padded image for one of a predicted mask.
      map_stride: pixels of the padded image for one of the map on which objects are found.
      mask_threshold: a pixel belongs to a mask where its probability is larger, unless
        `config.eval.mask_threshold` says otherwise.
      masks_are_logits: `Selection.masks` are brought to the original size as logits, and become
        probabilities there; else they are probabilities from the start.
      scores_at_original_size: the score of `select` is still to be multiplied by the mean
        probability inside the mask, measured at the original size.
      weights: what published weights of the family call its parameters.
      activations: where each mask of a batch looks: (outputs, intermediates) to a dict from the
        name of a map, such as "group 1", to float32 [B, N, h, w] in 0...1; None where there is no
        such thing.
    """

    model: Callable[..., Any]
    objective: Callable[..., Any]
    select: Callable[..., Selection]
    faults: Callable[..., list[str]]
    num_masks: Callable[[Mapping[str, Any]], int]
    targets: TargetForm
    mask_stride: int
    map_stride: int
    mask_threshold: float
    masks_are_logits: bool = False
    scores_at_original_size: bool = False
    weights: WeightNames = UNPUBLISHED
    activations: Callable[[Any, Mapping[str, Any]], dict[str, jax.Array]] | None = None


def size_faults(options: Mapping[str, Any], most: Mapping[str, int]) -> list[str]:
    """List which of the named options are no whole numbers from 1 to the most that each may be."""
    found = []
    for key, limit in most.items():
        value = options[key]
        if type(value) is not int:
            found.append(f"{key} must be an integer, got {value!r:.80}")
        elif not 1 <= value <= limit:
            bound = "at least 1" if value < 1 else f"at most {limit}"
            found.append(f"{key} must be {bound}, got {value!r:.80}")
    return found
