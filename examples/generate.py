"""Sample text from the model of `train_lm.py`, unquantized and with FP8 weights and an FP8 cache,
side by side.

    python examples/train_lm.py --checkpoint runs/a python examples/generate.py --checkpoint runs/a
    python examples/generate.py --checkpoint runs/a --mode static --temperature 0.8 --prompt "class
    "

Without a checkpoint it trains a small model first, which takes a minute or two. The weights of all
matrix products are quantized by `fp8jax.quantize_params`; `fp8jax.linen.Fp8` runs the model on
them, and `fp8jax.kv_cache` holds the past.
"""

import argparse
import dataclasses
import functools
import pathlib
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import train_lm

import fp8jax
from fp8jax import kv_cache

MODES = {
    "weight-only": fp8jax.recipes.weight_only,
    "dynamic": fp8jax.recipes.rowwise,
    "static": fp8jax.recipes.delayed,
}
HELD_OUT = (
    10_000_000  # Steps that no training comes to: their batches are of other places in the text.
)


def weight_rules() -> list[fp8jax.WeightRule]:
    """One scale for each channel of each layer's weights; the embedding, which is looked up and not
    multiplied, stays.
    """
    return [
        fp8jax.WeightRule("blocks/.*kernel", fp8jax.PerChannel(-1), stacked=1),
        fp8jax.WeightRule("lm_head/kernel", fp8jax.PerChannel(-1)),
    ]


@dataclasses.dataclass(frozen=True)
class Server:
    """A model as it is served.

    Args:
      config: that it was trained with.
      model: the module, wrapped or not.
      variables: its parameters, and scales where it has some.
      cache_format: of the cache; None for one that is not quantized.
    """

    config: train_lm.Config
    model: Any
    variables: Any
    cache_format: fp8jax.Format | None

    def empty_cache(self, batch: int, capacity: int) -> kv_cache.KVCache:
        """A cache for so many sequences of so many tokens."""
        heads = self.config.width // train_lm.HEAD_WIDTH
        return kv_cache.init(
            batch,
            capacity,
            heads,
            train_lm.HEAD_WIDTH,
            layers=self.config.layers,
            format=self.cache_format,
            dtype=jnp.dtype(self.config.dtype),
        )

    def generate(
        self, prompt: np.ndarray, tokens: int, temperature: float = 0.0, key: Any = None
    ) -> jax.Array:
        """Continues prompts of one length, of shape (batch, length); 0 as temperature takes the
        likeliest token each time.
        """
        cache = self.empty_cache(prompt.shape[0], prompt.shape[1] + tokens)
        return _generate(
            self.model,
            temperature > 0,
            self.variables,
            cache,
            prompt,
            jnp.arange(tokens, dtype=jnp.int32),
            jnp.float32(max(temperature, 1e-6)),
            jax.random.key(0) if key is None else key,
        )

    def loss(self, text: np.ndarray, batches: int) -> float:
        """The mean over held-out batches of the loss in nats per byte, all tokens read through the
        cache.
        """

        @jax.jit
        def loss(variables, cache, tokens, targets):
            logits, _ = self.model.apply(variables, tokens, cache)
            return optax.softmax_cross_entropy_with_integer_labels(
                logits.astype(jnp.float32), targets
            ).mean()

        cache = self.empty_cache(self.config.batch, self.config.length)
        return float(
            np.mean(
                [
                    loss(self.variables, cache, *train_lm.batch_at(text, HELD_OUT + n, self.config))
                    for n in range(batches)
                ]
            )
        )


@functools.partial(jax.jit, static_argnums=(0, 1))
def _generate(model, sampled, variables, cache, prompt, steps, temperature, key):
    def choose(logits, step):
        if not sampled:
            return jnp.argmax(logits, axis=-1).astype(jnp.int32)
        return jax.random.categorical(
            jax.random.fold_in(key, step), logits / temperature, axis=-1
        ).astype(jnp.int32)

    logits, cache = model.apply(variables, prompt, cache)

    def body(state, step):
        logits, cache = state
        token = choose(logits.astype(jnp.float32), step)
        logits, cache = model.apply(variables, token[:, None], cache)
        return (logits[:, -1], cache), token

    _, tokens = jax.lax.scan(body, (logits[:, -1], cache), steps)
    return tokens.T


def servers(config: train_lm.Config, params: Any, text: np.ndarray, mode: str) -> dict[str, Server]:
    """The model unquantized, and with FP8 weights and cache."""
    plain = train_lm.TransformerLM(config.layers, config.width, jnp.dtype(config.dtype))
    wrapped = fp8jax.linen.Fp8(plain, MODES[mode]())
    variables = {"params": fp8jax.quantize_params(params, weight_rules())}
    if (
        mode == "static"
    ):  # One scale for the activations at each product, from what they are on some of the text.
        tokens = np.concatenate(
            [train_lm.batch_at(text, HELD_OUT - 1 - n, config)[0] for n in range(4)]
        )
        variables |= wrapped.apply({"params": params}, tokens, mutable="fp8")[1]
    return {
        "unquantized": Server(config, plain, {"params": params}, None),
        "FP8": Server(config, wrapped, variables, fp8jax.E4M3),
    }


