"""What checkpoints say beside weights, names of models, and what is not read or written."""

import dataclasses
import functools
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors
import small_llama
from foreign_checkpoints import (
    ATTENTION,
    BF16,
    CHANNEL_CT,
    E4M3,
    FOREIGN,
    HEAD,
    LIKE,
    MX,
    PATHS,
    SHAPES,
    TENSOR,
    UP,
    K,
    V,
    args,
    compressed,
    fp8,
    modelopt,
    quantization,
    write_file,
)

import fp8jax
from fp8jax import (
    BlockWise,
    PerChannel,
    PerTensor,
    Rule,
    SiteScales,
    WeightRule,
    dequantize_params,
    kv_cache,
    quantize_params,
    recipes,
)
from fp8jax._params import named_leaves
from fp8jax._state import find_site_scales
from fp8jax.interop import (
    TORCH_NAMES,
    CheckpointError,
    Name,
    convert_checkpoint,
    gemma_names,
    llama_names,
    mixtral_names,
    qwen3_names,
    qwen_moe_names,
    read_checkpoint,
    write_checkpoint,
)
from fp8jax.interop._names import find_name

RNG = np.random.default_rng(5)


def normal(*shape):
    return RNG.normal(size=shape).astype(np.float32)


class Model(nn.Module):
    """Two layers and a head."""

    @nn.compact
    def __call__(self, x):
        x = jnp.tanh(nn.Dense(32, name="up", use_bias=False)(x))
        x = nn.Dense(16, name="down", use_bias=False)(x)
        return nn.Dense(8, name="lm_head", use_bias=False)(x)


def served(tmp_path, input_scales):
    """A checkpoint of the model with its head left out, and the model."""
    x = normal(4, 16)
    dense = Model().init(jax.random.key(0), x)["params"]
    quantized = quantize_params(dense, [WeightRule("(up|down)/kernel")])
    write_checkpoint(tmp_path, quantized, input_scales=input_scales)
    return x, quantized, read_checkpoint(tmp_path, dense)


def test_static_scales_become_site_scales_and_serve_what_they_say(tmp_path):
    given = {"up/kernel": np.float32(0.01), "down/kernel": np.float32(2.0**-8)}
    x, quantized, loaded = served(tmp_path, given)
    assert loaded.input_scales == given and loaded.scheme.activations == "static"
    model = fp8jax.linen.Fp8(Model(), recipes.delayed(), rules=loaded.rules)
    first = jax.eval_shape(model.init, jax.random.key(1), x)["fp8"]
    first = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), first)
    scales = loaded.site_scales(first)
    # 0.01 is rounded up to 2^-6: what fitted still does.
    found = {node.site: float(node.lhs) for node in find_site_scales(scales)}
    assert found == {"up": -6.0, "down": -8.0}
    got = jax.jit(model.apply)({"params": loaded.params, "fp8": scales}, x)

    def cast(values, scale):
        return (values / scale).clip(-448, 448).astype(ml_dtypes.float8_e4m3fn).astype(
            np.float32
        ) * scale

    wide = dequantize_params(quantized)
    h = np.tanh(cast(x, 2.0**-6) @ wide["up"]["kernel"])
    h = cast(h, 2.0**-8) @ wide["down"]["kernel"]
    np.testing.assert_allclose(got, h @ wide["lm_head"]["kernel"], rtol=1e-3, atol=1e-3)

    # And back: the exponents are the file's scales, exactly.
    write_checkpoint(tmp_path / "back", loaded.params, scales=scales)
    back = read_checkpoint(tmp_path / "back", wide)
    assert back.input_scales == {"up/kernel": 2.0**-6, "down/kernel": 2.0**-8}
    assert jax.tree.structure(scales) == jax.tree.structure(first)


@pytest.mark.parametrize("site", ["up", "up/kernel"])
def test_sites_of_modules_and_of_plain_trees_get_their_scale_and_give_it_back(tmp_path, site):
    _, _, loaded = served(tmp_path, {"up/kernel": 0.25, "down/kernel": 0.5})
    casts = recipes.delayed().delayed_casts
    scales = {
        "a": SiteScales.zeros(site, casts),
        "b": SiteScales.zeros(f"{site}#1", casts),
        "c": SiteScales.zeros("other", casts),
    }
    fitted = loaded.site_scales(scales)
    assert [float(fitted[name].lhs) for name in "abc"] == [-2.0, -2.0, 0.0]
    assert float(fitted["a"].rhs) == 0 and float(fitted["a"].grad) == 0
    write_checkpoint(tmp_path / "back", {"up": loaded.params["up"]}, scales={"x": fitted["a"]})
    back = read_checkpoint(tmp_path / "back", {"up": loaded.params["up"]})
    assert back.input_scales == {"up/kernel": 0.25}


