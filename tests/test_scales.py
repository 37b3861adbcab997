"""The scales of all sites in few arrays: read by site, apart for a program, and what an update of
many costs.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import serialization
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from tiers import thorough_but

import fp8jax
from fp8jax import Scales, SiteScales, recipes
from fp8jax._observe import exponents_of, seal_of, unbind

CASTS = recipes.delayed().delayed_casts
FLUSHED = recipes.delayed(flushed=True).delayed_casts
GRADIENTS_ALONE = (None, None, CASTS[2])


def node(site, casts=CASTS, stack=(), seed=0):
    """A site whose numbers all differ."""
    zeros = SiteScales.zeros(site, casts, stack)
    leaves, tree = jax.tree.flatten(zeros)
    numbers = np.random.default_rng(seed).normal(size=sum(leaf.size for leaf in leaves))
    pieces = np.split(np.float32(numbers), np.cumsum([leaf.size for leaf in leaves])[:-1])
    return jax.tree.unflatten(
        tree, [jnp.asarray(piece.reshape(leaf.shape)) for piece, leaf in zip(pieces, leaves)]
    )


NODES = [
    node("b", seed=1),
    node("a", seed=2),
    node("stacked", stack=(3,), seed=3),
    node("flushed", FLUSHED, seed=4),
    node("c", GRADIENTS_ALONE, seed=5),
]


def test_each_site_is_read_back_and_sites_alike_share_an_array():
    scales = Scales.of(NODES)
    assert [group.sites for group in scales.groups] == [
        ("a", "b"),
        ("c",),
        ("flushed",),
        ("stacked",),
    ]
    assert [array.shape for array in scales.arrays] == [(2, 8), (1, 8), (1, 12), (3, 1, 8)]
    assert list(scales) == ["a", "b", "c", "flushed", "stacked"] and len(scales) == 5
    assert "a" in scales and "d" not in scales and set(dict(scales)) == set(scales.keys())
    for one in NODES:
        got = scales[one.site]
        assert jax.tree.structure(got) == jax.tree.structure(one)
        jax.tree.map(np.testing.assert_array_equal, got, one)
    with pytest.raises(KeyError, match="d"):
        scales["d"]
    shapes = jax.eval_shape(lambda: scales)
    assert shapes["stacked"].lhs.shape == (3,) and shapes["c"].rhs is None
    # However they come: the order of an array is that of the names, or a checkpoint's numbers would
    # go astray.
    assert jax.tree.structure(Scales.of(NODES[::-1])) == jax.tree.structure(scales)
    assert jax.tree.structure(Scales.of(scales.values())) == jax.tree.structure(scales)


def test_a_site_is_replaced():
    scales = Scales.of(NODES[:2])
    changed = scales | {"a": scales["a"].replace(lhs=jnp.float32(7))}
    assert changed["a"].lhs == 7 and scales["a"].lhs != 7
    np.testing.assert_array_equal(changed["b"].seal, scales["b"].seal)
    with pytest.raises(ValueError, match="by its site's name; got that of 'b' as 'a'. Rename it"):
        scales | {"a": scales["b"]}
    with pytest.raises(TypeError, match="nodes must be SiteScales; got 'a' among .*, pass its val"):
        Scales.of(scales)


@pytest.mark.parametrize("sites", thorough_but({str(n): n for n in (1, 5, 17, 300)}, ["1", "17"]))
def test_apart_and_what_comes_back(sites):
    """Few sites or many: each has its own numbers; its observations come back at its own place."""
    rng = np.random.default_rng(sites)
    array = jnp.asarray(rng.normal(size=(sites, 8)).astype(np.float32))
    group = Scales.of(node(f"{i:03}") for i in range(sites)).groups[0]
    seen = np.square(rng.normal(size=(sites, 3))).astype(np.float32)
    seen[0] = 0

    def apart(array):
        return unbind(exponents_of((array,), (group.casts,)), (group,))

    def read(array):
        return sum((one.values * amaxes).sum() for one, amaxes in zip(apart(array), seen))

    values = jax.jit(lambda array: [one.values for one in apart(array)])(array)
    np.testing.assert_array_equal(values, array[:, :3])
    got = jax.jit(jax.grad(read))(array)
    np.testing.assert_array_equal(got[:, :3], seen)
    np.testing.assert_allclose(got[:, 3:6] ** 2, seen, rtol=1e-6)
    np.testing.assert_array_equal(got[:, 6], seen.any(axis=1))
    assert not got[:, 7:].any() and not got[0].any()


def test_arrays_of_several_casts_are_one_and_come_back_as_several():
    scales = Scales.of([node("a"), node("b", GRADIENTS_ALONE), node("c")])
    casts = tuple(group.casts for group in scales.groups)
    assert len(casts) == 2

    def read(arrays):
        apart = {one.site: one for one in unbind(exponents_of(arrays, casts), scales.groups)}
        assert apart["b"].of_operand("lhs") is None
        return apart["b"].of_operand("grad") * 4 + apart["c"].of_operand("lhs") * 9

    observed = Scales(jax.grad(read)(scales.arrays), scales.groups)
    assert float(observed["b"].grad) == 4 and float(observed["c"].lhs) == 9
    np.testing.assert_array_equal(observed["c"].seal, [3, 0, 0])
    assert [float(observed[name].uses) for name in "abc"] == [0, 1, 1]


def test_a_batch_that_shares_an_array_observes_maxima():
    group = Scales.of(NODES[:2]).groups[0]
    seen = jnp.array([[1.0, 5.0], [4.0, 2.0]])

    def read(array, seen):
        a, b = unbind(exponents_of((array,), (group.casts,)), (group,))
        return a.of_operand("lhs") * seen[0] + b.of_operand("rhs") * seen[1]

    shared = jax.vmap(jax.grad(read), in_axes=(None, 0), out_axes=0)(jnp.zeros((2, 8)), seen)
    np.testing.assert_array_equal(shared[:, 0, 0], [4, 4])
    np.testing.assert_array_equal(shared[:, 1, 1], [5, 5])
    own = jax.vmap(jax.grad(read))(jnp.zeros((2, 2, 8)), seen)
    np.testing.assert_array_equal(own[:, 0, 0], [1, 4])


def test_an_update_moves_each_site_as_one_alone():
    """The rule on a `Scales` is that on the sites by themselves: exponents, counters, histories."""
    rng = np.random.default_rng(0)
    tx, scales = (
        fp8jax.delayed_scaling(),
        Scales.of(SiteScales.zeros(one.site, one.casts, one.seal.shape[:-1]) for one in NODES),
    )
    apart = dict(scales)
    state, states = tx.init(scales), tx.init(apart)
    for _ in range(3):

        def observed(one):
            seen = np.float32(np.exp2(rng.normal(size=one.seal.shape) * 4))
            amax = {
                name: seen[..., i] for i, name in enumerate(("lhs", "rhs", "grad")) if one.casts[i]
            }
            flushed = {} if one.flushed is None else {"flushed": jnp.full(one.seal.shape, 0.25)}
            return one.replace(
                **amax, seal=seal_of(seen), uses=jnp.ones_like(seen[..., 0]), **flushed
            )

        seen = {name: observed(one) for name, one in apart.items()}
        moves, state = jax.jit(tx.update)(Scales.of(seen.values()), state, scales)
        moves_apart, states = jax.jit(tx.update)(seen, states, apart)
        scales, apart = (
            jax.tree.map(jnp.add, *both) for both in ((scales, moves), (apart, moves_apart))
        )
        for name, one in apart.items():
            jax.tree.map(np.testing.assert_array_equal, scales[name], one)
    assert fp8jax.metrics.summary(state, scales) == fp8jax.metrics.summary(states, apart)
    ours, theirs = (fp8jax.metrics.histories(*both) for both in ((state, scales), (states, apart)))
    assert ours.keys() == theirs.keys() and "stacked/lhs[2]" in ours
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_a_thousand_sites_are_few_arrays_and_few_operations():
    scales = Scales.of(SiteScales.zeros(f"layers/{i}/w", CASTS) for i in range(1000))
    tx = fp8jax.delayed_scaling()
    state = tx.init(scales)
    assert len(jax.tree.leaves((scales, state))) <= 20
    update = jax.jit(tx.update).lower(scales, state, scales).compile()
    assert update.as_text().count(" = ") < 1000  # 27,781 with an array for each operand


def loss(weights, x):
    for w in weights:
        x = jnp.tanh(x @ w)
    return jnp.square(x).mean()


WEIGHTS = [jax.random.normal(jax.random.key(i), (16, 16)) for i in range(4)]
X = jax.random.normal(jax.random.key(9), (8, 16))


def step(fp8_loss, tx):
    @jax.jit
    def run(trained, state, x):
        grads = jax.grad(lambda t: fp8_loss(t["scales"], t["weights"], x))(trained)
        updates, state = tx.update(grads, state, trained)
        return optax.apply_updates(trained, updates), state, grads["scales"]

    return run


@pytest.mark.thorough
@pytest.mark.parametrize(
    "spec",
    thorough_but(
        {str(spec): spec for spec in (P(None, "model"), P("data"), P("data", "model"))},
        [str(P("data", "model"))],
    ),
)
def test_divided_as_any_other_array_it_trains_alike(spec):
    """A rule that divides each array's last axes may meet this one, on explicit axes too."""
    fp8_loss, tx = (
        fp8jax.fp8(loss, recipes.delayed()),
        fp8jax.with_delayed_scaling(optax.sgd(0.1)),
    )
    scales = fp8_loss.init(WEIGHTS, X)
    trained = {"scales": scales, "weights": WEIGHTS}
    want, _, seen = step(fp8_loss, tx)(trained, tx.init(trained), 8 * X)
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)
    with jax.set_mesh(mesh):
        divided = {
            "scales": jax.device_put(scales, NamedSharding(mesh, spec)),
            "weights": jax.device_put(WEIGHTS, P()),
        }
        state = tx.init(divided)
        got, _, observed = step(fp8_loss, tx)(divided, state, jax.device_put(8 * X, P("data")))
        _, forward = fp8_loss.observe(divided["scales"], divided["weights"], X)
    assert float(forward["0"].lhs) == float(jnp.abs(X).max())
    (leaf,) = jax.tree.leaves(got["scales"])
    assert tuple(leaf.sharding.spec)[: len(spec)] == tuple(spec)
    jax.tree.map(np.testing.assert_array_equal, got["scales"], want["scales"])
    np.testing.assert_array_equal(observed["0"].lhs, seen["0"].lhs)
    assert float(got["scales"]["0"].lhs) == float(scales["0"].lhs) + 3


