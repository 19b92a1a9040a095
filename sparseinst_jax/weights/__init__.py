"""Weights of other implementations: reading, renaming, checking, converting; published models."""
