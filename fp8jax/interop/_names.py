"""Names: which tensor of a foreign checkpoint a parameter is."""

import dataclasses
import itertools
import re
from collections.abc import Iterator, Sequence

from fp8jax._patterns import check_pattern

LAYER, EXPERT = "{layer}", "{expert}"


@dataclasses.dataclass(frozen=True)
class Name:
    """What the parameters at some paths are called in a file.

    Args:
      pattern: regular expression that the whole path must match, as r"(.*)/kernel".
      template: the name in the file; r"\\1" and the like stand for the pattern's groups, and "/"
        becomes ".". Where it holds "{layer}" or "{expert}", the parameter's leading axes stack
        layers, as by `nn.scan`, or experts, in the order of the template, and each is a tensor of
        its own.
      inputs: number of leading axes that a product sums over, behind those that stack. They and the
        others are made a matrix, stored transposed, outputs first, as PyTorch does: 1 for a `Dense`
        kernel, 2 for one `[heads, width, out]`. 0 for what is stored as it is: biases, norms,
        embeddings.

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
    def stacked(self) -> tuple[str, ...]:
        """What the leading axes stack: `LAYER`, `EXPERT`, both or neither."""
        return tuple(re.findall(f"{re.escape(LAYER)}|{re.escape(EXPERT)}", self.template))

    def of(self, path: str) -> str | None:
        """The name of the parameter at a path, with placeholders; None where it is not meant."""
        match = re.fullmatch(self.pattern, path)
        return None if match is None else match.expand(self.template).replace("/", ".")


# What Flax's own layers call their parameters, and PyTorch's theirs.
TORCH_NAMES = (
    Name(r"(.*/)?kernel", r"\1weight", inputs=1),
    Name(r"(.*/)?(?:scale|embedding)", r"\1weight"),
    Name(r"(.*)", r"\1"),
)


def find_name(names: Sequence[Name], path: str) -> tuple[Name, str]:
    """The first of `names` that is meant for a path, and what it says; ValueError without one."""
    for name in names:
        theirs = name.of(path)
        if theirs is not None:
            return name, theirs
    raise ValueError(
        f"names must have one for each parameter; got none for {path!r}. Add a Name, or "
        f"{Name(re.escape(path), '...')!r} with its name in the file."
    )


def each_in_file(
    name: Name, theirs: str, shape: Sequence[int]
) -> Iterator[tuple[tuple[int, ...], str]]:
    """The tensors that a parameter is in a file: their index among the leading axes, and name.

    >>> name = Name("w", "experts.{expert}.w")
    >>> list(each_in_file(name, name.template, (2, 4, 4)))
    [((0,), 'experts.0.w'), ((1,), 'experts.1.w')]
    """
    for index in itertools.product(*map(range, shape[: len(name.stacked)])):
        own = theirs
        for placeholder, number in zip(name.stacked, index, strict=True):
            own = own.replace(placeholder, str(number))
        yield index, own
