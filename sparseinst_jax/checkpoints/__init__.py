"""Runs on disk: Orbax checkpoints, their folders, what may be read from them."""
