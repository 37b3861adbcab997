"""What XLA has to be told, or kept from.

Each function is in values the identity, or the plain operation of its name. Its docstring tells
which of XLA's compilers needs it, what it buys, and the test or benchmark that is worse without it:
where that is no worse on the oldest and the newest JAX, the function may go. Without another word,
it was needed with JAX 0.10.2 and 0.12; `tests/test_xla.py` measures what is for CPUs.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint
from jax.experimental.xla_metadata import set_xla_metadata

from fp8jax import _shims

_INFINITY = np.int32(0x7F800000)  # as the bits of a float32
_ROWS = 16  # that a kernel writes: one that writes very many takes a compiler long
_ARRAYS = 64  # that a kernel reads
_PARTS, _TILE = 8, 32  # of an array in memory, and rows that a TPU keeps together


def made_once(arrays: Any) -> Any:
    """Arrays that have many uses.

    XLA computes cheap elementwise operations anew for each use, on all platforms: random numbers of
    a model's initialization, or the array that each site takes an element of. With JAX 0.12 the
    program of an `init` has 1.3 times the instructions without it, with 0.10.2 as many.
    """
    return lax.optimization_barrier(arrays)


def before_cast(operand: jax.Array) -> jax.Array:
    """An operand that is to be cast, on a CPU.

    XLA would move reshapes of what makes the operand through all of the encoding, an operation at
    each of its rounds of simplification. Accelerators need it the other way: there, a cast is part
    of the kernel that makes the operand. A step of six layers took 1.2 times as long to compile,
    and with JAX 0.12 to run.
    """
    return lax.optimization_barrier(operand)


def in_memory(codes: jax.Array) -> jax.Array:
    """Codes that are to be decoded, on a CPU.

    In one kernel with their encoding, that would be done again for each use of the codes. And XLA
    would fold their conversion with what they were encoded from. With JAX 0.12 a step has 1.05 to
    1.08 times the instructions; to compile it took 1.1 times as long, with JAX 0.10.2, too.
    """
    return lax.optimization_barrier(codes)


def in_place(codes: jax.Array, index: Any) -> tuple[jax.Array, Any]:
    """Codes of a weight that a loop takes apart on a CPU, and which part an iteration takes.

    XLA would do to all of them, in front of the loop, what an iteration does to its part: their
    bytes would be copied, or float8 widened.
    """
    return lax.optimization_barrier((codes, index))


def called(function: Callable, *arrays: Any, **static: Any) -> Any:
    """`function(*arrays, **static)`, which a CPU's program of one device calls, and doesn't hold.

    XLA's first passes then see it once for all sites with the same shapes. Without, a step of six
    layers takes 1.25 times as long to compile. On several devices XLA had to divide it again for
    each call, and it stays a part of the program.

    Args:
      function: of arrays alone, and defined once: traces are kept by it and by `static`.
      static: hashable.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if (mesh.size if mesh.axis_names else jax.device_count()) > 1:
        return function(*arrays, **static)
    with set_xla_metadata(inlineable="false"):
        return _called(function, tuple(static.items()), *arrays)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _called(function, static, *arrays):
    with set_xla_metadata(inlineable=None):  # Of the call, and not of what is in it.
        return function(*arrays, **dict(static))


def before_transposition(product: jax.Array) -> jax.Array:
    """A product, on a CPU, that nothing multiplies before it may be transposed.

    XLA would fold the transposition into the product, the one way or the other, and then has
    neither a library nor a loop for it: a block-wise step doesn't run.
    """
    return lax.optimization_barrier(product)


def row_major(array: jax.Array) -> jax.Array:
    """An array that lies in memory row by row, whatever reads it."""
    return with_layout_constraint(array, Layout(tuple(range(array.ndim))))


def row_major_on_gpu(codes: jax.Array) -> jax.Array:
    """Codes that a GPU multiplies: row by row there, as they are elsewhere.

    Tensor cores want the contracted axis last, and XLA would have the values in that order rather
    than the codes: it would make a transposed copy of what they are cast from, of the stacked
    weights of all layers for instance. Compiled for an H200 with JAX 0.12, a scanned step has 1.05
    times the temporaries without it, and two kernels more; see `tests/test_compile_cost.py`.
    """
    return lax.platform_dependent(
        codes, cuda=row_major, rocm=row_major, default=lambda codes: codes
    )


