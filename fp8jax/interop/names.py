"""Names: which tensor of a foreign checkpoint a parameter is."""

import dataclasses
import re
from typing import Mapping, Sequence

from fp8jax.patterns import check_pattern

LAYER = "{layer}"


@dataclasses.dataclass(frozen=True)
class Name:
    """What the parameters at some paths are called in a file.

    Args:
      pattern: regular expression that the whole path must match, as r"(.*)/kernel".
      template: the name in the file; r"\\1" and the like stand for the pattern's groups, and "/" becomes ".". Where it
        holds "{layer}", the parameter's leading axis stacks layers, as by `nn.scan`, and each is a tensor of its own.
      inputs: number of leading axes that a product sums over, behind that of layers. They and the others are made a
        matrix, stored transposed, outputs first, as PyTorch does: 1 for a `Dense` kernel, 2 for one `[heads, width, out]`.
        0 for what is stored as it is: biases, norms, embeddings.

    Raises:
      ValueError: where `pattern` is no regular expression, or `inputs` negative.

    >>> Name(r"(.*)/kernel", r"\\1/weight", inputs=1).of("mlp/up/kernel")
    'mlp.up.weight'
    """

    pattern: str
    template: str
    inputs: int = 0

    def __post_init__(self):
        check_pattern(self.pattern, over="paths")
        if isinstance(self.inputs, bool) or not isinstance(self.inputs, int) or self.inputs < 0:
            raise ValueError(f"inputs must be a number of axes, 0 or more; got {self.inputs!r}.")

    @property
    def stacked(self) -> bool:
        """Whether the leading axis stacks layers."""
        return LAYER in self.template

    def of(self, path: str) -> str | None:
        """The name of the parameter at a path, with "{layer}" where layers are stacked; None where it is not meant."""
        match = re.fullmatch(self.pattern, path)
        return None if match is None else match.expand(self.template).replace("/", ".")


# What Flax's own layers call their parameters, and PyTorch's theirs.
TORCH_NAMES = (
    Name(r"(.*/)?kernel", r"\1weight", inputs=1),
    Name(r"(.*/)?(?:scale|embedding)", r"\1weight"),
    Name(r"(.*)", r"\1"),
)

_LLAMA_LAYER = {
    name.replace(".", "/"): name
    for name in (
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "self_attn.o_proj",
        "mlp.gate_proj",
        "mlp.up_proj",
        "mlp.down_proj",
        "input_layernorm",
        "post_attention_layernorm",
    )
}
_LLAMA_TOP = {
    "model/embed_tokens": "model.embed_tokens",
    "model/norm": "model.norm",
    "lm_head": "lm_head",
}
_LAST = (("kernel", "weight", 1), ("bias", "bias", 0), ("(?:scale|weight|embedding)", "weight", 0))


def llama_names(
    layers: str = "model/layers/{layer}",
    modules: Mapping[str, str] | None = None,
    top: Mapping[str, str] | None = None,
) -> tuple[Name, ...]:
    """The names of Llama-style checkpoints.

    Args:
      layers: path of a layer's parameters here, with "{layer}" in the place of its number; without it, that of layers
        stacked by `nn.scan`.
      modules: by path of a module within a layer here, its name within a layer there; by default the names are the
        same, "self_attn/q_proj" for "self_attn.q_proj" and so on.
      top: the same of what is outside of the layers; by default "model/embed_tokens", "model/norm" and "lm_head".

    Returns:
      Names for `read_checkpoint` and `write_checkpoint`.

    >>> find_name(llama_names(), "model/layers/3/mlp/up_proj/kernel")[1]
    'model.layers.3.mlp.up_proj.weight'
    >>> find_name(llama_names("blocks", {"query": "self_attn.q_proj"}), "blocks/query/kernel")[1]
    'model.layers.{layer}.self_attn.q_proj.weight'
    """
    here, number = (
        re.escape(layers).replace(re.escape(LAYER), r"(\d+)"),
        r"\1" if LAYER in layers else LAYER,
    )
    names = []
    for last, theirs, inputs in _LAST:
        for module, name in (_LLAMA_LAYER if modules is None else modules).items():
            names.append(
                Name(
                    f"{here}/{re.escape(module)}/{last}",
                    f"model.layers.{number}.{name}.{theirs}",
                    inputs,
                )
            )
        for module, name in (_LLAMA_TOP if top is None else top).items():
            names.append(Name(f"{re.escape(module)}/{last}", f"{name}.{theirs}", inputs))
    return tuple(names)


def find_name(names: Sequence[Name], path: str) -> tuple[Name, str]:
    """The first of `names` that is meant for a path, and what it says; ValueError where there is none."""
    for name in names:
        theirs = name.of(path)
        if theirs is not None:
            return name, theirs
    raise ValueError(
        f"names must have one for each parameter; got none for {path!r}. Add a Name, or {Name(re.escape(path), '...')!r} "
        "with its name in the file."
    )
