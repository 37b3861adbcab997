"""`delayed_scaling` against plain Python loops over operands, exactly; and what it refuses."""

import fractions
import math
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiers import thorough_but

import fp8jax
from fp8jax import E4M3, E5M2, CastSpec, DelayedScaling, SiteScales, recipes
from fp8jax._observe import largest_amax, seal_of
from fp8jax.optim import ScalingState, delayed_scaling
from fp8jax.optim._rows import join, split

OPERANDS = ("lhs", "rhs", "grad")
MAX = {E4M3: 448, E5M2: 57344}
CASTS = recipes.delayed().delayed_casts


def observation(site: str, casts, amaxes) -> SiteScales:
    """An intact observation from amaxes of the shape `stack + (3,)`."""
    amaxes = jnp.asarray(amaxes, jnp.float32)
    return SiteScales(
        *(None if cast is None else amaxes[..., i] for i, cast in enumerate(casts)),
        seal_of(amaxes),
        None,
        site,
        casts,
        jnp.ones_like(amaxes[..., 0]),
    )


class Row:
    """One operand, as the docstring of `delayed_scaling` says it, on Python's numbers."""

    def __init__(self, fmt, delayed: DelayedScaling):
        self.max, self.delayed, self.exponent, self.amaxes = MAX[fmt], delayed, 0, []
        self.saturated = self.nonfinite = 0

    def update(self, a: float):
        if not math.isfinite(a):
            self.nonfinite += 1
            return
        if a == 0:
            return
        self.saturated += a > self.max * 2.0**self.exponent
        self.amaxes.append(a)
        window = sorted(self.amaxes[-self.delayed.history_window :])
        ratio, reduce, latest = self.delayed.outlier_ratio, self.delayed.reduce, a
        if ratio and (len(self.amaxes) == 1 or len(window) > 1):
            second = self.max * 2.0**self.exponent if len(self.amaxes) == 1 else window[-2]
            if a > ratio * second:
                latest = window[-1] = math.sqrt(ratio) * second
            elif window[-1] > ratio * second and len(window) > 1:
                window.pop()
        if reduce == "max":
            reduced = window[-1]
        elif reduce == "most_recent":
            reduced = latest
        else:
            reduced = window[math.ceil(fractions.Fraction(str(reduce)) * len(window) / 100) - 1]
        threshold = float(np.float32(self.delayed.update_threshold * self.max)) * 2.0**self.exponent
        if len(self.amaxes) % self.delayed.interval == 0 or a > threshold:
            needed = float(np.float32(reduced) * np.float32(self.delayed.margin))
            self.exponent = -126
            while self.exponent < 126 and needed > self.max * 2.0**self.exponent:
                self.exponent += 1

    @property
    def ring(self) -> list[float]:
        window = self.delayed.history_window
        slots = [0.0] * window
        for i, a in enumerate(self.amaxes):
            slots[i % window] = a
        return slots


