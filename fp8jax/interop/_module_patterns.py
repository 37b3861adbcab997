"""Patterns over names of modules, as configs hold them, matched in bounded time: files may lie."""

import dataclasses
import fnmatch
import math
import re
from collections.abc import Sequence
from typing import Any

from fp8jax.interop._safetensors_file import CheckpointError

# Steps that matching a name may take at worst, by the estimate below: a tenth of a second.
_MOST_STEPS = 2_000_000


@dataclasses.dataclass(frozen=True)
class ModulePattern:
    """A regular expression, how many of its parts repeat, and among how many it chooses.

    >>> ModulePattern.regex(r"re:.*mlp.*proj$").matches("model.layers.0.mlp.up_proj")
    True
    """

    expression: re.Pattern
    repeats: int
    choices: int = 1

    @classmethod
    def regex(cls, target: str) -> "ModulePattern":
        """Of a text "re:...", matched from the start as `re.match` does."""
        text = target.removeprefix("re:")
        # Without escaped characters and with classes as one, whose brackets and stars mean
        # themselves.
        plain = re.sub(r"\[\^?\]?[^]]*\]", "c", re.sub(r"\\.", "c", text))
        if len(text) > 1000 or re.search(r"\)[*+{]", plain):
            raise CheckpointError(
                "patterns must have at most 1000 characters and no groups that repeat; got "
                f"{target[:80]!r}."
            )
        try:
            expression = re.compile(text)
        except (re.error, RecursionError, OverflowError) as error:
            raise CheckpointError(
                f"patterns must be regular expressions; got {target[:80]!r} ({error})."
            ) from None
        repeats = len(re.findall(r"(?<!\()[*+{?]", plain))
        return cls(expression, repeats, math.prod(g.count("|") + 1 for g in plain.split(")")))

    @classmethod
    def wildcard(cls, target: str) -> "ModulePattern":
        """Of a text with "*", as in file names, that the whole name must match."""
        if len(target) > 1000:
            raise CheckpointError(
                f"patterns must have at most 1000 characters; got {target[:80]!r}."
            )
        return cls(re.compile(fnmatch.translate(target)), target.count("*"))

    def steps(self, name: str) -> int:
        """Steps that matching may take: ways to divide a name among repeating parts, by choices."""
        return math.comb(len(name) + self.repeats, self.repeats) * self.choices

    def matches(self, name: str) -> bool:
        """Whether a module of this name is meant."""
        return self.expression.match(name) is not None


def find_pattern(patterns: Sequence[tuple[ModulePattern, Any]], name: str) -> Any:
    """What stands beside the first pattern that matches a name; None where none does."""
    if sum(pattern.steps(name) for pattern, _ in patterns) > _MOST_STEPS:
        raise CheckpointError(
            f"patterns of modules must be matched in bounded time; got {len(patterns)} with so "
            f"many parts that repeat, for {name[:120]!r}. Name the modules in full."
        )
    return next((found for pattern, found in patterns if pattern.matches(name)), None)
