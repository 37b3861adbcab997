"""The README's Python runs as it stands."""

import pathlib
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import nnx

import fp8jax

TEXT = (pathlib.Path(__file__).parents[1] / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)


class Transformer(nn.Module):
    """Stands for the reader's own."""

    config: None

    @nn.compact
    def __call__(self, tokens):
        return nn.Dense(11, name="lm_head")(nn.Dense(8)(nn.Embed(11, 8)(tokens)))


@jax.numpy_dtype_promotion("standard")  # optax's Adam needs it.
def test_a_plain_function_trains(capsys):
    x = jax.random.normal(jax.random.key(0), (32, 8))
    names = {
        "params": {"w": jnp.ones((8, 16)) * 0.1, "v": jnp.ones((16, 4))},
        "x": x,
        "y": jnp.ones((32, 4)),
    }
    exec(BLOCKS[0], names)
    assert "2 of 2 products in FP8" in capsys.readouterr().out
    trained, state, losses = names["trained"], names["state"], []
    for _ in range(20):
        trained, state, value = names["step"](trained, state, x, names["y"])
        losses.append(float(value))
    assert losses[-1] < losses[0]


@jax.numpy_dtype_promotion("standard")
def test_a_linen_model_is_wrapped(capsys):
    names = {
        "fp8jax": fp8jax,
        "optax": optax,
        "Transformer": Transformer,
        "config": None,
        "key": jax.random.key(0),
        "tokens": jnp.zeros((2, 3), jnp.int32),
    }
    exec(BLOCKS[1], names)
    assert "left out by rule 'lm_head'" in capsys.readouterr().out and sorted(
        names["variables"]
    ) == ["fp8", "params"]


@jax.numpy_dtype_promotion("standard")
def test_an_nnx_model_trains():
    def model(config, rngs):
        return nnx.Sequential(nnx.Embed(11, 8, rngs=rngs), nnx.Linear(8, 11, rngs=rngs))

    def loss_fn(model, tokens):
        return optax.softmax_cross_entropy_with_integer_labels(model(tokens), tokens).mean()

    names = {
        "fp8jax": fp8jax,
        "optax": optax,
        "nnx": nnx,
        "Transformer": model,
        "config": None,
        "tokens": jnp.arange(8).reshape(2, 4),
        "loss_fn": loss_fn,
    }
    exec(BLOCKS[2], names)
    losses = [
        float(names["step"](names["model"], names["optimizer"], names["tokens"])) for _ in range(20)
    ]
    assert losses[-1] < losses[0]


def test_a_quantized_model_serves():
    tokens = jnp.arange(8).reshape(2, 4)
    params = Transformer(None).init(jax.random.key(0), tokens)["params"]
    names = {
        "fp8jax": fp8jax,
        "Transformer": Transformer,
        "config": None,
        "trained_params": params,
        "tokens": tokens,
    }
    exec(BLOCKS[3] + "\nlogits = served.apply({'params': params}, tokens)", names)
    assert (
        jnp.abs(names["logits"] - Transformer(None).apply({"params": params}, tokens)).max() < 0.1
    )
    assert names["params"]["lm_head"]["kernel"].data.dtype == jnp.float8_e4m3fn


def test_it_is_short_and_plain():
    lines = TEXT.splitlines()
    assert len(lines) <= 150
    assert all(len(line) <= 120 or line.startswith("![") for line in lines)
    prose = re.sub(r"```.*?```", ". ", TEXT, flags=re.DOTALL)
    prose = re.sub(r"^[|#>!-].*$", ". ", prose, flags=re.MULTILINE)
    sentences = [" ".join(sentence.split()) for sentence in re.split(r"[.:;](?:\s|$)", prose)]
    assert all(len(sentence.split()) <= 35 for sentence in sentences)


def test_links_lead_somewhere():
    root = pathlib.Path(__file__).parents[1]
    links = re.findall(r"\]\(([^)#]+)", TEXT)
    assert len(links) > 10
    for link in links:
        assert link.startswith("https://") or (root / link).is_file(), link
    assert (root / "examples" / "train_lm.png").is_file()