def batches(steps: int, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """Amaxes that drift over 12 binades, jump now and then, sit on ties with the range, or are
    absent.
    """
    rng = np.random.default_rng(seed)
    drift = np.cumsum(rng.normal(size=(steps, *shape)), axis=0)
    amaxes = np.exp2(drift + 20 * (rng.random((steps, *shape)) < 0.04)).astype(np.float32)
    exact = rng.random((steps, *shape))
    amaxes = np.where(
        exact < 0.1, np.float32(448) * np.exp2(np.round(drift)).astype(np.float32), amaxes
    )
    return np.where(exact > 0.95, np.float32(0), amaxes)


@jax.jit
def step(scales, state, seen):
    updates, state = delayed_scaling().update(seen, state, scales)
    return optax.apply_updates(scales, updates), state


FIELDS = [
    {},
    {"interval": 3},
    {"interval": 7, "update_threshold": 0.5},
    {"interval": 5, "update_threshold": 1.0},
    {"margin": 0.7, "history_window": 1},
    {"margin": 2.0, "history_window": 5, "interval": 2},
    {"reduce": "most_recent", "interval": 4},
    {"reduce": 50, "history_window": 4},
    {"reduce": 99.0, "history_window": 100, "interval": 3},
    {"history_window": 33},
    {"history_window": 17, "interval": 2},
    {"history_window": 300, "outlier_ratio": 30.0},
    {"history_window": 40, "reduce": "most_recent", "outlier_ratio": 8.0},
    {"history_window": 6, "reduce": 70.0, "outlier_ratio": 2.5, "interval": 2},
    {"history_window": 33, "outlier_ratio": None},
    {"history_window": 7, "reduce": 99.0, "outlier_ratio": None},
]


@pytest.mark.parametrize(
    "fields", thorough_but({str(fields): fields for fields in FIELDS}, map(str, FIELDS[1::3]))
)
def test_trajectories_are_exact(fields):
    """120 updates of a lone site and a stack of three layers: exponents, histories and counters
    equal a plain loop's.
    """
    casts = recipes.delayed(**fields).delayed_casts
    scales = {"a": SiteScales.zeros("a", casts), "b": [SiteScales.zeros("b", casts, (3,))]}
    state = delayed_scaling().init(scales)
    lone, stacked = batches(120, (3,)), batches(120, (3, 3), seed=1)
    stacked[40, 1, 1], stacked[41, :, 2], lone[77, 0] = np.inf, np.inf, np.inf
    rows = {
        "a": [Row(cast.format, cast.delayed) for cast in casts],
        "b": [[Row(cast.format, cast.delayed) for cast in casts] for _ in range(3)],
    }
    for a, b in zip(lone, stacked, strict=True):
        scales, state = step(
            scales, state, {"a": observation("a", casts, a), "b": [observation("b", casts, b)]}
        )
        for i, operand in enumerate(OPERANDS):
            rows["a"][i].update(float(a[i]))
            for layer in range(3):
                rows["b"][layer][i].update(float(b[layer, i]))
            assert getattr(scales["a"], operand) == rows["a"][i].exponent
            assert getattr(scales["b"][0], operand).tolist() == [
                of_layer[i].exponent for of_layer in rows["b"]
            ]
    # E4M3's rows are lhs and rhs, E5M2's grad, each of site a first.
    values = [
        *rows["a"][:2],
        *(of_layer[0] for of_layer in rows["b"]),
        *(of_layer[1] for of_layer in rows["b"]),
    ]
    gradients = [rows["a"][2], *(of_layer[2] for of_layer in rows["b"])]
    assert len(state.operands) == 2
    for got, expected in zip(state.operands, (values, gradients), strict=True):
        np.testing.assert_array_equal(got.amax_history.T, [row.ring for row in expected])
        for counter, of in (
            ("stored", lambda row: len(row.amaxes)),
            ("observed", lambda row: len(row.amaxes)),
            ("saturated", lambda row: row.saturated),
            ("nonfinite", lambda row: row.nonfinite),
            ("unsealed", lambda row: 0),
        ):
            assert getattr(got, counter).tolist() == [of(row) for row in expected], counter


@pytest.mark.parametrize(
    "window",
    thorough_but(
        {str(size): size for size in (1, 15, 16, 17, 33, 256, 257, 1000, 1024)}, ["1", "17", "257"]
    ),
)
def test_maximum_of_long_windows(window):
    """Through two turns of the ring, from slots that differ by operand: the maximum is that of the
    latest amaxes, at each update.

    So is the largest one that no ratio of 2**20 parts from the next, where there is such a ratio.
    """
    fields = {"history_window": window, "margin": 448.0}
    casts = (
        CastSpec(E4M3, delayed=DelayedScaling(**fields, outlier_ratio=None)),
        CastSpec(E4M3, delayed=DelayedScaling(**fields, outlier_ratio=2.0**20)),
        None,
    )
    steps = 2 * window + 40
    amaxes = np.exp2(np.random.default_rng(window).integers(-99, 99, (steps, 5))).astype(np.float32)
    amaxes[steps // 3 :] = np.sort(amaxes[steps // 3 :], axis=0)[
        ::-1
    ]  # falling, the maximum is the oldest
    amaxes[np.random.default_rng(0).random(amaxes.shape) < 0.1] = 0
    scales = SiteScales.zeros("s", casts, (5,))
    seen = np.stack([amaxes, amaxes, 0 * amaxes], axis=2)

    @jax.jit
    def run(scales, state):
        def body(carry, a):
            carry = step(*carry, observation("s", casts, a))
            return carry, (carry[0].lhs, carry[0].rhs)

        return jax.lax.scan(body, (scales, state), seen)

    (_, state), (exponents, without_outliers) = run(scales, delayed_scaling().init(scales))
    for row, exponent, of_rest in zip(amaxes.T, exponents.T, without_outliers.T, strict=True):
        stored = np.cumsum(row > 0)
        expected = [
            np.log2(row[: i + 1][row[: i + 1] > 0][-window:].max()) if n else 0
            for i, n in enumerate(stored)
        ]
        assert exponent.tolist() == expected
        by_rule = Row(E4M3, casts[1].delayed)
        for a, e in zip(row.tolist(), of_rest.tolist(), strict=True):
            by_rule.update(a)
            assert by_rule.exponent == e
    assert not state.operands[0].seconds
    for operand in state.operands:
        below, below_second = operand.amax_history, np.zeros((0, 5))
        for index, level in enumerate(operand.maxima):
            starts = range(0, below.shape[0], 16)
            assert level.shape[0] == len(starts)
            assert level.tolist() == [below[at : at + 16].max(0).tolist() for at in starts]
            if operand.seconds:
                second = operand.seconds[index]
                both = [[below[at : at + 16], below_second[at : at + 16]] for at in starts]
                assert second.tolist() == [
                    np.sort(np.concatenate(pair), axis=0)[-2].tolist()
                    if len(pair[0]) + len(pair[1]) > 1
                    else [0.0] * 5
                    for pair in both
                ]
                below_second = second
            below = level
        assert below.shape[0] <= 16


def exponents_of(delayed: DelayedScaling, amaxes, first: float = -7.0) -> list[float]:
    """Of E4M3, after each of these amaxes."""
    scales = SiteScales.zeros("s", (CastSpec(E4M3, delayed=delayed), None, None))
    scales, found = scales.replace(lhs=jnp.float32(first)), []
    state = delayed_scaling().init(scales)
    for a in amaxes:
        scales, state = step(scales, state, observation("s", scales.casts, [a, 0, 0]))
        found.append(float(scales.lhs))
    return found


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"history_window": 2},
        {"history_window": 40},
        {"history_window": 40, "reduce": "most_recent"},
        {"reduce": "most_recent"},
        {"reduce": 99.0},
        {"interval": 5},
    ],
    ids=str,
)
def test_one_outlier_moves_a_scale_by_five_binades_and_a_jump_at_its_second_amax(fields):
    """The docstring's trajectories; a first amax is held against the scale that `init` has made,
    and a lone one in a quiet window too. An interval counts on the way back, as always.
    """
    delayed = DelayedScaling(**fields)
    back = [-7, -7] if "interval" not in fields else [-2, -7]
    assert exponents_of(delayed, [3, 3, 1e30, 3, 3]) == [-7, -7, -2, *back]
    assert exponents_of(delayed, [3, 3, 12288, 12288, 12288]) == [-7, -7, -2, 5, 5]
    back = [-7, -7] if "interval" not in fields else [-2, -2]
    assert exponents_of(delayed, [1e30, 3, 3]) == [-2, *back]
    assert exponents_of(delayed, [12288, 12288]) == [-2, 5]
    assert exponents_of(delayed, [3, 3, 1e30, 1e20, 1e20])[3:] == [58, 58] or fields
    counts = DelayedScaling(**fields, outlier_ratio=None)
    assert exponents_of(counts, [3, 3, 1e30])[-1] == 91


