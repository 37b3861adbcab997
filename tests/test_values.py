"""The kernel that rounds operands to the values of their codes, interpreted on a CPU, against the
codes and scales that are made without it: bit for bit.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiers import thorough_but

import fp8jax
from fp8jax import E4M3, E5M2, BlockWise, PerToken, recipes
from fp8jax._formats import E3M4
from fp8jax._recipe import CastSpec
from fp8jax.devices import Device
from fp8jax.ops._cast import boxes_of, cast
from fp8jax.ops._kernels import values as kernel

TPU = Device("tpu", "TPU7x")


@pytest.fixture
def as_if_on_a_tpu(monkeypatch):
    """Operands are cast by the kernel, interpreted; the casts of each call."""
    calls, values = [], kernel.values

    def interpreted(x, casts):
        calls.append((x.shape, tuple((cast.rows, cast.columns) for cast in casts)))
        return values(x, casts, True)

    jax.clear_caches()  # Traces of sites are kept, and would be without it.
    monkeypatch.setattr(kernel, "values", interpreted)
    monkeypatch.setattr(kernel, "PLATFORM", "cpu")
    monkeypatch.setattr(kernel, "division_of", lambda *arrays: "")
    yield calls
    jax.clear_caches()


def array_of(shape, dtype, seed=0):
    """Of magnitudes over 80 binades, with zeros, infinities, NaNs and the largest numbers."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(shape) * 2.0 ** rng.integers(-40, 40, shape[:-1] + (1,))
    x = x * 2.0 ** rng.integers(-6, 7, shape)
    for value in (0.0, np.inf, -np.inf, np.nan, 3e38, -3e38, 1e-37):
        x[rng.random(shape) < 1e-3] = value
    x[: x.shape[0] // 8] = 0
    return jnp.asarray(x, jnp.float32).astype(dtype)


def both_casts(ndim, block, fmt, clip=False):
    """Of an lhs: along its last axis for the product, along the one before for the gradient."""
    spec = CastSpec(fmt, BlockWise(block), clip_infinities=clip)
    last, rest = (ndim - 1,), tuple(range(ndim - 1))
    return [
        (spec, boxes_of(spec.scaling, ndim, kept, contracted), contracted)
        for kept, contracted in ((rest, last), (last, rest))
    ]


def assert_values(x, casts):
    got = jax.jit(lambda x: kernel.values_of(x, casts))(x)
    for (spec, boxes, _), one in zip(casts, got, strict=True):
        expected = cast(x, spec, boxes).values(jnp.bfloat16, scaled=True)
        assert one.dtype == expected.dtype and one.shape == x.shape
        one, expected = (np.asarray(part, np.float32) for part in (one, expected))
        np.testing.assert_array_equal(one, expected)
        assert (one != np.asarray(x, np.float32)).mean() > 0.3  # They are rounded.


SHAPES = {
    "whole squares": (256, 256),
    "several tiles": (640, 2304),
    "ragged columns": (256, 200),
    "ragged both": (130, 140),
    "three axes": (3, 192, 160),
    "four axes": (2, 2, 256, 256),
}


@pytest.mark.parametrize("shape", thorough_but(SHAPES, ["ragged both"]))
@pytest.mark.parametrize("block", thorough_but({"32": 32, "64": 64, "128": 128}, ["32"]))
@pytest.mark.parametrize("dtype", thorough_but({"f32": "float32", "bf16": "bfloat16"}, ["bf16"]))
def test_values_are_those_of_the_codes(shape, block, dtype, as_if_on_a_tpu):
    casts = both_casts(len(shape), (1, block), E4M3)
    x = array_of(shape, dtype)
    if len(shape) > 2 and shape[-2] % block:
        assert kernel.block_casts(x, casts) is None
        return
    assert_values(x, casts)
    assert as_if_on_a_tpu == [((x.size // shape[-1], shape[-1]), ((1, block), (block, 1)))]


@pytest.mark.thorough
@pytest.mark.parametrize("fmt", [E4M3, E5M2], ids=str)
@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("block", [(1, 32), (128, 128), (32, 128), (128, 32)], ids=str)
def test_formats_infinities_and_square_blocks(fmt, clip, block, as_if_on_a_tpu):
    assert_values(array_of((256, 256), jnp.float32), both_casts(2, block, fmt, clip))
    assert_values(array_of((256, 256), jnp.float16, 1), both_casts(2, block, fmt, clip)[:1])
    assert len(as_if_on_a_tpu) == 2


@pytest.mark.thorough
def test_a_scale_of_another_block_is_noticed(as_if_on_a_tpu, monkeypatch):
    fitting = kernel._fitting
    monkeypatch.setattr(
        kernel, "_fitting", lambda largest, fmt: jnp.roll(fitting(largest, fmt), 1, 0)
    )
    with pytest.raises(AssertionError, match="not equal"):
        assert_values(array_of((128, 256), jnp.bfloat16), both_casts(2, (1, 32), E4M3))


def spec_of(scaling, **fields):
    return CastSpec(fields.pop("format", E4M3), scaling, **fields)


BLOCKS = BlockWise((1, 32))


@pytest.mark.parametrize(
    "shape, spec",
    [
        ((128, 96), spec_of(BLOCKS)),
        ((0, 128), spec_of(BLOCKS)),
        ((128,), spec_of(BLOCKS)),
        ((128, 256), spec_of(PerToken())),
        ((128, 256), spec_of(BlockWise((1, 256)))),
        ((128, 256), spec_of(BlockWise((1, 48)))),
        ((128, 256), spec_of(BlockWise((32, 32)))),
        ((128, 256), spec_of(BLOCKS, power_of_two=False)),
        ((128, 256), spec_of(BLOCKS, rounding="toward_zero")),
        ((128, 256), spec_of(BLOCKS, format=E3M4)),
        ((3, 40, 128), spec_of(BlockWise((32, 128)))),
    ],
    ids=lambda value: str(value)[:60],
)
def test_casts_that_the_kernel_has_not(shape, spec, as_if_on_a_tpu):
    ndim = len(shape)
    contracted = (ndim - 1,)
    boxes = boxes_of(spec.scaling, ndim, tuple(range(ndim - 1)), contracted)
    x = jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    assert kernel.block_casts(x, [(spec, boxes, contracted)]) is None
    known = both_casts(2, (1, 32), E4M3)
    assert kernel.block_casts(jax.ShapeDtypeStruct((128, 256), jnp.bfloat16), known) is not None


@pytest.mark.parametrize(
    "device, division", [(Device("cpu", "cpu"), ""), (TPU, "automatic"), (TPU, "explicit")]
)
def test_where_it_is_not_for(device, division, monkeypatch):
    monkeypatch.setattr(kernel, "device_of", lambda *arrays: device)
    monkeypatch.setattr(kernel, "division_of", lambda *arrays: division)
    x, casts = jax.ShapeDtypeStruct((128, 256), jnp.bfloat16), both_casts(2, (1, 32), E4M3)
    assert kernel.block_casts(x, casts) is None
    monkeypatch.setattr(kernel, "division_of", lambda *arrays: "")
    assert (kernel.block_casts(x, casts) is None) == (device is not TPU)


def gradients(recipe, wrap, x, w):
    product = jnp.matmul if recipe is None else fp8jax.fp8(jnp.matmul, recipe, weights=1)
    function = product if recipe is None else functools.partial(product, {})

    def loss(w, x):
        def layer(x, w):
            return jnp.tanh(wrap(function)(x, w)), None

        return jnp.square(jax.lax.scan(layer, x, w)[0].astype(jnp.float32)).mean()

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(w, x)


WRAPS = {
    "plain": lambda f: f,
    "remat": jax.checkpoint,
    "vmap": lambda f: jax.vmap(f, in_axes=(0, None)),
}


@pytest.mark.parametrize("wrap", thorough_but(dict(zip(WRAPS, WRAPS)), ["plain"]))
@pytest.mark.parametrize("dtype", thorough_but({"f32": "float32", "bf16": "bfloat16"}, ["bf16"]))
@pytest.mark.parametrize(
    "recipe", thorough_but({"mxfp8": recipes.mxfp8, "blockwise": recipes.blockwise}, ["mxfp8"])
)
def test_gradients_in_a_scan(recipe, wrap, dtype, as_if_on_a_tpu):
    rng = np.random.default_rng(5)
    shape = (2, 256, 256) if wrap == "vmap" else (256, 256)
    x = jnp.asarray(rng.standard_normal(shape), dtype)
    w = jnp.asarray(rng.standard_normal((2, 256, 256)) / 16, dtype)
    got = gradients(recipe(), WRAPS[wrap], x, w)
    assert ((256, 256), ((1, 32), (32, 1))) in as_if_on_a_tpu or recipe is recipes.blockwise
    assert as_if_on_a_tpu
    before = len(as_if_on_a_tpu)
    expected = gradients(recipe(execution="emulated"), WRAPS[wrap], x, w)
    assert len(as_if_on_a_tpu) == before  # What is asked for is made as ever.
    unquantized = gradients(None, WRAPS[wrap], x, w)
    leaves = (jax.tree.leaves(tree) for tree in (got, expected, unquantized))
    for ours, theirs, plain in zip(*leaves, strict=True):
        ours, theirs, plain = (np.asarray(leaf, np.float32) for leaf in (ours, theirs, plain))
        error, size = np.linalg.norm(ours - theirs), np.linalg.norm(theirs)
        assert 0 < size and error <= 1e-3 * size
        assert not theirs.ndim or np.linalg.norm(plain - theirs) > 1e-2 * size


def test_weights_of_a_scan_are_not_kept_as_values(as_if_on_a_tpu, monkeypatch):
    """Each of its products casts a layer's weight for itself, and no stack of values is made."""
    monkeypatch.setattr("fp8jax._shims.devices_at_hand", lambda: 1)
    x, w = jnp.ones((512, 256), jnp.bfloat16), jnp.ones((2, 256, 384), jnp.bfloat16)

    def model(w, x):
        return jax.lax.scan(lambda x, w: ((x @ w)[:, :256], None), x, w)[0]

    def loss(w, x):
        out = fp8jax.fp8(model, recipes.mxfp8())({}, w, x)
        return out.astype(jnp.float32).mean()

    jax.jit(jax.grad(loss)).lower(w, x)
    of_weight = [casts for shape, casts in as_if_on_a_tpu if shape == (256, 384)]
    assert ((32, 1),) in of_weight and ((1, 32),) in of_weight
    assert ((32, 1), (1, 32)) not in of_weight


@pytest.mark.thorough
def test_inside_shard_map(as_if_on_a_tpu):
    auto = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((2,), ("x",), axis_types=auto, devices=jax.devices()[:2])
    spec = jax.sharding.PartitionSpec
    x, w = jnp.ones((256, 256)), jnp.ones((256, 128))

    def loss(x, w):
        out = fp8jax.fp8(jnp.matmul, recipes.mxfp8(), weights=1)({}, x, w)
        return jax.lax.pmean(jnp.square(out).mean(), "x")

    run = jax.shard_map(loss, mesh=mesh, in_specs=(spec("x"), spec()), out_specs=spec())
    shapes = jax.eval_shape(jax.grad(run, argnums=(0, 1)), x, w)
    assert [leaf.shape for leaf in shapes] == [x.shape, w.shape]
    assert ((128, 256), ((1, 32), (32, 1))) in as_if_on_a_tpu
