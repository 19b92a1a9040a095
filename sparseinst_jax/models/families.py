"""The model families."""

from __future__ import annotations

from sparseinst_jax.models.family import Family
from sparseinst_jax.models.fastinst.family import FASTINST
from sparseinst_jax.models.sparseinst.family import SPARSEINST

FAMILIES: dict[str, Family] = {"sparseinst": SPARSEINST, "fastinst": FASTINST}
