"""What a primitive with a jaxpr inside needs to be entered, and that it is known in one place."""

import ast
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend import core
from jax.interpreters import mlir

import fp8jax
from fp8jax import _shims, recipes
from fp8jax._transform import control_flow
from fp8jax._transform.control_flow import FLOWS, Flow, Kind, flow_of

ROOT = pathlib.Path(fp8jax.__file__).parent
W = jax.random.normal(jax.random.key(0), (8, 8))
X = jax.random.normal(jax.random.key(1), (3, 4, 8))

OPERANDS = jnp.ones(3), jnp.ones(()), jnp.ones((2, 5))


def call(x, y, z):
    return jnp.sin(x) * y + z.sum()


def tangent(primals, tangents):
    return call(*primals), tangents[0]


by_own_tangents, by_own_rule = jax.custom_jvp(call), jax.custom_vjp(call)
by_own_tangents.defjvp(tangent)
by_own_rule.defvjp(lambda x, y, z: (call(x, y, z), (x, y, z)), lambda kept, g: (g, *kept[1:]))


def scanned(x, y, z):
    return jax.lax.scan(lambda x, row: (jnp.sin(x) * y, row.sum()), x, z)


def repeated(x, y, z):
    condition, body = (lambda x: x.sum() * z.sum() < 9), (lambda x: x * x + y)
    return jax.lax.while_loop(condition, body, x)


def chosen(x, y, z):
    return jax.lax.cond(y < 9, lambda x, z: x * z.sum(), lambda x, z: x, x, z)


MADE = {
    "jit": jax.jit(call),
    "remat2": jax.checkpoint(call),
    "scan": scanned,
    "while": repeated,
    "cond": chosen,
    "custom_jvp_call": by_own_tangents,
    "custom_vjp_call": by_own_rule,
    "shard_map": jax.shard_map(
        call, mesh=jax.make_mesh((1,), ("one",)), in_specs=jax.P(), out_specs=jax.P()
    ),
    # What JAX calls the part of a checkpoint that needs no recomputing.
    "eval_jaxpr" if jax.__version_info__ >= (0, 11) else "closed_call": jax.grad(
        lambda *operands: jax.checkpoint(scanned)(*operands)[0].sum()
    ),
}


def equations(jaxpr):
    for equation in _shims.open_jaxpr(jaxpr)[0].eqns:
        yield equation
        for inner in _shims.jaxprs_in(equation.params):
            yield from equations(inner)


@pytest.mark.parametrize("name", MADE)
def test_a_flow_maps_operands_to_the_inputs_of_each_body(name):
    jaxpr = jax.make_jaxpr(MADE[name])(*OPERANDS)
    equation = next(one for one in equations(jaxpr) if one.primitive.name == name)
    flow = flow_of(equation)
    assert flow.bodies and flow.kind != Kind.CLOSED
    own, consts, carry, others = (list(map(typed, part)) for part in flow.parts(equation.invars))
    if flow.kind == Kind.LOOP:  # An iteration reads slices.
        others = [(shape[1:], dtype) for shape, dtype in others]
    for body in flow.bodies:
        inputs = _shims.open_jaxpr(body)[0].invars
        assert list(map(typed, inputs)) == [*consts, *carry, *others]
    if flow.condition is not None:
        assert list(map(typed, _shims.open_jaxpr(flow.condition)[0].invars)) == [*own, *carry]


def typed(variable):
    return variable.aval.shape, variable.aval.dtype


def test_every_primitive_is_one_that_jax_makes():
    assert set(MADE) < set(FLOWS)
    assert set(FLOWS) - set(MADE) <= {"closed_call", "eval_jaxpr"}  # one in two versions


