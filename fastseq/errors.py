"""The one exception that the command line shows as a sentence."""


class UserError(Exception):
    """Bad input: the message says what was wrong, what was expected and what to do.

    The command line shows it without a traceback and exits with code 2.
    """
