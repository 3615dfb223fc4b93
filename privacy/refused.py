"""Refused: the one error a user can mend; the CLI prints its message as one line and exits with 2."""


class Refused(ValueError):
    """Input that cannot be honoured. The message says what was wrong, where, and what to do."""
