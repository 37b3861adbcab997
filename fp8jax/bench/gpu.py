"""FP8 on a GPU against bfloat16 and the peers: products with their casts, and a Transformer block's
training step.

    python -m fp8jax.bench gpu    # on one Hopper GPU or newer; writes fp8jax-gpu-DATE.md
    python -m fp8jax.bench gpu --any-device --sizes 64 --widths 128 --tokens 64

Each row of a table is timed in turn with the others of it, on data larger than the GPU's cache.
"""

import argparse
import datetime
import functools
import importlib
import math
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax.linen import fp8_ops

import fp8jax
from fp8jax.bench.step import step_of
from fp8jax.bench.timing import interleaved_medians, print_table

# More than the second-level cache of any GPU of today, several times.
COLD_BYTES = 256 * 2**20
HEAD = 128
BF16, BARE = "bf16", "bare FP8 product, codes given"


class Contender(NamedTuple):
    """One row.

    Args:
      function: what is timed.
      arguments: makes its arguments from a random key; under `jax.eval_shape`, their shapes.
    """

    function: Callable
    arguments: Callable[[jax.Array], tuple]


class Variant(NamedTuple):
    """A module in one precision.

    Args:
      module: the module.
      overwritten: a collection whose "gradient" is its next value; None where there is none.
    """

    module: nn.Module
    overwritten: str | None = None


def recipes() -> dict[str, fp8jax.Recipe]:
    """All ready recipes, by name."""
    made = {name: getattr(fp8jax.recipes, name) for name in sorted(vars(fp8jax.recipes))}
    return {
        name: make()
        for name, make in made.items()
        if getattr(make, "__module__", "") == fp8jax.recipes.__name__ and not name.startswith("_")
    }


def variants(make: Callable[..., nn.Module]) -> dict[str, Variant]:
    """A module in bfloat16, by each recipe, and by each peer that is installed; `make` takes a
    `dot_general_cls`.
    """
    found = {BF16: Variant(make(None))}
    found |= {
        f"fp8jax {name}": Variant(fp8jax.linen.Fp8(make(None), recipe))
        for name, recipe in recipes().items()
    }
    found["Flax Fp8DirectDotGeneralOp"] = Variant(
        make(fp8_ops.Fp8DirectDotGeneralOp), "_overwrite_with_gradient"
    )
    if qwix := _optional("qwix"):
        rule = qwix.QtRule(
            weight_qtype="float8_e4m3fn", act_qtype="float8_e4m3fn", bwd_qtype="float8_e5m2"
        )
        found["Qwix"] = Variant(qwix.quantize_model(make(None), qwix.QtProvider([rule])))
    return found


def products(size: int) -> tuple[dict[str, Contender], dict[str, Contender]]:
    """A square product with its casts: forward, and forward with both gradients."""
    forward, both = {}, {}

    def dense(dot_general_cls):
        return nn.Dense(
            size,
            use_bias=False,
            dtype=jnp.bfloat16,
            param_dtype=jnp.bfloat16,
            dot_general_cls=dot_general_cls,
        )

    def arguments(module, key):
        keys = jax.random.split(key, 3)
        x, grad = (jax.random.normal(one, (size, size), jnp.bfloat16) for one in keys[:2])
        return module.init(keys[2], x), x, grad

    for name, (module, _) in variants(dense).items():
        make = functools.partial(arguments, module)
        forward[name] = Contender(
            functools.partial(_forward, module), lambda key, make=make: make(key)[:2]
        )
        both[name] = Contender(functools.partial(_forward_and_gradients, module), make)
    codes = functools.partial(_codes, size)
    forward[BARE] = Contender(_multiply_codes, codes)
    return forward, both


def _forward(module, variables, x):
    return module.apply(variables, x)


def _forward_and_gradients(module, variables, x, grad):
    def weighted(variables, x):
        out = module.apply(variables, x)
        return (out * grad).sum(dtype=jnp.float32), out

    return jax.grad(weighted, argnums=(0, 1), has_aux=True, allow_int=True)(variables, x)


def _codes(size: int, key: jax.Array) -> tuple[jax.Array, jax.Array]:
    lhs, rhs = (
        fp8jax.encode(jax.random.normal(one, (size, size), jnp.bfloat16), "E4M3")
        for one in jax.random.split(key)
    )
    return lhs, rhs


def _multiply_codes(lhs, rhs):
    # Both contract their last axes: the one layout that the hardware takes as it is.
    return jax.lax.dot_general(
        lhs, rhs, (((1,), (1,)), ((), ())), preferred_element_type=jnp.bfloat16
    )


