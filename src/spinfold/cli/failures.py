"""Any exception as three short parts: what, why and what to do."""

from __future__ import annotations

import errno
import os

from typer.exceptions import TyperException

from spinfold.errors import SpinfoldError

__all__ = ["explain", "notes_of"]


def explain(error: Exception) -> SpinfoldError:
    """Any exception as what, why and what to do."""
    if isinstance(error, SpinfoldError):
        return error
    if isinstance(error, TyperException):
        verb = context.command_path if (context := getattr(error, "ctx", None)) else "spinfold"
        return SpinfoldError(error.format_message(), "", f"See {verb} --help.")
    if _means_no_space(error):
        return SpinfoldError(
            "There is no space left to write to.",
            str(error),
            "Free some space, or choose an output folder on another disk; nothing half-written was kept.",
        )
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return SpinfoldError(
            "The memory is not enough.",
            str(error).partition("\n")[0] or "The system refused to give more.",
            "Ask for fewer --samples or a shorter --seq-len, or use another --device.",
        )
    if isinstance(error, OSError):
        return SpinfoldError(
            f"{error.filename or 'A file'} can't be used.",
            f"The system says: {error.strerror or error}.",
            "Check that it exists and that you may read and write it.",
        )
    return SpinfoldError(
        "spinfold stopped at an error that it does not know.",
        f"{type(error).__name__}: {str(error).partition(chr(10))[0]}",
        "Run it again as `spinfold --debug ...` and report the traceback: this is a bug.",
    )


def notes_of(error: BaseException) -> list[str]:
    """What else there is to say, such as that the run can be resumed."""
    return getattr(error, "__notes__", [])


def _means_no_space(error: BaseException) -> bool:
    """ENOSPC or a quota, also where a library reports it in its own words or as the cause of another error."""
    full = (errno.ENOSPC, errno.EDQUOT)
    seen = (isinstance(error, OSError) and error.errno in full) or any(os.strerror(code) in str(error) for code in full)
    cause = error.__cause__ or error.__context__
    return seen or (cause is not None and _means_no_space(cause))
