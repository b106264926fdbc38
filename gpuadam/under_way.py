"""Whether a change of arrays and step counts that belong together is under way, or was cut short."""

TORN = "parameters and state are of two different steps: load a checkpoint into both, with load_state_dict"


class UnderWay:
    """Notes that a change has begun and that it has ended. An interrupt or an error in between leaves the note.

    `changing`: the note. `begun`: how many changes have begun, by which a reader notices one that ended meanwhile.
    """

    changing = False
    begun = 0

    def begin(self):
        """Note that what belongs together is about to change."""
        self.changing = True
        self.begun += 1  # second: who reads `begun`, and then no `changing`, has seen the end of all that had begun

    def end(self):
        """Note that all of it has changed, or nothing."""
        self.changing = False

    def check(self):
        """Raise ValueError if a change has begun and not ended."""
        if self.changing:
            raise ValueError(
                f"a step before this was cut short, or is under way in another thread. If it was cut short, {TORN}"
            )
