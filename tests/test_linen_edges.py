"""Flax Linen's own transformations around and inside of `Fp8`: exact amaxes, or a fault that is
found, counted and named.
"""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from tiers import thorough_but

import fp8jax
from fp8jax import recipes
from fp8jax._observe import seal_fits
from fp8jax._state import find_site_scales
from fp8jax.linen import Fp8

X = jax.random.normal(jax.random.key(0), (3, 2, 4)) * jnp.array([1.0, 5.0, 0.1])[:, None, None]


def dense(name="dense"):
    return Fp8(nn.Dense(4, name=name), recipes.delayed())


def amax(x, axes=None):
    return np.abs(np.asarray(x)).max(axes)


def observed(apply, variables):
    """What the only site saw, and whether each seal fits."""
    (node,) = find_site_scales(
        jax.jit(jax.grad(lambda variables: apply(variables).sum()))(variables)["fp8"]
    )
    return node, np.asarray(seal_fits(jnp.stack([node.lhs, node.rhs, node.grad], -1), node.seal))


class Cell(nn.Module):
    """A wrapped layer, for a scan or a vmap of Flax's around it."""

    @nn.compact
    def __call__(self, carry, x):
        y = dense()(x)
        return carry, y


class Batch(nn.Module):
    ensemble: bool

    @nn.compact
    def __call__(self, xs):
        axis = 0 if self.ensemble else None
        batched = nn.vmap(
            Cell,
            in_axes=(None, 0),
            variable_axes={"params": axis, "fp8": axis},
            split_rngs={"params": self.ensemble},
        )
        return batched(name="cell")(0.0, xs)[1]


@pytest.mark.parametrize("ensemble", [False, True])
def test_nn_vmap(ensemble):
    """One scale for the batch, or one for each member of an ensemble, as variables' axes say."""
    model = Batch(ensemble)
    variables = model.init(jax.random.key(1), X)
    node, fits = observed(lambda variables: model.apply(variables, X), variables)
    kernel = variables["params"]["cell"]["dense"]["kernel"]
    np.testing.assert_array_equal(node.lhs, amax(X, (1, 2) if ensemble else None))
    np.testing.assert_array_equal(node.rhs, amax(kernel, (1, 2) if ensemble else None))
    assert fits.all() and (np.asarray(node.grad) == 1).all()


class Shared(nn.Module):
    """A scan around a wrapper, with one set of variables for all steps."""

    @nn.compact
    def __call__(self, xs):
        scan = nn.scan(Cell, variable_broadcast=("params", "fp8"), split_rngs={"params": False})
        return scan(name="cell")(0.0, xs)[1]


class Inside(nn.Module):
    """The same layer, for the wrapper around the scan."""

    @nn.compact
    def __call__(self, xs):
        scan = nn.scan(
            lambda layer, carry, x: (carry, layer(x)),
            variable_broadcast="params",
            split_rngs={"params": False},
        )
        return scan(nn.Dense(4, name="dense"), 0.0, xs)[1]


@pytest.mark.thorough
def test_a_scan_that_broadcasts_scales_adds_and_a_wrapper_around_it_is_exact():
    with pytest.raises(ValueError, match="broadcasted variable has a data dependency"):
        Shared().init(jax.random.key(1), X)  # Flax's own: scales come from data.
    whole = Fp8(Inside(), recipes.delayed())
    variables = whole.init(jax.random.key(1), X)
    node, fits = observed(lambda variables: whole.apply(variables, X), variables)
    assert (
        float(node.lhs) == amax(X)
        and float(node.rhs) == amax(variables["params"]["dense"]["kernel"])
        and fits.all()
    )

    # Scales from elsewhere: the scan adds its steps' observations up, of which an update takes a
    # bound of the largest.
    (first,) = find_site_scales(variables["fp8"])
    variables = {
        "params": {"cell": variables["params"]},
        "fp8": {"cell": {"dense": {"scales": {"cell/dense": first.replace(site="cell/dense")}}}},
    }
    node, fits = observed(lambda variables: Shared().apply(variables, X), variables)
    np.testing.assert_allclose(node.lhs, sum(amax(x) for x in X), rtol=1e-6)
    assert not fits.any() and node.uses == len(X)
    tx = fp8jax.with_delayed_scaling(optax.sgd(0.0))
    gradients = jax.grad(lambda variables: Shared().apply(variables, X).sum())(variables)
    _, state = tx.update(gradients, tx.init(variables), variables)
    counters = fp8jax.metrics.summary(state, variables)
    assert counters["fp8/observed"] == 3 and not counters["fp8/unsealed"]
    (kept,) = fp8jax.metrics.histories(state, variables)["cell/dense/lhs"]
    assert amax(X) * 0.999 <= kept <= sum(amax(x) for x in X) * 1.001


