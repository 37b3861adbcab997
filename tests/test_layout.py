"""The modules stand in the order that data flows: each imports only those above it, and the leaves
are imported by none.
"""

import ast
import pathlib

import pytest

import fp8jax
from fp8jax import devices

ROOT = pathlib.Path(fp8jax.__file__).parent
ORDER = [
    "shims",
    "_xla",
    "tables",
    "progress",
    "patterns",
    "state_dicts",
    "formats",
    "devices",
    "codec",
    "conversion",
    "granularity",
    "scaling",
    "fitting",
    "boxes",
    "tensor",
    "select",
    "params",
    "kv_cache",
    "quality",
    "recipe",
    "recipes",
    "site_scales",
    "bank",
    "state",
    "observe",
    "ops",
    "checkpoint_policies",
    "transform",
    "optim",
    "linen_methods",
    "linen",
    "nnx",
    "placement",
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


# Of generations of devices, by which kernels say what they are for.
NAMES = {figures.name for figures in devices.FIGURES}


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


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_a_module_keeps_no_state(path):
    """No empty container at module level, to be filled later, and no `global`."""
    tree = ast.parse((ROOT / path).read_text())
    assert not any(isinstance(node, ast.Global) for node in ast.walk(tree))
    for node in tree.body:
        value = getattr(node, "value", None)
        name = ast.unparse(value.func).rpartition(".")[2] if isinstance(value, ast.Call) else ""
        empty = isinstance(value, (ast.Dict, ast.List)) and not ast.unparse(value).strip("{}[]")
        assert not empty and "Dictionary" not in name, ast.unparse(node)
        assert name not in ("dict", "list", "set", "defaultdict", "OrderedDict", "Counter", "deque")


@pytest.mark.parametrize("name", ["linen.py", "linen_methods.py", "nnx.py"])
def test_the_wrappers_use_no_private_names_of_flax(name):
    own, used = set(), set()
    for path in ("linen.py", "linen_methods.py", "nnx.py"):
        for node in ast.walk(ast.parse((ROOT / path).read_text())):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                own.add(node.name)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                own.add(node.attr)
    for node in ast.walk(ast.parse((ROOT / name).read_text())):
        if isinstance(node, ast.Attribute):
            used.add(node.attr)
        elif isinstance(node, ast.Constant) and str(node.value).isidentifier():
            used.add(str(node.value))
        elif isinstance(node, ast.ImportFrom):
            used.update(alias.name for alias in node.names)
    private = {one for one in used if one.startswith("_") and not one.startswith("__")}
    assert private - own <= {"_", "_fp8jax_path"}


def test_no_line_is_over_100_columns():
    project = ROOT.parent
    sources = [
        path
        for part in ("fp8jax", "tests", "docs", "examples")
        for path in (project / part).rglob("*.py")
    ]
    long = [
        f"{path.relative_to(project)}:{number}"
        for path in sources
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if len(line) > 100
    ]
    assert sources and not long


def test_kinds_of_devices_are_known_in_one_place():
    """What `jax.Device.device_kind` begins with stands in `devices`, and in no other code."""
    kinds = {kind for figures in devices.FIGURES for kind in figures.kinds} - {"cpu"}
    for path in set(MODULES) - {pathlib.Path("devices.py")}:
        if path.parts[0] not in ("bench", "hlo"):  # which compile for devices that they name
            for node in ast.walk(ast.parse((ROOT / path).read_text())):
                text = node.value if isinstance(node, ast.Constant) else ""
                text = text if isinstance(text, str) and "\n" not in text else ""
                known = text.startswith(tuple(kinds)) and text not in NAMES
                assert not known, f"{path}: {text}"


def test_every_public_name_is_there():
    for name in fp8jax.__all__:
        assert getattr(fp8jax, name) is not None
    with pytest.raises(AttributeError, match="module 'fp8jax' has no attribute 'nothing'"):
        fp8jax.nothing
