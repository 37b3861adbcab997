"""The modules stand in the order that data flows: each imports only those above it, and the leaves
are imported by none.
"""

import ast
import importlib
import pathlib
import re

import pytest

import fp8jax
from fp8jax import devices

ROOT = pathlib.Path(fp8jax.__file__).parent
ORDER = [
    "_shims",
    "_xla",
    "_tables",
    "_progress",
    "_patterns",
    "_state_dicts",
    "_formats",
    "devices",
    "_codec",
    "_conversion",
    "_granularity",
    "_scaling",
    "_fitting",
    "_boxes",
    "_tensor",
    "_select",
    "_params",
    "kv_cache",
    "quality",
    "_recipe",
    "recipes",
    "_site_scales",
    "_site_exponents",
    "_bank",
    "_state",
    "_observe",
    "ops",
    "checkpoint_policies",
    "_transform",
    "optim",
    "_linen_methods",
    "linen",
    "nnx",
    "_placement",
    "checkpoint",
    "interop",
    "hlo",
    "_monitor",
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


@pytest.mark.parametrize("name", ["linen.py", "_linen_methods.py", "nnx.py"])
def test_the_wrappers_use_no_private_names_of_flax(name):
    own, used = set(), set()
    for path in ("linen.py", "_linen_methods.py", "nnx.py"):
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


def is_private(path: pathlib.Path) -> bool:
    return any(part.startswith("_") and part != "__init__.py" for part in path.parts)


def test_what_is_no_part_of_the_api_says_so():
    """Public are those modules alone that `fp8jax` names, and what benchmarks are called by."""
    assert not any(name.startswith("_") for name in fp8jax.__all__)
    public = {path.parts[0].removesuffix(".py") for path in MODULES if not is_private(path)}
    assert public <= {*fp8jax.__all__, "bench"}
    deep = {path for path in MODULES if len(path.parts) > 1 and path.parts[0] != "bench"}
    assert all(is_private(path) or path.name == "__init__.py" for path in deep)


def test_no_module_is_hidden_by_what_it_defines():
    for path in MODULES:
        if path.name == "__init__.py" and not is_private(path):
            package = importlib.import_module(f"fp8jax.{path.parent.as_posix().replace('/', '.')}")
            for name in getattr(package, "__all__", ()):
                assert not (ROOT / path.parent / f"{name}.py").exists(), f"{path.parent}/{name}.py"


def test_what_users_read_names_no_private_module():
    project = ROOT.parent
    pages = {project / "README.md", *(project / "docs").rglob("*.md")}
    texts = pages - {project / "docs/design.md"} | set((project / "examples").glob("*.*"))
    for path in texts:
        if path.suffix in (".md", ".py"):
            assert not re.search(r"fp8jax(\.\w+)*\._[a-z]", path.read_text()), path


def test_every_public_name_is_there():
    for name in fp8jax.__all__:
        assert getattr(fp8jax, name) is not None
    with pytest.raises(AttributeError, match="module 'fp8jax' has no attribute 'nothing'"):
        fp8jax.nothing
