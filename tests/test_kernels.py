"""Kernels for scales within a sum, interpreted on a CPU, against float64 products of the values
that the emulated path multiplies; and which one a device gets.
"""

import dataclasses
import functools
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.experimental.pallas import mosaic_gpu
from jax.experimental.pallas import tpu as pltpu
from tiers import thorough_but

import fp8jax
from fp8jax import E4M3, E5M2, _shims, recipes
from fp8jax._recipe import CastSpec
from fp8jax._scaling import BlockWise, PerToken
from fp8jax.devices import Device
from fp8jax.ops import _kernels, dot_general
from fp8jax.ops._cast import boxes_of, cast
from fp8jax.ops._execution import in_rows
from fp8jax.ops._kernels import decoding, two_level
from fp8jax.ops._kernels.choice import ENGINES

MATRIX = (((1,), (0,)), ((), ()))
TPU, B200 = Device("tpu", "TPU7x"), Device("gpu", "NVIDIA B200")
H200 = Device("gpu", "NVIDIA H200")
CUDNN, HOPPER, PALLAS = ENGINES
MX, FLOAT = (
    CastSpec(E4M3, BlockWise((1, 32))),
    CastSpec(E4M3, BlockWise((1, 32)), power_of_two=False),
)
# By every engine that can be interpreted: cuDNN's is decoded by JAX on CPUs, from the same codes
# and E8M0 scales.
INTERPRETED = {
    "cuDNN block-scaled": CUDNN,
    "Pallas, decoding to bfloat16": dataclasses.replace(
        PALLAS, multiply=functools.partial(decoding.multiply, interpret=True)
    ),
}
if _shims.HAS_GPU_KERNELS:
    # With a GPU's memories, copies and barriers. It sums a `wgmma` in float32 throughout.
    INTERPRETED["Pallas, two-level FP8"] = dataclasses.replace(
        HOPPER,
        multiply=functools.partial(two_level.multiply, interpret=mosaic_gpu.InterpretGPUParams()),
    )
DEVICES = {CUDNN.name: B200, HOPPER.name: H200, PALLAS.name: TPU}


@pytest.fixture
def engine(request):
    """One of `INTERPRETED`, by name."""
    if request.param == CUDNN.name and jax.__version_info__ < (0, 11):
        pytest.skip("JAX before 0.11 decodes a block-scaled product on no CPU")
    return request.param


def operand(rng, shape, spec, kept, contracted):
    """Codes whose groups differ in scale by up to 2^12, and their values in float64."""
    array = rng.standard_normal(shape) * 2.0 ** rng.integers(-6, 7, shape)
    codes = cast(
        jnp.asarray(array, jnp.float32), spec, boxes_of(spec.scaling, len(shape), kept, contracted)
    )
    return codes, np.asarray(codes.values(jnp.float32, scaled=True), np.float64)


def by(engine, lhs, rhs, dimension_numbers, out_dtype=jnp.float32):
    """The product by an engine, through `jit`."""
    choice = _kernels.choose(lhs, rhs, dimension_numbers, DEVICES[engine])
    assert choice.reason == ""
    choice = dataclasses.replace(choice, engine=INTERPRETED[engine])
    run = jax.jit(lambda lhs, rhs: choice.multiply(lhs, rhs, dimension_numbers, out_dtype))
    return np.asarray(run(lhs, rhs), np.float64)


def assert_sums(got, lhs, rhs, equation):
    """`got` is the float64 product to what float32 sums lose."""
    exact = np.einsum(equation, lhs, rhs)
    assert exact.shape == got.shape
    bound = np.einsum(equation, abs(lhs), abs(rhs)) * 2.0**-20
    assert (abs(got - exact) <= bound).all() and abs(exact).max() > 0


# Rows, columns and sums that fill no tile, no block and no vector; sums of more than one tile, and
# results of more.
SHAPES = [
    *itertools.product((1, 40, 130), (3, 32, 129), (1, 2, 5.5)),
    (1025, 2, 2),
    (2, 1025, 2),
    (8, 8, 10),
]
FEW = [(40, 33, 5.5), (8, 8, 10)]


