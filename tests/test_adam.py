"""Adam, AdamW and Lion with FP8 moments, against optax's."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from tiers import thorough_but

from fp8jax import optim

PARAMS = {
    "matrix": jnp.linspace(-1, 1, 8 * 256).reshape(8, 256),
    "vector": jnp.linspace(0.5, 1, 10),
    "scalar": jnp.float32(2),
    "empty": jnp.zeros((0, 3)),
}


@pytest.fixture(autouse=True)
def standard_promotion():
    """optax itself needs it."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def gradients(step, params=PARAMS):
    keys = jax.random.split(jax.random.fold_in(jax.random.key(1), step), len(params))
    return {
        name: jax.random.normal(key, p.shape) * (1 + jnp.abs(p))
        for key, (name, p) in zip(keys, sorted(params.items()))
    }


def run(tx, steps, params=PARAMS):
    """The updates of several steps."""
    state, update, seen = tx.init(params), jax.jit(tx.update), []
    for step in range(steps):
        updates, state = update(gradients(step, params), state, params)
        seen.append(updates)
    return seen, state


def assert_close(ours, theirs, tolerance):
    """Relative error in the 2-norm of each leaf."""
    for got, want in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert got.shape == want.shape and got.dtype == want.dtype
        assert jnp.linalg.norm((got - want).ravel()) <= tolerance * jnp.linalg.norm(want.ravel())


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (
            lambda **kw: optim.adam(1e-2, eps_root=1e-6, nesterov=True, nu_dtype="float32", **kw),
            lambda: optax.adam(1e-2, eps_root=1e-6, nesterov=True),
        ),
        (
            lambda **kw: optim.adamw(
                1e-2,
                0.8,
                0.95,
                1e-6,
                weight_decay=0.1,
                mask={"matrix": True, "vector": False, "scalar": True, "empty": True},
                nu_dtype="float32",
                **kw,
            ),
            lambda: optax.adamw(
                1e-2,
                0.8,
                0.95,
                1e-6,
                weight_decay=0.1,
                mask={"matrix": True, "vector": False, "scalar": True, "empty": True},
            ),
        ),
        (
            lambda **kw: optim.lion(1e-2, 0.8, weight_decay=0.1, **kw),
            lambda: optax.lion(1e-2, 0.8, weight_decay=0.1),
        ),
    ],
    ids=["adam", "adamw", "lion"],
)
def test_with_unquantized_moments_all_is_as_in_optax(ours, theirs):
    assert_close(run(ours(mu_dtype="float32"), 4)[0], run(theirs(), 4)[0], 1e-6)


def test_fp8_moments_stay_close_to_optax_and_cost_two_bytes():
    params = {"a": PARAMS["matrix"], "b": jnp.ones((512, 64))}
    ours, state = run(optim.scale_by_adam(), 20, params)
    theirs, expected = run(optax.scale_by_adam(), 20, params)
    assert_close(ours[0], theirs[0], 1e-6)  # Computed from moments that have not been rounded yet.
    assert_close(ours[-1], theirs[-1], 0.13)
    errors = [
        float(jnp.linalg.norm(u - v) / jnp.linalg.norm(v))
        for u, v in zip(*map(jax.tree.leaves, (ours[-1], theirs[-1])))
    ]
    assert min(errors) > 0.01  # They are quantized.
    mean = jax.tree.map(
        lambda nu, v: float(jnp.mean(nu.dequantize() / v)) - 1,
        state.nu,
        expected.nu,
        is_leaf=lambda node: isinstance(node, optim.Fp8Moment),
    )
    assert max(map(abs, mean.values())) < 5e-3
    sizes = (
        sum(leaf.nbytes for leaf in jax.tree.leaves((state.mu, state.nu))),
        sum(p.size for p in jax.tree.leaves(params)),
    )
    assert sizes[0] / sizes[1] <= 2.1


