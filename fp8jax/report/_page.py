"""The rows of a report as one HTML page that stands alone."""

import dataclasses
import html
import json
import math
import pathlib
from collections.abc import Sequence
from typing import Any

from fp8jax._recipe import PRODUCTS
from fp8jax._transform import Explanation
from fp8jax.report._rows import BAD, GOOD, LOOK, PLAIN, Operand, Row

_HERE = pathlib.Path(__file__).parent
_PRODUCTS = {"forward": "output", "dlhs": "gradient of lhs", "drhs": "gradient of rhs"}
_STATUS = {BAD: "Fault", LOOK: "To look at", GOOD: "Fine", PLAIN: "Not in FP8"}
_SPARK_WIDTH, _SPARK_HEIGHT, _SPARK_POINTS = 96, 24, 48
_SPARK_OCTAVES = 6.0  # below the limit, and a sixth of them above it

# Nothing is loaded, whatever a name may hold: not even the icon that browsers ask for.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"


@dataclasses.dataclass(frozen=True)
class Column:
    """A column: its key, its heading, what its numbers mean, and whether they are numbers."""

    key: str
    heading: str
    hint: str
    numeric: bool


def page_of(title: str, explanation: Explanation, rows: Sequence[Row], *, recorded: bool) -> str:
    """The page.

    Args:
      title: of the page.
      explanation: for the totals.
      rows: in the order to show.
      recorded: whether the histories are those of recorded steps, rather than the windows of amaxes
        in the state.
    """
    columns = _columns(rows)
    data = {"recorded": recorded, "sites": [_details(row) for row in rows]}
    return "\n".join(
        (
            "<!doctype html>",
            '<html lang="en">',
            "<head>",
            '<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{html.escape(_POLICY)}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta name="color-scheme" content="light dark">',
            '<link rel="icon" href="data:,">',
            f"<title>{html.escape(title)}</title>",
            f"<style>\n{(_HERE / 'page.css').read_text(encoding='utf-8')}</style>",
            "</head>",
            "<body>",
            _head(title, explanation, rows),
            _controls(columns, rows),
            _table(columns, rows),
            _legend(columns),
            f'<script type="application/json" id="data">{_embedded(data)}</script>',
            f"<script>\n{(_HERE / 'page.js').read_text(encoding='utf-8')}</script>",
            "</body>",
            "</html>",
            "",
        )
    )


def _embedded(data: Any) -> str:
    """JSON that no text in it can end: a browser looks for the end of a script before it reads any
    string.
    """
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _columns(rows: Sequence[Row]) -> list[Column]:
    """Those that any row has something for."""

    def known(name: str) -> bool:
        return any(getattr(row, name) is not None for row in rows)

    shown = [
        Column("site", "Site", "name of the product", False),
        Column("recipe", "Recipe", "recipe, or why there is none", False),
        Column("flops", "FLOPs", "share of all products' forward FLOPs", True),
    ]
    if any(row.sqnr for row in rows):
        hint = "lowest signal to quantization noise of output and gradients"
        shown.append(Column("sqnr", "SQNR", hint, True))
    if known("saturated"):
        hint = "share of observations with values beyond the scale's range, of the worst operand"
        shown.append(Column("saturated", "Saturated", hint, True))
    if known("flushed"):
        hint = "share of elements that became zero, of the worst operand"
        shown.append(Column("flushed", "Flushed", hint, True))
    if any(row.operands for row in rows):
        hint = "amaxes beside the largest value that the scale can represent"
        shown.append(Column("history", "Range used", hint, True))
    if known("engine"):
        shown.append(
            Column("engine", "Engine", "what multiplies it in the compiled program", False)
        )
    return shown


# --------------------------------------------------------------------------------------------------
# parts


def _head(title: str, explanation: Explanation, rows: Sequence[Row]) -> str:
    selected = [row for row in rows if row.site.selected]
    tiles = [
        ("Products in FP8", f"{len(selected)} of {len(rows)}", ""),
        ("Forward FLOPs in FP8", f"{explanation.share:.1%}", ""),
    ]
    ratios = [row.worst_sqnr for row in selected if row.worst_sqnr is not None]
    if ratios:
        worst = math.nan if any(map(math.isnan, ratios)) else min(ratios)
        tiles.append(("Lowest SQNR", _decibels(worst), ""))
    for label, name in (("Most saturated", "saturated"), ("Most flushed", "flushed")):
        shares = [value for row in selected if (value := getattr(row, name)) is not None]
        if shares:
            tiles.append((label, _percent(max(shares)), ""))
    for status in (BAD, LOOK):
        count = sum(row.status == status for row in rows)
        label = {BAD: "Sites with faults", LOOK: "Sites to look at"}[status]
        tiles.append((label, str(count), status if count else GOOD))
    cells = "".join(
        '<div class="tile '
        f'{status}"><dt>{html.escape(label)}</dt><dd>{html.escape(value)}</dd></div>'
        for label, value, status in tiles
    )
    return f'<header><h1>{html.escape(title)}</h1><dl class="tiles">{cells}</dl></header>'