def test_an_outlier_is_one_by_more_than_the_ratio():
    """At the ratio itself an amax counts; a window of one compares only its first."""
    assert exponents_of(DelayedScaling(outlier_ratio=4.0), [3, 3, 12]) == [-7, -7, -5]
    assert exponents_of(DelayedScaling(outlier_ratio=4.0), [3, 3, 12.001]) == [-7, -7, -6]
    assert exponents_of(DelayedScaling(history_window=1), [1e30, 1e30, 3, 1e30]) == [-2, 91, -7, 91]


@pytest.mark.parametrize(
    ("binades", "more"),
    [
        pytest.param(*case, marks=() if case == (12, 1) else pytest.mark.thorough)
        for case in [(8, 0), (12, 1), (15, 1), (20, 2), (30, 4)]
    ],
)
def test_a_chain_without_normalization_follows_a_jump_one_site_an_update(binades, more):
    """A site that clips hides from the next one by how much; in the docstring's closed form, with
    amaxes without headroom, and in that without outliers.
    """

    def chain(weights, x):
        for weight in weights:
            x = x @ weight
        return x

    sites = 5
    weights = [jnp.roll(jnp.eye(8), shift, 1) for shift in range(sites)]
    x = jnp.linspace(0.25, 1, 8)[None] * 1.75
    for ratio in (1024.0, None):
        fp8_chain = fp8jax.fp8(chain, recipes.delayed(outlier_ratio=ratio))
        scales = fp8_chain.init(weights, x)
        state = delayed_scaling().init(scales)
        jumped = jnp.float32(2.0**binades) * x
        for updates in range(20):
            if jnp.max(fp8_chain(scales, weights, jumped)) > 0.9 * jnp.max(jumped):
                break
            seen = jax.grad(lambda s: fp8_chain(s, weights, jumped).sum())(scales)
            scales, state = step(scales, state, seen)
        assert updates == sites + (more if ratio else 0)


