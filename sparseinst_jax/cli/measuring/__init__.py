"""Measure speed and memory: what `sparseinst benchmark` and `sparseinst summary` print."""