@pytest.mark.parametrize(
    "engine", thorough_but({name: name for name in INTERPRETED}, [CUDNN.name]), indirect=True
)
@pytest.mark.parametrize("block", thorough_but({"32": 32, "128": 128}, ["32"]))
@pytest.mark.parametrize(
    "shapes", [FEW, pytest.param(SHAPES, marks=pytest.mark.slow)], ids=["few", "thirty"]
)
def test_sums(engine, block, shapes):
    rng = np.random.default_rng(0)
    spec = CastSpec(E4M3, BlockWise((1, block)))
    for rows, columns, blocks in shapes:
        total = int(blocks * block) + (blocks == 1)
        lhs, left = operand(rng, (rows, total), spec, (0,), (1,))
        rhs, right = operand(rng, (total, columns), spec, (1,), (0,))
        assert_sums(by(engine, lhs, rhs, MATRIX), left, right, "mk,kn->mn")


@pytest.mark.thorough
def test_sums_in_tpu_interpret_mode(monkeypatch):
    """With a TPU's memories and copies: what is read out of bounds, or too early, is wrong."""
    rng = np.random.default_rng(8)
    lhs, left = operand(rng, (70, 1216), MX, (0,), (1,))
    rhs, right = operand(rng, (1216, 40), MX, (1,), (0,))
    mode = functools.partial(decoding.multiply, interpret=pltpu.InterpretParams())
    monkeypatch.setitem(INTERPRETED, PALLAS.name, dataclasses.replace(PALLAS, multiply=mode))
    assert_sums(by(PALLAS.name, lhs, rhs, MATRIX), left, right, "mk,kn->mn")


@pytest.mark.thorough
@pytest.mark.parametrize("engine", INTERPRETED, indirect=True)
@pytest.mark.parametrize(
    "formats",
    [(E4M3, E4M3), (E4M3, E5M2), (E5M2, E4M3)],
    ids=lambda pair: "-".join(f.name for f in pair),
)
def test_formats_and_square_blocks(engine, formats):
    rng = np.random.default_rng(1)
    specs = [CastSpec(fmt, BlockWise(shape)) for fmt, shape in zip(formats, ((1, 128), (128, 128)))]
    lhs, left = operand(rng, (70, 300), specs[0], (0,), (1,))
    rhs, right = operand(rng, (300, 200), specs[1], (1,), (0,))
    assert_sums(by(engine, lhs, rhs, MATRIX), left, right, "mk,kn->mn")


needs_mosaic = pytest.mark.skipif(
    not _shims.HAS_GPU_KERNELS, reason="JAX before 0.12 has other kernels for GPUs"
)


@needs_mosaic
@pytest.mark.thorough
def test_scales_that_are_no_powers_of_two_on_hopper():
    """Blocks of 64, gradients' format on both sides, more rows and columns than a tile has."""
    rng = np.random.default_rng(10)
    spec = CastSpec(E5M2, BlockWise((1, 64)), power_of_two=False)
    lhs, left = operand(rng, (150, 200), spec, (0,), (1,))
    rhs, right = operand(rng, (200, 140), spec, (1,), (0,))
    assert_sums(by(HOPPER.name, lhs, rhs, MATRIX), left, right, "mk,kn->mn")


@needs_mosaic
@pytest.mark.thorough
def test_results_in_bfloat16_and_vmap_on_hopper():
    rng = np.random.default_rng(11)
    spec = CastSpec(E4M3, BlockWise((1, 128)))
    lhs, left = operand(rng, (2, 3, 40, 256), spec, (2,), (3,))
    rhs, right = operand(rng, (2, 40, 256), spec, (1,), (2,))
    multiply = functools.partial(
        INTERPRETED[HOPPER.name].multiply, out_dtype=jnp.dtype(jnp.bfloat16)
    )
    of_rhs = (part[:, None] for part in (rhs.data, rhs.scale))
    run = jax.jit(jax.vmap(lambda l, r, s, t: multiply(l, jnp.repeat(r, 3, 0), s, t.repeat(3, 0))))
    got = np.asarray(run(lhs.data, next(of_rhs), lhs.scale, next(of_rhs)), np.float64)
    exact = np.einsum("abmk,ank->abmn", left, right)
    bound = np.einsum("abmk,ank->abmn", abs(left), abs(right)) * 2.0**-20 + abs(exact) * 2.0**-8
    assert got.shape == exact.shape and (abs(got - exact) <= bound).all() and got.any()


