"""Not annotated here: the own annotations of pycocotools refuse the plain dicts of COCO json."""

from typing import Any

def __getattr__(name: str) -> Any: ...
