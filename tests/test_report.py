"""The report: its rows against the library's own tables, and the page in a real browser."""

import html.parser
import json
import math
import re
import shutil
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fp8jax
from fp8jax._transform.sites import Site
from fp8jax.metrics import Errors, SiteError
from fp8jax.report import write_html
from fp8jax.report._rows import rows_of

DELAYED = fp8jax.recipes.delayed(flushed=True)
HOSTILE = """a/<script>alert("x")</script>/it's & "quoted" </td>"""


def site(name, flops=100, recipe=DELAYED):
    reason = "reads the weight" if recipe else "left out by rule <'lm_head'>"
    shapes = "float32[8,16]", "float32[16,4]", "float32[8,4]"
    return Site(name, "dot_general", *shapes, flops, recipe, reason, source="model.py:12")


@pytest.fixture(scope="module")
def trained():
    """A loss of two products, its scales and optimizer state after some real steps, and what the
    steps saw.
    """
    key = jax.random.key(0)
    x = jax.random.normal(key, (32, 64)).at[:, 0].set(1e-6)  # A column to be flushed.
    params = {"up": jnp.ones((64, 16)) * 0.1, "down": jnp.ones((16, 4)) * 0.1}

    def loss(params, x):
        return jnp.square(jnp.tanh(x @ params["up"]) @ params["down"] - 1).mean()

    fp8_loss = fp8jax.fp8(loss, DELAYED)
    scales, tx = fp8_loss.init(params, x), fp8jax.optim.delayed_scaling()
    state, seen = tx.init(scales), []

    @jax.jit
    def step(scales, state, x):
        amaxes = jax.grad(fp8_loss)(scales, params, x)
        updates, state = tx.update(amaxes, state, scales)
        return jax.tree.map(jnp.add, scales, updates), state, amaxes

    for factor in (1.0, 2.0, 100.0):
        after, state, amaxes = step(scales, state, factor * x)
        seen.append(jax.device_get((scales, amaxes)))
        scales = after
    return fp8_loss, params, x, scales, state, seen


