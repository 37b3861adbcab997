"""Linen methods as models call them: helpers, methods that call apply, functions of the module,
fields.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fp8jax import recipes
from fp8jax.linen import Fp8

X = jax.random.normal(jax.random.key(1), (2, 8))
RECIPES = {"delayed": recipes.delayed(), "current": recipes.current()}


class Base(nn.Module):
    width: int = 8

    def generate(self, variables, x):
        for _ in range(2):
            x = self.apply(variables, x)
        return x


class Model(Base):
    depth: int = 2
    kind: str = "mlp"
    COLORS = ("red", "blue")

    def setup(self):
        self.encoder = nn.Dense(self.width)
        self.layers = [nn.Dense(self.width) for _ in range(self.depth)]
        self.factor = 2.0

    def __call__(self, x):
        x = self.encoder(x)
        for layer in self.layers:
            x = jnp.tanh(layer(x))
        return x

    def _private(self, x):
        return self.encoder(x) * self.factor

    def encode(self, x):
        return self._private(x)

    def describe(self, x):
        return self.encoder(x), self.kind, 3, {"width": self.width}

    @property
    def projected(self):
        return self.encoder(X)

    def generate(self, variables, x):  # by super, as models with a base class do
        return super().generate(variables, x) * 2

    def by_name(self, variables, x):
        return self.apply(variables, x, method="encode") + self.apply(
            variables, x, method=self.encode
        )

    @nn.nowrap
    def another(self, variables, x):
        return type(self)(kind="other").clone().apply({"params": variables["params"]}, x)

    def cloned(self, variables, x):
        return self.clone(kind="other").apply(variables, x, method=Model.encode)

    def bound(self, variables, x):
        return self.bind(variables).encode(x)

    def by_nn_apply(self, variables, x):
        return nn.apply(lambda module, x: module._private(x), self)(variables, x)

    @nn.nowrap
    def shape_for(self, batch):
        assert isinstance(self, Model)
        return batch, self.width * self._scale()

    @nn.nowrap
    def _scale(self):
        return 2

    @nn.nowrap
    def initial(self, key):
        return self.init(key, jnp.zeros(self.shape_for(1)[:1] + (self.width,)))

    @nn.nowrap
    def helper(self, x):
        return self._private(x)

    @staticmethod
    def double(x):
        return 2 * x

    @classmethod
    def small(cls):
        return cls(width=2)

    @nn.nowrap
    @functools.partial(jax.jit, static_argnums=0)
    def jitted(self, variables, x):
        return self.apply(variables, x)

    @functools.partial(jax.jit, static_argnums=0)
    def wrapped_jit(self, variables, x):
        return self.apply(variables, x, method=self.encode)

    @nn.jit
    def lifted(self, x):
        return self.encoder(x)


@functools.cache
def variables_of(recipe):
    return Fp8(Model(), RECIPES[recipe]).init(jax.random.key(0), X)


def is_fp8(got, plain):
    """Whether it is near the plain value, and farther from it than other orders of sums are."""
    error = float(jnp.linalg.norm(got - plain) / jnp.linalg.norm(plain))
    return 1e-3 < error < 0.15


@pytest.mark.parametrize("recipe", RECIPES)
def test_methods_that_call_apply_run_in_fp8(recipe):
    model, variables = Fp8(Model(), RECIPES[recipe]), variables_of(recipe)
    plain = {"params": variables["params"]}
    once = model.apply(variables, X)
    encoded = model.apply(variables, X, method="encode")
    for name, want in {
        "generate": 2 * model.apply(variables, once),
        "by_name": 2 * encoded,
        "cloned": encoded,
        "bound": encoded,
        "by_nn_apply": encoded,
        "jitted": once,
        "wrapped_jit": encoded,
    }.items():
        # The module's own first: a program compiled for it must not be taken for the wrapper's, or
        # the other way round.
        unquantized = getattr(Model(), name)(plain, X)
        got = getattr(model, name)(variables, X)
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6, err_msg=name)
        assert is_fp8(got, unquantized), name
        assert jnp.array_equal(getattr(Model(), name)(plain, X), unquantized)


def test_what_a_method_makes_of_its_class_is_the_model():
    variables = variables_of("current")
    want = Model().apply({"params": variables["params"]}, X)
    assert jnp.array_equal(Fp8(Model(), recipes.current()).another(variables, X), want)


def test_the_gradient_of_a_method_that_calls_apply_carries_what_was_seen():
    model, variables = Fp8(Model(), recipes.delayed()), variables_of("delayed")
    got = jax.jit(jax.grad(lambda v: model.jitted(v, X).sum()))(variables)
    want = jax.jit(jax.grad(lambda v: model.apply(v, X).sum()))(variables)
    assert float(want["fp8"]["scales"]["encoder"].lhs) == float(jnp.abs(X).max())
    jax.tree.map(np.testing.assert_array_equal, got, want)


def test_a_static_self_is_compiled_once():
    model, variables = Fp8(Model(), recipes.current()), variables_of("current")
    jitted = type(Model()).__dict__["jitted"]
    model.jitted(variables, X)
    before = jitted._cache_size()
    model.jitted(variables, X), Fp8(Model(), recipes.current()).jitted(variables, X)
    assert jitted._cache_size() == before
    Fp8(Model(), recipes.rowwise()).jitted({"params": variables["params"]}, X)
    assert jitted._cache_size() == before + 1


def test_helpers_and_fields_are_those_of_the_module():
    model, variables = Fp8(Model(), recipes.current()), variables_of("current")
    for own in (model, model.bind(variables)):
        assert (own.width, own.depth, own.kind, own.COLORS) == (8, 2, "mlp", ("red", "blue"))
        assert own.shape_for(3) == (3, 16) and own._scale() == 2
        assert own.small() == Model(width=2)
        assert own.double(3) == 6
    assert model.bind(variables).factor == 2.0
    initial = model.initial(jax.random.key(0))["params"]
    jax.tree.map(np.testing.assert_array_equal, initial, variables["params"])
    assert "fp8" in Fp8(Model(), recipes.delayed()).initial(jax.random.key(0))
    with pytest.raises(AttributeError, match='"Model" object has no attribute "nothing"'):
        model.nothing
    with pytest.raises(AttributeError, match='"Model" object has no attribute "nothing"'):
        model.bind(variables).nothing


FUNCTIONS = {
    "private": lambda m, x: m._private(x),
    "submodule": lambda m, x: m.encoder(x) * m.factor,
    "one of a list": lambda m, x: m.layers[0](x),
    "all of it": lambda m, x: m(x),
    "a field": lambda m, x: m.encoder(x) * m.depth,
    "partial": functools.partial(lambda m, x, y: m.encoder(x) + y, y=jnp.float32(1)),
    "nowrap": Model.helper,
    "lifted": Model.lifted,
}


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
def test_functions_of_the_module_run_in_fp8(function):
    model, variables = Fp8(Model(), recipes.delayed()), variables_of("delayed")
    plain = Model().apply({"params": variables["params"]}, X, method=function)
    got = jax.jit(lambda v: model.apply(v, X, method=function))(variables)
    assert is_fp8(got, plain)
    # Trained through it, too: the gradient carries what was seen, by the names that the model has.
    grads = jax.grad(lambda v: model.apply(v, X, method=function).sum())(variables)
    seen = {name for name, node in grads["fp8"]["scales"].items() if node.lhs}
    assert seen in ({"encoder"}, {"layers_0"}, {"encoder", "layers_0", "layers_1"})


def test_init_takes_functions_of_the_module_too():
    model = Fp8(Model(), recipes.delayed())
    variables = model.init(jax.random.key(0), X, method=lambda m, x: m.encoder(x))
    assert list(variables["fp8"]["scales"]) == ["encoder"]


def test_what_is_bound_runs_in_fp8_or_is_refused():
    model, variables = Fp8(Model(), recipes.delayed()), variables_of("delayed")
    bound, plain = model.bind(variables), Model().bind({"params": variables["params"]})
    for name in ("_private", "helper", "encode", "lifted"):
        assert is_fp8(getattr(bound, name)(X), getattr(plain, name)(X)), name
    np.testing.assert_allclose(bound.projected, plain.projected, rtol=1e-6)  # of no input: no site
    for name in ("encoder", "layers"):
        with pytest.raises(
            AttributeError, match=rf"attribute '{name}' of Model .*module\.{name}\(x\)"
        ):
            getattr(bound, name)
        with pytest.raises(
            AttributeError, match=f"attribute '{name}' of Model must not be a module"
        ):
            nn.apply(lambda m, x: getattr(m, name), model)(variables, X)


def test_a_method_returns_what_is_no_array_as_it_is():
    model, variables = Fp8(Model(), recipes.delayed()), variables_of("delayed")
    plain = Model().apply({"params": variables["params"]}, X, method="describe")
    got = model.apply(variables, X, method="describe")
    assert got[1:] == plain[1:] == ("mlp", 3, {"width": 8}) and is_fp8(got[0], plain[0])
    assert isinstance(got[2], int)
    assert model.init(jax.random.key(0), X, method="describe")["fp8"]["scales"].keys() == {
        "encoder"
    }


def test_plain_programs_are_not_mixed_up_with_ours_in_static_arguments():
    one, other = Fp8(Model(), recipes.current()), Fp8(Model(), recipes.rowwise())
    helper = lambda model: model.jitted.__self__
    assert helper(one) == helper(one) and hash(helper(one)) == hash(helper(one))
    assert helper(one) != helper(other) and helper(one) != Model() and Model() != helper(one)