def test_some_sites_in_one_array_and_others_by_themselves_are_all_found():
    fp8_loss = fp8jax.fp8(loss, recipes.delayed())
    scales = fp8_loss.init(WEIGHTS, X)
    want, amaxes = jax.value_and_grad(fp8_loss)(scales, WEIGHTS, X)
    mixed = [
        Scales.of([scales["3"], scales["0"], SiteScales.zeros("other", CASTS)]),
        {"a": scales["2"]},
        scales["1"],
    ]
    got, observed = jax.value_and_grad(fp8_loss)(mixed, WEIGHTS, X)
    assert got == want
    (together, alone, last), none = observed, observed[0]["other"]
    found = {"0": together["0"], "3": together["3"], "2": alone["a"], "1": last}
    for name, one in found.items():
        jax.tree.map(np.testing.assert_array_equal, one, amaxes[name])
        assert float(one.lhs) > 0
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(none))
    with pytest.raises(ValueError, match="got site '0' twice"):
        fp8_loss([mixed, scales["0"]], WEIGHTS, X)
    with pytest.raises(ValueError, match="nodes must hold each site once; got site '0' twice"):
        Scales.of([scales["0"], scales["0"]])


def test_it_shows_its_numbers_or_whatever_a_tree_like_it_holds():
    scales = Scales.of([SiteScales.zeros("up", CASTS).replace(grad=jnp.float32(-3))])
    assert (
        repr(scales)
        == "Scales(SiteScales('up', lhs=0.0, rhs=0.0, grad=-3.0, seal=[0. 0. 0.], uses=0.0))"
    )
    assert "lhs" in repr(jax.eval_shape(lambda: scales))
    assert not fp8jax.fp8(loss, recipes.current()).init(WEIGHTS, X)
    for leaf in (None, object(), P(), (1, 6), jnp.float32, jnp.float32(2)):
        assert repr(jax.tree.map(lambda _, leaf=leaf: leaf, scales)) == f"Scales(up: {leaf!r})"
    with pytest.raises(ValueError, match=r"arrays of Scales must end in .*, \(1, 8\) .*NoneType"):
        fp8jax.fp8(lambda w, x: x @ w["up"], recipes.delayed())(
            jax.tree.map(lambda _: None, scales), {"up": WEIGHTS[0]}, X
        )


