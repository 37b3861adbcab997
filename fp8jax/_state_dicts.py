"""The library's pytrees in `flax.serialization`: to state dicts and bytes, and back bit for bit."""

import dataclasses
from collections.abc import Callable
from typing import Any

from flax import serialization


def register_state_dict(
    kind: type,
    *names: str,
    children: Callable[[Any], dict[str, Any]] | None = None,
    replace: Callable[..., Any] = dataclasses.replace,
) -> None:
    """Has `flax.serialization` write and read a frozen dataclass.

    Its state dict holds the arrays alone; what is static comes from the target that it is restored
    into, and arrays must have the shapes and dtypes of those there.

    Args:
      kind: the class.
      *names: of the fields that hold arrays or what has a state dict itself; those that are None
        are left out.
      children: in the place of `names`, gives what a node holds, by name.
      replace: makes a node that holds other things, `replace(node, **children)`.
    """

    def held(node: Any) -> dict[str, Any]:
        if children is not None:
            return children(node)
        return {name: getattr(node, name) for name in names if getattr(node, name) is not None}

    def to_state_dict(node: Any) -> dict[str, Any]:
        return {name: serialization.to_state_dict(child) for name, child in held(node).items()}

    def from_state_dict(node: Any, state: Any) -> Any:
        where, own = serialization.current_path(), held(node)
        if not isinstance(state, dict) or state.keys() != own.keys():
            got = sorted(state) if isinstance(state, dict) else type(state).__name__
            raise ValueError(
                f"state at {where} must have the fields {sorted(own)} of the {kind.__name__} "
                f"there; got {got}. Restore it "
                "into a target like the one that was written."
            )
        for name, child in own.items():
            want, got = _shape_and_dtype(child), _shape_and_dtype(state[name])
            if None not in (*want, *got) and want != got:
                raise ValueError(
                    f"state at {where}/{name} must be {want[1]}{list(want[0])}, as in the "
                    f"{kind.__name__} there; got "
                    f"{got[1]}{list(got[0])}. Restore it into a target like the one that was "
                    "written."
                )
        restored = {
            name: serialization.from_state_dict(child, state[name], name=name)
            for name, child in own.items()
        }
        return replace(node, **restored)

    serialization.register_serialization_state(kind, to_state_dict, from_state_dict)


def _shape_and_dtype(leaf: Any) -> tuple[Any, Any]:
    return getattr(leaf, "shape", None), getattr(leaf, "dtype", None)
