"""Train a small language model twice, unquantized and in FP8, and see how little FP8 changes.

Both runs start from the same parameters, read the same batches and take their steps in turn. The
model is a decoder-only Transformer over bytes; the text is the source of Python's own standard
library, or a file of yours.

    python examples/train_lm.py                      # some minutes; writes train_lm.png
    python examples/train_lm.py --data my.txt --steps 1000
    python examples/train_lm.py --checkpoint runs/a  # interrupt it, run it again: it goes on

FP8 takes two lines: `fp8_model` wraps the model in `fp8jax.linen.Fp8`, and `make_twins` the
optimizer in `fp8jax.with_delayed_scaling`. The training step is the same for both.
"""

import argparse
import concurrent.futures
import dataclasses
import functools
import pathlib
import sys
import sysconfig
import time
import zlib
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import fp8jax
from fp8jax import kv_cache

UNQUANTIZED, FP8 = "unquantized", "FP8"
VOCABULARY = 256  # A token is a byte.
HEAD_WIDTH = 64
APIS = ("linen", "nnx")
OPTIMIZERS = {
    "adamw": optax.adamw,
    "fp8-adamw": fp8jax.optim.adamw,
}  # The second holds its moments in FP8.
RULES = (
    fp8jax.Rule(".*lm_head", None),
)  # A small product, and what it puts out are the logits themselves.
LAST = 50  # Steps that a final loss is the mean of.


@dataclasses.dataclass(frozen=True)
class Config:
    """What to train, on what, for how long. `train_lm.py --help` describes the fields."""

    steps: int = 250
    layers: int = 4
    width: int = 256
    recipe: str = "delayed"
    api: str = "linen"
    optimizer: str = "adamw"
    data: str | None = None
    seed: int = 0
    checkpoint: str | None = None
    checkpoint_every: int = 100
    batch: int = 8
    length: int = 128
    learning_rate: float = 2e-3
    warmup: int = 20
    dtype: str = "float32"
    unit_gradient_scales: bool = False

    def __post_init__(self):
        for name in ("steps", "layers", "width", "checkpoint_every", "batch", "length", "warmup"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"{name} must be at least 1; got {getattr(self, name)}. Leave it out for the "
                    "default, "
                    f"{getattr(Config, name)}."
                )
        if self.width % HEAD_WIDTH:
            raise ValueError(
                f"width must be a multiple of {HEAD_WIDTH}, the width of an attention head; got "
                f"{self.width}. "
                f"The nearest is {max(1, round(self.width / HEAD_WIDTH)) * HEAD_WIDTH}."
            )
        if self.recipe not in recipe_names():
            raise ValueError(
                f"recipe must be one of {recipe_names()}; got {self.recipe!r}. Leave it out for "
                "'delayed'."
            )
        if self.api not in APIS:
            raise ValueError(
                f"api must be one of {APIS}; got {self.api!r}. Leave it out for 'linen'."
            )
        if self.optimizer not in OPTIMIZERS:
            raise ValueError(
                f"optimizer must be one of {tuple(OPTIMIZERS)}; got {self.optimizer!r}. Leave it "
                "out for 'adamw'."
            )
        if self.unit_gradient_scales and not recipe_of(self).delayed_casts[2]:
            raise ValueError(
                f"unit_gradient_scales must be False for the recipe {self.recipe!r}, whose "
                "gradients' scales are "
                "no state; got True. Use recipe 'delayed'."
            )


def recipe_names() -> list[str]:
    """The presets that the library has."""
    return list(fp8jax.recipes.PRESETS)


def recipe_of(config: Config) -> fp8jax.Recipe:
    """The recipe with its defaults."""
    return fp8jax.recipes.PRESETS[config.recipe]()


# --------------------------------------------------------------------------------------------------
# the model


