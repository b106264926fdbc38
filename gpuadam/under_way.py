"""Whether a change of arrays and step counts that belong together is under way, or was cut short."""

import functools
import sys
from collections.abc import Callable
from typing import TypeVar, cast

TORN = "parameters and state are of two different steps: load a checkpoint into both, with load_state_dict"

F = TypeVar("F", bound=Callable)

# Python 3.10 looks for signals between any two opcodes, and later versions after a call of C alone: there the quicker way will do
SIGNALS_ANYWHERE = sys.version_info < (3, 11)


class UnderWay:
    """Notes that a change has begun and that it has ended. An interrupt or an error in between leaves the note.

    `changing`: the note. `begun`: how many changes have begun, by which a reader notices one that ended meanwhile.

    What reads the state and then changes it takes the turn first, and gives it back at its end, whatever that is:

        turn, mine = under_way.turn, []
        try:
            under_way.take_turn(mine)
            ...
        finally:
            turn.update(mine)

    `turn`: a set of one item, which is empty while somebody has the turn. The item is in `turn` or in `mine` at any moment at
    which Python looks for signals.
    """

    changing = False
    begun = 0

    def __init__(self):
        self.turn = {None}

    def __getstate__(self):
        return {name: value for name, value in vars(self).items() if name != "turn"} | {"changing": self.changing}

    def __setstate__(self, state):
        self.__dict__.update(state, turn={None})  # a copy that is made amid a step is stepped by nobody

    def take_turn(self, mine):
        """Put the turn into a list. Raise ValueError if another has it, or if a change was cut short."""
        try:  # of two threads one alone finds it
            if SIGNALS_ANYWHERE:
                mine.extend(map(set.pop, (self.turn,)))
            else:
                mine.append(self.turn.pop())
        except KeyError:
            self._refuse()
        except BaseException:  # a signal, after `pop`
            if not SIGNALS_ANYWHERE:
                self.turn.add(None)
            raise
        if self.changing:
            self._refuse()

    def begin(self):
        """Note that what belongs together is about to change."""
        self.changing = True
        self.begun += 1  # second: who reads `begun`, and then no `changing`, has seen the end of all that had begun

    def end(self):
        """Note that all of it has changed, or nothing."""
        self.changing = False

    def free_turn(self):
        """Let the next one have the turn, after all has been set that belongs together: whoever still has it was cut short."""
        self.turn.add(None)

    def check(self):
        """Raise ValueError if a change has begun and not ended."""
        if self.changing:
            self._refuse()

    def _refuse(self):
        raise ValueError(
            "a step before this was cut short, or is under way in another thread, or around this call, which a function that it "
            f"calls has made, such as a callable lr. If it was cut short, {TORN}"
        )


def in_turn(method: F) -> F:
    """Make a method of an optimizer one that takes the turn."""

    @functools.wraps(method)
    def taking(self, *arguments, **options):
        turn = self.under_way.turn
        mine: list[None] = []
        try:
            self.under_way.take_turn(mine)
            return method(self, *arguments, **options)
        finally:
            turn.update(mine)

    return cast(F, taking)
