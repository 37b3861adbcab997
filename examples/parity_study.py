"""How much does FP8 change what a model learns? Trains it many times, and holds each run against
f32's of the same seed.

    python examples/parity_study.py                                     # all recipes, 5 seeds
    python examples/parity_study.py --recipes rowwise mxfp8 --seeds 3   # some
    python examples/parity_study.py --without delayed                   # which rounding costs most?

Every run appends a line to the results file as it ends, and a second call goes on where the first
stopped. The model is that of `train_lm.py`, by default smaller; the last twentieth of the text is
held out, and the loss there is what counts. Two more contenders say how much of a gap is noise:
bfloat16, and f32 with each batch in reverse, whose sums differ in their order alone.
"""

import argparse
import dataclasses
import functools
import json
import math
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import rich.box
import rich.console
import rich.progress
import rich.table
import scipy.stats
import train_lm

import fp8jax

REFERENCE, REORDERED, BFLOAT16 = "f32", "f32, reordered", "bf16"
OPTIMIZERS = train_lm.OPTIMIZERS
OPERANDS = ("lhs", "rhs", "grad")


@dataclasses.dataclass(frozen=True)
class Study:
    """What all runs have in common."""

    steps: int = 1000
    layers: int = 2
    width: int = 128
    batch: int = 8
    length: int = 128
    data: str | None = None
    held_out_batches: int = 64

    def config(self, seed: int, dtype: str = "float32") -> train_lm.Config:
        """That of a run."""
        return train_lm.Config(
            steps=self.steps,
            layers=self.layers,
            width=self.width,
            batch=self.batch,
            length=self.length,
            data=self.data,
            seed=seed,
            dtype=dtype,
        )


@dataclasses.dataclass(frozen=True)
class Contender:
    """One way to train.

    Args:
      name: in the table.
      recipe: of the FP8 model, or None for none.
      optimizer: a name in `OPTIMIZERS`.
      dtype: of the model's computations.
      reverse: whether to reverse each batch.
    """

    name: str
    recipe: fp8jax.Recipe | None = None
    optimizer: str = "adamw"
    dtype: str = "float32"
    reverse: bool = False


def without(recipe: fp8jax.Recipe, operand: str) -> fp8jax.Recipe:
    """A recipe that leaves one operand in its own precision in all products.

    >>> without(fp8jax.recipes.delayed(), "grad").dlhs.grad is None
    True
    """
    products = {
        name: dataclasses.replace(getattr(recipe, name), **{operand: None})
        for name in ("forward", "dlhs", "drhs")
    }
    return dataclasses.replace(recipe, name=f"{recipe.name} without {operand}", **products)


def contenders(recipes: list[str], optimizers: list[str], ablated: list[str]) -> list[Contender]:
    """Those of a study: the reference and the noise first."""
    found = [
        Contender(REFERENCE),
        Contender(REORDERED, reverse=True),
        Contender(BFLOAT16, dtype="bfloat16"),
    ]
    presets = {name: getattr(fp8jax.recipes, name)() for name in {*recipes, *ablated}}
    for optimizer in optimizers:
        beside = "" if optimizer == "adamw" else f" + {optimizer}"
        if beside:
            found.append(Contender(f"f32{beside}", optimizer=optimizer))
        found += [Contender(f"{name}{beside}", presets[name], optimizer) for name in recipes]
    found += [
        Contender(f"{name} without {operand}", without(presets[name], operand))
        for name in ablated
        for operand in OPERANDS
    ]
    return found


