"""FP8 on a GPU against bfloat16 and the peers: products with their casts, and a Transformer block's
training step.

    python -m fp8jax.bench gpu    # on one Hopper GPU or newer; writes fp8jax-gpu-DATE.md
    python -m fp8jax.bench gpu --quick    # the bits too, all in six minutes
    python -m fp8jax.bench gpu --any-device --sizes 64 --widths 128 --tokens 64

Each row of a table is timed in turn with the others of it, on data larger than the GPU's cache.
"""

import argparse
import datetime
import math
import pathlib
from collections.abc import Callable, Mapping

import jax

from fp8jax.bench import quick as quick_run
from fp8jax.bench.contenders import (
    BARE,
    BF16,
    COLD_BYTES,
    Contender,
    blocks,
    cold_calls,
    products,
    steps,
)
from fp8jax.bench.timing import interleaved_medians, optional, print_table


def seconds_of_products(
    contenders: dict[str, Contender], size: int, rounds: int
) -> dict[str, float]:
    """Median seconds of one product."""
    calls, copies = {}, {}
    for name, contender in contenders.items():
        calls[name], copies[name] = cold_calls(contender)
    if torch_call := torch_product(size):
        calls["torch _scaled_mm, codes given"], copies["torch _scaled_mm, codes given"] = torch_call
    return {
        name: seconds / copies[name] for name, seconds in interleaved_medians(calls, rounds).items()
    }


def torch_product(size: int) -> tuple[Callable[[], None], int] | None:
    """The same bare product through PyTorch, several at a call; None where PyTorch, or a GPU for
    it, is not there.
    """
    torch = optional("torch")
    if torch is None or not torch.cuda.is_available() or not hasattr(torch, "_scaled_mm"):
        return None
    copies = max(2, min(16, math.ceil(COLD_BYTES / (2 * size * size))))

    def codes():
        return torch.randn(size, size, device="cuda", dtype=torch.bfloat16).to(torch.float8_e4m3fn)

    sets, one = [(codes(), codes()) for _ in range(copies)], torch.ones((), device="cuda")

    def call():
        for lhs, rhs in sets:
            torch._scaled_mm(lhs, rhs.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16)
        torch.cuda.synchronize()

    return call, copies


def options(arguments: list[str]) -> argparse.Namespace:
    """The command line's options, as arguments of `main`."""

    def numbers(text):
        return [int(number) for number in text.split(",") if number]

    parser = argparse.ArgumentParser(prog="python -m fp8jax.bench gpu")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="in six minutes: whether casts and products have the right bits, and a product's and "
        "a step's times",
    )
    parser.add_argument("--sizes", type=numbers, default=None, help="of the square products")
    parser.add_argument("--widths", type=numbers, default=None, help="of the Transformer block")
    parser.add_argument("--tokens", type=int, default=8192, help="batch times sequence")
    parser.add_argument("--rounds", type=int, default=20, help="calls of each contender")
    parser.add_argument(
        "--budget", type=float, default=300.0, help="seconds that --quick has once JAX has started"
    )
    parser.add_argument(
        "--patterns", type=int, default=2**32, help="how many float32 --quick casts, at most 2**32"
    )
    parser.add_argument(
        "--any-device", action="store_true", help="run where there is no GPU, to try it out"
    )
    parser.add_argument(
        "--out", type=pathlib.Path, default=pathlib.Path(f"fp8jax-gpu-{datetime.date.today()}.md")
    )
    parsed = parser.parse_args(arguments)
    parsed.sizes = parsed.sizes or ([8192] if parsed.quick else [2048, 4096, 8192, 16384])
    parsed.widths = parsed.widths or ([4096] if parsed.quick else [4096, 8192])
    if not 0 < parsed.patterns <= 2**32:
        parser.error(f"--patterns must be within 1 and 2**32; got {parsed.patterns}")
    return parsed


def main(
    quick: bool,
    sizes: list[int],
    widths: list[int],
    tokens: int,
    rounds: int,
    budget: float,
    patterns: int,
    any_device: bool,
    out: pathlib.Path,
) -> None:
    """Times everything, prints the tables, and writes them to `out`.

    Raises:
      SystemExit: where there is no GPU for it; of a quick run, where the bits did not hold.
    """
    check_device(any_device)
    for name in ("qwix",) if quick else ("qwix", "torch"):
        if not optional(name):
            print(f"{name} is not installed, and left out")
    if quick:
        return quick_run.run(sizes, widths, tokens, rounds, budget, patterns, out)
    tables = {}
    for size in sizes:
        for title, contenders in zip(("forward", "forward and both gradients"), products(size)):
            medians = seconds_of_products(contenders, size, rounds)
            tables[f"{size} x {size} x {size}, {title}"] = medians
            print_table(f"{size} x {size} x {size}, {title}", BF16, medians)
    for width in widths:
        calls = {name: steps(contender) for name, contender in blocks(width, tokens).items()}
        title = f"Training step of a Transformer block, width {width}, {tokens} tokens"
        tables[title] = interleaved_medians(calls, rounds)
        print_table(title, BF16, tables[title])
        del calls  # and with them the parameters
    out.write_text(markdown(tables))
    print(f"written to {out}")


def check_device(any_device: bool) -> None:
    """Raises SystemExit where the first device multiplies no FP8, unless that is asked for."""
    device = jax.devices()[0]
    if any_device:
        return
    if device.platform != "gpu":
        raise SystemExit(
            f"bench gpu needs a GPU; got {device.device_kind!r}. Run it where one is, with "
            "jax[cuda13]; or try it "
            "out with --any-device and small --sizes and --widths."
        )
    if float(getattr(device, "compute_capability", 9)) < 8.9:
        raise SystemExit(
            "bench gpu needs a GPU that multiplies FP8, of compute capability 8.9 or above; got "
            f"{device.device_kind!r} "
            f"with {device.compute_capability}. Use a Hopper or Ada GPU, or pass --any-device."
        )


def markdown(tables: Mapping[str, Mapping[str, float]]) -> str:
    """The dated tables: milliseconds, how often as fast as bfloat16, and as the bare FP8 product
    where there is one.
    """
    lines = [
        f"# FP8 on {jax.devices()[0].device_kind}, {datetime.date.today()}",
        "",
        f"`python -m fp8jax.bench gpu`, JAX {jax.__version__}. Interleaved medians of synchronized "
        "calls; speeds are ratios in the "
        "same run.",
        "",
    ]
    for title, medians in tables.items():
        bare = medians.get(BARE)
        lines += [
            f"## {title}",
            "",
            "| | ms | speed relative to bf16 |"
            + (" relative to the bare FP8 product |" if bare else ""),
            "|---|---|---|" + ("---|" if bare else ""),
        ]
        for name, seconds in medians.items():
            row = f"| {name} | {seconds * 1e3:.3f} | {medians[BF16] / seconds:.2f} |"
            lines.append(row + (f" {bare / seconds:.2f} |" if bare else ""))
        lines.append("")
    return "\n".join(lines)
