"""Unrolled layers as one scan: the same values, gradients, scales and names; refusals in words."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from jaxprs import products_in
from tiers import thorough_but

import fp8jax
from fp8jax import _shims, recipes
from fp8jax.bench import compile_times

WIDTH, LAYERS = 8, 4
X = jax.random.normal(jax.random.key(0), (4, WIDTH))


def params_of(layers=LAYERS, names=("up", "down"), key=1):
    keys = iter(jax.random.split(jax.random.key(key), layers * len(names)))
    return [
        {name: jax.random.normal(next(keys), (WIDTH, WIDTH)) * 0.5 for name in names}
        for _ in range(layers)
    ]


def layer(weights, x):
    return x + jnp.tanh(x @ weights["up"]) @ weights["down"]


def plain(params, x):
    for weights in params:
        x = layer(weights, x)
    return jnp.square(x).mean()


def rematerialized(params, x):
    for weights in params:
        x = jax.checkpoint(layer)(weights, x)
    return jnp.square(x).mean()


def with_dropout(params, x):
    """Keys by constants of each layer's own, inside what is rematerialized."""

    def block(number, weights, x, key):
        keep = jax.random.bernoulli(jax.random.fold_in(key, number), 0.75, x.shape)
        return layer(weights, jnp.where(keep, x / jnp.float32(0.75), 0.0))

    for number, weights in enumerate(params):
        x = jax.checkpoint(functools.partial(block, 7 * number))(weights, x, jax.random.key(5))
    return jnp.square(x).mean()


def from_a_stack(params, x):
    """Weights and keys sliced by each layer's own number."""
    stack = jax.tree.map(lambda *leaves: jnp.stack(leaves), *params)
    keys = jax.random.split(jax.random.key(3), len(params))
    for number in range(len(params)):
        weights = jax.tree.map(lambda leaf, at=number: leaf[at], stack)
        x = layer(weights, x + jax.random.normal(keys[number], x.shape))
    return jnp.square(x).mean()


def read_later(params, x):
    """A shared mask, literals that differ, and a loss of what each layer computed."""
    mask, total = jnp.where(x > 0, 1.0, 0.5), 0.0
    for number, weights in enumerate(params):
        x = layer(weights, x * mask * jnp.float32(1 / (number + 1)))
        total = total + jnp.abs(x).mean()
    return total


def of_two_kinds(params, x):
    """Superblocks of three layers that are alike and one that isn't, and their like within."""
    for number, weights in enumerate(params):
        x = layer(weights, x) if number % 4 != 3 else jnp.sin(x @ weights["up"])
    return jnp.square(x).mean()


def with_own_rules(params, x):
    """Functions with derivatives of their own, made anew for each layer."""
    for weights in params:
        clipped = jax.custom_jvp(lambda x: jnp.clip(x, -1.0, 1.0))
        clipped.defjvp(lambda primals, tangents: (clipped(*primals), tangents[0]))
        doubled = jax.custom_vjp(lambda w, x: x @ w)
        doubled.defvjp(
            lambda w, x: (x @ w, (w, x)), lambda kept, g: (kept[1].T @ g, 2 * g @ kept[0].T)
        )
        x = doubled(weights["down"], clipped(x @ weights["up"]))
    return jnp.square(x).mean()


def with_its_own_gradient(params, x):
    """A step: forward and backward are unrolled."""
    value, grads = jax.value_and_grad(plain)(params, x)
    return value, jax.tree.map(lambda weight, grad: weight - 0.1 * grad, params, grads)


def over_microbatches(params, x):
    def body(total, x):
        return total + plain(params, x), None

    return jax.lax.scan(body, jnp.float32(0), jnp.stack([x, 2 * x]))[0]


def encoder_and_decoder(params, x):
    memory, half = x, len(params) // 2
    for weights in params[:half]:
        memory = layer(weights, memory)
    for weights in params[half:]:
        x = layer(weights, x) + memory
    return jnp.square(x).mean()


