"""`with_delayed_scaling`: the optimizer sees the parameters alone, and says when scales move."""

import functools
import re
import warnings

import flax.core
import flax.linen as nn
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState
from tiers import thorough_but

import fp8jax
from fp8jax import SiteScales, recipes
from fp8jax._observe import seal_of
from fp8jax.optim import delayed_scaling, with_delayed_scaling

CASTS = recipes.delayed(history_window=4).delayed_casts
STEPS = 9
THIRDS = with_delayed_scaling(optax.MultiSteps(optax.sgd(0.1), 3))
ALONE = delayed_scaling()


@pytest.fixture(autouse=True)
def optax_promotes():
    """Several of optax's own transformations mix dtypes."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def seen(amaxes, shape=()) -> SiteScales:
    amaxes = jnp.broadcast_to(jnp.asarray(amaxes, jnp.float32), (*shape, 3))
    operands, uses = (amaxes[..., i] for i in range(3)), jnp.ones(shape)
    return SiteScales(*operands, seal_of(amaxes), None, "dot", CASTS, uses)


def params_of(wrap=dict):
    return wrap(
        {
            "params": {"w": jnp.arange(4.0), "b": jnp.ones(())},
            "fp8": {"dot": SiteScales.zeros("dot", CASTS)},
        }
    )


def gradients(k: int, wrap=dict):
    """At step k, large enough for a clip by norm 1 to bite, amaxes beyond it by far."""
    rng = np.random.default_rng(k)
    rest = {"w": jnp.asarray(rng.normal(size=4) * 10, jnp.float32), "b": jnp.float32(rng.normal())}
    return wrap({"params": rest, "fp8": {"dot": seen(np.exp2(rng.normal(size=3) * 8))}})


@functools.partial(jax.jit, static_argnums=0)
def step(tx, params, state, grads):
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state


def run(tx, steps, gradients=gradients, params=None):
    """The parameters after each step, and the last state."""
    params = params_of() if params is None else params
    state, trajectory = tx.init(params), []
    for k in range(steps):
        params, state = step(tx, params, state, gradients(k))
        trajectory.append(params)
    return trajectory, state


@functools.cache
def scales_alone():
    """What the scales do with `delayed_scaling` by itself."""
    trajectory, state = run(ALONE, STEPS, lambda k: gradients(k)["fp8"], params_of()["fp8"])
    return trajectory, state


def assert_equal(got, expected):
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, got, expected)


@pytest.mark.parametrize(
    "name, inner",
    {
        "chain with clip": optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(0.1)),
        "inject_hyperparams": optax.inject_hyperparams(optax.adamw)(
            learning_rate=0.1, weight_decay=0.5
        ),
        "apply_if_finite": optax.apply_if_finite(optax.lion(0.1), 3),
        "layer-wise": optax.lamb(0.1),
        "with extra arguments": optax.chain(optax.sgd(0.1), optax.contrib.reduce_on_plateau()),
    }.items(),
)
def test_both_go_their_own_way(name, inner):
    """Parameters move bitwise as without scales, scales as without parameters."""
    extra = {"value": jnp.float32(1.0)} if "extra" in name else {}

    def pass_extra(tx):
        return optax.GradientTransformation(tx.init, lambda g, s, p: tx.update(g, s, p, **extra))

    trajectory, state = run(pass_extra(with_delayed_scaling(inner)), STEPS)
    rest, rest_state = run(
        pass_extra(inner), STEPS, lambda k: gradients(k)["params"], params_of()["params"]
    )
    scales, scaling = scales_alone()
    assert_equal([params["params"] for params in trajectory], rest)
    assert_equal([params["fp8"] for params in trajectory], scales)
    assert_equal(state.scaling, scaling)
    assert_equal(jax.tree.leaves(state.inner), jax.tree.leaves(rest_state))


def test_in_train_state_and_frozen_dict():
    """Flax's TrainState takes it, over any container; its state goes to bytes and back."""
    params = params_of(flax.core.freeze)
    state = TrainState.create(
        apply_fn=None, params=params, tx=with_delayed_scaling(optax.adam(0.1))
    )
    apply = jax.jit(lambda state, grads: state.apply_gradients(grads=grads))
    for k in range(3):
        state = apply(state, gradients(k, flax.core.freeze))
    assert_equal(dict(state.params["fp8"]), scales_alone()[0][2])
    back = flax.serialization.from_bytes(
        state.opt_state, flax.serialization.to_bytes(state.opt_state)
    )
    assert_equal(back, jax.tree.map(np.asarray, state.opt_state))


