"""Train any family: optimizer, compiled step, loop, checkpoints and progress."""