def test_tiny_gradients_stall_with_nearest_and_converge_with_stochastic_rounding():
    """A quadratic whose curvature falls a hundredfold on the way: nearest-rounded second moments
    never come down.
    """
    target = jnp.linspace(0.5, 1.5, 128)

    def train(**options):
        tx = optim.adam(2e-5, eps=1e-16, b2=0.99, **options)

        def step(carry, index):
            x, state = carry
            scale = jnp.where(index < 20, 1e-5, 1e-7)
            updates, state = tx.update(scale * (x - target), state)
            return (optax.apply_updates(x, updates), state), None

        start = target + 0.01
        (x, _), _ = jax.jit(lambda: jax.lax.scan(step, (start, tx.init(start)), jnp.arange(2000)))()
        return float(jnp.abs(x - target).mean() / 0.01)

    exact = train(mu_dtype="float32", nu_dtype="float32")
    assert exact < 0.05
    assert train(rounding="nearest") > 0.7
    assert train() < 0.1


@pytest.mark.thorough
def test_randomness_is_the_keys_and_the_same_however_parameters_are_sharded():
    tx = optim.scale_by_adam()
    params = {"w": PARAMS["matrix"]}
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    sharding = NamedSharding(mesh, P("data", "model"))
    sharded = jax.device_put(params, sharding)
    state = tx.init(sharded)
    for leaf in (state.mu["w"].data, state.nu["w"].data, state.mu["w"].scale):
        assert leaf.sharding.is_equivalent_to(sharding, 2)

    def two_steps(tx, params, state):
        update = jax.jit(tx.update)
        for step in range(2):
            _, state = update(
                jax.tree.map(
                    lambda g, p: jax.device_put(g, p.sharding), gradients(step, params), params
                ),
                state,
            )
        return state

    got, want = two_steps(tx, sharded, state), two_steps(tx, params, tx.init(params))
    for ours, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert np.asarray(ours).tobytes() == np.asarray(theirs).tobytes()
    for leaf in (got.mu["w"].data, got.nu["w"].data):
        assert leaf.sharding.is_equivalent_to(sharding, 2)
    other = two_steps(
        optim.scale_by_adam(key=jax.random.key(5)),
        params,
        optim.scale_by_adam(key=jax.random.key(5)).init(params),
    )
    assert (np.asarray(other.mu["w"].data) != np.asarray(want.mu["w"].data)).mean() > 0.1


def test_it_goes_where_optax_goes():
    """chain, clipping, schedules, injected hyperparameters, masks, partitions, MultiSteps,
    apply_if_finite, map_params.
    """
    schedule = optax.linear_schedule(1e-2, 0.0, 10)
    masked = optax.masked(
        optim.adamw(schedule), {"matrix": True, "vector": False, "scalar": True, "empty": True}
    )
    labels = {"matrix": "fp8", "vector": "sgd", "scalar": "sgd", "empty": "fp8"}
    tx = optax.apply_if_finite(
        optax.chain(
            optax.clip_by_global_norm(1.0),
            optax.partition(
                {
                    "fp8": optax.inject_hyperparams(optim.lion)(1e-2, b2=schedule),
                    "sgd": optax.sgd(1e-2),
                },
                labels,
            ),
            masked,
        ),
        3,
    )
    multi = optax.MultiSteps(tx, 2)
    seen, state = run(multi.gradient_transformation(), 2)
    assert (
        all((updates == 0).all() for updates in jax.tree.leaves(seen[0]))
        and (seen[1]["matrix"] != 0).all()
    )
    assert jax.tree.structure(jax.eval_shape(multi.init, PARAMS)) == jax.tree.structure(
        multi.init(PARAMS)
    )
    injected = optax.inject_hyperparams(optim.adamw)(1e-2, weight_decay=0.1)
    _, state = run(injected, 1)
    assert sorted(state.hyperparams) == [
        "b1",
        "b2",
        "eps",
        "eps_root",
        "learning_rate",
        "weight_decay",
    ]
    inner = optax.tree.map_params(
        optim.adam(1e-2), lambda leaf: "param", optim.adam(1e-2).init(PARAMS)
    )
    assert inner[0].mu["matrix"].data == "param" and inner[0].count == 0


