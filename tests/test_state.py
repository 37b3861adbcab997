"""`SiteScales`, and how it is found in trees."""

import flax.core
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fp8jax
from fp8jax import SiteScales, recipes
from fp8jax._state import find_site_scales, map_site_scales

CASTS = recipes.delayed().delayed_casts


def test_zeros_are_scales_of_one_in_distinct_buffers():
    """Of the shape of the stack, for the operands with delayed scaling alone; donation needs the
    buffers distinct.
    """
    node = SiteScales.zeros("a", (CASTS[0], None, CASTS[2]), (2, 3))
    assert (node.lhs.shape, node.rhs, node.grad.shape, node.seal.shape) == (
        (2, 3),
        None,
        (2, 3),
        (2, 3, 3),
    )
    leaves = jax.tree.leaves(node)
    assert {leaf.dtype for leaf in leaves} == {np.dtype("float32")}
    assert len({leaf.unsafe_buffer_pointer() for leaf in leaves}) == 4
    scales = node.scales()
    assert set(scales) == {"lhs", "grad"} and all((scale == 1).all() for scale in scales.values())


def test_scales_are_exact_powers_of_two():
    node = SiteScales.zeros("a", CASTS).replace(
        lhs=jnp.float32(-126), rhs=jnp.float32(127), grad=jnp.float32(-28)
    )
    assert [float(scale) for scale in node.scales().values()] == [2.0**-126, 2.0**127, 2.0**-28]


def test_is_a_pytree_with_static_name_and_casts():
    """Its name and casts are structure, so that scales of another model don't fit; leaves have
    readable paths.
    """
    node = SiteScales.zeros("a", CASTS)
    leaves, structure = jax.tree.flatten(node)
    back = structure.unflatten(leaves)
    assert all(
        getattr(back, name) is leaf
        for name, leaf in zip(("lhs", "rhs", "grad", "seal", "uses"), leaves, strict=True)
    )
    assert structure != jax.tree.structure(node.replace(site="b"))
    assert structure != jax.tree.structure(node.replace(casts=CASTS[::-1]))
    assert hash(structure) == hash(
        jax.tree.structure(SiteScales.zeros("a", recipes.delayed().delayed_casts))
    )
    paths = [
        jax.tree_util.keystr(path)
        for path, _ in jax.tree_util.tree_flatten_with_path({"x": node})[0]
    ]
    assert paths == ["['x'].lhs", "['x'].rhs", "['x'].grad", "['x'].seal", "['x'].uses"]
    doubled = jax.jit(lambda node: jax.tree.map(lambda leaf: leaf + 1, node))(node)
    assert (doubled.site, doubled.casts, float(doubled.rhs)) == ("a", CASTS, 1.0)


def test_found_by_type_wherever_they_sit():
    """In dicts, tuples and Flax's containers; what is None or another leaf stays as it is."""
    a, b = SiteScales.zeros("a", CASTS), SiteScales.zeros("b", CASTS)
    tree = {
        "w": jnp.ones(2),
        "fp8": flax.core.freeze({"m": {"dot": a}}),
        "none": None,
        "pair": (b, 1.0),
    }
    assert [node.site for node in find_site_scales(tree)] == ["a", "b"]
    mapped = map_site_scales(
        lambda node, other: node.replace(lhs=other.rhs),
        tree,
        tree,
        other=lambda leaf, rest: leaf * 2,
    )
    assert (
        mapped["fp8"]["m"]["dot"].site == "a"
        and mapped["none"] is None
        and mapped["pair"][1] == 2.0
    )
    np.testing.assert_array_equal(mapped["w"], [2, 2])
    assert map_site_scales(lambda node: None, {"x": a}) == {"x": None}
    assert find_site_scales({"w": jnp.ones(2)}) == []


def loss(params, x):
    return jnp.square(x @ params["w"] - np.float32(0.3)).mean()


@jax.numpy_dtype_promotion("standard")  # optax's Adam needs it.
@pytest.mark.parametrize(
    "tx",
    [
        optax.adamw(1e-3, weight_decay=0.1),
        optax.adam(30.0),
        optax.sgd(1.0),
        optax.chain(optax.add_decayed_weights(1e-3), optax.sgd(1.0)),
    ],
    ids=["adamw", "adam at a high rate", "sgd", "decay"],
)
def test_scales_that_an_optimizer_took_for_weights_are_never_used(tx):
    """Its first step is noticed by the next call and the next update, with the remedy; compiled,
    all that it would compute is NaN.
    """
    fn = fp8jax.fp8(loss, recipes.delayed())
    params, x = {"w": jnp.full((8, 4), 0.37)}, jnp.ones((2, 8))
    trained = {"scales": fn.init(params, x), "params": params}

    def run(trained):
        return jax.value_and_grad(lambda t: fn(t["scales"], t["params"], x))(trained)

    _, grads = jax.jit(run)(trained)
    updates, _ = tx.update(grads, tx.init(trained), trained)
    spoiled = optax.apply_updates(trained, updates)
    right = fp8jax.with_delayed_scaling(tx)
    text = r"must hold exponents as integers.*got .* at site 'w'.*with_delayed_scaling\(tx\)"
    with pytest.raises(ValueError, match="scales " + text):
        fn(spoiled["scales"], spoiled["params"], x)
    with pytest.raises(ValueError, match="scales " + text):
        fn.observe(spoiled["scales"], spoiled["params"], x)
    with pytest.raises(ValueError, match="params " + text):
        right.update(grads, right.init(trained), spoiled)
    assert np.isfinite(jax.jit(run)(trained)[0])
    value, grads = jax.jit(run)(spoiled)
    assert np.isnan(value) and np.isnan(grads["params"]["w"]).all()


@pytest.mark.parametrize("operand", ["lhs", "rhs", "grad"])
@pytest.mark.parametrize("stack", [(), (2,)], ids=["site", "scanned"])
def test_products_of_a_scale_without_a_whole_exponent_are_nan(operand, stack):
    """In compiled code; each operand's spoils what it is a factor of, and no other product of the
    layer.
    """

    def loss(params, x):
        if not stack:
            return (x @ params["w"]).sum()
        return jax.lax.scan(lambda x, w: (x @ w, None), x, params["w"])[0].sum()

    fn = fp8jax.fp8(loss, recipes.delayed())
    params, x = {"w": jnp.full((*stack, 4, 4), 0.5)}, jnp.ones((2, 4))
    scales = fn.init(params, x)
    node = scales["w"]
    spoiled = {"w": node.replace(**{operand: getattr(node, operand) - np.float32(1e-3)})}
    value, (dw, dx) = jax.jit(jax.value_and_grad(fn, argnums=(1, 2)))(spoiled, params, x)
    nans = [bool(np.isnan(leaf).all()) for leaf in (value, dw["w"], dx)]
    if not stack:
        assert (
            nans
            == {
                "lhs": [True, True, False],
                "rhs": [True, False, True],
                "grad": [False, True, True],
            }[operand]
        )
    assert any(nans)