def rotate(x: jax.Array, positions: jax.Array | None = None) -> jax.Array:
    """Rotary position embedding (Su et al., 2021) of `x`, of shape (batch, length, heads, width of
    a head).

    `positions`, of shape (batch, length), are those from 0 on by default.
    """
    _, length, _, width = x.shape
    frequencies = 10_000.0 ** (-np.arange(0, width, 2) / width)
    if positions is None:
        angles = np.arange(length)[None, :, None, None] * frequencies
        cos, sin = (jnp.asarray(part, x.dtype) for part in (np.cos(angles), np.sin(angles)))
    else:
        angles = (
            positions[:, :, None, None].astype(jnp.float32)
            * jnp.asarray(frequencies, jnp.float32)[None, None, None]
        )
        cos, sin = jnp.cos(angles).astype(x.dtype), jnp.sin(angles).astype(x.dtype)
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, first * sin + second * cos], axis=-1)


class Block(nn.Module):
    """Causal attention and an MLP, each behind a normalization and around a residual connection."""

    layers: int
    dtype: Any

    @nn.compact
    def __call__(
        self, x: jax.Array, cache: kv_cache.KVCache | None
    ) -> tuple[jax.Array, kv_cache.KVCache | None]:
        batch, length, width = x.shape
        dense = functools.partial(nn.Dense, use_bias=False, dtype=self.dtype)
        # What is added to the residual stream starts small, so that its variance doesn't grow with
        # depth.
        small = nn.initializers.variance_scaling(0.5 / self.layers, "fan_in", "truncated_normal")

        h = nn.RMSNorm(dtype=self.dtype, name="attention_norm")(x)
        q, k, v = (
            dense(width, name=name)(h).reshape(batch, length, -1, HEAD_WIDTH)
            for name in ("query", "key", "value")
        )
        positions = None if cache is None else kv_cache.positions(cache, length)
        q, k = rotate(q, positions), rotate(k, positions)
        if cache is None:
            past = np.tri(length, dtype=bool)[None, None]
        else:
            cache = kv_cache.append(cache, k, v)
            k, v = kv_cache.read(cache, self.dtype)
            past = kv_cache.causal_mask(cache, positions)[:, None]
        with jax.named_scope("scores"):  # What `explain` calls this product.
            logits = jnp.einsum("bqhd,bkhd->bhqk", q, k) * HEAD_WIDTH**-0.5
        weights = jax.nn.softmax(logits.astype(jnp.float32), where=past, axis=-1).astype(self.dtype)
        with jax.named_scope("mix"):
            h = jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(batch, length, width)
        x = x + dense(width, kernel_init=small, name="out")(h)

        h = nn.RMSNorm(dtype=self.dtype, name="mlp_norm")(x)
        h = nn.relu(dense(4 * width, name="up")(h))
        return x + dense(width, kernel_init=small, name="down")(h), cache


class TransformerLM(nn.Module):
    """Bytes of shape (batch, length) to the logits of each one's successor; with a cache, behind
    those it holds.
    """

    layers: int
    width: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, tokens: jax.Array, cache: kv_cache.KVCache | None = None) -> Any:
        x = nn.Embed(
            VOCABULARY,
            self.width,
            dtype=self.dtype,
            embedding_init=nn.initializers.normal(1.0),
            name="embed",
        )(tokens)
        blocks = nn.scan(
            Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=self.layers
        )
        x, cache = blocks(self.layers, self.dtype, name="blocks")(x, cache)
        x = nn.RMSNorm(dtype=self.dtype, name="norm")(x)
        logits = nn.Dense(VOCABULARY, use_bias=False, dtype=self.dtype, name="lm_head")(x)
        return logits if cache is None else (logits, cache)


# --------------------------------------------------------------------------------------------------
# the text


def load_text(path: str | None, most: int = 16_000_000) -> np.ndarray:
    """The bytes of the file at `path`; by default those of Python's standard library, without its
    tests.

    Args:
      path: a file, or None.
      most: number of bytes to stop at.
    """
    if path is not None:
        return np.frombuffer(pathlib.Path(path).read_bytes()[:most], np.uint8)
    root = pathlib.Path(sysconfig.get_path("stdlib"))
    skipped = {"test", "tests", "idle_test", "site-packages", "dist-packages"}
    text = bytearray()
    for file in sorted(root.rglob("*.py")):
        if skipped.isdisjoint(file.relative_to(root).parts) and len(text) < most:
            text += file.read_bytes()
    if not text:
        raise FileNotFoundError(
            f"this Python has no source of its standard library in {root}: pass a text with --data "
            "FILE."
        )
    return np.frombuffer(bytes(text[:most]), np.uint8)


