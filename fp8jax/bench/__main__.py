"""`python -m fp8jax.bench NAME [OPTION ...]`."""

import argparse
import importlib
import pathlib

import jax

from fp8jax.bench.timing import keep_freed_memory


def main() -> None:
    """Runs the benchmark that the command line names."""
    here = pathlib.Path(__file__).parent
    names = sorted(
        path.stem
        for path in here.glob("*.py")
        if path.stem
        not in ("__init__", "__main__", "contenders", "jobs", "quick", "targets", "timing")
    )
    parser = argparse.ArgumentParser(prog="python -m fp8jax.bench", description=__doc__)
    parser.add_argument("name", choices=names)
    arguments, rest = parser.parse_known_args()
    kept = keep_freed_memory()
    module = importlib.import_module(f"fp8jax.bench.{arguments.name}")
    if rest and not hasattr(module, "options"):
        parser.error(f"{arguments.name} has no options; got {' '.join(rest)}")
    options = vars(module.options(rest)) if hasattr(module, "options") else {}
    print(
        f"jax {jax.__version__} on {jax.devices()[0].device_kind}; freed memory is "
        f"{'kept' if kept else 'given back, and got again in these times'}"
    )
    module.main(**options)


if __name__ == "__main__":
    main()
