"""What to say when a checkpoint cannot be written, once and short."""

import errno
import logging
import os

import absl.logging

# What TensorStore and Orbax wrap in a page of their own words.
_CAUSES = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EIO)


class SaveError(ValueError):
    """A checkpoint could not be written; the ones before it are whole."""


def cause(error: Exception) -> str:
    """The reason in the words of the operating system where it is in there, else the first line."""
    text = str(error).strip() or type(error).__name__
    for number in _CAUSES:
        if os.strerror(number) in text:
            return os.strerror(number)
    return text.splitlines()[0][:200]


def hush() -> None:
    """Keep Orbax from printing tracebacks of what is raised, and said, as a SaveError anyway."""
    logger = absl.logging.get_absl_logger()
    if _is_others not in logger.filters:
        logger.addFilter(_is_others)


def _is_others(record: logging.LogRecord) -> bool:
    return f"{os.sep}orbax{os.sep}" not in record.pathname