def test_no_update_goes_through_a_long_window():
    """One operation reads the whole history, a gather of blocks, and one writes it, in place."""
    casts = (CastSpec(E4M3, delayed=DelayedScaling(history_window=1024)), None, None)
    scales = SiteScales.zeros("s", casts, (100,))
    state = delayed_scaling().init(scales)

    def on_histories(jaxpr):
        for equation in jaxpr.eqns:
            if equation.primitive.name in ("jit", "pjit"):
                yield from on_histories(equation.params["jaxpr"].jaxpr)
            elif any(variable.aval.size >= 1024 * 100 for variable in equation.invars):
                yield equation.primitive.name

    assert list(on_histories(jax.make_jaxpr(step.__wrapped__)(scales, state, scales).jaxpr)) == [
        "scatter",
        "gather",
    ]
    memory = (
        jax.jit(step.__wrapped__, donate_argnums=(0, 1))
        .lower(scales, state, scales)
        .compile()
        .memory_analysis()
    )
    assert memory.temp_size_in_bytes < 100_000 < 4 * 1024 * 100 < memory.alias_size_in_bytes


def test_percentile_is_by_nearest_rank():
    """The 99th percentile of 1..100 is 99, in whatever order they came, and the median of 1..4 is
    2.
    """
    for p, count, expected in (
        (99.0, 100, 99),
        (50.0, 4, 2),
        (100.0, 7, 7),
        (0.5, 100, 1),
        (1.0, 3, 1),
    ):
        casts = (
            CastSpec(E4M3, delayed=DelayedScaling(history_window=128, reduce=p, margin=448.0)),
            None,
            None,
        )
        scales = SiteScales.zeros("s", casts)
        state = delayed_scaling().init(scales)
        for a in np.random.default_rng(0).permutation(count) + 1:
            scales, state = step(scales, state, observation("s", casts, [a, 0, 0]))
        assert scales.lhs == math.ceil(math.log2(expected)), (p, count)