def load(folder: str) -> tuple[train_lm.Config, Any]:
    """Configuration and unquantized parameters of a checkpoint of `train_lm.py`."""
    import orbax.checkpoint as ocp

    with ocp.CheckpointManager(pathlib.Path(folder).absolute()) as manager:
        step = manager.latest_step()
        if step is None:
            raise FileNotFoundError(
                f"--checkpoint must be a folder that train_lm.py wrote to; got {folder}, without a "
                "checkpoint."
            )
        written = manager.restore(
            step, args=ocp.args.Composite(config=ocp.args.JsonRestore())
        ).config
        fields = {field.name for field in dataclasses.fields(train_lm.Config)} - {"data"}
        config = train_lm.Config(
            **{name: value for name, value in written.items() if name in fields}
        )
        if config.api != "linen":
            raise ValueError(
                f"--checkpoint must hold a Linen model; got one of {config.api}. Train with --api "
                "linen."
            )
        start = train_lm.make_start(
            train_lm.TransformerLM(config.layers, config.width),
            optax.identity(),
            np.zeros((1, config.length), np.int32),
        )
        variables, _ = jax.eval_shape(start, jax.random.key(0))
        here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        wanted = {
            train_lm.UNQUANTIZED: {
                "variables": jax.tree.map(
                    lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here),
                    variables,
                )
            }
        }
        restored = manager.restore(
            step,
            args=ocp.args.Composite(
                state=ocp.args.PyTreeRestore(
                    wanted,
                    restore_args=ocp.checkpoint_utils.construct_restore_args(wanted),
                    partial_restore=True,
                )
            ),
        ).state
    return config, restored[train_lm.UNQUANTIZED]["variables"]["params"]


def train(steps: int) -> tuple[train_lm.Config, Any]:
    """A small model, trained for a while."""
    config = train_lm.Config(steps=steps, layers=2, width=128, warmup=min(20, steps))
    return config, train_lm.train(config).variables[train_lm.UNQUANTIZED]["params"]


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """The command line's options."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--checkpoint",
        metavar="DIR",
        help="folder that train_lm.py wrote to; without it, a small model is trained",
    )
    parser.add_argument(
        "--mode",
        choices=list(MODES),
        default="weight-only",
        help="what becomes of activations (default: weight-only)",
    )
    parser.add_argument("--prompt", default="def ", help="text to continue (default: 'def ')")
    parser.add_argument(
        "--tokens", type=int, default=200, metavar="N", help="bytes to generate (default: 200)"
    )
    parser.add_argument(
        "--temperature",
        type=float,
        default=0.0,
        help="0 takes the likeliest byte each time (default: 0)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of sampling (default: 0)")
    parser.add_argument(
        "--train-steps",
        type=int,
        default=150,
        metavar="N",
        help="without a checkpoint (default: 150)",
    )
    parser.add_argument(
        "--data", metavar="FILE", help="text of the held-out losses; by default that of train_lm.py"
    )
    options = parser.parse_args(arguments)
    for name in ("tokens", "train_steps"):
        if getattr(options, name) < 1:
            parser.error(
                f"--{name.replace('_', '-')} must be at least 1; got {getattr(options, name)}"
            )
    if not options.prompt or options.temperature < 0:
        parser.error("--prompt must not be empty, and --temperature not negative")
    return options


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    options = parse_arguments(arguments)
    import rich.box
    import rich.console
    import rich.table

    console = rich.console.Console(highlight=False)
    if options.checkpoint:
        config, params = load(options.checkpoint)
    else:
        console.print(
            f"Training a small model for {options.train_steps} steps; --checkpoint takes one that "
            "is trained already ..."
        )
        config, params = train(options.train_steps)
    text = train_lm.load_text(options.data)
    prompt = np.frombuffer(options.prompt.encode(), np.uint8)[None].astype(np.int32)
    table = rich.table.Table(box=rich.box.SIMPLE_HEAD)
    for column in ("", "loss held out, nats/byte", "weights, MB", "cache, MB", "bytes/s"):
        table.add_column(column, justify="right")
    for name, server in servers(config, params, text, options.mode).items():
        run = functools.partial(
            server.generate,
            prompt,
            options.tokens,
            options.temperature,
            jax.random.key(options.seed),
        )
        jax.block_until_ready(run())  # Compiles.
        start = time.perf_counter()
        out = np.asarray(run())
        seconds = time.perf_counter() - start
        console.rule(f"{name}{'' if name == 'unquantized' else ', ' + options.mode}")
        console.print(
            options.prompt + bytes(out[0].astype(np.uint8)).decode(errors="replace"), markup=False
        )
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(server.variables["params"]))
        cache = server.empty_cache(1, prompt.size + options.tokens)
        table.add_row(
            name,
            f"{server.loss(text, 4):.4f}",
            f"{size / 1e6:.2f}",
            f"{cache.nbytes / 1e6:.3f}",
            f"{options.tokens / seconds:.0f}",
        )
    console.print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
