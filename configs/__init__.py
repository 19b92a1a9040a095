"""One small file for each row of the published tables, and for the demo, tests and own data.

`--config giam_r50` selects one of them. A file of your own starts from it with
`from sparseinst_jax.configs import giam_r50` and `giam_r50.get_config()`.
"""
