"""Weights held as codes stand for the dtype that was quantized: to functions, modules, caches,
checkpoints.
"""

import pickle

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx, serialization
from tiers import thorough_but

import fp8jax
from fp8jax import (
    BlockWise,
    Fp8Tensor,
    PerChannel,
    PerTensor,
    PerToken,
    WeightRule,
    dequantize_params,
    fp8,
    kv_cache,
    quantize,
    quantize_params,
    recipes,
)
from fp8jax._params import abstract_params

RNG = np.random.default_rng(0)
DTYPES = [jnp.float32, jnp.bfloat16, jnp.float16]
RECIPES = {"weights alone": recipes.weight_only(), "per token": recipes.rowwise()}
RULE = [WeightRule(".*(kernel|w|v)", PerChannel(-1))]


def normal(*shape, dtype=jnp.float32):
    return jnp.asarray(RNG.normal(size=shape), dtype)


def close(got, want, dtype):
    """As near as two ways to round sums of values in `dtype`, and not the same as without FP8."""
    tolerance = 4 * float(jnp.finfo(dtype).eps) + 1e-5
    np.testing.assert_allclose(
        np.float64(got), np.float64(want), atol=tolerance * np.abs(np.float64(want)).max()
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_tensor_stands_for_what_was_quantized(dtype):
    x = normal(4, 8, dtype=dtype)
    for q in (
        quantize(x),
        jax.jit(lambda x: quantize(x, scaling=PerToken()))(x),
        jax.vmap(lambda row: quantize(row, scaling=BlockWise(4)))(x),
        jax.eval_shape(quantize, x),
        jax.jit(lambda q: q)(quantize(x)),
    ):
        assert isinstance(q.dtype, np.dtype) and q.dtype == dtype
    q = quantize(x)
    assert q.dequantize().dtype == dtype
    assert jnp.array_equal(q.dequantize(), q.dequantize(jnp.float32).astype(dtype))
    assert jax.grad(lambda x: quantize(x).dequantize().sum())(x).dtype == dtype
    assert q.astype(jnp.float32).dequantize().dtype == jnp.float32
    assert Fp8Tensor(q.data, q.scale, q.format, q.scaling).dtype == jnp.float32
    tree = {"kernel": x, "step": jnp.int32(3)}
    held = quantize_params(tree, [WeightRule("kernel")])
    assert abstract_params(held)["kernel"] == jax.ShapeDtypeStruct(x.shape, dtype)
    assert dequantize_params(held)["kernel"].dtype == dtype
    assert dequantize_params(held, jnp.float32)["kernel"].dtype == jnp.float32


def test_trees_that_stand_for_other_dtypes_are_no_equals():
    one, other = quantize(jnp.ones(4, jnp.bfloat16)), quantize(jnp.ones(4))
    assert jax.tree.structure(one) != jax.tree.structure(other)
    assert jax.tree.structure(one) == jax.tree.structure(other.astype("bfloat16"))
    with pytest.raises(ValueError, match="pytree"):
        jax.tree.map(jnp.add, one, other)
    with pytest.raises(TypeError, match="dtype must be float32, .*; got int8"):
        one.astype(jnp.int8)
    calls = 0

    @jax.jit
    def count(q):
        nonlocal calls
        calls += 1
        return q.dequantize()

    assert [count(q).dtype for q in (one, other, one)] == [jnp.bfloat16, jnp.float32, jnp.bfloat16]
    assert calls == 2


@pytest.mark.thorough
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_a_cache_and_a_carry_of_the_model_s_dtype(recipe, dtype):
    """What a function does with a product must not depend on how its weight is held."""
    params = {"w": normal(8, 8, dtype=dtype), "v": normal(3, 8, 8, dtype=dtype)}
    x, cache = normal(2, 8, dtype=dtype), jnp.zeros((2, 4, 8), dtype)

    def step(p, cache, x):
        assert p["w"].dtype == p["v"].dtype == dtype
        cache = jax.lax.dynamic_update_slice(cache, (x @ p["w"])[:, None], (0, 1, 0))
        carry, _ = jax.lax.scan(lambda h, w: (jnp.tanh(h @ w.T), None), x, p["v"])
        carry = jax.lax.fori_loop(0, 2, lambda _, h: h @ p["w"], carry)
        return cache, jax.lax.cond(x[0, 0] > 9, lambda h: h, lambda h: h @ p["w"], carry)

    held = quantize_params(params, [WeightRule("w", PerChannel(-1)), WeightRule("v", stacked=1)])
    got = jax.jit(fp8(step, recipe))({}, held, cache, x)
    want = jax.jit(fp8(step, recipe))({}, dequantize_params(held), cache, x)
    for a, b in zip(got, want):
        assert a.dtype == b.dtype == dtype
        close(a, b, dtype)


class Layer(nn.Module):
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x, _):
        return x + nn.tanh(nn.Dense(8, param_dtype=self.dtype, name="mlp")(x)), None


