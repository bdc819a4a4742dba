"""The one exception that a user is meant to see."""


class UserError(ValueError):
    """A mistake the user can mend: one line that says what, where, the rule and the remedy.

    The command line prints it without a traceback and exits with code 2.
    """
