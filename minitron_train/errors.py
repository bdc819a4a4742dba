"""The one exception that a user is meant to see."""


class UserError(ValueError):
    """A mistake the user can mend: one line that says what, where, the rule and the remedy.

    The command line prints it without a traceback and exits with code 2.
    """


def first_line(error: Exception) -> str:
    """Of what another library's exception says, for a line of ours."""
    return next(iter(str(error).splitlines()), type(error).__name__)
