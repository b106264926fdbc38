"""Whether a change of arrays and step counts that belong together is under way, or was cut short."""

import functools
from collections.abc import Callable
from typing import TypeVar, cast

TORN = "parameters and state are of two different steps: load a checkpoint into both, with load_state_dict"

F = TypeVar("F", bound=Callable)


class UnderWay:
    """Notes that a change has begun and that it has ended. An interrupt or an error in between leaves the note.

    `changing`: the note. `begun`: how many changes have begun, by which a reader notices one that ended meanwhile.

    What reads the state and then changes it takes the turn first, and gives it back at its end, whatever that is:

        turn = under_way.take_turn()
        try:
            ...
        finally:
            turn.add(None)  # a function of ours could be interrupted before it has done that
    """

    changing = False
    begun = 0

    def __init__(self):
        self._turn = {None}  # empty while somebody has the turn

    def take_turn(self):
        """Return the turn, to be given back. Raise ValueError if another has it, or if a change was cut short."""
        turn = self._turn
        try:
            turn.pop()  # of two threads one alone finds it
        except KeyError:
            self._refuse()
        except BaseException:  # an interrupt just after it
            turn.add(None)
            raise
        if self.changing:
            turn.add(None)
            self._refuse()
        return turn

    def begin(self):
        """Note that what belongs together is about to change."""
        self.changing = True
        self.begun += 1  # second: who reads `begun`, and then no `changing`, has seen the end of all that had begun

    def end(self):
        """Note that all of it has changed, or nothing."""
        self.changing = False

    def free_turn(self):
        """Let the next one have the turn, after all has been set that belongs together: whoever still has it was cut short."""
        self._turn.add(None)

    def check(self):
        """Raise ValueError if a change has begun and not ended."""
        if self.changing:
            self._refuse()

    def _refuse(self):
        raise ValueError(f"a step before this was cut short, or is under way in another thread. If it was cut short, {TORN}")


def in_turn(method: F) -> F:
    """Make a method of an optimizer one that takes the turn."""

    @functools.wraps(method)
    def taking(self, *arguments, **options):
        turn = self.under_way.take_turn()
        try:
            return method(self, *arguments, **options)
        finally:
            turn.add(None)

    return cast(F, taking)
