"""One name for the sites that run as one, in the blocks of a loop."""

import os
import re
from collections.abc import Sequence

# What sets the parts of joined names apart; quoted nowhere else in names.
_OPEN, _BETWEEN, _CLOSE = "{", "|", "}"


def joined_name(names: Sequence[str]) -> str:
    """The names of sites as one, with what they share written once.

    >>> joined_name(["layer0/up", "layer1/up", "layer10/up"])
    'layer{0|1|10}/up'
    """
    every = [name for one in names for name in names_in(one)]
    start = len(os.path.commonprefix(every))
    backwards = [name[start:][::-1] for name in every]
    end = len(os.path.commonprefix(backwards))
    middles = [name[start : len(name) - end] for name in every]
    whole = every[0]
    ending = whole[len(whole) - end :] if end else ""
    return f"{whole[:start]}{_OPEN}{_BETWEEN.join(middles)}{_CLOSE}{ending}"


def names_in(name: str) -> tuple[str, ...]:
    """The names that `joined_name` joined; of another name, itself.

    >>> names_in("layer{0|1|10}/up"), names_in("head")
    (('layer0/up', 'layer1/up', 'layer10/up'), ('head',))
    """
    found = re.fullmatch(r"(.*?)\{([^{}]*\|[^{}]*)\}(.*)", name, re.DOTALL)
    if found is None:
        return (name,)
    before, middles, after = found.groups()
    return tuple(f"{before}{middle}{after}" for middle in middles.split(_BETWEEN))
