import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fp8jax._codec import decode, encode
from fp8jax._formats import E3M4, E4M3, E4M3FNUZ, E5M2, E8M0, FORMATS
from fp8jax._scaling import BlockWise, PerChannel, PerTensor, PerToken
from fp8jax._tensor import Fp8Tensor, dequantize, quantization_error, quantize

GRANULARITIES = [
    PerTensor(), PerChannel(-1), PerChannel((0, 2)), PerToken(), BlockWise(3),
    BlockWise((128, 128)), BlockWise((2, 2, 3)),
]  # fmt: skip
each_granularity = pytest.mark.parametrize("scaling", GRANULARITIES, ids=str)


def sample(shape=(4, 6, 8), seed=0, spread=3.0):
    """Normal values whose magnitudes differ from row to row."""
    rng = np.random.default_rng(seed)
    return (rng.normal(size=shape) * np.exp(spread * rng.normal(size=shape[:-1] + (1,)))).astype(
        np.float32
    )


def groups(array, scaling):
    """(slice, index of the group) for every group of an array."""
    blocks = [
        n or 1 if b is None else b
        for n, b in zip(array.shape, scaling.block(array.shape), strict=True)
    ]
    for i in np.ndindex(*(-(-n // b) for n, b in zip(array.shape, blocks, strict=True))):
        yield tuple(slice(k * b, (k + 1) * b) for k, b in zip(i, blocks, strict=True)), i


# Quantize


EVERY_FORMAT = [(scaling, E4M3) for scaling in GRANULARITIES]
EVERY_FORMAT += [(PerToken(), fmt) for fmt in FORMATS.values() if fmt.signed and fmt != E4M3]


@pytest.mark.parametrize("scaling, fmt", EVERY_FORMAT, ids=str)
def test_each_group_is_scaled_and_encoded_by_itself(scaling, fmt):
    """Against a direct computation in NumPy: so no block sees another one's elements."""
    x = sample()
    q = jax.jit(lambda x: quantize(x, fmt, scaling))(x)
    assert (
        q.data.dtype == fmt.dtype
        and q.scale.dtype == np.float32
        and q.scale.shape == scaling.group_shape(x.shape)
    )
    scales, codes = np.asarray(q.scale).ravel(), np.asarray(q.data).view(np.uint8)
    for (where, _), scale in zip(groups(x, scaling), scales, strict=True):
        exponent = np.ceil(
            np.log2(np.abs(x[where].astype(np.float64)).max() / fmt.max)
        )  # exact enough off the powers
        assert scale == 2.0**exponent
        with np.errstate(all="ignore"):
            np.testing.assert_array_equal(
                codes[where], (x[where] / scale).astype(fmt.dtype).view(np.uint8)
            )
    np.testing.assert_array_equal(q.dequantize(), _by_hand(q, x))


def _by_hand(q, x):
    values = np.array(decode(q.data))
    for (where, _), scale in zip(groups(x, q.scaling), np.asarray(q.scale).ravel(), strict=True):
        values[where] *= scale
    return values


@each_granularity
def test_exact_scales_use_the_whole_range(scaling):
    x = sample()
    q = quantize(x, E4M3, scaling, power_of_two=False)
    codes = np.abs(np.asarray(q.data).astype(np.float32))
    for where, _ in groups(x, scaling):
        assert codes[where].max() == 448
    np.testing.assert_allclose(q.dequantize(), x, atol=np.abs(x).max() / 28)
    np.testing.assert_array_equal(q.dequantize(), _by_hand(q, x))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, np.float16, np.float64])
def test_other_dtypes_are_scaled_in_float32_or_wider(dtype):
    with jax.enable_x64(True):
        x = jnp.asarray(sample(spread=1.0), dtype)
        q = quantize(x, scaling=PerToken())
        wide = quantize(x.astype(np.float32), scaling=PerToken())
        np.testing.assert_array_equal(np.asarray(q.data), np.asarray(wide.data))
        assert q.scale.dtype == np.float32 and q.dequantize(dtype).dtype == dtype
        np.testing.assert_array_equal(q.dequantize(dtype), q.dequantize().astype(dtype))


def test_margin_rounding_overflow_and_key_have_their_effect():
    x = sample((64, 64))
    base = quantize(x)
    assert quantize(x, margin=4.0).scale == 4 * base.scale
    assert quantize(x, margin=0.25).scale == base.scale / 4
    assert (np.abs(np.asarray(quantize(x, margin=0.01).dequantize())) < np.abs(x).max() / 10).all()
    assert np.isnan(np.asarray(quantize(x, margin=0.01, overflow="ocp").dequantize())).any()
    assert (np.abs(quantize(x, rounding="toward_zero").dequantize()) <= np.abs(x)).all()
    key = jax.random.key(0)
    drawn = quantize(x, rounding="stochastic", key=key)
    np.testing.assert_array_equal(
        np.asarray(drawn.data),
        np.asarray(encode(x / base.scale, E4M3, rounding="stochastic", key=key)),
    )


def test_the_caller_s_scale():
    x = sample((4, 8))
    scale = np.float32([[0.5], [1], [2], [1e-3]])
    q = quantize(x, scaling=PerToken(), scale=scale)
    np.testing.assert_array_equal(q.scale, scale)
    np.testing.assert_array_equal(np.asarray(q.data), np.asarray(encode(x * (1 / scale), E4M3)))
    assert quantize(x, scaling=PerToken(), scale=2.0).scale.shape == (4, 1)


@pytest.mark.parametrize(
    "scaling", [PerTensor(), PerChannel(0), PerToken(), BlockWise((2, 4))], ids=str
)
@pytest.mark.parametrize("shape", [(0, 2, 2), (2, 3, 0)])
def test_arrays_without_elements(scaling, shape):
    q = quantize(np.zeros(shape, np.float32), scaling=scaling)
    assert q.shape == shape == q.dequantize().shape and q.scale.shape == scaling.group_shape(shape)


@pytest.mark.parametrize("power_of_two", [True, False])
def test_zero_tiny_and_huge_groups(power_of_two):
    x = np.float32([[0, 0], [1e-38, 0], [1e-45, 0], [3e-38, -1e-38], [2e38, 1e38], [1, 1e-30]])
    q = quantize(x, scaling=PerToken(), power_of_two=power_of_two)
    assert np.isfinite(q.scale).all() and (np.asarray(q.scale) >= 2.0**-126).all()
    values = np.asarray(q.dequantize())
    assert np.isfinite(values).all() and q.scale[0] == 1
    np.testing.assert_allclose(values[4:], x[4:], rtol=0.07, atol=1e-29)
    np.testing.assert_allclose(values[3], x[3], atol=2.0**-126)


def test_scalars():
    q = quantize(3.0)
    assert q.shape == () and q.dequantize() == 3
    assert quantize(jnp.float32(-7), E5M2).dequantize() == -7


@pytest.mark.parametrize("scaling", [PerTensor(), PerToken(), BlockWise((2, 4))], ids=str)
@pytest.mark.parametrize("special", [-np.inf, np.nan])
def test_infinities_and_nans_leave_the_others_unharmed(scaling, special):
    x = sample()
    clean = np.asarray(
        quantize(
            np.where(np.arange(x.size).reshape(x.shape) == 77, 0, x), scaling=scaling
        ).dequantize()
    )
    x.flat[77] = special
    q = quantize(x, scaling=scaling)
    values = np.asarray(q.dequantize())
    np.testing.assert_array_equal(np.delete(values, 77), np.delete(clean, 77))
    assert np.isnan(values.flat[77])
    assert np.isfinite(q.scale).all()
    one = {
        (fmt, overflow): quantize(x, fmt, scaling, overflow=overflow).dequantize().ravel()[77]
        for fmt in (E4M3, E5M2)
        for overflow in ("clip", "ocp", "saturate")
    }
    assert np.isnan(one[E4M3, "ocp"])
    for overflow in ("ocp", "saturate"):
        np.testing.assert_array_equal(one[E5M2, overflow], np.float32(special))
    if np.isinf(special):
        assert np.sign(one[E4M3, "clip"]) == np.sign(special) and np.isfinite(one[E4M3, "clip"])


def test_a_finite_value_saturates_though_its_scaled_value_overflows():
    x = jnp.float32([1e30, -1e30, np.inf, np.nan, 1e-30])
    q = quantize(x, E5M2, scale=2.0**-100)
    np.testing.assert_array_equal(
        q.data.astype(jnp.float32), [57344, -57344, np.inf, np.nan, np.float32(1.25)]
    )


# The pytree


def test_it_slices_and_stacks():
    x = sample((5, 4, 6))
    for scaling in (PerTensor(), PerChannel(-1), PerToken(), BlockWise((3, 4))):
        stacked = jax.vmap(lambda x: quantize(x, scaling=scaling))(x)
        rows = [quantize(row, scaling=scaling) for row in x]
        assert (
            stacked.shape == (5, 4, 6) and stacked.ndim == 3 and stacked.scaling == rows[0].scaling
        )
        expected = np.stack([row.dequantize() for row in rows])
        np.testing.assert_array_equal(stacked.dequantize(), expected)
        _, scanned = jax.lax.scan(lambda _, q: (None, q.dequantize()), None, stacked)
        np.testing.assert_array_equal(scanned, expected)
        np.testing.assert_array_equal(
            jax.tree.map(lambda leaf: leaf[2], stacked).dequantize(), expected[2]
        )


def test_leaves_and_static_fields():
    q = quantize(np.ones((4, 256), np.float32), E5M2, PerChannel(0))
    assert [leaf.dtype for leaf in jax.tree.leaves(q)] == [E5M2.dtype, np.float32]
    assert (q.format, q.scaling) == (E5M2, PerChannel(-2))
    assert q.nbytes == 4 * 256 + 4 * 4
    assert isinstance(jax.jit(lambda q: q)(q), Fp8Tensor)
    assert jax.eval_shape(quantize, jnp.ones(3)).shape == (3,)
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(q)]
    assert paths == [".data", ".scale"]
    with pytest.raises(dataclasses.FrozenInstanceError):
        q.data = None