def transposed(codes: jax.Array, order: tuple[int, ...]) -> jax.Array:
    """`jnp.transpose(codes, order)`, done for good and fast on CPUs.

    Four codes of the last axis move as one uint32 and are taken apart where they arrive, which
    makes a quarter of the strided accesses. In rows before and after, or XLA would leave them where
    they are, say that their axes lie in the other order, and let each element that is decoded fetch
    its own. Without, a step takes 1.12 times as long, and more memory.
    """
    last = codes.ndim - 1
    in_quads = codes.shape[-1] % 4 == 0 and not _shims.has_symbolic(codes.shape)
    if order[-1] == last or not in_quads or _shims.is_explicit(codes):
        return row_major(jnp.transpose(codes, order))
    quads = lax.bitcast_convert_type(codes, jnp.uint8).reshape(
        *codes.shape[:-1], codes.shape[-1] // 4, 4
    )
    words = row_major(jnp.transpose(row_major(lax.bitcast_convert_type(quads, jnp.uint32)), order))
    axis = order.index(last)
    shape = tuple(codes.shape[i] for i in order)
    split = (*words.shape[: axis + 1], 4, *words.shape[axis + 1 :])
    # Joined before they are taken apart: XLA would move a reshape behind that through all of the
    # decoding, an operation at each of its rounds of simplification.
    words = lax.broadcast_in_dim(
        words, split, tuple(i for i in range(len(split)) if i != axis + 1)
    ).reshape(shape)
    shifts = (lax.broadcasted_iota(jnp.uint32, shape, axis) & jnp.uint32(3)) * jnp.uint32(8)
    return lax.bitcast_convert_type(
        lax.shift_right_logical(words, shifts).astype(jnp.uint8), codes.dtype
    )


def after(values: Any, observations: Any) -> Any:
    """A pytree of numbers, on CPUs not read before a like one of numbers of 0 or more was made.

    A step that may reuse a weight's memory writes the next weight into it, but XLA's CPU compiler
    makes a copy of it first, where something might read the old one later. An amax that nothing but
    the state of scales waits for would be such a thing. Without, a step of six layers of six
    weights has 36 copies more.
    """

    def waiting(values, observations):
        # Always the value, which XLA can't know.
        return jax.tree.map(
            lambda value, seen: jnp.where(seen < 0, seen, value), values, observations
        )

    return lax.platform_dependent(
        values, observations, cpu=waiting, default=lambda values, _: values
    )


def rows_apart(row_of: Callable[[jax.Array], jax.Array], vectors: jax.Array) -> list[jax.Array]:
    """`row_of` of each row of an array, each a buffer of its own, in as few kernels as can be.

    All that is alike but for the buffers that it reads is one kernel to a compiler. In one buffer,
    each reader's place would be another, and each kernel, too: 1.15 times the instructions of a
    step on a CPU. A TPU has each fusion read its operands by a copy, of which one is the fewest.
    `test_kernels_of_unrolled_layers_are_the_same_ones` counts a GPU's.
    """
    apart = lax.optimization_barrier

    def in_groups(vectors):
        # All in one kernel; and to take it apart in another, which XLA makes of no slices alone.
        # One that computes each row by itself takes it a quarter of a step's compile time.
        bits = apart(~lax.bitcast_convert_type(row_of(vectors), np.int32))
        rows = [lax.bitcast_convert_type(~row, np.float32) for row in bits]
        groups = [rows[at : at + _ROWS] for at in range(0, len(rows), _ROWS)]
        return [row for group in groups for row in apart(group)]

    def in_stages(vectors):
        # The pieces at one place of equally long buffers are alike, as well: a CPU takes 10 ms to
        # compile each kernel that cuts one.
        pieces = [apart(row_of(vectors))]
        for length in (_ROWS**2, _ROWS, 1):
            cuts = [(one, at) for one in pieces for at in range(0, len(one), length)]
            pieces = apart([one[at : min(at + length, len(one))] for one, at in cuts])
        return [piece[0] for piece in pieces]

    return lax.platform_dependent(
        apart(vectors),
        cpu=in_stages,
        tpu=lambda vectors: list(apart(row_of(vectors))),
        default=in_groups,
    )


