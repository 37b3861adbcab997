"""Patterns over names and paths, as rules have them."""

import re
from collections.abc import Iterable
from typing import Any


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


def as_rules(rules: Any, kind: type, further: str) -> tuple[Any, ...]:
    """`rules` as a tuple; TypeError where they are no sequence of `kind`.

    Args:
      rules: what a caller gave.
      kind: `Rule`, for instance.
      further: what such a rule takes beside its pattern.
    """
    remedy = f"Write [fp8jax.{kind.__name__}(pattern, {further})]."
    if not isinstance(rules, Iterable):
        raise TypeError(
            f"rules must be a sequence of {kind.__name__}; got {rules!r} itself. {remedy}"
        )
    rules = tuple(rules)
    for rule in rules:
        if not isinstance(rule, kind):
            raise TypeError(
                f"rules must be a sequence of {kind.__name__}; got {rule!r} in it. {remedy}"
            )
    return rules