class Twice(nn.Module):
    """A layer called twice, each call lifted by itself."""

    lift: Callable
    wrapped: bool

    def setup(self):
        self.layer = Fp8(nn.Dense(4), recipes.delayed()) if self.wrapped else nn.Dense(4)

    def __call__(self, x):
        call = self.lift(lambda module, x: module.layer(x))
        return call(self, 5 * jnp.tanh(call(self, x)))


@pytest.mark.parametrize(
    "lift",
    thorough_but(
        {
            "remat": nn.remat,
            "jit": nn.jit,
            "cond": lambda fn: lambda module, x: nn.cond(True, fn, fn, module, x),
        },
        ["jit"],
    ),
)
def test_lifted_calls_of_one_wrapper_are_found_out_and_a_wrapper_around_them_is_exact(lift):
    inside, whole = Twice(lift, wrapped=True), Fp8(Twice(lift, wrapped=False), recipes.delayed())
    variables = Twice(lambda fn: fn, wrapped=True).init(jax.random.key(1), X[1])
    _, fits = observed(lambda variables: inside.apply(variables, X[1]), variables)
    assert not fits.any()

    params = {"params": variables["params"]}
    variables = params | whole.apply(params, X[1], mutable="fp8")[1]
    nodes = find_site_scales(
        jax.jit(jax.grad(lambda variables: whole.apply(variables, X[1]).sum()))(variables)["fp8"]
    )
    kernel = amax(variables["params"]["layer"]["kernel"])
    for node in nodes:
        assert seal_fits(jnp.stack([node.lhs, node.rhs, node.grad], -1), node.seal).all() and float(
            node.rhs
        ) in (0, kernel)
    assert amax(X[1]) in [float(node.lhs) for node in nodes] and len(nodes) > 1


class Loop(nn.Module):
    @nn.compact
    def __call__(self, x):
        layer = nn.Dense(4, name="layer")
        if self.is_initializing():
            return layer(x)
        return nn.while_loop(
            lambda module, c: c[1] < 3,
            lambda module, c: (jnp.tanh(layer(c[0])) * 2, c[1] + 1),
            self,
            (x, 0),
        )[0]


def test_nn_while_loop_runs_in_fp8_on_the_scales_of_init():
    model = Fp8(Loop(), recipes.delayed())
    variables = model.init(jax.random.key(1), X[1])
    assert (
        list(variables["fp8"]["scales"])
        == ["layer"]
        == [site.name for site in model.explain(variables, X[1]).sites if site.selected]
    )
    got = jax.jit(model.apply)(variables, X[1])
    step = jax.jit(Fp8(nn.Dense(4), recipes.delayed()).apply)
    want, scales = (
        X[1],
        {"scales": {"dot": variables["fp8"]["scales"]["layer"].replace(site="dot")}},
    )
    for _ in range(3):
        want = jnp.tanh(step({"params": variables["params"]["layer"], "fp8": scales}, want)) * 2
    np.testing.assert_allclose(got, want, rtol=1e-6)
    plain = Loop().apply({"params": variables["params"]}, X[1])
    assert 0 < jnp.linalg.norm(got - plain) < 0.2 * jnp.linalg.norm(plain)


class Choice(nn.Module):
    def setup(self):
        self.a, self.b = nn.Dense(4), nn.Dense(4)

    def __call__(self, x):
        if self.is_initializing():
            self.a(x), self.b(x)
        return nn.cond(
            x[0, 0] > 0, lambda module, x: module.a(x), lambda module, x: module.b(2 * x), self, x
        )


def test_nn_cond_observes_the_branch_that_was_taken():
    model = Fp8(Choice(), recipes.delayed())
    variables = model.init(jax.random.key(1), X[1])
    gradient = jax.jit(jax.grad(lambda variables, x: model.apply(variables, x).sum()))
    for sign, taken, factor in ((1, "a", 1), (-1, "b", 2)):
        x = X[1].at[0, 0].set(sign * 3.0)
        seen = {
            name: node for name, node in gradient(variables, x)["fp8"]["scales"].items() if node.lhs
        }
        ((name, node),) = seen.items()
        assert name.startswith(taken)
        assert (
            float(node.lhs) == factor * amax(x)
            and float(node.rhs) == amax(variables["params"][taken]["kernel"])
            and float(node.grad) == 1
        )


