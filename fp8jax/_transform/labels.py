"""What a value of a jaxpr is computed from: constants, weights only, or other arguments too."""

import dataclasses
from collections.abc import Iterable, Sequence

from jax.extend import core

from fp8jax._transform.names import DATA, WEIGHTS_ALONE, Weight

CONSTANT, WEIGHTS, OTHER = range(3)


@dataclasses.dataclass(frozen=True, eq=False)
class Label:
    """What a value is computed from (`CONSTANT` < `WEIGHTS` < `OTHER`), the scans over which it
    varies, and the largest weight, or product of weights, in it where it is of `WEIGHTS`.

    Labels are compared by identity: each equation makes new ones, so the label that a scan's carry
    came in with comes out again only where the carry is passed on unchanged.
    """

    kind: int
    varies_over: frozenset[int] = frozenset()
    weight: Weight | None = None

    def is_like(self, other: "Label") -> bool:
        """Whether both say the same."""
        return (self.kind, self.varies_over, self.weight) == (
            other.kind,
            other.varies_over,
            other.weight,
        )


def join(labels: Iterable[Label], varies_over: frozenset[int] = frozenset()) -> Label:
    """The label of what is computed from values with these labels."""
    labels = tuple(labels)
    kind = max((label.kind for label in labels), default=CONSTANT)
    weight: Weight | None = None
    for label in labels:
        weight = weight if label.weight is None else label.weight.larger(weight)
    return Label(
        kind,
        varies_over.union(*(label.varies_over for label in labels)),
        weight if kind == WEIGHTS else None,
    )


def behind_loop(labels, loop):
    """What comes out of a loop does not vary over its iterations any more."""
    return [dataclasses.replace(label, varies_over=label.varies_over - {loop}) for label in labels]


def label_of(atom, labels) -> Label:
    """The label of an equation's operand."""
    return Label(CONSTANT) if isinstance(atom, core.Literal) else labels[atom]


def weight_read(labels: Sequence[Label], scope: str) -> Weight | str:
    """What a product of values with these labels reads: a weight, or what to call it where there is
    not exactly one.

    A projection of parameters reads two; it goes by its layer's.
    """
    read = [label.weight for label in labels if label.kind == WEIGHTS and label.weight]
    of_layer = [weight for weight in read if weight.is_of(scope.split("/"))]
    if not read:
        return DATA
    if len(read) == 1:
        return WEIGHTS_ALONE if read[0].is_product else read[0]
    return of_layer[0] if len(of_layer) == 1 else WEIGHTS_ALONE
