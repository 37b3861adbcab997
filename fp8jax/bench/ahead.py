"""Training steps compiled for devices that are not here, and what XLA says that they cost.

    python -m fp8jax.bench ahead                                 # writes fp8jax-ahead-DATE.md
    python -m fp8jax.bench ahead --devices "TPU 7x" --contenders bf16 delayed qwix
    python -m fp8jax.bench ahead --devices H200 --contenders blockwise blockwise-native

Nothing runs, so the figures are the same on any machine: on TPUs the cycles that XLA's own model of
the chip estimates; on GPUs launches and bytes, and the time of products and of bytes beside them at
the vendor's peak rates, which no program reaches. Two models, each in bfloat16, by recipes of ours
and by Qwix where it is installed:

- "large": two scanned layers of width 4096 without attention, 8192 tokens, SGD;
- "small": three unrolled layers of width 2048 with attention, 4096 tokens, AdamW.
"""

import argparse
import dataclasses
import datetime
import pathlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import fp8jax
from fp8jax._progress import progress_bar
from fp8jax.bench import contenders as others
from fp8jax.bench import targets
from fp8jax.bench.timing import optional
from fp8jax.hlo._products import products_in
from fp8jax.hlo._report import program_of

BF16: dict[str, Any] = {"dtype": jnp.bfloat16, "param_dtype": jnp.bfloat16}
HEAD = 128
# Without a device XLA can't choose between its own Triton GEMMs and cuBLASLt by timing them; and it
# merges small products that share an operand, which then can't be counted.
GPU_OPTIONS = {"xla_gpu_enable_triton_gemm": False, "xla_gpu_dot_merger_threshold_mb": 0}

# XLA estimates no cycles of kernels that it didn't write. These declare their operations and their
# bytes. A product's operations count at the rate of XLA's own estimate for a bfloat16 product of
# 4096 x 4096 x 4096 on a TPU 7x: 324,772 cycles (JAX 0.12). Others are the vector units', four for
# each element of a vector in a cycle, or move bytes at the rate of XLA's estimate for a bfloat16
# array of 8192 x 16384 that is doubled: 847,600 cycles. They take the longer of the two.
FLOPS_PER_CYCLE = 2 * 4096**3 / 324_772
VECTOR_FLOPS_PER_CYCLE = 4 * 1024
BYTES_PER_CYCLE = 2 * 2 * 8192 * 16384 / 847_600


class Block(nn.Module):
    """A Transformer layer; without attention, a gate stands in its place."""

    width: int
    attention: bool

    @nn.compact
    def __call__(self, x, _=None):
        """`x`, bfloat16 `[batch, tokens, width]`, after the layer; and None, for `nn.scan`."""
        heads = (*x.shape[:2], self.width // HEAD, HEAD)
        h = nn.LayerNorm(**BF16)(x)
        q, k, v = (self._dense(name, self.width)(h).reshape(heads) for name in "qkv")
        if self.attention:
            mixed = jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="xla")
        else:
            mixed = q * jax.nn.sigmoid(k) + v
        x = x + self._dense("o", self.width)(mixed.reshape(x.shape))
        h = self._dense("up", 4 * self.width)(nn.LayerNorm(**BF16)(x))
        return x + self._dense("down", self.width)(nn.gelu(h)), None

    @nn.nowrap
    def _dense(self, name: str, width: int) -> nn.Dense:
        return nn.Dense(width, use_bias=False, name=name, **BF16)


class Layers(nn.Module):
    """Layers one after the other, in a scan or unrolled."""

    layers: int
    width: int
    attention: bool
    scanned: bool

    @nn.compact
    def __call__(self, x):
        """`x`, bfloat16 `[batch, tokens, width]`, after all layers."""
        if self.scanned:
            stack = nn.scan(
                Block,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                length=self.layers,
            )
            return stack(self.width, self.attention)(x, None)[0]
        for index in range(self.layers):
            x, _ = Block(self.width, self.attention, name=f"layer{index}")(x)
        return x


@dataclasses.dataclass(frozen=True)
class Workload:
    """A model, the shape of what goes in, and its optimizer."""

    model: nn.Module
    shape: tuple[int, int, int]
    optimizer: optax.GradientTransformation


