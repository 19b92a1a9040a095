"""Choices of other implementations, followed to reproduce their published numbers."""