class Stack(nn.Module):
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(8, param_dtype=self.dtype, name="first")(x)
        layers = nn.scan(Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        return layers(self.dtype, name="layers")(x, None)[0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("recipe", thorough_but(RECIPES, ["per token"]))
def test_a_linen_model_keeps_its_dtype(recipe, dtype):
    x, module = normal(4, 8, dtype=dtype), Stack(dtype)
    params = module.init(jax.random.key(0), x)["params"]
    rules = [WeightRule("first/kernel", PerChannel(-1)), WeightRule("layers.*kernel", stacked=1)]
    held = quantize_params(params, rules)
    model = fp8jax.linen.Fp8(module, recipe)
    got = jax.jit(model.apply)({"params": held}, x)
    want = jax.jit(model.apply)({"params": dequantize_params(held)}, x)
    assert got.dtype == want.dtype == dtype
    close(got, want, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_nnx_model_keeps_its_dtype(dtype):
    x = normal(4, 8, dtype=dtype)
    make = lambda: nnx.Linear(8, 8, param_dtype=dtype, rngs=nnx.Rngs(0))
    model, dense = (fp8jax.nnx.Fp8(make(), recipes.weight_only()) for _ in range(2))
    held = quantize_params(nnx.state(model.module, nnx.Param), RULE)
    nnx.update(model.module, held)
    nnx.update(dense.module, dequantize_params(held))
    got, want = (nnx.jit(lambda model, x: model(x))(m, x) for m in (model, dense))
    assert got.dtype == want.dtype == dtype
    close(got, want, dtype)


def test_a_key_value_cache_gives_back_what_it_was_made_for():
    new = normal(2, 3, 1, 4, dtype=jnp.bfloat16)
    for format in ("E4M3", None):
        cache = kv_cache.init(2, 5, heads=1, width=4, format=format, dtype=jnp.bfloat16)
        filled = jax.jit(kv_cache.append)(cache, new, new)
        assert jax.tree.structure(filled) == jax.tree.structure(cache)
        assert [x.dtype for x in kv_cache.read(filled)] == [jnp.bfloat16] * 2
        assert kv_cache.read(filled, jnp.float32)[0].dtype == jnp.float32


def test_what_was_written_before_is_read_into_the_dtype_of_the_target(tmp_path):
    """State dicts, bytes and Orbax hold the two arrays alone, as ever; old pickles stand for
    float32, as they did.
    """
    q = quantize(normal(4, 8, dtype=jnp.bfloat16), scaling=PerToken())
    assert list(serialization.to_state_dict(q)) == ["data", "scale"]
    written = serialization.to_bytes({"data": q.data, "scale": q.scale})  # of any version
    ocp.PyTreeCheckpointer().save(tmp_path / "q", {"w": q})
    for dtype in (jnp.bfloat16, jnp.float32):
        like = q.astype(dtype)
        args = ocp.checkpoint_utils.construct_restore_args({"w": like})
        for got in (
            serialization.from_bytes(like, written),
            ocp.PyTreeCheckpointer().restore(tmp_path / "q", item={"w": like}, restore_args=args)[
                "w"
            ],
        ):
            assert jax.tree.structure(got) == jax.tree.structure(like)
            assert jnp.array_equal(got.dequantize(), q.dequantize(jnp.float32).astype(dtype))
    assert pickle.loads(pickle.dumps(q)).dtype == jnp.bfloat16
    old = object.__new__(Fp8Tensor)
    fields = {name: getattr(q, name) for name in ("data", "scale", "format", "scaling")}
    old.__dict__.update(fields)  # as unpickling does
    assert np.dtype(old.dtype) == jnp.float32
    assert old.dequantize().dtype == jnp.float32
    assert dequantize_params({"w": old})["w"].dtype == jnp.float32


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_checkpoint_files_are_read_into_the_dtype_of_the_target(tmp_path, dtype):
    params = {"up": {"kernel": normal(16, 32, dtype=dtype)}}
    held = quantize_params(params, RULE)
    fp8jax.interop.write_checkpoint(tmp_path / "model", held)
    for like in (params, held):
        read = fp8jax.interop.read_checkpoint(tmp_path / "model", like).params
        assert jax.tree.structure(read) == jax.tree.structure(held)
        jax.tree.map(np.testing.assert_array_equal, read, held)
    with pytest.raises(ValueError, match="must be int32; got FP8 codes"):
        fp8jax.interop.read_checkpoint(
            tmp_path / "model", {"up": {"kernel": jnp.zeros((16, 32), jnp.int32)}}
        )


# --------------------------------------------------------------------------------------------------
# axes of a quantized array

LAYOUTS = {
    "tensor": PerTensor(),
    "channels": PerChannel(-1),
    "rows": PerToken(),
    "blocks": BlockWise((2, 4)),
}


@pytest.mark.parametrize("scaling", LAYOUTS.values(), ids=LAYOUTS)
def test_axes_change_as_those_of_the_values(scaling):
    x = normal(3, 4, 12) * jnp.exp2(jnp.arange(12.0) - 6).reshape(1, 1, 12)
    make = lambda x: quantize(x, scaling=scaling)

    def changes(one, stacked):
        return (
            one.reshape(2, 2, 12),
            one.reshape((2, -1, 12)),
            one.reshape(4, 1, 12).transpose(2, 1, 0),
            one.transpose(),
            one.transpose((1, 0)).reshape(3, 4, 4),
            stacked.reshape(3, 2, 2, 12),
            stacked.transpose((1, 0, 2)),
            stacked.transpose(0, -1, 1),
        )

    one, stacked = make(x[0]), jax.vmap(make)(x)
    got = jax.jit(changes)(one, stacked)
    for q, want in zip(got, changes(one.dequantize(), stacked.dequantize()), strict=True):
        np.testing.assert_array_equal(q.dequantize(), want)
        assert q.nbytes in (one.nbytes, stacked.nbytes)


@pytest.mark.parametrize("layers", [(), (3,)])
def test_slices_are_those_of_the_values(layers):
    x = normal(*layers, 4, 12)
    for scaling in LAYOUTS.values():
        make = lambda x: quantize(x, scaling=scaling)
        q = (jax.vmap(make) if layers else make)(x)
        part = q.slice((0,) * len(layers) + (2, 4), layers + (4, 12))
        np.testing.assert_array_equal(part.dequantize(), q.dequantize()[..., 2:4, 4:12])
        for part, want in zip(q.split((4, 8), -1), jnp.split(q.dequantize(), [4], -1)):
            np.testing.assert_array_equal(part.dequantize(), want)
    whole = quantize(x, scaling=PerChannel(-1)).as_boxes()
    at = (jnp.int32(0),) * len(layers) + (jnp.int32(0), jnp.int32(3))
    part = jax.jit(lambda q, at: q.dynamic_slice(at, (*layers, 4, 2)))(whole, at)
    np.testing.assert_array_equal(part.dequantize(), whole.dequantize()[..., 3:5])
    assert part.as_bytes().data.dtype == jnp.uint8
    np.testing.assert_array_equal(part.as_bytes().dequantize(), part.dequantize())


def test_torn_groups_are_refused():
    q = quantize(normal(4, 12), scaling=BlockWise((2, 4)))
    for torn, text in (
        (lambda: q.slice((0, 2), (4, 8)), "it is sliced within a block of 4, from 2 to 8"),
        (lambda: q.split((6, 6), 1), "it is sliced within a block of 4, from 0 to 6"),
        (lambda: q.reshape(8, 6), r"it is reshaped to \[8, 6\], which tears the groups"),
        (lambda: q.dynamic_slice((0, 0), (4, 4)), "at a place that is known when it runs"),
    ):
        with pytest.raises(ValueError, match=f"must stay together.*{text}.*Dequantize it"):
            torn()
    with pytest.raises(TypeError, match="reshape"):
        q.reshape(5, 5)
