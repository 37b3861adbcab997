"""Ready names of the families of models that most checkpoints are of."""

import re
from collections.abc import Mapping

from fp8jax.interop._names import EXPERT, LAYER, Name

_TOP = ("model.embed_tokens", "model.norm", "lm_head")
_ATTENTION = tuple(f"self_attn.{name}_proj" for name in "qkvo")
_MLP = tuple(f"mlp.{name}_proj" for name in ("gate", "up", "down"))
_NORMS = ("input_layernorm", "post_attention_layernorm")
_HEAD_NORMS = ("self_attn.q_norm", "self_attn.k_norm")
_LAST = (("kernel", "weight", 1), ("bias", "bias", 0), ("(?:scale|weight|embedding)", "weight", 0))


def _named(
    layers: str,
    modules: Mapping[str, str] | None,
    top: Mapping[str, str] | None,
    ready: tuple[str, ...],
) -> tuple[Name, ...]:
    """Names of the given modules, which come first, and of those that a family has."""
    here = re.escape(layers).replace(re.escape(LAYER), r"(\d+)")
    number, next_group = (r"\1", 2) if LAYER in layers else (LAYER, 1)
    names = []
    for path, name in (dict(modules or {}) | _same(ready, modules)).items():
        # Experts are stacked where the path doesn't number them.
        numbered = EXPERT in path
        pattern = re.escape(path).replace(re.escape(EXPERT), r"(\d+)")
        theirs = name.replace(EXPERT, rf"\{next_group}") if numbered else name
        last = _LAST + ((("", "weight", 1),) if EXPERT in name and not numbered else ())
        for own, other, inputs in last:
            full = f"{here}/{pattern}/{own}" if own else f"{here}/{pattern}"
            names.append(Name(full, f"model.layers.{number}.{theirs}.{other}", inputs))
    for path, name in (dict(top or {}) | _same(_TOP, top)).items():
        for own, other, inputs in _LAST:
            names.append(Name(f"{re.escape(path)}/{own}", f"{name}.{other}", inputs))
    return tuple(names)


def _same(names: tuple[str, ...], given: Mapping[str, str] | None) -> dict[str, str]:
    """Modules that are called the same here, but for given paths; experts numbered or stacked."""
    paths = {}
    for name in names:
        path = name.replace(".", "/")
        for own in dict.fromkeys((path, path.replace(f"/{EXPERT}", ""))):
            if own not in (given or {}):
                paths[own] = name
    return paths


def llama_names(
    layers: str = "model/layers/{layer}",
    modules: Mapping[str, str] | None = None,
    top: Mapping[str, str] | None = None,
) -> tuple[Name, ...]:
    """The names of Llama-style checkpoints.

    Args:
      layers: path of a layer's parameters here, with "{layer}" in the place of its number; without
        it, that of layers stacked by `nn.scan`.
      modules: by path of a module within a layer here, its name within a layer there. They are
        added to those that have the same names here and there, "self_attn/q_proj" for
        "self_attn.q_proj" and so on.
      top: the same of what is outside of the layers, added to "model/embed_tokens", "model/norm"
        and "lm_head".

    Returns:
      Names for `read_checkpoint` and `write_checkpoint`.

    >>> from fp8jax.interop._names import find_name
    >>> find_name(llama_names(), "model/layers/3/mlp/up_proj/kernel")[1]
    'model.layers.3.mlp.up_proj.weight'
    >>> find_name(llama_names("blocks", {"query": "self_attn.q_proj"}), "blocks/query/kernel")[1]
    'model.layers.{layer}.self_attn.q_proj.weight'
    """
    return _named(layers, modules, top, _ATTENTION + _MLP + _NORMS)


def qwen3_names(
    layers: str = "model/layers/{layer}",
    modules: Mapping[str, str] | None = None,
    top: Mapping[str, str] | None = None,
) -> tuple[Name, ...]:
    """The names of Qwen3: Llama's, and norms of queries and keys. Arguments as of `llama_names`.

    >>> from fp8jax.interop._names import find_name
    >>> find_name(qwen3_names(), "model/layers/3/self_attn/q_norm/scale")[1]
    'model.layers.3.self_attn.q_norm.weight'
    """
    return _named(layers, modules, top, _ATTENTION + _MLP + _NORMS + _HEAD_NORMS)


def gemma_names(
    layers: str = "model/layers/{layer}",
    modules: Mapping[str, str] | None = None,
    top: Mapping[str, str] | None = None,
) -> tuple[Name, ...]:
    """The names of Gemma 2 and 3: Qwen3's, and norms around the MLP. Arguments as of `llama_names`.

    Values are as in the file, where norms hold their scale less one.

    >>> from fp8jax.interop._names import find_name
    >>> find_name(gemma_names("blocks"), "blocks/pre_feedforward_layernorm/scale")[1]
    'model.layers.{layer}.pre_feedforward_layernorm.weight'
    """
    around = ("pre_feedforward_layernorm", "post_feedforward_layernorm")
    return _named(layers, modules, top, _ATTENTION + _MLP + _NORMS + _HEAD_NORMS + around)


def mixtral_names(
    layers: str = "model/layers/{layer}",
    modules: Mapping[str, str] | None = None,
    top: Mapping[str, str] | None = None,
) -> tuple[Name, ...]:
    """The names of Mixtral. Arguments as of `llama_names`.

    Experts are modules of their own, "block_sparse_moe/experts/3/w1/kernel", or stacked along an
    axis behind that of layers, "block_sparse_moe/experts/w1/kernel" or
    "block_sparse_moe/experts/w1", `[experts, in, out]`.

    >>> from fp8jax.interop._names import find_name
    >>> find_name(mixtral_names(), "model/layers/3/block_sparse_moe/experts/w1")[1]
    'model.layers.3.block_sparse_moe.experts.{expert}.w1.weight'
    """
    experts = tuple(f"block_sparse_moe.experts.{EXPERT}.w{n}" for n in (1, 2, 3))
    return _named(layers, modules, top, _ATTENTION + _NORMS + ("block_sparse_moe.gate",) + experts)


def qwen_moe_names(
    layers: str = "model/layers/{layer}",
    modules: Mapping[str, str] | None = None,
    top: Mapping[str, str] | None = None,
) -> tuple[Name, ...]:
    """The names of Qwen's mixtures of experts, shared ones included.

    Arguments as of `llama_names`, experts as of `mixtral_names`.

    >>> from fp8jax.interop._names import find_name
    >>> find_name(qwen_moe_names(), "model/layers/3/mlp/experts/7/up_proj/kernel")[1]
    'model.layers.3.mlp.experts.7.up_proj.weight'
    """
    projections = tuple(f"{name}_proj" for name in ("gate", "up", "down"))
    experts = tuple(f"mlp.experts.{EXPERT}.{name}" for name in projections)
    shared = tuple(f"mlp.shared_expert.{name}" for name in projections)
    gates = ("mlp.gate", "mlp.shared_expert_gate")
    return _named(
        layers,
        modules,
        top,
        _ATTENTION + _MLP + _NORMS + _HEAD_NORMS + gates + experts + shared,
    )