def _controls(columns: Sequence[Column], rows: Sequence[Row]) -> str:
    counts = {status: sum(row.status == status for row in rows) for status in _STATUS}
    filters = "".join(
        f'<label class="filter {status}"><input type="checkbox" checked value="{status}">'
        f"<span>{_STATUS[status]} <b>{count}</b></span></label>"
        for status, count in counts.items()
        if count
    )
    options = "".join(
        f'<option value="{column.key}">{html.escape(column.heading)}</option>' for column in columns
    )
    return (
        '<div class="controls">'
        '<label class="search"><span>Search</span>'
        '<input id="search" type="search" autocomplete="off" spellcheck="false" '
        'placeholder="Site, recipe, reason, engine"></label>'
        f'<fieldset><legend class="unseen">Show</legend>{filters}</fieldset>'
        '<label class="sort"><span>Sort by</span><select id="sort">'
        f'<option value="worst">Worst first</option>{options}</select></label>'
        '<output id="shown" aria-live="polite"></output>'
        "</div>"
    )


def _table(columns: Sequence[Column], rows: Sequence[Row]) -> str:
    headings = "".join(
        f'<th role="columnheader" scope="col" data-key="{column.key}" aria-sort="none"'
        f'{" class=number" if column.numeric else ""} title="{html.escape(column.hint)}">'
        f'<button type="button">{html.escape(column.heading)}</button></th>'
        for column in columns
    )
    body = "\n".join(_row(columns, index, row) for index, row in enumerate(rows))
    return (
        '<main><table role="table" id="sites">'
        '<caption class="unseen">All products of floats. The buttons in the headings sort; '
        "the button of a site opens its details.</caption>"
        f'<thead role="rowgroup"><tr role="row">{headings}</tr></thead>'
        f'<tbody role="rowgroup">\n{body}\n</tbody></table>'
        '<p id="none" hidden>No site matches.</p></main>'
    )


def _row(columns: Sequence[Column], index: int, row: Row) -> str:
    site = row.site
    words = (site.name, site.reason, site.source, row.formats, row.engine or "", *row.notes)
    cells = "".join(_cell(column, row) for column in columns)
    return (
        f'<tr role="row" class="site {row.status}" data-index="{index}" data-status="{row.status}" '
        f'data-words="{html.escape(" ".join(words).lower())}">{cells}</tr>'
    )


def _cell(column: Column, row: Row) -> str:
    content, key = _CELLS[column.key](row)
    role = 'th role="rowheader" scope="row"' if column.key == "site" else 'td role="cell"'
    sort = "" if key is None else html.escape(str(key))
    return (
        f'<{role} class="c-{column.key}{" number" if column.numeric else ""}" data-sort="{sort}" '
        f'data-label="{html.escape(column.heading)}">{content}</{role.partition(" ")[0]}>'
    )


def _site_cell(row: Row) -> tuple[str, str]:
    stack = "".join(f" × {length}" for length in row.site.stack)
    notes = "".join(f'<span class="note">{html.escape(note)}</span>' for note in row.notes)
    name = html.escape(row.site.name).replace("/", "/<wbr>")
    return (
        f'<button type="button" class="open" aria-expanded="false">'
        f'<span class="dot" title="{_STATUS[row.status]}"></span>{name}'
        f'<small>{stack}</small><span class="unseen">, {_STATUS[row.status]}</span></button>'
        + (f'<div class="notes">{notes}</div>' if notes else "")
    ), row.site.name


def _recipe_cell(row: Row) -> tuple[str, str]:
    name = row.site.recipe.name if row.site.recipe is not None else "not in FP8"
    return f"{html.escape(name)}<small>{html.escape(row.site.reason)}</small>", name


def _sqnr_cell(row: Row) -> tuple[str, float | None]:
    value = row.worst_sqnr
    if value is None:
        return "–", None
    return _decibels(value), -1000.0 if math.isnan(value) else min(value, 1000.0)


def _share_cell(name: str):
    def cell(row: Row) -> tuple[str, float | None]:
        value = getattr(row, name)
        return ("–" if value is None else _percent(value)), value

    return cell


def _history_cell(row: Row) -> tuple[str, float | None]:
    """The history of the operand that came closest to its limit, and how close."""
    used = {
        (operand.name, layer.label): octaves
        for operand in row.operands
        for layer in operand.layers
        if any(octaves := _octaves(layer))
    }
    known = {
        name: max(octave for octave in octaves if octave is not None)
        for name, octaves in used.items()
        if any(octave is not None for octave in octaves)
    }
    if not known:
        return "–", None
    name = max(known, key=known.__getitem__)
    return _spark(name[0] + name[1], used[name], known[name]), known[name]


def _octaves(layer: Any) -> list[float | None]:
    """By how many powers of two each amax is above the limit of its step; None where there is no
    amax.
    """
    return [
        None if amax is None or limit is None else math.log2(amax / limit)
        for amax, limit in zip(layer.amaxes, layer.limits)
    ]


