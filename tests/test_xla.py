"""What each function of `fp8jax._xla` buys on a CPU: without it, a step is worse in what it names.

One that fails here with the newest JAX may go, if it does so with the oldest.
"""

import re
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiers import thorough_but

import fp8jax
from fp8jax import _xla, recipes
from fp8jax._scaling import PerTensor, group_amax
from fp8jax.ops._execution import cpu_multiplies_bfloat16

DELAYED = recipes.delayed()
CALLING = ("delayed", "current", "rowwise", "blockwise")
WIDTH, LAYERS = 1024, 2
W = [jnp.full((2 * WIDTH, WIDTH), 0.01)] * 2 * LAYERS
X = jax.random.normal(jax.random.key(0), (1024, WIDTH))
IS_NEW = pytest.mark.skipif(
    jax.__version_info__ < (0, 12), reason="older JAX takes no more instructions"
)


def loss(weights, x):
    for up, down in zip(weights[::2], weights[1::2]):
        h = jax.nn.gelu(x.reshape(-1, 8, WIDTH) @ up.T)
        x = x + h.reshape(-1, 2 * WIDTH) @ down
    return jnp.square(x).mean()


def compiled(recipe, monkeypatch, name=None, instead=None):
    """A step, with a function of `_xla` replaced."""
    jax.clear_caches()  # Traces of sites are kept.
    fp8_loss = fp8jax.fp8(loss, recipe)
    scales = fp8_loss.init(W, X)

    def step(scales, weights, x):
        of_scales, of_weights = jax.grad(fp8_loss, argnums=(0, 1))(scales, weights, x)
        return of_scales, jax.tree.map(lambda w, g: w - 0.1 * g, weights, of_weights)

    with monkeypatch.context() as patch:
        if name is not None:
            patch.setattr(_xla, name, instead)
        step = jax.jit(step, donate_argnums=(0, 1)).lower(scales, W, X).compile()
    jax.clear_caches()
    return step, scales


def instructions(step):
    return step.as_text().count(" = ")


def copies(step):
    return step.as_text().count(" copy(")


def temporaries(step):
    return step.memory_analysis().temp_size_in_bytes