@pytest.mark.parametrize(
    "engine",
    thorough_but({name: name for name in INTERPRETED}, [CUDNN.name]),
    indirect=True,
)
def test_batches_and_several_contracted_axes(engine):
    rng = np.random.default_rng(2)
    spec = CastSpec(E4M3, BlockWise((1, 32)))
    lhs, left = operand(rng, (3, 5, 70, 2), spec, (1,), (3, 2))
    rhs, right = operand(rng, (3, 2, 70, 6), spec, (3,), (1, 2))
    numbers = (((3, 2), (1, 2)), ((0,), (0,)))
    assert_sums(by(engine, lhs, rhs, numbers), left, right, "bmkj,bjkn->bmn")


@pytest.mark.thorough
@pytest.mark.parametrize("engine", INTERPRETED, indirect=True)
def test_one_side_in_blocks_the_other_in_rows(engine):
    rng = np.random.default_rng(3)
    lhs, left = operand(rng, (9, 160), CastSpec(E4M3, PerToken()), (0,), (1,))
    rhs, right = operand(rng, (160, 7), CastSpec(E4M3, BlockWise((1, 64))), (1,), (0,))
    assert_sums(by(engine, lhs, rhs, MATRIX), left, right, "mk,kn->mn")


def test_scales_outside_of_the_sum_count_once(as_if_on_a_tpu):
    """A gradient that is summed over one block alone, by a weight that has several beside it."""
    rng = np.random.default_rng(9)
    x, w, g = (
        jnp.asarray(rng.standard_normal(shape), jnp.float32)
        for shape in ((40, 256), (256, 32), (40, 32))
    )
    found = []
    for execution in ("native", "emulated"):
        recipe = recipes.blockwise(execution=execution)
        multiply = functools.partial(dot_general, dimension_numbers=MATRIX, recipe=recipe)
        found.append(jax.jit(lambda x, w, g, f=multiply: jax.vjp(f, x, w)[1](g))(x, w, g))
    assert (1, 40, 32) in as_if_on_a_tpu
    for ours, theirs in zip(*found, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("engine", INTERPRETED, indirect=True)
@pytest.mark.parametrize("side", thorough_but({"lhs": "lhs", "rhs": "rhs"}, ["rhs"]))
def test_a_scale_of_another_block_is_noticed(engine, side, monkeypatch):
    """One scale's index wrong: the sums are no longer those of the values."""
    rng = np.random.default_rng(4)
    spec = CastSpec(E4M3, BlockWise((1, 32)))
    lhs, left = operand(rng, (40, 160), spec, (0,), (1,))
    rhs, right = operand(rng, (160, 33), spec, (1,), (0,))
    codes = {"lhs": lhs, "rhs": rhs}[side]
    at = {"lhs": (slice(7, 8), slice(3, 4)), "rhs": (slice(3, 4), slice(7, 8))}[side]
    neighbour = {"lhs": (slice(7, 8), slice(2, 3)), "rhs": (slice(2, 3), slice(7, 8))}[side]
    wrong = codes.scale.at[at].set(codes.scale[neighbour] * 2)
    broken = dataclasses.replace(codes, scale=wrong)
    lhs, rhs = (broken, rhs) if side == "lhs" else (lhs, broken)
    with pytest.raises(AssertionError):
        assert_sums(by(engine, lhs, rhs, MATRIX), left, right, "mk,kn->mn")


def codes_of(shape, spec, contracted):
    kept = tuple(axis for axis in range(len(shape)) if axis not in contracted)
    data = jnp.zeros(shape, spec.format.dtype)
    boxes = boxes_of(spec.scaling, len(shape), kept, contracted)
    return fp8jax.ops._cast.Codes.of(data, jnp.ones(boxes.group_shape(shape)), spec, boxes)


@pytest.mark.parametrize(
    ("lhs", "rhs", "device", "division", "reason"),
    [
        (MX, MX, Device("cpu", "cpu"), "", "there is no kernel for cpu"),
        (MX, MX, Device("gpu", "NVIDIA A100"), "", "there is no kernel for NVIDIA A100"),
        (FLOAT, MX, B200, "", "its scales are not powers of two"),
        (FLOAT, MX, TPU, "", "its scales are not powers of two"),
        (
            CastSpec(E5M2, BlockWise((1, 32))),
            CastSpec(E5M2, BlockWise((1, 32))),
            B200,
            "",
            "formats are E5M2 and E5M2",
        ),
        (CastSpec("E4M3FNUZ", BlockWise((1, 32))), MX, TPU, "", "and not E4M3FNUZ"),
        (
            CastSpec(E4M3, BlockWise((1, 48))),
            MX,
            TPU,
            "",
            "its blocks are of 16, no multiple of 32",
        ),
        (MX, None, B200, "", "one of its operands is not cast"),
        (MX, MX, TPU, "automatic", "XLA can't divide it over the automatic axes"),
        (MX, MX, TPU, "unknown", "no mesh says which of them"),
        (MX, MX, B200, "explicit", "axes of its mesh are explicit"),
        (CastSpec("E4M3FNUZ", BlockWise((1, 32))), MX, H200, "", "and not E4M3FNUZ"),
        (MX, CastSpec(E4M3, BlockWise((1, 16))), H200, "", "its blocks are of 16, no multiple"),
        (MX, MX, H200, "automatic", "XLA can't divide it over the automatic axes"),
    ],
)
def test_why_there_is_no_kernel(lhs, rhs, device, division, reason, monkeypatch):
    monkeypatch.setattr(_shims, "HAS_GPU_KERNELS", True)
    lhs = codes_of((4, 96), lhs, (1,))
    rhs = jnp.zeros((96, 4)) if rhs is None else codes_of((96, 4), rhs, (0,))
    choice = _kernels.choose(lhs, rhs, MATRIX, device, division)
    assert choice.engine is None and reason in choice.reason


@pytest.mark.parametrize(
    ("device", "kernel", "reason"),
    [
        (TPU, PALLAS, "what XLA copies for it is estimated at more than it saves"),
        (H200, HOPPER, "no device has run it yet"),
    ],
    ids=["TPU", "H200"],
)
def test_kernels_for_native_alone(device, kernel, reason, monkeypatch):
    monkeypatch.setattr(_shims, "HAS_GPU_KERNELS", True)
    lhs, rhs = codes_of((4, 64), MX, (1,)), codes_of((64, 4), MX, (0,))
    assert _kernels.choose(lhs, rhs, MATRIX, device).engine is kernel
    left = _kernels.choose(lhs, rhs, MATRIX, device, execution="auto")
    assert left.engine is None and left.reason.endswith(
        f"is for execution='native' alone: {reason}"
    )
    assert _kernels.choose(lhs, rhs, MATRIX, B200, execution="auto").engine is CUDNN
    assert _kernels.has_engine(device, "native") and not _kernels.has_engine(device, "auto")


def test_an_older_jax_has_no_kernel_for_hopper(monkeypatch):
    monkeypatch.setattr(_shims, "HAS_GPU_KERNELS", False)
    lhs, rhs = codes_of((4, 64), MX, (1,)), codes_of((64, 4), MX, (0,))
    assert "it needs JAX 0.12, and this is" in _kernels.choose(lhs, rhs, MATRIX, H200).reason


def test_codes_are_kept_in_the_order_that_a_kernel_wants(monkeypatch):
    """The sum last, behind the axes of a stack; and come back in their own."""
    monkeypatch.setattr(_shims, "HAS_GPU_KERNELS", True)
    rng = np.random.default_rng(12)
    codes, values = operand(rng, (64, 3, 40), MX, (1, 2), (0,))
    assert in_rows(codes, (0,), "native").order is None
    monkeypatch.setattr(_kernels, "device_of", lambda *arrays: H200)
    assert in_rows(codes, (0,), "auto").order is None
    placed = in_rows(codes, (0,), "native")
    assert placed.order == (1, 2, 0)

    def there_and_back(codes):
        stack = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), codes)
        kept = stack.as_kept()
        assert (kept.data.shape, kept.data.dtype) == ((2, 3, 40, 64), jnp.uint8)
        assert kept.as_kept() is kept
        return jax.vmap(lambda codes: codes.as_codes().values(jnp.float32, scaled=True))(kept)

    for member in jax.jit(there_and_back)(placed):
        assert (np.asarray(member) == values).all()


