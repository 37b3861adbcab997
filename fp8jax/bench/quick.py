"""What a short time on a GPU is for: whether casts and products have the right bits there, and what
FP8 gains.

    python -m fp8jax.bench gpu --quick

Four parts, each with a share of the time: casts of all float32 patterns against the integer codec;
native products against emulated ones; square products; a Transformer block's step. Each row is
compiled and run by itself: what fails or takes too long is told in its row. The file is written
anew after each part.

XLA's Triton GEMMs are off, for all alike: with them on, choosing among them takes most of the time.
"""

import dataclasses
import datetime
import functools
import os
import pathlib
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import rich.console
from jax import lax

import fp8jax
from fp8jax._codec import encode_bits
from fp8jax._conversion import convert
from fp8jax._formats import E4M3, E5M2, Format
from fp8jax._recipe import CastSpec
from fp8jax._scaling import PerTensor
from fp8jax.bench import contenders
from fp8jax.bench.contenders import BARE, BF16, Contender
from fp8jax.bench.jobs import Clock, in_words, leave, outcomes
from fp8jax.hlo._report import report
from fp8jax.ops._cast import cast

# One call casts so many patterns, a few milliseconds' work for a GPU.
CHUNK = 1 << 24
# An odd number, so that its multiples are all patterns, and few of them are spread over all.
_STRIDE = np.uint32(0x9E3779B1)
_AS_CAST = "as products cast here"


def run(
    sizes: list[int],
    widths: list[int],
    tokens: int,
    rounds: int,
    budget: float,
    patterns: int,
    out: pathlib.Path,
) -> None:
    """Does all parts, prints each, and writes them to `out`.

    Raises:
      SystemExit: where a code or an exact product was wrong, or could not be looked at.
    """
    console, clock = rich.console.Console(), Clock(budget)
    workers = min(8, os.cpu_count() or 1)
    parts: list[tuple[float, Callable[[Clock], Iterator[str]]]] = []
    bits: dict[str, bool] = {}
    parts.append((0.25, lambda part: casts(part, patterns, workers, bits)))
    # Products of whole numbers need no large ones, and are exact in small sums alone.
    exact = min(2048, *sizes)
    parts.append((0.3, lambda part: native_and_emulated(part, exact, workers, bits)))
    for size in sizes:
        for index, title in enumerate(("forward", "forward and both gradients")):
            make = functools.partial(_one_of, contenders.products, index, size)
            title = f"{size} x {size} x {size}, {title}"
            parts.append((0.3, functools.partial(_timed, title, make, rounds, workers, _calls)))
    for width in widths:
        make = functools.partial(contenders.blocks, width, tokens)
        title = f"Training step of a Transformer block, width {width}, {tokens} tokens"
        parts.append((0.95, functools.partial(_timed, title, make, rounds, workers, _steps)))
    lines = _head()
    for share, part in parts:
        for line in part(clock.part(share)):
            console.print(line, markup=False, highlight=False, soft_wrap=True)
            lines.append(line)
        out.write_text("\n".join(lines) + "\n")
    held = all(bits.values())
    say = f"{sum(bits.values())} of {len(bits)} comparisons of bits held"
    for line in ("", f"{say}: {'all' if held else 'NOT ALL'}."):
        console.print(line, markup=False, highlight=False)
        lines.append(line)
    out.write_text("\n".join(lines) + "\n")
    print(f"written to {out}, {budget - clock.left:.0f} s")
    leave(0 if held else 1)


def _one_of(function, index, *arguments):
    return function(*arguments)[index]


def _head() -> list[str]:
    device = jax.devices()[0]
    version = " ".join(jax.extend.backend.get_backend().platform_version.split())
    return [
        f"# FP8 on {device.device_kind}, {datetime.date.today()}",
        "",
        f"`python -m fp8jax.bench gpu --quick`, fp8jax {fp8jax.__version__}, JAX "
        f"{jax.__version__}, {version}. XLA's Triton GEMMs are off.",
    ]


# --------------------------------------------------------------------------------------------------
# casts