class Tags(html.parser.HTMLParser):
    """All tags of a page with their attributes, and the text of its data."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.data, self._inside = [], "", None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._inside = dict(attrs).get("id")

    def handle_data(self, data):
        if self._inside == "data":
            self.data += data


def test_rows_say_what_metrics_and_monitor_say(trained):
    fp8_loss, params, x, scales, state, seen = trained
    errors = fp8jax.metrics.monitor(fp8_loss)(scales, params, x)
    compiled = jax.jit(jax.grad(fp8_loss)).lower(scales, params, x).compile()
    hlo = fp8jax.hlo.report(compiled)
    explanation = fp8_loss.explain(params, x)
    rows = {row.site.name: row for row in rows_of(explanation, state, scales, errors, hlo, seen)}
    assert set(rows) == {"up", "down"}
    saturated = fp8jax.metrics.saturated_shares(state, scales)
    flushed = fp8jax.metrics.flushed_shares(state, scales)
    assert max(saturated.values()) > 0 and max(flushed.values()) > 0
    for error in errors.sites:
        row = rows[error.name]
        assert row.worst_sqnr == min(error.forward, error.dlhs, error.drhs)
        assert row.engine == hlo.verdict(error.name)
        for column, shares in (("saturated", saturated), ("flushed", flushed)):
            of_site = [shares[f"{error.name}/{name}"] for name in ("lhs", "rhs", "grad")]
            assert getattr(row, column) == max(of_site)
        for operand in row.operands:
            amaxes = [float(getattr(amaxes[error.name], operand.name)) for _, amaxes in seen]
            limits = [
                float(2.0 ** getattr(before[error.name], operand.name)) * operand.max
                for before, _ in seen
            ]
            assert operand.layers[0].amaxes == tuple(amaxes)
            assert operand.layers[0].limits == tuple(limits)
    assert any(
        amax > limit
        for row in rows.values()
        for layer in row.operands[0].layers
        for amax, limit in zip(layer.amaxes, layer.limits)
    )


def test_without_steps_the_windows_are_drawn(trained):
    fp8_loss, params, x, scales, state, _ = trained
    windows = fp8jax.metrics.histories(state, scales)
    for row in rows_of(fp8_loss.explain(params, x), state, scales):
        for operand in row.operands:
            layer = operand.layers[0]
            np.testing.assert_array_equal(
                np.float32(layer.amaxes), windows[f"{row.site.name}/{operand.name}"]
            )
            exponent = float(getattr(scales[row.site.name], operand.name))
            assert set(layer.limits) == {2.0**exponent * operand.max}


def test_the_worst_come_first_and_what_is_not_in_fp8_last():
    names = "fine", "low", "nan", "faulty", "own"
    sites = [site(name, recipe=None if name == "own" else DELAYED) for name in names]
    ratios = {"fine": 27.0, "low": 15.0, "nan": math.nan, "faulty": 30.0}
    errors = Errors(tuple(SiteError(name, 30.0, r, None, r) for name, r in ratios.items()))
    scales = {name: fp8jax.SiteScales.zeros(name, DELAYED.delayed_casts) for name in names[:4]}
    tx = fp8jax.optim.delayed_scaling()
    observations = scales | {"faulty": scales["faulty"].replace(lhs=jnp.float32(jnp.inf))}
    _, state = jax.jit(tx.update)(observations, tx.init(scales), scales)
    rows = rows_of(fp8jax.Explanation(tuple(sites)), state, scales, errors)
    assert [(row.site.name, row.status) for row in rows] == [
        ("nan", "bad"),
        ("faulty", "bad"),
        ("low", "look"),
        ("fine", "good"),
        ("own", "plain"),
    ]
    assert rows[1].notes == ("lhs: 1 not finite",) and rows[2].notes == ("only 15.0 dB",)


def test_rows_that_energy_hides_are_told_of(tmp_path):
    """A product that is exact as a whole, and not in its worst row."""
    errors = Errors((SiteError("mlp", 30.0, 28.0, 27.0, 27.0, 25.0, None, 1.04),))
    explanation = fp8jax.Explanation((site("mlp"),))
    (row,) = rows_of(explanation, monitor=errors)
    assert (row.status, row.notes) == ("look", ("rows lost beside larger ones",))
    page = Tags(write_html(tmp_path / "a.html", explanation, monitor=errors).read_text("utf-8"))
    products = json.loads(page.data)["sites"][0]["products"]
    assert [product["slice"] for product in products] == ["25.0 dB", None, "1.0 dB"]


def test_many_layers_and_steps_keep_the_worst_of_each():
    node = fp8jax.SiteScales.zeros("mlp", DELAYED.delayed_casts, (100,))
    steps = [
        (
            {"mlp": node},
            {"mlp": node.replace(lhs=np.full(100, 1000.0 if at == 777 else 1.0, np.float32))},
        )
        for at in range(1000)
    ]
    (row,) = rows_of(fp8jax.Explanation((site("mlp"),)), steps=steps)
    lhs = row.operands[0]
    assert (len(lhs.layers), lhs.left_out) == (64, 36)
    assert len(lhs.layers[0].amaxes) == 240
    assert lhs.layers[0].steps[lhs.layers[0].amaxes.index(1000.0)] == 778
    assert set(row.operands[2].layers[0].amaxes) == {None}  # Nothing was observed of the gradient.


def test_no_name_can_break_the_page_and_nothing_is_loaded(tmp_path):
    sites = (site(HOSTILE), site("own", recipe=None))
    file = write_html(tmp_path / "new" / "a.html", fp8jax.Explanation(sites), title="<b>&'\"")
    text = file.read_text(encoding="utf-8")
    page = Tags(text)
    names = [tag for tag, _ in page.tags]
    assert names.count("script") == 2 and names.count("b") == 2  # Those in the filters' counts.
    assert json.loads(page.data)["sites"][0]["name"] == HOSTILE
    (row,) = [attrs for tag, attrs in page.tags if attrs.get("data-status") == "good"]
    assert HOSTILE.lower() in row["data-words"]
    links = [attrs.get("src") or attrs.get("href") for _, attrs in page.tags]
    assert set(filter(None, links)) == {"data:,"}
    assert not re.search(r"https?:(?!//www\.w3\.org/2000/svg)", text)
    assert [path.name for path in file.parent.iterdir()] == ["a.html"]


def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    explanation = fp8jax.Explanation((site("mlp"),))
    file = write_html(tmp_path / "a.html", explanation)
    before = file.read_bytes()

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_html(file, explanation, title="another")
    assert file.read_bytes() == before and list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        (("text",), TypeError, "explanation must be an fp8jax.Explanation; got str"),
        (
            (fp8jax.Explanation(()), {"monitor": {}}),
            TypeError,
            "monitor must be the Errors of a batch; got dict",
        ),
        (
            (fp8jax.Explanation(()), {"hlo": "HloModule"}),
            TypeError,
            "hlo must be an fp8jax.hlo.Report; got str",
        ),
        (
            (fp8jax.Explanation(()), {"state": ()}),
            ValueError,
            "scales must hold the SiteScales that state is the state of; got None",
        ),
    ],
)
def test_errors_name_the_argument(tmp_path, arguments, error, message):
    explanation, *named = arguments
    with pytest.raises(error, match=re.escape(message)):
        write_html(tmp_path / "a.html", explanation, **(named[0] if named else {}))
    assert not list(tmp_path.iterdir())


# --------------------------------------------------------------------------------------------------
# in a browser


@pytest.fixture(scope="module")
def browser():
    """Headless Chromium; these tests are skipped where it, its driver or selenium is not there."""
    selenium = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    paths = [
        next(filter(None, map(shutil.which, names)), None)
        for names in (("chromium", "chromium-browser", "google-chrome"), ("chromedriver",))
    ]
    if None in paths:
        pytest.skip("no Chromium with its driver here: apt-get install chromium chromium-driver")
    options = selenium.ChromeOptions()
    options.binary_location = paths[0]
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = selenium.Chrome(options=options, service=selenium.ChromeService(paths[1]))
    yield driver
    driver.quit()


def screen(browser, width, height=900, scheme="light"):
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600},
    )
    feature = {"name": "prefers-color-scheme", "value": scheme}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})


def all_of(browser, selector):
    return browser.find_elements("css selector", selector)


def shown(browser):
    """The names of the rows that are shown, in their order."""
    return browser.execute_script(
        "return [...document.querySelectorAll('tr.site')].filter(row => row.checkVisibility())"
        ".map(row => row.cells[0].dataset.sort)"
    )


@pytest.fixture(scope="module")
def large_page(tmp_path_factory):
    """500 sites with all there is to say of them; a hostile name among them."""
    rng = np.random.default_rng(0)
    names = [f"layers_{index // 5}/{'qkvud'[index % 5]}" for index in range(499)] + [HOSTILE]
    sites = [
        site(name, flops=index + 1, recipe=DELAYED if index % 10 else None)
        for index, name in enumerate(names)
    ]
    selected = [one.name for one in sites if one.selected]
    errors = [SiteError(name, *map(float, rng.normal(30, 2, 3)), lowest=20.0) for name in selected]
    nodes = {name: fp8jax.SiteScales.zeros(name, DELAYED.delayed_casts) for name in selected}
    steps = [
        (
            nodes,
            {
                name: node.replace(lhs=np.float32(300 + 50 * at), grad=np.float32(1e-3 * (at + 1)))
                for name, node in nodes.items()
            },
        )
        for at in range(20)
    ]
    path = tmp_path_factory.mktemp("page") / "report.html"
    explanation = fp8jax.Explanation(tuple(sites))
    return write_html(path, explanation, monitor=Errors(tuple(errors)), steps=steps), errors


@pytest.fixture
def opened(browser, large_page):
    """The page at a desktop's size, and whether the browser complained about anything."""
    screen(browser, 1280)
    browser.get_log("browser")
    browser.get(large_page[0].as_uri())
    yield browser
    assert browser.get_log("browser") == []


