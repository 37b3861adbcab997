"""The code under "Here" in `examples/moving_here.md` runs as it stands, and what it says of Flax's
state is so.
"""

import pathlib
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.linen import fp8_ops

import fp8jax

TEXT = (pathlib.Path(__file__).parents[1] / "examples" / "moving_here.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
TOKENS = jnp.arange(8).reshape(2, 4)


class Transformer(nn.Module):
    """Stands for the reader's own; `op` as it was before."""

    op: type | None

    @nn.compact
    def __call__(self, tokens):
        x = nn.Dense(8, dot_general_cls=self.op)(nn.Embed(11, 8)(tokens))
        return nn.Dense(11, dot_general_cls=self.op, name="lm_head")(x)


def loss_fn(logits):
    return jnp.square(logits).mean()


@pytest.mark.thorough
@jax.numpy_dtype_promotion("standard")  # optax's Adam needs it.
def test_here(capsys):
    old_model = Transformer(fp8_ops.Fp8DirectDotGeneralOp)
    old = jax.jit(old_model.init)(jax.random.key(0), TOKENS)
    old |= {
        "_overwrite_with_gradient": jax.grad(lambda old: loss_fn(old_model.apply(old, TOKENS)))(
            old
        )["_overwrite_with_gradient"]
    }

    names = {
        "fp8jax": fp8jax,
        "jax": jax,
        "optax": optax,
        "Transformer": Transformer,
        "config": None,
        "key": jax.random.key(0),
        "tokens": TOKENS,
        "loss_fn": loss_fn,
        "old": old,
        "params": old["params"],
        "loss": lambda params, tokens: loss_fn(Transformer(None).apply({"params": params}, tokens)),
    }
    flax, carried, qwix, engine = BLOCKS
    exec(flax, names)
    assert jax.tree.structure(names["variables"]["params"]) == jax.tree.structure(old["params"])
    exec(carried, names)
    got, want = (
        names["model"].apply(names["variables"], TOKENS),
        Transformer(None).apply({"params": old["params"]}, TOKENS),
    )
    assert 0 < jnp.linalg.norm(got - want) < 0.1 * jnp.linalg.norm(want)
    exec(qwix, names)
    assert "left out by rule 'lm_head'" in capsys.readouterr().out and list(names["variables"]) == [
        "params"
    ]
    exec(engine, names)
    assert all((node.grad > 0).all() for node in names["amaxes"].values())
    exact = jax.grad(names["loss"])(old["params"], TOKENS)["lm_head"]["kernel"]
    assert (
        0
        < np.linalg.norm(names["gradients"]["lm_head"]["kernel"] - exact)
        < 0.2 * np.linalg.norm(exact)
    )


def test_every_preset_is_named():
    assert set(re.findall(r"recipes\.(\w+)\(", TEXT)) <= set(vars(fp8jax.recipes))