@pytest.mark.parametrize(
    "scale, exponent", [(1.0, 0), (1.0001, 1), (0.5, -1), (2.0**-126, -126), (2.0**-140, -126)]
)
def test_a_scale_is_rounded_up_to_a_power_of_two_and_no_further(tmp_path, scale, exponent):
    _, _, loaded = served(tmp_path, {"up/kernel": np.float32(scale), "down/kernel": 1.0})
    node = SiteScales.zeros("up", recipes.delayed().delayed_casts)
    assert float(loaded.site_scales({"up": node})["up"].lhs) == exponent


def test_site_scales_that_fit_nothing_are_refused(tmp_path):
    _, _, loaded = served(tmp_path, {"up/kernel": 0.25, "down/kernel": 0.5})
    casts = recipes.delayed().delayed_casts
    with pytest.raises(ValueError, match="got none for .*'down'"):
        loaded.site_scales({"x": SiteScales.zeros("x", casts)})
    with pytest.raises(ValueError, match=r"layers of the checkpoint; got \[3\] for site 'up'"):
        loaded.site_scales({"x": SiteScales.zeros("up", casts, (3,))})


def test_a_head_that_was_left_out_is_not_quantized_anew(tmp_path):
    x, quantized, loaded = served(tmp_path, None)
    assert loaded.excluded == ("lm_head/kernel",)
    wide = dequantize_params(quantized)
    model = fp8jax.linen.Fp8(Model(), recipes.weight_only(), rules=loaded.rules)
    got = model.apply({"params": loaded.params}, x)
    expected = np.tanh(x @ wide["up"]["kernel"]) @ wide["down"]["kernel"]
    expected = expected @ wide["lm_head"]["kernel"]
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)
    without = fp8jax.linen.Fp8(Model(), recipes.rowwise())
    with_rules = fp8jax.linen.Fp8(Model(), recipes.rowwise(), rules=loaded.rules)
    head = [run.apply({"params": loaded.params}, x) for run in (without, with_rules)]
    assert np.abs(head[0] - head[1]).max() > 1e-3 * np.abs(expected).max()
    # And a dense tree is held as the checkpoint holds it.
    again = quantize_params(wide, loaded.weight_rules)
    assert jax.tree.structure(again) == jax.tree.structure(loaded.params)


def test_rules_of_what_was_left_out_match_sites_whole(tmp_path):
    dense = {"a": {"lm_head": {"kernel": normal(4, 4)}, "x": {"kernel": normal(4, 4)}}}
    quantized = quantize_params(dense, [WeightRule("a/x/kernel")])
    write_checkpoint(tmp_path, quantized)
    (rule,) = read_checkpoint(tmp_path, dense).rules
    matched = ("a/lm_head", "a/lm_head/kernel", "a/lm_head#2")
    assert all(map(rule.matches, matched)) and rule.recipe is None
    assert not any(map(rule.matches, ("a/lm_head2", "b/a/lm_head", "a/lm_head/x", "a/x")))
    write_checkpoint(tmp_path / "wide", dense)
    loaded = read_checkpoint(tmp_path / "wide", dense)
    assert loaded.rules == () and loaded.excluded == () and loaded.scheme is None
    assert isinstance(rule, Rule)


def test_an_embedding_is_left_out_of_products_where_it_is_the_head_too(tmp_path):
    params = small_llama.init()
    quantized = quantize_params(params, [WeightRule(".*layers/.*kernel")])
    write_checkpoint(tmp_path / "apart", quantized, llama_names())
    loaded = read_checkpoint(tmp_path / "apart", params, llama_names())
    assert loaded.excluded == ("lm_head/kernel",)
    for tree in (params, quantized):
        del tree["lm_head"]
    write_checkpoint(tmp_path / "tied", quantized, llama_names())
    loaded = read_checkpoint(tmp_path / "tied", params, llama_names())
    assert loaded.excluded == ("model/embed_tokens/embedding",)