def casts(clock: Clock, patterns: int, workers: int, bits: dict[str, bool]) -> Iterator[str]:
    """Rows of the comparison of all casts with the integer codec; into `bits`, which of them
    held.
    """
    yield "\n## Casts, against the integer codec on the device\n"
    yield "| cast | float32 patterns | other codes | the first |\n|---|---|---|---|"
    jobs = {
        f"{fmt}, {overflow}": functools.partial(differing, fmt, overflow, patterns, clock)
        for fmt in (E4M3, E5M2)
        for overflow in ("saturate", "clip")
    }
    for name, found in outcomes(jobs, clock, workers):
        if isinstance(found, BaseException):
            bits[name] = False
            yield f"| {name} | | | {in_words(found)} |"
            continue
        for way, (seen, count, first) in found.items():
            bits[f"{name}, {way}"] = count == 0 and seen == patterns
            where = f"0x{first:08X}" if count else ""
            yield f"| {name}, {way} | {seen:,} of {patterns:,} | {count:,} | {where} |"
    yield "\n## The same, of scaled values, against ml_dtypes on the host\n"
    yield "| cast | values | other codes |\n|---|---|---|"
    size = min(1 << 20, patterns)
    host = {str(fmt): functools.partial(differing_from_host, fmt, size) for fmt in (E4M3, E5M2)}
    for name, found in outcomes(host, clock, workers):
        if isinstance(found, BaseException):
            bits[f"{name}, host"] = False
            yield f"| {name} | | {in_words(found)} |"
            continue
        for way, (seen, count) in found.items():
            bits[f"{name}, {way}, host"] = count == 0
            yield f"| {name}, {way} | {seen:,} | {count:,} |"


def ways_to_cast(x, inverse, fmt: Format, overflow: str) -> dict[str, jax.Array]:
    """Codes of float32 values times `inverse` by the integer codec and by both conversions."""
    scaled = x * inverse
    return {
        "integer codec": encode_bits(scaled, fmt, overflow=overflow, source=x),
        "converted": convert(scaled, x, fmt, overflow, round_first=False),
        "rounded, then converted": convert(scaled, x, fmt, overflow, round_first=True),
    }


@functools.partial(jax.jit, static_argnames=("fmt", "overflow", "size"))
def _differing(first, fmt: Format, overflow: str, size: int):
    """Of `size` patterns: for each way, how many codes differ from the integer codec's, and the
    smallest pattern of those.
    """
    pattern = (first + lax.iota(np.uint32, size)) * _STRIDE
    x = lax.bitcast_convert_type(pattern, np.float32)
    wanted, *others = ways_to_cast(x, np.float32(1), fmt, overflow).values()
    spec = CastSpec(fmt, clip_infinities=overflow == "clip")
    found = []
    for codes in (cast(x, spec, PerTensor(), jnp.float32(1)).data, *others):
        wrong = _differ(wanted, codes, fmt)
        smallest = jnp.where(wrong, pattern, np.uint32(0xFFFFFFFF)).min()
        found.append((wrong.sum(dtype=np.uint32), smallest))
    return found


def _differ(wanted, codes, fmt: Format) -> jax.Array:
    """Where codes differ; NaNs are alike, whatever their sign."""
    wanted, codes = (lax.bitcast_convert_type(one, np.uint8) for one in (wanted, codes))
    last = np.uint8(fmt.max_code + fmt.has_inf)
    nans = [(one & np.uint8(0x7F)) > last for one in (wanted, codes)]
    return jnp.where(nans[0] | nans[1], nans[0] != nans[1], wanted != codes)


def differing(
    fmt: Format, overflow: str, patterns: int, clock: Clock
) -> dict[str, tuple[int, int, int]]:
    """By way to cast: patterns looked at, codes that differ from the integer codec's, and the
    smallest pattern of those.
    """
    names = (_AS_CAST, "converted", "rounded, then converted")
    size, seen = min(CHUNK, patterns), 0
    counts, first = [0] * len(names), [0xFFFFFFFF] * len(names)
    while seen < patterns and clock.left:
        # The last call may look at some patterns again.
        found = _differing(np.uint32(min(seen, patterns - size)), fmt, overflow, size)
        for index, (count, smallest) in enumerate(found):
            counts[index] += int(count)
            first[index] = min(first[index], int(smallest))
        seen = min(seen + size, patterns)
    return {name: (seen, count, at) for name, count, at in zip(names, counts, first)}


