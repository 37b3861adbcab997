"""What was selected, what was not, and why: as data, and as a table."""

import dataclasses
import json
from typing import Any

import rich.box
import rich.console
import rich.markup
import rich.table
import rich.text

from fp8jax._recipe import PRODUCTS, CastSpec, Recipe
from fp8jax._scaling import BlockWise, PerTensor
from fp8jax._tables import as_text
from fp8jax._transform.follow import in_words
from fp8jax._transform.sites import Site
from fp8jax.devices import figures_of, notes_on


@dataclasses.dataclass(frozen=True)
class Explanation:
    """The sites of a function; printed, a table of them.

    Args:
      sites: all products of floats in the function, in the order of its program; of integers and
        complex numbers there are none in FP8.
      report: of `fp8jax.hlo.report`, what became of them in a compiled program; None where it was
        not asked for.
      refused: the weights held as FP8 codes that can't be, since something needs their values: the
        path of each, and what needs it.
      scans: of `scan_repeats`, the blocks that run as one scan, in words.
      device: the kind of the device that it is traced for, as `jax.Device.device_kind`; "" where
        that isn't known.
    """

    sites: tuple[Site, ...]
    report: Any = None
    refused: tuple[tuple[str, str], ...] = ()
    device: str = dataclasses.field(default="", compare=False)
    scans: tuple[str, ...] = ()

    def with_report(self, report: Any) -> "Explanation":
        """The same with one more column: what became of each site in the compiled program of
        `fp8jax.hlo.report`.
        """
        return dataclasses.replace(self, report=report)

    @property
    def flops(self) -> int:
        """Floating-point operations of the forward products, all together."""
        return sum(site.flops for site in self.sites)

    @property
    def selected_flops(self) -> int:
        """Those of the selected ones."""
        return sum(site.flops for site in self.sites if site.selected)

    @property
    def share(self) -> float:
        """The selected share of floating-point operations, in [0, 1]; 0 where there are none."""
        return self.selected_flops / max(self.flops, 1)

    @property
    def notes(self) -> tuple[str, ...]:
        """What the device makes of it: whether it multiplies none of the selected products as
        codes, and whether FP8 can be slower than bfloat16 there. Empty where neither is so.
        """
        selected = [site for site in self.sites if site.selected]
        if not selected or figures_of(self.device) is None:
            return ()
        return notes_on(self.device, sum(map(self._multiplied, selected)))

    def _multiplied(self, site: Site) -> int:
        """How many of a site's three products the device may multiply as codes."""
        figures, engines = figures_of(self.device), dict(site.engines)
        if figures is None or site.recipe is None or site.product == "ragged_dot_general":
            return 0
        count = 0
        for product, operands in PRODUCTS.items():
            casts = [getattr(getattr(site.recipe, product), operand) for operand in operands]
            if None in casts:
                continue
            if product in engines:
                count += not engines[product].startswith("emulated")
            elif not any(isinstance(cast.scaling, BlockWise) for cast in casts):
                formats = figures.multiplies_formats(*(cast.format for cast in casts))
                count += formats and site.recipe.execution != "emulated"
        return count

    def to_json(self) -> str:
        """All of it as a JSON object: `sites`, each with its three `products`, `totals`, the
        `device` and `notes` on it, and `scans`.

        FLOPs are those of the forward products in the totals and of a site, and each one's own in
        its `products`.
        """
        rows = [_to_data(site) for site in self.sites]
        if self.report is not None:
            rows = [row | {"compiled": self._compiled(site)} for row, site in zip(rows, self.sites)]
        totals = {
            "sites": len(self.sites),
            "selected": sum(site.selected for site in self.sites),
            "flops": self.flops,
            "selected_flops": self.selected_flops,
            "share": self.share,
        }
        refused = [{"weight": weight, "why": why} for weight, why in self.refused]
        found = {"sites": rows, "totals": totals, "refused": refused}
        found |= {"device": self.device, "notes": self.notes, "scans": self.scans}
        return json.dumps(found, indent=1)

    def _compiled(self, site: Site) -> str | None:
        return self.report.verdict(site.name) if site.selected else None

    def table(self) -> rich.table.Table:
        """The table, for a `rich` console of one's own; its last column tells the recipe, or why
        there is none.
        """
        selected = sum(site.selected for site in self.sites)
        recipes = dict.fromkeys(formats_of(site.recipe) for site in self.sites if site.selected)
        legend = ("forward, dlhs, drhs", *recipes, *self.notes) if recipes else ()
        legend += self.scans
        table = rich.table.Table(
            box=rich.box.SIMPLE_HEAD,
            caption="\n".join(map(rich.markup.escape, legend)) or None,
            title=f"{selected} of {len(self.sites)} products in FP8: {self.share:.1%} of "
            f"{_readable(self.flops)} FLOPs forward",
        )
        table.add_column("site", overflow="fold")
        for name in ("lhs", "rhs"):
            table.add_column(name, overflow="fold")
        table.add_column("FLOPs", justify="right", no_wrap=True)
        table.add_column("recipe, or why not", overflow="fold")
        if self.report is not None:
            table.add_column("compiled", overflow="fold")
        for site in self.sites:
            name = " x ".join((site.name, *map(str, site.stack)))
            verdict = site.recipe.name if site.recipe is not None else f"- {site.reason}"
            verdict += f", {site.engine}" if site.engine else ""
            verdict += "".join(
                f", {operand} cast with {first}" for operand, first in site.cast_with
            )
            compiled = () if self.report is None else (self._compiled(site) or "",)
            cells = (
                name,
                _short(site.lhs),
                _short(site.rhs),
                _readable(site.flops),
                verdict,
                *compiled,
            )
            table.add_row(*map(rich.markup.escape, cells), style=None if site.selected else "dim")
        return table

    def __str__(self) -> str:
        text = as_text(self.table())
        return f"{text}\n{in_words(self.refused)}" if self.refused else text

    def __rich__(self) -> rich.console.Group:
        refused = [rich.text.Text(in_words(self.refused))] if self.refused else []
        return rich.console.Group(self.table(), *refused)


