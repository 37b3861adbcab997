"""Names of sites: by scope and weight, whatever else is traced, so that each entry of a model finds
its own scales.
"""

import collections
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fp8jax
from fp8jax import recipes
from fp8jax._transform.names import Namer, Weight
from fp8jax.linen import Fp8

X = jax.random.normal(jax.random.key(0), (4, 8))
W = jax.random.normal(jax.random.key(1), (8, 8))
PARAMS = {"layers": [{"a": W, "b": 2.0 * W}, {"a": 4.0 * W, "b": 8.0 * W}], "head": 16.0 * W}


def names_of(fn, *args, **options) -> list[str]:
    return [site.name for site in fp8jax.fp8(fn, recipes.delayed(), **options).explain(*args).sites]


def loss(params, x):
    for layer in params["layers"]:
        with jax.named_scope("mlp"):
            x = jnp.tanh(x @ layer["a"]) @ layer["b"]
    return (x @ params["head"]).sum()


def backwards(params, x):
    """The same products in another order, and not all of them."""
    x = x @ params["head"]
    with jax.named_scope("mlp"):
        x = (x @ params["layers"][1]["b"]) @ params["layers"][0]["b"]
    return x.sum()


def test_plain_functions_name_products_by_weight():
    assert names_of(loss, PARAMS, X) == [
        "mlp:layers/0/a",
        "mlp:layers/0/b",
        "mlp:layers/1/a",
        "mlp:layers/1/b",
        "head",
    ]
    assert names_of(backwards, PARAMS, X) == ["head", "mlp:layers/1/b", "mlp:layers/0/b"]


def test_two_entries_over_one_tree_find_their_own_scales():
    scales = fp8jax.fp8(loss, recipes.delayed()).init(PARAMS, X)
    _, observed = fp8jax.fp8(backwards, recipes.delayed()).observe(scales, PARAMS, X)
    for name, weight in (
        ("head", PARAMS["head"]),
        ("mlp:layers/0/b", 2.0 * W),
        ("mlp:layers/1/b", 8.0 * W),
    ):
        assert float(observed[name].rhs) == float(jnp.abs(weight).max())
        assert float(scales[name].rhs) == float(jnp.ceil(jnp.log2(jnp.abs(weight).max() / 448)))
    assert not observed["mlp:layers/0/a"].rhs and not observed["mlp:layers/1/a"].rhs