def test_empty_operands_have_no_kernel():
    lhs, rhs = codes_of((0, 64), MX, (1,)), codes_of((64, 4), MX, (0,))
    assert _kernels.choose(lhs, rhs, MATRIX, TPU).reason.endswith("it is empty")


def test_native_raises_where_there_is_none():
    with pytest.raises(ValueError, match="there is no kernel for cpu. Use 'auto'"):
        dot_general(
            jnp.ones((4, 64)), jnp.ones((64, 4)), MATRIX, recipe=recipes.mxfp8(execution="native")
        )


@pytest.mark.parametrize("recipe", [recipes.mxfp8(), recipes.blockwise()], ids=lambda r: r.name)
def test_explain_says_what_multiplies(recipe):
    fn = fp8jax.fp8(lambda w, x: x @ w, recipe)
    w, x = jnp.ones((256, 256)), jnp.ones((256, 256))
    (site,) = fn.explain(w, x).sites
    assert site.engine == "emulated: there is no kernel for cpu"
    assert site.engine in " ".join(str(fn.explain(w, x)).split())
    assert dict(site.engines).keys() == {"forward", "dlhs", "drhs"}
    assert fp8jax.fp8(lambda w, x: x @ w, recipes.current()).explain(w, x).sites[0].engine == ""
    emulated = dataclasses.replace(recipe, execution="emulated")
    (site,) = fp8jax.fp8(lambda w, x: x @ w, emulated).explain(w, x).sites
    assert site.engine == "emulated: the recipe says so"


