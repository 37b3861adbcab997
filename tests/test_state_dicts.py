"""`flax.serialization`: the library's pytrees to bytes and back, bit for bit."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import serialization
from flax.training.train_state import TrainState

import fp8jax
from fp8jax import E5M2, BlockWise, PerChannel, kv_cache, quantize

X = jnp.linspace(-3, 5, 4 * 256).reshape(4, 256)


def moment(name="nu"):
    tx = fp8jax.optim.adam(0.1)
    return getattr(jax.jit(tx.update)({"w": X}, tx.init({"w": X}))[1][0], name)["w"]


def cache(batch=2, **options):
    new = jnp.linspace(-1, 1, batch * 3 * 4).reshape(batch, 3, 1, 4)
    return kv_cache.append(kv_cache.init(batch, 5, heads=1, width=4, **options), new, new * 2)


TREES = {
    "tensor": lambda: {"w": quantize(X), "b": X},
    "blocks": lambda: [quantize(X, E5M2, BlockWise((2, 128))), quantize(X, scaling=PerChannel(-1))],
    "first moment": lambda: moment("mu"),
    "second moment": moment,
    "cache": cache,
    "unquantized cache": lambda: cache(format=None),
    "optimizer": lambda: fp8jax.optim.adamw(0.1).init({"w": X}),
}


@pytest.mark.parametrize("tree", TREES)
def test_the_same_bits_come_back(tree):
    tree = TREES[tree]()
    for like in (jax.tree.map(jnp.zeros_like, tree), jax.eval_shape(lambda: tree)):
        got = serialization.from_bytes(like, serialization.to_bytes(tree))
        assert jax.tree.structure(got) == jax.tree.structure(tree)
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(tree), strict=True):
            assert a.dtype == b.dtype and np.asarray(a).tobytes() == np.asarray(b).tobytes()


def test_a_train_state_goes_on_from_bytes():
    module = nn.Dense(4)
    params = module.init(jax.random.key(0), X)["params"]

    @jax.jit
    def step(state):
        return state.apply_gradients(
            grads=jax.grad(lambda p: jnp.square(module.apply({"params": p}, X)).mean())(
                state.params
            )
        )

    fresh = TrainState.create(
        apply_fn=module.apply,
        params=params,
        tx=optax.chain(optax.clip_by_global_norm(1.0), fp8jax.optim.adamw(0.1)),
    )
    with jax.numpy_dtype_promotion("standard"):
        state = step(fresh)
        got = step(serialization.from_bytes(fresh, serialization.to_bytes(state)))
        jax.tree.map(np.testing.assert_array_equal, got, step(state))


@pytest.mark.parametrize(
    "written, like, text",
    [
        (
            lambda: {"w": quantize(X)},
            lambda: {"w": quantize(X, E5M2)},
            "./w/data must be float8_e5m2[4, 256], as in the Fp8Tensor there; got "
            "float8_e4m3fn[4, 256]. Restore",
        ),
        (
            lambda: quantize(X),
            lambda: quantize(X, scaling=PerChannel(-1)),
            "./scale must be float32[1, 256], as in the Fp8Tensor there; got float32[].",
        ),
        (
            lambda: {"w": X},
            lambda: {"w": quantize(X)},
            "./w must have the fields ['data', 'scale'] of the Fp8Tensor there; got ndarray.",
        ),
        (
            lambda: quantize(X),
            moment,
            ". must have the fields ['data', 'power', 'scale'] of the Fp8Moment there; got "
            "['data', 'scale'].",
        ),
        (
            cache,
            lambda: cache(3),
            "./length must be int32[3], as in the KVCache there; got int32[2]. Restore",
        ),
        (
            lambda: cache(format=None),
            cache,
            "./keys must have the fields ['data', 'scale'] of the Fp8Tensor there; got ndarray.",
        ),
    ],
    ids=["format", "shape", "dense", "power", "batch", "unquantized"],
)
def test_other_shapes_and_formats_are_refused(written, like, text):
    with pytest.raises(ValueError, match=re.escape(f"state at {text}")):
        serialization.from_bytes(like(), serialization.to_bytes(written()))