def test_scales_of_keys_and_values_quantize_the_cache_as_they_say(tmp_path):
    FOREIGN["modelopt kv"].write(tmp_path)
    loaded = read_checkpoint(tmp_path, LIKE, llama_names())
    scales = loaded.kv_scales[PATHS[K]], loaded.kv_scales[PATHS[V]]
    keys, values = normal(1, 3, 2, 4) * 30, normal(1, 3, 2, 4)
    cache = kv_cache.init(1, 4, heads=2, width=4)
    append = jax.jit(functools.partial(kv_cache.append, count=None))
    got = kv_cache.read(append(cache, keys, values, scales=scales))
    for held, new, scale in zip(got, (keys, values), scales, strict=True):
        codes = (new / scale).clip(-448, 448).astype(E4M3).astype(np.float32)
        np.testing.assert_allclose(held[:, :3], codes * scale, rtol=1e-6)
    own = kv_cache.read(append(cache, keys, values))
    assert not np.array_equal(own[0], got[0])
    of_heads = np.float32([0.5, 0.125]), np.float32(0.25)
    got = kv_cache.read(append(cache, keys, values, scales=of_heads))[0][:, :3]
    codes = (keys / of_heads[0][:, None]).clip(-448, 448).astype(E4M3).astype(np.float32)
    np.testing.assert_array_equal(got, codes * of_heads[0][:, None])
    with pytest.raises(ValueError, match="scales must be a number for keys"):
        kv_cache.append(cache, keys, values, scales=(np.ones(3), 1.0))
    with pytest.raises(ValueError, match="of a quantized cache"):
        kv_cache.append(
            kv_cache.init(1, 4, heads=2, width=4, format=None), keys, values, scales=scales
        )


@pytest.mark.parametrize(
    "shape, wanted", [((1,), ()), ((2, 1, 1), (2,)), ((2,), (2,)), ((2, 2), None), ((0,), None)]
)
def test_scales_of_keys_and_values_are_one_or_one_for_each_head(tmp_path, shape, wanted):
    foreign = FOREIGN["ct channel"]
    scale = np.arange(1, 1 + np.prod(shape, dtype=int), dtype=np.float32).reshape(shape)
    extra = {f"{ATTENTION}.k_scale": scale, f"{ATTENTION}.v_scale": scale * 2}
    dataclasses.replace(foreign, extra=extra).write(tmp_path)
    if wanted is None:
        with pytest.raises(CheckpointError, match="must be one number, or one for each head"):
            read_checkpoint(tmp_path, LIKE, llama_names())
        return
    loaded = read_checkpoint(tmp_path, LIKE, llama_names())
    assert np.array_equal(loaded.kv_scales[PATHS[K]], scale.reshape(wanted))
    assert np.array_equal(loaded.kv_scales[PATHS[V]], 2 * scale.reshape(wanted))
    if wanted:
        with pytest.raises(CheckpointError, match="must be one positive number"):
            convert_checkpoint(tmp_path, tmp_path / "x", progress=False)


def test_what_was_read_prints_as_a_table(tmp_path):
    FOREIGN["modelopt kv"].write(tmp_path)
    text = str(read_checkpoint(tmp_path, LIKE, llama_names(), ignore=[]))
    assert text.startswith("ModelOpt FP8, from config.json\n")
    text = " ".join(text.split())
    for line in (
        "│ FP8 weights, per tensor, activations static │ 3 │ 0.0553 │ model/layers/0/mlp",
        "│ weights left out of quantization │ 1 │ 0.00614 │ lm_head/kernel │",
        "│ static scales of activations │ 3 │ │ model/layers/0/mlp/up_proj/kernel │",
        "│ static scales of keys and values │ 2 │ │ model/layers/0/self_attn/k_proj/kernel │",
    ):
        assert line in text
    ignored = read_checkpoint(
        tmp_path,
        {"lm_head": LIKE["lm_head"]},
        llama_names(),
        ignore=["model.*"],
    )
    assert "tensors left unread" in str(ignored) and f"{UP}.weight" in ignored.left
    assert repr(ignored) == "<LoadedCheckpoint: ModelOpt FP8, from config.json, 1 arrays>"