@pytest.mark.parametrize("axis_type", [jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit])
def test_sharded(axis_type):
    x = sample((64, 32))
    mesh = jax.make_mesh((4, 2), ("i", "j"), axis_types=(axis_type,) * 2)
    sharded = jax.device_put(x, jax.NamedSharding(mesh, jax.P("i", "j")))

    @jax.jit
    def run(x):
        return [quantize(x, scaling=s) for s in scalings], jax.grad(
            lambda x: (quantize(x).dequantize() * 1e4).sum()
        )(x)

    shared = (BlockWise((32, 32)), BlockWise((1, 12)))  # whose groups several devices have parts of
    scalings = (
        PerTensor(),
        PerToken(),
        PerChannel(-1),
        BlockWise((1, 8)),
        BlockWise((16, 8)),
        *shared,
    )
    with jax.set_mesh(mesh):
        quantized, grads = run(sharded)
    for scaling, q in zip(scalings, quantized, strict=True):
        expected = quantize(x, scaling=scaling)
        np.testing.assert_array_equal(np.asarray(q.data), np.asarray(expected.data))
        np.testing.assert_array_equal(np.asarray(q.dequantize()), expected.dequantize())
        if axis_type == jax.sharding.AxisType.Explicit:
            assert jax.typeof(q.data).sharding.spec == jax.P("i", "j")
    np.testing.assert_array_equal(np.asarray(grads), np.full_like(x, 1e4))


