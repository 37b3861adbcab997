"""Parameter trees with FP8 leaves."""

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from fp8jax import (
    E5M2,
    BlockWise,
    Fp8Tensor,
    PerChannel,
    PerTensor,
    PerToken,
    WeightRule,
    dequantize_params,
    quantize_params,
)
from fp8jax._params import abstract_params, named_leaves

RNG = np.random.default_rng(0)
X = jnp.ones((2, 2))


def tree():
    return {
        "blocks": {
            "up": {
                "kernel": RNG.normal(size=(3, 8, 16)).astype(np.float32)
                * np.array([1, 50, 4e3], np.float32)[:, None, None]
            }
        },
        "head": {
            "kernel": RNG.normal(size=(8, 6)).astype(np.float32),
            "bias": np.zeros(6, np.float32),
        },
        "step": np.int32(4),
    }


def expected_scale(x, axes):
    """The power of two, rounded up, by which the amax over `axes` fits into E4M3; in float64."""
    amax = np.abs(x.astype(np.float64)).max(axis=axes, keepdims=axes is not None)
    return np.exp2(np.ceil(np.log2(amax / 448)))


@pytest.mark.parametrize(
    "scaling, axes", [(PerTensor(), None), (PerChannel(-1), (0,)), (PerToken(), (1,))]
)
@pytest.mark.parametrize("jitted", [False, True])
def test_codes_are_those_of_ml_dtypes(scaling, axes, jitted):
    params = tree()
    rules = [WeightRule("head/kernel", scaling)]
    run = (
        (lambda p: quantize_params(p, rules))
        if not jitted
        else jax.jit(lambda p: quantize_params(p, rules))
    )
    quantized = run(params)
    got, x = quantized["head"]["kernel"], params["head"]["kernel"]
    scale = expected_scale(x, axes)
    codes = (x / scale).astype(np.float32).astype(ml_dtypes.float8_e4m3fn)
    assert np.array_equal(np.asarray(got.data).view(np.uint8), codes.view(np.uint8))
    assert np.array_equal(np.asarray(got.scale, np.float64), scale)
    assert np.array_equal(quantized["head"]["bias"], params["head"]["bias"])
    assert isinstance(quantized["blocks"]["up"]["kernel"], (np.ndarray, jax.Array))
    dense = dequantize_params(quantized)["head"]["kernel"]
    assert np.array_equal(dense, (codes.astype(np.float64) * scale).astype(np.float32))
    assert dequantize_params(quantized, jnp.bfloat16)["head"]["kernel"].dtype == jnp.bfloat16


def test_stacked_layers_have_scales_of_their_own_and_scan_slices_them():
    params = tree()
    x = params["blocks"]["up"]["kernel"]
    q = quantize_params(params, [WeightRule("blocks/.*", PerTensor(), stacked=1)])["blocks"]["up"][
        "kernel"
    ]
    assert np.array_equal(q.scale, [expected_scale(layer, None) for layer in x])
    _, layers = jax.lax.scan(lambda _, layer: (None, layer.dequantize()), None, q)
    assert np.array_equal(layers, q.dequantize())
    blocks = quantize_params(params, [WeightRule("blocks/.*", BlockWise((4, 8)), stacked=1)])[
        "blocks"
    ]["up"]["kernel"]
    assert blocks.scale.shape == (3, 2, 2)


def test_first_rule_wins_and_formats_are_kept():
    rules = [WeightRule("head/kernel", None), WeightRule(".*kernel", PerChannel(-1), "E5M2")]
    quantized = quantize_params(tree(), rules)
    assert not isinstance(quantized["head"]["kernel"], Fp8Tensor)
    assert quantized["blocks"]["up"]["kernel"].format == E5M2


def test_abstract_trees_match_concrete_ones():
    params, rules = tree(), [WeightRule(".*kernel", BlockWise((4, 4)))]
    abstract = quantize_params(jax.eval_shape(lambda: jax.tree.map(jnp.asarray, params)), rules)
    concrete = quantize_params(params, rules)
    assert jax.tree.structure(abstract) == jax.tree.structure(concrete)
    shapes = lambda t: jax.tree.map(lambda leaf: (jnp.shape(leaf), jnp.result_type(leaf)), t)
    assert shapes(abstract) == shapes(concrete)
    assert (
        shapes(dequantize_params(abstract)) == shapes(params) == shapes(abstract_params(concrete))
    )