class LowRank(nn.Module):
    """Adds to a layer, in that layer's own scope."""

    def setup(self):
        self.base = nn.Dense(4)
        nn.share_scope(self, self.base)
        self.down = self.param("down", nn.initializers.normal(), (4, 2))
        self.up = self.param("up", nn.initializers.normal(), (2, 4))

    def __call__(self, x):
        return self.base(x) + (x @ self.down) @ self.up


class HasLowRank(nn.Module):
    def setup(self):
        self.adapted = LowRank()

    def __call__(self, x):
        return self.adapted(x)


def test_nn_share_scope_keeps_params_where_they_are_and_names_alike():
    model = Fp8(HasLowRank(), recipes.delayed())
    variables = model.init(jax.random.key(1), X[1])
    assert sorted(variables["params"]["adapted"]) == ["bias", "down", "kernel", "up"]
    names = [site.name for site in model.explain(variables, X[1]).sites]
    assert sorted(variables["fp8"]["scales"]) == sorted(names) and len(names) == 3
    seen = jax.jit(jax.grad(lambda variables: model.apply(variables, X[1]).sum()))(variables)[
        "fp8"
    ]["scales"]
    weights = {amax(leaf) for leaf in jax.tree.leaves(variables["params"]) if leaf.ndim == 2}
    assert {float(node.rhs) for node in seen.values()} == weights
    assert sum(float(node.lhs) == amax(X[1]) for node in seen.values()) == 2


class Mapped(nn.Module):
    """A layer on params that are mapped once they are there."""

    @nn.compact
    def __call__(self, x):
        larger = functools.partial(jax.tree.map, lambda leaf: 1000 * leaf)
        return nn.map_variables(
            nn.Dense, "params", trans_in_fn=larger, init=self.is_initializing(), mutable=True
        )(8)(x)