@pytest.mark.parametrize(
    "amax, counter", [(np.nan, "nonfinite"), (np.inf, "nonfinite"), (0.0, None), (1e-38, None)]
)
@pytest.mark.parametrize(
    "fields", [{}, {"interval": 3}, {"history_window": 2, "reduce": 50}], ids=str
)
def test_fault_is_as_if_never_seen(amax, counter, fields):
    """Such a batch at any step leaves exponents and histories bitwise as those of a run without it,
    ever after.
    """
    casts = recipes.delayed(**fields).delayed_casts
    good = batches(12, (3,), seed=3) + np.float32(1)

    def run(amaxes):
        scales = SiteScales.zeros("s", casts)
        state = delayed_scaling().init(scales)
        for a in amaxes:
            scales, state = step(scales, state, observation("s", casts, a))
        return scales, state

    for k in (0, 5, 11):
        scales, state = run(np.insert(good, k, np.full(3, amax, np.float32), axis=0))
        expected_scales, expected = run(good)
        jax.tree.map(np.testing.assert_array_equal, scales, expected_scales)
        for got, wanted in zip(state.operands, expected.operands, strict=True):
            if counter:
                wanted = wanted._replace(**{counter: getattr(wanted, counter) + 1})
            jax.tree.map(np.testing.assert_array_equal, got, wanted)


def test_extreme_amaxes_keep_scales_normal():
    """The smallest normal float32 and 1e30 are observations as any, and their scales normal powers
    of two.
    """
    casts = recipes.delayed(reduce="most_recent", outlier_ratio=None).delayed_casts
    scales = SiteScales.zeros("s", casts)
    state = delayed_scaling().init(scales)
    for a, exponents in (
        (1.2e-38, [-126] * 3),
        (1e30, [91, 91, 84]),
        (3.4e38, [120, 120, 113]),
        (1.2e-38, [-126] * 3),
    ):
        scales, state = step(scales, state, observation("s", casts, [a, a, a]))
        assert [float(getattr(scales, operand)) for operand in OPERANDS] == exponents
        assert all(
            np.isfinite(2.0**e) and np.float32(2.0**e) >= np.finfo(np.float32).tiny
            for e in exponents
        )
    assert [operand.saturated.tolist() for operand in state.operands] == [[2, 2], [2]]


def test_moves_are_exact_under_plain_addition():
    """From a scale of 1 to 2**-28, where a difference of scales would give 0 (2**-28 - 1 is -1 in
    float32).
    """
    scales = SiteScales.zeros("s", CASTS)
    state = delayed_scaling().init(scales)
    seen = observation("s", CASTS, [448 * 2.0**-28, 448.0, 57344 * 2.0**-28])
    updates, _ = jax.jit(delayed_scaling().update)(seen, state, scales)
    moved = optax.apply_updates(scales, updates)
    assert (moved.scales()["lhs"], moved.scales()["grad"]) == (2.0**-28, 2.0**-28)
    assert np.float32(1) + (np.float32(2.0**-28) - np.float32(1)) == 0
    assert not np.any(updates.seal)


ONE, OTHER = [[1.0, 2.0, 3.0]] * 2, [[3.0, 2.5, 1.0]] * 2


def times(factor, seen):
    return jax.tree.map(lambda leaf: leaf * np.float32(factor), seen)


@pytest.mark.parametrize(
    "corrupt",
    {
        "negated": lambda a: times(-1, a),
        "without their number": lambda a: a.replace(uses=jnp.zeros(2)),
        "amaxes alone halved": lambda a: a.replace(lhs=a.lhs / 2, rhs=a.rhs / 2, grad=a.grad / 2),
        "seals alone doubled": lambda a: a.replace(seal=2 * a.seal),
    }.values(),
)
def test_corrupted_observations_are_not_stored(corrupt):
    """Of what no sum of amaxes can be, the exponents stay and the counter tells."""
    scales = SiteScales.zeros("s", CASTS, (2,))
    state = delayed_scaling().init(scales)
    scales, state = step(scales, state, corrupt(observation("s", CASTS, ONE)))
    for operand in state.operands:
        assert (
            (operand.unsealed == 1).all()
            and not operand.amax_history.any()
            and not operand.observed.any()
        )
    assert not any(leaf.any() for leaf in jax.tree.leaves(scales))