def batch_at(text: np.ndarray, step: int, config: Config) -> tuple[np.ndarray, np.ndarray]:
    """The tokens of a step, and the tokens to predict from them: a function of the step alone, so
    runs can resume.
    """
    starts = np.random.default_rng((config.seed, step)).integers(
        0, len(text) - config.length, config.batch
    )
    windows = text[starts[:, None] + np.arange(config.length + 1)].astype(np.int32)
    return windows[:, :-1], windows[:, 1:]


# --------------------------------------------------------------------------------------------------
# the training


@dataclasses.dataclass
class Twin:
    """One of the two runs: its state, and what it went through."""

    variables: Any
    opt_state: Any
    step: Callable
    losses: list[float] = dataclasses.field(default_factory=list)
    seconds: list[float] = dataclasses.field(default_factory=list)
    seen: list[Any] = dataclasses.field(
        default_factory=list
    )  # At each step: exponents and amaxes, by site.

    def advance(self, tokens: np.ndarray, targets: np.ndarray) -> None:
        """Takes a step, and the time of it."""
        start = time.perf_counter()
        state = jax.block_until_ready(self.step(self.variables, self.opt_state, tokens, targets))
        self.seconds.append(time.perf_counter() - start)
        self.variables, self.opt_state, loss, seen = state
        self.losses.append(float(loss))
        self.seen.append(jax.device_get(seen))


def scales_in(variables: Any) -> dict[str, fp8jax.SiteScales]:
    """The scales among a model's variables, or the amaxes among its gradients, by site; none of the
    unquantized twin.
    """
    return dict(variables["fp8"]["scales"]) if "fp8" in variables else {}


def make_step(
    model: Any, tx: optax.GradientTransformation, unit_gradient_scales: bool = False
) -> Callable:
    """The training step. That of FP8 has nothing more to it: scales are variables, and amaxes their
    gradients.
    """

    def loss_fn(variables, tokens, targets):
        logits = model.apply(variables, tokens).astype(jnp.float32)
        return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(variables, opt_state, tokens, targets):
        if unit_gradient_scales:
            sites = scales_in(variables).values()
            units = [site.replace(grad=jnp.zeros_like(site.grad)) for site in sites]
            variables = variables | {"fp8": {"scales": fp8jax.Scales.of(units)}}
        loss, grads = jax.value_and_grad(loss_fn)(variables, tokens, targets)
        updates, opt_state = tx.update(grads, opt_state, variables)
        seen = scales_in(variables), scales_in(grads)
        return optax.apply_updates(variables, updates), opt_state, loss, seen

    return step


def learning_rate_of(config: Config) -> Callable[[jax.Array], jax.Array]:
    """A function of the step alone, so that a run can be continued to more steps."""

    def learning_rate(count):
        step = (count + 1).astype(jnp.float32)
        return config.learning_rate * jnp.minimum(
            step / config.warmup, jnp.sqrt(config.warmup / step)
        )

    return learning_rate


def make_optimizer(config: Config, name: str = "adamw") -> optax.GradientTransformation:
    """AdamW, one of `OPTIMIZERS`, behind a clip of the global norm."""
    adamw = OPTIMIZERS[name](learning_rate_of(config), b2=0.95, weight_decay=0.1)
    return optax.chain(optax.clip_by_global_norm(1.0), adamw)


def linen_model(config: Config) -> TransformerLM:
    """The model as it is, in Flax Linen."""
    return TransformerLM(config.layers, config.width, jnp.dtype(config.dtype))


def unquantized_model(config: Config) -> Any:
    """The model as it is."""
    return linen_model(config) if config.api == "linen" else nnx_model(config, fp8=False)


