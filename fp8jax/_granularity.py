"""Granularities: which elements of an array share a scale.

Groups are boxes: along every axis a group spans some number of elements, so shapes, amaxes and
broadcasts of all granularities come from `Scaling.block`.
"""

import dataclasses

import numpy as np


class Scaling:
    """A granularity: which elements share a scale. See `PerTensor`, `PerChannel`, `PerToken`,
    `BlockWise`.
    """

    def normalize(self, ndim: int) -> "Scaling":
        """The same granularity with its axes negative, so that stacking keeps it; ValueError where
        it can't fit.
        """
        return self

    def block(self, shape: tuple[int, ...]) -> tuple[int | None, ...]:
        """The extent of a group along each axis of an operand; None for the whole axis, however
        long.
        """
        raise NotImplementedError

    def group_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of an operand's amaxes and scales: of the operand's own rank, but () for
        `PerTensor`.
        """
        block = self.normalize(len(shape)).block(shape)
        return tuple(1 if b is None else -(-n // b) for n, b in zip(shape, block, strict=True))


@dataclasses.dataclass(frozen=True)
class PerTensor(Scaling):
    """One scale for a whole array; its shape is ().

    >>> PerTensor().group_shape((4, 6))
    ()
    """

    def block(self, shape):
        return (None,) * len(shape)

    def group_shape(self, shape):
        return ()


@dataclasses.dataclass(frozen=True)
class PerChannel(Scaling):
    """A scale for every index along an axis (or along several).

    Attributes:
      axis: an int, or a tuple of them, negative or not.

    Raises:
      ValueError: where there is no axis, or one twice.

    >>> PerChannel(-1).group_shape((4, 6))
    (1, 6)
    """

    axis: int | tuple[int, ...]

    def __post_init__(self):
        axes = _integers("axis", self.axis)
        if not axes:
            raise ValueError(
                "axis must name at least one axis; got (). Use PerTensor() for one scale."
            )
        if len(set(axes)) < len(axes):
            raise ValueError(f"axis must name each axis once; got {self.axis!r}.")
        object.__setattr__(self, "axis", axes[0] if len(axes) == 1 else axes)

    def normalize(self, ndim):
        axes = _integers("axis", self.axis)
        if not all(-ndim <= axis < ndim for axis in axes):
            raise ValueError(
                f"axis of PerChannel must lie within an operand of rank {ndim}; got {self.axis!r}."
            )
        negative = tuple(axis % ndim - ndim for axis in axes)
        if len(set(negative)) < len(axes):
            raise ValueError(
                f"axis of PerChannel must name each axis once; got {self.axis!r} for rank {ndim}."
            )
        return PerChannel(negative)

    def block(self, shape):
        channels = {axis % len(shape) for axis in _integers("axis", self.axis)}
        return tuple(1 if axis in channels else None for axis in range(len(shape)))


@dataclasses.dataclass(frozen=True)
class PerToken(Scaling):
    """A scale for every vector along the last axis.

    >>> PerToken().group_shape((4, 6))
    (4, 1)
    """

    def normalize(self, ndim):
        if ndim < 1:
            raise ValueError(
                "PerToken needs an operand with at least one axis; got a scalar. Use PerTensor()."
            )
        return self

    def block(self, shape):
        return (1,) * (len(shape) - 1) + (None,)


@dataclasses.dataclass(frozen=True)
class BlockWise(Scaling):
    """A scale for every block over the trailing axes; the last block along an axis may be smaller.

    Attributes:
      block_shape: extents along the trailing axes; an int means the last axis.

    Raises:
      ValueError: where an extent is not positive, or there is none.

    >>> BlockWise((128, 128)).group_shape((3, 200, 256))
    (3, 2, 2)
    >>> BlockWise(32)
    BlockWise(block_shape=(32,))
    """

    block_shape: int | tuple[int, ...]

    def __post_init__(self):
        block = _integers("block_shape", self.block_shape)
        if not block or min(block) < 1:
            raise ValueError(
                f"block_shape must hold positive extents; got {self.block_shape!r}. Use (1, 128), "
                "say."
            )
        object.__setattr__(self, "block_shape", block)

    @property
    def extents(self) -> tuple[int, ...]:
        """`block_shape`, which is a tuple by now."""
        return _integers("block_shape", self.block_shape)

    def normalize(self, ndim):
        if len(self.extents) > ndim:
            raise ValueError(
                f"block_shape {self.block_shape} must not have more axes than the operand; got "
                f"rank {ndim}."
            )
        return self

    def block(self, shape):
        return (1,) * (len(shape) - len(self.extents)) + self.extents


def _integers(name: str, value) -> tuple[int, ...]:
    """An int or a sequence of ints as a tuple of ints."""
    values = tuple(value) if isinstance(value, (tuple, list)) else (value,)
    if not all(isinstance(v, (int, np.integer)) and not isinstance(v, bool) for v in values):
        raise TypeError(f"{name} must be an int or a tuple of ints; got {value!r}.")
    return tuple(int(v) for v in values)
