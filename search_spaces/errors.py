"""The one exception a user causes: scripts print it as a single line and exit with code 2."""


class UserError(ValueError):
    """Bad input. The message says what was found, what was expected and what to do."""