def test_nnx_optimizer_keeps_its_state():
    """It makes mappings of the moments that it keeps."""
    model = nnx.Linear(128, 4, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optim.adamw(1e-2), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        loss, gradients = nnx.value_and_grad(
            lambda model: jnp.square(model(jnp.ones((2, 128))) - 1).mean()
        )(model)
        optimizer.update(model, gradients)
        return loss

    losses = [float(step(model, optimizer)) for _ in range(20)]
    assert losses[-1] < 0.5 * losses[0]
    assert any(leaf.dtype == jnp.float8_e4m3fn for leaf in jax.tree.leaves(nnx.state(optimizer)))


@pytest.mark.parametrize(
    "tx",
    [optim.adamw(1e-2, mu_dtype=jnp.float32), optim.lion(1e-2, rounding="nearest")],
    ids=["adamw", "lion"],
)
def test_nnx_optimizer_is_the_same_pytree_after_an_update(tx, tmp_path):
    """So that scans carry it, and Orbax restores it into a fresh one."""

    def fresh():
        model = nnx.Linear(128, 4, rngs=nnx.Rngs(0))
        return nnx.split((model, nnx.Optimizer(model, tx, wrt=nnx.Param)))

    @functools.partial(jax.jit, static_argnums=0)
    def step(graph, state):
        model, optimizer = nnx.merge(graph, state)
        optimizer.update(
            model, nnx.grad(lambda model: jnp.square(model(jnp.ones((2, 128))) - 1).mean())(model)
        )
        return nnx.state((model, optimizer))

    graph, state = fresh()
    scanned = jax.jit(
        lambda state: jax.lax.scan(lambda state, _: (step(graph, state), None), state, None, 2)[0]
    )(state)
    by_hand = step(graph, step(graph, state))
    assert (
        jax.tree.structure(scanned) == jax.tree.structure(by_hand) == jax.tree.structure(fresh()[1])
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(*map(np.float32, (a, b)), rtol=0.2, atol=1e-6),
        scanned,
        by_hand,
    )
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", scanned)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "state", fresh()[1])
    jax.tree.map(np.testing.assert_array_equal, restored, scanned)


def test_moments_lie_as_unboxed_parameters_do():
    """Whose scales are too few to be divided by the kernel's own spec."""
    mesh = jax.make_mesh((2, 4), ("d", "m"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    boxed = {"kernel": nn.Partitioned(jnp.ones((16, 256)), ("d", "m"))}
    params = nn.unbox(jax.device_put(boxed, nn.get_sharding(boxed, mesh)))
    tx = optim.adamw(1e-2)
    state = tx.init(params)
    _, updated = jax.jit(tx.update)(params, state, params)
    for moment in (state[0].mu, state[0].nu, updated[0].mu, updated[0].nu):
        moment = moment["kernel"]
        assert moment.data.sharding.is_equivalent_to(
            NamedSharding(mesh, P("d", "m")), 2
        ) and moment.scale.shape == (16, 2)
        assert moment.scale.sharding.is_equivalent_to(NamedSharding(mesh, P("d")), 2)


def test_narrow_gradients_give_float32_updates_and_vmapped_ensembles_work():
    params = {"w": jnp.ones((4, 128), jnp.bfloat16)}
    tx = optim.adamw(1e-2)
    updates, _ = jax.jit(tx.update)(params, tx.init(params), params)
    assert updates["w"].dtype == jnp.float32
    stacked = jnp.stack([PARAMS["matrix"], 3 * PARAMS["matrix"]])
    tx = optim.scale_by_adam(rounding="nearest")
    state = jax.vmap(tx.init)(stacked)
    updates, state = jax.jit(jax.vmap(tx.update))(stacked, state)
    alone, _ = jax.jit(tx.update)(stacked[1], tx.init(stacked[1]))
    np.testing.assert_allclose(updates[1], alone, rtol=1e-6)
    assert state.mu.data.shape == (2, 8, 256) and state.mu.scale.shape == (2, 8, 2)


@pytest.mark.parametrize(
    ("error", "act", "text"),
    [
        (ValueError, lambda: optim.adam(1e-3, mu_dtype="E9M9"), "mu_dtype must be an FP8 format"),
        (ValueError, lambda: optim.scale_by_adam(rounding="up"), "rounding must be one of"),
        (
            ValueError,
            lambda: optim.scale_by_lion(rounding="nearest", key=1),
            "key has no effect on rounding",
        ),
        (ValueError, lambda: optim.scale_by_lion(mode="soft"), "mode must be one of"),
        (
            TypeError,
            lambda: optim.scale_by_adam().init({"i": jnp.arange(3)}),
            r"got int32 at \['i'\]. Leave that leaf to another optimizer",
        ),
        (
            TypeError,
            lambda: optim.scale_by_adam().init(jnp.ones(3, jnp.complex64)),
            "got complex64",
        ),
        (
            ValueError,
            lambda: optim.scale_by_adam().update(
                {"w": jnp.ones((4, 3))}, optim.scale_by_adam().init({"w": jnp.ones((3, 4))})
            ),
            r"same shapes; got \(4, 3\) and \(3, 4\) at \['w'\]",
        ),
        (
            ValueError,
            lambda: optim.scale_by_lion().update(
                {"v": jnp.ones(3)}, optim.scale_by_lion().init({"w": jnp.ones(3)})
            ),
            "must be of the same structure",
        ),
        (
            ValueError,
            lambda: optim.scale_by_adam().update(
                jnp.ones(3), optim.scale_by_adam(rounding="nearest").init(jnp.ones(3))
            ),
            r"the state's key must be uint32\[2\] for rounding=\"stochastic\"; got None",
        ),
    ],
    ids=lambda value: None,
)
def test_bad_input(error, act, text):
    with pytest.raises(error, match=text):
        act()


@pytest.mark.parametrize(
    "spread",
    thorough_but({str(spread): spread for spread in (1.0, 1e2, 1e4, 1e6, 1e8)}, ["1000000.0"]),
)
@pytest.mark.parametrize("layout", ["column", "even"])
def test_gradients_that_differ_within_a_block_keep_their_updates(spread, layout):
    """One large column beside small ones, and all between both: each element's update has the error
    of any other.
    """
    column = np.arange(256) % 128
    sizes = (
        np.where(column == 5, 1, 1 / spread) if layout == "column" else spread ** -(column / 127)
    )
    sizes = jnp.broadcast_to(jnp.asarray(sizes, jnp.float32), (8, 256))

    def step(states, index):
        noise = jax.random.normal(jax.random.fold_in(jax.random.key(1), index), (8, 256))
        gradient = (noise + 0.5) * sizes
        updates, states = zip(*(tx.update(gradient, state) for tx, state in zip(txs, states)))
        return states, updates

    txs = [
        optim.scale_by_adam(eps=1e-20),
        optax.scale_by_adam(eps=1e-20),
        optim.scale_by_lion(),
        optax.scale_by_lion(),
    ]
    start = tuple(tx.init(jnp.zeros((8, 256))) for tx in txs)
    _, updates = jax.jit(lambda: jax.lax.scan(step, start, jnp.arange(40)))()
    adam, exact, lion, exact_lion = (np.asarray(update)[10:] for update in updates)
    error = np.linalg.norm(adam - exact, axis=(0, 1)) / np.linalg.norm(exact, axis=(0, 1))
    most = 0.1 if spread == 1 else 0.4
    assert 0.01 < error.mean() and error.max() < most, (error.mean(), error.max())
    assert (lion != exact_lion).mean() < 0.06