@pytest.mark.parametrize(
    "inner",
    [
        optax.MultiSteps(optax.sgd(0.1), 3),
        optax.MultiSteps(
            optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1)), 3
        ).gradient_transformation(),
        optax.chain(
            optax.clip_by_global_norm(1.0),
            optax.MultiSteps(optax.sgd(0.1), 3).gradient_transformation(),
        ),
    ],
    ids=["as it is", "transformation", "in a chain"],
)
def test_multi_steps_freezes_scales_until_it_emits(inner):
    """Exponents move at each third step, as if by one observation of the max over the three."""
    trajectory, state = run(with_delayed_scaling(inner), 9)
    merged = [
        seen(
            np.max(
                [
                    [getattr(gradients(k)["fp8"]["dot"], name) for name in ("lhs", "rhs", "grad")]
                    for k in range(start, start + 3)
                ],
                axis=0,
            )
        )
        for start in (0, 3, 6)
    ]
    expected, scaling = run(ALONE, 3, lambda k: {"dot": merged[k]}, params_of()["fp8"])
    frozen = params_of()["fp8"]
    for k, params in enumerate(trajectory):
        assert_equal(
            params["fp8"],
            expected[k // 3] if k % 3 == 2 else frozen if k < 2 else expected[(k + 1) // 3 - 1],
        )
    for got, wanted in zip(state.scaling.operands, scaling.operands, strict=True):
        assert_equal((got.amax_history, got.stored), (wanted.amax_history, wanted.stored))
        assert (got.observed == 9).all()
    assert not any(pending.any() for pending in state.pending)


def test_multi_steps_in_a_scan_that_carries_the_state():
    tx, params = THIRDS, params_of()

    def body(carry, grads):
        params, state = carry
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(gradients(k) for k in range(6)))
    (scanned, _), _ = jax.jit(lambda carry: jax.lax.scan(body, carry, stacked))(
        (params, tx.init(params))
    )
    assert_equal(scanned["fp8"], run(tx, 6)[0][-1]["fp8"])


def with_fault(k: int, fault: int, value: float):
    """Gradients and amaxes of step k, those of step `fault` all `value` and the later ones moved on
    by one.
    """
    grads = gradients(k - (k > fault))
    return jax.tree.map(lambda leaf: jnp.full_like(leaf, value), grads) if k == fault else grads


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_mini_step_with_a_fault(value):
    """One mini-step that is not finite adds nothing, and the others' maximum is stored; it is
    counted once.
    """
    trajectory, state = run(THIRDS, 3, lambda k: with_fault(k, 1, value))
    merged = jax.tree.map(jnp.maximum, gradients(0)["fp8"], gradients(1)["fp8"])
    expected, scaling = run(ALONE, 1, lambda k: merged, params_of()["fp8"])
    assert_equal(trajectory[-1]["fp8"], expected[0])
    for got, wanted in zip(state.scaling.operands, scaling.operands, strict=True):
        assert_equal(got.amax_history, wanted.amax_history)
        assert (got.nonfinite == 1).all() and (got.observed == 2).all()


@pytest.mark.parametrize(
    "inner, length",
    [
        (optax.apply_if_finite(optax.sgd(0.1), 10), 6),
        (optax.MultiSteps(optax.sgd(0.1), 3, should_skip_update_fn=optax.skip_not_finite), 6),
        (
            optax.apply_if_finite(
                optax.MultiSteps(optax.sgd(0.1), 3).gradient_transformation(), 10
            ),
            6,
        ),
    ],
    ids=["apply_if_finite", "MultiSteps that skips", "apply_if_finite(MultiSteps)"],
)
def test_skipped_batch_leaves_no_trace(inner, length):
    """Where the optimizer skips a batch because of its gradients, its amaxes, finite as they may
    be, aren't stored.
    """
    tx = with_delayed_scaling(inner)
    expected, wanted = run(tx, length)
    for fault in (0, 2, 4):

        def faulty(k, fault=fault):
            grads = with_fault(k, fault, np.nan)
            return grads | {"fp8": {"dot": seen([1e30] * 3)}} if k == fault else grads

        got, state = run(tx, length + 1, faulty)
        assert_equal(got[fault:][1:], expected[fault:])
        assert_equal(
            [operand.amax_history for operand in state.scaling.operands],
            [operand.amax_history for operand in wanted.scaling.operands],
        )
        assert np.isfinite(got[-1]["params"]["w"]).all()


