"""Foreign checkpoints, there and back; the files held against the safetensors library and float64
NumPy.
"""

import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import fp8jax
from fp8jax import (
    BlockWise,
    Fp8Tensor,
    PerChannel,
    PerTensor,
    PerToken,
    WeightRule,
    quantize_params,
)
from fp8jax.interop import (
    TORCH_NAMES,
    CheckpointError,
    Name,
    convert_checkpoint,
    llama_names,
    read_checkpoint,
    write_checkpoint,
)
from fp8jax.interop._safetensors_file import TensorInfo, write_tensors

RNG = np.random.default_rng(1)
DTYPES = {
    "F32": np.float32,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E8M0": ml_dtypes.float8_e8m0fnu,
    "I32": np.int32,
}


def library_reads(path):
    """The tensors of a file, by the safetensors library."""
    found = safetensors.deserialize(path.read_bytes())
    return {
        name: np.frombuffer(entry["data"], DTYPES[entry["dtype"]]).reshape(entry["shape"])
        for name, entry in found
    }


def library_writes(path, tensors):
    """A file of these arrays, by the safetensors library."""
    path.write_bytes(
        safetensors.serialize(
            {
                name: safetensors.TensorSpec(
                    dtype=str(x.dtype), shape=x.shape, data_ptr=x.ctypes.data, data_len=x.nbytes
                )
                for name, x in tensors.items()
            }
        )
    )


def normal(*shape):
    """Rows and columns of very different sizes."""
    return (
        RNG.normal(size=shape)
        * np.exp2(RNG.integers(-9, 9, (*shape[:-1], 1)) + RNG.integers(-9, 9, shape[-1]))
    ).astype(np.float32)


def params():
    return {
        "up": {"kernel": normal(192, 576), "bias": normal(576)},
        "norm": {"scale": normal(192)},
        "embed": {"embedding": normal(40, 192).astype(ml_dtypes.bfloat16)},
        "step": np.int32(7),
    }


def same_bits(first, second):
    leaves = [jax.tree.leaves(tree) for tree in (first, second)]
    assert jax.tree.structure(first) == jax.tree.structure(second)
    for one, other in zip(*leaves, strict=True):
        one, other = np.asarray(one), np.asarray(other)
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
        assert one.tobytes() == other.tobytes()


FORMATS = {
    "tensor": (PerTensor(), {}, "compressed-tensors"),
    "channel": (PerChannel(-1), {}, "compressed-tensors"),
    "block": (BlockWise((128, 128)), {}, "fp8"),
    "bf16 block": (BlockWise((128, 128)), {"scale_dtype": "bfloat16"}, "fp8"),
    "ue8m0 block": (BlockWise((128, 128)), {"scale_dtype": "ue8m0"}, "fp8"),
    "oblong block": (BlockWise((32, 128)), {"method": "compressed-tensors"}, "compressed-tensors"),
    "weights alone": (PerChannel(-1), {"activations": None}, "compressed-tensors"),
    "shards": (PerChannel(-1), {"max_shard_bytes": 60_000}, "compressed-tensors"),
}


