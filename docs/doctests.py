"""For mkdocstrings: doctests are shown as code, not as quotations; a function is found though its
file has its name.
"""

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
    """Fences the doctests of all docstrings, and finds functions that have their file's name."""

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        """Called once, when all of the package is read."""
        _mend(pkg)


def _mend(obj: griffe.Object) -> None:
    if obj.docstring is not None:
        obj.docstring.value = fenced(obj.docstring.value)
    for name, member in list(obj.members.items()):
        if member.is_alias:
            continue
        _mend(member)
        # `from fp8jax.optim.lion import lion` has Python find a function at `fp8jax.optim.lion`,
        # and griffe the file.
        inner = member.members.get(name) if member.is_module else None
        if inner is not None and not inner.is_alias and name in (obj.exports or ()):
            obj.members[name] = griffe.Alias(name, inner, parent=obj)
