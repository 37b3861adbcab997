"""What a report says of each site, as plain data: numbers, words, and the histories to draw."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, SupportsFloat

import numpy as np

from fp8jax import metrics
from fp8jax._recipe import OPERANDS, PRODUCTS
from fp8jax._site_scales import SiteScales
from fp8jax._state import find_site_scales
from fp8jax._transform import Explanation, Site
from fp8jax._transform.explain import formats_of

# Where a site is marked. E4M3 products of normal data have 27 dB and more, those with E5M2 24 dB.
LOW_DB, BAD_DB = 20.0, 10.0
MANY_SATURATED = 0.05
MANY_FLUSHED = 0.05

MOST_POINTS = 240  # of a history: more are drawn as the largest of several steps
MOST_LAYERS = 64  # of an operand: of more scales, those that went worst

GOOD, LOOK, BAD, PLAIN = "good", "look", "bad", "plain"
_ORDER = (BAD, LOOK, GOOD, PLAIN)


@dataclasses.dataclass(frozen=True)
class Layer:
    """One scale of an operand: of a layer, where layers are stacked.

    Args:
      label: its indices, as in "[3]"; "" where the operand has one scale.
      exponent: base-2 exponent of the scale as it is now; None where it isn't known.
      saturated, flushed: shares in [0, 1], or None where they were not given.
      nonfinite, unsealed: numbers of observations that were not stored.
      steps: numbers of the steps that the points below are of, or of the last of several.
      amaxes: at these, None where nothing was observed.
      limits: the largest value that the scale of that step could represent.
    """

    label: str
    exponent: float | None = None
    saturated: float | None = None
    flushed: float | None = None
    nonfinite: int = 0
    unsealed: int = 0
    steps: tuple[int, ...] = ()
    amaxes: tuple[float | None, ...] = ()
    limits: tuple[float | None, ...] = ()


@dataclasses.dataclass(frozen=True)
class Operand:
    """An operand with delayed scaling: its format, its scales, and how many there are beyond those
    listed.
    """

    name: str
    format: str
    max: float
    layers: tuple[Layer, ...]
    left_out: int = 0


@dataclasses.dataclass(frozen=True)
class Row:
    """A site, with all that is known of it."""

    site: Site
    share: float
    status: str
    notes: tuple[str, ...]
    formats: str
    sqnr: Mapping[str, float | None] | None
    slices: Mapping[str, float | None]
    worst_sqnr: float | None
    saturated: float | None
    flushed: float | None
    engine: str | None
    engines: Mapping[str, str]
    operands: tuple[Operand, ...]


def rows_of(
    explanation: Explanation,
    state: Any = None,
    scales: Any = None,
    monitor: Any = None,
    hlo: Any = None,
    steps: Sequence[tuple[Any, Any]] = (),
) -> tuple[Row, ...]:
    """A row for each site, the worst first; arguments are those of `fp8jax.report.write_html`."""
    operands = operands_of(state, scales, steps)
    errors = {} if monitor is None else {error.name: error for error in monitor.sites}
    rows = [
        _row(site, explanation.flops, operands.get(site.name, ()), errors.get(site.name), hlo)
        for site in explanation.sites
    ]
    return tuple(sorted(rows, key=_badness))


def _badness(row: Row) -> tuple:
    """The sort key: status, then the lowest ratio, then the largest shares, then the largest
    products.
    """
    ratio = math.inf if row.worst_sqnr is None else row.worst_sqnr
    return (
        _ORDER.index(row.status),
        -math.inf if math.isnan(ratio) else ratio,
        -(row.saturated or 0),
        -(row.flushed or 0),
        -row.share,
    )


def _row(site: Site, flops: int, operands: tuple[Operand, ...], error: Any, hlo: Any) -> Row:
    sqnr = None if error is None else {name: getattr(error, name) for name in PRODUCTS}
    known = [value for value in (sqnr or {}).values() if value is not None]
    worst = next((value for value in known if math.isnan(value)), min(known, default=None))
    layers = [layer for operand in operands for layer in operand.layers]
    saturated, flushed = (
        max(
            (value for layer in layers if (value := getattr(layer, name)) is not None), default=None
        )
        for name in ("saturated", "flushed")
    )
    loses_slices = error is not None and error.loses_slices
    status, notes = _judged(site, operands, worst, loses_slices, saturated, flushed)
    engines = {}
    if hlo is not None and site.selected:
        engines = {
            product: "; ".join(dict.fromkeys(map(str, hlo.of(site.name, product)))) or "not there"
            for product in PRODUCTS
        }
    return Row(
        site=site,
        share=site.flops / max(flops, 1),
        status=status,
        notes=notes,
        formats=formats_of(site.recipe),
        sqnr=sqnr,
        slices={name: getattr(error, name + "_slice") for name in PRODUCTS} if error else {},
        worst_sqnr=worst,
        saturated=saturated,
        flushed=flushed,
        engine=None if hlo is None or not engines else hlo.verdict(site.name),
        engines=engines,
        operands=operands,
    )


def _judged(site, operands, worst, loses_slices, saturated, flushed) -> tuple[str, tuple[str, ...]]:
    """The status of a site, and what there is to look at, in words."""
    if not site.selected:
        return PLAIN, ()
    bad, look = [], []
    for counter, words in (("nonfinite", "not finite"), ("unsealed", "not sealed")):
        for operand in operands:
            count = sum(getattr(layer, counter) for layer in operand.layers)
            if count:
                bad.append(f"{operand.name}: {count} {words}")
    if worst is not None and not worst >= BAD_DB:
        bad.append("not a number" if math.isnan(worst) else f"only {worst:.1f} dB")
    elif worst is not None and worst < LOW_DB:
        look.append(f"only {worst:.1f} dB")
    if loses_slices:
        look.append("rows lost beside larger ones")
    if saturated is not None and saturated > MANY_SATURATED:
        look.append(f"{saturated:.1%} saturated")
    if flushed is not None and flushed > MANY_FLUSHED:
        look.append(f"{flushed:.1%} flushed")
    return BAD if bad else LOOK if look else GOOD, (*bad, *look)


# --------------------------------------------------------------------------------------------------
# operands


def operands_of(
    state: Any, scales: Any, steps: Sequence[tuple[Any, Any]]
) -> dict[str, tuple[Operand, ...]]:
    """By site, its operands with delayed scaling, with what the optimizer's state and the recorded
    steps tell of them.
    """
    recorded = [tuple(_by_site(tree) for tree in pair) for pair in steps]
    nodes = _by_site(scales) if scales is not None else dict(recorded[-1][0]) if recorded else {}
    counted = {} if state is None else _counted(state, scales)
    windows = {} if state is None or recorded else metrics.histories(state, scales)
    return {
        site: tuple(
            _operand(node, name, counted, windows, recorded)
            for name in OPERANDS
            if _cast(node, name) is not None
        )
        for site, node in nodes.items()
    }


def _by_site(tree: Any) -> dict[str, SiteScales]:
    return {node.site: node for node in find_site_scales(tree)}


def _cast(node: SiteScales, operand: str) -> Any:
    return node.casts[OPERANDS.index(operand)]


def _counted(state: Any, scales: Any) -> dict[str, dict[str, float]]:
    """By name of an operand's element, what `fp8jax.metrics` tells of it."""
    counted = {
        name: {"saturated": share}
        for name, share in metrics.saturated_shares(state, scales).items()
    }
    if any(node.flushed is not None for node in find_site_scales(scales)):
        for name, share in metrics.flushed_shares(state, scales).items():
            counted[name]["flushed"] = share
    summary = metrics.summary(state, scales)
    for counter in ("nonfinite", "unsealed"):
        prefix = f"fp8/{counter}/"
        for name, value in summary.items():
            if name.startswith(prefix):
                counted[name.removeprefix(prefix)][counter] = value
    return counted


