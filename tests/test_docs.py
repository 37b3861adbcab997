"""The documentation: its code runs page by page as it stands, its links lead somewhere, and every
public name is in it.
"""

import importlib
import pathlib
import pkgutil
import re
import shutil
import subprocess
import sys
import zlib

import jax
import pytest

import fp8jax

ROOT = pathlib.Path(__file__).parents[1]
DOCS = ROOT / "docs"
# What `moving.md` includes has a test of its own: its code needs what the reader has.
PAGES = sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md"))
WITH_CODE = [page for page in PAGES if "```python" in (DOCS / page).read_text()]


def program_of(page):
    """All Python of a page as one program, each line where it is in the page."""
    lines, inside = [], False
    for line in (DOCS / page).read_text().splitlines():
        fence = line.startswith("```")
        lines.append(line if inside and not fence else "")
        inside = line.startswith("```python") if fence else inside
    return compile("\n".join(lines), DOCS / page, "exec")


@pytest.mark.slow
@jax.numpy_dtype_promotion("standard")  # as readers have both; optax's Adam needs it
@jax.numpy_rank_promotion("allow")
@pytest.mark.parametrize("page", WITH_CODE)
def test_the_code_of_a_page_is_one_program_that_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(program_of(page), {"__name__": page})


def test_most_pages_have_code():
    assert {"tutorial.md", "numerics.md"} <= set(WITH_CODE) and len(WITH_CODE) >= 8


def test_the_glossary_has_the_words_of_the_field():
    words = re.findall(r"^\*\*(.+)\*\*$", (DOCS / "glossary.md").read_text(), re.MULTILINE)
    assert {
        "amax",
        "scale",
        "site",
        "recipe",
        "delayed scaling",
        "granularity",
        "codes",
        "saturate",
        "flush",
        "straight-through",
    } <= set(words)


def test_the_ways_of_a_scale_and_of_a_weight_are_short_and_lead_through_what_is_there():
    ways = (DOCS / "design.md").read_text().split("| | The way of one ")[1:]
    steps = [re.findall(r"^\| (\d) \| .* \| `(fp8jax\.[\w.]+)` \|$", way, re.M) for way in ways]
    assert [[int(number) for number, _ in way] for way in steps] == [[1, 2, 3, 4, 5, 6]] * 2
    for _, name in (step for way in steps for step in way):
        assert callable(pkgutil.resolve_name(name)), name


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The built documentation; these tests are skipped where `fp8jax[docs]` is not installed."""
    pytest.importorskip("mkdocs", reason='needs pip install "fp8jax[docs]"')
    pytest.importorskip("mkdocstrings", reason='needs pip install "fp8jax[docs]"')
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-d", folder]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    yield folder
    shutil.rmtree(folder)


def public_names():
    """Those of fp8jax and of its public modules."""
    for name in fp8jax.__all__:
        path = f"fp8jax.{name}"
        try:
            module = importlib.import_module(path)
        except ModuleNotFoundError:
            yield path
        else:
            yield from (f"{path}.{inner}" for inner in names_of(module))


def names_of(module):
    """What a module exports: `__all__`, or else its own functions and classes without an
    underscore.
    """
    own = (
        name
        for name, value in vars(module).items()
        if getattr(value, "__module__", None) == module.__name__ and callable(value)
    )
    return getattr(module, "__all__", [name for name in own if not name.startswith("_")])


def test_every_public_name_is_in_the_reference(site):
    data = (site / "objects.inv").read_bytes()
    body = zlib.decompress(data.split(b"\n", 4)[4]).decode()
    documented = {line.split(" ")[0] for line in body.splitlines()}
    names = set(public_names())
    assert len(names) > 80 and names - documented == set()


def test_no_internal_link_is_dead(site):
    """Strict mode looks at Markdown links; this looks at what came of all of them."""
    pages = {path: path.read_text(encoding="utf-8") for path in site.rglob("*.html")}
    anchors = {path: set(re.findall(r'\bid="([^"]+)"', text)) for path, text in pages.items()}
    dead = []
    for path, text in pages.items():
        if path.name == "404.html":  # Its links are those of a server's root.
            continue
        for link in re.findall(r'<a\b[^>]*\bhref="([^"]*)"', text):
            if re.match(r"[a-z]+:", link):
                continue
            place, _, anchor = link.partition("#")
            target = (path.parent / place).resolve() if place else path
            target = target / "index.html" if target.is_dir() else target
            if not target.exists() or (anchor and anchor not in anchors.get(target, {anchor})):
                dead.append((path.relative_to(site).as_posix(), link))
    assert dead == []
