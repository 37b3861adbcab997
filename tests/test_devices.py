"""Observations and gradients on several devices: shard_map inside and outside, automatic and
explicit axes.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import fp8jax
from fp8jax._observe import seal_fits

KEYS = jax.random.split(jax.random.key(0), 3)
X = jax.random.normal(KEYS[0], (16, 32)) * jnp.linspace(0.1, 3.0, 16)[:, None]
W = {"up": jax.random.normal(KEYS[1], (32, 64)), "down": jax.random.normal(KEYS[2], (64, 32))}


def mesh_of(shape=(4,), names=("data",), kind=AxisType.Auto):
    return jax.make_mesh(
        shape, names, axis_types=(kind,) * len(names), devices=jax.devices()[: int(np.prod(shape))]
    )


def loss(w, x):
    return jnp.square(jnp.tanh(x @ w["up"]) @ w["down"]).sum() * 1e-3


def layers(w, x):
    """Scan, conditional and remat, so that observations go through all of them on each device."""

    def body(x, _):
        x = jax.checkpoint(lambda w, x: jnp.tanh(x @ w["up"]) @ w["down"])(w, x)
        return jax.lax.cond(
            x.sum() > 0, lambda x: jnp.tanh(x @ w["up"] @ w["down"]), jnp.sin, x
        ), None

    return jnp.square(jax.lax.scan(body, x, length=2)[0]).sum() * 1e-3


def data_parallel(fn, mesh, checked):
    def total(w, x):
        # Here, so that the sum of the weights' gradients is not inside a conditional that devices
        # may not all enter.
        w = jax.lax.pcast(w, "data", to="varying") if checked else w
        return jax.lax.psum(fn(w, x), "data")

    return jax.shard_map(
        total, mesh=mesh, in_specs=(P(), P("data")), out_specs=P(), check_vma=checked
    )


def tensor_parallel(mesh, checked):
    def product(up, down, x):
        return jax.lax.psum(jnp.tanh(x @ up) @ down, "data")

    sharded = jax.shard_map(
        product,
        mesh=mesh,
        in_specs=(P(None, "data"), P("data"), P()),
        out_specs=P(),
        check_vma=checked,
    )
    return lambda w, x: jnp.square(sharded(w["up"], w["down"], x)).sum() * 1e-3


def assert_alike(got, want):
    for ours, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=2e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("fn", "checked"),
    [
        (loss, True),
        *(
            pytest.param(fn, checked, marks=pytest.mark.slow)
            for fn, checked in ((layers, True), (loss, False), (layers, False))
        ),
    ],
    ids=["loss-check_vma", "layers-check_vma", "loss-unchecked", "layers-unchecked"],
)
def test_shard_map_inside_observes_what_one_device_does(fn, checked):
    mesh = mesh_of()
    parallel = fp8jax.fp8(data_parallel(fn, mesh, checked), fp8jax.recipes.delayed())
    alone = fp8jax.fp8(
        lambda w, x: sum(fn(w, x[4 * i : 4 * i + 4]) for i in range(4)), fp8jax.recipes.delayed()
    )
    scales = parallel.init(W, X)
    got_loss, (observed, gradients) = jax.jit(jax.value_and_grad(parallel, argnums=(0, 1)))(
        scales, W, X
    )
    # One device, the same shards one after the other, on the same scales: a site for each.
    order = [site.name for site in parallel.explain(W, X).sites]
    sites = [site.name for site in alone.explain(W, X).sites]
    of = {name: order[index % len(order)] for index, name in enumerate(sites)}
    spread = {name: scales[of[name]].replace(site=name) for name in sites}
    want_loss, (separate, want) = jax.jit(jax.value_and_grad(alone, argnums=(0, 1)))(spread, W, X)
    np.testing.assert_allclose(got_loss, want_loss, rtol=1e-5)
    assert_alike(gradients, want)
    for name, node in observed.items():
        shards = [separate[other] for other in sites if of[other] == name]
        for operand in ("lhs", "rhs", "grad"):
            np.testing.assert_allclose(
                getattr(node, operand),
                max(float(getattr(shard, operand)) for shard in shards),
                rtol=1e-5,
            )
        assert bool(seal_fits(jnp.stack([node.lhs, node.rhs, node.grad]), node.seal).all())
    (up,) = (node for name, node in observed.items() if name == order[0])
    assert float(up.rhs) == float(jnp.abs(W["up"]).max())


@pytest.mark.thorough
@pytest.mark.parametrize("checked", [True, False], ids=["check_vma", "unchecked"])
def test_tensor_parallel_shard_map_inside(checked):
    parallel = fp8jax.fp8(tensor_parallel(mesh_of(), checked), fp8jax.recipes.delayed())
    plain = fp8jax.fp8(loss, fp8jax.recipes.delayed())
    scales = plain.init(W, X)
    got = jax.jit(jax.value_and_grad(parallel, argnums=(0, 1, 2)))(scales, W, X)
    want = jax.jit(jax.value_and_grad(plain, argnums=(0, 1, 2)))(scales, W, X)
    np.testing.assert_allclose(got[0], want[0], rtol=1e-5)
    assert_alike(got[1], want[1])
    assert float(got[1][0]["up"].rhs) == float(jnp.abs(W["up"]).max())


def test_gradient_inside_shard_map():
    fp8_fn = fp8jax.fp8(loss, fp8jax.recipes.delayed())
    scales = fp8_fn.init(W, X)

    def step(scales, w, x):
        value, gradients = jax.value_and_grad(fp8_fn, argnums=(0, 1))(scales, w, x)
        return jax.lax.psum(value, "data"), gradients

    sharded = jax.jit(
        jax.shard_map(step, mesh=mesh_of(), in_specs=(P(), P(), P("data")), out_specs=(P(), P()))
    )
    value, (observed, gradients) = sharded(scales, W, X)
    want_value, (want, want_gradients) = jax.jit(jax.value_and_grad(fp8_fn, argnums=(0, 1)))(
        scales, W, X
    )
    np.testing.assert_allclose(value, want_value, rtol=1e-5)
    assert_alike(gradients, want_gradients)
    assert_alike(observed, want)
    assert float(observed["up"].lhs) == float(jnp.abs(X).max())


def test_observe_through_shard_map():
    parallel = fp8jax.fp8(data_parallel(loss, mesh_of(), True), fp8jax.recipes.delayed())
    scales = parallel.init(W, X)
    _, observed = parallel.observe(scales, W, X)
    assert float(observed["up"].lhs) == float(jnp.abs(X).max()) and not observed["up"].grad


@pytest.mark.parametrize(
    ("kind", "specs"),
    [
        pytest.param(AxisType.Auto, (P(), P(), P("data", None)), marks=pytest.mark.slow),
        (AxisType.Auto, (P(None, "model"), P("model", None), P("data", None))),
        pytest.param(
            AxisType.Auto,
            (P("data", None), P("data", None), P("data", None)),
            marks=pytest.mark.slow,
        ),
        pytest.param(AxisType.Explicit, (P(), P(), P("data", None)), marks=pytest.mark.thorough),
    ],
    ids=["DP", "TP", "FSDP", "explicit DP"],
)
def test_sharded_arrays_observe_what_one_device_does(kind, specs):
    fp8_fn = fp8jax.fp8(layers, fp8jax.recipes.delayed())
    scales = fp8_fn.init(W, X)
    want = jax.jit(jax.value_and_grad(fp8_fn, argnums=(0, 1)))(scales, W, X)
    mesh = mesh_of((2, 2), ("data", "model"), kind)
    with jax.set_mesh(mesh):
        up, down, x = (
            jax.device_put(array, NamedSharding(mesh, spec))
            for array, spec in zip((W["up"], W["down"], X), specs)
        )
        got = jax.jit(jax.value_and_grad(fp8_fn, argnums=(0, 1)))(
            scales, {"up": up, "down": down}, x
        )
    np.testing.assert_allclose(got[0], want[0], rtol=1e-4)
    for name, node in want[1][0].items():
        assert float(got[1][0][name].rhs) == float(node.rhs)
        np.testing.assert_allclose(got[1][0][name].grad, node.grad, rtol=1e-3)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "around",
    [
        lambda fn: jax.pmap(fn, in_axes=(None, None, 0)),
        lambda fn: jax.shard_map(
            fn, mesh=mesh_of(), in_specs=(P(), P(), P("data")), out_specs=P(), check_vma=False
        ),
    ],
    ids=["pmap", "unchecked shard_map"],
)
def test_regions_where_amaxes_would_not_meet_are_refused(around):
    fp8_fn = fp8jax.fp8(loss, fp8jax.recipes.delayed())
    scales = fp8_fn.init(W, X)
    with pytest.raises(
        ValueError, match="must not be called in a region that does not track .* check_vma=True"
    ):
        around(jax.grad(fp8_fn))(scales, W, X.reshape(4, 4, 32))


def test_weights_typed_reduced_are_left_alone_and_reported():
    mesh = mesh_of((2,), kind=AxisType.Explicit)
    with jax.sharding.use_mesh(mesh) if hasattr(jax.sharding, "use_mesh") else jax.set_mesh(mesh):
        x = jax.device_put(X, NamedSharding(mesh, P("data")))
        w = jax.device_put(W, NamedSharding(mesh, P()))

        def fn(w, x):
            return (
                jnp.tanh(x @ jax.reshard(w["up"], P(None, None, reduced={"data"}))) @ w["down"]
            ).sum()

        fp8_fn = fp8jax.fp8(
            fn, fp8jax.recipes.delayed(), (fp8jax.Rule(".*", fp8jax.recipes.delayed()),)
        )
        up, down = fp8_fn.explain(w, x).sites
        assert (
            "typed reduced or unreduced over mesh axes (data)" in up.reason
            and not up.selected
            and down.selected
        )
        scales = fp8_fn.init(w, x)
        observed, dw = jax.jit(jax.grad(fp8_fn, argnums=(0, 1)))(scales, w, x)
        want = jax.jit(jax.grad(fn))(w, x)
        assert set(scales) == {"down"} and float(observed["down"].rhs) == float(
            jnp.abs(W["down"]).max()
        )
        for name in W:
            assert 0 < jnp.linalg.norm(dw[name] - want[name]) < 0.1 * jnp.linalg.norm(want[name])
