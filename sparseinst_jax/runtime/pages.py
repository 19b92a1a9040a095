"""Short, stable names of places in the docs, for messages: `(docs: gpu-not-seen)`.

A page can be split or renamed; the name in a message that somebody pasted somewhere stays.
`sparseinst help NAME` says where a name leads.
"""

PAGES = {
    "caches": "weights.md#where-files-are-kept",
    "cannot-download": "weights.md#when-a-download-fails",
    "changed-run": "faults.md#what-may-go-wrong",
    "data-faults": "own_data.md#2-check-before-training",
    "foreign-weights": "convert.md",
    "gpu-not-seen": "gpu.md#jax-does-not-see-my-gpu",
    "in-use": "faults.md#exit-codes",
    "memory": "gpu.md#memory",
    "not-finite": "questions.md#the-loss-became-nan",
    "video": "video.md",
    "weights": "weights.md",
}


def page(name: str) -> str:
    """Name a place of the docs at the end of a message: `(docs: NAME)`; only a name of `PAGES`."""
    assert name in PAGES, name
    return f"(docs: {name})"


def where(name: str) -> str:
    """Say in a line where a name leads."""
    file, _, heading = PAGES[name].partition("#")
    at = f', "{heading.replace("-", " ")}"' if heading else ""
    return f"docs/{file}{at}"