def batches(
    text: np.ndarray, config: train_lm.Config, reverse: bool
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Of all steps of a run."""
    for step in range(config.steps):
        tokens, targets = train_lm.batch_at(text, step, config)
        yield (tokens[::-1], targets[::-1]) if reverse else (tokens, targets)


def run(
    contender: Contender, study: Study, seed: int, text: np.ndarray, on_step: Callable[[], None]
) -> float:
    """Trains once; the loss on the held-out text, in nats per byte."""
    config = study.config(seed, contender.dtype)
    split = len(text) * 19 // 20
    training, held_out = text[:split], text[split:]
    model = train_lm.linen_model(config)
    optimizer = functools.partial(OPTIMIZERS[contender.optimizer], b2=0.95, weight_decay=0.1)
    tx = optax.chain(optax.clip_by_global_norm(1.0), optimizer(train_lm.learning_rate_of(config)))
    if contender.recipe is not None:
        model = fp8jax.linen.Fp8(model, contender.recipe, train_lm.RULES)
        tx = fp8jax.with_delayed_scaling(tx) if any(contender.recipe.delayed_casts) else tx
    first, _ = train_lm.batch_at(training, 0, config)
    variables, opt_state = jax.jit(train_lm.make_start(model, tx, first))(jax.random.key(seed))
    step = train_lm.make_step(model, tx)
    for tokens, targets in batches(training, config, contender.reverse):
        variables, opt_state, _, _ = step(variables, opt_state, tokens, targets)
        on_step()

    @jax.jit
    def loss_of(variables, tokens, targets):
        logits = model.apply(variables, tokens).astype(jnp.float32)
        return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()

    # The same windows for every run.
    fixed = dataclasses.replace(config, seed=0)
    return float(
        np.mean(
            [
                loss_of(variables, *train_lm.batch_at(held_out, index, fixed))
                for index in range(study.held_out_batches)
            ]
        )
    )


class Results:
    """A file of JSON lines, one for each run that has ended."""

    def __init__(self, path: pathlib.Path, study: Study):
        self._path, self._study = path, dataclasses.asdict(study)
        lines = path.read_text().splitlines() if path.exists() else []
        self._losses = {}
        for line in map(json.loads, lines):
            if line["study"] == self._study:
                self._losses[line["contender"], line["seed"]] = line["loss"]

    def get(self, contender: str, seed: int) -> float | None:
        """The loss of a run, or None where it has not ended."""
        return self._losses.get((contender, seed))

    def add(self, contender: str, seed: int, loss: float) -> None:
        """Keeps a run's loss, in the file at once."""
        self._losses[contender, seed] = loss
        with self._path.open("a") as file:
            file.write(
                json.dumps(
                    {"study": self._study, "contender": contender, "seed": seed, "loss": loss}
                )
                + "\n"
            )


@dataclasses.dataclass(frozen=True)
class Gap:
    """How a contender's losses differ from the reference's of the same seeds, relative to them.

    Args:
      loss: the contender's own, the mean over the seeds, in nats per byte.
      mean: of the gap, over the seeds.
      half_width: of the 95 % confidence interval of the mean, by Student's t; infinite for one
        seed.
      spread: standard deviation over the seeds.
      seeds: their number.
    """

    loss: float
    mean: float
    half_width: float
    spread: float
    seeds: int


def gap(losses: np.ndarray, reference: np.ndarray) -> Gap:
    """The gap between paired losses.

    >>> gap(np.array([1.01, 1.01]), np.array([1.0, 1.0])).half_width
    0.0
    """
    ratios = losses / reference - 1
    count = len(ratios)
    spread = float(ratios.std(ddof=1)) if count > 1 else math.nan
    half = (
        float(scipy.stats.t.ppf(0.975, count - 1)) * spread / math.sqrt(count)
        if count > 1
        else math.inf
    )
    return Gap(float(losses.mean()), float(ratios.mean()), half, spread, count)


def gaps(results: Results, names: list[str], seeds: int) -> dict[str, Gap]:
    """Of each contender that has a run whose reference has ended too; the reference first, whose
    gap is 0.
    """
    found = {}
    for name in names:
        pairs = [(results.get(name, seed), results.get(REFERENCE, seed)) for seed in range(seeds)]
        pairs = [pair for pair in pairs if None not in pair]
        if pairs:
            found[name] = gap(*np.array(pairs).T)
    return found


def table_of(found: dict[str, Gap], study: Study) -> rich.table.Table:
    """The gaps, in percent."""
    table = rich.table.Table(
        box=rich.box.SIMPLE_HEAD,
        title=f"Held-out loss relative to f32's of the same seed, after {study.steps} steps",
    )
    for column in ("contender", "loss", "mean gap, %", "95 % interval", "spread", "seeds"):
        table.add_column(column, justify="left" if column == "contender" else "right")
    for name, each in found.items():
        if name == REFERENCE:
            table.add_row(name, f"{each.loss:.4f}", "", "", "", str(each.seeds))
            continue
        low, high = (each.mean + sign * each.half_width for sign in (-1, 1))
        table.add_row(
            name,
            f"{each.loss:.4f}",
            f"{100 * each.mean:+.3f}",
            f"{100 * low:+.3f} .. {100 * high:+.3f}",
            f"{100 * each.spread:.3f}",
            str(each.seeds),
        )
    return table


def plot(found: dict[str, Gap], path: pathlib.Path) -> None:
    """Mean gaps with their intervals."""
    import matplotlib.figure

    figure = matplotlib.figure.Figure(figsize=(7, 0.5 + 0.35 * len(found)), layout="constrained")
    axes = figure.subplots()
    names = [name for name in found if name != REFERENCE][::-1]
    means = [100 * found[name].mean for name in names]
    widths = [
        100 * found[name].half_width if math.isfinite(found[name].half_width) else 0
        for name in names
    ]
    axes.errorbar(means, range(len(names)), xerr=widths, fmt="o", capsize=3)
    axes.axvline(0, color="0.7", zorder=0)
    axes.set_yticks(range(len(names)), names)
    axes.set_xlabel("held-out loss relative to f32, %; mean and 95 % interval over seeds")
    figure.savefig(path, dpi=120)


def study_all(
    study: Study, chosen: list[Contender], seeds: int, results: Results, progress: bool = True
) -> None:
    """Runs what has not been run, seed by seed, so that an early stop leaves pairs."""
    text = train_lm.load_text(study.data)
    missing = [
        (contender, seed)
        for seed in range(seeds)
        for contender in chosen
        if results.get(contender.name, seed) is None
    ]
    columns = *rich.progress.Progress.get_default_columns(), rich.progress.MofNCompleteColumn()
    console = rich.console.Console(stderr=True)
    with rich.progress.Progress(*columns, console=console, disable=not progress) as bar:
        task = bar.add_task("training", total=len(missing) * study.steps)
        for contender, seed in missing:
            bar.update(task, description=f"{contender.name}, seed {seed}")
            loss = run(contender, study, seed, text, functools.partial(bar.advance, task))
            results.add(contender.name, seed, loss)


def main(arguments: list[str] | None = None) -> dict[str, Gap]:
    """Runs the study, and prints and draws what it came to."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    names = train_lm.recipe_names()
    parser.add_argument(
        "--recipes", nargs="*", choices=names, default=names, help="presets of fp8jax.recipes"
    )
    parser.add_argument(
        "--optimizers", nargs="+", choices=list(OPTIMIZERS), default=["adamw"], help="optimizers"
    )
    parser.add_argument(
        "--without",
        nargs="*",
        choices=names,
        default=[],
        help="recipes to run with each operand left unquantized in turn",
    )
    parser.add_argument("--seeds", type=int, default=5, help="number of seeds, from 0 on")
    parser.add_argument(
        "--results",
        type=pathlib.Path,
        default=pathlib.Path("parity.jsonl"),
        help="file of results, gone on with",
    )
    parser.add_argument(
        "--plot", type=pathlib.Path, default=pathlib.Path("parity.png"), help="picture to write"
    )
    parser.add_argument("--no-progress", dest="progress", action="store_false", help="show no bar")
    for field in dataclasses.fields(Study):
        kind: Any = str if field.name == "data" else int
        parser.add_argument(
            f"--{field.name.replace('_', '-')}",
            type=kind,
            default=field.default,
            help="of every run",
        )
    options = vars(parser.parse_args(arguments))
    if options["seeds"] < 1:
        parser.error(f"seeds must be at least 1; got {options['seeds']}.")
    study = Study(**{field.name: options[field.name] for field in dataclasses.fields(Study)})
    chosen = contenders(options["recipes"], options["optimizers"], options["without"])
    results = Results(options["results"], study)
    study_all(study, chosen, options["seeds"], results, options["progress"])
    found = gaps(results, [contender.name for contender in chosen], options["seeds"])
    rich.console.Console().print(table_of(found, study))
    plot(found, options["plot"])
    return found


if __name__ == "__main__":
    main()