def differing_from_host(fmt: Format, size: int) -> dict[str, tuple[int, int]]:
    """By way to cast: values looked at, and codes that differ from those of ml_dtypes, at scales
    that are no powers of two among others.
    """
    rng = np.random.default_rng(0)
    exponents = rng.integers(127 - 20, 127 + 20, size, dtype=np.uint32) << 23
    bits = rng.integers(0, 1 << 32, size, dtype=np.uint32) & np.uint32(0x807FFFFF) | exponents
    x = bits.view(np.float32)
    on_device = jax.jit(functools.partial(ways_to_cast, fmt=fmt, overflow="saturate"))
    wrong: dict[str, int] = {}
    inverses = np.array([1.0, 2.0**-9, 0.7, 1.1, 3e-3], np.float32)
    for inverse in inverses:
        wanted = np.clip(x * inverse, -fmt.max, fmt.max).astype(fmt.dtype).view(np.uint8)
        for way, codes in on_device(x, inverse).items():
            differ = np.asarray(codes).view(np.uint8) != wanted
            wrong[way] = wrong.get(way, 0) + int(differ.sum())
    return {way: (size * len(inverses), count) for way, count in wrong.items()}


# --------------------------------------------------------------------------------------------------
# products


def native_and_emulated(
    clock: Clock, size: int, workers: int, bits: dict[str, bool]
) -> Iterator[str]:
    """Rows of each recipe's products beside the same ones emulated; into `bits`, whether those of
    whole numbers, which are exact, are the same.
    """
    yield f"\n## Native products beside emulated ones, {size} x {size} x {size}\n"
    yield (
        "| recipe | multiplied by | the same on whole numbers | else alike to: forward, dlhs, drhs,"
        " dB |\n|---|---|---|---|"
    )
    jobs = {
        name: functools.partial(compared, recipe, size)
        for name, recipe in _first_ones_first(contenders.recipes()).items()
    }
    for name, found in outcomes(jobs, clock, workers):
        if isinstance(found, BaseException):
            bits[name] = False
            yield f"| {name} | {in_words(found)} | | |"
            continue
        verdict, exact, decibels = found
        bits[name] = exact
        yield f"| {name} | {verdict} | {'yes' if exact else 'NO'} | {decibels} |"


def compared(recipe: fp8jax.Recipe, size: int) -> tuple[str, bool, str]:
    """What multiplies by a recipe here; whether products of whole numbers are those of decoded
    codes; and how alike the others are, in decibels.
    """
    rng = np.random.default_rng(0)
    normal, whole = (
        ({"w": drawn[0]}, *drawn[1:])
        for drawn in (
            jnp.asarray(rng.standard_normal((3, size, size), np.float32), jnp.bfloat16),
            jnp.asarray(rng.integers(-2, 3, (3, size, size)), jnp.bfloat16),
        )
    )
    outputs, verdicts = {}, []
    for execution in ("auto", "emulated"):
        fn = fp8jax.fp8(
            lambda params, x: x @ params["w"], dataclasses.replace(recipe, execution=execution)
        )

        def all_three(scales, params, x, grad):
            out, back = jax.vjp(lambda *arguments: fn(*arguments), scales, params, x)
            _, gradient, of_x = back(grad)
            return out, of_x, gradient["w"]

        params, x, grad = normal
        init = _compiled(fn.init, params, x)
        program = _compiled(all_three, init(params, x), params, x, grad)
        verdicts.append(_verdict(program, fn.explain(params, x).sites[0].name))
        outputs[execution] = [
            [
                np.asarray(one).astype(np.float64)
                for one in program(init(params, x), params, x, grad)
            ]
            for params, x, grad in (normal, whole)
        ]
    pairs = [list(zip(*both)) for both in zip(*outputs.values())]
    exact = all(np.array_equal(*pair) and pair[0].any() for pair in pairs[1])
    return verdicts[0], exact, ", ".join(_decibels(*pair) for pair in pairs[0])


def _verdict(program, site: str) -> str:
    try:
        return report(program).verdict(site)
    except ValueError as error:  # a text that can't be read is no reason not to look at values
        return in_words(error)


def _decibels(got, wanted) -> str:
    error = np.square(got - wanted).sum()
    return f"{10 * np.log10(np.square(wanted).sum() / error):.0f}" if error else "equal"


# --------------------------------------------------------------------------------------------------
# times


