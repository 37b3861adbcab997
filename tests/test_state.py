"""`SiteScales`, and how it is found in trees."""

import flax.core
import jax
import jax.numpy as jnp
import numpy as np

from fp8jax import SiteScales, recipes
from fp8jax.state import find_site_scales, map_site_scales

CASTS = recipes.delayed().delayed_casts


def test_zeros_are_scales_of_one_in_distinct_buffers():
    """Of the shape of the stack, for the operands with delayed scaling alone; donation needs the buffers distinct."""
    node = SiteScales.zeros("a", (CASTS[0], None, CASTS[2]), (2, 3))
    assert (node.lhs.shape, node.rhs, node.grad.shape, node.seal.shape) == (
        (2, 3),
        None,
        (2, 3),
        (2, 3, 3),
    )
    leaves = jax.tree.leaves(node)
    assert {leaf.dtype for leaf in leaves} == {np.dtype("float32")}
    assert len({leaf.unsafe_buffer_pointer() for leaf in leaves}) == 3
    scales = node.scales()
    assert set(scales) == {"lhs", "grad"} and all((scale == 1).all() for scale in scales.values())


def test_scales_are_exact_powers_of_two():
    node = SiteScales.zeros("a", CASTS).replace(
        lhs=jnp.float32(-126), rhs=jnp.float32(127), grad=jnp.float32(-28)
    )
    assert [float(scale) for scale in node.scales().values()] == [2.0**-126, 2.0**127, 2.0**-28]


def test_is_a_pytree_with_static_name_and_casts():
    """Its name and casts are structure, so that scales of another model don't fit; leaves have readable paths."""
    node = SiteScales.zeros("a", CASTS)
    leaves, structure = jax.tree.flatten(node)
    back = structure.unflatten(leaves)
    assert all(
        getattr(back, name) is leaf
        for name, leaf in zip(("lhs", "rhs", "grad", "seal"), leaves, strict=True)
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
    assert paths == ["['x'].lhs", "['x'].rhs", "['x'].grad", "['x'].seal"]
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