# The function, its number of layers, and how many blocks each scan has.
CASES = {
    "plain": (plain, 4, [4]),
    "rematerialized": (rematerialized, 3, [3]),
    "with_dropout": (with_dropout, 3, [3]),
    "from_a_stack": (from_a_stack, 3, [3]),
    "read_later": (read_later, 4, [3]),
    "of_two_kinds": (of_two_kinds, 12, [3, 3]),
    "with_own_rules": (with_own_rules, 3, [3]),
    "with_its_own_gradient": (with_its_own_gradient, 4, [4, 3]),
    "over_microbatches": (over_microbatches, 3, [3]),
    "encoder_and_decoder": (encoder_and_decoder, 6, [3, 3]),
}


def both(fn, recipe=None, **options):
    recipe = recipes.delayed(history_window=2) if recipe is None else recipe
    return [fp8jax.fp8(fn, recipe, scan_repeats=repeats, **options) for repeats in (False, True)]


def counts_of(explanation):
    return [int(text.split()[0]) for text in explanation.scans]


@pytest.mark.parametrize("name", CASES)
def test_the_blocks_are_found_and_the_sites_stay(name):
    fn, layers, counts = CASES[name]
    unrolled, scanned = (one.explain(params_of(layers), X) for one in both(fn))
    assert scanned.sites == unrolled.sites and len(scanned.sites) >= layers
    assert unrolled.scans == () and counts_of(scanned) == counts
    assert scanned.scans[-1] in str(scanned) and scanned.scans[-1] in scanned.to_json()


def assert_close(one, other, of_largest=0.0):
    """Scales exactly; the rest to some part of each array's largest magnitude."""
    for path, expected in jax.tree_util.tree_leaves_with_path(one):
        found = dict(jax.tree_util.tree_leaves_with_path(other))[path]
        bound = of_largest * float(jnp.abs(expected).max(initial=0.0))
        where = jax.tree_util.keystr(path)
        np.testing.assert_allclose(found, expected, rtol=0, atol=bound, err_msg=where)


def trained_for(fn, params, updates=2):
    """The exponents after each update, and each step's loss and gradients."""
    trained = {"fp8": fn.init(params, X), "params": params}
    with jax.numpy_dtype_promotion("standard"):  # for optax
        tx = fp8jax.with_delayed_scaling(optax.sgd(0.5))
        state, found = tx.init(trained), [(trained["fp8"], None)]

        @jax.jit
        def step(trained, state, x):
            def loss(trained):
                return fn(trained["fp8"], trained["params"], x)

            value, grads = jax.value_and_grad(loss)(trained)
            updates, state = tx.update(grads, state, trained)
            return value, grads, optax.apply_updates(trained, updates), state

        for number in range(updates):
            value, grads, trained, state = step(trained, state, X * 4.0**number)
            found.append((trained["fp8"], (value, grads)))
    return found


def test_loss_gradients_and_amaxes_are_those_of_the_unrolled_program():
    """With what a real layer has: rematerialization, and dropout by constants of its own."""
    params, (unrolled, scanned) = params_of(3), both(with_dropout)
    scales = scanned.init(params, X)
    one, other = (
        jax.jit(jax.value_and_grad(fn, argnums=(0, 1)))(scales, params, X)
        for fn in (unrolled, scanned)
    )
    assert_close(one[1][0], other[1][0])
    assert all(leaf.any() for leaf in jax.tree.leaves(other[1]))
    assert_close(one, other, 1e-5)


@pytest.mark.thorough
@pytest.mark.parametrize("name", CASES)
def test_trajectories_are_those_of_the_unrolled_program(name):
    fn, layers, _ = CASES[name]
    if name == "with_its_own_gradient":  # its outputs are gradients already
        params = params_of(layers)
        one, other = (f.observe(f.init(params, X), params, X) for f in both(fn))
        assert_close(one, other, 1e-5)
        return
    one, other = (trained_for(f, params_of(layers)) for f in both(fn))
    for (scales, step), (of_scan, step_of_scan) in zip(one, other, strict=True):
        assert_close(scales, of_scan)
        assert_close(step, step_of_scan, 1e-5)
    moved = [scales for scales, _ in one]
    assert any((a != b).any() for a, b in zip(*map(jax.tree.leaves, (moved[0], moved[-1]))))
    plain_value = jax.jit(fn)(params_of(layers), X)
    assert 1e-4 < abs(other[1][1][0] - plain_value) / plain_value < 0.5  # FP8 it is, not more


