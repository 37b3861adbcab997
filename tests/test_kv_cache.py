"""The cache of keys and values."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from fp8jax import E5M2, kv_cache

RNG = np.random.default_rng(0)
FORMATS = {"E4M3": (448.0, ml_dtypes.float8_e4m3fn), "E5M2": (57344.0, ml_dtypes.float8_e5m2)}


def tokens(batch, new, heads=3, width=8):
    """Keys or values whose tokens and heads are of very different sizes."""
    return (
        RNG.normal(size=(batch, new, heads, width))
        * np.exp2(RNG.integers(-20, 20, (batch, new, heads, 1)))
    ).astype(np.float32)


def rounded(x, name):
    """Codes and values of each vector along the last axis, in float64 and by ml_dtypes."""
    largest, dtype = FORMATS[name]
    scale = np.exp2(
        np.ceil(np.log2(np.abs(x.astype(np.float64)).max(axis=-1, keepdims=True) / largest))
    )
    codes = (x / scale).astype(np.float32).astype(dtype)
    return codes, codes.astype(np.float64) * scale


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("parts", [(7,), (4, 1, 1, 1), (2, 5)])
def test_what_is_held_is_each_token_by_itself(name, parts):
    keys, values = tokens(2, 7), tokens(2, 7)
    cache, append = (
        kv_cache.init(2, 9, 3, 8, format=name),
        jax.jit(kv_cache.append, donate_argnums=0),
    )
    start = 0
    for part in parts:
        cache = append(cache, keys[:, start : start + part], values[:, start : start + part])
        start += part
    codes, expected = rounded(keys, name)
    assert np.array_equal(np.asarray(cache.keys.data)[:, :7].view(np.uint8), codes.view(np.uint8))
    assert not np.array_equal(expected, keys)
    got_keys, got_values = kv_cache.read(cache)
    assert np.array_equal(got_keys[:, :7], expected.astype(np.float32))
    assert np.array_equal(got_values[:, :7], rounded(values, name)[1].astype(np.float32))
    assert not got_keys[:, 7:].any() and not got_values[:, 7:].any()
    assert cache.length.tolist() == [7, 7]
    assert kv_cache.read(cache, jnp.bfloat16)[0].dtype == jnp.bfloat16


def test_sequences_of_different_lengths_take_no_notice_of_padding():
    long, short = tokens(1, 5), tokens(1, 3)
    padded = np.concatenate(
        [long, np.pad(short, ((0, 0), (0, 2), (0, 0), (0, 0)), constant_values=np.nan)]
    )
    cache = kv_cache.append(kv_cache.init(2, 8, 3, 8), padded, padded, count=np.int32([5, 3]))
    assert kv_cache.positions(cache, 2).tolist() == [[5, 6], [3, 4]]
    more = tokens(2, 2)
    positions = kv_cache.positions(cache, 2)
    cache = kv_cache.append(cache, more, more)
    for row, first in enumerate((long, short)):
        alone = np.concatenate([first[0], more[row]])
        assert np.array_equal(
            kv_cache.read(cache)[0][row, : len(alone)], rounded(alone, "E4M3")[1].astype(np.float32)
        )
    mask = np.asarray(kv_cache.causal_mask(cache, positions))
    assert mask.sum(axis=-1).tolist() == [[6, 7], [4, 5]] and mask[1, 1, :5].all()


def test_what_there_is_no_room_for_is_dropped_and_counted():
    x = tokens(1, 3)
    cache = kv_cache.append(kv_cache.init(1, 4, 3, 8), x, x)
    with pytest.raises(
        ValueError, match="must have room for the tokens; got 6 for a capacity of 4"
    ):
        kv_cache.append(cache, x, x)
    full = jax.jit(kv_cache.append)(cache, x, x)
    assert full.length.tolist() == [6]
    assert np.array_equal(kv_cache.read(full)[0][:, :3], kv_cache.read(cache)[0][:, :3])
    assert np.array_equal(
        kv_cache.read(full)[0][:, 3], rounded(x, "E4M3")[1].astype(np.float32)[:, 0]
    )


def test_layers_are_stacked_for_scan():
    keys = np.stack([tokens(2, 3) for _ in range(4)])
    stacked = kv_cache.init(2, 5, 3, 8, layers=4)
    _, stacked = jax.jit(
        lambda c: jax.lax.scan(
            lambda _, own: (None, kv_cache.append(own[0], own[1], own[1])), None, (c, keys)
        )
    )(stacked)
    for layer in range(4):
        alone = kv_cache.append(kv_cache.init(2, 5, 3, 8), keys[layer], keys[layer])
        jax.tree.map(
            np.testing.assert_array_equal, jax.tree.map(lambda leaf: leaf[layer], stacked), alone
        )
    with pytest.raises(
        ValueError, match=r"must be that of one layer; got one with axes \(4, 2, 5, 3, 8\)"
    ):
        kv_cache.read(stacked)


def test_it_takes_little_more_than_a_quarter_of_float32():
    sizes = {
        format: kv_cache.init(1, 128, 4, 64, format=format).nbytes for format in ("E4M3", None)
    }
    assert sizes["E4M3"] / sizes[None] < 0.27
    plain = kv_cache.init(1, 4, 3, 8, format=None, dtype=jnp.bfloat16)
    x = tokens(1, 2)
    assert np.array_equal(
        kv_cache.read(kv_cache.append(plain, x, x))[0][:, :2],
        x.astype(ml_dtypes.bfloat16).astype(np.float32),
    )


def test_no_wide_copy_of_the_codes_is_made_where_a_token_is_appended():
    cache = kv_cache.init(2, 64, 3, 8, format=E5M2)
    jaxpr = jax.make_jaxpr(kv_cache.append)(cache, tokens(2, 1), tokens(2, 1))
    sizes = {
        var.aval.size
        for equation in jaxpr.eqns
        for var in equation.outvars
        if var.aval.dtype.itemsize > 1
    }
    assert max(sizes) <= cache.keys.scale.size


def test_gradients_reach_what_was_appended_not():
    """A cache is state of inference: nothing flows back into it."""
    x = jnp.asarray(tokens(1, 2))
    gradient = jax.grad(
        lambda x: kv_cache.read(kv_cache.append(kv_cache.init(1, 4, 3, 8), x, x))[0].sum()
    )(x)
    assert not gradient.any()


@pytest.mark.parametrize(
    "run, error, text",
    [
        (
            lambda c, x: kv_cache.append(c, x, x[:, :1]),
            ValueError,
            r"values must be of shape \(1, new tokens, 3, 8\)",
        ),
        (lambda c, x: kv_cache.append(c, x[0], x[0]), ValueError, r"keys must be of shape"),
        (
            lambda c, x: kv_cache.append(c, x, x, np.int32(2)),
            ValueError,
            r"count must be of shape \(1,\); got \(\)",
        ),
        (lambda c, x: kv_cache.append(x, x, x), TypeError, "cache must be a KVCache; got ndarray"),
        (
            lambda c, x: kv_cache.init(1, 0, 3, 8),
            ValueError,
            "capacity must be a positive whole number; got 0",
        ),
        (
            lambda c, x: kv_cache.init(1, 4, 3, 8, format="E8M0"),
            ValueError,
            "format must hold values; got E8M0",
        ),
    ],
)
def test_bad_input_is_refused(run, error, text):
    with pytest.raises(error, match=text):
        run(kv_cache.init(1, 4, 3, 8), tokens(1, 2))