def test_stacked_layers_and_experts_are_tensors_of_their_own(tmp_path):
    dense = {
        "blocks": {
            "block_sparse_moe": {
                "experts": {"w1": normal(2, 3, 32, 64), "w2": {"kernel": normal(2, 3, 64, 32)}},
                "gate": {"kernel": normal(2, 32, 3)},
            },
            "input_layernorm": {"scale": normal(2, 32)},
        }
    }
    names = mixtral_names("blocks")
    for scaling, options in (
        (PerTensor(), {"input_scales": {}}),
        (PerChannel(-1), {}),
        (BlockWise((32, 1)), {}),
        (BlockWise((16, 16)), {"method": "compressed-tensors"}),
    ):
        folder = tmp_path / str(scaling)
        quantized = quantize_params(dense, [WeightRule(".*experts/.*", scaling, stacked=2)])
        if "input_scales" in options:
            paths = [p for p, leaf in named_leaves(quantized)[0] if "experts" in p]
            options["input_scales"] = {
                path: np.arange(1, 7, dtype=np.float32).reshape(2, 3) for path in paths
            }
        write_checkpoint(folder, quantized, names, **options)
        loaded = read_checkpoint(folder, dense, names)
        for one, other in zip(
            jax.tree.leaves(quantized), jax.tree.leaves(loaded.params), strict=True
        ):
            assert np.array_equal(np.asarray(one).view(np.uint8), np.asarray(other).view(np.uint8))
        again = quantize_params(dense, loaded.weight_rules)
        assert jax.tree.structure(again) == jax.tree.structure(loaded.params)
        found = safetensors.deserialize((folder / "model.safetensors").read_bytes())
        found = {name: entry["shape"] for name, entry in found}
        assert found["model.layers.1.block_sparse_moe.experts.2.w1.weight"] == [64, 32]
        assert found["model.layers.1.block_sparse_moe.gate.weight"] == [3, 32]
        for path, value in options.get("input_scales", {}).items():
            assert np.array_equal(loaded.input_scales[path], value)
    # One expert after the other, by numbered paths: the same values.
    apart = {
        "model": {
            "layers": {
                "1": {"block_sparse_moe": {"experts": {"2": {"w1": {"kernel": normal(32, 64)}}}}}
            }
        }
    }
    one = read_checkpoint(folder, apart, mixtral_names(), ignore=[".*"]).params
    leaf = one["model"]["layers"]["1"]["block_sparse_moe"]["experts"]["2"]["w1"]["kernel"]
    whole = loaded.params["blocks"]["block_sparse_moe"]["experts"]["w1"]
    assert np.array_equal(leaf.dequantize(), whole.dequantize()[1, 2])
    # Experts of a site share its scale: the largest.
    node = SiteScales.zeros("blocks/moe", recipes.delayed().delayed_casts, (2,))
    loaded = read_checkpoint(tmp_path / str(PerTensor()), dense, names)
    site = node.replace(site="blocks/block_sparse_moe/experts/w1")
    assert loaded.site_scales({"x": site})["x"].lhs.tolist() == [2.0, 3.0]


@pytest.mark.parametrize(
    "names, path, theirs",
    [
        (llama_names(), "lm_head/kernel", "lm_head.weight"),
        (
            llama_names("h", {"attn/q_norm": "self_attn.q_norm"}),
            "h/attn/q_norm/scale",
            "model.layers.{layer}.self_attn.q_norm.weight",
        ),
        (
            llama_names("h", {"attn/q_norm": "self_attn.q_norm"}),
            "h/mlp/up_proj/kernel",
            "model.layers.{layer}.mlp.up_proj.weight",
        ),
        (
            llama_names("h", {"mlp/up_proj": "mlp.wi"}),
            "h/mlp/up_proj/kernel",
            "model.layers.{layer}.mlp.wi.weight",
        ),
        (
            llama_names(top={"tok": "model.embed_tokens"}),
            "tok/embedding",
            "model.embed_tokens.weight",
        ),
        (
            qwen3_names(),
            "model/layers/11/self_attn/k_norm/scale",
            "model.layers.11.self_attn.k_norm.weight",
        ),
        (
            gemma_names(),
            "model/layers/0/post_feedforward_layernorm/scale",
            "model.layers.0.post_feedforward_layernorm.weight",
        ),
        (
            mixtral_names(),
            "model/layers/0/block_sparse_moe/gate/kernel",
            "model.layers.0.block_sparse_moe.gate.weight",
        ),
        (
            qwen_moe_names("h"),
            "h/mlp/experts/down_proj",
            "model.layers.{layer}.mlp.experts.{expert}.down_proj.weight",
        ),
        (
            qwen_moe_names("h"),
            "h/mlp/experts/5/down_proj/kernel",
            "model.layers.{layer}.mlp.experts.5.down_proj.weight",
        ),
        (
            qwen_moe_names(),
            "model/layers/0/mlp/shared_expert/up_proj/kernel",
            "model.layers.0.mlp.shared_expert.up_proj.weight",
        ),
    ],
)
def test_names_extend_those_that_are_ready(names, path, theirs):
    assert find_name(names, path)[1] == theirs


