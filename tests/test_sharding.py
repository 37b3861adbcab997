"""Training under every common sharding of weights and activations is the training of one device."""

import contextlib
import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import fp8jax

BATCH, LENGTH, WIDTH, HIDDEN, LAYERS, OUT = 8, 8, 128, 256, 2, 64
STEPS = 20
RECIPES = {name: preset() for name, preset in sorted(fp8jax.recipes.PRESETS.items())}


WHOLE, BY_BATCH = P(None, None), P("data", None, None)


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where everything lies on a mesh of axes "data" and "model".

    Args:
      mesh: the sizes of the axes.
      up, down, head: of the weights, without the axis of layers.
      used: of the same three as their products read them: gathered along "data".
      stream, hidden: of the residual stream and of what is between up and down.
    """

    mesh: tuple[int, int]
    up: P = WHOLE
    down: P = WHOLE
    head: P = WHOLE
    used: tuple[P, P, P] = (WHOLE,) * 3
    stream: P = BY_BATCH
    hidden: P = BY_BATCH
    out: P = BY_BATCH


SPLIT = (P(None, "model"), P("model", None), P(None, "model"))
TENSOR = {"used": SPLIT, "hidden": P("data", None, "model"), "out": P("data", None, "model")}
LAYOUTS = {
    "DP": Layout((8, 1)),
    "FSDP": Layout((8, 1), P("data", None), P("data", None), P("data", None)),
    "TP": Layout((1, 8), *SPLIT, **TENSOR),
    "FSDP x TP": Layout(
        (4, 2), P("data", "model"), P("model", "data"), P("data", "model"), **TENSOR
    ),
    "sequence": Layout((4, 2), *SPLIT, **TENSOR | {"stream": P("data", "model", None)}),
}
AXES = {"automatic": AxisType.Auto, "explicit": AxisType.Explicit}


def arrays():
    """Parameters, and the inputs and targets of each step, of some spread; from NumPy, so that they
    are what they are.
    """
    draw = np.random.default_rng(0).normal
    params = {
        "up": draw(size=(LAYERS, WIDTH, HIDDEN)) * WIDTH**-0.5,
        "down": draw(size=(LAYERS, HIDDEN, WIDTH)) * HIDDEN**-0.5,
        "head": draw(size=(WIDTH, OUT)) * WIDTH**-0.5,
    }
    x = draw(size=(STEPS, BATCH, LENGTH, WIDTH)) * np.geomspace(0.1, 3, WIDTH)
    return jax.tree.map(np.float32, (params, x, draw(size=(STEPS, BATCH, LENGTH, OUT))))


def loss_of(layout: Layout | None, kind: AxisType):
    """The loss of a residual MLP whose layers are scanned; with a layout, that of its sharded
    program.
    """
    explicit = kind == AxisType.Explicit

    def place(x, spec):
        if layout is None:
            return x
        return (
            jax.sharding.reshard(x, spec) if explicit else jax.lax.with_sharding_constraint(x, spec)
        )

    def product(x, w, name, used, out):
        with jax.named_scope(name):
            if (
                explicit and layout is not None
            ):  # as types ask for; where axes are automatic, XLA finds it out
                return jnp.einsum("blw,wo->blo", x, jax.sharding.reshard(w, used), out_sharding=out)
            return place(jnp.einsum("blw,wo->blo", x, w), out)

    def loss(params, x, y):
        of = layout or Layout((1, 1))

        def block(x, w):
            h = x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-6)
            h = jnp.tanh(product(place(h, BY_BATCH), w["up"], "up", of.used[0], of.hidden))
            return x + product(h, w["down"], "down", of.used[1], of.stream), None

        x, _ = jax.lax.scan(block, x, {name: params[name] for name in ("up", "down")})
        out = product(place(x, BY_BATCH), params["head"], "head", of.used[2], of.out)
        return jnp.square(out - y).mean()

    return loss


@dataclasses.dataclass
class Run:
    """What a training went through: its losses, the first step's amaxes, the exponents after it,
    and the scales at last.
    """

    losses: np.ndarray
    amaxes: dict
    exponents: dict
    scales: dict


@functools.cache
def train(recipe, layout: Layout | None = None, kind: AxisType = AxisType.Auto) -> Run:
    """Twenty steps; of the plain function where there is no recipe."""
    loss = loss_of(layout, kind)
    fp8_loss = fp8jax.fp8(loss, recipe) if recipe else lambda scales, *args: loss(*args)
    tx = fp8jax.with_delayed_scaling(optax.adam(3e-4))
    params, x, y = arrays()
    with contextlib.ExitStack() as stack:
        stack.enter_context(jax.numpy_dtype_promotion("standard"))  # for optax
        if layout is not None:
            mesh = jax.make_mesh(layout.mesh, ("data", "model"), axis_types=(kind,) * 2)
            stack.enter_context(jax.set_mesh(mesh))
            specs = {"up": P(None, *layout.up), "down": P(None, *layout.down), "head": layout.head}
            params = {
                name: jax.device_put(value, NamedSharding(mesh, specs[name]))
                for name, value in params.items()
            }
            x, y = (
                jax.device_put(value, NamedSharding(mesh, P(None, *spec)))
                for value, spec in ((x, layout.stream), (y, layout.out))
            )
        # First scales are those of one device: so the first steps differ in nothing but where the
        # arrays are.
        state = {"scales": first_scales(recipe), "params": params}

        @jax.jit
        def step(state, opt_state, x, y):
            value, grads = jax.value_and_grad(
                lambda state: fp8_loss(state["scales"], state["params"], x, y)
            )(state)
            updates, opt_state = tx.update(grads, opt_state, state)
            return optax.apply_updates(state, updates), opt_state, value, grads["scales"]

        opt_state, losses, first = jax.jit(tx.init)(state), [], None
        for batch in zip(x, y, strict=True):
            state, opt_state, value, amaxes = step(state, opt_state, *batch)
            losses.append(value)
            first = first or jax.device_get((amaxes, state["scales"]))
    return Run(np.array(jax.device_get(losses)), *first, state["scales"])


@functools.cache
def first_scales(recipe):
    params, x, y = arrays()
    return (
        jax.device_get(fp8jax.fp8(loss_of(None, AxisType.Auto), recipe).init(params, x[0], y[0]))
        if recipe
        else {}
    )


def assert_same_first_step(got: Run, want: Run):
    """Each amax within 1e-5, each exponent equal unless its amax is that close to where exponents
    change.
    """
    assert got.amaxes.keys() == want.amaxes.keys()
    for site, node in want.amaxes.items():
        for operand, cast in zip(("lhs", "rhs", "grad"), node.casts, strict=True):
            if cast is None:
                continue
            amax, exponent = (
                np.asarray(getattr(tree[site], operand)) for tree in (want.amaxes, want.exponents)
            )
            assert (amax > 0).all()
            np.testing.assert_allclose(getattr(got.amaxes[site], operand), amax, rtol=1e-5)
            octave = np.log2(np.float64(amax) * cast.delayed.margin / cast.format.max)
            clear = np.abs(octave - np.round(octave)) > 1e-5 / np.log(2)
            assert clear.any()
            np.testing.assert_array_equal(
                np.asarray(getattr(got.exponents[site], operand))[clear], exponent[clear]
            )


def case(name, layout, axes):
    """Thorough, that which mixes everything, with the recipe that has most state."""
    quick = (name, layout, axes) == ("delayed", "FSDP x TP", "automatic")
    return pytest.param(
        name,
        LAYOUTS[layout],
        AXES[axes],
        id=f"{name}-{layout}-{axes}",
        marks=pytest.mark.thorough if quick else pytest.mark.slow,
    )


CASES = [case(*names) for names in itertools.product(RECIPES, LAYOUTS, AXES)]


@pytest.mark.parametrize("name, layout, kind", CASES)
def test_training_is_that_of_one_device(name, layout, kind):
    got, want = train(RECIPES[name], layout, kind), train(RECIPES[name])
    assert_same_first_step(got, want)
    np.testing.assert_allclose(got.losses, want.losses, rtol=1e-3)
    assert want.losses[-1] < 0.8 * want.losses[0]
    for leaf in jax.tree.leaves(got.scales):
        assert leaf.sharding.is_fully_replicated


@pytest.mark.thorough
def test_losses_tell_fp8_from_full_precision():
    """So that agreement within 1e-3 says something."""
    assert np.abs(train(RECIPES["delayed"]).losses / train(None).losses - 1).max() > 3e-3