def all_workloads(scale: int = 1) -> dict[str, Workload]:
    """The two models by name; widths and tokens divided by `scale`, for trials."""
    large, small = 4096 // scale, 2048 // scale
    return {
        "large": Workload(
            Layers(2, large, attention=False, scanned=True),
            (4, 2048 // scale, large),
            optax.sgd(1e-3),
        ),
        "small": Workload(
            Layers(3, small, attention=True, scanned=False),
            (4, 1024 // scale, small),
            optax.adamw(1e-3),
        ),
    }


def recipes() -> dict[str, fp8jax.Recipe]:
    """All ready recipes, by name; and those with scales within their sums by a kernel or not at
    all, as "blockwise-native".
    """
    found = others.recipes()
    native = {name: found[name] for name in ("blockwise", "mxfp8")}
    return found | {
        f"{name}-native": dataclasses.replace(recipe, execution="native")
        for name, recipe in native.items()
    }


class Cost(NamedTuple):
    """What XLA says of a compiled step.

    Args:
      product_cycles, other_cycles: estimated; of kernels that multiply matrices, and of all others;
        None where the program has no estimates.
      launches: of kernels that multiply no matrices.
      bytes: what these read and write.
      fp8_products, products: how many products multiply FP8 codes, of how many.
      temporary_bytes: memory beside arguments and results.
    """

    product_cycles: int | None
    other_cycles: int | None
    launches: int
    bytes: int
    fp8_products: int
    products: int
    temporary_bytes: int

    @property
    def cycles(self) -> int | None:
        """All estimated cycles."""
        if self.product_cycles is None or self.other_cycles is None:
            return None
        return self.product_cycles + self.other_cycles


def cost_of(compiled: Any) -> Cost:
    """The cost of a `jax.stages.Compiled`; what is in a loop counts as often as it runs.

    >>> cost = cost_of(jax.jit(lambda x: jnp.tanh(x @ x)).lower(jnp.ones((8, 8))).compile())
    >>> cost.fp8_products, cost.products, cost.cycles
    (0, 1, None)
    """
    program = program_of(compiled)
    cycles, fp8, products, launches, moved = {True: [], False: []}, 0, 0, 0, 0
    for kernel in program.kernels():
        found = products_in(program, kernel)
        if kernel.cycles is not None:
            cycles[bool(found)].append(kernel.cycles)
        elif (declared := program.declared(kernel)) is not None:
            cycles[bool(found)].append(_declared_cycles(*declared, bool(found)))
        products += kernel.runs * len(found)
        fp8 += kernel.runs * sum(product.in_fp8 for product in found)
        if not found:
            launches += kernel.runs
            moved += kernel.runs * (program.bytes_read(kernel) + program.bytes_written(kernel))
    estimated = any(cycles.values())
    of_products, of_others = (sum(cycles[which]) if estimated else None for which in (True, False))
    memory = compiled.memory_analysis().temp_size_in_bytes
    return Cost(of_products, of_others, launches, moved, fp8, products, memory)


def _declared_cycles(flops: int, moved: int, is_product: bool) -> int:
    rate = FLOPS_PER_CYCLE if is_product else VECTOR_FLOPS_PER_CYCLE
    return round(flops / rate if is_product else max(flops / rate, moved / BYTES_PER_CYCLE))


def compile_step(device: str, workload: Workload, contender: str) -> Any:
    """A training step compiled for a device that is not here.

    Args:
      device: as `fp8jax.bench.targets.topology` takes it.
      workload: what is trained.
      contender: "bf16", "qwix", or the name of a recipe.
    """
    topology = targets.topology(device)
    # One device: what all do alike would only be copied, and XLA divides no kernel of Pallas.
    mesh = Mesh(np.array(topology.devices[:1]), ("x",))
    sharding = NamedSharding(mesh, PartitionSpec())
    model, optimizer = _prepared(workload, contender)
    x = jax.ShapeDtypeStruct(workload.shape, jnp.bfloat16)
    # Nothing that is here says what the program is traced for.
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        variables = jax.eval_shape(model.init, jax.random.key(0), x)
        state = jax.eval_shape(optimizer.init, variables)

    def step(variables, state, x):
        def loss(variables):
            out: Any = model.apply(variables, x)
            return jnp.square(out).mean(dtype=jnp.float32)

        updates, state = optimizer.update(jax.grad(loss)(variables), state, variables)
        return optax.apply_updates(variables, updates), state

    placed = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        (variables, state, x),
    )
    options = GPU_OPTIONS if device in targets.GPUS else {}
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        lowered = jax.jit(step, donate_argnums=(0, 1)).lower(*placed)
    return lowered.compile(compiler_options=options)


def _prepared(workload: Workload, contender: str) -> tuple[nn.Module, Any]:
    """The model and the optimizer as a contender has them."""
    if contender == "bf16":
        return workload.model, workload.optimizer
    if contender == "qwix":
        qwix = optional("qwix")
        rule = qwix.QtRule(
            module_path=".*",
            weight_qtype=jnp.float8_e4m3fn,
            act_qtype=jnp.float8_e4m3fn,
            bwd_qtype=jnp.float8_e5m2,
        )
        return qwix.quantize_model(workload.model, qwix.QtProvider([rule])), workload.optimizer
    recipe, optimizer = recipes()[contender], workload.optimizer
    if any(recipe.delayed_casts):
        optimizer = fp8jax.with_delayed_scaling(optimizer)
    return fp8jax.linen.Fp8(workload.model, recipe), optimizer


def forward_flops(workload: Workload) -> int:
    """Floating-point operations of the model's products, forward."""
    model = fp8jax.linen.Fp8(workload.model, fp8jax.recipes.current())
    x = jax.ShapeDtypeStruct(workload.shape, jnp.bfloat16)
    return model.explain(jax.eval_shape(model.init, jax.random.key(0), x), x).flops


def times_of(device: str, flops: int, cost: Cost) -> tuple[float, float] | None:
    """Of products and of all else: cycles on TPUs; on GPUs seconds at the vendor's peak rates. None
    where neither is known, as where products are of two kinds.

    >>> times_of("H200", 10**12, Cost(None, None, 9, 10**9, 12, 12, 0))
    (0.001515..., 0.000208...)
    """
    if cost.product_cycles is not None and cost.other_cycles is not None:
        return cost.product_cycles, cost.other_cycles
    peak = targets.PEAKS.get(device)
    if peak is None or cost.fp8_products not in (0, cost.products):
        return None
    rate = peak.fp8 if cost.fp8_products else peak.bfloat16
    # Each gradient is as much again as the forward product.
    return 3 * flops / rate, cost.bytes / peak.memory


def _row(name: str, times: tuple[float, float] | None, base: float, cost: Cost) -> str:
    unit, sign = (1e6, "M") if cost.cycles is not None else (1e-3, "ms")
    measured = ["", "", ""]
    if times is not None and base:
        measured = [f"{sum(times) / base:.3f}", *(f"{one / unit:.1f} {sign}" for one in times)]
    cells = [
        name,
        *measured,
        f"{cost.launches}",
        f"{cost.bytes / 1e9:.1f}",
        f"{cost.fp8_products} of {cost.products}",
        f"{cost.temporary_bytes / 2**30:.2f}",
    ]
    return f"| {' | '.join(cells)} |"


HEADER = (
    "| | time / bf16's | of products | of all else | launches | GB beside products | "
    "products in FP8 | temporaries, GiB |\n|---|---|---|---|---|---|---|---|"
)


def options(arguments: list[str]) -> argparse.Namespace:
    """The command line's options."""
    parser = argparse.ArgumentParser(prog="python -m fp8jax.bench ahead")
    names = ["bf16", *others.recipes(), "qwix"]
    parser.add_argument("--devices", nargs="+", default=[*targets.TPUS, *targets.GPUS])
    named = [*names, *(name for name in recipes() if name not in names)]
    parser.add_argument("--contenders", nargs="+", choices=named, default=names)
    parser.add_argument("--workloads", nargs="+", choices=list(all_workloads()), default=None)
    parser.add_argument("--scale", type=int, default=1, help="divides widths and tokens")
    parser.add_argument("--out", type=pathlib.Path, default=None, help="the table's file")
    parser.add_argument("--no-progress", dest="progress", action="store_false", help="show no bar")
    return parser.parse_args(arguments)


def main(
    devices: list[str],
    contenders: list[str],
    workloads: list[str] | None,
    scale: int,
    out: pathlib.Path | None,
    progress: bool = True,
) -> None:
    """Compiles all, prints the tables as they come, and writes them to a file with the date."""
    chosen = {
        name: work
        for name, work in all_workloads(scale).items()
        if not workloads or name in workloads
    }
    missing = [device for device in devices if not targets.has_compiler(device)]
    if missing:
        print(f"no compiler for {', '.join(missing)}: {targets.INSTALL}")
    devices = [device for device in devices if device not in missing]
    if "qwix" in contenders and not optional("qwix"):
        print("qwix is not installed: pip install 'fp8jax[bench]'")
        contenders = [name for name in contenders if name != "qwix"]
    contenders = ["bf16", *(name for name in contenders if name != "bf16")]
    with jax.numpy_dtype_promotion("standard"):
        lines = list(_tables(devices, contenders, chosen, progress))
    path = out or pathlib.Path(f"fp8jax-ahead-{datetime.date.today()}.md")
    path.write_text("\n".join(lines) + "\n")
    print(f"written to {path}")


def _tables(
    devices: list[str], contenders: list[str], chosen: dict[str, Workload], progress: bool
) -> Iterator[str]:
    """The lines of the tables, printed too."""

    def say(line: str) -> str:
        print(line, flush=True)
        return line

    total = len(devices) * len(chosen) * len(contenders)
    with progress_bar(progress, "compiling", total) as advance:
        yield say(f"JAX {jax.__version__}, {datetime.date.today()}, compiled without a device.")
        for device in devices:
            for name, workload in chosen.items():
                yield say(f"\n**{device}, {name}**\n\n{HEADER}")
                base, flops = 0.0, forward_flops(workload)
                for contender in contenders:
                    cost = cost_of(compile_step(device, workload, contender))
                    times = times_of(device, flops, cost)
                    base = base or sum(times or ())
                    yield say(_row(contender, times, base, cost))
                    advance(1)