REFUSED = {
    "transforms": (
        quantization(**compressed(TENSOR, None, transform_config={"config_groups": {"u": {}}})),
        {},
        "weights are stored rotated.*Undo the transforms",
    ),
    "sparse": (
        quantization(**compressed(TENSOR, None, sparsity_config={"format": "sparse-24-bitmask"})),
        {},
        "sparsity_config must be empty, or of format 'dense'",
    ),
    "smoothed": (
        modelopt("FP8"),
        {f"{UP}.pre_quant_scale": np.ones(192, np.float32)},
        "of codes and scales alone; got .*pre_quant_scale' beside it",
    ),
    "zero points": (
        quantization(**CHANNEL_CT),
        {f"{UP}.weight_zero_point": np.zeros((160, 1), np.int8)},
        "got .*weight_zero_point' beside it",
    ),
    "NVFP4": (modelopt("NVFP4"), {}, "quant_algo must be one of .*got 'NVFP4'.*says ModelOpt"),
    "4 bits": (
        quantization(**compressed(args(num_bits=4, strategy="channel"), None)),
        {},
        "weights must be symmetric, of type 'float' with 8 bits",
    ),
    "classes": (
        quantization(
            **compressed(
                None,
                None,
                config_groups={
                    "a": {"targets": ["A"], "weights": TENSOR},
                    "b": {"targets": ["B"], "weights": args(strategy="channel")},
                },
            )
        ),
        {},
        "classes of modules, which a file doesn't know",
    ),
    "no group": (
        quantization(
            **compressed(None, None, config_groups={"a": {"targets": [K], "weights": TENSOR}})
        ),
        {},
        "it says nothing of this module, whose weight is FP8",
    ),
    "slow pattern": (
        quantization(**compressed(TENSOR, None, targets=["re:(a+)+$"])),
        {},
        "no groups that repeat",
    ),
    "slower pattern": (
        quantization(**compressed(TENSOR, None, targets=["re:" + ".*" * 20 + "x"])),
        {},
        "matched in bounded time",
    ),
    "alternatives": (
        quantization(**compressed(TENSOR, None, targets=["re:" + "(.|.|.)" * 40 + "x"])),
        {},
        "matched in bounded time",
    ),
    "no pattern": (
        quantization(**compressed(TENSOR, None, targets=["re:("])),
        {},
        "must be regular expressions",
    ),
    "packed FP4 experts": (
        fp8(weight_block_size=[128, 128]),
        {f"{UP}.weight": np.zeros((160, 192), np.int8)},
        "must be float8_e4m3fn, for it has scales",
    ),
    "two places of a scale": (
        fp8(weight_block_size=None),
        {f"{UP}.weight_scale_inv": np.ones((), np.float32)},
        "must have scales, .*weight_scale_inv' or",
    ),
    "nothing said": (
        {"config.json": {"model_type": "llama"}},
        {},
        "got nothing in quantization_config and compression_config of config.json.*it seems to be",
    ),
    "unknown method": (quantization(quant_method="awq"), {}, "quant_method must be one of"),
    "bytes of no scale": (
        quantization(**CHANNEL_CT),
        {f"{UP}.weight_scale": np.ones((160, 1), np.uint8)},
        "must be float32, bfloat16, float16 or float8_e8m0fnu; got uint8",
    ),
}


@pytest.mark.parametrize("files, extra, text", REFUSED.values(), ids=REFUSED)
def test_what_would_be_read_wrongly_is_refused_in_words(tmp_path, files, extra, text):
    tensors = {f"{m}.weight": np.ones(s, E4M3) for m, s in SHAPES.items()}
    scales = {f"{m}.weight_scale": np.ones((s[0], 1), np.float32) for m, s in SHAPES.items()}
    others = {f"{HEAD}.weight": np.ones((8, 192), BF16), "model.norm.weight": np.ones(192, BF16)}
    write_file(tmp_path / "model.safetensors", tensors | scales | others | extra)
    for name, data in files.items():
        (tmp_path / name).write_text(json.dumps(data))
    with pytest.raises(CheckpointError, match=text) as error:
        read_checkpoint(tmp_path, LIKE, llama_names())
    assert "ignore" not in str(error.value)
    with pytest.raises(CheckpointError):
        convert_checkpoint(tmp_path, tmp_path / "x", method="compressed-tensors", progress=False)
    with pytest.raises(CheckpointError):
        convert_checkpoint(tmp_path, tmp_path / "x", [WeightRule(".*up_proj.weight")])
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("dtype", ["C64", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "F4", "F6_E2M3", "NEW_1"])
def test_a_tensor_of_any_dtype_that_nobody_asks_for_is_no_obstacle(tmp_path, dtype):
    write_checkpoint(tmp_path, {"a": {"bias": normal(3)}})
    path = tmp_path / "model.safetensors"
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header["b"] = {
        "dtype": dtype,
        "shape": [8 if dtype[:2] == "F8" else 1],
        "data_offsets": [12, 20],
    }
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :] + bytes(8))
    like = {"a": {"bias": np.zeros(3, np.float32)}}
    loaded = read_checkpoint(tmp_path, like, ignore=["b"])
    assert loaded.left == ("b",)
    with pytest.raises(CheckpointError, match="'b'"):
        read_checkpoint(tmp_path, like | {"b": np.zeros(1, np.float32)})
    if dtype[0] == "C":
        like["b"] = np.zeros(1, np.complex64)
        assert read_checkpoint(tmp_path, like).params["b"].dtype == np.complex64


