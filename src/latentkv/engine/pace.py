"""`Pace`: how many tokens a step may read so that it takes about as long as it should."""

from __future__ import annotations

MIN_STEP_TOKENS = 16
FIRST_STEP_TOKENS = 256


class Pace:
    """A step's budget of tokens, corrected after each step.

    While a step runs nobody new is let in, nobody who left is noticed, and no other request gets its token: on a slow
    machine a large piece of a prompt would hold all of them up.

    Args:
        most: tokens at any rate; a step of the model bounds its memory by it.
        seconds: that a step should take; None: as long as it takes.

    Attributes:
        budget: tokens that the next step may read.
    """

    def __init__(self, most: int, seconds: float | None) -> None:
        self.budget = most if seconds is None else min(most, FIRST_STEP_TOKENS)
        self._most = most
        self._seconds = seconds

    def took(self, tokens: int, seconds: float) -> None:
        """Learn from a step that read `tokens`. One far below its budget says little: its time is not the prompt's."""
        if self._seconds is None or tokens < self.budget / 2:
            return
        wanted = tokens * self._seconds / max(seconds, 1e-6)
        # At most by half or double: one step that was held up must not decide.
        wanted = min(max(wanted, self.budget / 2), self.budget * 2)
        self.budget = int(min(max(wanted, MIN_STEP_TOKENS), self._most))