def test_no_primitive_is_known_in_two_places():
    """Neither by its name nor by the parameters that hold its jaxprs."""
    holding = set()
    for name, function in MADE.items():
        for equation in equations(jax.make_jaxpr(function)(*OPERANDS)):
            if equation.primitive.name == name:
                params = equation.params.items()
                holding |= {key for key, value in params if _shims.jaxprs_in({key: value})}
    assert holding >= {"jaxpr", "call_jaxpr", "cond_jaxpr", "body_jaxpr", "branches"}
    known = set(FLOWS) | holding - {"jaxpr"}  # what a closed jaxpr calls its own, too
    for part in ("transform", "observe", "ops"):
        for path in (ROOT / part).rglob("*.py"):
            if path.name != "control_flow.py":
                tree = ast.walk(ast.parse(path.read_text()))
                strings = {node.value for node in tree if isinstance(node, ast.Constant)}
                assert not strings & known, path


call_p = core.Primitive("my_call")
call_p.multiple_results = True


@call_p.def_impl
def run(*operands, body):
    return core.jaxpr_as_fun(body)(*operands)


call_p.def_abstract_eval(lambda *_, body: [variable.aval for variable in body.jaxpr.outvars])
mlir.register_lowering(call_p, mlir.lower_fun(run, multiple_results=True))


def my_call(function):
    def call(*operands):
        return call_p.bind(*operands, body=jax.make_jaxpr(function)(*operands))[0]

    return call


def model(call, w, batches):
    """A weight that a loop doesn't change, through a call, in the loop."""

    def step(total, x):
        return total + jnp.square(call(jnp.dot)(x, w)).mean(), None

    return jax.lax.scan(step, 0.0, batches)[0]


def added(monkeypatch):
    def read(equation):
        return Flow(Kind.CALL, [equation.params["body"]], lambda function: function)

    monkeypatch.setattr(control_flow, "FLOWS", {**FLOWS, "my_call": read})


def test_one_entry_is_all_that_a_primitive_needs(monkeypatch):
    ours, plain = (functools.partial(model, call) for call in (my_call, lambda f: f))
    (site,) = fp8jax.fp8(ours, recipes.current()).explain(W, X).sites
    assert not site.selected and site.reason == "inside my_call, which is left as it is"
    added(monkeypatch)
    results = []
    for function in (ours, plain):
        fp8_function = fp8jax.fp8(function, recipes.delayed())
        (site,) = fp8_function.explain(W, X).sites
        assert site.selected and site.weight == "rhs"
        run = jax.jit(jax.value_and_grad(fp8_function, argnums=(0, 1)))
        results.append(run(fp8_function.init(W, X), W, X))
    jax.tree.map(np.testing.assert_array_equal, *results)
    assert not np.array_equal(results[0][1][1], jax.grad(plain)(W, X))  # some FP8 it is


def test_weights_are_cast_in_front_of_a_loop_and_codes_followed_into_it(monkeypatch):
    added(monkeypatch)
    ours, plain = (functools.partial(model, call) for call in (my_call, lambda f: f))
    assert count_casts(ours) == count_casts(plain) > 0
    coded = fp8jax.quantize(W)
    got = fp8jax.fp8(ours, recipes.weight_only())({}, coded, X)
    np.testing.assert_array_equal(got, fp8jax.fp8(plain, recipes.weight_only())({}, coded, X))


def count_casts(function):
    """Conversions to bytes in front of the loop."""
    fp8_function = fp8jax.fp8(function, recipes.delayed())
    jaxpr = jax.make_jaxpr(fp8_function)(fp8_function.init(W, X), W, X)
    outside = (one for one in jaxpr.eqns if one.primitive.name != "scan")
    within = (
        inner
        for one in outside
        for body in _shims.jaxprs_in(one.params)
        for inner in equations(body)
    )
    return sum(one.params.get("new_dtype") == jnp.uint8 for one in (*jaxpr.eqns, *within))


def test_what_jax_evaluates_again_is_entered():
    """A function traced before, which newer JAX calls by a primitive of its own."""
    traced = jax.jit(jnp.dot).trace(X[0], W)
    again = fp8jax.fp8(lambda w, x: traced(x, w), recipes.current())
    (site,) = again.explain(W, X[0]).sites
    assert site.selected
    plain = fp8jax.fp8(lambda w, x: jnp.dot(x, w), recipes.current())
    np.testing.assert_array_equal(again({}, W, X[0]), plain({}, W, X[0]))
    assert not np.array_equal(again({}, W, X[0]), jnp.dot(X[0], W))