def everywhere(monkeypatch, engine, interpret):
    """Every product takes this engine, interpreted; the shapes of the lhs of those to come."""
    calls, kernel = [], engine.multiply

    def multiply(*operands):
        calls.append(operands[0].shape)
        return kernel(*operands, interpret=interpret)

    here = _kernels.device_of().figures.name
    engine = dataclasses.replace(
        engine, platform="cpu", divided=True, serves=here, multiply=multiply
    )
    monkeypatch.setattr("fp8jax.ops._kernels.choice.ENGINES", (engine,))
    return calls


@pytest.fixture
def as_if_on_a_tpu(monkeypatch):
    """Every product takes the TPU's kernel, interpreted."""
    jax.clear_caches()  # Traces of sites are kept, and would be of other engines.
    yield everywhere(monkeypatch, PALLAS, True)
    jax.clear_caches()


@pytest.fixture
def as_if_on_hopper(monkeypatch):
    """Every product takes Hopper's kernel, interpreted, and codes are kept as they are there."""
    jax.clear_caches()
    monkeypatch.setattr(_kernels, "device_of", lambda *arrays: H200)
    yield everywhere(monkeypatch, HOPPER, mosaic_gpu.InterpretGPUParams())
    jax.clear_caches()


def gradients(recipe, wrap, x, w):
    def loss(w, x):
        def layer(x, w):
            return jnp.tanh(wrap(fp8jax.fp8(jnp.matmul, recipe, weights=1))({}, x, w)), None

        return jnp.square(jax.lax.scan(layer, x, w)[0]).mean()

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(w, x)


WRAPS = {
    "plain": lambda f: f,
    "remat": jax.checkpoint,
    "vmap": lambda f: jax.vmap(f, in_axes=(None, 0, None)),
}


@pytest.mark.parametrize("wrap", thorough_but(dict(zip(WRAPS, WRAPS)), ["plain"]))
@pytest.mark.parametrize(
    "recipe", thorough_but({"mxfp8": recipes.mxfp8, "blockwise": recipes.blockwise}, ["blockwise"])
)
def test_gradients_in_a_scan(recipe, wrap, as_if_on_a_tpu):
    rng = np.random.default_rng(5)
    shape = (2, 40, 160) if wrap == "vmap" else (40, 160)
    x = jnp.asarray(rng.standard_normal(shape), jnp.float32)
    w = jnp.asarray(rng.standard_normal((2, 160, 160)) / 13, jnp.float32)
    assert_alike(recipe, WRAPS[wrap], x, w)
    assert len(as_if_on_a_tpu) >= 2


