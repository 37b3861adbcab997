"""Checkpoints: the same bits back, on any mesh; FP8 models from unquantized ones and back; refusals
that say what differs.
"""

import functools
import json
import pathlib
import re
import zlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from tiers import thorough_but

import fp8jax
from fp8jax import checkpoint, recipes
from fp8jax._recipe import OPERANDS
from fp8jax._state import find_stacks
from fp8jax.optim._rows import rows_of

RECIPE = recipes.delayed()
X = jnp.linspace(-1, 1, 8 * 16).reshape(8, 16)


class Model(nn.Module):
    """Two layers."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(4, name="head")(nn.tanh(nn.Dense(32, name="up")(x)))


ADAM = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
FP8_ADAM = fp8jax.with_delayed_scaling(ADAM)


def fp8_model(recipe=RECIPE, rules=()):
    return fp8jax.linen.Fp8(Model(), recipe, rules)


@functools.cache
@jax.numpy_dtype_promotion("standard")  # for optax
def begin(model, tx, run=lambda start, key: jax.jit(start)(key)):
    def start(key):
        variables = model.init(key, X)
        return variables, tx.init(variables)

    variables, optimizer = run(start, jax.random.key(0))
    return {"step": 0, "variables": variables, "optimizer": optimizer}


@functools.cache
def step_of(model, tx):
    @jax.jit
    def step(variables, optimizer):
        loss, gradients = jax.value_and_grad(lambda v: jnp.square(model.apply(v, X) - 1).mean())(
            variables
        )
        updates, optimizer = tx.update(gradients, optimizer, variables)
        return optax.apply_updates(variables, updates), optimizer, loss

    return step


@jax.numpy_dtype_promotion("standard")
def trained(model, tx, state, steps=3):
    """The state after some steps, and their losses."""
    variables, optimizer, losses = state["variables"], state["optimizer"], []
    for _ in range(steps):
        variables, optimizer, loss = step_of(model, tx)(variables, optimizer)
        losses.append(float(loss))
    return {"step": state["step"] + steps, "variables": variables, "optimizer": optimizer}, losses


@pytest.fixture(scope="module")
def fp8_state():
    return trained(fp8_model(), FP8_ADAM, begin(fp8_model(), FP8_ADAM))[0]


@pytest.fixture
def manager(tmp_path):
    with ocp.CheckpointManager(tmp_path / "run") as manager:
        yield manager


def save(manager, step, state, **options):
    assert checkpoint.save(manager, step, state, **options)
    manager.wait_until_finished()


def zeros_like(tree):
    return jax.tree.map(
        lambda leaf: jnp.zeros_like(leaf) if isinstance(leaf, jax.Array) else 0, tree
    )


def assert_same(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    jax.tree.map(np.testing.assert_array_equal, got, want)


def test_the_same_bits_come_back_and_the_run_goes_on_as_it_would_have(manager, fp8_state):
    explanation = fp8_model().explain(fp8_state["variables"], X)
    save(manager, 3, fp8_state, explanation=explanation)
    got = checkpoint.restore(manager, zeros_like(fp8_state), explanation=explanation)
    assert_same(got, fp8_state)
    assert got["step"] == 3
    assert_same(trained(fp8_model(), FP8_ADAM, got), trained(fp8_model(), FP8_ADAM, fp8_state))


def test_onto_other_meshes(manager, fp8_state):
    def on(mesh_shape, axis):
        mesh = jax.make_mesh(mesh_shape, ("data", "model"))

        def place(leaf):
            if not isinstance(leaf, jax.Array):
                return leaf
            divided = leaf.ndim > 1 and leaf.shape[-1] % mesh.shape[axis] == 0
            return NamedSharding(mesh, P(*(None,) * (leaf.ndim - 1), axis) if divided else P())

        return lambda tree: jax.tree.map(place, tree)

    def put(leaf, sharding):
        return jax.device_put(leaf, sharding) if isinstance(leaf, jax.Array) else leaf

    save(manager, 0, jax.tree.map(put, fp8_state, on((8, 1), "data")(fp8_state)))
    for shardings in (on((4, 2), "model")(fp8_state), on((1, 4), "model")(fp8_state)):
        like = jax.tree.map(
            lambda leaf, at: (
                jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=at)
                if isinstance(leaf, jax.Array)
                else leaf
            ),
            fp8_state,
            shardings,
        )
        got = checkpoint.restore(manager, like)
        assert_same(got, fp8_state)
        jax.tree.map(
            lambda leaf, at: (
                leaf.sharding == at or pytest.fail(f"{leaf.sharding} {at}")
                if isinstance(leaf, jax.Array)
                else None
            ),
            got,
            shardings,
        )
    assert any(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(got["variables"]))


@pytest.mark.parametrize("by_orbax_alone", [False, True])
def test_from_unquantized_to_fp8_and_back(manager, fp8_state, by_orbax_alone):
    plain, _ = trained(Model(), ADAM, begin(Model(), ADAM))
    if by_orbax_alone:
        with ocp.CheckpointManager(manager.directory) as other:
            other.save(1, args=ocp.args.Composite(state=ocp.args.StandardSave(plain)))
        manager.reload()
    else:
        save(manager, 1, plain)
    like = begin(fp8_model(), FP8_ADAM)
    with pytest.raises(
        ValueError,
        match=r"must hold the FP8 state of 2 site\(s\); got none in step 1 of .*run\. Pass "
        r"fresh_scales=True",
    ):
        checkpoint.restore(manager, like)
    got = checkpoint.restore(manager, like, fresh_scales=True)
    assert jax.tree.structure(got) == jax.tree.structure(like)
    assert_same(got["variables"]["params"], plain["variables"]["params"])
    assert_same(got["variables"]["fp8"], like["variables"]["fp8"])
    assert_same(jax.tree.leaves(got["optimizer"].inner), jax.tree.leaves(plain["optimizer"]))
    assert_same(got["optimizer"].scaling, like["optimizer"].scaling)
    # It trains on from there, and what it comes to goes back.
    further, losses = trained(fp8_model(), FP8_ADAM, got)
    np.testing.assert_allclose(losses, trained(Model(), ADAM, plain)[1], rtol=0.02)
    save(manager, 2, further)
    back = checkpoint.restore(manager, zeros_like(plain))
    assert_same(back["variables"]["params"], further["variables"]["params"])
    assert_same(jax.tree.leaves(back["optimizer"]), jax.tree.leaves(further["optimizer"].inner))
    assert jax.tree.structure(back) == jax.tree.structure(plain)


def test_fresh_scales_change_the_recipe(manager, fp8_state):
    save(manager, 1, fp8_state)
    other = recipes.delayed(history_window=4)
    like = begin(fp8_model(other), FP8_ADAM)
    got = checkpoint.restore(manager, like, fresh_scales=True)
    assert_same(got["variables"], fp8_state["variables"] | {"fp8": like["variables"]["fp8"]})
    assert_same(got["optimizer"].scaling, like["optimizer"].scaling)


@pytest.mark.filterwarnings("ignore:Sharding info not provided")
def test_orbax_alone_reads_the_state(manager, fp8_state):
    save(manager, 1, fp8_state, others={"note": ocp.args.JsonSave({"by": "test"})})
    got = manager.restore(
        1, args=ocp.args.Composite(state=ocp.args.PyTreeRestore(), note=ocp.args.JsonRestore())
    )
    assert_same(got.state["variables"]["params"], fp8_state["variables"]["params"])
    assert got.note == {"by": "test"}


def test_fp8_arrays_and_many_kinds_of_leaves(manager):
    state = {
        "weights": fp8jax.quantize(X, scaling=fp8jax.BlockWise(8)),
        "host": np.arange(3),
        "rate": 0.5,
        "none": None,
        "bf16": X.astype(jnp.bfloat16),
    }
    save(manager, 0, state)
    got = checkpoint.restore(manager, state)
    assert_same(jax.tree.map(np.asarray, got), jax.tree.map(np.asarray, state))
    assert isinstance(got["host"], np.ndarray) and isinstance(got["rate"], float)
    assert got["weights"].scaling == state["weights"].scaling


def changed(state, function):
    return {
        **state,
        "variables": {**state["variables"], "params": function(dict(state["variables"]["params"]))},
    }


@pytest.mark.parametrize(
    "change, lines",
    [
        (
            lambda: fp8_model(recipes.delayed(backward=fp8jax.E4M3)),
            [
                r"2 difference\(s\), checkpoint first:",
                r"site 'head': grad\.cast\.format is 'E5M2', not 'E4M3'",
            ],
        ),
        (
            lambda: fp8_model(recipes.delayed(margin=2.0, history_window=4)),
            [
                r"12 difference",
                r"site 'head': grad\.cast\.delayed\.margin is 1\.0, not 2\.0",
                "and 4 more",
            ],
        ),
        (
            lambda: fp8_model(rules=(fp8jax.Rule("head", None),)),
            [r"1 difference", "site 'head': only in the checkpoint"],
        ),
    ],
    ids=["format", "margin", "rule"],
)
def test_another_recipe_or_rule_is_refused_with_what_differs(manager, fp8_state, change, lines):
    save(manager, 7, fp8_state)
    like = begin(change(), FP8_ADAM, jax.eval_shape)
    with pytest.raises(
        ValueError, match=r"the FP8 state in step 7 of .* must be that of the model"
    ) as error:
        checkpoint.restore(manager, like)
    for line in (*lines, "or pass fresh_scales=True"):
        assert re.search(line, str(error.value)), (line, str(error.value))


def test_recipes_without_state_are_held_against_each_other_too(manager):
    x, params = X, {"w": jnp.ones((16, 4))}
    of = {
        name: fp8jax.fp8(lambda p, x: (x @ p["w"]).sum(), recipe).explain(params, x)
        for name, recipe in (
            ("current", recipes.current()),
            ("native", recipes.current(execution="native")),
        )
    }
    save(manager, 0, params, explanation=of["current"])
    assert_same(checkpoint.restore(manager, params, explanation=of["current"]), params)
    with pytest.raises(ValueError, match=r"site 'w': execution is 'auto', not 'native'"):
        checkpoint.restore(manager, params, explanation=of["native"])


@pytest.mark.parametrize(
    "change, text",
    [
        (
            lambda params: params | {"head": {**params["head"], "bias": jnp.zeros(5)}},
            r"1 difference\(s\):\n  variables/params/head/bias: float32\[4\] in the checkpoint, "
            r"not float32\[5\]",
        ),
        (
            lambda params: (
                params | {"head": {**params["head"], "bias": jnp.zeros(4, jnp.bfloat16)}}
            ),
            r"not bfloat16\[4\]",
        ),
        (
            lambda params: params | {"tail": jnp.zeros(4)},
            "variables/params/tail: not in the checkpoint",
        ),
        (
            lambda params: {name: value for name, value in params.items() if name != "head"},
            r"2 difference\(s\):\n  variables/params/head/bias: only in the checkpoint",
        ),
    ],
    ids=["shape", "dtype", "missing", "surplus"],
)
def test_another_structure_is_refused_with_what_differs(manager, fp8_state, change, text):
    save(manager, 0, fp8_state)
    with pytest.raises(ValueError, match=text):
        checkpoint.restore(manager, changed(fp8_state, change))


def together(nodes):
    return {"scales": fp8jax.Scales.of(nodes.values())}


def elsewhere(nodes):
    return {"own": {"of": {name: {"its": node} for name, node in nodes.items()}}}


@pytest.mark.parametrize(
    "forms",
    thorough_but({"apart": (dict, together), "whole": (together, elsewhere)}, ["apart"]),
)
def test_scales_are_found_wherever_they_lie_and_their_amaxes_with_them(manager, forms):
    saved, like = forms
    flushed = recipes.delayed(flushed=True, history_window=3)
    of_sites = {"deep": (RECIPE, (3,)), "flat": (flushed, (2,)), "head": (RECIPE, ())}
    of_sites["a"] = of_sites["deep"]
    numbers, nodes = np.arange(100, dtype=np.float32), {}
    for name, (recipe, stack) in of_sites.items():
        node = fp8jax.SiteScales.zeros(name, recipe.delayed_casts, stack)
        numbers, own = numbers[node.seal.size :], numbers[: node.seal.size].reshape((*stack, 3))
        nodes[name] = node.replace(**{one: own[..., i] for i, one in enumerate(OPERANDS)})
    tx = fp8jax.with_delayed_scaling(optax.MultiSteps(optax.sgd(1e-2), 2))

    def state_of(form):
        """Each amax is told from the others by its operand's name."""
        trained = {"params": X, "fp8": form(nodes)}
        state = tx.init(trained)
        rows = rows_of(list(find_stacks(trained).values()))
        of_rows = [row.names(list(find_stacks(trained).values())) for row in rows]
        codes = [np.array([zlib.crc32(n.encode()) % 2**20 for n in names]) for names in of_rows]
        filled = [
            jax.tree.map(
                lambda leaf, code=code: np.broadcast_to(code, leaf.shape).astype(leaf.dtype), one
            )
            for one, code in zip(state.scaling.operands, codes, strict=True)
        ]
        scaling = state.scaling._replace(operands=tuple(filled))
        pending = tuple(code.astype(np.float32) for code in codes)
        state = state._replace(scaling=scaling, pending=pending)
        return jax.tree.map(jnp.asarray, {"trained": trained, "state": state})

    with jax.numpy_dtype_promotion("standard"):
        save(manager, 5, state_of(saved))
        want = state_of(like)
    assert_same(checkpoint.restore(manager, zeros_like(want)), want)