# Gradients


EVERY_TRANSFORM = [(scaling, jax.jit) for scaling in GRANULARITIES]
EVERY_TRANSFORM += [(BlockWise((3, 4)), transform) for transform in (lambda f: f, jax.checkpoint)]


@pytest.mark.parametrize("scaling, transform", EVERY_TRANSFORM)
def test_gradients_pass_straight_through(scaling, transform):
    x = sample()
    for power_of_two, cotangent in ((True, 1.0), (False, 1e4)):

        def loss(x):
            return (
                quantize(x, scaling=scaling, power_of_two=power_of_two).dequantize() * cotangent
            ).sum()

        np.testing.assert_array_equal(jax.grad(transform(loss))(x), np.full_like(x, cotangent))


def test_gradients_at_tiny_scales_and_where_values_saturate():
    x = jnp.array([1e-5, -4e-4, 1e-3, 460e-6, 470e-6])
    grads = jax.grad(lambda x: (quantize(x, scale=1e-6).dequantize() * 1e4).sum())(x)
    np.testing.assert_array_equal(grads, np.float32([1e4, 1e4, 0, 1e4, 0]))
    grads = jax.grad(lambda x: quantize(x, margin=0.5).dequantize().sum())(
        jnp.array([448.0, 100.0, 224.0])
    )
    np.testing.assert_array_equal(grads, [0, 1, 1])


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_gradients_of_narrow_dtypes(dtype):
    x = jnp.asarray(sample(), dtype)
    grads = jax.grad(
        lambda x: (quantize(x).dequantize(dtype) * dtype(300)).sum().astype(jnp.float32)
    )(x)
    assert grads.dtype == dtype and (grads == 300).all()


