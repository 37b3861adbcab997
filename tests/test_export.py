"""`jax.export`: quantized functions with their scales, written, read and called."""

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from tiers import thorough_but

import fp8jax
from fp8jax import SiteScales, recipes

X = jax.random.normal(jax.random.key(0), (4, 8))
PARAMS = {
    "up": jax.random.normal(jax.random.key(1), (8, 16)),
    "down": jax.random.normal(jax.random.key(2), (16, 8)),
}

# Where codes must lie in memory in a certain order, on GPUs and for weights' gradients on CPUs, a
# call says so that JAX gives no guarantee of compatibility for.
LAYOUT = [jax.export.DisabledSafetyCheck.custom_call("LayoutConstraint")]


def loss(params, x):
    return jnp.square(jax.nn.relu(x @ params["up"]) @ params["down"]).mean()


def written_and_read(fn, *args, **options):
    return jax.export.deserialize(
        jax.export.export(jax.jit(fn), **options)(*args).serialize(vjp_order=0)
    )


def test_an_exported_function_gives_the_same_bits_with_other_scales_too():
    fp8_loss = fp8jax.fp8(loss, recipes.delayed())
    scales = fp8_loss.init(PARAMS, X)
    step = jax.value_and_grad(fp8_loss, argnums=(0, 1))
    exported = written_and_read(step, scales, PARAMS, X, disabled_checks=LAYOUT)
    moved = jax.tree.map(lambda leaf: leaf - 3.0, scales)
    for given in (scales, moved):
        got, want = exported.call(given, PARAMS, X), jax.jit(step)(given, PARAMS, X)
        jax.tree.map(np.testing.assert_array_equal, got, want)
    assert isinstance(got[1][0]["up"], SiteScales) and got[1][0]["up"].site == "up"
    assert not jnp.array_equal(exported.call(scales, PARAMS, X)[0], got[0])
    with pytest.raises(ValueError, match="incompatible|structure|tree"):
        exported.call({"up": scales["up"]}, PARAMS, X)


def test_an_exported_function_has_a_gradient():
    fp8_loss = fp8jax.fp8(loss, recipes.delayed())
    scales = fp8_loss.init(PARAMS, X)
    exported = jax.export.deserialize(
        jax.export.export(jax.jit(fp8_loss), disabled_checks=LAYOUT)(scales, PARAMS, X).serialize(
            vjp_order=1
        )
    )
    got = jax.grad(exported.call, argnums=(0, 1))(scales, PARAMS, X)
    jax.tree.map(
        np.testing.assert_array_equal,
        got,
        jax.jit(jax.grad(fp8_loss, argnums=(0, 1)))(scales, PARAMS, X),
    )


def test_for_several_platforms_at_once():
    fp8_loss = fp8jax.fp8(loss, recipes.delayed(forward=fp8jax.E4M3, reduce=99.0))
    scales = fp8_loss.init(PARAMS, X)
    exported = written_and_read(
        fp8_loss, scales, PARAMS, X, platforms=("cpu", "cuda", "tpu"), disabled_checks=LAYOUT
    )
    assert exported.platforms == ("cpu", "cuda", "tpu")
    assert exported.call(scales, PARAMS, X) == jax.jit(fp8_loss)(scales, PARAMS, X)


def test_static_data_goes_there_and_back():
    for recipe in (recipes.delayed(reduce=99.9, interval=7), recipes.delayed(forward=fp8jax.E3M4)):
        node = SiteScales.zeros(
            "a/b#1", (recipe.delayed_casts[0], None, recipe.delayed_casts[2]), (2,)
        )
        read = written_and_read(lambda node: node, node).call(node)
        assert jax.tree.structure(read) == jax.tree.structure(node)


@pytest.mark.parametrize(
    "name", thorough_but({name: name for name in ("delayed", "blockwise", "rowwise")}, ["delayed"])
)
def test_an_exported_gradient_takes_batches_of_any_size(name):
    fp8_loss = fp8jax.fp8(loss, recipes.PRESETS[name]())
    scales = fp8_loss.init(PARAMS, X)
    (size,) = jax.export.symbolic_shape("size")
    like = jax.ShapeDtypeStruct((size, 8), X.dtype)
    step = jax.value_and_grad(fp8_loss, argnums=(0, 1))
    exported = written_and_read(step, scales, PARAMS, like, disabled_checks=LAYOUT)
    for x in (X, X[:3]):
        got, want = exported.call(scales, PARAMS, x), jax.jit(step)(scales, PARAMS, x)
        jax.tree.map(np.testing.assert_array_equal, got, want)
    assert f"{2 * 8 * 16 * 2} FLOPs" in str(fp8_loss.explain(PARAMS, like)).splitlines()[0]


@pytest.mark.thorough
def test_what_extents_that_are_left_open_do_to_options():
    def repeated(layers, x):
        for layer in layers:
            x = jax.nn.relu(x @ layer["up"]) @ layer["down"]
        return jnp.square(x).mean()

    like = jax.ShapeDtypeStruct((*jax.export.symbolic_shape("size"), 8), X.dtype)
    scanned = fp8jax.fp8(repeated, recipes.current(), scan_repeats=True)
    exported = written_and_read(scanned, {}, [PARAMS] * 3, like)
    np.testing.assert_allclose(
        exported.call({}, [PARAMS] * 3, X), scanned({}, [PARAMS] * 3, X), rtol=1e-6
    )
    small = 2 * 8 * 16  # operations of a row: that many there are at least
    enough = fp8jax.fp8(loss, recipes.current(), min_flops=small)
    assert written_and_read(enough, {}, PARAMS, like).call({}, PARAMS, X) == enough({}, PARAMS, X)
    unknown = fp8jax.fp8(loss, recipes.current(), min_flops=small + 1)
    with pytest.raises(
        ValueError, match=r"min_flops needs .* open at site 'up': float32\[size,8\]"
    ):
        unknown.explain(PARAMS, like)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_an_exported_function_takes_weights_that_are_held_as_codes(dtype):
    x, dense = X.astype(dtype), {name: leaf.astype(dtype) for name, leaf in PARAMS.items()}
    held = {
        "up": fp8jax.quantize(dense["up"], scaling=fp8jax.PerChannel(-1)),
        "down": fp8jax.quantize(dense["down"], scaling=fp8jax.BlockWise((8, 8))),
    }
    fn = fp8jax.fp8(lambda p, x: jnp.tanh(x @ p["up"]) @ p["down"], recipes.weight_only())
    exported = written_and_read(fn, {}, held, x)
    assert exported.in_tree == jax.tree.structure((({}, held, x), {}))
    got = exported.call({}, held, x)
    assert got.dtype == dtype and jnp.array_equal(got, jax.jit(fn)({}, held, x))
    boxed = held["up"].transpose().as_boxes()
    again = written_and_read(lambda q: q, boxed).call(boxed)
    assert jax.tree.structure(again) == jax.tree.structure(boxed)