@pytest.mark.parametrize("form", [dict, together], ids=["apart", "together"])
def test_scales_without_the_number_of_uses_are_read(manager, form):
    """As they were written before they had it."""
    nodes = {
        name: fp8jax.SiteScales.zeros(name, RECIPE.delayed_casts, stack).replace(
            lhs=jnp.full(stack, exponent)
        )
        for name, stack, exponent in (("a", (2,), -3.0), ("b", (), 5.0))
    }
    before = {name: node.replace(uses=None) for name, node in nodes.items()}
    save(manager, 0, {"params": X, "fp8": before})
    want = {"params": X, "fp8": form(nodes)}
    assert_same(checkpoint.restore(manager, zeros_like(want)), want)


def test_states_of_some_scales_alone_are_not_moved(manager):
    nodes = {name: fp8jax.SiteScales.zeros(name, RECIPE.delayed_casts) for name in ("a", "b")}
    tx = fp8jax.optim.delayed_scaling()
    state = {name: tx.init(node) for name, node in nodes.items()}
    save(manager, 0, {"scales": nodes, "state": state})
    together = fp8jax.Scales.of(nodes.values())
    text = "must be of all scales in `like`, .*; got 2 of 4 rows at state/a/operands/0/amax_history"
    with pytest.raises(ValueError, match=text):
        checkpoint.restore(manager, {"scales": together, "state": state})
    text = r"must be as many as in `like`; got 2, not 1\. Pass a `like` of the optimizer"
    with pytest.raises(ValueError, match=text):
        checkpoint.restore(manager, {"scales": together, "state": tx.init(together)})


