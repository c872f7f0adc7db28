"""The one exception a user is meant to see."""


class InputError(Exception):
    """What the user can mend: one line that says what is wrong and what to do (exit code 2)."""
