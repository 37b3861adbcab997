"""bfloat16 parameters without a float32 copy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fp8jax import optim

APPLY = jax.jit(lambda params, updates, key: optim.apply_updates(params, updates, key=key))


def test_sums_are_rounded_to_one_of_two_neighbors_without_bias():
    rng = np.random.default_rng(0)
    params = np.repeat(rng.normal(size=(1, 64)), 4096, axis=0).astype(jnp.bfloat16)
    updates = np.repeat(rng.normal(size=(1, 64)) * 1e-3, 4096, axis=0).astype(np.float32)
    got = np.asarray(APPLY({"w": params}, {"w": updates}, jax.random.key(0))["w"])
    assert got.dtype == jnp.bfloat16
    got, exact = got.astype(np.float64), params.astype(np.float64) + updates
    step = np.exp2(np.floor(np.log2(np.abs(exact))) - 7)
    assert (np.abs(got - exact) < step).all()
    error = got.mean(0) - exact[0]
    share = np.abs(exact[0]) / step[0] % 1
    assert (
        np.abs(error) <= 5 * step[0] * np.sqrt(share * (1 - share) / 4096) + step[0] * 2.0**-15
    ).all()
    nearest = (params + updates.astype(jnp.bfloat16)).astype(np.float64)
    assert (np.abs(nearest.mean(0) - exact[0]) > 5 * step[0] / 64).any()


def test_small_updates_count_where_nearest_loses_them():
    def train(apply):
        def step(params, index):
            return apply(
                params, jnp.full(256, -1e-3), jax.random.fold_in(jax.random.key(1), index)
            ), None

        return float(
            jax.lax.scan(step, jnp.ones(256, jnp.bfloat16), jnp.arange(300))[0]
            .astype(jnp.float32)
            .mean()
        )

    assert train(lambda p, u, key: p + u.astype(jnp.bfloat16)) == 1.0
    assert abs(train(lambda p, u, key: optim.apply_updates(p, u, key=key)) - 0.7) < 0.01


def test_other_dtypes_are_added_as_by_optax_and_ends_stay():
    with jax.numpy_dtype_promotion("standard"):
        params = {"f": jnp.linspace(0, 1, 5), "i": jnp.arange(3), "none": None}
        updates = {"f": jnp.ones(5, jnp.bfloat16), "i": jnp.ones(3, jnp.int32), "none": None}
        for got, want in zip(
            *(
                jax.tree.leaves(tree)
                for tree in (
                    optim.apply_updates(params, updates),
                    optax.apply_updates(params, updates),
                )
            )
        ):
            np.testing.assert_array_equal(got, want)
            assert got.dtype == want.dtype
    ends = jnp.array([jnp.inf, -jnp.inf, jnp.nan, 0.0, 3.0], jnp.bfloat16)
    got = APPLY(ends, jnp.zeros(5), 3)  # Exact values stay.
    np.testing.assert_array_equal(got.astype(jnp.float32), ends.astype(jnp.float32))
    assert jnp.isinf(APPLY(jnp.float32(3.38e38).astype(jnp.bfloat16), jnp.float32(3e38), 0))


def test_keys_give_other_roundings_and_the_same_key_the_same():
    params, updates = jnp.ones(1000, jnp.bfloat16), jnp.full(1000, 1e-3)
    first, second, third = (APPLY(params, updates, jax.random.key(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, second)
    assert (first != third).any()
    pair = APPLY([params, params], [updates, updates], 0)
    assert (pair[0] != pair[1]).any()


@pytest.mark.parametrize(
    ("error", "arguments", "text"),
    [
        (
            ValueError,
            ({"w": jnp.ones(2, jnp.bfloat16)}, {"w": jnp.ones(2)}),
            r"key is needed to round bfloat16 .* at \['w'\]",
        ),
        (ValueError, ({"w": jnp.ones(2)}, {"v": jnp.ones(2)}), "must be of the same structure"),
        (
            ValueError,
            ({"w": jnp.ones(2)}, {"w": jnp.ones(3)}),
            r"same shapes; got \(2,\) and \(3,\) at \['w'\]",
        ),
        (TypeError, ({"w": jnp.ones(2, jnp.float16)}, {"w": jnp.ones(2)}), "got float16"),
    ],
    ids=lambda value: None,
)
def test_bad_input(error, arguments, text):
    with pytest.raises(error, match=text):
        optim.apply_updates(*arguments)
