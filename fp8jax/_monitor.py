"""What FP8 costs, product by product: the error of each one on a batch, against the same product in
float32.
"""

import collections
import dataclasses
import functools
import json
import math
import threading
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import rich.box
import rich.table

from fp8jax._progress import progress_bar
from fp8jax._recipe import PRODUCTS
from fp8jax._site_scales import by_operand
from fp8jax._tables import as_text
from fp8jax._transform import Fp8Function
from fp8jax.ops._ready import own_scales


@dataclasses.dataclass(frozen=True)
class SiteError:
    """The signal-to-quantization-noise ratios of one site's products, in dB.

    Args:
      name: of the site.
      forward, dlhs, drhs: `10 log10(sum(exact**2) / sum((fp8 - exact)**2))` over all calls of the
        site together (layers, iterations, members of a batch); None where the product did not run
        or is zero, as a gradient may be; NaN where something is not finite.
      lowest: that of the worst single call of the worst product.
      forward_slice, dlhs_slice, drhs_slice: the same ratios of the worst slice in any call: one row
        or column of a matrix, in general one index of one axis. Slices that are zero don't count;
        None where there is none, or the product has fewer than two axes.
      saturated: the largest share of an operand's elements, in any call, that were beyond what
        their scale could represent; of operands with delayed scaling.
      nonfinite: the largest share of elements that are infinite or NaN, in an operand or a product
        of any call.
      largest: the largest finite magnitude in the outputs and gradients, as computed in float32.
    """

    name: str
    forward: float | None
    dlhs: float | None
    drhs: float | None
    lowest: float | None
    forward_slice: float | None = None
    dlhs_slice: float | None = None
    drhs_slice: float | None = None
    saturated: float = 0.0
    nonfinite: float = 0.0
    largest: float = 0.0

    @property
    def loses_slices(self) -> bool:
        """Whether a product is exact as a whole, above 15 dB, and not in its worst slice, below 3:
        rows are lost beside larger ones, which share their scale.
        """
        ratios = ((getattr(self, name), getattr(self, name + "_slice")) for name in PRODUCTS)
        return any(
            whole is not None and worst is not None and worst < 3 < 15 < whole
            for whole, worst in ratios
        )


@dataclasses.dataclass(frozen=True)
class Errors:
    """The errors of all selected sites, the worst first; printed, a table of them.

    A ratio of energies speaks for the largest values. Where one feature is 1e5 times the others,
    nearly all energy is its own, and the ratio stays high while all others are lost: look at the
    worst slice. Nor does a ratio say that values grow, for a scale that follows them keeps it: a
    run that diverges shows in `largest`, and where scales don't follow, in `saturated` and
    `nonfinite`.

    Args:
      sites: sorted by the lowest of each site's three ratios.
    """

    sites: tuple[SiteError, ...]

    def to_json(self) -> str:
        """The sites as a JSON list of objects; what is not finite is null."""
        rows = (dataclasses.asdict(site) for site in self.sites)
        return json.dumps(
            [{name: _finite(value) for name, value in row.items()} for row in rows], indent=1
        )

    def __rich__(self) -> rich.table.Table:
        table = rich.table.Table(box=rich.box.SIMPLE_HEAD, title="Signal to quantization noise, dB")
        table.add_column("site", overflow="fold")
        for column in (*PRODUCTS, "worst call"):
            table.add_column(column, justify="right", no_wrap=True)
        table.add_column("largest", justify="right", no_wrap=True)
        for site in self.sites:
            ratios = (
                _cell(getattr(site, name), getattr(site, name + "_slice")) for name in PRODUCTS
            )
            table.add_row(site.name, *ratios, _cell(site.lowest, None), f"{site.largest:.1e}")
        lines = ["in brackets: the worst row, column or other slice"]
        lost = [site.name for site in self.sites if site.loses_slices]
        if lost:
            lines += ["rows lost beside larger ones, which a finer recipe may keep:", *lost]
        for site in self.sites:
            for share, what in (
                (site.saturated, "of an operand saturated"),
                (site.nonfinite, "of an operand or product are not finite"),
            ):
                if share:
                    lines.append(f"{site.name}: {100 * share:.2g} % {what}")
        table.caption, table.caption_justify = "\n".join(lines), "left"
        return table

    def __str__(self) -> str:
        return as_text(self.__rich__())


def _cell(ratio: float | None, worst: float | None) -> str:
    whole, part = ("-" if value is None else f"{value:.1f}" for value in (ratio, worst))
    return whole if worst is None else f"{whole} ({part})"