def test_multi_steps_outside_averages_amaxes():
    """The wrong way round, observations are averaged; a bound of the largest is found."""
    trajectory, state = run(
        optax.MultiSteps(with_delayed_scaling(optax.sgd(0.1)), 3).gradient_transformation(), 3
    )
    scaling = state.inner_opt_state.scaling
    assert all((operand.observed == 1).all() for operand in scaling.operands)
    expected, _ = run(with_delayed_scaling(optax.MultiSteps(optax.sgd(0.1), 3)), 3)
    for name in ("lhs", "rhs", "grad"):
        more = getattr(trajectory[-1]["fp8"]["dot"], name) - getattr(
            expected[-1]["fp8"]["dot"], name
        )
        assert (0 <= more).all() and (more <= 4).all()


def test_tree_without_scales_is_the_optimizer_alone():
    params = params_of()["params"]
    got, _ = run(with_delayed_scaling(optax.adam(0.1)), 2, lambda k: gradients(k)["params"], params)
    expected, _ = run(optax.adam(0.1), 2, lambda k: gradients(k)["params"], params)
    assert_equal(got, expected)


def test_init_from_shapes():
    tx = with_delayed_scaling(optax.MultiSteps(optax.adam(0.1), 2))
    shapes = jax.eval_shape(tx.init, jax.eval_shape(params_of))
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), shapes) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), tx.init(params_of())
    )


def test_errors():
    """Each names the argument, the rule, what was got and the remedy."""
    tx, params = with_delayed_scaling(optax.sgd(0.1)), params_of()
    state = tx.init(params)
    with pytest.raises(
        ValueError,
        match=r"params must be the parameters and scales .* got None\. Call update\(updates, "
        r"state, params\)",
    ):
        tx.update(gradients(0), state)
    with pytest.raises(
        ValueError,
        match=r"same sites; got 'dot' at \['fp8'\]\['dot'\], which updates lacks\. Observations "
        r"are",
    ):
        tx.update(gradients(0) | {"fp8": {}}, state, params)
    stacked = params | {"fp8": {"dot": SiteScales.zeros("dot", CASTS, (2,))}}
    with pytest.raises(
        ValueError, match=r"same shapes; got \(\) and \(2,\) for \.lhs of site 'dot'"
    ):
        tx.update(gradients(0), state, stacked)
    with pytest.raises(
        ValueError,
        match=r"state must be that of the same scales: .* Make a new state by init\(params\)",
    ):
        tx.update(gradients(0) | {"fp8": {"dot": seen([1.0] * 3, (2,))}}, state, stacked)
    with pytest.raises(TypeError, match="tx must be an optax.GradientTransformation; got <func"):
        fp8jax.with_delayed_scaling(optax.adamw)
    twice = optax.chain(
        *(optax.MultiSteps(optax.sgd(0.1), k).gradient_transformation() for k in (2, 3))
    )
    with pytest.raises(
        ValueError, match=r"tx must hold one optax\.MultiSteps at most, .*; got 2\. Wrap the whole"
    ):
        with_delayed_scaling(twice).init(params)


@pytest.mark.thorough
@pytest.mark.skipif(
    jax.default_backend() != "cpu",
    reason="other compilers of XLA put the reading of an amax in front by themselves",
)
def test_weights_are_updated_where_they_are():
    """Of a donated weight XLA makes a copy where something may yet read it when the next one is
    written into its memory.
    """

    def loss(params, x):
        x, _ = jax.lax.scan(
            lambda x, w: (jnp.tanh(x @ w), None), jnp.tanh(x @ params["up"]), params["layers"]
        )
        return jnp.square(x @ params["down"]).mean()

    fp8_loss, tx = fp8jax.fp8(loss, recipes.delayed()), with_delayed_scaling(optax.sgd(0.1))
    params, x = (
        {"up": jnp.ones((48, 112)), "layers": jnp.ones((3, 112, 112)), "down": jnp.ones((112, 80))},
        jnp.ones((16, 48)),
    )
    both = {"params": params, "fp8": fp8_loss.init(params, x)}

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def train(both, state):
        grads = jax.grad(lambda both: fp8_loss(both["fp8"], both["params"], x))(both)
        updates, state = tx.update(grads, state, both)
        return optax.apply_updates(both, updates), state

    compiled = train.lower(both, tx.init(both)).compile()
    copied = re.findall(r"= f32\[(?:48,112|3,112,112|112,80)\]\S* copy\(", compiled.as_text())
    assert not copied and compiled.memory_analysis().alias_size_in_bytes > 4 * 112 * (
        48 + 3 * 112 + 80
    )