@pytest.mark.slow
def test_the_worst_site_is_on_top_and_headings_sort(opened, large_page):
    worst = min(large_page[1], key=lambda one: min(one.forward, one.dlhs, one.drhs)).name
    assert shown(opened)[0] == worst and len(shown(opened)) == 500
    heading = {cell.get_attribute("data-key"): cell for cell in all_of(opened, "#sites > thead th")}
    heading["flops"].click()
    assert heading["flops"].get_attribute("aria-sort") == "descending"
    assert shown(opened)[:2] == [HOSTILE, "layers_99/u"]
    heading["sqnr"].find_element("css selector", "button").send_keys("\n")  # by the keyboard
    assert heading["flops"].get_attribute("aria-sort") == "none"
    assert heading["sqnr"].get_attribute("aria-sort") == "ascending" and shown(opened)[0] == worst
    heading["sqnr"].find_element("css selector", "button").send_keys(" ")
    order = shown(opened)
    assert heading["sqnr"].get_attribute("aria-sort") == "descending" and order[449] == worst
    assert all(name.endswith(("q", "d")) for name in order[450:])  # Unknown: last, either way.
    heading["site"].click()
    assert shown(opened)[1:4] == ["layers_0/d", "layers_0/k", "layers_0/q"]
    assert shown(opened).index("layers_9/v") < shown(opened).index("layers_10/d")