def test_missing_steps_items_and_newer_versions(manager, fp8_state):
    with pytest.raises(
        FileNotFoundError,
        match=r"step must be one that was saved in .*run; got None, and there are \[\]",
    ):
        checkpoint.restore(manager, fp8_state)
    save(manager, 0, fp8_state)
    with pytest.raises(FileNotFoundError, match=r"got 1, and there are \[0\]"):
        checkpoint.restore(manager, fp8_state, 1)
    with pytest.raises(
        FileNotFoundError,
        match=r"item must be one of step 0 .*; got 'params', and there are \['fp8', 'state'\]",
    ):
        checkpoint.restore(manager, fp8_state, item="params")
    abstract = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(jnp.shape(leaf), jnp.result_type(leaf)), fp8_state
    )
    with pytest.raises(
        TypeError, match=r"like must hold arrays for its FP8 state.* at optimizer/scaling"
    ):
        checkpoint.restore(manager, abstract, fresh_scales=True)
    (written,) = pathlib.Path(manager.directory).glob("0/fp8/*metadata*")
    written.write_text(json.dumps(json.loads(written.read_text()) | {"version": 2}))
    with pytest.raises(
        ValueError,
        match=r"must be of version 1; got 2 in step 0 of .*Read it with the version of fp8jax "
        r"that wrote it",
    ):
        checkpoint.restore(manager, fp8_state)


