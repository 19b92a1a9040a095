"""Scale a schedule that is written for one batch size to another."""

import math
from collections.abc import Collection
from typing import NamedTuple

RULES = ("linear", "sqrt", "none")
_FAR_BELOW = 0.25  # of the base batch: an unscaled learning rate is likely to be too high


class Schedule(NamedTuple):
    """What depends on the batch size: a rate, and lengths in steps."""

    learning_rate: float
    warmup_steps: int
    milestones: tuple[int, ...]
    num_steps: int


_SHOWN = {"learning_rate": "learning rate", "warmup_steps": "warm-up"}


def scale_schedule(
    schedule: Schedule,
    batch_size: int,
    base_batch_size: int,
    rule: str,
    literal: Collection[str] = (),
) -> tuple[Schedule, list[str]]:
    """Scale a schedule from the batch it is written for to the batch in use.

    With b the batch in use and B the base: the learning rate times b / B ("linear") or
    sqrt(b / B) ("sqrt"); steps times B / b, rounded, so that as many images are seen; "none"
    leaves everything.

    Source: Goyal et al., arXiv:1706.02677, section 2.1 (linear); Krizhevsky, arXiv:1404.5997,
    section 5 (square root).

    Args:
      schedule: written for `base_batch_size`.
      batch_size: images per step in use.
      base_batch_size: images per step that the schedule is written for.
      rule: one of `RULES`.
      literal: fields that the user has set; they are not scaled.

    Returns:
      The schedule for `batch_size`, and lines for the user: what changed, and warnings.
    """
    ratio = batch_size / base_batch_size
    warnings, scaled = [], schedule
    if rule == "none":
        if ratio < _FAR_BELOW:
            warnings.append(
                f"WARNING: a batch of {batch_size} is far below the {base_batch_size} that the"
                f" learning rate {schedule.learning_rate:g} is written for, and train.lr_scaling is"
                ' "none": expect NaN or a poor result. Set --config.train.lr_scaling=linear.'
            )
    elif batch_size != base_batch_size:
        factor = ratio if rule == "linear" else math.sqrt(ratio)
        milestones: list[int] = []
        for before, step in zip((0, *schedule.milestones), schedule.milestones, strict=False):
            milestones.append(max(round(step / ratio), 1))
            if step > before and milestones[1:]:  # rounded, they must still increase
                milestones[-1] = max(milestones[-1], milestones[-2] + 1)
        scaled = Schedule(
            schedule.learning_rate * factor,
            max(round(schedule.warmup_steps / ratio), 1) if schedule.warmup_steps else 0,
            tuple(milestones),
            max(round(schedule.num_steps / ratio), 1),
        )
        scaled = scaled._replace(**{name: getattr(schedule, name) for name in literal})
    return scaled, [
        *_describe(schedule, scaled, batch_size, base_batch_size, rule, literal),
        *warnings,
        *_lengths_that_do_not_fit(scaled),
    ]


def _describe(
    before: Schedule,
    after: Schedule,
    batch_size: int,
    base_batch_size: int,
    rule: str,
    literal: Collection[str],
) -> list[str]:
    if rule == "none" or batch_size == base_batch_size:
        return []
    changes, kept = [], []
    for name, old, new in zip(Schedule._fields, before, after, strict=True):
        shown = _SHOWN.get(name, name)
        unit = (
            f" ({rule})" if name == "learning_rate" else " steps" if name == "warmup_steps" else ""
        )
        if name in literal:
            kept.append(f"{shown} {_text(old)}")
        else:
            changes.append(f"{shown} {_text(old)} -> {_text(new)}{unit}")
    start = f"batch {batch_size} instead of {base_batch_size}: "
    lines = [start + ", ".join(changes)] if changes else []
    if kept:
        lines.append(f"{'  ' if lines else start}as given on the command line: {', '.join(kept)}")
    return lines


def _text(value: float | tuple[int, ...]) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _lengths_that_do_not_fit(schedule: Schedule) -> list[str]:
    end, lines = schedule.num_steps, []
    if schedule.warmup_steps >= end:
        lines.append(
            f"WARNING: the warm-up of {schedule.warmup_steps} steps does not end within num_steps"
            f" {end}: the learning rate stays low. Set --config.train.warmup_steps."
        )
    late = [step for step in schedule.milestones if step >= end]
    if late:
        lines.append(
            f"WARNING: milestones {', '.join(map(str, late))} lie beyond num_steps {end}: the"
            " learning rate does not fall there. Set --config.train.milestones."
        )
    return lines