@pytest.mark.filterwarnings("ignore:blocks must divide weights")
@pytest.mark.parametrize("scaling, options, method", FORMATS.values(), ids=FORMATS)
def test_what_is_written_is_read_again_bitwise(tmp_path, scaling, options, method):
    dense = params()
    quantized = quantize_params(
        dense, [WeightRule("up/kernel", scaling, power_of_two="scale_dtype" in options)]
    )
    write_checkpoint(tmp_path / "model", quantized, **options)
    loaded = read_checkpoint(
        tmp_path / "model", jax.eval_shape(lambda: jax.tree.map(jnp.asarray, dense))
    )
    same_bits(loaded.params, quantized)
    assert isinstance(loaded.params["up"]["kernel"], Fp8Tensor)
    assert loaded.scheme.method == method
    assert loaded.scheme.activations == options.get("activations", "dynamic")

    # By other hands: the library's reader, and the values in float64 from what lies in the file.
    files = {}
    for path in (tmp_path / "model").glob("*.safetensors"):
        files |= library_reads(path)
    assert (len(list((tmp_path / "model").glob("*.safetensors"))) > 1) == (
        "max_shard_bytes" in options
    )
    scales = next(files[name] for name in files if name.startswith("up.weight_scale")).astype(
        np.float64
    )
    block = scaling.block_shape[::-1] if isinstance(scaling, BlockWise) else None
    if block:
        assert scales.shape == tuple(-(-n // b) for n, b in zip((576, 192), block))
        scales = np.kron(scales, np.ones(block))[:576, :192]
    values = files["up.weight"].astype(np.float64) * scales
    assert files["up.weight"].shape == (576, 192)
    assert np.array_equal(loaded.params["up"]["kernel"].dequantize(), values.T.astype(np.float32))
    groups = {"tensor": None, "channel": 1}.get(loaded.scheme.weights)
    amax = (
        np.abs(dense["up"]["kernel"].T).max()
        if groups is None
        else np.abs(dense["up"]["kernel"].T).max(axis=1, keepdims=True)
    )
    assert (np.abs(values - dense["up"]["kernel"].T) <= amax / 14).all()
    assert np.array_equal(files["embed.weight"], dense["embed"]["embedding"])


def test_a_block_of_a_ragged_matrix_is_as_config_says_and_not_as_the_shapes_suggest(tmp_path):
    # 576 / ceil(576 / 128) is 115.2 and 192 / 2 is 96: whoever infers the block gets 96 or worse.
    w = normal(576, 192)
    codes = RNG.integers(0, 0x7F, (576, 192)).astype(np.uint8).view(ml_dtypes.float8_e4m3fn)
    scale = np.exp2(RNG.integers(-6, 6, (5, 2))).astype(np.float32)
    library_writes(
        tmp_path / "model.safetensors", {"up.weight": codes, "up.weight_scale_inv": scale}
    )
    config = {
        "quantization_config": {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": [128, 128],
        }
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    got = read_checkpoint(tmp_path, {"up": {"kernel": w.T}}).params["up"]["kernel"]
    expected = np.empty((576, 192))
    for row in range(576):
        for column in range(192):
            expected[row, column] = float(codes[row, column]) * scale[row // 128, column // 128]
    assert np.array_equal(got.dequantize(), expected.T.astype(np.float32))


def test_layers_stacked_by_scan_are_tensors_of_their_own(tmp_path):
    modules = {"query": "self_attn.q_proj", "norm": "input_layernorm"}
    top = {"lm_head": "lm_head"}
    dense = {
        "blocks": {"query": {"kernel": normal(3, 16, 32)}, "norm": {"scale": normal(3, 16)}},
        "lm_head": {"kernel": normal(16, 8)},
    }
    names = llama_names("blocks", modules, top)
    for scaling in (PerTensor(), PerChannel(-1), BlockWise((8, 8))):
        folder = tmp_path / type(scaling).__name__
        quantized = quantize_params(dense, [WeightRule("blocks/.*kernel", scaling, stacked=1)])
        write_checkpoint(folder, quantized, names, config={"architectures": ["LlamaForCausalLM"]})
        loaded = read_checkpoint(folder, dense, names)
        same_bits(loaded.params, quantized)
        assert loaded.config["architectures"] == ["LlamaForCausalLM"]
        assert "lm_head" in str(loaded.config["quantization_config"])
        found = library_reads(folder / "model.safetensors")
        assert found["model.layers.2.self_attn.q_proj.weight"].shape == (32, 16)
        assert np.array_equal(
            found["model.layers.1.input_layernorm.weight"], dense["blocks"]["norm"]["scale"][1]
        )
    apart = {
        "model": {
            "layers": {
                str(n): {"self_attn": {"q_proj": {"kernel": dense["blocks"]["query"]["kernel"][n]}}}
                for n in range(3)
            }
        }
    }
    layers = read_checkpoint(
        folder, apart, llama_names(), ignore=[".*layernorm.weight", "lm_head.*"]
    ).params["model"]["layers"]
    for n in range(3):
        assert np.array_equal(
            layers[str(n)]["self_attn"]["q_proj"]["kernel"].dequantize(),
            loaded.params["blocks"]["query"]["kernel"].dequantize()[n],
        )


def test_heads_are_axes_of_their_own_here_and_one_axis_there(tmp_path):
    dense = {"query": {"kernel": normal(16, 4, 8)}, "out": {"kernel": normal(4, 8, 16)}}
    names = [Name("out/kernel", "out.weight", inputs=2), *TORCH_NAMES]
    quantized = quantize_params(
        dense,
        [
            WeightRule("query/kernel", PerChannel((-2, -1))),
            WeightRule("out/kernel", PerChannel(-1)),
        ],
    )
    write_checkpoint(tmp_path, quantized, names)
    same_bits(read_checkpoint(tmp_path, dense, names).params, quantized)
    found = library_reads(tmp_path / "model.safetensors")
    assert found["query.weight"].shape == (32, 16) and found["out.weight"].shape == (16, 32)
    values = found["query.weight"].astype(np.float64) * found["query.weight_scale"]
    assert np.array_equal(
        values.T.reshape(16, 4, 8).astype(np.float32), quantized["query"]["kernel"].dequantize()
    )


def test_static_activation_scales_are_those_of_calibration(tmp_path):
    casts = fp8jax.recipes.delayed().delayed_casts
    exponents = {"up": 2.0, "up#1": 3.0, "down": -4.0}  # `up` is called twice
    scales = {
        site: fp8jax.SiteScales.zeros(site, casts).replace(lhs=jnp.float32(lhs))
        for site, lhs in exponents.items()
    }
    dense = {"up": {"kernel": normal(8, 16)}, "down": {"kernel": normal(16, 8)}}
    quantized = quantize_params(dense, [WeightRule(".*kernel")])
    write_checkpoint(tmp_path, quantized, scales=scales)
    loaded = read_checkpoint(tmp_path, dense)
    assert loaded.scheme.activations == "static"
    assert loaded.input_scales == {"up/kernel": 8.0, "down/kernel": 2.0**-4}
    assert library_reads(tmp_path / "model.safetensors")["up.input_scale"].shape == (1,)
    with pytest.raises(
        ValueError,
        match="must hold a site with a delayed lhs for each quantized weight; got none named "
        "'down'",
    ):
        write_checkpoint(tmp_path / "x", quantized, scales={"up": scales["up"]})


def test_what_is_read_is_placed_as_asked(tmp_path):
    mesh = jax.make_mesh((4,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    dense = {"up": {"kernel": normal(16, 32), "bias": normal(32)}}
    quantized = quantize_params(dense, [WeightRule(".*kernel", PerChannel(-1))])
    write_checkpoint(tmp_path, quantized)
    like = {
        "up": {
            "kernel": jax.ShapeDtypeStruct(
                (16, 32), jnp.float32, sharding=NamedSharding(mesh, P(None, "x"))
            ),
            "bias": jax.ShapeDtypeStruct((32,), jnp.bfloat16, sharding=NamedSharding(mesh, P("x"))),
        }
    }
    got = read_checkpoint(tmp_path, like).params["up"]
    assert got["kernel"].data.sharding.spec == P(None, "x") and got[
        "kernel"
    ].scale.sharding.spec == P(None, "x")
    assert got["bias"].sharding.spec == P("x") and got["bias"].dtype == jnp.bfloat16
    same_bits(got["kernel"].data, quantized["up"]["kernel"].data)


@pytest.mark.filterwarnings("ignore:blocks must divide weights")
@pytest.mark.parametrize(
    "scaling, options",
    [(PerToken(), {}), (BlockWise((128, 128)), {"scale_dtype": "ue8m0"}), (PerTensor(), {})],
)
def test_converting_file_to_file_is_quantizing_in_memory(tmp_path, scaling, options):
    dense = params()
    write_checkpoint(tmp_path / "wide", dense, config={"model_type": "llama"})
    scheme = convert_checkpoint(
        tmp_path / "wide", tmp_path / "narrow", [WeightRule(r"up\.weight", scaling)], **options
    )
    loaded = read_checkpoint(tmp_path / "narrow", dense)
    assert loaded.scheme == scheme and loaded.config["model_type"] == "llama"
    here = (
        BlockWise((128, 128))
        if isinstance(scaling, BlockWise)
        else PerChannel(-1)
        if isinstance(scaling, PerToken)
        else scaling
    )
    same_bits(loaded.params, quantize_params(dense, [WeightRule("up/kernel", here)]))
    with pytest.raises(FileExistsError, match="must hold no checkpoint yet"):
        convert_checkpoint(
            tmp_path / "wide", tmp_path / "narrow", [WeightRule(r"up\.weight", scaling)]
        )
    with pytest.raises(CheckpointError, match="source must not be quantized"):
        convert_checkpoint(
            tmp_path / "narrow", tmp_path / "more", [WeightRule(r"up\.weight", scaling)]
        )


def quantized_up(scaling=PerTensor(), **options):
    return quantize_params(
        {"up": {"kernel": normal(16, 32)}}, [WeightRule(".*", scaling, **options)]
    )


@pytest.mark.parametrize(
    "tree, options, error, text",
    [
        (
            quantized_up(PerToken()),
            {},
            CheckpointError,
            r"'up/kernel': scales must be one per tensor, per output channel.*PerToken\(\)",
        ),
        (
            quantize_params(
                {"q": {"kernel": normal(16, 4, 8)}}, [WeightRule(".*", PerChannel(-1))]
            ),
            {},
            CheckpointError,
            r"WeightRule\(path, PerChannel\(axis=\(-2, -1\)\)\).*or, where it sums over more axes "
            r"than the first 1, name it so: Name\(\.\.\., inputs=2\)\. "
            r"A convolution's kernel must stay "
            r"unquantized: put WeightRule\(path, None\) first",
        ),
        (
            quantized_up(format="E5M2"),
            {},
            CheckpointError,
            "weights must be E4M3.*got E5M2 for 'up/kernel'",
        ),
        (
            quantized_up(BlockWise((8, 8)), power_of_two=False),
            {"scale_dtype": "ue8m0"},
            CheckpointError,
            "must be exact in float8_e8m0fnu",
        ),
        (
            quantized_up(),
            {"scale_dtype": "ue8m0"},
            CheckpointError,
            "method 'compressed-tensors' must have scales of float32.*take exponents for numbers",
        ),
        (
            quantized_up(PerChannel(-1)),
            {"method": "fp8"},
            CheckpointError,
            "method 'fp8' must have weights per tensor or block",
        ),
        (
            quantized_up()
            | quantize_params(
                {"down": {"kernel": normal(4, 4)}}, [WeightRule(".*", PerChannel(-1))]
            ),
            {},
            CheckpointError,
            "all have groups of one kind.*'down/kernel'",
        ),
        (
            {"x": {"kernel": np.zeros((2, 2), np.float32)}, "x.weight": np.zeros(2, np.float32)},
            {},
            ValueError,
            "got 'x.weight' for two",
        ),
        (
            {"x": np.zeros(2, np.complex128)},
            {},
            CheckpointError,
            "parameter 'x': dtype must be one that safetensors has.*got complex128",
        ),
        (
            {"a": {"rng": jax.random.key(0)}},
            {},
            CheckpointError,
            r"parameter 'a/rng' must be an array of numbers; got a typed key, key<fry>\[\]\.",
        ),
        (
            {"a": ["text"]},
            {},
            CheckpointError,
            "parameter 'a/0' must be an array of numbers; got str. Leave it out of params",
        ),
        (
            {"x": np.array(["text"])},
            {},
            CheckpointError,
            "parameter 'x' must be an array of numbers; got <U4",
        ),
        (
            quantized_up(),
            {"scale_dtype": "float16"},
            ValueError,
            r"scale_dtype must be one of .*got 'float16'",
        ),
        (
            quantized_up(),
            {"max_shard_bytes": 0},
            ValueError,
            "max_shard_bytes must be a positive number",
        ),
    ],
)
def test_what_can_not_be_written_is_refused_and_leaves_nothing(
    tmp_path, tree, options, error, text
):
    with pytest.raises(error, match=text):
        write_checkpoint(tmp_path / "new", tree, **options)
    assert not (tmp_path / "new").exists()


def test_a_write_that_fails_halfway_leaves_nothing(tmp_path):
    class Failing:
        shape, dtype, ndim = (2, 2), np.dtype(np.float32), 2

        def __array__(self, *_, **__):
            raise OSError("disk on fire")

    with pytest.raises(OSError, match="disk on fire"):
        write_checkpoint(tmp_path / "new", {"a": {"bias": np.zeros(3, np.float32)}, "z": Failing()})
    assert not (tmp_path / "new").exists()


@pytest.mark.slow
def test_converting_4_gb_takes_less_than_1_gb_of_memory(tmp_path):
    (tmp_path / "wide").mkdir()
    tensors = {
        f"layers.{n}.weight": TensorInfo(np.dtype(ml_dtypes.bfloat16), (8192, 8192))
        for n in range(30)
    }
    matrix = RNG.normal(size=(8192, 8192)).astype(ml_dtypes.bfloat16)
    with open(tmp_path / "wide" / "model.safetensors", "wb") as file:
        write_tensors(file, tensors, (matrix for _ in tensors))
    assert (tmp_path / "wide" / "model.safetensors").stat().st_size > 4e9
    program = (
        "import re, sys; from fp8jax import BlockWise, WeightRule; from fp8jax.interop import "
        "convert_checkpoint; rules = [WeightRule('.*weight', BlockWise((128, 128)))]; "
        "convert_checkpoint(sys.argv[1], sys.argv[2], rules); "
        "print(re.search(r'VmHWM:\\s*(\\d+)', open('/proc/self/status').read())[1])"
    )
    run = subprocess.run(
        [sys.executable, "-c", program, tmp_path / "wide", tmp_path / "narrow"],
        capture_output=True,
        text=True,
        check=True,
    )
    # Its own high-water mark: what getrusage says counts the process that started it, too.
    print(f"{int(run.stdout) * 1024 / 1e9:.2f} GB")
    assert "100%" in run.stderr  # the bar
    assert int(run.stdout) * 1024 < 1.0e9
    total = sum(path.stat().st_size for path in (tmp_path / "narrow").glob("*.safetensors"))
    assert 2.0e9 < total < 2.05e9