def fp8_model(config: Config) -> Any:
    """The same model in FP8, but for the last product."""
    if config.api == "linen":
        return fp8jax.linen.Fp8(linen_model(config), recipe_of(config), RULES)
    return nnx_model(config, fp8=True)


def nnx_model(config: Config, fp8: bool) -> Any:
    """The model in Flax NNX."""
    # The file beside this one; it takes from this one what both models share.
    import transformer_nnx

    return transformer_nnx.PureModel(config, fp8)


def make_start(model: Any, tx: optax.GradientTransformation, tokens: np.ndarray) -> Callable:
    """The function from a random key to the first variables and optimizer state; in FP8, with
    scales that fit them.
    """

    def start(key):
        variables = model.init(key, tokens)
        return variables, tx.init(variables)

    return start


def make_twins(
    config: Config, tokens: np.ndarray, targets: np.ndarray, display: "Display"
) -> dict[str, Twin]:
    """Both runs before their first step: parameters from the same key, programs compiled."""
    fp8_tx = fp8jax.with_delayed_scaling(make_optimizer(config, config.optimizer))
    parts = {
        UNQUANTIZED: (unquantized_model(config), make_optimizer(config)),
        FP8: (fp8_model(config), fp8_tx),
    }
    key = jax.random.key(config.seed)
    with (
        concurrent.futures.ThreadPoolExecutor() as pool
    ):  # XLA compiles one program while the next one is traced.
        programs = {}
        for name, (model, tx) in parts.items():
            start = jax.jit(make_start(model, tx, tokens)).trace(key)
            step = make_step(model, tx, config.unit_gradient_scales).trace(
                *start.out_info, tokens, targets
            )
            programs[name] = [pool.submit(traced.lower().compile) for traced in (start, step)]
        display.message(explain(config))
        return {
            name: Twin(*start.result()(key), step.result())
            for name, (start, step) in programs.items()
        }


def explain(config: Config) -> fp8jax.Explanation:
    """The table of the FP8 model's sites."""
    model, tokens = (
        fp8_model(config),
        jax.ShapeDtypeStruct((config.batch, config.length), jnp.int32),
    )
    return model.explain(
        jax.eval_shape(unquantized_model(config).init, jax.random.key(0), tokens), tokens
    )


@dataclasses.dataclass
class Result:
    """What a run of both twins came to.

    Args:
      losses: by twin, the losses of all steps, in nats per byte.
      seconds: by twin, the time of each step.
      exponents, amaxes: of each step, by site, the exponents it began with and the amaxes it
        observed.
      explanation: the table of sites.
      summary: `fp8jax.metrics.summary` of the FP8 twin's scaling.
      variables: by twin, the final parameters (and, in FP8, scales).
      opt_state: of the FP8 twin's optimizer.
      program: the FP8 twin's compiled step.
    """

    losses: dict[str, list[float]]
    seconds: dict[str, list[float]]
    exponents: list[dict[str, fp8jax.SiteScales]]
    amaxes: list[dict[str, fp8jax.SiteScales]]
    explanation: fp8jax.Explanation
    summary: dict[str, float]
    variables: dict[str, Any]
    opt_state: Any
    program: jax.stages.Compiled

    def final_loss(self, name: str) -> float:
        """The mean over the last 50 steps."""
        return float(np.mean(self.losses[name][-LAST:]))

    @property
    def gap(self) -> float:
        """How much greater FP8's final loss is than the unquantized one's, relative to it."""
        return self.final_loss(FP8) / self.final_loss(UNQUANTIZED) - 1

    def step_time(self, name: str) -> float:
        """The median, in seconds."""
        return float(np.median(self.seconds[name]))


class Display:
    """Where `train` tells of its progress; this one keeps silent."""

    def message(self, text: Any) -> None:
        """Something to print, as text or as what `rich` prints."""

    def step(self, step: int, losses: dict[str, float]) -> None:
        """`step` steps are done, with these losses of late."""