WRONG = [
    (
        PerTensor(),
        {"method": "modelopt"},
        "method 'modelopt' must have weights per tensor and static",
    ),
    (PerChannel(-1), {"method": "modelopt"}, "method 'modelopt' must have"),
    (BlockWise((16, 16)), {"method": "modelopt"}, "method 'modelopt' must have"),
    (BlockWise((16, 16)), {"method": "mxfp8"}, r"method 'mxfp8' must have blocks of \[1, 32\]"),
    (
        BlockWise((16, 16)),
        {"method": "compressed-tensors", "scale_dtype": "ue8m0"},
        "would take exponents for numbers",
    ),
    (PerTensor(), {"method": "fp8", "scale_dtype": "ue8m0"}, "scales of float32 per tensor"),
    (PerTensor(), {"method": "fp8", "activations": None}, "and quantized activations"),
    (PerTensor(), {"method": "fp8", "kv_scales": {"k_proj/kernel": 1.0}}, "has no scales of keys"),
    (PerTensor(), {"method": "quark"}, "method must be one of .*got 'quark'"),
    (PerTensor(), {"kv_scales": {"up/kernel": 1.0}}, "must be called k_proj or v_proj"),
    (PerTensor(), {"kv_scales": {"k_proj/kernel": 0.0}}, "must be one positive number"),
]


@pytest.mark.parametrize("scaling, options, text", WRONG, ids=str)
def test_what_readers_would_misread_is_not_written(tmp_path, scaling, options, text):
    params = quantize_params(
        {"up": {"kernel": normal(32, 32)}, "k_proj": {"kernel": normal(32, 32)}},
        [WeightRule(".*", scaling)],
    )
    with pytest.raises(CheckpointError, match=text):
        write_checkpoint(tmp_path / "new", params, **options)
    assert not (tmp_path / "new").exists()


def test_codes_that_no_linear_layer_has_are_not_written(tmp_path):
    names = [Name("stack", "stack.weight"), *llama_names()]
    for tree in (
        {"model": {"embed_tokens": {"embedding": normal(8, 16)}}},
        {"stack": normal(2, 8, 16)},
    ):
        with pytest.raises(CheckpointError, match="must be matrices of linear layers"):
            write_checkpoint(tmp_path / "new", quantize_params(tree, [WeightRule(".*")]), names)
    write_checkpoint(
        tmp_path / "wide", {"model": {"embed_tokens": {"embedding": normal(8, 16)}}}, names
    )
    with pytest.raises(CheckpointError, match="must be matrices of linear layers"):
        convert_checkpoint(tmp_path / "wide", tmp_path / "new", [WeightRule(".*")])


def test_a_name_left_out_that_ends_another_is_not_written_for_readers_that_match_ends(tmp_path):
    params = quantize_params(
        {"lm_head": {"kernel": normal(16, 16)}, "draft": {"lm_head": {"kernel": normal(16, 16)}}},
        [WeightRule("draft/.*")],
    )
    with pytest.raises(CheckpointError, match="'lm_head' left out, and 'draft.lm_head' quantized"):
        write_checkpoint(tmp_path / "a", params, method="fp8")
    write_checkpoint(tmp_path / "b", params)


def test_input_scales_are_of_the_weights_that_are_quantized(tmp_path):
    params = quantize_params({"up": {"kernel": normal(8, 8)}}, [WeightRule(".*")])
    casts = recipes.delayed().delayed_casts
    for options, text in (
        ({"input_scales": {}}, "must hold one for each quantized weight; got none for 'up/kernel'"),
        ({"input_scales": {"up/kernel": 1.0, "x": 1.0}}, "paths of params; got 'x'"),
        ({"input_scales": {"up/kernel": [1.0, 2.0]}}, "must have the axes"),
        ({"kv_scales": {"x": 1.0}}, "kv_scales must be of paths of params; got 'x'"),
        (
            {"input_scales": {"up/kernel": 1.0}, "scales": {"up": SiteScales.zeros("up", casts)}},
            "mean the same; got both",
        ),
    ):
        with pytest.raises(ValueError, match=text):
            write_checkpoint(tmp_path / "x", params, **options)


