"""Observed amaxes equal the true ones, exactly, under every composition of two transformations.

A wrapper takes a function of `(w, x, eps)` that returns `(y, seen)` to another such function; `x`
and `y` are of one shape, and what the wrapper repeats has one more leading axis in `eps` and in
`seen`. `seen` is what the product read, and `eps` are zeros added to what it gave, so that their
gradient is the one that the product received. So whatever was composed, the true amaxes are those
of `seen`, of `w` and of that gradient, taken by NumPy product by product, and then merged by max
over all axes but those of stacked layers.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import fp8jax
from fp8jax._observe import seal_fits

pytestmark = pytest.mark.thorough

BATCH, WIDTH, TIMES = 4, 8, 2
# Compiled in half the time: each program runs once.
jit = functools.partial(
    jax.jit,
    compiler_options={
        "xla_backend_optimization_level": 0,
        "xla_llvm_disable_expensive_passes": True,
    },
)


def layer(w, x, eps):
    return jnp.tanh(x @ w + eps) * 2.0, x


def mesh_of(kind):
    """Manual regions divide over "data", automatic and explicit shardings over "model"."""
    return jax.make_mesh(
        (2, 2), ("data", "model"), axis_types=(AxisType.Auto, kind), devices=jax.devices()[:4]
    )


def scan_stacked(f):
    return lambda w, x, eps: jax.lax.scan(lambda x, slices: f(slices[0], x, slices[1]), x, (w, eps))


def scan_shared(f):
    return lambda w, x, eps: jax.lax.scan(lambda x, eps: f(w, x * 1.5, eps), x, eps)


def conditional(f):
    return lambda w, x, eps: jax.lax.cond(
        x.sum() < 1e9, f, lambda w, x, eps: (x, jnp.zeros_like(eps)), w, x, eps
    )


def in_shard_map(f, checked):
    def on_device(w, x, eps):
        # Here, so that the sum of the weights' gradients over devices is in no conditional that
        # they may not all enter.
        w = jax.lax.pcast(w, "data", to="varying") if checked else w
        y, seen = f(w, x[0], eps[0])
        return y[None], seen[None]

    return jax.shard_map(
        on_device,
        in_specs=(P(), P("data"), P("data")),
        out_specs=(P("data"), P("data")),
        axis_names={"data"},
        check_vma=checked,
    )


def sharded(f, place):
    """Rows of the batch divided over the devices inside, whole outside."""

    def over(array, axis):
        spec = [None] * array.ndim
        if axis:
            spec[-2] = axis
        return place(array, P(*spec))

    def wrapped(w, x, eps):
        y, seen = f(w, over(x, "model"), over(eps, "model"))
        return over(y, None), over(seen, None)

    return wrapped


@dataclasses.dataclass(frozen=True)
class Wrapper:
    """`adds`: what its leading axis of `eps` is, if it has one: "layers" (weights and scales have
    it too), "uses", or "batch" (`x` has it).
    """

    wrap: Callable
    adds: str = ""
    mesh: AxisType | None = None


WRAPPERS = {
    "jit": Wrapper(jax.jit),
    "scan stacked": Wrapper(scan_stacked, "layers"),
    "scan shared": Wrapper(scan_shared, "uses"),
    "vmap": Wrapper(lambda f: jax.vmap(f, in_axes=(None, 0, 0)), "batch"),
    "remat": Wrapper(jax.checkpoint),
    "cond": Wrapper(conditional),
    "shard_map": Wrapper(functools.partial(in_shard_map, checked=True), "batch", AxisType.Auto),
    "shard_map unchecked": Wrapper(
        functools.partial(in_shard_map, checked=False), "batch", AxisType.Auto
    ),
    "GSPMD": Wrapper(
        functools.partial(sharded, place=jax.lax.with_sharding_constraint), mesh=AxisType.Auto
    ),
    "explicit": Wrapper(functools.partial(sharded, place=jax.reshard), mesh=AxisType.Explicit),
}
SHARD_MAPS = ("shard_map", "shard_map unchecked")
# Those that make no sense, and why.
LEFT_OUT = {
    **{
        (outer, inner): "an axis that is manual already can't become so again"
        for outer in SHARD_MAPS
        for inner in SHARD_MAPS
    },
    ("GSPMD", "explicit"): "a mesh's axis is of one kind",
    ("explicit", "GSPMD"): "a mesh's axis is of one kind",
}
PAIRS = [
    (outer, inner) for outer in WRAPPERS for inner in WRAPPERS if (outer, inner) not in LEFT_OUT
]
# Under vmap a conditional on values of the batch becomes a select, of its operands too: the weights
# it reads are not weights only.
BY_RULE = {("vmap", "cond")}
# Each once outside and once inside; the others are slow.
COVERING = {
    ("jit", "scan stacked"),
    ("scan stacked", "vmap"),
    ("scan shared", "cond"),
    ("vmap", "scan shared"),
    ("remat", "shard_map"),
    ("cond", "remat"),
    ("shard_map", "jit"),
    ("shard_map unchecked", "explicit"),
    ("explicit", "shard_map unchecked"),
    ("GSPMD", "GSPMD"),
}


def test_the_default_suite_has_each_wrapper_outside_and_inside():
    assert {outer for outer, _ in COVERING} == {inner for _, inner in COVERING} == set(
        WRAPPERS
    ) and COVERING <= set(PAIRS)
    assert len(PAIRS) + len(LEFT_OUT) == len(WRAPPERS) ** 2


def composed(*names):
    """The function, its arguments, which axes of `eps` are not of stacked layers, and its mesh."""
    f, w, x, eps, kinds = layer, (WIDTH, WIDTH), (BATCH, WIDTH), (BATCH, WIDTH), []
    for name in reversed(names):
        f, adds = WRAPPERS[name].wrap(f), WRAPPERS[name].adds
        w, x = (TIMES, *w) if adds == "layers" else w, (TIMES, *x) if adds == "batch" else x
        eps, kinds = (TIMES, *eps) if adds else eps, [adds, *kinds] if adds else kinds
    merged = tuple(i for i, kind in enumerate((*kinds, "", "")) if kind != "layers")
    keys = jax.random.split(jax.random.key(1), 3)
    # All of different sizes, so that a merge by anything else than max shows.
    size = lambda key, shape: jnp.exp2(
        jax.random.uniform(key, (*shape[:-2], 1, 1), minval=-1.0, maxval=1.0)
    )
    w = jax.random.normal(keys[0], w) * size(keys[1], w) / 3
    x = jax.random.normal(keys[2], x) * size(keys[0], x)
    kinds_of_mesh = {WRAPPERS[name].mesh for name in names} - {None}
    mesh = (
        mesh_of(AxisType.Explicit if AxisType.Explicit in kinds_of_mesh else AxisType.Auto)
        if kinds_of_mesh
        else None
    )
    return f, (w, x, jnp.zeros(eps)), merged, mesh


def loss_of(f):
    def loss(w, x, eps):
        y, seen = f(w, x, eps)
        return jnp.square(y).sum(), seen

    return loss


def assert_true_amaxes(node, w, seen, gradient, merged):
    """By NumPy, from what each product read and received."""
    w, seen, gradient = (np.abs(np.asarray(array)) for array in (w, seen, gradient))
    for got, want in (
        (node.lhs, seen.max(merged)),
        (node.rhs, w.max((-2, -1))),
        (node.grad, gradient.max(merged)),
    ):
        np.testing.assert_array_equal(got, want)
        assert (np.asarray(got) > 0).all()
    assert bool(seal_fits(jnp.stack([node.lhs, node.rhs, node.grad], -1), node.seal).all())


def in_mesh(mesh):
    return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)


@pytest.mark.parametrize(
    ("outer", "inner"),
    [
        pytest.param(
            *pair, id=" of ".join(pair), marks=[] if pair in COVERING else [pytest.mark.slow]
        )
        for pair in PAIRS
    ],
)
def test_of_two(outer, inner):
    f, arguments, merged, mesh = composed(outer, inner)
    with in_mesh(mesh):
        recipe = fp8jax.recipes.delayed()
        fp8_fn = fp8jax.fp8(loss_of(f), recipe)
        if (outer, inner) in BY_RULE:
            (site,) = fp8_fn.explain(*arguments).sites
            assert not site.selected and "no operand is of weights" in site.reason
            fp8_fn = fp8jax.fp8(loss_of(f), recipe, [fp8jax.Rule(".*", recipe)])
        scales = jax.tree.map(
            lambda leaf: jnp.zeros(leaf.shape), jax.eval_shape(fp8_fn.init, *arguments)
        )
        (loss, seen), (observed, gradient) = jit(
            jax.value_and_grad(fp8_fn, argnums=(0, 3), has_aux=True)
        )(scales, *arguments)
        (node,) = observed.values()
        assert_true_amaxes(node, arguments[0], seen, gradient, merged)
        plain = jit(f)(*arguments)[0]
        assert 1e-5 < abs(loss - jnp.square(plain).sum()) / loss < 0.2


@pytest.mark.parametrize(
    "inner",
    [
        pytest.param(name, marks=[] if name == "scan shared" else [pytest.mark.slow])
        for name in WRAPPERS
        if ("shard_map", name) not in LEFT_OUT
    ],
)
def test_gradient_inside_of_shard_map(inner):
    f, (w, x, eps), merged, mesh = composed("shard_map", inner)
    f = composed(inner)[0]
    with in_mesh(mesh):
        fp8_fn = fp8jax.fp8(loss_of(f), fp8jax.recipes.delayed())
        scales = jax.tree.map(
            lambda leaf: jnp.zeros(leaf.shape), jax.eval_shape(fp8_fn.init, w, x[0], eps[0])
        )

        def step(scales, w, x, eps):
            (observed, gradient), seen = jax.grad(fp8_fn, argnums=(0, 3), has_aux=True)(
                scales, w, x[0], eps[0]
            )
            return observed, gradient[None], seen[None]

        data = P("data")
        observed, gradient, seen = jit(
            jax.shard_map(
                step,
                in_specs=(P(), P(), data, data),
                out_specs=(P(), data, data),
                axis_names={"data"},
            )
        )(scales, w, x, eps)
        (node,) = observed.values()
        assert_true_amaxes(node, w, seen, gradient, merged)
