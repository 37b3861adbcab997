"""How the sites of a program run, and what becomes of weights that can't stay codes."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from fp8jax._transform.follow import (
    NeedsValues,
    check_none_coded,
    has_coded,
    layers_of,
    specs_of,
    values_of,
)


@dataclasses.dataclass(frozen=True)
class Mode:
    """How sites run.

    Args:
      observing: hand the forward pass's amaxes out as results too, for when no backward pass
        follows.
      watch: given the function that runs a site, returns one that does so and looks on.
      quantized: False to leave all products in their own precision, and observe them all the same.
      refused: where given, what needs the values of weights held as codes gets them, and is put
        down here, as the weight and why; else it raises.
    """

    observing: bool = False
    watch: Callable[[Callable], Callable] | None = None
    quantized: bool = True
    refused: list[tuple[str, str]] | None = None

    @property
    def unrolled(self) -> bool:
        """Whether each site runs by itself: for what looks on, and for what words are about."""
        return self.watch is not None or self.refused is not None

    def allow(self, operands: Sequence[Any], what: str) -> list[Any]:
        """Operands that must not be weights held as codes where they are `what`."""
        return self.attempt(lambda: check_none_coded(operands, what), operands)

    def attempt(self, function: Callable, operands: Sequence[Any], instead: Callable = list) -> Any:
        """`function()`; where that needs values, and is only put down, `instead` of the operands'
        values.
        """
        try:
            return function()
        except NeedsValues as error:
            if self.refused is None:
                raise
            self.refused.append((error.weight, error.why))
            return instead(values_of(operands))

    def layers_of(self, scanned: Sequence[Any]) -> list[Any]:
        """What a scan takes apart along its leading axes."""

        def layers(operand):
            return self.attempt(lambda: layers_of(operand), [operand], lambda values: values[0])

        return [layers(operand) if has_coded([operand]) else operand for operand in scanned]

    def with_specs(
        self, operands: Sequence[Any], specs: Sequence[Any], mesh: Any
    ) -> tuple[list[Any], list[Any]]:
        """The operands of a shard_map, and their specs."""

        def pair(operand, spec):
            if not has_coded([operand]):
                return operand, spec
            return self.attempt(
                lambda: (operand, specs_of(operand, spec, mesh)),
                [operand],
                lambda values: (values[0], spec),
            )

        pairs = [pair(operand, spec) for operand, spec in zip(operands, specs, strict=True)]
        return [operand for operand, _ in pairs], [spec for _, spec in pairs]
