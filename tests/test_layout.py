"""The modules stand in the order that data flows: each imports only those above it, and the leaves
are imported by none.
"""

import ast
import pathlib

import pytest

import fp8jax

ROOT = pathlib.Path(fp8jax.__file__).parent
ORDER = [
    "shims",
    "tables",
    "progress",
    "patterns",
    "state_dicts",
    "formats",
    "codec",
    "conversion",
    "granularity",
    "scaling",
    "boxes",
    "tensor",
    "select",
    "params",
    "kv_cache",
    "quality",
    "recipe",
    "recipes",
    "state",
    "observe",
    "ops",
    "checkpoint_policies",
    "transform",
    "optim",
    "linen_methods",
    "linen",
    "nnx",
    "checkpoint",
    "interop",
    "hlo",
    "monitor",
    "metrics",
    "plots",
    "report",
    "bench",
]
LEAVES = {
    "checkpoint_policies",
    "linen",
    "nnx",
    "checkpoint",
    "interop",
    "hlo",
    "metrics",
    "plots",
    "report",
    "bench",
}
# What stands at the end may read the other leaves.
LAST = ("report", "bench")
MODULES = sorted(
    path.relative_to(ROOT) for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py"
)


def room_of(path: pathlib.Path) -> str:
    return path.parts[0].removesuffix(".py")


def imported_rooms(path: pathlib.Path) -> set[str]:
    """The rooms of fp8jax that a module imports anywhere in it."""
    names = []
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names += [
                f"{node.module}.{alias.name}" if node.module == "fp8jax" else node.module
                for alias in node.names
            ]
    return {name.split(".")[1] for name in names if name.startswith("fp8jax.")} - {room_of(path)}


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_a_module_imports_only_those_above_it(path):
    room = room_of(path)
    above = set(ORDER[: ORDER.index(room)]) - (LEAVES if room not in LAST else set())
    assert imported_rooms(path) <= above


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_no_module_is_long_and_none_reaches_into_jax(path):
    text = (ROOT / path).read_text()
    assert len(text.splitlines()) <= 450
    assert "jax._src" not in text


def test_every_public_name_is_there():
    for name in fp8jax.__all__:
        assert getattr(fp8jax, name) is not None
    with pytest.raises(AttributeError, match="module 'fp8jax' has no attribute 'nothing'"):
        fp8jax.nothing
