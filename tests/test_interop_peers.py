"""What compressed-tensors and Qwix themselves make of our files and arrays, and we of theirs: `pip
install -e ".[peers]"`.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fp8jax import BlockWise, PerChannel, PerTensor, WeightRule, quantize, quantize_params
from fp8jax.interop import from_qarray, read_checkpoint, to_qarray, write_checkpoint

RNG = np.random.default_rng(3)
INSTALL = 'needs compressed-tensors and torch: pip install -e ".[peers]"'
FORMATS = {
    "tensor": (PerTensor(), {}),
    "channel": (PerChannel(-1), {}),
    "weights alone": (PerChannel(-1), {"activations": None}),
    "block": (BlockWise((128, 128)), {"method": "compressed-tensors"}),
}


@pytest.fixture(scope="module")
def torch():
    """torch, with compressed-tensors beside it. Neither is written for warnings as errors."""
    pytest.importorskip("compressed_tensors", reason=INSTALL)
    return pytest.importorskip("torch", reason=INSTALL)


pytestmark = pytest.mark.filterwarnings("ignore")


def dense_params():
    return {
        "up": {"kernel": RNG.normal(size=(192, 576)).astype(np.float32)},
        "lm_head": {"kernel": RNG.normal(size=(576, 8)).astype(np.float32)},
    }


def model_of(torch):
    model = torch.nn.Module()
    model.up, model.lm_head = (
        torch.nn.Linear(192, 576, bias=False),
        torch.nn.Linear(576, 8, bias=False),
    )
    return model


@pytest.mark.parametrize("scaling, options", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("power_of_two", [True, False])
def test_compressed_tensors_reads_what_we_wrote(tmp_path, torch, scaling, options, power_of_two):
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
    from safetensors.torch import load_file

    dense = dense_params()
    quantized = quantize_params(
        dense, [WeightRule("up/kernel", scaling, power_of_two=power_of_two)]
    )
    write_checkpoint(tmp_path, quantized, **options)
    config = QuantizationConfig.model_validate(
        json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    )
    model = model_of(torch)
    apply_quantization_config(model, config)
    compressor = ModelCompressor(quantization_config=config)
    compressor.compress_model(model)
    missing, surplus = model.load_state_dict(
        load_file(tmp_path / "model.safetensors"), strict=False
    )
    assert not missing and not surplus
    assert model.up.weight.dtype == torch.float8_e4m3fn
    compressor.decompress_model(model)
    assert np.array_equal(
        model.up.weight.detach().float().numpy().T, quantized["up"]["kernel"].dequantize()
    )
    assert np.array_equal(model.lm_head.weight.detach().numpy().T, dense["lm_head"]["kernel"])


@pytest.mark.parametrize("strategy", ["tensor", "channel", "block"])
@pytest.mark.parametrize("scale_dtype", ["float32", "bfloat16"])
def test_we_read_what_compressed_tensors_wrote(tmp_path, torch, strategy, scale_dtype):
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
    from safetensors.torch import save_file

    dense = dense_params()
    common = {"num_bits": 8, "type": "float", "symmetric": True}
    inputs = common | (
        {"strategy": "tensor"} if strategy == "tensor" else {"strategy": "token", "dynamic": True}
    )
    weights = (
        common
        | {"strategy": strategy}
        | ({"block_structure": [128, 128]} if strategy == "block" else {})
    )
    config = QuantizationConfig(
        config_groups={
            "group_0": {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
        },
        ignore=["lm_head"],
    )
    model = model_of(torch)
    for name in dense:
        getattr(model, name).weight.data = torch.from_numpy(dense[name]["kernel"].T.copy())
    apply_quantization_config(model, config)
    matrix = dense["up"]["kernel"].T
    amax = {
        "tensor": lambda: np.abs(matrix).max(keepdims=True)[0],
        "channel": lambda: np.abs(matrix).max(axis=1, keepdims=True),
        "block": lambda: np.float32(
            [
                [np.abs(matrix[i : i + 128, j : j + 128]).max() for j in (0, 128)]
                for i in range(0, 576, 128)
            ]
        ),
    }
    scale = torch.from_numpy(amax[strategy]() / 448).to(getattr(torch, scale_dtype))
    model.up.weight_scale.data = scale
    if strategy == "tensor":
        model.up.input_scale.data = torch.tensor([0.0123])
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    save_file(
        {name: tensor.contiguous() for name, tensor in model.state_dict().items()},
        tmp_path / "model.safetensors",
    )
    compressor.update_config(tmp_path)

    loaded = read_checkpoint(tmp_path, dense)
    got = loaded.params["up"]["kernel"]
    assert loaded.scheme.weights == strategy
    assert np.array_equal(
        np.asarray(got.data).view(np.uint8).T, model.up.weight.detach().view(torch.uint8).numpy()
    )
    if strategy == "tensor":
        assert loaded.input_scales == {"up/kernel": np.float32(0.0123)}
    codes, scales = model.up.weight.detach().double().numpy(), scale.double().numpy()
    scales = np.kron(scales, np.ones((128, 128)))[:576, :192] if strategy == "block" else scales
    assert np.array_equal(got.dequantize(), (codes * scales).T.astype(np.float32))
    if scale_dtype == "float32":  # in bfloat16 they round the values once more
        compressor.decompress_model(model)
        assert np.array_equal(model.up.weight.detach().numpy().T, got.dequantize())


@pytest.mark.parametrize(
    "scaling, tiles",
    [
        (PerTensor(), {}),
        (PerChannel(-1), {}),
        (PerChannel((0, -1)), {}),
        (BlockWise((32, 16)), {0: 32, 1: 16}),
    ],
)
def test_qwix_means_the_same(scaling, tiles):
    qwix = pytest.importorskip("qwix", reason='needs Qwix: pip install -e ".[peers]"')
    x = jnp.asarray(RNG.normal(size=(64, 48)) * np.exp2(RNG.integers(-9, 9, (64, 1))), jnp.float32)
    q = quantize(x, scaling=scaling)
    theirs = to_qarray(q)
    assert isinstance(theirs, qwix.QArray)
    assert np.array_equal(qwix.dequantize(theirs), q.dequantize())
    back = from_qarray(theirs)
    assert back.scaling == q.scaling
    jax.tree.map(np.testing.assert_array_equal, back, q)
    channels = (
        [
            axis % 2
            for axis in (scaling.axis if isinstance(scaling.axis, tuple) else (scaling.axis,))
        ]
        if isinstance(scaling, PerChannel)
        else []
    )
    made = qwix.quantize(x, jnp.float8_e4m3fn, channelwise_axes=channels, tiled_axes=tiles)
    assert np.array_equal(from_qarray(made).dequantize(), qwix.dequantize(made))
    assert from_qarray(made).scaling == q.scaling


@pytest.mark.parametrize(
    "dtype", [jnp.float32, jnp.bfloat16, jnp.float16], ids=lambda d: d.__name__
)
def test_qwix_stands_for_the_same_dtype(dtype):
    qwix = pytest.importorskip("qwix", reason='needs Qwix: pip install -e ".[peers]"')
    x = jnp.asarray(RNG.normal(size=(64, 48)), dtype)
    q = quantize(x, scaling=PerChannel(-1))
    theirs = to_qarray(q)
    assert theirs.dtype == qwix.dequantize(theirs).dtype == dtype
    assert np.array_equal(qwix.dequantize(theirs), q.dequantize())
    back = from_qarray(theirs)
    assert back.dtype == dtype
    jax.tree.map(np.testing.assert_array_equal, back, q)


def test_scales_that_a_narrow_dtype_would_round_are_refused():
    x = jnp.asarray(RNG.normal(size=(64, 48)), jnp.bfloat16)
    exact = quantize(x, scaling=PerChannel(-1), power_of_two=False)
    tiny = quantize(jnp.full((4, 4), 1e-6, jnp.float16))
    for q in (exact, tiny):
        with pytest.raises(ValueError, match=f"exact in {q.dtype}.*got others. Quantize with"):
            to_qarray(q)
    with pytest.raises(ValueError, match="got traced ones"):
        jax.jit(lambda x: to_qarray(quantize(x)).scale)(x)


def test_qwix_arrays_that_can_not_be_ours_or_theirs_are_refused():
    class Array:
        def __init__(self, qvalue, scale, zero_point=None):
            self.qvalue, self.scale, self.zero_point = qvalue, scale, zero_point

    codes, scale = jnp.ones((4, 6), jnp.float8_e4m3fn), jnp.ones((1, 6))
    assert from_qarray(Array(codes, scale)).scaling == PerChannel(-1)
    for array, error, text in [
        (Array(codes.astype(jnp.int8), scale), TypeError, "q must hold float8 codes; got int8"),
        (Array(codes, scale, scale), ValueError, "q must be symmetric; got a zero_point"),
        (
            Array(codes, jnp.ones((1, 4))),
            ValueError,
            r"divide its shape; got \[1, 4\] for \[4, 6\]",
        ),
        (codes, TypeError, "q must be a qwix.QArray; got ArrayImpl"),
    ]:
        with pytest.raises(error, match=text):
            from_qarray(array)
    with pytest.raises(ValueError, match=r"blocks must divide the shape.*BlockWise.*\[4, 6\]"):
        to_qarray(quantize(jnp.ones((4, 6)), scaling=BlockWise((4, 4))))
    with pytest.raises(TypeError, match="q must be an Fp8Tensor"):
        to_qarray(codes)
