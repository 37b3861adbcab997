"""Every dialect that FP8 checkpoints are out there in: read, recognized, and brought to another."""

import json

import jax
import numpy as np
import pytest
from foreign_checkpoints import (
    FOREIGN,
    HEAD,
    LIKE,
    PATHS,
    SHAPES,
    K,
    V,
)

from fp8jax import Fp8Tensor, WeightRule
from fp8jax._params import named_leaves
from fp8jax.interop import (
    DIALECTS,
    CheckpointError,
    convert_checkpoint,
    llama_names,
    read_checkpoint,
)


def leaves_of(tree):
    return dict(named_leaves(tree)[0])


def kv_of(kv):
    """Static scales of keys and values as they are to be read, by path."""
    found = {}
    for name, value in kv.items():
        if "v_scale" in name or V in name:
            found[PATHS[V]] = value
        if "k_scale" in name or K in name or "kv_scale" in name:
            found[PATHS[K]] = value
    return found


@pytest.mark.parametrize("name", FOREIGN)
def test_a_dialect_is_read_bit_for_bit(tmp_path, name):
    foreign = FOREIGN[name]
    values, inputs, kv = foreign.write(tmp_path)
    loaded = read_checkpoint(tmp_path, LIKE, llama_names())
    leaves = leaves_of(loaded.params)
    for module in SHAPES:
        leaf = leaves[PATHS[module]]
        assert isinstance(leaf, Fp8Tensor) and leaf.data.dtype == foreign.format
        # float32 holds the product of a code and a scale of 8 bits exactly, and rounds one of 24
        # bits once.
        assert np.array_equal(leaf.dequantize(), values[module].T.astype(np.float32))
        kind, scheme = foreign.kind_of(module), loaded.schemes[PATHS[module]]
        assert (scheme.block or scheme.weights) == kind
        assert scheme.method == foreign.method
        says = foreign.says[module] if isinstance(foreign.says, dict) else foreign.says
        assert scheme.activations == says
    assert np.array_equal(leaves[PATHS[HEAD]], values[HEAD].T)
    assert loaded.excluded == (PATHS[HEAD],) and loaded.left == ()
    assert foreign.title in loaded.title
    assert loaded.input_scales == {PATHS[module]: value for module, value in inputs.items()}
    assert loaded.kv_scales == pytest.approx(kv_of(kv), rel=1e-6)
    assert len(loaded.kv_scales) == (2 if kv else 0)


def test_the_layouts_are_of_all_dialects():
    assert {foreign.method for foreign in FOREIGN.values()} == set(DIALECTS)


# By the method to write, the layouts that it can hold; all others are refused in words.
_MX = {"ct mxfp8", "mxfp8", "modelopt mxfp8"}
_STATIC = {"ct static and kv", "modelopt fp8", "modelopt kv", "quark"} | {
    "hf static",
    "mistral",
    "autofp8",
    "autofp8 oldest",
    "comfy",
    "comfy newest",
}
_MIXED = {"ct groups", "modelopt mixed", "quark layers", "comfy e5m2, wide products", "cast e5m2"}
_BLOCKS = {"ct block", "hf block", "hf block bf16", "hf no block said", "minimax"}
_WITH_KV = {"ct static and kv", "modelopt kv", "autofp8", "quark"}
_TENSORS = {"hf tensor", "hf tensor of rank 2", "autofp8 dynamic", "comfy newer"}
HELD = {
    "compressed-tensors": set(FOREIGN) - _MIXED,
    "fp8": (_STATIC | _TENSORS | _BLOCKS | _MX | {"deepseek v4", "hf block u8", "torchao blocks"})
    - _WITH_KV,
    "mxfp8": _MX,
    "modelopt": _STATIC | _MX,
}


@pytest.mark.filterwarnings("ignore:blocks must divide weights")
@pytest.mark.parametrize("name", FOREIGN)
def test_a_dialect_is_brought_to_each_other_bit_for_bit_or_refused(tmp_path, name):
    FOREIGN[name].write(tmp_path / "source")
    with pytest.raises(CheckpointError, match="source must not be quantized, for rules"):
        convert_checkpoint(tmp_path / "source", tmp_path / "x", [WeightRule(".*up_proj.weight")])
    before = read_checkpoint(tmp_path / "source", LIKE, llama_names())
    for method, held in HELD.items():
        target = tmp_path / method
        if name not in held:
            with pytest.raises(CheckpointError, match="must|has no scales of keys"):
                convert_checkpoint(tmp_path / "source", target, method=method, progress=False)
            assert not target.exists()
            continue
        scheme = convert_checkpoint(tmp_path / "source", target, method=method, progress=False)
        after = read_checkpoint(target, LIKE, llama_names())
        assert scheme == after.scheme and scheme.method == method
        assert jax.tree.structure(before.params) == jax.tree.structure(after.params)
        for one, other in zip(
            jax.tree.leaves(before.params), jax.tree.leaves(after.params), strict=True
        ):
            assert np.asarray(one).tobytes() == np.asarray(other).tobytes()
        assert after.input_scales == before.input_scales
        assert after.kv_scales == before.kv_scales
        assert after.excluded == before.excluded
        config = json.loads((target / "config.json").read_text())
        assert "compression_config" not in config
        assert not config.get("text_config")