def monitor(fp8_fn: Fp8Function, *, progress: bool = True) -> Callable[..., Errors]:
    """Measures how exact each product of an FP8 function is on a batch: output and both gradients.

    The function runs in FP8, forward and backward; beside each product, the same one runs in
    float32 on the very operands, and on the very gradient, that reach it. So the errors are those
    that the site adds, and not those that came to it. Works through `jit`, `scan`, `vmap`, `cond`
    and rematerialization. Costs about three steps, and a host callback for each product: for a look
    now and then, not for every step.

    Args:
      fp8_fn: what `fp8jax.fp8` returned. Where it returns a loss, the gradients are those of the
        loss; otherwise cotangents stand in, as in `Fp8Function.init`.
      progress: whether to show a bar, on stderr, that counts the products measured.

    Returns:
      A function of `(scales, *args)`, as `fp8_fn` itself, that returns `Errors`; its program is
      compiled once for each shape of the arguments.

    Raises:
      TypeError: where `fp8_fn` is no `Fp8Function`.

    >>> import fp8jax
    >>> fp8_loss = fp8jax.fp8(lambda w, x: jnp.square(x @ w).mean(), fp8jax.recipes.delayed())
    >>> w = jax.random.normal(jax.random.key(0), (64, 8))
    >>> x = jax.random.normal(jax.random.key(1), (16, 64))
    >>> site, = monitor(fp8_loss, progress=False)(fp8_loss.init(w, x), w, x).sites
    >>> site.forward > 27, site.dlhs > 24, site.drhs > 24
    (True, True, True)
    """
    if not isinstance(fp8_fn, Fp8Function):
        raise TypeError(
            f"fp8_fn must be what fp8jax.fp8 returns; got {type(fp8_fn).__name__}. Wrap the loss: "
            "monitor(fp8jax.fp8(loss, recipe))."
        )
    seen: dict[tuple[str, str], list[tuple[float, float]]] = collections.defaultdict(list)
    others: dict[str, dict[str, list[float]]] = {}
    lock = threading.Lock()
    advance: Callable[[float], None] | None = None

    def note(site: str, **values) -> None:
        with lock:
            lists = others.setdefault(site, collections.defaultdict(list))
            for name, value in values.items():
                lists[name] += [float(entry) for entry in np.ravel(value)]

    def record(site: str, product: str, unit, signal, noise) -> None:
        with lock:
            powers = (
                np.stack([signal, noise], -1).astype(np.float64)
                * np.asarray(unit, np.float64)[..., None] ** 2
            )
            if advance is not None and (site, product) not in seen:
                advance(1)
            seen[site, product] += [tuple(row) for row in powers.reshape(-1, 2)]

    run = fp8_fn.watching(functools.partial(_watched, record, note))

    def measure(scales: Any, *args: Any, **kwargs: Any) -> Errors:
        nonlocal advance
        seen.clear()
        others.clear()
        # How many there will be depends on what runs; a product that nothing differentiates has no
        # gradients.
        with progress_bar(progress, "products measured", None) as advance:
            run(scales, *args, **kwargs)
            jax.effects_barrier()
        advance = None
        sites = [
            _error_of(site, seen, others[site]) for site in dict.fromkeys(site for site, _ in seen)
        ]
        return Errors(tuple(sorted(sites, key=_worst_product)))

    return measure


def _error_of(site: str, seen: dict, others: dict[str, list[float]]) -> SiteError:
    calls = {
        product: [row for row in seen.get((site, product), ()) if row[0] != 0]
        for product in PRODUCTS
    }
    ratios = {
        product: _decibels(*map(sum, zip(*rows))) if rows else None
        for product, rows in calls.items()
    }
    single = [_decibels(*row) for rows in calls.values() for row in rows]
    slices = {
        f"{product}_slice": _decibels_of_worst(others.get(product, ())) for product in PRODUCTS
    }
    shares = {
        name: max(others.get(name, ()), default=0.0)
        for name in ("saturated", "nonfinite", "largest")
    }
    lowest = min(single, key=_nan_first, default=None)
    return SiteError(site, **ratios, lowest=lowest, **slices, **shares)


def _decibels_of_worst(ratios: Any) -> float | None:
    """Of the largest part that noise has of signal; -1 stands for no signal."""
    if any(math.isnan(ratio) for ratio in ratios):
        return math.nan
    worst = max(ratios, default=-1.0)
    return None if worst < 0 else _decibels(1.0, worst)


def _decibels(signal: float, noise: float) -> float:
    if not math.isfinite(signal) or not math.isfinite(noise):
        return math.nan
    return math.inf if noise == 0 else 10 * math.log10(signal / noise)


def _worst_product(site: SiteError) -> float:
    return min(
        (_nan_first(value) for value in (site.forward, site.dlhs, site.drhs) if value is not None),
        default=math.inf,
    )


def _nan_first(value: float) -> float:
    return -math.inf if math.isnan(value) else value


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


