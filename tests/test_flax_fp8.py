"""`interop.from_flax_fp8`: the histories of Flax's own FP8 operations become scales."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.linen import fp8_ops

import fp8jax
from fp8jax import interop, recipes

X = jax.random.normal(jax.random.key(0), (8, 16))


class Layer(nn.Module):
    op: type | None

    @nn.compact
    def __call__(self, x, _):
        return nn.relu(nn.Dense(16, dot_general_cls=self.op, name="dense")(x)), None


class Model(nn.Module):
    op: type | None

    @nn.compact
    def __call__(self, x):
        axes = {"params": 0, fp8_ops.OVERWRITE_WITH_GRADIENT: 0}
        x, _ = nn.scan(Layer, variable_axes=axes, split_rngs={"params": True}, length=2)(
            self.op, name="layers"
        )(x, None)
        return nn.Dense(4, dot_general_cls=self.op, name="head")(x)


@pytest.fixture(scope="module")
def trained():
    """Flax's state after three steps, larger inputs in each; and the params."""
    model = Model(fp8_ops.Fp8DirectDotGeneralOp)
    variables = jax.jit(model.init)(jax.random.key(1), X)

    @jax.jit
    def observe(variables, x):
        return jax.grad(lambda variables: model.apply(variables, x).sum())(variables)[
            fp8_ops.OVERWRITE_WITH_GRADIENT
        ]

    for factor in (1, 2, 4):
        variables = variables | {fp8_ops.OVERWRITE_WITH_GRADIENT: observe(variables, factor * X)}
    return variables


def test_scales_fit_the_histories(trained):
    state = trained[fp8_ops.OVERWRITE_WITH_GRADIENT]
    model = fp8jax.linen.Fp8(Model(None), recipes.delayed())
    fresh = jax.jit(model.init)(jax.random.key(1), X / 64)["fp8"]["scales"]
    scales = interop.from_flax_fp8(state, fresh)
    for site, module in (("head", state["head"]), ("layers/dense", state["layers"]["dense"])):
        (operation,) = module.values()
        for operand, name, format in (
            ("lhs", "input", fp8jax.E4M3),
            ("rhs", "kernel", fp8jax.E4M3),
            ("grad", "output_grad", fp8jax.E5M2),
        ):
            amax = np.asarray(operation[f"{name}_amax_history"], np.float64).max(-1)
            np.testing.assert_array_equal(
                getattr(scales[site], operand), np.ceil(np.log2(amax / format.max))
            )
    assert (scales["head"].lhs > fresh["head"].lhs).all() and jax.tree.structure(
        scales
    ) == jax.tree.structure(fresh)
    variables = {"params": trained["params"], "fp8": {"scales": scales}}
    got, want = (
        model.apply(variables, 4 * X),
        Model(None).apply({"params": trained["params"]}, 4 * X),
    )
    assert 0 < jnp.linalg.norm(got - want) < 0.1 * jnp.linalg.norm(want)
    # Scales of another batch would saturate: this is what the state is carried over for.
    spoilt = model.apply(variables | {"fp8": {"scales": fresh}}, 4 * X)
    assert jnp.linalg.norm(spoilt - want) > 0.3 * jnp.linalg.norm(want)


def test_what_flax_never_saw_or_could_not_hold_is_left(trained):
    node = fp8jax.SiteScales.zeros("head", recipes.delayed().delayed_casts).replace(
        rhs=jnp.float32(3)
    )
    histories = {
        "input_amax_history": jnp.array([jnp.inf, 448.0]),
        "kernel_amax_history": jnp.zeros(4),
        "output_grad_amax_history": jnp.array([jnp.nan]),
    }
    got = interop.from_flax_fp8({"head": {"op": histories}}, {"a": node, "b": jnp.ones(2)})
    assert (got["a"].lhs, got["a"].rhs, got["a"].grad) == (0, 3, 0)
    np.testing.assert_array_equal(got["b"], jnp.ones(2))


@pytest.mark.parametrize(
    "state, message",
    [
        (
            {"params": {"kernel": 1}},
            r"state must be the collection '_overwrite_with_gradient' .* got none of them in "
            r"\['params'\]",
        ),
        (
            {"mlp": {"op": {"input_amax_history": 0}}},
            r"scales must have the sites .* got none for mlp\. The sites are: head\. Take",
        ),
        (
            {"head": {"op": {"input_amax_history": jnp.ones((3, 8))}}},
            r"state must have the layers .* \[3\] for lhs of site 'head', whose scales are \[\]",
        ),
    ],
)
def test_errors(state, message):
    with pytest.raises(ValueError, match=message):
        interop.from_flax_fp8(
            state, fp8jax.SiteScales.zeros("head", recipes.delayed().delayed_casts)
        )