def test_gradients_through_vmap_scan_and_boundaries_of_jit():
    x = sample((3, 4, 8))

    def per_row(x):
        return (jax.jit(dequantize)(jax.jit(quantize)(x)) * 1e4).sum()

    np.testing.assert_array_equal(jax.vmap(jax.grad(per_row))(x), np.full_like(x, 1e4))

    def scanned(x):
        q = jax.vmap(quantize)(x)
        return jax.lax.scan(lambda s, q: (s + (q.dequantize() * 1e4).sum(), None), 0.0, q)[0]

    np.testing.assert_array_equal(jax.grad(scanned)(x), np.full_like(x, 1e4))


def test_no_float8_cotangent():
    x = sample((3, 4))

    def pullback(x, cotangent):
        return jax.vjp(lambda x: quantize(x).dequantize(), x)[1](cotangent)

    cotangent = x * np.float32(1e6)
    np.testing.assert_array_equal(jax.jit(pullback)(x, cotangent)[0], cotangent)
    assert not re.search(
        r"convert_element_type\[\s*new_dtype=float8", str(jax.make_jaxpr(pullback)(x, cotangent))
    )


@pytest.mark.parametrize("scaling", [PerTensor(), PerChannel(-1), BlockWise(3)], ids=str)
def test_the_gradient_of_a_scale_is_the_true_one(scaling):
    q = quantize(sample(), scaling=scaling)
    cotangent = sample(seed=1)
    grad = jax.grad(lambda s: (dataclasses.replace(q, scale=s).dequantize() * cotangent).sum())(
        q.scale
    )
    terms = np.asarray(decode(q.data)) * cotangent
    expected = [terms[where].sum() for where, _ in groups(terms, scaling)]
    np.testing.assert_allclose(np.ravel(grad), expected, rtol=1e-4, atol=1e-3)


# Properties


@settings(max_examples=25, deadline=None)
@given(
    st.integers(-40, 40),
    st.integers(0, 1000),
    st.sampled_from([PerTensor(), PerToken(), BlockWise((2, 4))]),
)
def test_property_equivariance_under_powers_of_two(exponent, seed, scaling):
    x, factor = sample((4, 8), seed, 0.5), np.float32(2.0**exponent)
    one, other = quantize(x, scaling=scaling), quantize(x * factor, scaling=scaling)
    np.testing.assert_array_equal(
        np.asarray(one.data).view(np.uint8), np.asarray(other.data).view(np.uint8)
    )
    np.testing.assert_array_equal(one.scale * factor, other.scale)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 1000), st.sampled_from([E4M3, E5M2, E3M4, E4M3FNUZ]))
