"""For mkdocstrings: doctests at the end of a docstring are shown as code, not as quotations."""

import inspect
from typing import Any

import griffe


def fenced(text: str) -> str:
    """The text with a fence around each run of lines from a ">>>" to the next empty line."""
    lines, inside = [], False
    for line in inspect.cleandoc(text).splitlines():
        if line.startswith(">>>") and not inside:
            lines += ["```pycon", line]
            inside = True
        elif inside and not line.strip():
            lines += ["```", line]
            inside = False
        else:
            lines.append(line)
    return "\n".join(lines + ["```"] * inside)


class Doctests(griffe.Extension):
    """Fences the doctests of all docstrings that are read."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called once for each module, class, function and attribute."""
        if obj.docstring is not None:
            obj.docstring.value = fenced(obj.docstring.value)