def plain_rows(row_of, vectors):
    return [row_of(vector) for vector in vectors]


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("name", "instead", "measure", "least"),
    [
        ("after", lambda values, _: values, copies, 1.1),
        ("rows_apart", plain_rows, instructions, 1.1),
        ("transposed", jnp.transpose, temporaries, 1.1),
        pytest.param(
            *("before_cast", lambda x: x, instructions, 1.02),
            marks=IS_NEW,
        ),
        pytest.param(
            *("in_memory", lambda codes: codes, instructions, 1.02),
            marks=IS_NEW,
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_without_it_a_step_is_worse(name, instead, measure, least, monkeypatch):
    own, _ = compiled(DELAYED, monkeypatch)
    without, _ = compiled(DELAYED, monkeypatch, name, instead)
    print(f"{name}: {measure(own)} with it, {measure(without)} without")
    assert measure(without) >= least * measure(own)


@pytest.mark.thorough
@pytest.mark.skipif(not cpu_multiplies_bfloat16(), reason="products run in float32 here")
def test_without_it_a_product_has_no_loop(monkeypatch):
    instead = ("before_transposition", lambda product: product)
    without, scales = compiled(recipes.blockwise(), monkeypatch, *instead)
    arguments = jax.tree.map(jnp.copy, (scales, W))
    with pytest.raises(jax.errors.JaxRuntimeError, match="BF16 x BF16"):
        jax.block_until_ready(without(*arguments, X))
    own, scales = compiled(recipes.blockwise(), monkeypatch)
    jax.block_until_ready(own(*jax.tree.map(jnp.copy, (scales, W)), X))


@pytest.mark.thorough
@IS_NEW
def test_without_it_an_initialization_is_made_for_each_site(monkeypatch):
    """What makes the arrays, as a module's random numbers."""

    def init(key, x):
        weights = [jax.random.normal(k, w.shape) for k, w in zip(jax.random.split(key, 4), W)]
        return weights, fp8jax.fp8(loss, DELAYED).init(weights, x)

    def count():
        jax.clear_caches()
        step = jax.jit(lambda key, x: init(key, x)).lower(jax.random.key(0), X).compile()
        return instructions(step)

    own = count()
    monkeypatch.setattr(_xla, "made_once", lambda arrays: arrays)
    without = count()
    print(f"made_once: {own} with it, {without} without")
    jax.clear_caches()
    assert without >= 1.1 * own


@pytest.mark.thorough
def test_without_it_a_maximum_takes_longer(monkeypatch):
    def plain(bits, axes, raised=np.int32(0)):
        return _xla.max_over(bits, axes) - raised

    def program():
        jax.clear_caches()
        amax = lambda x: group_amax(jnp.tanh(x), PerTensor())
        return jax.jit(amax).lower(jnp.ones((4096, 2048))).compile()

    own = program()
    monkeypatch.setattr(_xla, "max_on_cpu", plain)
    programs, x = {"own": own, "plain": program()}, jnp.ones((4096, 2048))
    least = dict.fromkeys(programs, np.inf)
    for _ in range(15):
        for name, run in programs.items():
            start = time.process_time()
            jax.block_until_ready(run(x))
            least[name] = min(least[name], time.process_time() - start)
    print(least)
    jax.clear_caches()
    assert least["plain"] >= 1.1 * least["own"]


def _on_one_device(function):
    """Traced for a mesh of one device, as where there are no others."""
    automatic = (jax.sharding.AxisType.Auto,)
    with jax.set_mesh(jax.make_mesh((1,), ("x",), automatic, devices=jax.devices()[:1])):
        return function()


@pytest.mark.parametrize("name", thorough_but({name: name for name in CALLING}, ["current"]))
def test_a_program_for_one_device_calls_what_is_alike(name):
    """Casts, amaxes and products; with the values of a program that holds them."""
    weights = jax.random.normal(jax.random.key(1), (4, 32, 32))
    x = jax.random.normal(jax.random.key(2), (8, 32))

    def of_layers(weights, x):
        for w in weights:
            x = jax.nn.tanh(x @ w)
        return jnp.square(x).mean()

    fp8_loss = fp8jax.fp8(of_layers, getattr(recipes, name)())
    scales = fp8_loss.init(weights, x)
    gradients = jax.value_and_grad(fp8_loss, argnums=(0, 1))

    def lowered():
        return jax.jit(lambda *arguments: gradients(*arguments)).lower(scales, weights, x)

    alone = _on_one_device(lowered)
    called = re.findall(r".*inlineable.*", alone.as_text())
    assert called and all("call @_called" in line for line in called)
    one, many = alone.compile(), lowered().compile()
    texts = [str(program.as_text()) for program in (one, many)]
    counts = [text.count("to_apply=%_called") for text in texts]
    assert counts[0] >= 4 * 3 and not counts[1]
    products = fp8jax.hlo.report(one).products
    assert {(p.site, p.product) for p in products} == {
        (p.site, p.product) for p in fp8jax.hlo.report(many).products
    }
    arguments = (scales, weights, x)
    (found, found_gradients), (value, expected) = one(*arguments), many(*arguments)
    assert float(found) == float(value) != float(of_layers(weights, x))
    for got, wanted in zip(*map(jax.tree.leaves, (found_gradients, expected)), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-7)
        assert np.any(np.asarray(wanted))


@pytest.mark.thorough
def test_without_calls_a_program_is_longer(monkeypatch):
    """By what XLA is given, of which it sees once what is called."""
    weights, x = [jnp.full((64, 64), 0.01)] * 8, jnp.ones((32, 64))

    def of_layers(weights, x):
        for w in weights:
            x = x + jax.nn.gelu(x @ w)
        return jnp.square(x).mean()

    fp8_loss = fp8jax.fp8(of_layers, recipes.current())

    def operations():
        jax.clear_caches()
        step = jax.jit(jax.grad(fp8_loss, argnums=1))
        return step.lower({}, weights, x).as_text().count(" = ")

    own = _on_one_device(operations)
    monkeypatch.setattr(
        _xla, "called", lambda function, *arrays, **static: function(*arrays, **static)
    )
    without = _on_one_device(operations)
    jax.clear_caches()
    print(f"called: {own} operations with it, {without} without")
    assert without >= 1.6 * own