def train(config: Config, display: Display = Display()) -> Result:
    """Trains both twins, step by step in turn, from the beginning or from the latest checkpoint."""
    text = load_text(config.data)
    if len(text) <= config.length:
        raise ValueError(
            f"data must be longer than a sequence of {config.length} bytes; got {len(text)} bytes. "
            "Pass a longer text."
        )
    display.message(
        f"{len(text) / 1e6:.1f} MB of text from {config.data or 'the Python standard library'}; "
        f"{config.layers} layers of width {config.width}; compiling ..."
    )
    checkpoints = Checkpoints(config, text) if config.checkpoint else None
    both = make_twins(config, *batch_at(text, 0, config), display)
    first = checkpoints.restore(both) if checkpoints else 0
    if first:
        display.message(f"Going on from step {first}, found in {config.checkpoint}.")
    for step in range(first, config.steps):
        batch = batch_at(text, step, config)
        # In turn, and each first every other time: whatever else the machine does hits both alike.
        for twin in list(both.values())[:: 1 if step % 2 else -1]:
            twin.advance(*batch)
        done = step + 1
        if checkpoints and (done % config.checkpoint_every == 0 or done == config.steps):
            checkpoints.save(done, both)
        display.step(done, {name: float(np.mean(twin.losses[-10:])) for name, twin in both.items()})

    fp8 = both[FP8]
    return Result(
        losses={name: twin.losses for name, twin in both.items()},
        seconds={name: twin.seconds for name, twin in both.items()},
        exponents=[exponents for exponents, _ in fp8.seen],
        amaxes=[amaxes for _, amaxes in fp8.seen],
        explanation=explain(config),
        summary={
            name: float(value)
            for name, value in fp8jax.metrics.summary(fp8.opt_state, fp8.variables).items()
        },
        variables={name: twin.variables for name, twin in both.items()},
        opt_state=fp8.opt_state,
        program=fp8.step,
    )


class Checkpoints:
    """Both twins in a folder of Orbax checkpoints: variables, optimizer states, scalings and what
    they went through.
    """

    # What may differ between the run that wrote a checkpoint and the one that goes on from it.
    FREE = ("steps", "data", "checkpoint", "checkpoint_every")

    def __init__(self, config: Config, text: np.ndarray):
        import orbax.checkpoint as ocp  # Takes a while, and most runs need none of it.

        self._ocp = ocp
        self._folder = config.checkpoint
        self._config = {
            name: value
            for name, value in dataclasses.asdict(config).items()
            if name not in self.FREE
        }
        self._config["data"] = f"{len(text)} bytes, CRC {zlib.crc32(text.tobytes()):08x}"
        self._manager = ocp.CheckpointManager(
            pathlib.Path(config.checkpoint).absolute(),
            options=ocp.CheckpointManagerOptions(max_to_keep=2),
        )
        self._check()

    def _check(self) -> None:
        """Refuses to go on from the checkpoints of another model, text or recipe."""
        step, args = self._manager.latest_step(), self._ocp.args
        if step is None:
            return
        written = self._manager.restore(step, args=args.Composite(config=args.JsonRestore())).config
        for name, value in self._config.items():
            if written.get(name) != value:
                raise ValueError(
                    f"{name} must be as in the checkpoint to go on from it; got {value!r}, and "
                    f"{self._folder} "
                    f"was written with {written.get(name)!r}. Pass that, or another --checkpoint "
                    "folder."
                )

    def save(self, step: int, both: dict[str, Twin]) -> None:
        """Writes a checkpoint, whole before this returns: the next step donates these buffers."""
        state = {
            name: {"variables": twin.variables, "opt_state": twin.opt_state}
            for name, twin in both.items()
        }
        history = {
            name: {
                "losses": np.array(twin.losses),
                "seconds": np.array(twin.seconds),
                "seen": jax.tree.map(lambda *leaves: np.stack(leaves), *twin.seen),
            }
            for name, twin in both.items()
        }
        fp8jax.checkpoint.save(
            self._manager,
            step,
            state,
            others={
                "config": self._ocp.args.JsonSave(self._config),
                "history": self._ocp.args.StandardSave(history),
            },
        )
        self._manager.wait_until_finished()

    def restore(self, both: dict[str, Twin]) -> int:
        """Puts the latest checkpoint into the twins; returns its step, 0 where there is none."""
        step = self._manager.latest_step()
        if step is None:
            return 0
        state = {
            name: {"variables": twin.variables, "opt_state": twin.opt_state}
            for name, twin in both.items()
        }
        # The shapes of what was seen are those of the scales, behind an axis of steps.
        seen = {name: (scales_in(twin.variables),) * 2 for name, twin in both.items()}
        history = {
            name: {
                "losses": np.zeros(step),
                "seconds": np.zeros(step),
                "seen": jax.tree.map(
                    lambda leaf: np.zeros((step, *leaf.shape), leaf.dtype), seen[name]
                ),
            }
            for name in both
        }
        state = fp8jax.checkpoint.restore(self._manager, state, step)
        history = self._manager.restore(
            step, args=self._ocp.args.Composite(history=self._ocp.args.StandardRestore(history))
        ).history
        for name, twin in both.items():
            twin.variables, twin.opt_state = state[name]["variables"], state[name]["opt_state"]
            twin.losses, twin.seconds = (
                history[name][key].tolist() for key in ("losses", "seconds")
            )
            twin.seen = [
                jax.tree.map(lambda leaf: leaf[index], history[name]["seen"])
                for index in range(step)
            ]
        return step