@pytest.mark.parametrize("factor", [1.0, 2.0**-20, 0.1, 1000.0])
def test_rescaled_observations_are_what_they_were(factor):
    scales = SiteScales.zeros("s", CASTS, (2,))
    state = delayed_scaling().init(scales)
    seen = observation("s", CASTS, [[3.0, 440.0, 1e-6]] * 2)
    moved, after = step(scales, state, times(factor, seen))
    expected, wanted = step(scales, state, seen)
    jax.tree.map(np.testing.assert_array_equal, moved, expected)
    for got, want in zip(after.operands, wanted.operands):
        np.testing.assert_allclose(got.amax_history, want.amax_history, rtol=1e-6)


@pytest.mark.parametrize("factor", [1.0, 0.5, 0.03, 7.0])
def test_the_larger_of_two_that_were_added_is_found(factor):
    """Whatever the sum was multiplied by after it, with their number."""
    scales = SiteScales.zeros("s", CASTS, (2,))
    a, b = observation("s", CASTS, ONE), observation("s", CASTS, OTHER)
    both = jax.tree.map(jnp.add, a, b)
    moved, after = step(scales, delayed_scaling().init(scales), both)
    expected, _ = step(scales, delayed_scaling().init(scales), jax.tree.map(jnp.maximum, a, b))
    jax.tree.map(np.testing.assert_array_equal, moved, expected)
    assert after.operands[0].unsealed.tolist() == [0] * 4
    rescaled, _ = step(scales, delayed_scaling().init(scales), times(factor, both))
    for name in ("lhs", "rhs", "grad"):
        more = getattr(rescaled, name) - getattr(expected, name)
        assert (more >= 0).all() and (more <= (0 if factor == 1 else 2)).all()


@pytest.mark.parametrize("mean", [False, True], ids=["sum", "mean"])
@pytest.mark.parametrize("uses", [1, 2, 3, 8, 16])
def test_the_largest_of_several_is_bounded(uses, mean):
    """Random amaxes of several binades: never below the largest, never above it times `1 + sqrt(n)`
    squared.
    """
    rng = np.random.default_rng(uses)
    amaxes = np.float32(np.exp2(rng.normal(size=(uses, 500)) * 3))
    amaxes[:, :100] = amaxes[0, :100]
    amaxes[1:, 100:200] = 0
    divisor = np.float32(uses if mean else 1)
    sums = (amaxes.sum(0), np.sqrt(amaxes).sum(0), np.full(500, uses, np.float32))
    found, fits = largest_amax(*(jnp.float32(one / divisor) for one in sums))
    largest = amaxes.max(0)
    assert fits.all()
    assert (found >= largest * 0.998).all()
    n = uses if not mean or uses == 1 else 16
    assert (found <= largest * 1.01 * (1 + np.sqrt(n - 1)) ** 2).all()
    if uses <= (1 if mean else 2):
        np.testing.assert_allclose(found, largest, rtol=2e-3)
    np.testing.assert_allclose(found[:100], largest[:100], rtol=1e-5)


def test_a_bound_is_finite():
    """Of the largest floats, averaged: an infinite amax would stay in the history."""
    amaxes = np.float32([3e38, 1e30])
    sums = amaxes.mean(dtype=np.float64), np.sqrt(amaxes).mean(), 1
    found, fits = largest_amax(*map(jnp.float32, sums))
    assert fits and np.isfinite(found) and found >= 3e38


def test_operand_with_groups_has_one_seal():
    """The seal fits the max over an operand's groups; each group has a row; one bad group takes all
    along.
    """
    scales = SiteScales(
        jnp.zeros((2, 4)),
        None,
        jnp.zeros(2),
        jnp.zeros((2, 3)),
        None,
        "s",
        (CASTS[0], None, CASTS[2]),
        jnp.zeros(2),
    )
    state = delayed_scaling().init(scales)
    amaxes = np.float32([[1, 2, 448, 0], [900, 2, 3, 4]])
    seal = seal_of(
        jnp.stack([amaxes.max(1), np.zeros(2, np.float32), np.float32([57344, 57345])], axis=1)
    )
    grad = jnp.float32([57344, 57345])
    seen = scales.replace(lhs=jnp.asarray(amaxes), grad=grad, seal=seal, uses=jnp.ones(2))
    moved, after = step(scales, state, seen)
    np.testing.assert_array_equal(moved.lhs, [[-8, -7, 0, 0], [2, -7, -7, -6]])
    np.testing.assert_array_equal(moved.grad, [0, 1])
    assert after.operands[0].saturated.tolist() == [0, 0, 0, 0, 1, 0, 0, 0]
    seen = seen.replace(
        lhs=seen.lhs.at[0, 2].set(np.inf), seal=seal.at[0, 0].set(np.inf).at[1, 0].multiply(2)
    )
    moved, after = step(scales, state, seen)
    assert not moved.lhs.any()
    assert after.operands[0].nonfinite.tolist() == [1] * 4 + [0] * 4
    assert after.operands[0].unsealed.tolist() == [0] * 4 + [1] * 4


