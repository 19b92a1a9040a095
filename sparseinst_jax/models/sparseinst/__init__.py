"""The SparseInst family: network, training objective, scoring of its raw outputs."""
