"""Groups of elements that share a scale, as boxes along an array's axes, and where they are once
the axes have changed.
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
from jax import lax

from fp8jax._scaling import Scaling


@dataclasses.dataclass(frozen=True)
class Boxes(Scaling):
    """A granularity in an array's own layout: the extent of a group along each axis, None for the
    whole axis.

    Axes before those that have an extent are of layers: each of their indices has scales of its
    own.

    >>> Boxes((None, 2)).group_shape((5, 4, 6))
    (5, 1, 3)
    """

    extents: tuple[int | None, ...]

    def block(self, shape):
        return (1,) * (len(shape) - len(self.extents)) + self.extents


class TornGroups(ValueError):
    """Elements that share a scale would have to be told apart; `why` says by what."""

    def __init__(self, why: str, text: str = ""):
        self.why = why
        super().__init__(text or why)


class GroupedArray:
    """What can be done to the axes of a frozen dataclass of `data` and of scales for groups of it.

    Attributes:
      data: array.
      scale: array, one entry per group: of the rank of `data`, or of fewer axes, the first ones.
      scaling: the granularity; `Boxes` once something was done.
    """

    data: jax.Array
    scale: jax.Array
    scaling: Scaling
    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the values."""
        return self.data.shape

    @property
    def ndim(self) -> int:
        """Rank of the values."""
        return self.data.ndim

    @property
    def extents(self) -> tuple[int | None, ...]:
        """Of the elements that share a scale, along each axis; None for the whole axis."""
        return self.scaling.block(self.shape)

    def as_boxes(self) -> Self:
        """The same with scales of the rank of `data`, and `Boxes` for granularity, which follow
        what is done to the axes.
        """
        if isinstance(self.scaling, Boxes):
            return dataclasses.replace(self, scaling=Boxes(self.extents))
        scale = self.scale.reshape(self.scale.shape + (1,) * (self.ndim - self.scale.ndim))
        # Axes that stacking added have a scale for each index, whatever the granularity says of one
        # layer.
        extents = tuple(
            1 if size not in (0, 1) and groups == size and extent is None else extent
            for size, groups, extent in zip(self.shape, scale.shape, self.extents, strict=True)
        )
        return dataclasses.replace(self, scale=scale, scaling=Boxes(extents))

    def reshape(self, *shape: Any) -> Self:
        """The same elements in another shape: sizes, or a tuple of them, one of which may be -1.

        Raises:
          ValueError: where the sizes don't fit, or tear groups of scales apart.

        >>> from fp8jax import PerChannel, quantize
        >>> q = quantize(jnp.ones((4, 6)), scaling=PerChannel(-1)).reshape(4, 2, -1)
        >>> q.shape, q.scale.shape
        ((4, 2, 3), (1, 2, 3))
        """
        q = self.as_boxes()
        data = q.data.reshape(*shape)
        with _in_groups():
            groups, extents = _reshaped(q.shape, q.scale.shape, q.extents, data.shape)
        return q._with(data, q.scale.reshape(groups), extents)

    def transpose(self, *axes: Any, move: Callable[..., jax.Array] = jnp.transpose) -> Self:
        """The axes in another order, by default the reverse one; `move(data, order)` moves codes.

        >>> from fp8jax import PerChannel, quantize
        >>> quantize(jnp.ones((4, 6)), scaling=PerChannel(-1)).transpose().scale.shape
        (6, 1)
        """
        q = self.as_boxes()
        order = axes[0] if len(axes) == 1 and isinstance(axes[0], Sequence) else axes
        order = tuple(axis % q.ndim for axis in order) or tuple(reversed(range(q.ndim)))
        extents = tuple(q.extents[axis] for axis in order)
        return q._with(move(q.data, order), jnp.transpose(q.scale, order), extents)

    def slice(
        self, starts: Sequence[int], limits: Sequence[int], strides: Sequence[int] | None = None
    ) -> Self:
        """As `jax.lax.slice`.

        Raises:
          ValueError: where it ends within a group of scales.

        >>> from fp8jax import BlockWise, quantize
        >>> quantize(jnp.ones((4, 6)), scaling=BlockWise(2)).slice((0, 2), (4, 6)).scale.shape
        (4, 2)
        """
        q, strides = self.as_boxes(), strides or (1,) * self.ndim
        extents = q.extents
        with _in_groups():
            bounds = _sliced(q.shape, q.scale.shape, extents, starts, limits, strides)
        scale = lax.slice(q.scale, *zip(*bounds)) if bounds else q.scale
        return q._with(lax.slice(q.data, starts, limits, strides), scale, extents)

    def dynamic_slice(self, starts: Sequence[Any], sizes: Sequence[int]) -> Self:
        """As `jax.lax.dynamic_slice`; along an axis of blocks only whole.

        Raises:
          ValueError: where it may end within a group of scales.
        """
        q, of_scale, at = self.as_boxes(), [], []
        extents = q.extents
        with _in_groups():
            for axis, (start, size, extent) in enumerate(zip(starts, sizes, extents, strict=True)):
                groups = q.scale.shape[axis]
                is_whole = groups == 1 or size == q.shape[axis]
                if not is_whole and extent != 1 and size != 1:
                    raise TornGroups(
                        f"it is sliced within a block of {extent}, at a place that is known when "
                        "it runs"
                    )
                of_scale.append(groups if is_whole else size)
                start = jnp.clip(start, 0, q.shape[axis] - size)
                at.append(jnp.zeros_like(start) if is_whole else start // (extent or 1))
        scale = lax.dynamic_slice(q.scale, at, of_scale) if at else q.scale
        return q._with(lax.dynamic_slice(q.data, starts, sizes), scale, extents)

    def separated(self, axes: Sequence[int]) -> Self:
        """The same with a scale for each index along some axes, where there were blocks.

        >>> from fp8jax import BlockWise, quantize
        >>> quantize(jnp.ones((4, 6)), scaling=BlockWise(2)).separated([1]).scale.shape
        (4, 6)
        """
        q = self.as_boxes()
        scale, extents = q.scale, list(q.extents)
        for axis in axes:
            if scale.shape[axis] > 1:
                scale = _in_blocks(scale, axis, q.shape[axis], extents[axis] or 1, 1)
                extents[axis] = 1
        return q._with(q.data, scale, tuple(extents))

    def split(self, sizes: Sequence[int], axis: int = 0) -> list[Self]:
        """Parts of some sizes along an axis, as of `jax.lax.split`.

        Raises:
          ValueError: where one ends within a group of scales.

        >>> from fp8jax import quantize
        >>> [part.shape for part in quantize(jnp.ones((6, 2))).split((2, 4))]
        [(2, 2), (4, 2)]
        """
        axis, start, parts = axis % self.ndim, 0, []
        for size in sizes:
            starts, limits = [0] * self.ndim, list(self.shape)
            starts[axis], limits[axis] = start, start + size
            parts.append(self.slice(starts, limits))
            start += size
        return parts

    def concatenate(self, others: Sequence[Self], axis: int = 0) -> Self:
        """This array and others of its format, joined along an axis.

        >>> from fp8jax import quantize
        >>> q = quantize(jnp.ones((4, 6)))
        >>> q.concatenate([quantize(jnp.ones((4, 3)))], axis=1).scale.shape
        (1, 3)
        """
        parts = [part.as_boxes() for part in (self, *others)]
        blocks = [part.extents for part in parts]
        scales, joined, axis = [part.scale for part in parts], [], axis % self.ndim
        for at in range(self.ndim):
            sizes, groups = ([x.shape[at] for x in some] for some in (parts, scales))
            own = [
                size if count == 1 else block[at] or size
                for size, count, block in zip(sizes, groups, blocks, strict=True)
            ]
            if at != axis and max(groups) == 1:
                joined.append(None)
                continue
            # The largest blocks in which each has one scale; along the axis none may straddle.
            extent = math.gcd(*own, *(sizes[:-1] if at == axis else ()))
            scales = [
                _in_blocks(scale, at, size, old, extent)
                for scale, size, old in zip(scales, sizes, own, strict=True)
            ]
            joined.append(extent)
        data = jnp.concatenate([part.data for part in parts], axis)
        return parts[0]._with(data, jnp.concatenate(scales, axis), tuple(joined))

    def gather(
        self, indices: jax.Array, numbers: lax.GatherDimensionNumbers, sizes: Sequence[int]
    ) -> Self:
        """As `jax.lax.gather`, with indices out of bounds clipped; along an axis of blocks only
        single elements, or all.

        Raises:
          ValueError: where it may end within a group of scales.
        """
        q = self.as_boxes()
        scale, starts, of_scale = q.scale, list(jnp.unstack(indices, axis=-1)), list(sizes)
        extents: list[Any] = list(q.extents)
        found = []
        for axis in numbers.operand_batching_dims:  # of the size that the indices have there
            whole = scale.shape[axis] == 1
            extent = q.shape[axis] if whole else extents[axis] or q.shape[axis]
            scale = _in_blocks(scale, axis, q.shape[axis], extent, 1)
            extents[axis] = 1
        with _in_groups():
            for axis, (size, extent) in enumerate(zip(sizes, extents, strict=True)):
                groups = scale.shape[axis]
                if groups == 1 or size == q.shape[axis]:
                    of_scale[axis] = groups
                elif extent != 1 and size != 1:
                    raise TornGroups(f"it is gathered within a block of {extent}")
                if axis in numbers.start_index_map:
                    place, last = numbers.start_index_map.index(axis), q.shape[axis] - size
                    start = jnp.clip(starts[place], 0, last)
                    starts[place] = start // (q.shape[axis] if groups == 1 else extent or 1)
                if axis not in (*numbers.collapsed_slice_dims, *numbers.operand_batching_dims):
                    found.append(None if of_scale[axis] == 1 else extent)
        options = {"dimension_numbers": numbers, "mode": lax.GatherScatterMode.CLIP}
        data = lax.gather(q.data, indices, slice_sizes=tuple(sizes), **options)
        scale = lax.gather(
            scale, jnp.stack(starts, axis=-1), slice_sizes=tuple(of_scale), **options
        )
        extents = [1] * data.ndim
        for axis, extent in zip(numbers.offset_dims, found, strict=True):
            extents[axis] = extent
        return q._with(data, scale, tuple(extents))

    def _with(self, data: jax.Array, scale: jax.Array, extents: tuple) -> Self:
        return dataclasses.replace(self, data=data, scale=scale, scaling=Boxes(extents))


@contextlib.contextmanager
def _in_groups():
    """Says what to do where groups are torn."""
    try:
        yield
    except TornGroups as error:
        raise TornGroups(
            error.why,
            "elements that share a scale must stay together; got an Fp8Tensor that would tear "
            f"them apart: {error.why}. "
            "Dequantize it, or quantize it in groups that fit.",
        ) from None


def _in_blocks(scale: jax.Array, axis: int, size: int, old: int, new: int) -> jax.Array:
    """Scales of blocks of `old` elements along an axis of `size`, as those of blocks of `new`,
    which divides it.
    """
    if old == new:
        return scale
    repeated = jnp.repeat(scale, old // new, axis)
    return lax.slice_in_dim(repeated, 0, -(-size // new), axis=axis)


def _sliced(
    shape: Sequence[int],
    groups: Sequence[int],
    extents: Sequence[int | None],
    starts: Sequence[int],
    limits: Sequence[int],
    strides: Sequence[int],
) -> list[tuple[int, int, int]]:
    """Start, limit and stride along each axis of the scales of a slice.

    Raises:
      TornGroups: where it ends within a group.

    >>> _sliced((16,), (2,), (8,), [8], [16], [1])
    [(1, 2, 1)]
    """
    bounds = []
    for size, count, extent, start, limit, stride in zip(
        shape, groups, extents, starts, limits, strides, strict=True
    ):
        if count == 1:
            bounds.append((0, 1, 1))
        elif extent == 1:
            bounds.append((start, limit, stride))
        elif start % extent == 0 and stride == 1 and (limit % extent == 0 or limit == size):
            bounds.append((start // extent, -(-limit // extent), 1))
        else:
            raise TornGroups(f"it is sliced within a block of {extent}, from {start} to {limit}")
    return bounds


def _reshaped(
    shape: Sequence[int],
    groups: Sequence[int],
    extents: Sequence[int | None],
    new: Sequence[int],
) -> tuple[tuple[int, ...], tuple[int | None, ...]]:
    """Shape of the scales and extents of their groups, of an array that is reshaped.

    Raises:
      TornGroups: where no boxes along the new axes are the same groups.

    >>> _reshaped((6, 4), (1, 4), (None, 1), (3, 2, 2, 2))
    ((1, 1, 2, 2), (None, None, 1, 1))
    """
    if 0 in new:
        raise TornGroups("it is reshaped, and is empty")
    new_groups = [1] * len(new)
    new_extents: list[int | None] = [None] * len(new)
    for before, after in _matching_axes(shape, new):
        old = [(shape[axis], groups[axis], extents[axis]) for axis in before]
        own = _regrouped(old, [new[axis] for axis in after])
        if own is None:
            raise TornGroups(
                f"it is reshaped to {list(new)}, which tears the groups of scales {list(groups)} "
                "apart"
            )
        for axis, (count, extent) in zip(after, own):
            new_groups[axis], new_extents[axis] = count, extent
    return tuple(new_groups), tuple(new_extents)


def _matching_axes(
    before: Sequence[int], after: Sequence[int]
) -> list[tuple[list[int], list[int]]]:
    """The smallest runs of axes of two shapes that hold the same elements, in order; axes of one
    element left out.

    >>> _matching_axes((6, 4, 1, 5), (2, 3, 20))
    [([0], [0, 1]), ([1, 3], [2])]
    """
    old, new = ([axis for axis, size in enumerate(shape) if size > 1] for shape in (before, after))
    runs = []
    while old:
        left, right = [old.pop(0)], [new.pop(0)]
        while (of_left := math.prod(before[axis] for axis in left)) != (
            of_right := math.prod(after[axis] for axis in right)
        ):
            if of_left < of_right:
                left.append(old.pop(0))
            else:
                right.append(new.pop(0))
        runs.append((left, right))
    return runs


def _regrouped(
    old: Sequence[tuple[int, int, int | None]], new: Sequence[int]
) -> list[tuple[int, int | None]] | None:
    """Number and extent of the groups along new axes that hold the elements of old ones, as (size,
    groups, extent).

    None where no boxes along the new axes are these groups.

    >>> _regrouped([(6, 3, 2), (4, 1, None)], [24]), _regrouped([(8, 2, 4)], [4, 2])
    ([(3, 8)], [(2, 2), (1, None)])
    >>> _regrouped([(4, 1, None), (6, 6, 1)], [24]) is None
    True
    """
    if [size for size, *_ in old] == list(new):
        return [(groups, extent) for _, groups, extent in old]
    # A group must be a run of elements: single along the first axes, a part of one axis, whole
    # along those behind it.
    run, is_whole = 1, True
    for size, groups, extent in reversed(old):
        extent = size if groups == 1 or extent is None else extent
        if size % extent or (not is_whole and extent != 1):
            return None
        run, is_whole = run * extent, is_whole and extent == size
    found = []
    for size in reversed(new):
        extent = min(size, run)
        if run % extent or size % extent:
            return None
        found.append((size // extent, None if extent == size else extent))
        run //= extent
    return found[::-1]
