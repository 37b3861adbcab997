"""Train one model on several processes of this machine, as on the hosts of a cluster; kill them,
and go on where they were.

    python examples/train_processes.py --processes 2 --devices 8
    python examples/train_processes.py --processes 4 --checkpoint runs/b

Interrupt or kill the second, run it again, and it goes on.

Each process holds an equal share of the devices, of the batch, and of the parameters, which are
divided over all devices (FSDP). Nothing in the training knows of it but `shardings` and `batch_at`:
FP8 state needs no care of its own. A small model of text: the bytes before, embedded, through an
MLP, to the next byte.
"""

import argparse
import functools
import json
import os
import pathlib
import socket
import subprocess
import sys
import time

LENGTH, EMBEDDED, HIDDEN, LAYERS, BATCH = (
    16,
    16,
    256,
    2,
    64,
)  # bytes read, widths, layers, samples in a step


def parse_arguments(arguments=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--processes", type=int, default=2, metavar="N", help="(default: 2)")
    parser.add_argument(
        "--devices", type=int, default=8, metavar="N", help="of all processes together (default: 8)"
    )
    parser.add_argument("--steps", type=int, default=200, metavar="N", help="(default: 200)")
    parser.add_argument("--checkpoint", metavar="DIR", help="folder to save to, and to go on from")
    parser.add_argument(
        "--checkpoint-every", type=int, default=20, metavar="N", help="steps (default: 20)"
    )
    parser.add_argument("--out", metavar="FILE", help="JSON to write losses and exponents to")
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--coordinator", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.processes < 1 or options.devices % options.processes or BATCH % options.devices:
        parser.error(
            f"--devices must be a multiple of --processes and divide {BATCH}, the batch; got "
            f"{options.devices} devices and "
            f"{options.processes} processes."
        )
    return options


# --------------------------------------------------------------------------------------------------
# the launcher


def launch(options: argparse.Namespace) -> int:
    """Starts the processes, and waits for them; where one fails, ends the others."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        coordinator = f"localhost:{probe.getsockname()[1]}"
    own = options.devices // options.processes
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={own}",
    }
    workers = [
        subprocess.Popen(
            [
                sys.executable,
                __file__,
                *sys.argv[1:],
                f"--worker={index}",
                f"--coordinator={coordinator}",
            ],
            env=environment,
        )
        for index in range(options.processes)
    ]
    try:
        while any(worker.poll() is None for worker in workers):
            if any(worker.poll() for worker in workers):
                break
            time.sleep(0.05)
        return next((1 for worker in workers if worker.poll()), 0)
    finally:
        for worker in workers:
            worker.kill()
        for worker in workers:
            worker.wait()


# --------------------------------------------------------------------------------------------------
# the training


def loss(params, before, following):
    """Cross-entropy of the bytes that follow."""
    import jax
    import jax.numpy as jnp
    import optax

    def layer(x, w):
        with jax.named_scope("up"):
            h = jnp.tanh(x @ w["up"])
        with jax.named_scope("down"):
            return x + h @ w["down"], None

    x = params["embed"][before].reshape(before.shape[0], LENGTH * EMBEDDED)
    x, _ = jax.lax.scan(layer, x, params["layers"])
    with jax.named_scope("head"):
        logits = x @ params["head"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, following).mean()


def first_params(key):
    import jax

    width = LENGTH * EMBEDDED
    keys = jax.random.split(key, 4)
    normal = jax.random.normal
    return {
        "embed": normal(keys[0], (256, EMBEDDED)),
        "layers": {
            "up": normal(keys[1], (LAYERS, width, HIDDEN)) * width**-0.5,
            "down": normal(keys[2], (LAYERS, HIDDEN, width)) * HIDDEN**-0.5,
        },
        "head": normal(keys[3], (width, 256)) * width**-0.5,
    }


def shardings(mesh, tree):
    """FSDP: each matrix is divided over the devices by its last axis but one; scales, and what else
    is small, is everywhere.
    """
    import jax
    from jax.sharding import NamedSharding, PartitionSpec

    def of(path, leaf):
        is_matrix = leaf.ndim > 1 and any(getattr(key, "key", None) == "params" for key in path)
        return NamedSharding(
            mesh,
            PartitionSpec(*(None,) * (leaf.ndim - 2), "data") if is_matrix else PartitionSpec(),
        )

    return jax.tree_util.tree_map_with_path(of, tree)


def batch_at(step: int, text, sharding):
    """The samples of a step, a function of the step alone; each process makes the rows of its own
    devices.
    """
    import jax
    import numpy as np

    starts = np.random.default_rng(step).integers(0, len(text) - LENGTH, BATCH)
    windows = text[starts[:, None] + np.arange(LENGTH + 1)].astype(np.int32)

    def place(rows):
        return jax.make_array_from_callback(rows.shape, sharding, lambda index: rows[index])

    return place(windows[:, :-1]), place(windows[:, -1])


def exponents_in(scales) -> dict[str, list]:
    """The exponents of the three operands' scales, by site."""
    import numpy as np

    return {
        name: [np.asarray(exponent).tolist() for exponent in (node.lhs, node.rhs, node.grad)]
        for name, node in scales.items()
    }


def train(options: argparse.Namespace, devices) -> dict:
    """Trains over `devices`, those of other processes among them; returns losses and exponents by
    step.
    """
    import jax
    import numpy as np
    import optax
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    import fp8jax

    text = np.frombuffer(pathlib.Path(argparse.__file__).read_bytes(), np.uint8)
    mesh = Mesh(np.array(devices), ("data",))
    rows = NamedSharding(mesh, PartitionSpec("data"))
    fp8_loss = fp8jax.fp8(loss, fp8jax.recipes.delayed())
    tx = fp8jax.with_delayed_scaling(optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3)))

    def start(before, following):
        params = first_params(jax.random.key(0))
        trained = {"params": params, "scales": fp8_loss.init(params, before, following)}
        return trained, tx.init(trained)

    first = batch_at(0, text, rows)
    placed = shardings(mesh, jax.eval_shape(start, *first))
    state = jax.jit(start, out_shardings=placed)(*first)

    @functools.partial(jax.jit, donate_argnums=0, out_shardings=(placed, None))
    def step(state, before, following):
        trained, optimizer = state
        value, gradients = jax.value_and_grad(
            lambda t: fp8_loss(t["scales"], t["params"], before, following)
        )(trained)
        updates, optimizer = tx.update(gradients, optimizer, trained)
        return (optax.apply_updates(trained, updates), optimizer), value

    manager, begin, losses, exponents = None, 0, {}, {}
    if options.checkpoint:
        import orbax.checkpoint as ocp

        manager = ocp.CheckpointManager(
            pathlib.Path(options.checkpoint).absolute(),
            options=ocp.CheckpointManagerOptions(max_to_keep=2),
        )
        if manager.latest_step() is not None:
            begin = manager.latest_step()
            state = fp8jax.checkpoint.restore(manager, state)
    for index in range(begin, options.steps):
        state, value = step(state, *batch_at(index, text, rows))
        losses[index], exponents[index] = float(value), exponents_in(state[0]["scales"])
        if jax.process_index() == 0 and (index + 1) % max(1, options.steps // 10) == 0:
            print(f"step {index + 1} of {options.steps}   loss {losses[index]:.3f}", flush=True)
        if manager and (index + 1) % options.checkpoint_every == 0:
            fp8jax.checkpoint.save(manager, index + 1, state)
    if manager:
        manager.close()
    return {"losses": losses, "exponents": exponents}


def work(options: argparse.Namespace) -> int:
    """One of the processes."""
    import jax

    jax.distributed.initialize(options.coordinator, options.processes, options.worker)
    result = train(options, jax.devices())
    if options.out and jax.process_index() == 0:
        pathlib.Path(options.out).write_text(json.dumps(result))
    jax.distributed.shutdown()
    return 0


if __name__ == "__main__":
    given = parse_arguments()
    sys.exit(launch(given) if given.worker is None else work(given))
