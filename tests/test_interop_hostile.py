"""Damaged and hostile checkpoints: a clear error, at once, and nothing else."""

import json
import time

import jax
import ml_dtypes
import numpy as np
import pytest

from fp8jax import BlockWise, PerChannel, PerTensor, WeightRule, quantize_params
from fp8jax.interop import CheckpointError, convert_checkpoint, read_checkpoint, write_checkpoint

LIKE = {"up": {"kernel": np.zeros((8, 16), np.float32), "bias": np.zeros(16, np.float32)}}


@pytest.fixture(scope="module")
def intact(tmp_path_factory):
    """A checkpoint of each format, and one of two files."""
    root = tmp_path_factory.mktemp("intact")
    dense = jax.tree.map(
        lambda x: np.random.default_rng(0).normal(size=x.shape).astype(np.float32), LIKE
    )
    for name, scaling, options in [
        ("tensor", PerTensor(), {}),
        ("channel", PerChannel(-1), {}),
        ("block", BlockWise((8, 8)), {}),
        ("ue8m0", BlockWise((8, 8)), {"scale_dtype": "ue8m0"}),
        ("shards", PerTensor(), {"max_shard_bytes": 140}),
    ]:
        write_checkpoint(
            root / name, quantize_params(dense, [WeightRule(".*kernel", scaling)]), **options
        )
    return {
        path.name: {file.name: file.read_bytes() for file in path.iterdir()}
        for path in root.iterdir()
    }


