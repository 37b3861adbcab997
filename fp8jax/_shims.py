"""What differs between JAX versions in the jaxprs that the transform reads, in this one file."""

import math
import os
from collections.abc import Sequence
from typing import Any

import jax
import jax.export
from jax.core import AbstractValue
from jax.extend import core

# Whether the rules of `custom_jvp` and `custom_vjp` functions inside a scan survive the first of
# two derivatives.
KEEPS_RULES = jax.__version_info__ >= (0, 12)
# Whether `jax.experimental.pallas.mosaic_gpu` is as fp8jax's kernels are written for.
HAS_GPU_KERNELS = jax.__version_info__ >= (0, 12)


def open_jaxpr(jaxpr: Any) -> tuple[Any, tuple]:
    """A closed or an open jaxpr as `(open jaxpr, constants)`; from JAX 0.11 on, there is one class
    for both.
    """
    return getattr(jaxpr, "jaxpr", jaxpr), tuple(getattr(jaxpr, "consts", ()))


def current_trace() -> Any:
    """What tells one trace from another: equal while values of the one may be used in the other."""
    return core.get_opaque_trace_state(convention="flax")


def bind(equation: Any, operands: Sequence[Any]) -> list[Any]:
    """The outputs of an equation as it is, on other operands."""
    outputs = equation.primitive.bind(
        *operands, **equation.primitive.get_bind_params(equation.params)
    )
    return list(outputs) if equation.primitive.multiple_results else [outputs]


def scan_counts(params: dict) -> tuple[int, int]:
    """The numbers of constants and of carries among a scan's operands."""
    if "num_consts" in params:
        return params["num_consts"], params["num_carry"]
    constants, carry, _ = params["ft_in"].unpack()
    return len(list(constants.vals)), len(list(carry.vals))


def varying_axes(value: Any) -> frozenset[str]:
    """The manual mesh axes over which a value, or the value of an abstract one, differs."""
    aval: Any = value if isinstance(value, AbstractValue) else jax.typeof(value)
    return frozenset(aval.vma if hasattr(aval, "vma") else aval.manual_axis_type.varying)


def source_of(equation: Any) -> str:
    """The line that an equation comes from, as "file.py:12": the innermost that is of no installed
    package; or "".
    """
    here = os.path.dirname(__file__) + os.sep
    for frame in getattr(equation.source_info.traceback, "frames", ()):
        installed = "-packages" + os.sep in frame.file_name or frame.file_name.startswith(
            (here, "<")
        )
        if not installed:
            return f"{os.path.basename(frame.file_name)}:{frame.line_num}"
    return ""


def reduced_axes(aval: Any) -> frozenset[str]:
    """The explicit mesh axes over which an abstract value is typed as reduced, or as still to be
    reduced.
    """
    spec = getattr(getattr(aval, "sharding", None), "spec", None)
    return frozenset(getattr(spec, "reduced", ())) | frozenset(getattr(spec, "unreduced", ()))


def is_explicit(array: jax.Array) -> bool:
    """Whether any mesh axis is; others may be manual, inside of a shard_map, or automatic."""
    return jax.sharding.AxisType.Explicit in jax.typeof(array).sharding.mesh.axis_types


def automatic_devices() -> int:
    """The number of devices of the mesh at hand (`jax.set_mesh`) along its axes whose shardings XLA
    finds; 1 without one.
    """
    explicit = jax.sharding.AxisType.Explicit in jax.sharding.get_abstract_mesh().axis_types
    return 1 if explicit else devices_at_hand()


def devices_at_hand() -> int:
    """The number of devices of the mesh at hand (`jax.set_mesh`) that arrays are divided over; 1
    without one.

    Inside of a shard_map, along the axes that it leaves as they were.
    """
    mesh = jax.sharding.get_abstract_mesh()
    return math.prod(
        mesh.shape[name]
        for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True)
        if kind != jax.sharding.AxisType.Manual
    )


def manual_axes(params: dict) -> frozenset[str]:
    """The mesh axes that a shard_map makes manual."""
    return frozenset(
        params["newly_manual_axes"] if "newly_manual_axes" in params else params["manual_axes"]
    )


def jit_options(params: dict, operands: Sequence[Any]) -> dict[str, Any]:
    """The options with which `jax.jit` makes again what an equation of it says.

    For a function that takes one more argument first, and returns the old outputs as a list and
    something more beside. Operands that are trees of several arrays have their own shardings.
    """
    options = {"keep_unused": params["keep_unused"], "inline": params["inline"]}
    if params["compiler_options_kvs"]:
        options["compiler_options"] = dict(params["compiler_options_kvs"])
    in_shardings = [
        _public_sharding(sharding) if jax.tree_util.all_leaves([operand]) else None
        for sharding, operand in zip(params["in_shardings"], operands, strict=True)
    ]
    out_shardings = [_public_sharding(sharding) for sharding in params["out_shardings"]]
    if any(sharding is not None for sharding in in_shardings):
        options["in_shardings"] = (None, *in_shardings)
    if any(sharding is not None for sharding in out_shardings):
        options["out_shardings"] = (out_shardings, None)
    return options


def _public_sharding(sharding: Any) -> jax.sharding.Sharding | None:
    """None where JAX leaves a sharding open."""
    return sharding if isinstance(sharding, jax.sharding.Sharding) else None


def jaxprs_in(params: dict) -> list[Any]:
    """All jaxprs among an equation's parameters, closed or open."""
    values = (
        item
        for value in params.values()
        for item in (value if isinstance(value, (tuple, list)) else (value,))
    )
    return [value for value in values if hasattr(value, "eqns") or hasattr(value, "jaxpr")]


def has_symbolic(shape: Sequence[Any]) -> bool:
    """Whether `jax.export` leaves some of a shape's extents open."""
    return any(map(jax.export.is_symbolic_dim, shape))


def least_size(shape: Sequence[Any]) -> int:
    """The product of extents, those left open counted as 1."""
    return math.prod(1 if jax.export.is_symbolic_dim(extent) else extent for extent in shape)


def is_variable(atom: Any) -> bool:
    """Whether an operand of an equation is a variable, and not a literal."""
    return not isinstance(atom, core.Literal)
