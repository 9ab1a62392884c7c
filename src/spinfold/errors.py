"""How spinfold says that something is wrong: what, why, and what to do about it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

__all__ = ["CheckFailed", "SpinfoldError", "Verdict", "reading"]


class SpinfoldError(Exception):
    """The input or the request is wrong (exit code 2).

    `what` states the failure, `why` the fact behind it, `fix` the user's next action; each is one
    or two sentences that make sense alone.
    """

    exit_code = 2

    def __init__(self, what: str, why: str = "", fix: str = "") -> None:
        self.what, self.why, self.fix = what, why, fix
        super().__init__("\n".join(part for part in (what, why and f"Why: {why}", fix and f"Do:  {fix}") if part))


class CheckFailed(SpinfoldError):
    """A proof did not hold (exit code 1): the input was fine, the result is not."""

    exit_code = 1


@dataclass(frozen=True)
class Verdict:
    """The answer to a yes-or-no question, with its reason when the answer is no."""

    ok: bool
    reason: str = ""
    fix: str = ""

    def __bool__(self) -> bool:
        return self.ok

    def require(self, what: str) -> None:
        """Raise `SpinfoldError(what)` with this verdict's reason unless it is positive."""
        if not self.ok:
            raise SpinfoldError(what, self.reason, self.fix)


@contextmanager
def reading(path: Path, fix: str = "Make the run again.") -> Iterator[None]:
    """Around code that uses what a file of ours says: if somebody has changed the file, the error is about the file."""
    try:
        yield
    except (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        if type(error).__name__ == "OutOfMemoryError":  # torch's, which is a RuntimeError
            raise
        why = f"What it says does not fit together: {type(error).__name__}, {str(error)[:200]}."
        raise SpinfoldError(f"{path} is not what spinfold wrote.", " ".join(why.split()), fix) from error
