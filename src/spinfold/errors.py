"""How spinfold says that something is wrong: what, why, and what to do about it."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["CheckFailed", "SpinfoldError", "Verdict"]


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
