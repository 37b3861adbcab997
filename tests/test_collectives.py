"""What devices send each other in a training step under FSDP: weights as FP8 codes, and amaxes in
few collectives.
"""

from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from compile_only import compile_for, exchanges, h200_mesh, tpu_mesh
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import fp8jax
from fp8jax._observe import seal_fits

LAYERS = 3


def f32(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def loss_of(layers):
    """The loss of a residual MLP in bfloat16, its parameters in float32, its layers scanned where
    they are stacked.
    """

    def product(x, w, name):
        with jax.named_scope(name):
            y = jnp.einsum("btw,wo->bto", x, w.astype(jnp.bfloat16))
            return jax.lax.with_sharding_constraint(y, P("data"))

    def layer(x, w):
        wide = x.astype(jnp.float32)
        h = (wide * jax.lax.rsqrt(jnp.square(wide).mean(-1, keepdims=True) + 1e-6)).astype(
            jnp.bfloat16
        )
        return x + product(jax.nn.gelu(product(h, w["up"], "up")), w["down"], "down"), None

    def loss(params, x, y):
        x = x.astype(jnp.bfloat16)
        if layers == "scanned":
            x, _ = jax.lax.scan(layer, x, params["layers"])
        else:
            for w in params["layers"]:
                x, _ = layer(x, w)
        return jnp.square(product(x, params["head"], "head").astype(jnp.float32) - y).mean()

    return loss


def step_of(loss, tx):
    def step(state, optimizer, x, y):
        value, gradients = jax.value_and_grad(lambda s: loss(s["scales"], s["params"], x, y))(state)
        updates, optimizer = tx.update(gradients, optimizer, state)
        return optax.apply_updates(state, updates), optimizer, value

    return step


@jax.numpy_dtype_promotion("standard")  # for optax
def compile_step(mesh, layers, recipe, number=LAYERS, width=1024):
    """An FSDP step, each matrix divided over all devices by its last axis but one, as text;
    unquantized without a recipe.
    """
    loss, tx = loss_of(layers), fp8jax.with_delayed_scaling(optax.adam(1e-3))
    fp8_loss = fp8jax.fp8(loss, recipe) if recipe else lambda scales, *args: loss(*args)
    shapes = {"up": (width, 4 * width), "down": (4 * width, width)}
    stacked = {name: f32(number, *shape) for name, shape in shapes.items()}
    one = {name: f32(*shape) for name, shape in shapes.items()}
    params = {
        "layers": stacked if layers == "scanned" else [one] * number,
        "head": f32(width, width),
    }
    x = y = f32(mesh.size, 256, width)

    def place(tree):
        def of(path, leaf):
            divided = leaf.ndim > 1 and any(getattr(key, "key", None) == "params" for key in path)
            spec = P(*(None,) * (leaf.ndim - 2), "data") if divided else P()
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

        return jax.tree_util.tree_map_with_path(of, tree)

    with jax.set_mesh(mesh):
        state = {
            "params": params,
            "scales": jax.eval_shape(fp8_loss.init, params, x, y) if recipe else {},
        }
        optimizer = place(jax.eval_shape(tx.init, state))
        state = place(state)
        batch = (
            jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=NamedSharding(mesh, P("data")))
            for a in (x, y)
        )
        out = jax.tree.map(lambda leaf: leaf.sharding, (state, optimizer))
        return compile_for(
            mesh,
            step_of(fp8_loss, tx),
            state,
            optimizer,
            *batch,
            donate_argnums=(0, 1),
            out_shardings=(*out, None),
        ).as_text()


def all_reduces(found):
    return sum(exchange.runs for exchange in found if exchange.kind == "all-reduce")


def elements_read(layers, number=LAYERS):
    """Of all weights; those of scanned layers are gathered by each of the two scans, others once
    for both passes.
    """
    return (2 if layers == "scanned" else 1) * number * 2 * 4 * 1024**2 + 1024**2


@pytest.mark.parametrize(
    "layers, gpus",
    [
        ("scanned", 8),
        ("unrolled", 8),
        ("scanned", 64),
        pytest.param("unrolled", 64, marks=pytest.mark.slow),
    ],
)
def test_weights_are_gathered_as_fp8_and_amaxes_merge_in_one_collective_on_h200s(layers, gpus):
    mesh = h200_mesh(gpus)
    fp8, wide = (
        exchanges(compile_step(mesh, layers, recipe)) for recipe in (fp8jax.recipes.delayed(), None)
    )
    gathered = {
        name: [e for e in found if e.kind == "all-gather"]
        for name, found in (("fp8", fp8), ("wide", wide))
    }
    assert {leaf.dtype for e in gathered["fp8"] for leaf in e.leaves} == {"f8e4m3fn"}
    assert {leaf.dtype for e in gathered["wide"] for leaf in e.leaves} == {"bf16"}
    assert (
        elements_read(layers)
        <= sum(e.bytes for e in gathered["fp8"])
        <= 0.51 * sum(e.bytes for e in gathered["wide"])
    )
    # Of all amaxes, as many with a hundred layers.
    assert all_reduces(fp8) <= all_reduces(wide) + 1


def moved_by_dtype(found):
    """The bytes that each device has after all collectives, by dtype."""
    moved = Counter()
    for e in found:
        for leaf in e.leaves:
            moved[leaf.dtype] += e.runs * leaf.bytes
    return moved