def test_blocks_of_method_fp8_that_leave_a_tail_are_warned_of(tmp_path):
    params = quantize_params(
        {"up": {"kernel": normal(16, 24)}}, [WeightRule(".*", BlockWise((16, 16)))]
    )
    with pytest.warns(
        UserWarning, match=r"got \[16, 16\] for 'up.weight' and 0 more.*compressed-tensors'"
    ) as caught:
        write_checkpoint(tmp_path / "a", params)
    assert caught[0].filename == __file__
    write_checkpoint(tmp_path / "b", params, method="compressed-tensors")
    # One block that is larger than the weight is read right.
    small = quantize_params(
        {"up": {"kernel": normal(8, 16)}}, [WeightRule(".*", BlockWise((16, 16)))]
    )
    write_checkpoint(tmp_path / "c", small)


def test_modelopt_is_written_as_modelopt_writes(tmp_path):
    dense = {"layers": {"k_proj": {"kernel": normal(64, 32)}}, "lm_head": {"kernel": normal(64, 8)}}
    for scaling, options, algorithm, scale in (
        (PerTensor(), {"input_scales": {"layers/k_proj/kernel": 0.5}}, "FP8", ("F32", [])),
        (BlockWise((32, 1)), {}, "MXFP8", ("U8", [32, 2])),
    ):
        folder = tmp_path / algorithm
        write_checkpoint(
            folder,
            quantize_params(dense, [WeightRule("layers/.*", scaling)]),
            method="modelopt",
            kv_scales={"layers/k_proj/kernel": 2.0},
            **options,
        )
        config = json.loads((folder / "config.json").read_text())["quantization_config"]
        assert (config["quant_method"], config["quant_algo"]) == ("modelopt", algorithm)
        assert config["ignore"] == ["lm_head"]
        assert config["kv_cache_scheme"] == {"dynamic": False, "num_bits": 8, "type": "float"}
        older = json.loads((folder / "hf_quant_config.json").read_text())
        assert older["producer"]["name"] == "modelopt"
        assert older["quantization"]["quant_algo"] == algorithm
        assert older["quantization"]["kv_cache_quant_algo"] == "FP8"
        assert older["quantization"]["exclude_modules"] == ["lm_head"]
        found = safetensors.deserialize((folder / "model.safetensors").read_bytes())
        found = {name: (entry["dtype"], entry["shape"]) for name, entry in found}
        assert found["layers.k_proj.weight"] == ("F8_E4M3", [32, 64])
        assert found["layers.k_proj.weight_scale"] == scale
        assert found["layers.k_proj.k_scale"] == ("F32", [])
        assert found.get("layers.k_proj.input_scale") == (("F32", []) if options else None)
        (folder / "config.json").write_text("{}")
        loaded = read_checkpoint(folder, dense)
        assert loaded.title == f"ModelOpt {algorithm}, from hf_quant_config.json"


def test_a_block_over_heads_is_one_over_the_matrix_of_the_file(tmp_path):
    names = [Name("o/kernel", "o.weight", inputs=2), Name("q/kernel", "q.weight", inputs=1)]
    dense = {"q": {"kernel": normal(256, 4, 64)}, "o": {"kernel": normal(4, 64, 256)}}
    for here, theirs in (
        ({"q": BlockWise((128, 2, 64)), "o": BlockWise((2, 64, 128))}, [128, 128]),
        ({"q": BlockWise((32, 1, 1)), "o": BlockWise((1, 32, 1))}, [1, 32]),
        ({"q": BlockWise((128, 1, 32)), "o": BlockWise((2, 64, 32))}, [32, 128]),
    ):
        folder = tmp_path / str(theirs)
        quantized = quantize_params(
            dense, [WeightRule(f"{name}/.*", scaling) for name, scaling in here.items()]
        )
        write_checkpoint(folder, quantized, names, method="compressed-tensors")
        loaded = read_checkpoint(folder, dense, names)
        assert list(loaded.scheme.block) == theirs
        for name, scaling in here.items():
            assert loaded.params[name]["kernel"].scaling == scaling
            assert np.array_equal(
                loaded.params[name]["kernel"].dequantize(), quantized[name]["kernel"].dequantize()
            )


def test_one_safetensors_file_of_any_name_is_a_checkpoint(tmp_path):
    values, _, _ = FOREIGN["comfy"].write(tmp_path / "a")
    path = (tmp_path / "a" / "model.safetensors").rename(tmp_path / "a" / "flux.safetensors")
    for source in (path, path.parent):
        loaded = read_checkpoint(source, LIKE, llama_names())
        leaf = dict(named_leaves(loaded.params)[0])[PATHS[UP]]
        assert np.array_equal(leaf.dequantize(), values[UP].T.astype(np.float32))
    (tmp_path / "a" / "other.safetensors").write_bytes(path.read_bytes())
    with pytest.raises(CheckpointError, match="one safetensors file of another name; got 2"):
        read_checkpoint(tmp_path / "a", LIKE, llama_names())