def test_operands_of_several_rules_and_none():
    """Each operand follows its own cast; those without delayed scaling have no rows."""
    slow = CastSpec(E5M2, delayed=DelayedScaling(interval=2, history_window=3))
    casts = {"a": CASTS, "b": (slow, None, CASTS[2]), "c": (None, None, None)}
    scales = {name: SiteScales.zeros(name, of) for name, of in casts.items()}
    state = delayed_scaling().init(scales)
    assert [operand.amax_history.shape for operand in state.operands] == [(16, 2), (16, 2), (3, 1)]
    seen = {name: observation(name, of, [448.5] * 3) for name, of in casts.items()}
    moved, state = step(scales, state, seen)
    assert (moved["a"].lhs, moved["a"].grad, moved["b"].lhs, moved["b"].grad) == (1, -6, 0, -6)
    moved, state = step(moved, state, seen)
    assert (moved["b"].lhs, moved["b"].rhs, moved["c"].lhs) == (-6, None, None)


class Holder(NamedTuple):
    scales: SiteScales


def test_works_inside_of_transformations():
    """Any container; shapes alone for init; a scan's carry; donated; an ensemble under vmap."""
    tx = delayed_scaling()
    tree = Holder(SiteScales.zeros("s", CASTS, (2,)))
    shapes = jax.eval_shape(tx.init, tree)
    state = tx.init(tree)
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), shapes) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), tx.init(jax.eval_shape(lambda: tree))
    )
    amaxes = batches(20, (2, 3), seed=5)

    def body(carry, a):
        return step(*carry, Holder(observation("s", CASTS, a))), None

    scanned, _ = jax.lax.scan(body, (tree, state), amaxes)
    looped = tree, state
    for a in amaxes:
        looped, _ = body(looped, a)
    jax.tree.map(np.testing.assert_array_equal, scanned, looped)

    members = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), (tree, state))
    double = jax.vmap(lambda carry, a: body(carry, a)[0])(
        members, jnp.stack([amaxes[0], amaxes[1]])
    )
    jax.tree.map(
        np.testing.assert_array_equal,
        jax.tree.map(lambda leaf: leaf[1], double),
        body((tree, state), amaxes[1])[0],
    )

    donating = jax.jit(
        lambda *carry: step(*carry, Holder(observation("s", CASTS, amaxes[0]))),
        donate_argnums=(0, 1),
    )
    donating(*donating(tree, state))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves((tree, state)))


@pytest.mark.parametrize("count", [1, 64, 65, 300])
def test_rows_join_and_split(count):
    """Few arrays or many, in whatever shapes: split is the inverse of join."""
    rng = np.random.default_rng(count)
    shapes = [[(), (), (2,), (1, 3)][i % 4] for i in range(count)]
    arrays = [jnp.asarray(rng.normal(size=shape).astype(np.float32)) for shape in shapes]
    back = jax.jit(lambda arrays: split(join(arrays), shapes))(arrays)
    jax.tree.map(np.testing.assert_array_equal, back, arrays)


def test_many_sites_cost_few_operations():
    """However many sites, all is done to vectors: operations that are not per leaf don't grow with
    the sites.
    """

    def operations(sites):
        scales = [SiteScales.zeros(str(i), CASTS) for i in range(sites)]
        jaxpr = jax.make_jaxpr(step.__wrapped__)(scales, delayed_scaling().init(scales), scales)
        per_leaf = {"reshape", "split", "concatenate", "add", "slice"}
        return sum(equation.primitive.name not in per_leaf for equation in jaxpr.eqns)

    assert operations(200) == operations(100)