def formats_of(recipe: Recipe | None) -> str:
    """A recipe's casts in the order forward, dlhs, drhs; "own" for an operand that is not cast, "-"
    for no recipe.

    >>> from fp8jax import recipes
    >>> formats_of(recipes.current())
    'current: E4M3.E4M3, E5M2.E4M3, E4M3.E5M2'
    """
    if recipe is None:
        return "-"
    products = (
        ".".join(_cast_name(getattr(getattr(recipe, product), operand)) for operand in operands)
        for product, operands in PRODUCTS.items()
    )
    return f"{recipe.name}: " + ", ".join(products)


def _cast_name(cast: CastSpec | None) -> str:
    """The format, and how many values share a scale where that is not the whole tensor."""
    if cast is None:
        return "own"
    match cast.scaling:
        case PerTensor():
            return cast.format.name
        case BlockWise() as blocks:
            return f"{cast.format.name}/" + "x".join(map(str, blocks.extents))
        case scaling:
            return f"{cast.format.name}/{type(scaling).__name__}"


def _to_data(site: Site) -> dict:
    data = dataclasses.asdict(dataclasses.replace(site, recipe=None))
    del data["loops"], data["stacked_over"], data["device_axes"], data["engines"]
    recipe = None if site.recipe is None else json.loads(site.recipe.to_json())
    products = {
        name: {
            "flops": site.flops,
            "engine": dict(site.engines).get(name),
            "casts": None
            if recipe is None
            else {operand: recipe[name].get(operand) for operand in operands},
        }
        for name, operands in PRODUCTS.items()
    }
    return data | {
        "selected": site.selected,
        "stack": list(site.stack),
        "cast_with": dict(site.cast_with),
        "products": products,
        "formats": formats_of(site.recipe),
        "recipe": recipe,
    }


def _short(aval: str) -> str:
    """A dtype and shape with the dtype's bits alone: "f32[8,16]"."""
    return aval.replace("bfloat", "bf").replace("float", "f")


def _readable(flops: float) -> str:
    for unit in ("", " k", " M", " G", " T", " P"):
        if flops < 1000 or unit == " P":
            return f"{flops:.3g}{unit}"
        flops /= 1000
    raise AssertionError("unreachable")