def loops_in(jaxpr):
    for equation in _shims.open_jaxpr(jaxpr)[0].eqns:
        if equation.primitive.name == "scan":
            yield equation
        for inner in _shims.jaxprs_in(equation.params):
            yield from loops_in(inner)


def test_the_program_has_one_block():
    params = params_of(9)
    programs = [
        jax.make_jaxpr(jax.grad(fn, argnums=1))({}, params, X)
        for fn in both(plain, recipes.current())
    ]
    of_unrolled, of_scan = (sum(map(products_in, program.eqns)) for program in programs)
    forward = [loop for loop in loops_in(programs[1]) if loop.params["length"] == 9]
    assert len(forward) == 2 and not list(loops_in(programs[0]))
    assert of_unrolled >= 9 * 2 * 3 - 1 and of_scan <= 2 * 3


def coded(params):
    return fp8jax.quantize_params(params, rules=[fp8jax.WeightRule(".*", fp8jax.PerChannel(1))])


@pytest.mark.parametrize(
    "recipe",
    thorough_but(
        {
            "weight_only": recipes.weight_only(),
            "delayed": recipes.delayed(),
            "rowwise": recipes.rowwise(),
        },
        ("weight_only",),
    ),
)
def test_codes_are_stacked_as_they_are(recipe):
    params = coded(params_of())
    unrolled, scanned = both(plain, recipe)
    scales = scanned.init(params, X)
    assert_close(unrolled.init(params, X), scales)
    expected, found = (jax.jit(fn)(scales, params, X) for fn in (unrolled, scanned))
    assert_close(expected, found, 1e-6)
    program = str(jax.make_jaxpr(scanned)(scales, params, X))
    assert f"u8[{LAYERS},{WIDTH},{WIDTH}]" in program
    assert f"f32[{LAYERS},{WIDTH},{WIDTH}]" not in program
    assert scanned.explain(params, X).refused == ()


def test_layers_whose_codes_are_held_otherwise_are_no_part_of_a_run():
    first, *rest = params_of(6)
    params = [first, *coded(rest[:4]), *rest[4:]]
    scanned = both(plain, recipes.weight_only())[1]
    assert counts_of(scanned.explain(params, X)) == [4]


def test_rules_end_a_run():
    rules = [fp8jax.Rule(".*", None, first=1, last=1)]
    explanation = both(plain, rules=rules)[1].explain(params_of(6), X)
    # The first layer's first product, and the last one's last, are left out.
    assert counts_of(explanation) == [5] and sum(site.selected for site in explanation.sites) == 10


def test_monitor_sees_each_site():
    params = params_of(3)
    scanned = both(plain, recipes.current())[1]
    errors = fp8jax.metrics.monitor(scanned, progress=False)({}, params, X)
    names = {f"{number}/{name}" for number in range(3) for name in ("up", "down")}
    assert {site.name for site in errors.sites} == names


def test_the_report_finds_each_site():
    params = params_of(3)
    scanned = both(plain, recipes.current())[1]
    compiled = jax.jit(jax.grad(scanned, argnums=1)).lower({}, params, X).compile()
    report = fp8jax.hlo.report(compiled)
    verdicts = {report.verdict(site.name) for site in scanned.explain(params, X).sites}
    assert len(verdicts) == 1 and "not in the program" not in verdicts


def wider(params, x):
    return plain(params[:2], x) + jnp.square(x[:2] @ params[2]["up"]).mean()


def by_other_constants(params, x):
    for number, weights in enumerate(params):
        x = layer(weights, jnp.roll(x, number, 0))
    return jnp.square(x).mean()


def over_two(params, x):
    """Each layer reads what the one before the last computed."""
    before = x
    for weights in params:
        before, x = x, layer(weights, before) + x
    return jnp.square(x).mean()


def side_by_side(params, x):
    return jnp.stack([jnp.square(x @ weights["up"]).mean() for weights in params]).sum()


