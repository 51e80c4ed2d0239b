"""The one exception that means: the input is wrong, and here is how to fix it."""

import unicodedata
from collections.abc import Sequence


class UserError(Exception):
    """A mistake that the user can fix.

    The message is one sentence that names the file, the record where there is one, and the fix.
    The command line prints it without a traceback and exits with status 2.
    """


class InUseError(UserError):
    """Another process holds what is wanted, and may let it go."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type's name, to quote in a sentence."""
    message = str(error).strip() or type(error).__name__
    return message.splitlines()[0][:200].rstrip(".")


def listed(names: Sequence[str], most: int = 6) -> str:
    """The first names of many, each cut at 200 characters, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(name[:200] for name in names[:most]) + more


def printable(text: str, keep: str = "") -> str:
    """Text of others that is safe to print: what could steer a terminal becomes an escape.

    That is control and format characters (bidirectional overrides too), line separators and lone
    surrogates, except the characters in `keep`. Letters and spaces of every script stay.
    """
    return "".join(
        c
        if c in keep or not (unicodedata.category(c)[0] == "C" or c in "\u2028\u2029")
        else c.encode("unicode_escape").decode()
        for c in text
    )