class Normalized(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.WeightNorm(nn.Dense(8))(x)


class Switched(nn.Module):
    """Both branches called at init, as Flax's docs have it."""

    @nn.compact
    def __call__(self, x):
        branches = [
            lambda module, x: nn.Dense(4, name="a")(x),
            lambda module, x: nn.Dense(4, name="b")(2 * x),
        ]
        if self.is_mutable_collection("params"):
            for branch in branches:
                branch(self, x)
        return nn.switch(1, branches, self, x)


class Synchronized(nn.Module):
    """An axis name and a collection that only an initialization goes without."""

    @nn.compact
    def __call__(self, x):
        if self.is_initializing():
            self.put_variable("constants", "factor", jnp.float32(2.0))
        return nn.BatchNorm(use_running_average=False, axis_name="batch")(
            self.get_variable("constants", "factor") * nn.Dense(4)(x)
        )


@pytest.mark.parametrize(
    ("module", "sites"),
    [
        (Mapped(), {"Map_variablesDense_0"}),
        (Normalized(), {"WeightNorm_0/Dense_0/Dense_0:Dense_0"}),
        (Switched(), {"a", "b"}),
        (nnx.bridge.ToLinen(nnx.Linear, args=(4, 8)), {"dot"}),
    ],
)
def test_init_makes_the_scales_of_a_call_and_not_those_of_the_initialization(module, sites):
    model = Fp8(module, recipes.delayed())
    variables = model.init(jax.random.key(1), X[1])
    assert variables["fp8"]["scales"].keys() == sites
    _, added = model.apply({"params": variables["params"]}, X[1], mutable="fp8")
    jax.tree.map(np.testing.assert_array_equal, variables["fp8"], added["fp8"])


def test_init_makes_the_scales_of_a_module_that_only_an_initialization_can_call_yet():
    variables = Fp8(Synchronized(), recipes.delayed()).init(jax.random.key(1), X[1])
    assert sorted(variables) == ["batch_stats", "constants", "fp8", "params"] and list(
        variables["fp8"]["scales"]
    ) == ["Dense_0"]


def test_init_makes_no_infinities_that_a_check_for_them_would_find():
    """Gradients behind a layer that starts at zero have no amax, for which a value stands in on the
    way.
    """

    class Zero(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(4, kernel_init=nn.initializers.zeros, name="last")(
                nn.Dense(4, name="first")(x)
            ).mean()

    model = Fp8(Zero(), recipes.delayed())
    with jax.debug_infs(True), jax.debug_nans(True):
        scales = model.init(jax.random.key(1), X[1])["fp8"]["scales"]
    assert (
        scales["first"].grad == scales["last"].grad == jnp.ceil(jnp.log2(0.125 / fp8jax.E5M2.max))
    )
    assert (
        scales["last"].rhs
        == scales["first"].rhs
        == jnp.ceil(
            jnp.log2(amax(model.init(jax.random.key(1), X[1])["params"]["first"]["kernel"]) / 448)
        )
    )


def test_bind_gives_what_apply_gives():
    model = Fp8(Inside(), recipes.delayed())
    variables = model.init(jax.random.key(1), X)
    bound = model.bind(variables)
    np.testing.assert_array_equal(bound(X), model.apply(variables, X))
    assert not jnp.array_equal(bound(X), Inside().apply({"params": variables["params"]}, X))


def test_tabulate_lists_the_layers_of_the_wrapped_module():
    table = Fp8(HasLowRank(), recipes.delayed()).tabulate(
        jax.random.key(0), X[1], console_kwargs={"width": 200}
    )
    assert "adapted" in table and "fp8" in table


def test_lazy_init_needs_arrays_only_where_scales_come_from_them():
    abstract = jax.ShapeDtypeStruct((2, 4), jnp.float32)
    model = Fp8(nn.Dense(4), recipes.delayed())
    with pytest.raises(
        ValueError,
        match=r"arguments of lazy_init must be arrays under delayed scaling.* got "
        r"ShapeDtypeStruct.*\. Make params alone by "
        r"module\.lazy_init.*mutable='fp8'",
    ):
        model.lazy_init(jax.random.key(1), abstract)
    want = model.init(jax.random.key(1), X[1])
    jax.tree.map(np.testing.assert_array_equal, model.lazy_init(jax.random.key(1), X[1]), want)
    params = Fp8(nn.Dense(4), recipes.current()).lazy_init(jax.random.key(1), abstract)
    assert sorted(params) == ["params"]
    # The way that the error names.
    params = model.module.lazy_init(jax.random.key(1), abstract)
    _, scales = model.apply(params, X[1], mutable="fp8")
    jax.tree.map(np.testing.assert_array_equal, {**params, **scales}, want)


@pytest.mark.thorough
def test_two_calls_of_apply_in_one_loss_are_as_one():
    """To a hair: the larger amax of two is found, and moves the scale as if seen alone."""
    model = Fp8(nn.Dense(4), recipes.delayed())
    variables = model.init(jax.random.key(1), X[1])
    tx = fp8jax.with_delayed_scaling(optax.sgd(0.0))

    def moved(loss):
        updates, state = tx.update(jax.grad(loss)(variables), tx.init(variables), variables)
        assert fp8jax.metrics.summary(state, variables)["fp8/observed"] == 3
        return updates["fp8"]

    def apart(variables):
        return (model.apply(variables, X[1]) + 3 * model.apply(variables, 9 * X[1])).sum()

    def joint(variables):
        y = model.apply(variables, jnp.concatenate([X[1], 9 * X[1]]))
        return (y[: len(X[1])] + 3 * y[len(X[1]) :]).sum()

    jax.tree.map(np.testing.assert_array_equal, moved(apart), moved(joint))
    assert any(leaf.any() for leaf in jax.tree.leaves(moved(apart)))


def test_clipping_outside_leaves_amaxes_what_they_were():
    model = Fp8(nn.Dense(4), recipes.delayed())
    variables = model.init(jax.random.key(1), X[1])
    tx = optax.chain(optax.clip_by_global_norm(0.1), fp8jax.with_delayed_scaling(optax.sgd(0.1)))
    gradients = jax.grad(lambda variables: model.apply(variables, X[1]).sum())(variables)
    with jax.numpy_dtype_promotion("standard"):
        updates, state = jax.jit(tx.update)(gradients, tx.init(variables), variables)
    counters = fp8jax.metrics.summary(state, variables)
    assert counters["fp8/observed"] == 3 and not counters["fp8/unsealed"]
    alone = fp8jax.with_delayed_scaling(optax.sgd(0.1))
    expected, _ = alone.update(gradients, alone.init(variables), variables)
    jax.tree.map(np.testing.assert_array_equal, updates["fp8"], expected["fp8"])