class Block(nn.Module):
    """A Transformer's block in bfloat16: attention and an MLP of four times the width, without
    biases.
    """

    width: int
    dot_general_cls: Callable | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        def dense(features, name):
            return nn.Dense(
                features,
                use_bias=False,
                dtype=jnp.bfloat16,
                name=name,
                dot_general_cls=self.dot_general_cls,
            )

        h = nn.LayerNorm(dtype=jnp.bfloat16)(x)
        heads = (*h.shape[:-1], max(self.width // HEAD, 1), min(HEAD, self.width))
        query, key, value = (
            dense(self.width, name)(h).reshape(heads) for name in ("query", "key", "value")
        )
        attended = jax.nn.dot_product_attention(query, key, value, is_causal=True)
        x = x + dense(self.width, "out")(attended.reshape(h.shape))
        h = dense(4 * self.width, "up")(nn.LayerNorm(dtype=jnp.bfloat16)(x))
        return x + dense(self.width, "down")(nn.gelu(h))


def blocks(width: int, tokens: int, sequence: int = 2048) -> dict[str, Contender]:
    """The training step of one block, with Adam on float32 parameters."""
    sequence = min(sequence, tokens)
    shape = (tokens // sequence, sequence, width)
    adam, found = optax.adam(1e-4), {}

    def weighted_mean(out, weights):
        return (out * weights).mean(dtype=jnp.float32)

    def arguments(module, tx, overwritten, key):
        keys = jax.random.split(key, 3)
        x, weights = (jax.random.normal(one, shape, jnp.bfloat16) for one in keys[:2])
        variables = module.init(keys[2], x)
        return (
            variables,
            tx.init({"params": variables["params"]} if overwritten else variables),
            x,
            weights,
        )

    def block(dot_general_cls):
        return Block(width, dot_general_cls)

    for name, (module, overwritten) in variants(block).items():
        tx = (
            fp8jax.with_delayed_scaling(adam)
            if isinstance(module, fp8jax.linen.Fp8) and _has_state(module.recipe)
            else adam
        )
        found[name] = Contender(
            step_of(module, tx, overwritten, weighted_mean),
            functools.partial(arguments, module, tx, overwritten),
        )
    return found


def _has_state(recipe: fp8jax.Recipe) -> bool:
    return any(recipe.delayed_casts)


def copies_of(contender: Contender) -> int:
    """How many sets of arguments together are larger than any cache."""
    leaves = jax.tree.leaves(jax.eval_shape(contender.arguments, jax.random.key(0)))
    return max(
        2, min(16, math.ceil(COLD_BYTES / sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)))
    )


def cold_calls(contender: Contender) -> tuple[Callable[[], Any], int]:
    """A call of the function on each of several sets of arguments, in one program, so that none is
    in the cache still and the launch of the program counts little; and how many they are.
    """
    copies = copies_of(contender)
    sets = [
        jax.jit(contender.arguments)(key) for key in jax.random.split(jax.random.key(1), copies)
    ]
    program = jax.jit(lambda sets: [contender.function(*arguments) for arguments in sets])
    return lambda: program(sets), copies


def steps(contender: Contender) -> Callable[[], jax.Array]:
    """A call that does one training step more and returns the loss."""
    held = list(jax.jit(contender.arguments)(jax.random.key(1)))

    def once():
        held[0], held[1], loss = contender.function(*held)
        return loss

    return once


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
    torch = _optional("torch")
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
        "--sizes", type=numbers, default=[2048, 4096, 8192, 16384], help="of the square products"
    )
    parser.add_argument(
        "--widths", type=numbers, default=[4096, 8192], help="of the Transformer block"
    )
    parser.add_argument("--tokens", type=int, default=8192, help="batch times sequence")
    parser.add_argument("--rounds", type=int, default=20, help="calls of each contender")
    parser.add_argument(
        "--any-device", action="store_true", help="run where there is no GPU, to try it out"
    )
    parser.add_argument(
        "--out", type=pathlib.Path, default=pathlib.Path(f"fp8jax-gpu-{datetime.date.today()}.md")
    )
    return parser.parse_args(arguments)


def main(
    sizes: list[int],
    widths: list[int],
    tokens: int,
    rounds: int,
    any_device: bool,
    out: pathlib.Path,
) -> None:
    """Times everything, prints the tables, and writes them to `out`."""
    check_device(any_device)
    for name in ("qwix", "torch"):
        if not _optional(name):
            print(f"{name} is not installed, and left out")
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


def markdown(tables: dict[str, dict[str, float]]) -> str:
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


def _optional(name: str) -> Any:
    """A module of the `bench` extra, or None."""
    try:
        return importlib.import_module(name)
    except ImportError:
        return None