SITE = SiteScales.zeros("mlp/up", CASTS)
STACKED = SiteScales.zeros("mlp/up", CASTS, (2,))


@pytest.mark.parametrize(
    "updates, params, error, text",
    [
        (
            {},
            {},
            ValueError,
            r"params of delayed_scaling must hold SiteScales; got none in .*\. Pass the scales "
            r"that .*\.init",
        ),
        (
            {"a": SITE, "w": np.ones(2)},
            {"a": SITE, "w": np.ones(2)},
            TypeError,
            r"params of delayed_scaling must hold SiteScales alone; got ndarray at "
            r"params\['w'\]\. Use with_delayed_scaling\(tx\)",
        ),
        (
            {"a": SITE},
            None,
            ValueError,
            r"params must be the scales that are to be updated; got None\. Call update\(updates, "
            r"state, params\)",
        ),
        (
            {"b": SITE},
            {"a": SITE},
            ValueError,
            r"updates and params must hold the same sites; got 'mlp/up' at \['a'\], which updates "
            r"lacks\. Observations are the gradient",
        ),
        (
            {"a": SITE, "b": SITE},
            {"a": SITE},
            ValueError,
            r"same sites; got 'mlp/up' at \['b'\], which params lacks",
        ),
        (
            {"a": SITE.replace(site="mlp/down")},
            {"a": SITE},
            ValueError,
            r"same site at \['a'\]; got 'mlp/down' in updates and 'mlp/up' in params\.",
        ),
        (
            {"a": SITE.replace(casts=CASTS[::-1])},
            {"a": SITE},
            ValueError,
            r"same casts at \['a'\]; got \(CastSpec",
        ),
        (
            {"a": STACKED},
            {"a": SITE},
            ValueError,
            r"same shapes; got \(2,\) and \(\) for \.lhs of site 'mlp/up'\. ",
        ),
        (
            {"a": SITE.replace(lhs=jnp.float16(1))},
            {"a": SITE},
            TypeError,
            r"updates\['a'\]\.lhs of site 'mlp/up' must be a float32 array; got float16\. Leave "
            r"scales out of casts",
        ),
        (
            {"a": SITE.replace(lhs=1.0)},
            {"a": SITE},
            TypeError,
            r"must be a float32 array; got float\.",
        ),
        (
            {"a": SITE.replace(rhs=None)},
            {"a": SITE},
            ValueError,
            r"updates\['a'\]\.rhs of site 'mlp/up' must be an array; got None\.",
        ),
        (
            {"a": STACKED.replace(lhs=jnp.zeros(3))},
            {"a": STACKED},
            ValueError,
            r"updates\['a'\]\.lhs of site 'mlp/up' must begin with the axes of its seal, \(2,\); "
            r"got the shape \(3,\)\.",
        ),
        (
            {"a": STACKED},
            {"a": STACKED},
            ValueError,
            r"state must be that of the same scales: .* amax_history has the shapes \[\(16, 4\), "
            r"\(16, 2\)\]; got \[\(16, 2\), \(16, 1\)\]\. Make a new state",
        ),
    ],
)
def test_errors(updates, params, error, text):
    """Each names the argument, the rule, what was got and the remedy; the state stays."""
    tx = delayed_scaling()
    state = tx.init({"a": SITE})
    before = jax.tree.map(np.array, state)
    with pytest.raises(error, match=text) as raised:
        tx.update(updates, state, params)
    assert re.search(r"\. [A-Z].*", str(raised.value)), "says what to do"
    jax.tree.map(np.testing.assert_array_equal, state, before)


def test_init_errors():
    for params, error, text in (
        ({"w": jnp.ones(2)}, TypeError, "with_delayed_scaling"),
        ({}, ValueError, "got none"),
    ):
        with pytest.raises(error, match=text):
            delayed_scaling().init(params)
    assert isinstance(delayed_scaling().init(SITE), ScalingState)