@pytest.mark.thorough
@pytest.mark.parametrize(
    "recipe, tx",
    [
        pytest.param(
            recipes.delayed(history_window=40),
            with_delayed_scaling(optax.adam(0.1)),
            marks=pytest.mark.slow,
            id="optax",
        ),
        pytest.param(
            recipes.delayed(reduce=50.0),
            with_delayed_scaling(fp8jax.optim.adamw(0.1)),
            id="FP8 moments",
            marks=pytest.mark.thorough,
        ),
    ],
)
def test_states_of_numpy_arrays_run_eagerly(recipe, tx):
    """What `flax.serialization.from_bytes`, pickle and `jax.device_get` return."""
    fn = fp8jax.fp8(lambda weights, x: jnp.square(x @ weights["w"]).mean(), recipe)
    w, x = {"w": jnp.linspace(0.5, 2, 64).reshape(16, 4)}, jnp.linspace(-1, 3, 32).reshape(2, 16)
    scales = fn.init(w, x)
    amaxes, gradients = jax.jit(jax.grad(fn, argnums=(0, 1)))(scales, w, x)
    state = tx.init((scales, w))
    updated = jax.jit(tx.update)((amaxes, gradients), state, (scales, w))
    host, host_state = jax.device_get((scales, w)), jax.device_get(state)
    assert all(
        isinstance(leaf, np.ndarray | np.generic) for leaf in jax.tree.leaves((host, host_state))
    )
    for got, want in (
        (fn(*host, x), fn(scales, w, x)),
        (fn.inlined(host[1], x)[1](host[0]), fn.inlined(w, x)[1](scales)),
        (jax.grad(fn, argnums=(0, 1))(*host, x), (amaxes, gradients)),
    ):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), got, want)
    got = tx.update((amaxes, gradients), host_state, host)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(
            a.astype(np.float32), b.astype(np.float32), rtol=1e-5
        ),
        got,
        updated,
    )


def labels_of(tree):
    return jax.tree.map(lambda leaf: "matrix" if leaf.ndim else "scalar", tree)


def labels_by_name(tree):
    """As in optax's own example: for whatever is no dict a label, by its name."""
    return {
        name: labels_by_name(child)
        if isinstance(child, dict)
        else {"w": "matrix", "b": "scalar"}[name]
        for name, child in tree.items()
    }


@pytest.mark.parametrize(
    "labels",
    [labels_of(params_of(lambda tree: {"params": tree["params"]})), labels_of, labels_by_name],
    ids=["tree", "function of leaves", "function of names"],
)
@pytest.mark.parametrize("wrap", [dict, flax.core.freeze], ids=["dict", "FrozenDict"])
def test_masks_and_labels_of_the_parameters_alone(labels, wrap):
    """The optimizer sees no entry that holds scales alone: what was written without them fits."""
    if wrap is not dict:
        labels = labels_of if callable(labels) else wrap(labels)
    mask = labels if not callable(labels) else labels(wrap({"params": params_of()["params"]}))
    mask = jax.tree.map(lambda label: label == "matrix", mask)
    inner = optax.chain(
        optax.multi_transform({"matrix": optax.adam(0.1), "scalar": optax.sgd(0.1)}, labels),
        optax.add_decayed_weights(0.1, mask),
    )
    trajectory, _ = run(
        with_delayed_scaling(inner), 3, lambda k: gradients(k, wrap), params_of(wrap)
    )

    def alone(tree):
        return wrap({"params": tree["params"]})

    expected, _ = run(inner, 3, lambda k: alone(gradients(k, wrap)), alone(params_of(wrap)))
    assert_equal([alone(params) for params in trajectory], expected)
    assert_equal(dict(trajectory[-1]["fp8"]), scales_alone()[0][2])


@pytest.mark.thorough
def test_entries_of_other_containers_keep_their_places():
    """In a pair, scales leave a masked node; beside parameters in one dict, they leave no entry."""
    node, params = SiteScales.zeros("dot", CASTS), {"w": jnp.ones(2)}
    seen_by_inner = []
    inner = optax.GradientTransformation(
        lambda tree: seen_by_inner.append(tree) or optax.EmptyState(),
        lambda tree, state, params: (tree, state),
    )
    tx = with_delayed_scaling(inner)
    for tree in (
        ({"dot": node}, params),
        {"dot": node, **params},
        [{"a": {"s": [node]}, **params}],
    ):
        updates, _ = tx.update(jax.tree.map(jnp.ones_like, tree), tx.init(tree), tree)
        assert jax.tree.structure(updates) == jax.tree.structure(tree)
    assert seen_by_inner == [
        ({"dot": optax.MaskedNode()}, params),
        params,
        [{"a": {"s": [optax.MaskedNode()]}, **params}],
    ]