def test_schemes_are_told_one_by_one_where_they_differ(tmp_path):
    FOREIGN["ct groups"].write(tmp_path)
    loaded = read_checkpoint(tmp_path, LIKE, llama_names())
    assert loaded.schemes[PATHS[K]].weights == "channel"
    with pytest.raises(ValueError, match="scheme must be one for all weights"):
        print(loaded.scheme)
    assert ATTENTION in K and MX["group_size"] == 32


def test_scales_that_the_config_says_are_not_used_are_left(tmp_path):
    FOREIGN["autofp8"].write(tmp_path)
    config = {"quantization_config": {"quant_method": "fp8", "activation_scheme": "dynamic"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded = read_checkpoint(tmp_path, LIKE, llama_names())
    assert loaded.input_scales == {} and loaded.scheme.activations == "dynamic"
    assert sorted(loaded.left) == sorted(f"{module}.input_scale" for module in SHAPES)


def test_a_stale_config_is_not_written_beside_other_weights(tmp_path):
    FOREIGN["ct text_config"].write(tmp_path / "a")
    loaded = read_checkpoint(tmp_path / "a", LIKE, llama_names())
    dense = dequantize_params(loaded.params)
    write_checkpoint(tmp_path / "b", dense, llama_names(), config=loaded.config)
    assert "quant" not in (tmp_path / "b" / "config.json").read_text()
    assert read_checkpoint(tmp_path / "b", LIKE, llama_names()).title is None
    config = {"quantization_config": {"quant_method": "x"}, "model_type": "llama"}
    write_checkpoint(tmp_path / "c", loaded.params, llama_names(), config=config)
    assert json.loads((tmp_path / "c" / "config.json").read_text())["model_type"] == "llama"
    assert read_checkpoint(tmp_path / "c", LIKE, llama_names()).scheme == loaded.scheme


def test_a_plain_cast_of_all_is_codes_for_products_and_values_for_the_rest(tmp_path):
    tensors = {
        "up.weight": normal(8, 16).astype(E4M3),
        "up.bias": normal(8).astype(E4M3),
        "norm.scale": normal(16).astype(E4M3),  # no scale of a weight, for all its name
        "embed.weight": normal(4, 16).astype(E4M3),
    }
    write_file(tmp_path / "model.safetensors", tensors)
    like = {
        "up": {"kernel": np.zeros((16, 8), np.float32), "bias": np.zeros(8, np.float32)},
        "norm": {"scale": np.zeros(16, np.float32)},
        "embed": {"embedding": np.zeros((4, 16), np.float32)},
    }
    names = [Name("norm/scale", "norm.scale"), *TORCH_NAMES]
    params = read_checkpoint(tmp_path, like, names).params
    assert np.array_equal(params["up"]["kernel"].dequantize().T, tensors["up.weight"])
    assert params["up"]["kernel"].data.dtype == E4M3
    for got, name in (
        (params["up"]["bias"], "up.bias"),
        (params["norm"]["scale"], "norm.scale"),
        (params["embed"]["embedding"], "embed.weight"),
    ):
        assert got.dtype == jnp.float32 and np.array_equal(got, tensors[name])
    convert_checkpoint(tmp_path, tmp_path / "x", method="compressed-tensors", progress=False)
    found = dict(safetensors.deserialize((tmp_path / "x" / "model.safetensors").read_bytes()))
    assert {name for name in found if name.endswith("_scale")} == {"up.weight_scale"}
    assert found["embed.weight"]["data"] == tensors["embed.weight"].tobytes()
    write_file(tmp_path / "model.safetensors", {"up.bias": tensors["up.bias"]})
    with pytest.raises(CheckpointError, match="source must hold weights of float8_e4m3fn"):
        convert_checkpoint(tmp_path, tmp_path / "y", progress=False)


def test_arrays_of_numpy_keep_their_dtype(tmp_path):
    tree = {"a": np.arange(3, dtype=np.float64) / 3, "b": 7, "c": np.int64(1 << 40)}
    write_checkpoint(tmp_path, tree)
    found = safetensors.deserialize((tmp_path / "model.safetensors").read_bytes())
    found = dict(found)
    assert {name: found[name]["dtype"] for name in "abc"} == {"a": "F64", "b": "I32", "c": "I64"}
    assert np.array_equal(np.frombuffer(found["a"]["data"], np.float64), tree["a"])
