"""What tracing, lowering and compiling a model's gradients takes, beside the unquantized model.

    python -m fp8jax.bench compile_times                                  # for the CPU at hand
    python -m fp8jax.bench compile_times --devices CPU H200 "TPU 7x" --layers 12 24

Unrolled layers of width 512 with attention, six sites each, in bfloat16, and by recipes of ours,
without and with `scan_repeats`. CPU seconds of all threads, so that other work on the machine
changes them little. For devices other than "CPU" no device is needed.
"""

import argparse
import contextlib
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import fp8jax
from fp8jax.bench import targets
from fp8jax.bench.ahead import GPU_OPTIONS, Layers
from fp8jax.bench.contenders import recipes

CPU, BF16, SCANNED = "CPU", "bf16", "+scan_repeats"
HEADER = (
    "| | trace and lower | / bf16's | compile | all | / bf16's | temporaries, MiB |\n"
    "|---|---|---|---|---|---|---|"
)


class Times(NamedTuple):
    """CPU seconds, and the compiled program's memory beside arguments and results.

    Args:
      lowering: tracing, and lowering to StableHLO.
      compiling: all that XLA does.
      temporary_bytes: see there.
    """

    lowering: float
    compiling: float
    temporary_bytes: int

    @property
    def seconds(self) -> float:
        """Both."""
        return self.lowering + self.compiling


def measured(device: str, layers: int, contender: str, width: int = 512) -> Times:
    """The times of a model's gradients, with nothing of it in JAX's caches.

    Args:
      device: "CPU", or as `fp8jax.bench.targets.topology` takes it.
      layers: how many.
      contender: "bf16", or the name of a recipe, with "+scan_repeats" behind it or not.
      width: of the model.
    """
    model: Any = Layers(layers, width, attention=True, scanned=False)
    recipe = contender.removesuffix(SCANNED)
    if recipe != BF16:
        repeats = contender.endswith(SCANNED)
        model = fp8jax.linen.Fp8(model, recipes()[recipe], scan_repeats=repeats)

    def loss(variables, x):
        return jnp.square(model.apply(variables, x)).mean(dtype=jnp.float32)

    jax.clear_caches()
    x = jax.ShapeDtypeStruct((4, width // 2, width), jnp.bfloat16)
    with _traced_for(device) as place:
        arguments = place((jax.eval_shape(model.init, jax.random.key(0), x), x))
        start = time.process_time()
        lowered = jax.jit(jax.grad(loss)).lower(*arguments)
        between = time.process_time()
        options = GPU_OPTIONS if device in targets.GPUS else {}
        compiled: Any = lowered.compile(compiler_options=options)
        end = time.process_time()
    memory = compiled.memory_analysis().temp_size_in_bytes
    return Times(between - start, end - between, memory)


@contextlib.contextmanager
def _traced_for(device: str) -> Iterator[Any]:
    """Traces for a device; gives what puts shapes there."""
    if device == CPU:
        with jax.default_device(jax.devices("cpu")[0]):
            yield lambda tree: tree
        return
    mesh = Mesh(np.array(targets.topology(device).devices[:1]), ("x",))
    sharding = NamedSharding(mesh, PartitionSpec())
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        yield lambda tree: jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree
        )


def row_of(name: str, found: Times, base: Times) -> str:
    """A line of the table.

    >>> row_of("delayed", Times(2.0, 6.0, 2**20), Times(1.0, 3.0, 2**20))
    '| delayed | 2.0 | 2.0 | 6.0 | 8.0 | 2.0 | 1 |'
    """
    cells = (
        name,
        f"{found.lowering:.1f}",
        f"{found.lowering / base.lowering:.1f}",
        f"{found.compiling:.1f}",
        f"{found.seconds:.1f}",
        f"{found.seconds / base.seconds:.1f}",
        f"{found.temporary_bytes / 2**20:.0f}",
    )
    return f"| {' | '.join(cells)} |"


def options(arguments: list[str]) -> argparse.Namespace:
    """The command line's options."""
    parser = argparse.ArgumentParser(prog="python -m fp8jax.bench compile_times")
    parser.add_argument("--devices", nargs="+", default=[CPU])
    parser.add_argument("--layers", nargs="+", type=int, default=[12])
    names = [f"{name}{end}" for name in recipes() for end in ("", SCANNED)]
    chosen = [f"{name}{end}" for name in ("delayed", "current") for end in ("", SCANNED)]
    parser.add_argument("--contenders", nargs="+", choices=names, default=chosen)
    return parser.parse_args(arguments)


def main(devices: list[str], layers: list[int], contenders: list[str]) -> None:
    """Prints the tables."""
    missing = [name for name in devices if name != CPU and not targets.has_compiler(name)]
    if missing:
        print(f"no compiler for {', '.join(missing)}: {targets.INSTALL}")
    jax.config.update("jax_enable_compilation_cache", False)
    with jax.numpy_dtype_promotion("standard"):
        for device in (name for name in devices if name not in missing):
            # Imports and first uses are no part of it. One layer has nothing to scan.
            for name in dict.fromkeys((BF16, *(name.removesuffix(SCANNED) for name in contenders))):
                measured(device, 1, name, width=256)
            for count in layers:
                print(f"\n**{device}, {count} layers**\n\n{HEADER}")
                base = measured(device, count, BF16)
                print(row_of(BF16, base, base), flush=True)
                for name in contenders:
                    print(row_of(name, measured(device, count, name), base), flush=True)
