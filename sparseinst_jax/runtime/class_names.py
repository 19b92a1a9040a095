"""What the name and the id of a class may be, in whatever file they are read."""

from typing import Any

from sparseinst_jax.runtime.messages import acting_character, brief

MAX_ID = 2**63 - 1  # ids are kept as 64-bit numbers
MAX_CLASS_NAME = 200  # characters, more than any picture shows


def class_name_fault(name: Any) -> str | None:
    """Why a value cannot be the name of a class; None if it can.

    Names go to terminals, pages, pictures and tables. Any characters will do, of any script, and
    numbers too.
    """
    if isinstance(name, bool) or not isinstance(name, str | int | float):
        return f"the name must be a text, got {brief(name)}"
    name = str(name)
    if not name.strip():
        return "the name is empty; give it one"
    if len(name) > MAX_CLASS_NAME:
        most = f"expected {MAX_CLASS_NAME} at most"
        return f"the name has {len(name)} characters, {most}: {brief(name)}"
    acting = acting_character(name)
    if acting is not None:
        return f"the name {brief(name)} holds the control character {acting!r}; rename the class"
    return None
