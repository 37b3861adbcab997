"""What FP8 costs, product by product: the error of each one on a batch, against the same product in float32."""

import collections
import dataclasses
import functools
import json
import math
import threading
from typing import Any, Callable

import jax
import jax.numpy as jnp
import numpy as np
import rich.box
import rich.table

from fp8jax.recipe import PRODUCTS
from fp8jax.tables import as_text
from fp8jax.transform import Fp8Function


@dataclasses.dataclass(frozen=True)
class SiteError:
    """The signal-to-quantization-noise ratios of one site's products, in dB.

    Args:
      name: of the site.
      forward, dlhs, drhs: `10 log10(sum(exact**2) / sum((fp8 - exact)**2))` over all calls of the site together (layers,
        iterations, members of a batch); None where the product did not run or is zero, as a gradient may be; NaN where
        something is not finite.
      lowest: that of the worst single call of the worst product.
    """

    name: str
    forward: float | None
    dlhs: float | None
    drhs: float | None
    lowest: float | None


@dataclasses.dataclass(frozen=True)
class Errors:
    """The errors of all selected sites, the worst first; printed, a table of them.

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
        for site in self.sites:
            values = (site.forward, site.dlhs, site.drhs, site.lowest)
            table.add_row(
                site.name, *("-" if value is None else f"{value:.1f}" for value in values)
            )
        return table

    def __str__(self) -> str:
        return as_text(self.__rich__())


def monitor(fp8_fn: Fp8Function) -> Callable[..., Errors]:
    """Measures how exact each product of an FP8 function is on a batch: output and both gradients.

    The function runs in FP8, forward and backward; beside each product, the same one runs in float32 on the very
    operands, and on the very gradient, that reach it. So the errors are those that the site adds, and not those that came to it.
    Works through `jit`, `scan`, `vmap`, `cond` and rematerialization. Costs about three steps, and a host callback for each
    product: for a look now and then, not for every step.

    Args:
      fp8_fn: what `fp8jax.fp8` returned. Where it returns a loss, the gradients are those of the loss; otherwise cotangents
        stand in, as in `Fp8Function.init`.

    Returns:
      A function of `(scales, *args)`, as `fp8_fn` itself, that returns `Errors`; its program is compiled once for each
      shape of the arguments.

    Raises:
      TypeError: where `fp8_fn` is no `Fp8Function`.

    >>> import fp8jax
    >>> fp8_loss = fp8jax.fp8(lambda w, x: jnp.square(x @ w).mean(), fp8jax.recipes.delayed())
    >>> w, x = jax.random.normal(jax.random.key(0), (64, 8)), jax.random.normal(jax.random.key(1), (16, 64))
    >>> site, = monitor(fp8_loss)(fp8_loss.init(w, x), w, x).sites
    >>> site.forward > 27, site.dlhs > 24, site.drhs > 24
    (True, True, True)
    """
    if not isinstance(fp8_fn, Fp8Function):
        raise TypeError(
            f"fp8_fn must be what fp8jax.fp8 returns; got {type(fp8_fn).__name__}. Wrap the loss: "
            "monitor(fp8jax.fp8(loss, recipe))."
        )
    seen: dict[tuple[str, str], list[tuple[float, float]]] = collections.defaultdict(list)
    lock = threading.Lock()

    def record(site: str, product: str, unit, signal, noise) -> None:
        with lock:
            powers = (
                np.stack([signal, noise], -1).astype(np.float64)
                * np.asarray(unit, np.float64)[..., None] ** 2
            )
            seen[site, product] += [tuple(row) for row in powers.reshape(-1, 2)]

    run = fp8_fn.watching(functools.partial(_watched, record))

    def measure(scales: Any, *args: Any, **kwargs: Any) -> Errors:
        seen.clear()
        run(scales, *args, **kwargs)
        jax.effects_barrier()
        sites = [_error_of(site, seen) for site in dict.fromkeys(site for site, _ in seen)]
        return Errors(tuple(sorted(sites, key=_worst_product)))

    return measure


def _error_of(site: str, seen: dict) -> SiteError:
    calls = {
        product: [row for row in seen.get((site, product), ()) if row[0] != 0]
        for product in PRODUCTS
    }
    ratios = {
        product: _decibels(*map(sum, zip(*rows))) if rows else None
        for product, rows in calls.items()
    }
    single = [_decibels(*row) for rows in calls.values() for row in rows]
    return SiteError(site, **ratios, lowest=min(single, key=_nan_first, default=None))


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


# ------------------------------------------------------------------------------------------------------- inside the program


def _watched(record: Callable, run: Callable) -> Callable:
    """`run`, the function that runs a site, with each product's powers of signal and noise handed to `record`."""

    def watched(equation, site, scales, operands, mode, ahead):
        own = {site.name: scales[site.name]} if site.name in scales else {}

        def report(product, got, exact):
            # In units of the largest value: the squares of a gradient might be below what float32 holds.
            unit = jnp.max(jnp.abs(exact), initial=0.0)
            inverse = jnp.where(unit > 0, 1 / jnp.where(unit > 0, unit, 1), 0)
            signal, noise = (
                jnp.sum(jnp.square(value * inverse))
                for value in (exact, got.astype(exact.dtype) - exact)
            )
            jax.debug.callback(functools.partial(record, site.name, product), unit, signal, noise)

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
            report("forward", result[0][0], exact(_wide(lhs), _wide(rhs), rest))
            return result, (backward, lhs, rhs, rest)

        def backward(residuals, cotangents):
            quantized, lhs, rhs, rest = residuals
            gradients = quantized(cotangents)
            out, exactly = jax.vjp(lambda lhs, rhs: exact(lhs, rhs, rest), _wide(lhs), _wide(rhs))
            for name, gradient, want in zip(
                ("dlhs", "drhs"), gradients[1:], exactly(cotangents[0][0].astype(out.dtype))
            ):
                report(name, gradient, want)
            return *gradients, *(None for _ in rest)

        product.defvjp(forward, backward)
        return product(own, *operands)

    return watched


def _wide(operand: jax.Array) -> jax.Array:
    return operand.astype(jnp.promote_types(operand.dtype, jnp.float32))