@pytest.mark.slow
def test_search_and_filters(opened):
    search = opened.find_element("id", "search")
    opened.find_element("css selector", "body").send_keys("/")
    assert opened.switch_to.active_element == search
    search.send_keys("LAYERS_12/ delayed")
    assert set(shown(opened)) == {f"layers_12/{name}" for name in "kvud"}
    assert opened.find_element("id", "shown").text == "4 of 500 sites"
    search.clear()
    search.send_keys("<script>")
    assert shown(opened) == [HOSTILE]
    search.clear()
    search.send_keys("no such site")
    assert shown(opened) == [] and opened.find_element("id", "none").is_displayed()
    search.clear()
    search.send_keys(" ")
    opened.find_element("css selector", ".filter.good").click()
    assert len(shown(opened)) == 50
    opened.find_element("css selector", ".filter.plain").click()
    assert shown(opened) == []


@pytest.mark.slow
def test_a_site_opens_with_its_histories(opened):
    opened.find_element("id", "search").send_keys("it's")
    button = opened.find_element("css selector", "tr.site:not([hidden]) .open")
    assert HOSTILE in button.text
    button.send_keys("\n")
    assert button.get_attribute("aria-expanded") == "true"
    detail = opened.find_element("id", button.get_attribute("aria-controls"))
    assert "reads the weight" in detail.text and "model.py:12" in detail.text
    plots = detail.find_elements("css selector", "svg.plot")
    assert len(plots) == 2  # Nothing was observed of rhs.
    assert "17 beyond the scale's range" in plots[0].get_attribute("aria-label")
    assert len(plots[0].find_elements("css selector", ".over")) == 17  # 450 to 1250 beyond 448
    assert "HOSTILE" not in opened.page_source
    button.send_keys("\n")
    assert not detail.is_displayed()


@pytest.mark.slow
def test_500_sites_do_not_stall(opened, large_page):
    start = time.perf_counter()
    opened.get(large_page[0].as_uri())
    assert time.perf_counter() - start < 10
    spent = opened.execute_script(
        """const spent = {}, search = document.getElementById("search");
        const timed = (name, action) => {
          const start = performance.now();
          action();
          document.body.offsetHeight;  // laid out anew
          spent[name] = performance.now() - start;
        };
        const type = text => { search.value = text; search.dispatchEvent(new Event("input")); };
        timed("sort", () => document.querySelector("[data-key=site] button").click());
        timed("filter", () => type("layers_1"));
        timed("unfilter", () => type(""));
        timed("open", () => document.querySelector(".open").click());
        return spent;"""
    )
    assert set(spent) == {"sort", "filter", "unfilter", "open"}
    assert max(spent.values()) < 1000, spent


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_every_size_and_scheme_is_readable(opened, width, scheme):
    screen(opened, width, scheme=scheme)
    opened.find_element("css selector", ".open").click()
    assert opened.execute_script("return document.documentElement.scrollWidth") <= width
    assert opened.find_element("id", "sort").is_displayed() == (width == 390)
    for selector in ("h1", ".c-site .open", "td small", ".tile dt", "figcaption span"):
        text, ground = (rgb(opened, selector, name) for name in ("color", "background-color"))
        assert contrast(text, ground) >= 4.5, selector
    luminance = relative_luminance(rgb(opened, "body", "background-color"))
    assert luminance > 0.8 if scheme == "light" else luminance < 0.05
    if width == 390:
        option = opened.find_element("css selector", "#sort option[value=flops]")
        option.click()
        assert shown(opened)[0] == HOSTILE


def rgb(browser, selector, name):
    """A computed colour; of a background, that of the nearest element behind it that has one."""
    text = browser.execute_script(
        """let node = document.querySelector(arguments[0]);
        const see = () => getComputedStyle(node).getPropertyValue(arguments[1]);
        while (node.parentElement && see() === "rgba(0, 0, 0, 0)") node = node.parentElement;
        return see();""",
        selector,
        name,
    )
    return [int(part) for part in re.findall(r"\d+", text)[:3]]


def relative_luminance(color):
    """That of the WCAG, of sRGB in 0 to 255."""
    parts = [part / 255 for part in color]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return sum(weight * p for weight, p in zip((0.2126, 0.7152, 0.0722), linear))


def contrast(one, other):
    low, high = sorted(map(relative_luminance, (one, other)))
    return (high + 0.05) / (low + 0.05)