def _timed(
    title: str,
    make: Callable[[], dict[str, Contender]],
    rounds: int,
    workers: int,
    calls_of: Callable,
    clock: Clock,
) -> Iterator[str]:
    """Rows of milliseconds, and of speeds relative to bfloat16 and to the bare FP8 product."""
    yield f"\n## {title}\n"
    rows = _first_ones_first(make())
    jobs = {name: functools.partial(calls_of, contender) for name, contender in rows.items()}
    found = dict(outcomes(jobs, clock.part(0.85), workers))
    calls = {name: one for name, one in found.items() if not isinstance(one, BaseException)}
    # One after the other, and each alone: a device that is out of memory for one has it for others.
    found |= outcomes(calls, clock, 1)
    calls = {
        name: call for name, call in calls.items() if not isinstance(found[name], BaseException)
    }
    timing = {"all": functools.partial(medians, calls, rounds, clock.part(0.8))}
    ((_, times),) = outcomes(timing, clock, 1)
    found |= dict.fromkeys(calls, times) if isinstance(times, BaseException) else times
    has_bare = BARE in rows
    yield (
        "| | ms | speed relative to bf16 |"
        + (" relative to the bare FP8 product |" if has_bare else "")
        + "\n|---|---|---|"
        + ("---|" if has_bare else "")
    )
    times = {name: one for name, one in found.items() if isinstance(one, float)}
    for name in rows:
        if name not in times:
            yield f"| {name} | {in_words(found[name])} | |" + (" |" if has_bare else "")
            continue
        cells = [f"{times[name] * 1e3:.3f}"]
        for base in (BF16, BARE) if has_bare else (BF16,):
            cells.append(f"{times[base] / times[name]:.2f}" if base in times else "")
        yield f"| {name} | {' | '.join(cells)} |"


def _first_ones_first(rows: dict[str, Any]) -> dict[str, Any]:
    """With what is most asked for in front, should the time not be enough for all."""
    first = (BARE, BF16, "delayed", "current", "rowwise", "Qwix", "Flax Fp8DirectDotGeneralOp")
    ranks = {name.removeprefix("fp8jax "): rank for rank, name in enumerate(first)}
    names = sorted(rows, key=lambda name: ranks.get(name.removeprefix("fp8jax "), len(ranks)))
    return {name: rows[name] for name in names}


def _compiled(function: Callable, *arguments: Any, donate: tuple[int, ...] = ()) -> Any:
    """`function` compiled for arguments or their shapes."""
    # Without Triton's GEMMs, whose choice is what compiling for a GPU takes long for.
    on_gpu = jax.devices()[0].platform == "gpu"
    options = {"xla_gpu_enable_triton_gemm": False} if on_gpu else {}
    lowered = jax.jit(function, donate_argnums=donate).lower(*arguments)
    return lowered.compile(compiler_options=options)


# Products of a millisecond, several for each wait.
_CALLS = 4


def _calls(contender: Contender) -> Callable[[], float]:
    """Calls of a product on one set of arguments; what it returns are the seconds of one."""
    key = jax.random.key(1)
    arguments = _compiled(contender.arguments, key)(key)
    program = _compiled(contender.function, *arguments)

    def seconds():
        before = time.perf_counter()
        jax.block_until_ready([program(*arguments) for _ in range(_CALLS)])
        return (time.perf_counter() - before) / _CALLS

    return seconds


def _steps(contender: Contender) -> Callable[[], float]:
    """The next training step; what it returns are its seconds."""
    key = jax.random.key(1)
    held = list(_compiled(contender.arguments, key)(key))
    program = _compiled(contender.function, *held, donate=(0, 1))

    def seconds():
        before = time.perf_counter()
        held[0], held[1], loss = program(*held)
        jax.block_until_ready(loss)
        return time.perf_counter() - before

    return seconds


def medians(
    calls: dict[str, Callable[[], float]], rounds: int, clock: Clock
) -> dict[str, float | Exception]:
    """The median seconds of each, called in turn, or what it raised; fewer rounds where the time
    ends, one at the least.
    """
    taken: dict[str, list[float]] = {name: [] for name in calls}
    failed: dict[str, Exception] = {}
    for round_ in range(rounds):
        if round_ and not clock.left:
            break
        for name, call in calls.items():
            if name in failed:
                continue
            try:
                taken[name].append(call())
            except Exception as error:
                failed[name] = error
    return {name: statistics.median(times) for name, times in taken.items() if times} | failed