# --------------------------------------------------------------------------------------------------
# what one gets to see


class ConsoleDisplay(Display):
    """A progress bar with live losses; where the output is no terminal, a line now and then."""

    def __init__(self, console, steps: int):
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
        )

        self._console, self._steps = console, steps
        self._every = max(1, steps // 20)
        # Shown at once, for the program is compiled before the first step.
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(None),
            MofNCompleteColumn(),
            TimeRemainingColumn(compact=True),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self.progress.add_task("compiling", total=steps)

    def message(self, text: Any) -> None:
        self._console.print(text)

    def step(self, step: int, losses: dict[str, float]) -> None:
        text = "  ".join(f"{name} {loss:.3f}" for name, loss in losses.items())
        if not self._console.is_terminal:
            if step % self._every == 0 or step == self._steps:
                self._console.print(
                    f"step {step:>{len(str(self._steps))}} of {self._steps}   {text}"
                )
            return
        self.progress.update(self._task, completed=step, description=text)


def summary_table(result: Result) -> Any:
    """The end of the story, as a `rich` table."""
    import rich.box
    import rich.table

    steps = min(LAST, len(result.losses[FP8]))
    table = rich.table.Table(
        box=rich.box.SIMPLE_HEAD, caption="* of all matrix products, attention's included"
    )
    table.add_column("", no_wrap=True)
    for column in (UNQUANTIZED, FP8, "difference"):
        table.add_column(column, justify="right")
    loss, seconds = (
        {name: of(name) for name in (UNQUANTIZED, FP8)}
        for of in (result.final_loss, result.step_time)
    )
    table.add_row(
        f"loss of last {steps} steps, nats/byte",
        *(f"{loss[name]:.4f}" for name in loss),
        f"{result.gap:+.2%}",
    )
    table.add_row(
        "time per step, median, ms",
        *(f"{1e3 * seconds[name]:.1f}" for name in seconds),
        f"x {seconds[FP8] / seconds[UNQUANTIZED]:.2f}",
    )
    table.add_row("share of FLOPs* in FP8", f"{0:.1%}", f"{result.explanation.share:.1%}", "")
    share = result.summary.get("fp8/saturated_share")
    table.add_row("saturated share of amaxes", "", "-" if share is None else f"{share:.2%}", "")
    return table


def write_report(result: Result, config: Config, path: str) -> pathlib.Path:
    """A page on all sites: how exact they are on a batch, what became of them, and how their scales
    moved.
    """
    model = fp8_model(config)

    def loss(apply, tokens, targets):
        logits = apply(tokens).astype(jnp.float32)
        return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()

    variables, batch = result.variables[FP8], batch_at(load_text(config.data), config.steps, config)
    monitor = fp8jax.metrics.monitor(model.as_function(loss))
    return fp8jax.report.write_html(
        path,
        result.explanation,
        state=result.opt_state,
        scales=variables,
        monitor=monitor(variables.get("fp8", {}), variables["params"], *batch),
        hlo=fp8jax.hlo.report(result.program),
        steps=list(zip(result.exponents, result.amaxes)),
        title=f"train_lm.py: {config.steps} steps, recipe {config.recipe}",
    )


def figure_of(result: Result) -> Any:
    """Both loss curves, and the scales of a few sites in the middle layer."""
    from fp8jax import plots

    layer = len(jax.tree.leaves(result.variables[UNQUANTIZED]["params"]["blocks"])[0]) // 2
    histories = {}
    for module in ("query", "up", "down"):
        for site in [name for name in result.exponents[0] if name.endswith(f"/{module}")]:
            histories[f"{module} (layer {layer + 1})"] = tuple(
                plots.stack_history([step[site] for step in steps], layer)
                for steps in (result.exponents, result.amaxes)
            )
    return plots.plot_training(result.losses, histories)


def parse_arguments(arguments: list[str] | None) -> tuple[Config, pathlib.Path, str | None]:
    """The configuration, the folder for the plot, and the file of the report."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    described = {
        "steps": "steps to train both for",
        "layers": "number of layers",
        "width": f"width of the model, a multiple of {HEAD_WIDTH}",
        "recipe": "preset of fp8jax.recipes",
        "api": "of Flax that the model is written in",
        "optimizer": "of the FP8 run: AdamW, or AdamW with moments in FP8; of the other, AdamW",
        "data": "text to train on; without it, the source of Python's standard library",
        "seed": "of parameters and batches",
        "checkpoint": "folder to save to, and to resume from",
        "checkpoint_every": "steps from one checkpoint to the next",
        "batch": "sequences in a step",
        "length": "bytes in a sequence",
        "learning_rate": "highest learning rate",
        "warmup": "steps up to it",
        "dtype": "of what is not FP8",
    }
    metavars = {"data": "FILE", "checkpoint": "DIR"}
    for field in dataclasses.fields(Config):
        if field.name not in described:
            continue
        choices = {
            "recipe": recipe_names(),
            "api": APIS,
            "optimizer": OPTIMIZERS,
            "dtype": ["float32", "bfloat16"],
        }.get(field.name)
        kind = str if field.default is None else type(field.default)
        default = "" if field.default is None else f" (default: {field.default})"
        parser.add_argument(
            "--" + field.name.replace("_", "-"),
            type=kind,
            default=field.default,
            choices=choices,
            metavar=None if choices else metavars.get(field.name, "N"),
            help=described[field.name] + default,
        )
    parser.add_argument(
        "--unit-gradient-scales",
        action="store_true",
        help="leave the scales of gradients at 1, to see why they are needed",
    )
    parser.add_argument(
        "--report", metavar="FILE", help="HTML page to write on the sites and their histories"
    )
    parser.add_argument(
        "--out", default=".", metavar="DIR", help="folder for train_lm.png (default: this one)"
    )
    options = vars(parser.parse_args(arguments))
    out, report = pathlib.Path(options.pop("out")), options.pop("report")
    try:
        return Config(**options), out, report
    except ValueError as error:
        parser.error(str(error))


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    config, out, report = parse_arguments(arguments)
    import rich.console

    console = rich.console.Console(highlight=False)
    display = ConsoleDisplay(console, config.steps)
    try:
        with display.progress:
            result = train(config, display)
    except KeyboardInterrupt:
        console.print(
            "Interrupted."
            + (" Run it again to go on from the latest checkpoint." if config.checkpoint else "")
        )
        return 130
    console.print(summary_table(result))
    out.mkdir(parents=True, exist_ok=True)
    figure_of(result).savefig(out / "train_lm.png")
    console.print(f"Loss curves and scales: {out / 'train_lm.png'}")
    if report is not None:
        console.print(f"All sites, in a browser: {write_report(result, config, report)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
