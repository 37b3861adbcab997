"""Patterns over names and paths, as rules have them."""

import re


def check_pattern(pattern: str, over: str) -> None:
    """Raises ValueError where `pattern` is no regular expression; `over` says what it is matched
    against.

    >>> check_pattern("(", over="site names")
    Traceback (most recent call last):
    ValueError: pattern must be a regular expression over site names; got '(' (...). Escape ...
    """
    try:
        re.compile(pattern)
    except (re.error, TypeError) as error:
        raise ValueError(
            f"pattern must be a regular expression over {over}; got {pattern!r} ({error}). "
            "Escape special characters with re.escape."
        ) from None