@pytest.mark.parametrize(
    "scaling, spec, scale_spec",
    [
        (PerChannel(-1), P("a", "b"), P(None, "b")),
        (PerTensor(), P("a", "b"), P()),
        (BlockWise((4, 8)), P("a", "b"), P("a", "b")),
        (BlockWise((8, 8)), P(None, ("a", "b")), P(None, None)),
        (PerToken(), P(("a", "b"), None), P(("a", "b"), None)),
    ],
)
@pytest.mark.parametrize("abstract", [False, True])
def test_sharded_weights_stay_sharded_with_their_scales(scaling, spec, scale_spec, abstract):
    mesh = jax.make_mesh((2, 2), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    sharding = NamedSharding(mesh, spec)
    x = RNG.normal(size=(8, 16)).astype(np.float32)
    leaf = (
        jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
        if abstract
        else jax.device_put(x, sharding)
    )
    q = quantize_params({"w": leaf}, [WeightRule("w", scaling)])["w"]
    assert q.data.sharding.is_equivalent_to(sharding, 2)
    assert q.scale.sharding.is_equivalent_to(NamedSharding(mesh, scale_spec), q.scale.ndim)
    dense = dequantize_params({"w": q})["w"]
    assert dense.sharding.is_equivalent_to(sharding, 2)
    if not abstract:
        here = quantize_params({"w": x}, [WeightRule("w", scaling)])["w"]
        assert np.array_equal(
            np.asarray(q.data).view(np.uint8), np.asarray(here.data).view(np.uint8)
        )
        assert np.array_equal(q.scale, here.scale)


def test_nnx_states_have_plain_paths():
    model = nnx.Linear(4, 8, rngs=nnx.Rngs(0))
    graph, state = nnx.split(model)
    quantized = quantize_params(state, [WeightRule("kernel", PerChannel(-1))])
    assert [path for path, _ in named_leaves(state)[0]] == ["bias", "kernel"]
    dense = nnx.merge(graph, dequantize_params(quantized))
    assert (
        np.abs(dense.kernel[...] - model.kernel[...]).max() < 0.04 * np.abs(model.kernel[...]).max()
    )


@flax.struct.dataclass
class Pair:
    """A field that is called like what Flax's boxes hold."""

    key: jax.Array
    value: jax.Array


@pytest.mark.parametrize(
    "tree, paths",
    [
        (Pair(X, X), ["key", "value"]),
        ({"a": [Pair(X, {"w": X})]}, ["a/0/key", "a/0/value/w"]),
        ({"w": nn.Partitioned(X, (None, "m"))}, ["w"]),
        (Pair(nn.LogicallyPartitioned(X, (None, "m")), nnx.Param(X)), ["key", "value"]),
        (nnx.Param(X), [""]),
        ({"k": nnx.Param(Pair(X, X))}, ["k/key", "k/value"]),
    ],
)
def test_only_the_boxes_are_left_out_of_paths(tree, paths):
    assert [path for path, _ in named_leaves(tree)[0]] == paths


@pytest.mark.parametrize("of", [lambda model: model, nnx.state], ids=["module", "state"])
def test_modules_that_are_called_value_are_found(of):
    quantized = quantize_params(
        of(nnx.MultiHeadAttention(2, 16, decode=False, rngs=nnx.Rngs(0))), [WeightRule(".*/kernel")]
    )
    found = {path for path, leaf in named_leaves(quantized)[0] if isinstance(leaf, Fp8Tensor)}
    assert found == {f"{name}/kernel" for name in ("key", "out", "query", "value")}


@pytest.mark.parametrize(
    "rules, error, text",
    [
        (
            [WeightRule("kernel")],
            ValueError,
            r"must match the path of a leaf; got 'kernel', .*'blocks/up/kernel'.*start them with",
        ),
        ([WeightRule("step")], TypeError, "leaf 'step' must be floating.*got int32"),
        (
            [WeightRule(".*bias", BlockWise((2, 2)))],
            ValueError,
            r"must fit leaf 'head/bias'; got BlockWise.*float32\[6\]",
        ),
        (
            [WeightRule(".*bias", stacked=2)],
            ValueError,
            "leave leaf 'head/bias' its axes; got 2 for rank 1",
        ),
        (["kernel"], TypeError, "rules must be a sequence of WeightRule; got 'kernel'"),
        (WeightRule(".*"), TypeError, r"got WeightRule\(.*\) itself. Write \[fp8jax.WeightRule"),
    ],
)
def test_bad_rules_say_what_is_wrong(rules, error, text):
    with pytest.raises(error, match=text):
        quantize_params(tree(), rules)


def test_bad_rules_are_refused_when_made():
    for arguments, error, text in [
        (("(",), ValueError, "pattern must be a regular expression"),
        ((".*", 3), TypeError, "scaling must be a granularity"),
        ((".*", PerTensor(), "E8M0"), ValueError, "format must hold values"),
        ((".*", PerTensor(), "E4M3", -1), ValueError, "stacked must be a number of leading axes"),
    ]:
        with pytest.raises(error, match=text):
            WeightRule(*arguments)
    quantized = quantize_params(tree(), [WeightRule("head/kernel")])
    with pytest.raises(TypeError, match="'head/kernel' must not be quantized yet"):
        quantize_params(quantized, [WeightRule("head/kernel")])
