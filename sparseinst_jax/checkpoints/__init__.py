"""Runs on disk: Orbax checkpoints, their folders, checks of what they hold."""