# --------------------------------------------------------------------------------------------------
# inside the program


def _watched(record: Callable, note: Callable, run: Callable) -> Callable:
    """`run`, the function that runs a site, with each product's powers of signal and noise handed
    to `record`, and the rest to `note`.
    """

    def watched(equation, site, scales, operands, mode, ahead):
        own = {site.name: scales[site.name]} if site.name in scales else {}

        def report(product, got, exact):
            # In units of the largest value: the squares of a gradient might be below what float32
            # holds.
            unit = jnp.max(jnp.abs(exact), initial=0.0)
            inverse = jnp.where(unit > 0, 1 / jnp.where(unit > 0, unit, 1), 0)
            signal, noise = (
                jnp.sum(jnp.square(value * inverse))
                for value in (exact, got.astype(exact.dtype) - exact)
            )
            jax.debug.callback(functools.partial(record, site.name, product), unit, signal, noise)
            finite = jnp.where(jnp.isfinite(exact), jnp.abs(exact), jnp.zeros_like(exact))
            values = {
                "nonfinite": _share(~jnp.isfinite(got)),
                "largest": jnp.max(finite, initial=0.0).astype(jnp.float32),
            }
            if exact.ndim > 1:
                values[product] = _worst_slice(exact, got.astype(exact.dtype) - exact)
            jax.debug.callback(lambda values: note(site.name, **values), values)

        def look_at(own, **operands):
            scaling = own_scales(own.get(site.name))
            known = {} if scaling is None else scaling.scales()
            casts = {} if scaling is None else by_operand(scaling.casts)
            for name, operand in operands.items():
                values = {"nonfinite": _share(~jnp.isfinite(operand))}
                if name in known:
                    limit = known[name] * np.float32(casts[name].format.max)
                    values["saturated"] = _share(jnp.abs(operand.astype(jnp.float32)) > limit)
                jax.debug.callback(lambda values: note(site.name, **values), values)

        def exact(lhs, rhs, rest):
            params = equation.params | {
                "precision": jax.lax.Precision.HIGHEST,
                "preferred_element_type": lhs.dtype,
            }
            return equation.primitive.bind(
                lhs, rhs, *rest, **equation.primitive.get_bind_params(params)
            )

        @jax.custom_vjp
        def product(own, lhs, rhs, *rest):
            return forward(own, lhs, rhs, *rest)[0]

        def forward(own, lhs, rhs, *rest):
            def quantized(own, lhs, rhs):
                return run(
                    equation, site, own, [lhs, rhs, *rest], mode, {}
                )  # A weight cast before gives the same codes.

            result, backward = jax.vjp(quantized, own, lhs, rhs)
            look_at(own, lhs=lhs, rhs=rhs)
            report("forward", result[0][0], exact(_wide(lhs), _wide(rhs), rest))
            return result, (backward, own, lhs, rhs, rest)

        def backward(residuals, cotangents):
            quantized, own, lhs, rhs, rest = residuals
            gradients = quantized(cotangents)
            look_at(own, grad=cotangents[0][0])
            out, exactly = jax.vjp(lambda lhs, rhs: exact(lhs, rhs, rest), _wide(lhs), _wide(rhs))
            for name, gradient, want in zip(
                ("dlhs", "drhs"), gradients[1:], exactly(cotangents[0][0].astype(out.dtype))
            ):
                report(name, gradient, want)
            return *gradients, *(None for _ in rest)

        product.defvjp(forward, backward)
        return product(own, *operands)

    return watched


def _share(flags: jax.Array) -> jax.Array:
    return jnp.sum(flags, dtype=jnp.float32) / np.float32(max(flags.size, 1))


def _worst_slice(exact: jax.Array, noise: jax.Array) -> jax.Array:
    """The largest ratio of noise to signal, as energies, of any index of any axis with a signal; -1
    where there is none.
    """
    worst = jnp.asarray(-1, exact.dtype)
    for axis in range(exact.ndim):
        others = tuple(other for other in range(exact.ndim) if other != axis)
        # In units of each slice's largest value, for the squares of a small one beside a large one.
        unit = jnp.max(jnp.abs(exact), others, keepdims=True, initial=0.0)
        inverse = jnp.where(unit > 0, 1 / jnp.where(unit > 0, unit, 1), 0)
        signal, error = (jnp.sum(jnp.square(value * inverse), others) for value in (exact, noise))
        ratios = jnp.where(signal == 0, -1, error / jnp.where(signal == 0, 1, signal))
        worst = jnp.maximum(worst, jnp.max(ratios, initial=-1.0))
    return worst


def _wide(operand: jax.Array) -> jax.Array:
    return operand.astype(jnp.promote_types(operand.dtype, jnp.float32))
