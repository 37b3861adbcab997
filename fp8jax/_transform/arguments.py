"""The arguments of a call: what is traced, what is static, and which leaves are weights."""

import dataclasses
import functools
import inspect
import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from fp8jax._params import named_leaves
from fp8jax._tensor import Fp8Tensor
from fp8jax._transform.names import ROOT, Weight


@dataclasses.dataclass(frozen=True)
class Static:
    """The part of a call's arguments that is not arrays; hashable."""

    tree: Any
    # Position, kind, value: 2 and 2.0 are equal and hash alike, and are not the same argument.
    leaves: tuple[tuple[int, Hashable, Any], ...]


def is_coded(leaf: Any) -> bool:
    """Whether a leaf is a weight held as FP8 codes."""
    return isinstance(leaf, Fp8Tensor)


def held_as(leaf: Any) -> Hashable:
    """How a weight is held as FP8 codes, its values aside; None for other leaves."""
    if not is_coded(leaf):
        return None
    return leaf.format, leaf.scaling, jnp.shape(leaf.scale), jnp.dtype(leaf.dtype)


def is_array(leaf: Any) -> bool:
    """Whether a leaf is an array, or the shape of one, or a weight held as FP8 codes."""
    return (
        is_coded(leaf)
        or hasattr(leaf, "shape")
        and hasattr(leaf, "dtype")
        and not isinstance(leaf, type)
    )


def take_apart(
    function: Any, args: tuple, kwargs: dict, weights: Sequence[int]
) -> tuple[Static, list[jax.Array | Fp8Tensor]]:
    """The arguments of `function`, as what is static and the arrays in the order of flattening.

    The `Fp8Tensor`s of the positional arguments `weights` are arrays, whole; elsewhere they are the
    trees that they are.

    Raises:
      TypeError: where a leaf is neither an array nor hashable.
    """
    parts = [
        jax.tree.flatten(arg, is_leaf=is_coded if position in weights else None)
        for position, arg in enumerate(args)
    ]
    parts.append(jax.tree.flatten(kwargs))
    leaves = [leaf for part, _ in parts for leaf in part]
    *of_args, of_kwargs = (tree for _, tree in parts)
    tree = jax.tree_util.treedef_tuple((jax.tree_util.treedef_tuple(of_args), of_kwargs))
    arrays = [leaf for leaf in leaves if is_array(leaf)]
    static = Static(
        tree,
        tuple(
            (index, _kind(leaf), leaf) for index, leaf in enumerate(leaves) if not is_array(leaf)
        ),
    )
    try:
        hash(static)
    except TypeError as error:
        kinds = sorted({type(leaf).__name__ for _, _, leaf in static.leaves})
        raise TypeError(
            f"arguments of {function!r} that are not arrays are static and must be hashable; got "
            f"{kinds} "
            f"({error}). Pass arrays, or hashable values."
        ) from None
    return static, arrays


def _kind(leaf: Any) -> Hashable:
    """What tells a static leaf from another one that is equal, as 0.0 and -0.0 are."""
    return type(leaf), repr(leaf) if isinstance(leaf, (float, complex)) else ""


def put_together(static: Static, arrays: Sequence[Any]) -> tuple[tuple, dict]:
    """The positional and the keyword arguments that `take_apart` took apart."""
    leaves = list(arrays)
    for index, _, leaf in static.leaves:
        leaves.insert(index, leaf)
    return jax.tree.unflatten(static.tree, leaves)


def on_arrays(fn: Callable, static: Static, arrays: Sequence[Any]) -> tuple[Callable, list[Any]]:
    """`fn` as a function of the arrays alone, traced in a scope that says where its own scopes
    begin, and the arrays.

    Codes stand for a dense array: it is traced on that, and they are followed through its program.
    """
    dtypes = [
        jax.dtypes.canonicalize_dtype(array.dtype) if is_coded(array) else None for array in arrays
    ]

    @functools.wraps(fn)
    def call(*arrays):
        dense = [
            array if dtype is None else array.astype(dtype)
            for array, dtype in zip(arrays, dtypes, strict=True)
        ]
        args, kwargs = put_together(static, dense)
        with jax.named_scope(ROOT):
            return fn(*args, **kwargs)

    return call, [array.data if is_coded(array) else array for array in arrays]


def coded_among(static: Static, arrays: Sequence[Any], positions: Sequence[int]) -> tuple[str, ...]:
    """The paths of the weights that are held as codes, in the order of the arrays."""
    if not any(map(is_coded, arrays)):
        return ()
    args, _ = put_together(static, arrays)
    return tuple(
        path
        for position in sorted(positions)
        for path, leaf in named_leaves(args[position])[0]
        if is_coded(leaf)
    )


def weights_among(
    fn: Callable,
    static: Static,
    arrays: Sequence[jax.Array],
    positions: Sequence[int],
    place_of: Callable,
    called: str,
) -> list[Weight | None]:
    """For each array the weight that it is, if any.

    Args:
      fn: the function.
      static, arrays: its arguments.
      positions: those that hold weights.
      place_of: of a leaf's path in such an argument, what to put before it, and what is left of it.
      called: how messages call the function.

    Raises:
      ValueError: where there is no argument at a position.
    """
    args, _ = put_together(static, arrays)
    if any(position >= len(args) for position in positions):
        raise ValueError(
            f"weights must be positions of {called}'s arguments; got {tuple(positions)} for a call "
            "with "
            f"{len(args)} positional argument(s). Pass the weights by position."
        )
    weights: list[Weight | None] = []
    for argument, arg in enumerate(args):
        # Where several arguments hold weights, a path starts with the argument.
        prefix = (_name_of(fn, argument),) if len(positions) > 1 else ()
        for path, leaf in jax.tree_util.tree_flatten_with_path(
            arg, is_leaf=is_coded if argument in positions else None
        )[0]:
            if is_array(leaf):
                weight = None
                if argument in positions:
                    place, path = place_of(path)
                    weight = Weight.at(path, math.prod(leaf.shape), len(weights), (*prefix, *place))
                weights.append(weight)
    return weights + [None] * (len(arrays) - len(weights))


def _name_of(fn: Callable, argument: int) -> str:
    """What `fn` calls a positional argument."""
    try:
        parameters = list(inspect.signature(fn).parameters.values())
    except (TypeError, ValueError):
        parameters = []
    named = (
        argument < len(parameters) and parameters[argument].kind != inspect.Parameter.VAR_POSITIONAL
    )
    return parameters[argument].name if named else f"argument_{argument}"
