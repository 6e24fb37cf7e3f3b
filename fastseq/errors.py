"""The exception that the command line prints as a sentence, without a traceback."""


class UserError(Exception):
    """Invalid input: the message names the input, the expected form and the remedy.

    The command line prints it without a traceback and exits with code 2.
    """