def _spark(label: str, octaves: Sequence[float | None], most: float) -> str:
    """A line over the steps: at the dashed one, the scale's range is used up."""
    step = max(1, math.ceil(len(octaves) / _SPARK_POINTS))
    parts = [octaves[start : start + step] for start in range(0, len(octaves), step)]
    tops = [max((one for one in part if one is not None), default=None) for part in parts]
    unit = _SPARK_HEIGHT / (_SPARK_OCTAVES + 1)

    def place(index: int, octave: float) -> str:
        x = _SPARK_WIDTH * (index + 0.5) / len(tops)
        return f"{x:.1f},{unit - unit * min(max(octave, -_SPARK_OCTAVES), 1.0):.1f}"

    points = " ".join(place(index, top) for index, top in enumerate(tops) if top is not None)
    if " " not in points:
        points += f" {points}"
    words = f"{label}: at most {2**most:.0%} of the range"
    return (
        f'<svg class="spark{" over" if most > 0 else ""}" viewBox="0 0 {_SPARK_WIDTH} '
        f'{_SPARK_HEIGHT}" role="img" aria-label="{html.escape(words)}">'
        f"<title>{html.escape(words)}</title>"
        f'<line x1="0" x2="{_SPARK_WIDTH}" y1="{unit:.1f}" y2="{unit:.1f}"/>'
        f'<polyline points="{points}"/></svg>'
    )


_CELLS = {
    "site": _site_cell,
    "recipe": _recipe_cell,
    "flops": lambda row: (
        html.escape("<0.1%") if 0 < row.share < 5e-4 else f"{row.share:.1%}",
        row.share,
    ),
    "sqnr": _sqnr_cell,
    "saturated": _share_cell("saturated"),
    "flushed": _share_cell("flushed"),
    "history": _history_cell,
    "engine": lambda row: (html.escape(row.engine or "–"), row.engine),
}


def _legend(columns: Sequence[Column]) -> str:
    terms = "".join(
        f"<div><dt>{html.escape(column.heading)}</dt><dd>{html.escape(column.hint)}</dd></div>"
        for column in columns
    )
    return (
        f"<footer><h2>What the columns mean</h2><dl>{terms}</dl>"
        "<p>Worst first: sites with faults (observations that were not finite or not sealed, "
        "ratios below 10 dB), then those to look at (below 20 dB, rows lost beside larger ones, "
        "more than 5% saturated or flushed), then the others by their ratio, and those not in FP8 "
        "last.</p></footer>"
    )


# --------------------------------------------------------------------------------------------------
# details


def _details(row: Row) -> dict:
    """What the script shows when a site is opened."""
    site = row.site
    facts = {
        "Why": site.reason,
        "Product": f"{site.product}: {site.lhs} by {site.rhs} to {site.out}",
        "Forward FLOPs": f"{site.flops:,}",
        "Source": site.source,
        "Casts (forward, dlhs, drhs)": row.formats if site.selected else "",
    }
    products = [
        {
            "product": f"{product} ({_PRODUCTS[product]})",
            "sqnr": None if row.sqnr is None else _decibels(row.sqnr[product]),
            "slice": _decibels_if_known(row.slices.get(product)),
            "engine": row.engines.get(product),
        }
        for product in PRODUCTS
        if row.sqnr is not None or row.engines
    ]
    return {
        "name": site.name,
        "facts": [[name, value] for name, value in facts.items() if value],
        "products": products,
        "operands": [_operand(operand) for operand in row.operands],
    }


def _operand(operand: Operand) -> dict:
    return {
        "name": operand.name,
        "format": operand.format,
        "max": operand.max,
        "leftOut": operand.left_out,
        "layers": [
            {
                "label": layer.label,
                "exponent": layer.exponent,
                "saturated": None if layer.saturated is None else _percent(layer.saturated),
                "flushed": None if layer.flushed is None else _percent(layer.flushed),
                "faults": layer.nonfinite + layer.unsealed,
                "steps": layer.steps,
                "amaxes": [_short(value) for value in layer.amaxes],
                "limits": [_short(value) for value in layer.limits],
            }
            for layer in operand.layers
        ],
    }


def _short(value: float | None) -> float | None:
    """With six digits: as many as a plot can show, and fewer bytes."""
    return None if value is None else float(f"{value:.6g}")


def _decibels(value: float | None) -> str:
    if value is None:
        return "–"
    if math.isnan(value):
        return "not finite"
    return "exact" if math.isinf(value) else f"{value:.1f} dB"


def _decibels_if_known(value: float | None) -> str | None:
    """For a column that is left out where nothing is known."""
    return None if value is None else _decibels(value)


def _percent(share: float) -> str:
    """A share in percent; what is small but not zero doesn't look like zero."""
    return "<0.01%" if 0 < share < 1e-4 else f"{share:.2%}" if share else "0%"
