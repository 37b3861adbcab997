"""`examples/generate.py`: FP8 weights and cache in generation."""

import pathlib
import sys

import jax
import numpy as np
import pytest

from fp8jax import Fp8Tensor, dequantize_params, kv_cache, quantize
from fp8jax._scaling import PerToken

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "examples"))

import generate
import train_lm


def untrained(**options):
    config = train_lm.Config(layers=2, width=128, length=32, batch=2, **options)
    params = train_lm.linen_model(config).init(jax.random.key(1), np.zeros((1, 4), np.int32))[
        "params"
    ]
    # Larger than at the start of training, so that what is generated depends on all layers.
    return config, jax.tree.map(lambda leaf: leaf * 2 if leaf.ndim > 2 else leaf, params)


def reference(server):
    """The plain model with the dequantized weights and a dense cache of what an FP8 one would give
    back.
    """
    params = dequantize_params(server.variables["params"])
    return generate.Server(
        server.config, server.model.module.clone(parent=None), {"params": params}, None
    )


def append_rounded(cache, keys, values, count=None, _append=kv_cache.append):
    if not isinstance(cache.keys, Fp8Tensor):
        keys, values = (quantize(new, scaling=PerToken()).dequantize() for new in (keys, values))
    return _append(cache, keys, values, count)


def check_same_text(server, prompt, tokens, monkeypatch):
    got = server.generate(prompt, tokens)
    with monkeypatch.context() as patch:
        patch.setattr(kv_cache, "append", append_rounded)
        # One more, so that this is traced for itself, as it is patched, and not found among what
        # was traced before.
        expected = reference(server).generate(prompt, tokens + 1)[:, :tokens]
    assert got.shape == (prompt.shape[0], tokens)
    assert np.array_equal(got, expected)
    assert len(set(np.asarray(got).ravel().tolist())) > 5
    return got


@pytest.mark.slow
def test_text_is_that_of_the_dequantized_model(monkeypatch):
    config, params = untrained()
    text = np.frombuffer(b"The quick brown fox jumps over the lazy dog. " * 20, np.uint8)
    both = generate.servers(config, params, text, "weight-only")
    prompt = np.stack([text[:9], text[9:18]]).astype(np.int32)
    got = check_same_text(both["FP8"], prompt, 40, monkeypatch)
    assert not np.array_equal(
        got, both["unquantized"].generate(prompt, 40)
    )  # What FP8 does is to be seen here.


@pytest.mark.slow
def test_sampling_depends_on_the_key_and_cached_loss_is_that_of_the_whole():
    config, params = untrained()
    text = np.frombuffer(bytes(range(256)) * 4, np.uint8)
    plain = generate.servers(config, params, text, "weight-only")["unquantized"]
    prompt = text[None, :4].astype(np.int32)
    first, again, other = (
        plain.generate(prompt, 20, 1.0, jax.random.key(seed)) for seed in (0, 0, 1)
    )
    assert np.array_equal(first, again) and not np.array_equal(first, other)
    tokens, targets = train_lm.batch_at(text, generate.HELD_OUT, config)
    logits = plain.model.apply(plain.variables, tokens)
    expected = np.mean(
        -np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), targets[..., None], -1)
    )
    assert plain.loss(text, 1) == pytest.approx(expected, rel=1e-5)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The example at its defaults, through a checkpoint."""
    folder = tmp_path_factory.mktemp("trained")
    with jax.numpy_dtype_promotion("standard"):  # optax's Adam needs it.
        train_lm.train(train_lm.Config(checkpoint=str(folder)))
    return generate.load(str(folder))


@pytest.mark.slow
@pytest.mark.parametrize("mode", list(generate.MODES))
def test_held_out_loss_of_the_trained_example(trained, mode, tmp_path):
    from fp8jax.interop import write_checkpoint

    config, params = trained
    text = train_lm.load_text(None)
    both = generate.servers(config, params, text, mode)
    plain, fp8 = both["unquantized"], both["FP8"]
    # Weights alone first: an unquantized cache beside FP8 weights, then an FP8 one.
    weights = (
        generate.Server(config, fp8.model, fp8.variables, None).loss(text, 16)
        / plain.loss(text, 16)
        - 1
    )
    cached = fp8.loss(text, 16) / plain.loss(text, 16) - 1
    sizes = []
    for name, server in both.items():
        write_checkpoint(tmp_path / name, server.variables["params"], generate_names())
        sizes.append(sum(path.stat().st_size for path in (tmp_path / name).glob("*.safetensors")))
    print(
        f"{mode}: weights {weights:+.3%}, with cache {cached:+.3%}, size {sizes[1] / sizes[0]:.3f}"
    )
    assert abs(weights) < 0.002 and abs(cached) < 0.003
    assert sizes[1] / sizes[0] < 0.30


def generate_names():
    from fp8jax.interop import llama_names

    return llama_names(
        "blocks",
        {
            "query": "self_attn.q_proj",
            "key": "self_attn.k_proj",
            "value": "self_attn.v_proj",
            "out": "self_attn.o_proj",
            "up": "mlp.up_proj",
            "down": "mlp.down_proj",
            "attention_norm": "input_layernorm",
            "mlp_norm": "post_attention_layernorm",
        },
        {"embed": "model.embed_tokens", "norm": "model.norm", "lm_head": "lm_head"},
    )


@pytest.mark.slow
def test_200_bytes_are_those_of_the_dequantized_trained_model(trained, monkeypatch):
    config, params = trained
    server = generate.servers(config, params, train_lm.load_text(None), "weight-only")["FP8"]
    check_same_text(
        server, np.frombuffer(b"def ", np.uint8)[None].astype(np.int32), 200, monkeypatch
    )