def joined(arrays: Sequence[jax.Array], axis: int) -> jax.Array:
    """`jnp.concatenate`, of any number of arrays.

    A kernel that reads thousands of arrays takes all compilers long; so they are joined by stages,
    which are kept apart.
    """
    while len(arrays) > 1:
        groups = [arrays[at : at + _ARRAYS] for at in range(0, len(arrays), _ARRAYS)]
        arrays = [lax.concatenate(group, axis) for group in groups]
        arrays = lax.optimization_barrier(arrays) if len(arrays) > 1 else arrays
    return arrays[0]


def merged(observations: Any) -> Any:
    """A pytree of what the devices saw in loops, merged.

    In front of a barrier, all of it merges in one collective. A kernel that writes some of the
    results and begins others makes a chain of collectives of them: two more on H200s, as
    `test_weights_are_gathered_as_fp8_and_amaxes_merge_in_one_collective_on_h200s` counts them.
    """
    return lax.optimization_barrier(observations)


def written_apart(values: jax.Array) -> jax.Array:
    """What a kernel that XLA didn't write makes, and a scan stacks for its backward pass.

    XLA's TPU compiler takes the stack into such a kernel, but not always in the layout that the
    stack has, and then fails: `test_scanned_layers_compile_for_a_tpu`. JAX 0.12.
    """
    return lax.optimization_barrier(values)


def parts_in_memory(array: jax.Array) -> list[jax.Array]:
    """The parts of a large array along its first axis, for a reduction on a TPU that reads it from
    memory.

    XLA has a kernel read each of its operands by one stream of copies at a time, which is a quarter
    of what the memory gives. As parts of one array, it is read by several. Of a weight of 4096 x
    16384, bfloat16, the amax is estimated at a third of the cycles; see
    `test_amaxes_of_weights_are_read_in_parts`. An array that is divided over devices stays whole.
    """
    rows = array.shape[0] if array.ndim > 1 else 0
    if _shims.has_symbolic(array.shape) or rows % (_PARTS * _TILE) or _shims.devices_at_hand() > 1:
        return [array]
    return jnp.split(array, _PARTS)


def max_over(values: jax.Array, axes: Sequence[int], least: float = 0) -> jax.Array:
    """The maxima over some axes, `least` or more."""
    if all(values.shape[axis] == 1 for axis in axes):
        # Of single elements, which JAX and XLA leave as they are.
        values = lax.max(values, lax.full_like(values, least))
    return lax.reduce(values, values.dtype.type(least), lax.max, axes)


def max_on_cpu(bits, axes, raised=np.int32(0)):
    """The same maximum of the bits of floats, formulated for XLA's CPU compiler.

    That fuses a reduction with what feeds it, and vectorizes it, only if it is short and leaves
    something to the minor axis. So most is done by a short one, and the rest by a reduction of
    floats, which has a fast library. What the bits are `raised` by is taken off again.
    """
    sharded = any(
        part is not None for part in jax.typeof(bits).sharding.spec
    )  # types tell, on explicit meshes only
    if sharded or _shims.has_symbolic(bits.shape):
        return max_over(bits, axes) - raised
    minor = bits.ndim - 1
    # What is left to the minor axis should fill a vector.
    steps = {
        axis: max(
            d
            for d in range(1, 17)
            if bits.shape[axis] % d == 0 and (axis != minor or d == 1 or bits.shape[axis] >= 8 * d)
        )
        for axis in axes
        if bits.shape[axis]
    }
    if bits.size < 1 << 16 or max(steps.values(), default=1) == 1:
        return max_over(bits, axes) - raised
    axis = max(steps, key=lambda a: (steps[a] >= 8, a != minor, steps[a]))
    step, rest = steps[axis], bits.shape[axis] // steps[axis]
    pair = (step, rest) if axis == minor else (rest, step)
    bits = max_over(
        bits.reshape(bits.shape[:axis] + pair + bits.shape[axis + 1 :]),
        [axis if axis == minor else axis + 1],
    )
    values = lax.bitcast_convert_type(lax.min(bits - raised, _INFINITY), np.float32)  # without NaNs
    return lax.bitcast_convert_type(
        lax.reduce(values, (-raised).view(np.float32), lax.max, axes), np.int32
    )