def test_property_idempotence_and_error(seed, fmt):
    x = sample((4, 8), seed)
    q = quantize(x, fmt, PerToken())
    again = quantize(q.dequantize(), fmt, PerToken())
    np.testing.assert_array_equal(again.dequantize(), q.dequantize())
    quantum = np.maximum(
        np.abs(x) * 2.0**-fmt.mantissa_bits, fmt.min_subnormal * np.asarray(q.scale)
    )
    assert (np.abs(q.dequantize() - x) <= quantum / 2).all()


@settings(max_examples=25, deadline=None)
@given(
    st.integers(0, 5),
    st.floats(-(2.0**100), 2.0**100, width=32),
    st.sampled_from([BlockWise((2, 4)), BlockWise(3), PerToken()]),
)
def test_property_blocks_are_independent(row, value, scaling):
    x = sample((6, 10))
    changed = x.copy()
    changed[row, 5] = value
    before, after = quantize(x, scaling=scaling), quantize(changed, scaling=scaling)
    for where, _ in groups(x, scaling):
        if np.array_equal(x[where], changed[where]):
            np.testing.assert_array_equal(before.dequantize()[where], after.dequantize()[where])


# Error figures


def test_quantization_error_by_hand():
    x = np.float32([1.0, -3.1, 0.0, 500.0, 1e-4])
    q = quantize(x, scale=1.0)
    y = np.asarray([1.0, -3.0, 0.0, 448.0, 0.0])
    error = quantization_error(x, q)
    np.testing.assert_array_equal(q.dequantize(), np.float32(y))
    e = y - x.astype(np.float64)
    np.testing.assert_allclose(error.mse, (e**2).mean(), rtol=1e-6)
    np.testing.assert_allclose(
        error.sqnr_db, 10 * np.log10((x.astype(float) ** 2).sum() / (e**2).sum()), rtol=1e-6
    )
    assert error.max_abs == 52 and error.max_rel == 1
    np.testing.assert_allclose(
        error.cosine, (x * y).sum() / np.sqrt((x**2).sum() * (y**2).sum()), rtol=1e-6
    )
    np.testing.assert_allclose([error.overflow, error.underflow], [0.2, 0.2])


@pytest.mark.parametrize("scaling", [PerTensor(), PerChannel(-1), BlockWise(3)], ids=str)
def test_quantization_error_per_group(scaling):
    x = sample()
    q = quantize(x, scaling=scaling)
    got = quantization_error(x, q, per_group=True)
    assert all(leaf.shape == q.scale.shape for leaf in jax.tree.leaves(got))
    error = np.asarray(q.dequantize(), np.float64) - x
    of_groups = [error[where] for where, _ in groups(x, scaling)]
    np.testing.assert_allclose(
        np.ravel(got.mse), [(e**2).mean() for e in of_groups], rtol=1e-4, atol=1e-12
    )
    np.testing.assert_array_equal(
        np.ravel(got.max_abs), [np.float32(np.abs(e).max()) for e in of_groups]
    )


def test_shares_are_counted_in_their_own_group():
    x = np.float32([[1, 2], [500, 1], [1e-9, 0], [500, 500]])
    error = quantization_error(x, quantize(x, scaling=PerToken(), scale=1.0), per_group=True)
    np.testing.assert_array_equal(error.overflow, [[0], [0.5], [0], [1]])
    np.testing.assert_array_equal(error.underflow, [[0], [0], [0.5], [0]])


@pytest.mark.parametrize("factor", [1e-30, 1.0, 1e30])
def test_quantization_error_of_extreme_magnitudes(factor):
    x = sample((64, 64), spread=0.0) * np.float32(factor)
    error = quantization_error(x, quantize(x))
    assert (
        29 < error.sqnr_db < 34
        and 0.999 < error.cosine < 1
        and error.underflow < 0.01
        and error.overflow == 0
    )