def _operand(node: SiteScales, name: str, counted, windows, recorded) -> Operand:
    exponents = np.asarray(getattr(node, name), np.float64)
    fmt = _cast(node, name).format
    indices = list(np.ndindex(exponents.shape))
    labels = [f"[{','.join(map(str, index))}]" if index else "" for index in indices]
    full = [f"{node.site}/{name}{label}" for label in labels]
    # Of the many scales that an operand with a scale per channel has, a page shows those that went
    # worst.
    places = sorted(range(len(indices)), key=lambda place: _trouble(counted.get(full[place], {})))
    places = sorted(places[:MOST_LAYERS])
    layers = []
    for place in places:
        index, exponent = indices[place], float(exponents[indices[place]])
        if recorded:
            history = _recorded(recorded, node.site, name, index, fmt.max)
        else:
            amaxes = np.asarray(windows.get(full[place], ()), np.float64)
            history = _thinned(amaxes, np.full(len(amaxes), _limit(exponent, fmt.max)))
        layers.append(Layer(labels[place], exponent, **counted.get(full[place], {}), **history))
    return Operand(name, fmt.name, float(fmt.max), tuple(layers), len(indices) - len(places))


def _trouble(counts: Mapping[str, float]) -> tuple:
    return tuple(-counts.get(name, 0) for name in ("nonfinite", "unsealed", "saturated", "flushed"))


def _limit(exponent: float, largest: float) -> float:
    return math.ldexp(largest, int(exponent))


def _recorded(recorded, site: str, operand: str, index: tuple[int, ...], largest: float) -> dict:
    """The history of one scale over the recorded steps; where a step lacks the site, nothing was
    observed.
    """

    def at(tree, missing):
        leaf = getattr(tree[site], operand) if site in tree else None
        return missing if leaf is None else float(np.asarray(leaf)[index])

    exponents = [at(scales, math.nan) for scales, _ in recorded]
    limits = [math.nan if math.isnan(e) else _limit(e, largest) for e in exponents]
    return _thinned(np.array([at(seen, 0.0) for _, seen in recorded]), np.array(limits))


def _thinned(amaxes: np.ndarray, limits: np.ndarray) -> dict:
    """At most `MOST_POINTS` points: of the steps in each, the one whose amax is largest beside its
    limit.
    """
    amaxes = np.where(np.isfinite(amaxes) & (amaxes > 0), amaxes, np.nan)
    chosen = []
    for part in np.array_split(np.arange(len(amaxes)), min(len(amaxes), MOST_POINTS) or 1):
        if len(part):
            used = np.nan_to_num(amaxes[part] / limits[part], nan=-1.0)
            chosen.append(int(part[used.argmax()]))
    return {
        "steps": tuple(place + 1 for place in chosen),
        "amaxes": tuple(_or_none(amaxes[place]) for place in chosen),
        "limits": tuple(_or_none(limits[place]) for place in chosen),
    }


def _or_none(value: SupportsFloat) -> float | None:
    return float(value) if math.isfinite(float(value)) else None
