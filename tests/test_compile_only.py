"""What XLA makes of fp8jax for GPUs and TPUs, compiled on a machine that has none (see
`compile_only`).
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import pytest
from compile_only import (
    Gemms,
    collectives,
    compile_for,
    decoded_arrays,
    fp8_conversions,
    fp8_decodings,
    gemms,
    h200_mesh,
    place,
    temporary_bytes,
    tpu_mesh,
)

import fp8jax
from fp8jax import E4M3, E5M2, recipes

WIDTH, LAYERS, TOKENS = 512, 3, jax.ShapeDtypeStruct((8, 256), jnp.int32)


class Block(nn.Module):
    """Attention and an MLP, in bfloat16."""

    width: int
    head: int

    @nn.compact
    def __call__(self, x, _):
        def dense(features, name):
            return nn.Dense(features, use_bias=False, dtype=jnp.bfloat16, name=name)

        h = nn.LayerNorm(dtype=jnp.bfloat16)(x)
        query, key, value = (
            dense(self.width, name)(h).reshape(*h.shape[:-1], -1, self.head)
            for name in ("query", "key", "value")
        )
        attended = jax.nn.dot_product_attention(query, key, value, is_causal=True)
        x = x + dense(self.width, "out")(attended.reshape(h.shape))
        h = dense(4 * self.width, "up")(nn.LayerNorm(dtype=jnp.bfloat16)(x))
        return x + dense(self.width, "down")(nn.gelu(h)), None


class Transformer(nn.Module):
    remat: bool = False

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(WIDTH, WIDTH, dtype=jnp.bfloat16)(tokens)
        block = nn.remat(Block) if self.remat else Block
        x, _ = nn.scan(
            block, variable_axes={"params": 0}, split_rngs={"params": True}, length=LAYERS
        )(WIDTH, 64, name="layers")(x, None)
        return nn.Dense(WIDTH, use_bias=False, dtype=jnp.bfloat16, name="head")(x).astype(
            jnp.float32
        )


# Its value only adds to the residual stream, which no backward pass reads: under remat it is not
# computed again.
NOT_RECOMPUTED = {"layers/down"}


@jax.numpy_dtype_promotion("standard")  # Flax's LayerNorm needs it for bfloat16
def compile_step(mesh, model):
    """A training step, compiled: parameters on every device, the batch divided among them."""
    optimizer = fp8jax.with_delayed_scaling(optax.sgd(1e-3))
    variables = jax.eval_shape(model.init, jax.random.key(0), TOKENS)
    state = jax.eval_shape(optimizer.init, variables)

    def step(variables, state, tokens):
        def loss(variables):
            return optax.softmax_cross_entropy_with_integer_labels(
                model.apply(variables, tokens), tokens
            ).mean()

        value, grads = jax.value_and_grad(loss)(variables)
        updates, state = optimizer.update(grads, state, variables)
        return optax.apply_updates(variables, updates), state, value

    compiled = compile_for(
        mesh,
        step,
        place(mesh, variables),
        place(mesh, state),
        place(mesh, TOKENS, "data"),
        donate_argnums=(0, 1),
    )
    return compiled, model.explain(variables, TOKENS).sites


@pytest.mark.parametrize(
    ("name", "remat", "gpus"),
    [
        # Each is half a minute; the default recipe in all ways, the others in one.
        pytest.param(
            name,
            remat,
            gpus,
            marks=[] if name == "delayed" or (remat, gpus) == (False, 1) else pytest.mark.slow,
            id=f"{name}-{'remat' if remat else 'kept'}-{gpus}",
        )
        for name in ("delayed", "current", "rowwise")
        for remat in (False, True)
        for gpus in (1, 8)
    ],
)
def test_every_product_of_a_selected_site_is_an_fp8_gemm_on_h200(name, remat, gpus):
    compiled, sites = compile_step(
        h200_mesh(gpus), fp8jax.linen.Fp8(Transformer(remat), getattr(recipes, name)())
    )
    text = compiled.as_text()
    assert len(sites) == 9

    def calls(sites):
        # Forward, dlhs and drhs; in rematerialized layers, forward once more where the backward
        # pass reads the value.
        recomputed = (
            sum(bool(site.loops) and site.name not in NOT_RECOMPUTED for site in sites)
            if remat
            else 0
        )
        return 3 * len(sites) + recomputed

    fp8 = [site for site in sites if site.selected]
    other = [site for site in sites if not site.selected]  # attention's two
    assert len(fp8) == 7
    assert gemms(text) == Gemms(calls(fp8), calls(other))
    report = fp8jax.hlo.report(compiled)
    assert (
        len(report.products) == calls(fp8)
        and len(report.others) == calls(other)
        and not report.fallen_back
    )
    assert {(one.site, one.product) for one in report.products} == {
        (site.name, product) for site in fp8 for product in ("forward", "dlhs", "drhs")
    }
    assert not fp8_decodings(text)
    assert bool(collectives(text)) == (gpus > 1)


@pytest.mark.parametrize(
    "dtype", [jnp.float32, jnp.bfloat16, jnp.float16], ids=lambda dtype: dtype.__name__
)
@pytest.mark.parametrize(
    "recipe",
    [recipes.delayed(), recipes.current(), recipes.rowwise()],
    ids=lambda recipe: recipe.name,
)
def test_plain_function_on_h200(recipe, dtype):
    mesh = h200_mesh()

    def loss(params, x):
        return jnp.square(jnp.tanh(x @ params["first"]) @ params["second"]).mean(dtype=jnp.float32)

    params = {name: jax.ShapeDtypeStruct((1024, 1024), dtype) for name in ("first", "second")}
    x = jax.ShapeDtypeStruct((512, 1024), dtype)
    fp8_loss = fp8jax.fp8(loss, recipe)
    scales = jax.eval_shape(fp8_loss.init, params, x)
    text = compile_for(
        mesh, jax.grad(fp8_loss, argnums=(0, 1)), *place(mesh, (scales, params, x))
    ).as_text()
    assert gemms(text) == Gemms(fp8=2 * 3 - 1, other=0)  # nothing asks for the gradient of x
    assert fp8_conversions(text) and not fp8_decodings(text)


def test_a_step_that_scales_before_its_products_is_caught(monkeypatch):
    monkeypatch.setattr("fp8jax.ops._cast.Codes.is_separable", lambda self, contracted: False)
    mesh = h200_mesh()
    params, x = (
        jax.ShapeDtypeStruct((512, 512), jnp.bfloat16),
        jax.ShapeDtypeStruct((256, 512), jnp.bfloat16),
    )
    fp8_loss = fp8jax.fp8(lambda w, x: jnp.square(x @ w).mean(dtype=jnp.float32), recipes.current())
    compiled = compile_for(mesh, jax.grad(fp8_loss, argnums=1), *place(mesh, ({}, params, x)))
    report = fp8jax.hlo.report(compiled)
    assert len(report.products) == 2 and report.fallen_back == report.products


def scaled_after(lhs, rhs, scale):
    return multiply(lhs, rhs) * scale.astype(jnp.bfloat16)


def scaled_by_rows_before(lhs, rhs, scale):
    return multiply(lhs.astype(jnp.bfloat16) * scale.astype(jnp.bfloat16), rhs.astype(jnp.bfloat16))


def multiply(lhs, rhs):
    return jax.lax.dot_general(
        lhs, rhs, (((1,), (0,)), ((), ())), preferred_element_type=jnp.bfloat16
    )


@pytest.mark.parametrize(
    "product, lhs_format, rhs_format, expected",
    [
        (scaled_after, E4M3, E4M3, Gemms(1, 0)),
        (scaled_after, E4M3, E5M2, Gemms(1, 0)),
        (scaled_by_rows_before, E4M3, E4M3, Gemms(0, 1)),
        (scaled_after, E5M2, E5M2, Gemms(0, 1)),
    ],
    ids=["sound", "sound-mixed", "scaled-before", "e5m2-by-e5m2"],
)
def test_a_product_that_falls_back_is_seen(product, lhs_format, rhs_format, expected):
    mesh = h200_mesh()
    lhs, rhs = (jax.ShapeDtypeStruct((512, 512), fmt.dtype) for fmt in (lhs_format, rhs_format))
    compiled = compile_for(
        mesh, product, *place(mesh, (lhs, rhs, jax.ShapeDtypeStruct((512, 1), jnp.float32)))
    )
    assert gemms(compiled.as_text()) == expected


@pytest.mark.parametrize(
    "recipe",
    [recipes.delayed(execution="emulated"), recipes.delayed(forward=E5M2)],
    ids=["emulated", "e5m2-by-e5m2"],
)
def test_an_emulated_execution_is_no_fp8_gemm(recipe):
    mesh = h200_mesh()
    function = fp8jax.fp8(jnp.matmul, recipe, weights=1)
    x, w = (jax.ShapeDtypeStruct((512, 512), jnp.bfloat16) for _ in range(2))
    scales = jax.eval_shape(function.init, x, w)
    assert gemms(compile_for(mesh, function, *place(mesh, (scales, x, w))).as_text()) == Gemms(0, 1)


@pytest.mark.parametrize("topology", ["v6e:2x2", "tpu7x:2x2x1"])
def test_step_compiles_for_tpus(topology):
    compiled, _ = compile_step(
        tpu_mesh(topology), fp8jax.linen.Fp8(Transformer(), recipes.delayed())
    )
    text = compiled.as_text()
    assert " f8e4m3fn[" in text and " f8e5m2[" in text
    assert collectives(text)
    assert temporary_bytes(compiled) > 0
    assert not fp8jax.hlo.report(compiled).fallen_back
    assert not decoded_arrays(text, at_least=WIDTH * WIDTH)


def test_a_decoded_copy_of_codes_is_seen():
    mesh = tpu_mesh("v6e:2x2")
    compiled = compile_for(
        mesh, fp8jax.decode, place(mesh, jax.ShapeDtypeStruct((512, 512), E4M3.dtype))
    )
    assert len(decoded_arrays(compiled.as_text(), at_least=512 * 512)) == 1


FORMATS = pytest.mark.parametrize("fmt", fp8jax.FORMATS.values(), ids=lambda fmt: fmt.name)


@FORMATS
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=lambda dtype: dtype.__name__)
def test_codec_is_integer_bits_on_h200(fmt, dtype):
    mesh = h200_mesh()
    values, codes = (jax.ShapeDtypeStruct((64, 512), of) for of in (dtype, fmt.dtype))
    for function, argument in (
        (lambda x: fp8jax.encode(x, fmt), values),
        (lambda x: fp8jax.decode(x, dtype=dtype), codes),
    ):
        text = compile_for(mesh, function, place(mesh, argument)).as_text()
        assert "u8[64,512]" in text
        assert not fp8_conversions(text)


@FORMATS
def test_codec_is_the_same_program_on_every_platform(fmt):
    traced = jax.jit(lambda x: fp8jax.decode(fp8jax.encode(x, fmt))).trace(
        jax.ShapeDtypeStruct((64, 512), jnp.float32)
    )
    cpu, cuda, tpu = (
        traced.lower(lowering_platforms=(platform,)).as_text()
        for platform in ("cpu", "cuda", "tpu")
    )
    assert cpu == cuda == tpu


def test_a_conversion_that_is_not_by_bits_is_seen():
    mesh = h200_mesh()
    values, codes = (jax.ShapeDtypeStruct((64, 512), dtype) for dtype in (jnp.float32, E4M3.dtype))
    for argument, dtype in ((values, codes.dtype), (codes, values.dtype)):
        compiled = compile_for(mesh, lambda x, dtype=dtype: x.astype(dtype), place(mesh, argument))
        assert len(fp8_conversions(compiled.as_text())) == 1
