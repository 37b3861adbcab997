"""Tables as text, for reports that are printed."""

import io

import rich.console
import rich.table


def as_text(table: rich.table.Table, width: int = 100) -> str:
    """A table as `width` columns of plain text, without trailing blanks.

    >>> table = rich.table.Table("site", box=None, pad_edge=False)
    >>> table.add_row("mlp/up")
    >>> print(as_text(table))
    site
    mlp/up
    """
    text = io.StringIO()
    console = rich.console.Console(file=text, width=width, color_system=None)
    console.print(table)
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines())
