"""Mutated files of every dialect: read or refused, at once, in little memory, nothing half done."""

import jax
import numpy as np
import pytest
from foreign_checkpoints import FOREIGN, SMALL, like
from test_interop_hostile import mutate_files

from fp8jax.interop import CheckpointError, convert_checkpoint, llama_names, read_checkpoint

LIKE = like(SMALL)
NAMES = llama_names()
SHAPES = [leaf.shape for leaf in jax.tree.leaves(LIKE)]
pytestmark = pytest.mark.filterwarnings("ignore:blocks must divide weights")


@pytest.fixture(scope="module")
def intact(tmp_path_factory):
    root = tmp_path_factory.mktemp("intact")
    files = {}
    for name, foreign in FOREIGN.items():
        foreign.write(root / name, SMALL)
        files[name] = {path.name: path.read_bytes() for path in (root / name).iterdir()}
    return files


def read(folder):
    """Reads a folder; CheckpointError is the one error."""
    loaded = read_checkpoint(folder, LIKE, NAMES)
    is_codes = [
        hasattr(leaf, "dequantize")
        for leaf in jax.tree.leaves(loaded.params, is_leaf=lambda leaf: hasattr(leaf, "dequantize"))
    ]
    assert len(is_codes) == len(SHAPES) and all(
        np.isfinite(scale).all() for scale in loaded.input_scales.values()
    )
    assert str(loaded)


def convert(folder):
    """Brings a folder to another dialect, or leaves nothing."""
    target = folder.parent / "converted"
    try:
        convert_checkpoint(folder, target, method="compressed-tensors", progress=False)
        for path in target.iterdir():
            path.unlink()
        target.rmdir()
    except CheckpointError:
        assert not target.exists()
        raise


def memory():
    """High-water mark of this process, in bytes."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))


@pytest.mark.parametrize("act", [read, convert], ids=["read", "convert"])
def test_mutated_files_of_each_dialect_are_read_or_refused(tmp_path, intact, act):
    assert 100 < mutate_files(tmp_path, intact, 600, 0, act) < 600


@pytest.mark.slow
@pytest.mark.parametrize(
    "act, count", [(read, 100_000), (convert, 20_000)], ids=["read", "convert"]
)
def test_100_000_mutated_files_of_all_dialects_are_read_or_refused(tmp_path, intact, act, count):
    mutate_files(tmp_path, intact, 200, 1, act)
    before = memory()
    assert count // 5 < mutate_files(tmp_path, intact, count, 2, act) < count
    assert memory() - before < 100e6