STACKED = {"layers": {"up": jnp.stack([W, W]), "down": jnp.stack([W, W])}}
CASES = {
    "a weight used twice is counted": (
        lambda p, x: (x @ p["head"]) @ p["head"].T,
        ["head", "head#1"],
    ),
    "data by data": (lambda p, x: (x @ x.T) @ (x @ p["head"]), ["data", "head", "data#1"]),
    "weights by weights": (
        lambda p, x: x @ (p["head"] @ p["layers"][0]["a"]),
        ["weights", "weights#1"],
    ),
    "the largest of several": (
        lambda p, x: (
            x @ (p["layers"][0]["b"][:2].sum(0, keepdims=True) * p["head"] + p["layers"][0]["a"])
        ),
        ["head"],
    ),
    "stacked by the function": (
        lambda p, x: jax.lax.scan(
            lambda x, w: (x @ w, None), x, jnp.stack([layer["b"] for layer in p["layers"]])
        )[0],
        ["layers/0/b"],
    ),
    "through a loop's carry": (
        lambda p, x: jax.lax.fori_loop(0, 2, lambda _, c: (c[0], c[1] @ c[0]), (p["head"], x))[1],
        ["head"],
    ),
    "through cond and jit": (
        lambda p, x: jax.lax.cond(
            x[0, 0] > 0, lambda w: jax.jit(jnp.matmul)(x, w), lambda w: x @ w.T, p["head"]
        ),
        ["head", "head#1"],
    ),
    "a scope inside the weight's": (
        lambda p, x: jax.named_call(
            lambda: jax.named_call(lambda: x @ p["layers"][0]["a"], name="0")(), name="layers"
        )(),
        ["layers/0/a"],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_name(case):
    fn, names = CASES[case]
    assert names_of(fn, PARAMS, X) == names


def test_stacked_layers_go_by_the_stacked_weight():
    def fn(p, x):
        return jax.lax.scan(
            lambda x, layer: (jnp.tanh(x @ layer["up"]) @ layer["down"], None), x, p["layers"]
        )[0]

    assert names_of(fn, STACKED, X) == ["layers/up", "layers/down"]


def test_several_arguments_with_weights_go_by_their_names():
    fn = lambda x, w, v: x @ w + x @ v["a"]
    assert names_of(fn, X, W, {"a": W}, weights=(1, 2)) == ["w", "v/a"]
    assert names_of(lambda x, v: x @ v["a"], X, {"a": W}, weights=1) == ["a"]


def test_the_products_of_an_inner_gradient_are_told_apart():
    """The forward ones keep their names; whether the others are traced depends on what is
    differentiated.
    """
    plain = lambda p, x: (jnp.tanh(x @ p["head"]) @ p["layers"][0]["a"]).sum()
    of_both = names_of(
        lambda p, x: jax.tree.map(jnp.sum, jax.grad(plain, argnums=(0, 1))(p, x)), PARAMS, X
    )
    of_inputs = names_of(lambda p, x: jax.grad(plain, argnums=1)(p, x), PARAMS, X)
    assert (
        set(of_inputs) == {"head", "layers/0/a", "head/transpose", "layers/0/a/transpose"}
        and len(of_inputs) <= 4
    )
    assert set(of_inputs) <= set(of_both) and set(of_both) - set(of_inputs) <= {
        "data/transpose",
        "data/transpose#1",
    }
    checkpointed = names_of(
        lambda p, x: jax.grad(jax.checkpoint(plain), argnums=1)(p, x), PARAMS, X
    )
    assert {"head", "head/remat", "head/transpose", "layers/0/a/transpose"} <= set(checkpointed)
    tangents = names_of(lambda p, x: jax.jvp(lambda x: plain(p, x), (x,), (x,)), PARAMS, X)
    assert tangents == ["head", "head#1", "layers/0/a", "layers/0/a#1"]


class Raw(nn.Module):
    """Two products of parameters of its own in one scope, and methods that reach one each."""

    def setup(self):
        self.a = self.param("a", nn.initializers.normal(1.0), (8, 8))
        self.b = self.param("b", nn.initializers.normal(9.0), (8, 8))
        self.out = nn.Dense(4)

    def __call__(self, x):
        return self.out(self.second(self.first(x)))

    def first(self, x):
        return x @ self.a

    def second(self, x):
        return x @ self.b


class Outer(nn.Module):
    @nn.compact
    def __call__(self, x):
        table = nn.Embed(8, 8, name="embed")
        return table.attend(Raw(name="raw")(x)[:, :1] * x)


@pytest.mark.parametrize("module", [Raw(), Outer()], ids=["alone", "inside"])
def test_parameters_of_a_linen_module(module):
    model = Fp8(module, recipes.delayed())
    variables = jax.eval_shape(model.init, jax.random.key(0), X)
    want = (
        {"a", "b", "out"}
        if isinstance(module, Raw)
        else {"raw/a", "raw/b", "raw/out", "embed/embedding"}
    )
    assert (
        set(variables["fp8"]["scales"])
        == want
        == {site.name for site in model.explain(variables, X).sites}
    )


def test_a_method_that_reaches_only_the_second_product_takes_its_scales():
    model = Fp8(Raw(), recipes.delayed())
    variables = model.init(jax.random.key(0), X)
    observed = jax.jit(jax.grad(lambda v: model.apply(v, X, method="second").sum()))(variables)[
        "fp8"
    ]["scales"]
    assert (
        float(observed["b"].rhs) == float(jnp.abs(variables["params"]["b"]).max())
        and not observed["a"].rhs
    )


class Tied(nn.Module):
    """A wrapped head that reads the embedding outside of it, beside a parameter of its own by the
    same name.
    """

    @nn.compact
    def __call__(self, x):
        return Fp8(Head(nn.Embed(8, 8, name="embed"), name="head"), recipes.delayed())(x)


class Head(nn.Module):
    table: nn.Module

    @nn.compact
    def __call__(self, x):
        return nn.Dense(8, name="embed")(self.table.attend(x)) @ self.param(
            "own", nn.initializers.normal(), (8, 8)
        )


def test_a_weight_from_outside_of_the_wrapper():
    variables = jax.eval_shape(Tied().init, jax.random.key(0), X)
    assert "embed" in variables["params"] and sorted(variables["fp8"]["head"]["scales"]) == sorted(
        node.site for node in variables["fp8"]["head"]["scales"].values()
    )
    names = sorted(variables["fp8"]["head"]["scales"])
    assert len(names) == 3 and "head/own" in names and not any("#" in name for name in names)


def test_weights_that_a_short_name_would_confuse_go_by_their_whole_path():
    """Two leaves that might both add nothing to the scope: a layer is called by its kernel."""
    params = {"mlp": {"kernel": W, "embedding": W}}

    def fn(params, x):
        with jax.named_scope("mlp"):
            return (x @ params["mlp"]["embedding"]) @ params["mlp"]["kernel"]

    assert names_of(fn, params, X) == ["mlp/embedding", "mlp"]


def weight(path: str) -> Weight:
    return Weight.at(tuple(map(jax.tree_util.DictKey, path.split("/"))), 1, 0)


def test_no_two_weights_and_scopes_have_one_name():
    """But for scopes that say no more than the weight's path; so no name has to be told apart by
    what else there is.
    """
    paths = [
        "/".join(path)
        for length in (1, 2, 3)
        for path in itertools.product(("a", "data", "dot", "kernel", "a#1", "a:a"), repeat=length)
        if "kernel" not in path[:-1]
    ]
    named, scopes = (
        collections.defaultdict(set),
        ["", "a", "a/a", "a/data", "dot", "a:a"],
    )
    for scope in scopes:
        named[Namer()(scope, "data")].add((scope, "data"))
        for path in paths:
            within = not scope or f"{path}/".startswith(f"{scope}/")
            name, path = Namer()(scope, weight(path)), path.removesuffix("kernel").rstrip("/")
            named[name].add(path if within else (scope, path))
    assert len(named) > 100 and not [found for found in named.values() if len(found) > 1]


def test_a_weight_that_something_small_or_a_product_is_added_to_still_names_the_product():
    lora = {"w": W, "a": W[:, :2], "b": W[:2], "bias": W[0]}
    assert (
        names_of(lambda p, x: x @ (p["w"] + p["a"] @ p["b"] + p["bias"][None]), lora, X)[1] == "w"
    )
    sums = lambda p, x: jax.lax.fori_loop(0, 3, lambda _, w: w @ p["w"] + p["bias"][None], p["w"])
    assert names_of(lambda p, x: x @ sums(p, x), lora, X)[1:] == ["weights#1"]


def test_a_weight_may_be_called_like_a_counted_site():
    names = names_of(
        lambda params, x: x @ params["w"] @ params["w"] @ params["w#1"], {"w": W, "w#1": W}, X
    )
    assert len(set(names)) == 3 and names == ["w", "w#1", "w%231"]


class Node(nn.Module):
    """A compact module of parts: layers, parameters of its own, and modules like it."""

    parts: tuple

    @nn.compact
    def __call__(self, x):
        for kind, name, inner in self.parts:
            if kind == "dense":
                x = nn.Dense(8, name=name)(x)
            elif kind == "param":
                x = x @ self.param(name, nn.initializers.ones, (8, 8))
            else:
                x = Node(inner, name=name)(x)
        return x


NAMES = st.sampled_from(["Dense_0", "Dense_1", "Router_0", "kernel", "data", "a"])


def trees(parts):
    inner = st.one_of(
        st.tuples(st.sampled_from(["dense", "param"]), NAMES, st.just(())),
        st.tuples(st.just("node"), NAMES, parts),
    )
    return st.lists(inner, min_size=1, max_size=3, unique_by=lambda part: part[1]).map(tuple)


LEAVES = st.lists(
    st.tuples(st.sampled_from(["dense", "param"]), NAMES, st.just(())),
    min_size=1,
    max_size=3,
    unique_by=lambda part: part[1],
).map(tuple)


def without(parts, path=()):
    """The trees that lack one part, each with the path of that part."""
    for index, (kind, name, inner) in enumerate(parts):
        yield (*path, name), (*parts[:index], *parts[index + 1 :])
        for gone, rest in without(inner, (*path, name)):
            yield gone, (*parts[:index], (kind, name, rest), *parts[index + 1 :])


@settings(max_examples=15, deadline=None)
@given(st.recursive(LEAVES, trees, max_leaves=6))
def test_names_are_the_same_with_and_without_any_other_part(parts):
    def sites_of(parts):
        module = Node(parts)
        params = jax.eval_shape(module.init, jax.random.key(0), X)
        return Fp8(module, recipes.delayed()).explain(params, X).sites if params else ()

    def paths_of(parts, path=()):
        for kind, name, inner in parts:
            yield from paths_of(inner, (*path, name)) if kind == "node" else [(*path, name)]

    whole = dict(zip(paths_of(parts), (site.name for site in sites_of(parts)), strict=True))
    assert len(set(whole.values())) == len(whole)
    for gone, rest in itertools.islice(without(parts), 6):
        left = dict(zip(paths_of(rest), (site.name for site in sites_of(rest)), strict=True))
        assert left == {path: name for path, name in whole.items() if path[: len(gone)] != gone}


class WithHead(nn.Module):
    """The root has a layer of the name that an inner one has."""

    has_head: bool

    @nn.compact
    def __call__(self, x):
        x = Node((("node", "Router_0", (("dense", "Dense_0", ()),)),), name="block")(x)
        return nn.Dense(4)(x) if self.has_head else x


def test_scales_carry_over_when_a_model_gets_a_head_and_rules_mean_both():
    with_head, without_head = (
        Fp8(WithHead(has_head), recipes.delayed()).init(jax.random.key(0), X)["fp8"]["scales"]
        for has_head in (True, False)
    )
    assert set(without_head) == {"block/Router_0/Dense_0"} < set(with_head)
    fp8jax.migrate_scales(without_head, with_head)
    model = Fp8(WithHead(True), recipes.current(), rules=(fp8jax.Rule(".*/Dense_0", None),))
    params = jax.eval_shape(WithHead(True).init, jax.random.key(0), X)
    assert [site.selected for site in model.explain(params, X).sites] == [False, True]


class LearnedQuery(nn.Module):
    learned: str

    @nn.compact
    def __call__(self, x):
        query = self.param("query", nn.initializers.normal(), (64, 8))
        query = {"parameters": query, "constant": jnp.ones((64, 8)), "data": x}[self.learned]
        query = nn.Dense(8, name="q")(nn.Dense(8, name="before")(query))
        return nn.Dense(8, name="o")(jax.nn.softmax(query @ nn.Dense(8, name="k")(x).T) @ x)


@pytest.mark.parametrize("learned", ["parameters", "constant", "data"])
def test_a_learned_query_leaves_all_names_to_what_they_are_of(learned):
    """The projection's is its layer's; the attention product's not that of a weight, since it reads
    a product of some.
    """
    module = LearnedQuery(learned)
    params = jax.eval_shape(module.init, jax.random.key(0), X)
    names = [site.name for site in Fp8(module, recipes.delayed()).explain(params, X).sites]
    scores = ["data", "data#1"] if learned == "data" else ["weights", "data"]
    assert names == ["before", "q", "k", *scores, "o"]
