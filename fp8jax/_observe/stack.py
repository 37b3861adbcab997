"""The exponents of several sites as those of one, for a loop over them."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from fp8jax import _xla
from fp8jax._observe.share import merged_beside
from fp8jax._site_exponents import SiteExponents


@jax.custom_vjp
def stack_exponents(nodes: Sequence[SiteExponents]) -> SiteExponents:
    """The exponents of sites that are alike, all of one name, with an axis of the sites in front.

    What is observed of each comes back to its own.

    >>> of = lambda lhs: SiteExponents(jnp.float32([lhs, 0, 0]), "", ())
    >>> stack_exponents([of(2), of(3)]).values[:, 0]
    Array([2., 3.], dtype=float32)
    """
    return jax.tree.map(lambda *values: jnp.stack(values), *nodes)


def _stack_exponents_bwd(nodes, seen):
    # A batch that shares some of the scales and not others was made to have all of its own.
    # CPUs would compute what the slices are of for each of them.
    leaves, tree = jax.tree.flatten(_xla.made_once(seen))
    # They are positive; but a GPU has a kernel for each slice that is nothing else, and one for
    # many that compute something.
    of_sites = zip(*(map(jnp.abs, jnp.unstack(leaf)) for leaf in leaves), strict=True)
    return (
        [
            jax.tree.map(merged_beside, jax.tree.unflatten(tree, of_site), node)
            for of_site, node in zip(of_sites, nodes, strict=True)
        ],
    )


stack_exponents.defvjp(lambda nodes: (stack_exponents(nodes), nodes), _stack_exponents_bwd)