def printing(params, x):
    for weights in params:
        x = layer(weights, x)
        jax.debug.print("{}", x.mean())
    return jnp.square(x).mean()


def with_other_rules(params, x):
    for number, weights in enumerate(params):
        scaled = jax.custom_jvp(lambda x: x * 1.0)
        scaled.defjvp(lambda p, t, by=number: (p[0] * 1.0, t[0] * jnp.float32(by)))
        x = layer(weights, scaled(x))
    return jnp.square(x).mean()


def with_zeros_of_either_sign(params, x):
    """Numbers in a scan's own jaxpr must be the same, and these two are equal."""
    for weights, zero in zip(params, (0.0, -0.0, 0.0, -0.0)):
        signs = jax.lax.scan(lambda x, _, by=zero: (jnp.copysign(x, by), None), x, length=1)[0]
        x = layer(weights, x) + signs
    return jnp.square(x).mean()


def with_other_numbers_inside(params, x):
    for weights, by in zip(params, (1.0, 2.0, 3.0, 4.0)):
        x = layer(weights, x)
        x = jax.lax.scan(lambda x, _, by=by: (x * by, None), x, length=1)[0]
    return jnp.square(x).mean()


REFUSED = {
    "with_zeros_of_either_sign": (
        with_zeros_of_either_sign,
        "no block of equations is there 3 times in a row",
    ),
    "with_other_numbers_inside": (
        with_other_numbers_inside,
        r"a number inside scan \(test_scan_repeats.py:\d+\), or what is read there",
    ),
    "wider": (wider, "no block of equations is there 3 times in a row"),
    "by_other_constants": (
        by_other_constants,
        r"results of slice.*: float32\[\d,8\] there, and .* here",
    ),
    "side_by_side": (side_by_side, "the blocks don't read each what the one before computed"),
    "over_two": (
        over_two,
        r"dot_general reads what a block computed that is not the one before \(.*\)",
    ),
    "with_other_rules": (
        with_other_rules,
        r"a rule of custom_jvp_call \(test_scan_repeats.py:\d+\), or what it closes over",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_repeat_itself_is_refused_in_words(name):
    fn, words = REFUSED[name]
    unrolled, scanned = both(fn, recipes.current())
    assert unrolled.explain(params_of(), X).sites
    for call in (scanned.explain, scanned.init, functools.partial(scanned, {})):
        with pytest.raises(
            ValueError,
            match=r"scan_repeats=True needs layers that are alike: a block of equations with a "
            rf"product in FP8, 3 times or more in a row, .*\. The first difference: {words}\.",
        ):
            call(params_of(), X)


@pytest.mark.parametrize(
    ("recipe", "other", "words"),
    [
        (recipes.current(), recipes.rowwise(), r"0/up \(current\) and of 1/up \(rowwise\)"),
        (
            recipes.delayed(),
            recipes.delayed(flushed=True),
            r"0/up \(delayed\) and of 1/up \(delayed\): forward differs",
        ),
    ],
    ids=["another", "of the same name"],
)
def test_a_recipe_that_differs_is_named(recipe, other, words):
    scanned = both(plain, recipe, rules=[fp8jax.Rule("1/up", other)])[1]
    with pytest.raises(ValueError, match="the recipes of " + words):
        scanned.explain(params_of(2), X)


def test_what_has_effects_stays_in_its_order():
    unrolled, scanned = both(printing, recipes.current())
    assert unrolled.explain(params_of(), X).sites
    with pytest.raises(ValueError, match=r"debug_\w+ \(test_scan_repeats.py:\d+\) has effects"):
        scanned.explain(params_of(), X)


def test_scan_repeats_is_a_bool():
    with pytest.raises(TypeError, match="scan_repeats must be True or False; got 12"):
        fp8jax.fp8(plain, recipes.current(), scan_repeats=12)


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x):
        h = nn.LayerNorm()(x)
        query, key, value = (nn.Dense(WIDTH, use_bias=False, name=name)(h) for name in "qkv")
        x = x + jax.nn.softmax(query @ key.T) @ value
        h = nn.Dropout(0.25, deterministic=False)(nn.relu(nn.Dense(WIDTH, name="up")(x)))
        return x + nn.Dense(WIDTH, name="down")(h)


class Model(nn.Module):
    @nn.compact
    def __call__(self, x):
        for number in range(3):
            x = nn.remat(Layer)(name=f"layer{number}")(x)
        return nn.Dense(4, name="head")(x)


@pytest.mark.thorough
@jax.numpy_dtype_promotion("standard")
@jax.numpy_rank_promotion("allow")
@pytest.mark.parametrize("recipe", [recipes.delayed(), recipes.rowwise()], ids=lambda r: r.name)
def test_linen_layers(recipe):
    one, other = (
        fp8jax.linen.Fp8(Model(), recipe, scan_repeats=repeats) for repeats in (False, True)
    )
    rngs = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    variables = other.init(rngs, X)
    assert_close(one.init(rngs, X).get("fp8"), variables.get("fp8"))
    assert counts_of(other.explain(variables, X, rngs=rngs)) == [3]

    def loss(model, variables):
        return jnp.square(model.apply(variables, X, rngs={"dropout": jax.random.key(2)})).mean()

    expected, found = (
        jax.jit(jax.value_and_grad(functools.partial(loss, model)))(variables)
        for model in (one, other)
    )
    assert_close(expected[1].get("fp8"), found[1].get("fp8"))
    assert_close(expected, found, 2e-5)


class NnxModel(nnx.Module):
    def __init__(self, rngs):
        self.layers = nnx.List([nnx.Linear(WIDTH, WIDTH, rngs=rngs) for _ in range(3)])

    def __call__(self, x):
        for linear in self.layers:
            x = x + nnx.relu(linear(x))
        return x


@pytest.mark.thorough
@jax.numpy_dtype_promotion("standard")
@jax.numpy_rank_promotion("allow")
def test_nnx_layers():
    found = []
    for repeats in (False, True):
        model = fp8jax.nnx.Fp8(NnxModel(nnx.Rngs(0)), recipes.delayed(), scan_repeats=repeats)
        model.init_scales(X)
        assert counts_of(model.explain(X)) == ([3] if repeats else [])
        found.append(nnx.jit(nnx.value_and_grad(lambda model, x: model(x).sum()))(model, X))
    (value, grads), (of_scan, grads_of_scan) = found
    assert_close(value, of_scan, 1e-6)
    assert_close(nnx.to_pure_dict(grads), nnx.to_pure_dict(grads_of_scan), 1e-5)


def members(fn, scales, params, x):
    return jax.vmap(fn, in_axes=(None, None, 0))(scales, params, jnp.stack([x, 3 * x])).sum()


def switched(fn, scales, params, x):
    return fn.when(jnp.bool_(True))(scales, params, x)


def divided(fn, scales, params, x):
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spread = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    return fn(scales, params, jax.lax.with_sharding_constraint(x, spread))


def in_parts(fn, scales, params, x):
    @functools.partial(
        jax.shard_map,
        mesh=jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,)),
        in_specs=(jax.P(), jax.P(), jax.P("data")),
        out_specs=jax.P(),
    )
    def run(scales, params, x):
        return jax.lax.pmean(fn(scales, params, x), "data")

    return run(scales, params, x)


@pytest.mark.thorough
@pytest.mark.parametrize("within", [members, switched, divided, in_parts])
def test_within_transformations(within):
    params, (unrolled, scanned) = params_of(3), both(plain)
    scales = unrolled.init(params, X)
    expected, found = (
        jax.jit(jax.value_and_grad(functools.partial(within, fn), argnums=(0, 1)))(
            scales, params, X
        )
        for fn in (unrolled, scanned)
    )
    assert_close(expected[1][0], found[1][0])
    assert_close(expected, found, 1e-5)


@pytest.mark.slow
def test_twelve_layers_compile_in_less_time():
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        for recipe in ("delayed", "current"):
            unrolled, scanned = (
                compile_times.measured("CPU", 12, name, width=256)
                for name in (recipe, f"{recipe}+scan_repeats")
            )
            assert scanned.seconds < 0.85 * unrolled.seconds
            assert scanned.lowering < unrolled.lowering