@needs_mosaic
@pytest.mark.thorough
@pytest.mark.parametrize("recipe", [recipes.mxfp8, recipes.blockwise], ids=lambda r: r.__name__)
def test_gradients_in_a_scan_on_hopper(recipe, as_if_on_hopper):
    rng = np.random.default_rng(5)
    x = jnp.asarray(rng.standard_normal((200, 160)), jnp.float32)
    w = jnp.asarray(rng.standard_normal((2, 160, 160)) / 13, jnp.float32)
    assert_alike(recipe, lambda f: f, x, w)
    assert set(as_if_on_hopper) >= {(1, 200, 160), (1, 160, 224)} or recipe is recipes.blockwise


def assert_alike(recipe, wrap, x, w):
    """Gradients by the kernels are those on decoded values."""
    got = gradients(recipe(execution="native"), wrap, x, w)
    expected = gradients(recipe(execution="emulated"), wrap, x, w)
    for ours, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        scale = float(jnp.abs(theirs).max())
        # A sum that rounds otherwise may move a code of the next layer.
        assert scale > 0 and float(jnp.abs(ours - theirs).max()) <= 0.02 * scale
        assert float(jnp.linalg.norm(ours - theirs)) <= 2e-3 * float(jnp.linalg.norm(theirs))


def test_gradients_inside_shard_map(as_if_on_a_tpu):
    auto = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((2,), ("x",), axis_types=auto, devices=jax.devices()[:2])
    rng = np.random.default_rng(6)
    x = jnp.asarray(rng.standard_normal((128, 96)), jnp.float32)
    w = jnp.asarray(rng.standard_normal((96, 64)), jnp.float32)
    spec = jax.sharding.PartitionSpec

    def loss(recipe, x, w):
        out = fp8jax.fp8(jnp.matmul, recipe, weights=1)({}, x, w)
        return jax.lax.pmean(jnp.square(out).mean(), "x")

    def sharded(recipe, check_vma=False):
        run = jax.shard_map(
            functools.partial(loss, recipe),
            mesh=mesh,
            in_specs=(spec("x"), spec()),
            out_specs=spec(),
            check_vma=check_vma,
        )
        gradients = jax.jit(jax.value_and_grad(run, argnums=(0, 1)))
        # Pallas interprets nothing where axes are checked, but its types are.
        return jax.eval_shape(gradients, x, w) if check_vma else gradients(x, w)

    ours, theirs = (
        sharded(recipes.mxfp8(execution="native")),
        sharded(recipes.mxfp8(execution="emulated")),
    )
    assert {(1, 64, 96), (1, 64, 64), (1, 96, 64)} == set(as_if_on_a_tpu)
    checked = sharded(recipes.mxfp8(execution="native"), check_vma=True)
    assert [leaf.shape for leaf in jax.tree.leaves(checked)] == [(), x.shape, w.shape]
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert jnp.abs(other).max() > 0
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [recipes.mxfp8, recipes.blockwise], ids=lambda r: r.__name__)
@jax.numpy_dtype_promotion("standard")  # for optax
def test_training_goes_alike(recipe, as_if_on_a_tpu):
    """300 steps by interpreted kernels and by the emulated path: the same losses."""

    class Mlp(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(32)(nn.gelu(nn.Dense(256)(x)))

    rng = np.random.default_rng(7)
    x = jnp.asarray(rng.standard_normal((128, 160)), jnp.float32)
    y = jnp.asarray(np.tanh(rng.standard_normal((160, 32)).T @ np.asarray(x).T).T, jnp.float32)

    def losses(execution):
        model = fp8jax.linen.Fp8(Mlp(), recipe(execution=execution))
        variables = model.init(jax.random.key(0), x)
        optimizer = optax.adam(1e-3)
        state = optimizer.init(variables)

        @jax.jit
        def step(variables, state):
            value, grads = jax.value_and_grad(
                lambda variables: jnp.square(model.apply(variables, x) - y).mean()
            )(variables)
            updates, state = optimizer.update(grads, state, variables)
            return optax.apply_updates(variables, updates), state, value

        found = []
        for _ in range(300):
            variables, state, value = step(variables, state)
            found.append(float(value))
        return np.array(found)

    ours, theirs = losses("native"), losses("emulated")
    print(abs(ours - theirs).max(), theirs[0], theirs[-1])
    assert theirs[-1] < 0.5 * theirs[0] and abs(ours - theirs).max() <= 1e-3