def place(folder, files):
    folder.mkdir(exist_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


def header_of(data):
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def with_header(header, body):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + body


def edit(change):
    """A hostile act on the header of a file."""

    def act(data):
        header, body = header_of(data)
        return with_header(change(header) or header, body)

    return act


def set_in(name, **fields):
    return edit(lambda header: header[name].update(fields))


def values(change):
    """A hostile act on the values of the scales."""

    def act(data):
        header, body = header_of(data)
        name = next(name for name in header if "scale" in name)
        start, end = header[name]["data_offsets"]
        return with_header(header, body[:start] + change(body[start:end]) + body[end:])

    return act


def retyped(name, dtype, size):
    """A tensor with another dtype of as many bytes."""

    def change(header):
        start, end = header[name]["data_offsets"]
        header[name] |= {
            "dtype": dtype,
            "shape": [8 if size == 2 else 16, (end - start) // size // (8 if size == 2 else 16)],
        }

    return edit(change)


FILE = "model.safetensors"
ACTS = {
    "cut in its tensors": (
        "tensor",
        FILE,
        lambda d: d[:-7],
        "its tensors must end where the file does",
    ),
    "cut in its header": (
        "tensor",
        FILE,
        lambda d: d[:50],
        "must hold its header whole; got 50 bytes",
    ),
    "cut in its length": (
        "tensor",
        FILE,
        lambda d: d[:5],
        "must hold its header whole; got 5 bytes",
    ),
    "empty": ("tensor", FILE, lambda d: b"", "must hold its header whole; got 0 bytes"),
    "added to": ("tensor", FILE, lambda d: d + b"x", "must end where the file does"),
    "header of 2^63": (
        "tensor",
        FILE,
        lambda d: (1 << 63).to_bytes(8, "little") + d[8:],
        "for a header of 9223372036854775808",
    ),
    "header of 2^64 - 1": (
        "tensor",
        FILE,
        lambda d: b"\xff" * 8 + d[8:],
        "for a header of 18446744073709551615",
    ),
    "no UTF-8": (
        "tensor",
        FILE,
        lambda d: with_header(b'{"\xff": 1}', b""),
        "JSON must be well-formed",
    ),
    "deep JSON": (
        "tensor",
        FILE,
        lambda d: with_header(b"[" * 1_000_000, b""),
        "JSON must be well-formed",
    ),
    "huge number": (
        "tensor",
        FILE,
        lambda d: with_header(b'{"a":' + b"9" * 1_000_000 + b"}", b""),
        "JSON must be well-formed",
    ),
    "a list": (
        "tensor",
        FILE,
        lambda d: with_header(b"[]", b""),
        "JSON must be an object; got list",
    ),
    "a name twice": (
        "tensor",
        FILE,
        lambda d: with_header(b'{"a": 1, "a": 2}', b""),
        "the name 'a' twice",
    ),
    "metadata": (
        "tensor",
        FILE,
        edit(lambda h: h.update(__metadata__={"a": 1})),
        "__metadata__ must map names to texts",
    ),
    "overlap": (
        "tensor",
        FILE,
        set_in("up.weight", data_offsets=[32, 160]),
        "must follow each other.*they overlap",
    ),
    "hole": (
        "tensor",
        FILE,
        set_in("up.weight_scale", data_offsets=[200, 204]),
        "they leave a hole",
    ),
    "offsets backwards": (
        "tensor",
        FILE,
        set_in("up.weight", data_offsets=[192, 64]),
        "must span the 128 bytes",
    ),
    "negative offset": (
        "tensor",
        FILE,
        set_in("up.weight", data_offsets=[-64, 64]),
        "must be two whole numbers",
    ),
    "fraction": (
        "tensor",
        FILE,
        set_in("up.weight", data_offsets=[64.0, 192.0]),
        "must be two whole numbers",
    ),
    "shape of 2^62 twice": (
        "tensor",
        FILE,
        set_in("up.weight", shape=[1 << 62, 1 << 62]),
        "must span the",
    ),
    "shape of truths": (
        "tensor",
        FILE,
        set_in("up.weight", shape=[True, 128]),
        "must be a list of at most 32 whole numbers",
    ),
    "a thousand axes": (
        "tensor",
        FILE,
        set_in("up.weight", shape=[1] * 1000),
        "must be a list of at most 32",
    ),
    "unknown dtype": (
        "tensor",
        FILE,
        set_in("up.weight", dtype="F4"),
        "dtype of tensor 'up.weight' must be one of",
    ),
    "dtype a list": (
        "tensor",
        FILE,
        set_in("up.weight", dtype=[]),
        "dtype of tensor 'up.weight' must be one of",
    ),
    "field missing": (
        "tensor",
        FILE,
        edit(lambda h: h["up.weight"].pop("shape") and None),
        "must have dtype, shape and data_offsets",
    ),
    "E5M2 for E4M3": (
        "tensor",
        FILE,
        set_in("up.weight", dtype="F8_E5M2"),
        "'up.weight' must be float8_e4m3fn.*got float8_e5m2",
    ),
    "bytes for E4M3": (
        "tensor",
        FILE,
        set_in("up.weight", dtype="U8"),
        "'up.weight' must be float8_e4m3fn, for it has scales",
    ),
    "integers for floats": (
        "tensor",
        FILE,
        set_in("up.bias", dtype="I32"),
        "'up/bias' must be float32; got 'up.bias' of int32",
    ),
    "integers for scales": (
        "tensor",
        FILE,
        set_in("up.weight_scale", dtype="U32"),
        "must be float32, bfloat16, float16 or",
    ),
    "another shape": (
        "tensor",
        FILE,
        set_in("up.weight", shape=[8, 16]),
        r"'up.weight' must be \[16, 8\].*got \[8, 16\]",
    ),
    "scales of another shape": (
        "block",
        FILE,
        set_in("up.weight_scale_inv", shape=[1, 2]),
        r"must be \[2, 1\], one per block of \[8, 8\]",
    ),
    "NaN scale": (
        "tensor",
        FILE,
        values(lambda b: np.float32("nan").tobytes()),
        "'up.weight_scale' must be finite.*got nan",
    ),
    "infinite scale": (
        "channel",
        FILE,
        values(lambda b: np.float32("inf").tobytes() + b[4:]),
        "must be finite.*got inf",
    ),
    "negative scale": (
        "channel",
        FILE,
        values(lambda b: np.float32(-2).tobytes() + b[4:]),
        "not negative; got -2.0",
    ),
    "NaN of E8M0": ("ue8m0", FILE, values(lambda b: b"\xff" + b[1:]), "must be finite.*got nan"),
    "NaN codes": (
        "tensor",
        FILE,
        lambda d: d.replace(header_of(d)[1][64:70], b"\x7f" * 6),
        "'up.weight' must hold numbers; got NaNs",
    ),
    "no scales": (
        "tensor",
        FILE,
        edit(lambda h: h.update({"other": h.pop("up.weight_scale")})),
        "must have scales, 'up.weight_scale'; got",
    ),
    "renamed": (
        "tensor",
        FILE,
        edit(lambda h: h.update({"up.w": h.pop("up.weight")})),
        "must hold tensor 'up.weight'; got none",
    ),
    "one more": (
        "tensor",
        FILE,
        edit(lambda h: h.update({"x": {"dtype": "F32", "shape": [0], "data_offsets": [196, 196]}})),
        "got 'x' and 0 more that none is",
    ),
    "missing shard": (
        "shards",
        "model-00002-of-00002.safetensors",
        None,
        "model-00002-of-00002.safetensors: it must be a file",
    ),
    "no file at all": (
        "tensor",
        FILE,
        None,
        "must hold model.safetensors or model.safetensors.index.json",
    ),
    "no config": (
        "tensor",
        "config.json",
        None,
        "quantization_config must say how 'up.weight' is quantized",
    ),
    "empty config": (
        "tensor",
        "config.json",
        lambda d: b"",
        "config.json: its JSON must be well-formed",
    ),
}


@pytest.mark.parametrize("checkpoint, file, act, text", ACTS.values(), ids=ACTS)
def test_an_act_is_told_within_a_second(tmp_path, intact, checkpoint, file, act, text):
    files = dict(intact[checkpoint])
    data = files.pop(file)
    folder = place(tmp_path / "model", files | ({file: act(data)} if act else {}))
    before = sorted(path.name for path in tmp_path.rglob("*"))
    start = time.process_time()
    with pytest.raises(CheckpointError, match=text):
        read_checkpoint(folder, LIKE)
    assert time.process_time() - start < 1
    assert sorted(path.name for path in tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    "name",
    [
        "../secret.safetensors",
        "/etc/passwd",
        "a/b.safetensors",
        "..\\x.safetensors",
        ".hidden.safetensors",
        "x.bin",
        "c:x.safetensors",
        "x\0.safetensors",
        3,
        None,
        "a" * 300 + ".safetensors",
    ],
)
def test_an_index_leads_nowhere_else(tmp_path, intact, name):
    folder = place(tmp_path / "model", intact["shards"])
    (tmp_path / "secret.safetensors").write_bytes(intact["tensor"][FILE])
    index = folder / "model.safetensors.index.json"
    data = json.loads(index.read_text())
    data["weight_map"]["up.bias"] = name
    index.write_text(json.dumps(data))
    with pytest.raises(CheckpointError, match="files must be plain names that end in .safetensors"):
        read_checkpoint(folder, LIKE)


@pytest.mark.parametrize(
    "weight_map, text",
    [
        ({}, "weight_map must map tensors to files"),
        ([], "weight_map must map"),
        (None, "weight_map must map"),
        (
            {"up.wrong": "model-00001-of-00002.safetensors"},
            "must hold the tensors that it is named for; got it without 'up.wrong'",
        ),
    ],
)
def test_an_index_says_what_is_there(tmp_path, intact, weight_map, text):
    folder = place(
        tmp_path,
        intact["shards"]
        | {"model.safetensors.index.json": json.dumps({"weight_map": weight_map}).encode()},
    )
    with pytest.raises(CheckpointError, match=text):
        read_checkpoint(folder, LIKE)


def fp8(**fields):
    return {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "weight_block_size": [8, 8],
    } | fields


def compressed(weights=None, **fields):
    weights = {"num_bits": 8, "type": "float", "strategy": "tensor"} | (weights or {})
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "config_groups": {"group_0": {"weights": weights, "input_activations": None}},
    } | fields


@pytest.mark.parametrize(
    "config, text",
    [
        ([], "quantization_config must be an object"),
        ({"quant_method": "gptq"}, "quant_method must be one of .*got 'gptq'"),
        (fp8(weight_block_size=[8]), "weight_block_size must be two positive numbers"),
        (fp8(weight_block_size=[0, 8]), "two positive numbers"),
        (fp8(weight_block_size=[8.0, 8]), "two positive numbers"),
        (fp8(fmt="e5m2"), "fmt must be 'e4m3'"),
        (fp8(activation_scheme=None), "activation_scheme must be"),
        (fp8(activation_scheme="static"), "must have dynamic activations"),
        (compressed(format="pack-quantized"), "format must be one of"),
        (compressed(config_groups={}), "an object of groups"),
        (compressed(config_groups={"a": 1}), "an object of groups"),
        (compressed({"num_bits": 4}), "weights must be symmetric"),
        (compressed({"symmetric": False}), "weights must be symmetric"),
        (compressed({"strategy": "tensor_group"}), "strategy of weights must be"),
        (compressed({"strategy": "group"}), "group_size must be a positive number"),
        (compressed({"strategy": "block"}), "block_structure must be two positive numbers"),
        (
            compressed({"strategy": "channel"}),
            r"'up.weight_scale' must be \[16, 1\], one per channel",
        ),
    ],
)
def test_config_says_what_is_known(tmp_path, intact, config, text):
    folder = place(
        tmp_path,
        intact["tensor"] | {"config.json": json.dumps({"quantization_config": config}).encode()},
    )
    with pytest.raises(CheckpointError, match=text):
        read_checkpoint(folder, LIKE)


def test_a_conversion_of_a_damaged_file_writes_nothing(tmp_path, intact):
    write_checkpoint(tmp_path / "wide", LIKE)
    data = (tmp_path / "wide" / FILE).read_bytes()
    (tmp_path / "wide" / FILE).write_bytes(data[:-1])
    with pytest.raises(CheckpointError, match="must end where the file does"):
        convert_checkpoint(tmp_path / "wide", tmp_path / "narrow", [WeightRule(".*weight")])
    assert not (tmp_path / "narrow").exists()


def mutated(data, rng):
    """A file with some of its bytes, or of its header's tokens, changed."""
    kind = rng.integers(5)
    length = int.from_bytes(data[:8], "little")
    if kind == 0:
        data = bytearray(data)
        for at in rng.integers(0, len(data), rng.integers(1, 9)):
            data[at] = rng.integers(256)
        return bytes(data)
    if kind == 1:
        data = bytearray(data)
        data[rng.integers(0, 8 + length)] ^= 1 << rng.integers(8)
        return bytes(data)
    if kind == 2:
        start, end = np.sort(rng.integers(0, len(data) + 1, 2))
        return data[:start] + data[end:]
    text = data[8 : 8 + length]
    digits = [at for at, byte in enumerate(text) if byte in b'0123456789[]{}",:']
    at = rng.choice(digits)
    put = rng.choice(
        [
            b"0",
            b"-",
            b"9" * 30,
            b"[",
            b"}",
            b'"',
            b"1e9",
            b"null",
            b",",
            b"F8_E5M2",
            b"true",
            b"\x00",
            b"..",
            b"",
        ]
    )
    text = text[:at] + bytes(put) + text[at + 1 :]
    return (len(text) if kind == 3 else length).to_bytes(8, "little") + text + data[8 + length :]


def mutate_files(folder, intact, count, seed, read):
    """Reads mutated checkpoints; any error but ours fails, and so does what takes long. Returns how
    many were refused.
    """
    rng = np.random.default_rng(seed)
    names = sorted(intact)
    refused, slowest = 0, 0.0
    for name in names:
        place(folder / name, intact[name])
    for _ in range(count):
        name = names[rng.integers(len(names))]
        file = sorted(intact[name])[rng.integers(len(intact[name]))]
        data = intact[name][file]
        (folder / name / file).write_bytes(
            mutated(data, rng)
            if file.endswith(".safetensors")
            else mutated(len(data).to_bytes(8, "little") + data, rng)[8:]
        )
        start = time.perf_counter()
        try:
            read(folder / name)
        except CheckpointError:
            refused += 1
        slowest = max(slowest, time.perf_counter() - start)
        (folder / name / file).write_bytes(data)
    assert slowest < 1
    return refused


def read_up(folder):
    loaded = read_checkpoint(folder, LIKE).params["up"]
    assert loaded["kernel"].shape == (8, 16) and loaded["bias"].shape == (16,)


def test_mutated_files_are_read_or_refused(tmp_path, intact):
    assert 100 < mutate_files(tmp_path, intact, 500, 0, read_up) < 500


@pytest.mark.slow
def test_100_000_mutated_files_are_read_or_refused(tmp_path, intact):
    assert 20_000 < mutate_files(tmp_path, intact, 100_000, 1, read_up) < 100_000


def test_the_values_behind_codes_are_those_of_ml_dtypes(tmp_path, intact):
    """What is not damaged is read: the yardstick of all of the above."""
    for name, files in intact.items():
        params = read_checkpoint(place(tmp_path / name, files), LIKE).params
        assert params["up"]["kernel"].data.dtype == ml_dtypes.float8_e4m3fn
        assert np.abs(params["up"]["kernel"].dequantize()).max() > 1