def test_numbers_of_other_sites_are_not_restored_in_their_place():
    """As many sites, of other names: a model whose head was renamed."""
    one, other = (Scales.of(node(name) for name in names) for names in ("ab", "bc"))
    with pytest.raises(ValueError, match="must have the fields"):
        serialization.from_bytes(other, serialization.to_bytes(one))
    paths = [jax.tree_util.tree_flatten_with_path(tree)[0][0][0] for tree in (one, other)]
    assert paths[0] != paths[1]
    back = serialization.from_bytes(jax.tree.map(jnp.zeros_like, one), serialization.to_bytes(one))
    jax.tree.map(np.testing.assert_array_equal, back, one)


def test_stacked_along_another_axis_it_is_refused():
    scales = jax.tree.map(lambda leaf: jnp.stack([leaf] * 3, 1), Scales.of(NODES[:2]))
    with pytest.raises(ValueError, match=r"\(2, 8\) for the sites a, b; got the shape \(2, 3, 8\)"):
        scales["a"]


@pytest.mark.parametrize("varies", ["0", "1"])
def test_scales_of_some_sites_that_devices_have_of_their_own(varies):
    """One reads the same as the other, and its scale is not led by one that varies otherwise."""

    def both(weights, x):
        return sum(jnp.square(x @ w).mean() for w in weights[:2])

    fp8_loss = fp8jax.fp8(both, recipes.delayed())
    scales = dict(fp8_loss.init(WEIGHTS, X))
    own, common = {varies: scales.pop(varies)}, scales
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))

    def inner(own, common, weights, x):
        own = jax.tree.map(lambda leaf: leaf[0], own)
        weights = jax.lax.pcast(weights, "data", to="varying")
        grads = jax.grad(lambda *s: fp8_loss(s, weights, x), argnums=(0, 1))(own, common)
        return jax.tree.map(lambda leaf: leaf[None], grads[0]), grads[1]

    each = jax.tree.map(lambda leaf: jnp.stack([leaf] * 4), own)
    specs = (P("data"), P(), P(), P("data"))
    found, merged = jax.jit(
        jax.shard_map(inner, mesh=mesh, in_specs=specs, out_specs=(P("data"), P()))
    )(each, common, WEIGHTS, X)
    amaxes = jnp.abs(X).reshape(4, -1).max(1)
    (other,) = common
    assert float(merged[other].lhs) == float(amaxes.max())
    np.testing.assert_array_equal(found[varies].lhs, amaxes)