@pytest.mark.parametrize(
    "inner", [optax.adam(0.1), optax.MultiSteps(optax.adam(0.1), 2)], ids=["adam", "MultiSteps"]
)
def test_tree_map_params_goes_through_the_inner_state(inner):
    tx = with_delayed_scaling(inner)
    _, state = run(tx, 3)
    paths = {"params": {"w": "at w", "b": "at b"}}
    mapped = optax.tree_utils.tree_map_params(tx, lambda leaf, at: (leaf.shape, at), state, paths)
    moments = optax.tree_utils.tree_get(mapped.inner, "mu")
    assert moments == {"params": {"w": ((4,), "at w"), "b": ((), "at b")}}
    assert_equal((mapped.scaling, mapped.pending), (state.scaling, state.pending))
    same = optax.tree_utils.tree_map_params(tx, lambda leaf: leaf, state)
    assert_equal(same, state)
    _, alone = scales_alone()
    assert_equal(optax.tree_utils.tree_map_params(ALONE, lambda leaf: leaf + 1, alone), alone)


@pytest.mark.thorough
def test_a_line_search_closes_over_the_scales():
    """What asks for them in the optimizer's tree is told; with them closed over, loss falls."""

    def loss(params, x):
        return jnp.square(x @ params["w"] - np.float32(0.5)).mean()

    fn, params, x = fp8jax.fp8(loss, recipes.delayed()), {"w": jnp.ones((4, 3))}, jnp.ones((2, 4))
    trained = {"scales": fn.init(params, x), "params": params}
    tx = with_delayed_scaling(optax.lbfgs())
    value, grads = jax.value_and_grad(lambda t: fn(t["scales"], t["params"], x))(trained)

    def update(value_fn):
        return tx.update(
            grads, tx.init(trained), trained, value=value, grad=grads, value_fn=value_fn
        )

    with pytest.raises(
        ValueError,
        match=r"got optax\.MaskedNode\(\) in the place of those of w.*Close over the scales",
    ):
        update(lambda t: fn(t["scales"], t["params"], x))
    updates, _ = update(lambda t: fn(trained["scales"], t["params"], x))
    moved = optax.apply_updates(trained, updates)
    assert fn(moved["scales"], moved["params"], x) < 0.7 * value


def dense(params, x):
    return jnp.square(x @ params["w"]).mean()


@pytest.mark.parametrize("linen", thorough_but({"function": False, "Linen": True}, ["function"]))
def test_gradients_of_the_weights_alone_are_warned_of(linen):
    """In every mode of calling; not of both halves, of inputs, of the scales alone, of a recipe
    without state, or in a line search.
    """
    w, x = {"w": jnp.full((4, 3), 0.5)}, jnp.ones((2, 4))
    fn = fp8jax.fp8(dense, recipes.delayed())
    scales = fn.init(w, x)
    if linen:
        model = fp8jax.linen.Fp8(nn.Dense(3), recipes.delayed())
        variables = model.init(jax.random.key(0), x)
        scales, w = variables["fp8"], variables["params"]

        def fn(scales, params, x):
            return jnp.square(model.apply({"params": params, "fp8": scales}, x)).mean()

    def warned(function, *args):
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            function(*args)
        return any("will never move" in str(warning.message) for warning in found)

    for function in (
        lambda f: f,
        jax.jit,
        jax.checkpoint,
    ):  # Of each of them, the first trace warns.
        own = fn if linen else fp8jax.fp8(lambda params, x: dense(params, x), recipes.delayed())
        assert warned(jax.grad(function(own), argnums=1), scales, w, x)
    for argnums in ((0, 1), 0, 2):
        assert not warned(jax.grad(fn, argnums=argnums), scales, w, x)
    assert not warned(fn, scales, w, x)
    current = fp8jax.fp8(dense, recipes.current())
    assert not warned(jax.grad(current, argnums=1), {}, {"w": jnp.ones((4, 3))}, x)


def test_a_tree_without_scales_is_warned_of():
    """As an NNX optimizer of weights alone passes it; the text names the filter that doesn't leave
    them out.
    """
    model = fp8jax.nnx.Fp8(nnx.Linear(4, 3, rngs=nnx.Rngs(0)), recipes.delayed())
    model.init_scales(jnp.ones((2, 4)))
    tx = with_delayed_scaling(optax.sgd(0.1))
    with pytest.warns(UserWarning, match=r"hold no SiteScales.*nnx\.Any\(your filter, fp8jax"):
        nnx.Optimizer(model, tx, wrt=nnx.All(nnx.Param, nnx.Not(fp8jax.nnx.Fp8Scale)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        nnx.Optimizer(model, tx, wrt=nnx.Param)
        tx.init({})
