"""The exception that the command line prints as a sentence, and the near match of a misspelt name."""

import argparse
import difflib
import re
from collections.abc import Iterable
from typing import NoReturn


class UserError(Exception):
    """Invalid input: the message names the input, the expected form and the remedy.

    The command line prints it without a traceback and exits with code 2.
    """


def did_you_mean(given: str, known: Iterable[str], prefix: str = "") -> str:
    """The end of a sentence about an unknown name, " (did you mean X?)"; empty where no known name is close."""
    close = difflib.get_close_matches(given, known, n=1, cutoff=0.6)
    return f" (did you mean {prefix}{close[0]}?)" if close else ""


class SuggestingParser(argparse.ArgumentParser):
    """An ArgumentParser whose error about an unknown option names the near match."""

    def error(self, message: str) -> NoReturn:
        """Print usage and message, and exit with code 2."""
        if given := re.match(r"unrecognized arguments: (--[\w-]+)", message):
            message += did_you_mean(given[1], self._option_string_actions)
        super().error(message)
