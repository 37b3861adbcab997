"""Compile for GPUs and TPUs on a machine that has none, and read what XLA made of a program.

XLA's compilers come with `pip install -e ".[aot]"`; they need a description of the target, not the
target. So what becomes of an FP8 product on an H200 is an ordinary test. Nothing compiled here can
run here.

    mesh = h200_mesh(8, data=8)
    compiled = compile_for(mesh, step, place(mesh, params), place(mesh, batch, "data"))
    gemms(compiled.as_text())               # Gemms(fp8=21, other=6)
"""

import math
import re
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import pytest
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from fp8jax.bench import targets
from fp8jax.hlo._products import products_in
from fp8jax.hlo._program import Leaf, Program

INSTALL = 'pip install -e ".[aot]"'

# XLA chooses between its own Triton GEMMs and cuBLASLt by timing them. Without a device it takes
# Triton's unseen, and a product inside a Triton kernel doesn't show its formats by name; cuBLASLt's
# calls do.
#
# XLA also merges products that share an operand into one, where they are small: under `current`
# scaling the codes of one activation are the same for the query, key and value projections. Off, so
# that calls can be counted per product.
#
# And nothing runs here, so the machine code need not be good: a fifth of the time saved.
H200_OPTIONS = {
    "xla_gpu_enable_triton_gemm": False,
    "xla_gpu_dot_merger_threshold_mb": 0,
    "xla_backend_optimization_level": 0,
}


class Gemms(NamedTuple):
    """Matrix products of a compiled program: calls in its text, those in a loop once."""

    fp8: int
    other: int


def h200_mesh(gpus: int = 1, **axes: int) -> Mesh:
    """A mesh of compile-only H200s on one host.

    Args:
      gpus: how many.
      axes: names and sizes of the mesh's axes; by default one axis "data".

    Raises:
      pytest.skip.Exception: where XLA's compiler for CUDA is not installed.
    """
    if not targets.has_compiler("H200"):
        pytest.skip(f"compiling for H200 needs jax[cuda13], no GPU: {INSTALL}")
    return _mesh(targets.topology("H200", gpus), axes)


def tpu_mesh(topology: str, **axes: int) -> Mesh:
    """A mesh of compile-only TPUs.

    Args:
      topology: generation and chips, as in "v6e:2x2" or "tpu7x:2x2x1".
      axes: names and sizes of the mesh's axes; by default one axis "data".

    Raises:
      pytest.skip.Exception: where XLA's compiler for TPUs is not installed.
    """
    if not targets.has_compiler(topology):
        pytest.skip(f"compiling for {topology} needs jax[tpu], no TPU: {INSTALL}")
    return _mesh(targets.topology(topology), axes)


def _mesh(topology: topologies.TopologyDescription, axes: dict[str, int]) -> Mesh:
    axes = axes or {"data": len(topology.devices)}
    return topologies.make_mesh(topology, tuple(axes.values()), tuple(axes))


def place(mesh: Mesh, tree: Any, *spec: str | None) -> Any:
    """The arrays of `tree`, or their `ShapeDtypeStruct`s, as `ShapeDtypeStruct`s on `mesh`, each
    sharded as `spec` says.
    """
    sharding = NamedSharding(mesh, PartitionSpec(*spec))
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree
    )


def compile_for(
    mesh: Mesh, function: Callable, *args: Any, **jit_options: Any
) -> jax.stages.Compiled:
    """`function` compiled for the devices of `mesh`; its arguments are those of `place`."""
    options = H200_OPTIONS if mesh.devices.flat[0].platform == "gpu" else {}
    return jax.jit(function, **jit_options).lower(*args).compile(compiler_options=options)


def gemms(text: str) -> Gemms:
    """The matrix products in a program compiled for GPUs, given as its text.

    An FP8 product is a call of cuBLASLt that is named so. Others are its other calls, cuDNN's,
    Triton's, and products that XLA wrote a loop for.
    """
    calls = re.findall(r'custom_call_target="(__cublas[^"]*|__cudnn[^"]*)"', text)
    fp8 = sum(call == "__cublas$lt$matmul$f8" for call in calls)
    loops = re.findall(r"= \S+ dot\(", text)
    return Gemms(fp8, len(calls) - fp8 + len(loops))


def collectives(text: str) -> Counter[tuple[str, str]]:
    """How many operands each kind of collective in a compiled program moves, by the kind and the
    operand's dtype.
    """
    found = Counter()
    kinds = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"
    for result, kind in re.findall(rf"= (\([^=]*?\)|\S+) ({kinds})(?:-start)?\(", text):
        found.update((kind, dtype) for dtype in re.findall(r"([a-z]+\d\w*)\[", result))
    return found


class Exchange(NamedTuple):
    """A collective of a compiled program.

    Args:
      kind: "all-gather" and the like.
      leaves: the arrays that each device has after it.
      runs: how often a run of the program comes by.
      op_name: the name stack of the equation that it comes from.
    """

    kind: str
    leaves: tuple[Leaf, ...]
    runs: int
    op_name: str

    @property
    def bytes(self) -> int:
        """What each device has after all runs."""
        return self.runs * sum(leaf.bytes for leaf in self.leaves)


KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")


def exchanges(text: str) -> list[Exchange]:
    """The collectives of a compiled program, given as its text; those in loops as often as they
    run.
    """
    found = []
    for kernel in Program.parse(text).kernels():
        kind, leaves = kernel.instruction.opcode.removesuffix("-start"), kernel.instruction.leaves
        if kind not in KINDS:
            continue
        if (
            kind == "all-gather" and kernel.instruction.opcode != kind
        ):  # begun, it has the operands beside the results
            leaves = leaves[len(leaves) // 2 :]
        found.append(Exchange(kind, leaves, kernel.runs, kernel.instruction.op_name))
    return found


def temporary_bytes(compiled: jax.stages.Compiled) -> int:
    """What one device needs beside the arguments and results."""
    return compiled.memory_analysis().temp_size_in_bytes


def decoded_arrays(text: str, at_least: int) -> list[str]:
    """The kernels of a compiled program that write a decoded copy of codes to memory, of as many
    elements or more.

    Those that multiply what they decode don't count: there, nothing wide is written but the
    product.
    """
    program = Program.parse(text)
    found = []
    for kernel in program.kernels():
        known = kernel.computation.instructions
        codes = {
            math.prod(leaf.shape)
            for name in kernel.instruction.operands
            for leaf in known[name].leaves
            if leaf.is_fp8 or leaf.dtype == "u8"
        }
        wide = {
            math.prod(leaf.shape)
            for leaf in kernel.instruction.leaves
            if leaf.dtype in ("f32", "bf16")
        }
        if any(size >= at_least for size in codes & wide) and not products_in(program, kernel):
            found.append(kernel.instruction.name)
    return found


def fp8_conversions(text: str) -> list[str]:
    """The instructions of a compiled program that convert to or from an 8-bit float format, other
    than by its bits.
    """
    fp8 = set(re.findall(r"(%\S+) = f8", text))
    converts = re.findall(r"(%\S+ = (\S+) convert\((%[^\s,)]+)\))", text)
    return [
        instruction
        for instruction, result, operand in converts
        if result.startswith("f8") or operand in fp8
    ]


def fp8_decodings(text: str) -> list[str]:
    """The instructions among these that convert from an 8-bit float format: a product's operands,
    read as another type. Casts of operands are conversions to one.
    """
    return [found for found in fp8_conversions(text) if not re.match(r"%\S+ = f8", found)]