def test_a_site_twice_is_refused():
    scales = fp8jax.SiteScales.zeros("dot", recipes.delayed().delayed_casts)
    with pytest.raises(ValueError, match="each site once; got site 'dot' at a and at b"):
        checkpoint.describe({"a": scales, "b": scales})


def is_key(leaf):
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def numbers(leaf):
    return jax.random.key_data(leaf) if is_key(leaf) else leaf


@pytest.mark.parametrize("kind", ["as it is", "abstract", "sharded"])
def test_typed_keys_come_back(manager, kind):
    state = {
        "rng": jax.random.key(3),
        "many": jax.random.split(jax.random.key(4, impl="rbg"), 4),
        "raw": jax.random.PRNGKey(5),
        "w": X,
    }
    like = jax.tree.map(
        lambda leaf: (
            jnp.broadcast_to(jax.random.key(0, impl=jax.random.key_impl(leaf)), leaf.shape)
            if is_key(leaf)
            else jnp.zeros_like(leaf)
        ),
        state,
    )
    if kind != "as it is":
        like = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), like)
    if kind == "sharded":
        like["many"] = jax.ShapeDtypeStruct(
            (4,),
            like["many"].dtype,
            sharding=NamedSharding(jax.make_mesh((2,), ("data",)), P("data")),
        )
    save(manager, 0, state)
    got = checkpoint.restore(manager, like)
    assert jax.tree.map(lambda leaf: leaf.dtype, got) == jax.tree.map(
        lambda leaf: leaf.dtype, state
    )
    assert_same(jax.tree.map(numbers, got), jax.tree.map(numbers, state))
    if kind == "sharded":
        assert got["many"].sharding.is_equivalent_to(like["many"].sharding, 1)


@pytest.mark.parametrize(
    "saved, like, text",
    [
        (jax.random.key(0), jax.random.PRNGKey(0), r"rng: key<fry> in the checkpoint, not uint32"),
        (jax.random.PRNGKey(0), jax.random.key(0), r"rng: uint32 in the checkpoint, not key<fry>"),
        (
            jax.random.key(0, impl="rbg"),
            jax.random.key(0, impl="unsafe_rbg"),
            r"rng: key<rbg> in the checkpoint, not key<urbg>",
        ),
        (
            jax.random.key(0, impl="rbg"),
            jax.random.key(0),
            r"rng: uint32\[4\] in the checkpoint, not key<fry>\[\]",
        ),
    ],
    ids=["key", "numbers", "kind of key", "size of key"],
)
def test_keys_of_another_kind_are_refused(manager, saved, like, text):
    save(manager, 0, {"rng": saved})
    with pytest.raises(ValueError, match=text):
        checkpoint.restore(manager, {"rng": like})