def test_the_same_on_64_tpus():
    """There XLA gathers by all-reduces of zeros and shards, four codes packed into a word; bfloat16
    is left to gradients.
    """
    mesh = tpu_mesh("v5p:4x4x4")
    fp8, wide = (
        exchanges(compile_step(mesh, "scanned", recipe))
        for recipe in (fp8jax.recipes.delayed(), None)
    )
    assert all_reduces(fp8) <= all_reduces(wide) + 1
    moved = [moved_by_dtype(fp8), moved_by_dtype(wide)]
    weights, gradients = elements_read("scanned"), 2 * elements_read("unrolled")
    assert moved[0]["u32"] == weights and moved[0]["bf16"] == gradients
    assert moved[1]["u32"] == 0 and moved[1]["bf16"] == 2 * weights + gradients
    assert all(
        by_dtype[dtype] < 1000 for by_dtype in moved for dtype in by_dtype.keys() - {"u32", "bf16"}
    )


@pytest.mark.slow
def test_unrolled_on_64_tpus():
    """XLA gathers most weights of a deep model once more for the backward pass, in either step, and
    several at a time.
    """
    mesh, number = tpu_mesh("v5p:4x4x4"), 12
    fp8, wide = (
        exchanges(compile_step(mesh, "unrolled", recipe, number))
        for recipe in (fp8jax.recipes.delayed(), None)
    )
    gradients = 2 * elements_read("unrolled", number)
    assert moved_by_dtype(fp8)["bf16"] == gradients
    gathered = moved_by_dtype(fp8)["u32"], moved_by_dtype(wide)["bf16"] - gradients
    print(f"gathered: {gathered[0] / gathered[1]:.3f} of the bytes")
    assert elements_read("unrolled", number) <= gathered[0] <= 0.55 * gathered[1]

    def reductions(found):
        return sum(
            "u32" not in {leaf.dtype for leaf in e.leaves}
            and "convert_element_type" not in e.op_name
            for e in found
        )

    assert reductions(fp8) == reductions(wide) + 1 == 4


# --------------------------------------------------------------------------------------------------
# on host devices


def small_loss(params, x):
    """A scan around a remat, a conditional and an inner scan; weights stacked, shared, and stacked
    twice.
    """

    def inner(x, w):
        return jnp.tanh(x @ w), None

    def layer(x, w):
        x = jax.checkpoint(lambda w, x: jnp.tanh(x @ w))(w["one"], x)
        x = jax.lax.cond(x.sum() > 0, lambda x: x @ params["shared"], jnp.sin, x)
        return jax.lax.scan(inner, x, w["two"])[0], None

    return jnp.square(jax.lax.scan(layer, x, params["stacked"])[0] @ params["last"]).sum()


def small_arrays(rows):
    keys = jax.random.split(jax.random.key(0), 5)
    params = {
        "stacked": {
            "one": jax.random.normal(keys[0], (3, 16, 16)),
            "two": jax.random.normal(keys[1], (3, 2, 16, 16)),
        },
        "shared": jax.random.normal(keys[2], (16, 16)),
        "last": jax.random.normal(keys[3], (16, 8)),
    }
    return params, jax.random.normal(keys[4], (rows, 16)) * jnp.geomspace(0.1, 3.0, rows)[:, None]


@pytest.mark.parametrize(
    "rows",
    [pytest.param(rows, marks=pytest.mark.slow) for rows in (16, 12)],
    ids=["rows that devices divide", "rows that they don't"],
)
def test_a_mesh_at_hand_changes_no_observation(rows):
    fp8_loss, (params, x) = fp8jax.fp8(small_loss, fp8jax.recipes.delayed()), small_arrays(rows)
    scales = fp8_loss.init(params, x)
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    want = jax.jit(jax.value_and_grad(fp8_loss, argnums=(0, 1)))(scales, params, x)
    want_seen = fp8_loss.observe(scales, params, x)[1]
    with jax.set_mesh(mesh):
        placed = jax.device_put(x, NamedSharding(mesh, P("data" if rows % 4 == 0 else None)))
        got = jax.jit(jax.value_and_grad(fp8_loss, argnums=(0, 1)))(scales, params, placed)
        got_seen = fp8_loss.observe(scales, params, placed)[1]
    assert len(got[1][0]) == 4
    for ours, theirs in ((got, want), (got_seen, want_seen)):
        assert jax.tree.structure(ours) == jax.tree.structure(theirs)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), ours, theirs
        )
    for node in got[1][0].values():
        amaxes = jnp.stack([node.lhs, node.rhs, node.grad], -1)
        assert bool((amaxes > 0).any()) and bool(seal_fits(amaxes, node.seal).all())


@pytest.mark.thorough
@pytest.mark.parametrize("set_mesh", [True, False], ids=["mesh set", "mesh not set"])
def test_no_amax_is_exchanged_within_a_loop(set_mesh):
    """With the mesh at hand; without one, each iteration waits for some, which shows that they
    would be seen.
    """

    def loss(params, x):
        return jnp.square(jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params)[0]).sum()

    fp8_loss, mesh = (
        fp8jax.fp8(loss, fp8jax.recipes.delayed()),
        jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,)),
    )
    params, x = small_arrays(16)[0]["stacked"]["one"], small_arrays(16)[1]
    scales = fp8_loss.init(params, x)
    rows, everywhere = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())
    with jax.set_mesh(mesh) if set_mesh else jax.default_device(jax.devices()[0]):
        step = jax.jit(
            jax.grad(fp8_loss),
            in_shardings=(everywhere, everywhere, rows),
            out_shardings=everywhere,
        )
        found = exchanges(step.lower(scales, params, x).compile().as_text())
    within = [e for e in found if e.runs > 1 or "while" in e.op_name]
    assert bool(within) != set_mesh
    assert [e.kind for e in found] == [
        "all-reduce"
    ] or not set_mesh  # and no weight is divided and gathered for it
