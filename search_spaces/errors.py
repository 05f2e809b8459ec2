"""The one exception a user causes: scripts print it as a single line and exit with code 2."""


class UserError(ValueError):
    """Bad input. The message says what was found, what was expected and what to do."""


def reason(error: BaseException) -> str:
    """The first line of another's exception, or its kind where it says nothing: what a UserError quotes."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