def test_quantization_error_of_special_arrays():
    exact = quantization_error(jnp.ones(4), quantize(jnp.ones(4)))
    assert (exact.mse, exact.sqnr_db, exact.cosine, exact.max_rel) == (0, np.inf, 1, 0)
    x = jnp.array([1.0, np.inf, np.nan, 2.0])
    special = quantization_error(x, quantize(x))
    assert special.mse == 0 and special.overflow == 0.25
    empty = quantization_error(jnp.ones((0, 3)), quantize(jnp.ones((0, 3))))
    assert empty.mse == 0 and empty.overflow == 0


@pytest.mark.parametrize(
    "error, message, call",
    [
        (ValueError, r"fmt must be a format of signed values; got E8M0, which holds scales. Use "
                     r"E4M3 or E5M2",
         lambda: quantize(jnp.ones(3), E8M0)),
        (ValueError, r"fmt must name an 8-bit float "
                     r"format, got 'int4'", lambda: quantize(jnp.ones(3), "int4")),
        (TypeError, r"x must be float32, bfloat16, float16 or "
                    r"float64; got int32", lambda: quantize(jnp.arange(3))),
        (TypeError, r"scaling must be PerTensor\(\), "
                    r"PerChannel\(axis\), .*; got 128", lambda: quantize(jnp.ones(3), scaling=128)),
        (TypeError, r"scaling must be "
                    r"PerTensor.*got <class", lambda: quantize(jnp.ones(3), scaling=PerTensor)),
        (ValueError, r"margin must be a positive "
                     r"number; got 0. Use 1.0 for no "
                     r"headroom", lambda: quantize(jnp.ones(3), margin=0)),
        (ValueError, r"margin must be a "
                     r"positive number; got "
                     r"nan", lambda: quantize(jnp.ones(3), margin=float("nan"))),
        (ValueError, "margin must be a positive number; got None",
         lambda: quantize(jnp.ones(3), margin=None)),
        (ValueError, r"key is needed for "
                     r"stochastic rounding", lambda: quantize(jnp.ones(3), rounding="stochastic")),
        (ValueError, r"rounding to E4M3 must be "
                     r"one of .* got 'up'", lambda: quantize(jnp.ones(3), rounding="up")),
        (ValueError, r"overflow must be one of "
                     r".* got 'wrap'", lambda: quantize(jnp.ones(3), overflow="wrap")),
        (ValueError, r"margin and power_of_two shape a computed scale; got them beside scale=. "
                     r"Leave them out",
         lambda: quantize(jnp.ones(3), scale=1.0, margin=2.0)),
        (ValueError, r"scale must be a scalar or of shape \(2, 1\) for PerToken\(\) of \(2, 3\); "
                     r"got \(2,\)",
         lambda: quantize(jnp.ones((2, 3)), scaling=PerToken(), scale=jnp.ones(2))),
        (ValueError, r"axis of PerChannel must lie within an operand of rank 1; got 3",
         lambda: quantize(jnp.ones(3), scaling=PerChannel(3))),
        (TypeError, r"q must be an Fp8Tensor; got .*Array.*. "
                    r"Make one with quantize\(x\)", lambda: dequantize(jnp.ones(3))),
        (TypeError, r"dtype must be float32, bfloat16, float16 or float64; got int32",
         lambda: quantize(jnp.ones(3)).dequantize(jnp.int32)),
        (TypeError, r"q must be an "
                    r"Fp8Tensor; got", lambda: quantization_error(jnp.ones(3), jnp.ones(3))),
        (ValueError, r"x must have the shape of q, \(3,\); got \(4,\). Pass the array that was "
                     r"quantized",
         lambda: quantization_error(jnp.ones(4), quantize(jnp.ones(3)))),
    ],
)  # fmt: skip
def test_errors_say_what_to_do(error, message, call):
    with pytest.raises(error, match=message):
        call()
