"""Report once, and briefly, that a checkpoint could not be written."""

import errno
import logging
import os

import absl.logging

# TensorStore and Orbax wrap these in a page of their own text.
_CAUSES = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EIO)


class SaveError(ValueError):
    """A checkpoint could not be written; the ones before it are complete."""


def cause(error: Exception) -> str:
    """The operating system's reason if the error holds one, otherwise its first line."""
    text = str(error).strip() or type(error).__name__
    for number in _CAUSES:
        if os.strerror(number) in text:
            return os.strerror(number)
    return text.splitlines()[0][:200]


def silence_orbax() -> None:
    """Keep Orbax from printing tracebacks of errors that we raise as SaveError."""
    logger = absl.logging.get_absl_logger()
    if _is_others not in logger.filters:
        logger.addFilter(_is_others)


def _is_others(record: logging.LogRecord) -> bool:
    return f"{os.sep}orbax{os.sep}" not in record.pathname
