"""Parameter trees whose weights are held as FP8 codes: a quarter of float32's bytes, half of
bfloat16's.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import NamedSharding, PartitionSpec

from fp8jax._fitting import check_scale
from fp8jax._formats import E4M3, Format, get_format
from fp8jax._patterns import as_rules, check_pattern
from fp8jax._scaling import PerTensor, Scaling
from fp8jax._tensor import Fp8Tensor, dequantize, quantize


@dataclasses.dataclass(frozen=True)
class WeightRule:
    """How the weights at some paths of a parameter tree are held.

    Args:
      pattern: regular expression that the whole path of a weight must match (`re.fullmatch`), as
        "blocks/up/kernel".
      scaling: granularity of the scales, within one layer; None to leave the weight as it is.
      format: a `Format` of signed values, or its name.
      stacked: number of leading axes over which layers are stacked, as by `nn.scan`. Each layer has
        scales of its own.
      power_of_two: as in `fp8jax.quantize`.
      scale: "amax" or "mse", as in `fp8jax.quantize`. The second looks for scales of less error,
        which are no powers of two.

    Raises:
      ValueError: where `pattern` is no regular expression, `format` no format of values, `stacked`
        negative, or `scale` doesn't go with `power_of_two`.
      TypeError: where `scaling` is no granularity.

    >>> from fp8jax import PerChannel
    >>> WeightRule(r".*kernel", PerChannel(-1)).matches("mlp/up/kernel")
    True
    """

    pattern: str
    scaling: Scaling | None = PerTensor()
    format: Format = E4M3
    stacked: int = 0
    power_of_two: bool = True
    scale: Literal["amax", "mse"] = "amax"

    def __post_init__(self):
        check_pattern(self.pattern, over="paths")
        if self.scaling is not None and not isinstance(self.scaling, Scaling):
            raise TypeError(
                f"scaling must be a granularity or None; got {self.scaling!r}. Use PerChannel(-1), "
                "for instance, "
                "or None to leave the weights as they are."
            )
        object.__setattr__(self, "format", get_format(self.format))
        if not self.format.signed:
            raise ValueError(
                f"format must hold values; got {self.format.name}, which holds scales only. Use "
                "E4M3."
            )
        if isinstance(self.stacked, bool) or not isinstance(self.stacked, int) or self.stacked < 0:
            raise ValueError(
                f"stacked must be a number of leading axes, 0 or more; got {self.stacked!r}."
            )
        check_scale(self.scale, self.power_of_two)

    def matches(self, path: str) -> bool:
        """Whether the weight at a path is held as this rule says."""
        return re.fullmatch(self.pattern, path) is not None


def quantize_params(params: Any, rules: Sequence[WeightRule]) -> Any:
    """A parameter tree with some weights as `Fp8Tensor` leaves.

    Args:
      params: any pytree of arrays: a Flax "params" collection, an NNX `State`, a dict; or of
        `jax.ShapeDtypeStruct`s, for the tree to restore a checkpoint into. Sharded arrays stay so,
        each scale beside its codes.
      rules: ordered; the first whose pattern matches a leaf's path says how it is held. Leaves
        without one stay as they are.

    Returns:
      The same tree, with `Fp8Tensor`s in the place of the chosen leaves; abstract where `params`
      is.

    Raises:
      TypeError: where a rule is no `WeightRule`, or matches a leaf that is not floating or is
        quantized already.
      ValueError: where a rule matches no path, or its granularity doesn't fit a leaf.

    >>> params = {"up": {"kernel": jnp.ones((4, 8)), "bias": jnp.zeros(8)}}
    >>> quantized = quantize_params(params, [WeightRule(".*/kernel")])
    >>> quantized["up"]["kernel"].data.dtype, quantized["up"]["bias"].dtype
    (dtype(float8_e4m3fn), dtype('float32'))
    """
    rules = as_rules(rules, WeightRule, "scaling")
    named, tree = named_leaves(params)
    for rule in rules:
        if not any(rule.matches(path) for path, _ in named):
            raise ValueError(
                f"pattern of a rule must match the path of a leaf; got {rule.pattern!r}, which "
                "matches none of "
                f"{_some([path for path, _ in named])}. Patterns match whole paths: start them "
                "with .* perhaps."
            )
    leaves = []
    for path, leaf in named:
        rule = next((rule for rule in rules if rule.matches(path)), None)
        if rule is not None and rule.scaling is not None:
            leaf = _quantize_leaf(path, leaf, rule, rule.scaling)
        leaves.append(leaf)
    return jax.tree.unflatten(tree, leaves)


def dequantize_params(params: Any, dtype=None) -> Any:
    """A parameter tree with its `Fp8Tensor` leaves as dense arrays again.

    Args:
      params: what `quantize_params` or a checkpoint gave, abstract or not.
      dtype: a floating dtype of these leaves, by default the one that each stands for; others keep
        theirs.

    Returns:
      The tree, dense; sharded like the codes.

    Raises:
      TypeError: where `dtype` is not floating.

    >>> params = {"kernel": jnp.full((2, 2), 0.5), "step": jnp.int32(3)}
    >>> dequantize_params(quantize_params(params, [WeightRule("kernel")]))["kernel"]
    Array([[0.5, 0.5],
           [0.5, 0.5]], dtype=float32)
    """

    def dense(leaf):
        if not isinstance(leaf, Fp8Tensor):
            return leaf
        run = functools.partial(dequantize, dtype=dtype)
        return _run(run, leaf, leaf.data, lambda sharding: sharding)

    return jax.tree.map(dense, params, is_leaf=_is_quantized)


def abstract_params(params: Any) -> Any:
    """The shapes and dtypes of the dense tree that a quantized one stands for, without an array
    being made.

    Args:
      params: a tree of arrays, `Fp8Tensor`s and `jax.ShapeDtypeStruct`s.

    Returns:
      A tree of `jax.ShapeDtypeStruct`s; where there is an `Fp8Tensor`, of the dtype that it stands
      for.

    >>> abstract_params(quantize(jnp.ones((2, 3))))
    ShapeDtypeStruct(shape=(2, 3), dtype=float32)
    """

    def dense(leaf):
        return jax.ShapeDtypeStruct(
            jnp.shape(leaf), leaf.dtype if _is_quantized(leaf) else jnp.result_type(leaf)
        )

    return jax.tree.map(dense, params, is_leaf=_is_quantized)


def named_leaves(params: Any) -> tuple[list[tuple[str, Any]], Any]:
    """The leaves of a tree with their paths, `Fp8Tensor`s whole, and its structure.

    >>> named_leaves({"mlp": [1, 2]})[0]
    [('mlp/0', 1), ('mlp/1', 2)]
    """
    boxes = set()

    def is_leaf(path, node):
        if _is_box(node):
            boxes.add(path)
        return _is_quantized(node)

    def name(path):
        # The boxes are no part of a name, as a module or field that is called "value" is.
        kept = tuple(key for index, key in enumerate(path) if path[:index] not in boxes)
        return jax.tree_util.keystr(kept, simple=True, separator="/")

    leaves, tree = jax.tree_util.tree_flatten_with_path(
        params, is_leaf=is_leaf, is_leaf_takes_path=True
    )
    return [(name(path), leaf) for path, leaf in leaves], tree


def _is_box(node: Any) -> bool:
    """Whether a node is one of Flax's boxes around an array (`nnx.Param`, `nn.Partitioned`), told
    without importing Flax.
    """
    return all(hasattr(type(node), method) for method in ("add_axis", "remove_axis"))


def _is_quantized(leaf: Any) -> bool:
    return isinstance(leaf, Fp8Tensor)


def _some(names: Sequence[str], most: int = 8) -> str:
    return ", ".join(map(repr, names[:most])) + (
        f" and {len(names) - most} more" if len(names) > most else ""
    )


def _quantize_leaf(path: str, leaf: Any, rule: WeightRule, granularity: Scaling) -> Fp8Tensor:
    if _is_quantized(leaf):
        raise TypeError(
            f"leaf {path!r} must not be quantized yet, for rule {rule.pattern!r} to quantize it; "
            "got an Fp8Tensor "
            f"of {leaf.format}. Dequantize it first, or give it a rule with scaling=None."
        )
    dtype = jnp.result_type(leaf)
    if not jnp.issubdtype(dtype, jnp.floating) or dtype.itemsize < 2:
        raise TypeError(
            f"leaf {path!r} must be floating, for rule {rule.pattern!r} to quantize it; got "
            f"{dtype}. Narrow the "
            "pattern, or give the leaf a rule with scaling=None before this one."
        )
    shape = jnp.shape(leaf)
    try:
        scaling = granularity.normalize(len(shape) - rule.stacked)
        scaling.block(shape[rule.stacked :])
    except (ValueError, ZeroDivisionError) as error:
        raise ValueError(
            f"scaling of rule {rule.pattern!r} must fit leaf {path!r}; got {rule.scaling} and "
            "stacked="
            f"{rule.stacked} for {dtype}{list(shape)} ({error})"
        ) from None
    if rule.stacked > len(shape):
        raise ValueError(
            f"stacked of rule {rule.pattern!r} must leave leaf {path!r} its axes; got "
            f"{rule.stacked} for rank "
            f"{len(shape)}."
        )
    run = functools.partial(
        quantize,
        fmt=rule.format,
        scaling=scaling,
        power_of_two=rule.power_of_two,
        scale=rule.scale,
    )
    for _ in range(rule.stacked):
        run = jax.vmap(run)

    def sharding_of(sharding: Any) -> Any:  # A tree of shardings, like the result's of arrays.
        return Fp8Tensor(
            sharding,
            sharding_of_scale(sharding, shape, scaling, rule.stacked),
            rule.format,
            scaling,
            dtype,
        )

    return _run(run, leaf, leaf, sharding_of)


def _run(function: Callable, argument: Any, like: Any, out_sharding: Callable) -> Any:
    """`function(argument)`, abstract where that is, and sharded as `out_sharding` says where `like`
    is.
    """
    sharding = None if isinstance(like, Tracer) else getattr(like, "sharding", None)
    out_shardings = out_sharding(sharding) if isinstance(sharding, NamedSharding) else None
    if isinstance(like, jax.ShapeDtypeStruct):
        out = jax.eval_shape(function, argument)
        if out_shardings is None:
            return out
        return jax.tree.map(
            lambda leaf, own: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=own),
            out,
            out_shardings,
        )
    return (
        function(argument)
        if out_shardings is None
        else jax.jit(function, out_shardings=out_shardings)(argument)
    )


def sharding_of_scale(sharding: NamedSharding, shape, scaling: Scaling, stacked: int) -> Any:
    """Each scale where its codes are; whole on every device where groups don't end at the shards'
    borders.
    """
    spec = tuple(sharding.spec) + (None,) * (len(shape) - len(sharding.spec))
    kept = list(spec[:stacked])
    if scaling.group_shape(shape[stacked:]):
        for part, size, block in zip(
            spec[stacked:], shape[stacked:], scaling.block(shape[stacked:]), strict=True
        ):
            axes = part if isinstance(part, tuple) else (part,)
            shards = int(np.prod([sharding.mesh.shape[axis] for axis in axes if axis is not None]))
            kept.append(
                part
                if part is not None and block is not None and size % (shards * block) == 0
                else None
            )
    return NamedSharding(sharding.mesh, PartitionSpec(*kept))
