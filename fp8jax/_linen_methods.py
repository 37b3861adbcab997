"""Methods of a Linen module outside of `apply`: helpers, and those that call `apply`, `init` or
`bind` themselves.
"""

import dataclasses
import functools
from typing import Any


class _OutsideOfApply:
    """A module outside of `apply`, `init` and `bind`, which are those of its wrapper; so is what it
    is cloned into, once that is bound.

    A true instance of the model's class, with its fields, so that the model's own methods run on it
    as they do on the model. What they make of that class by themselves has no wrapper, and is the
    model.
    """

    fp8_wrapper: Any  # A linen.Fp8, or None.

    def apply(self, *args: Any, **kwargs: Any) -> Any:
        return self._or_plain(super()).apply(*args, **kwargs)

    def init_with_output(self, *args: Any, **kwargs: Any) -> Any:
        return self._or_plain(super()).init_with_output(*args, **kwargs)

    def lazy_init(self, *args: Any, **kwargs: Any) -> Any:
        return self._or_plain(super()).lazy_init(*args, **kwargs)

    def tabulate(self, *args: Any, **kwargs: Any) -> Any:
        return self._or_plain(super()).tabulate(*args, **kwargs)

    def clone(self, *, parent: Any = None, **updates: Any) -> Any:
        own = self.fp8_wrapper
        if own is None:
            plain: Any = super()
            return plain.clone(parent=parent, **updates)
        of_flax = {key: updates.pop(key) for key in list(updates) if key.startswith("_")}
        module = own.module.clone(**updates)
        wrapper = own.clone(module=module, parent=parent, **of_flax)
        return wrapper if parent is not None else outside_of_apply(wrapper)

    def _or_plain(self, plain: Any) -> Any:
        return plain if self.fp8_wrapper is None else self.fp8_wrapper


# The types of static arguments must be the same, for `jax.jit` to find its program again.
@functools.cache
def _class_outside_of_apply(kind: type) -> type:
    class Outside(_OutsideOfApply, kind):
        fp8_wrapper: Any = None

    Outside.__name__, Outside.__qualname__ = kind.__name__, kind.__qualname__
    Outside.__module__ = kind.__module__
    return Outside


def outside_of_apply(wrapper: Any) -> Any:
    """The module of an unbound `linen.Fp8`, as what its methods run on: `self.apply` there is that
    of the wrapper.

    Args:
      wrapper: a `linen.Fp8` that is not bound.
    """
    module = wrapper.module
    fields = {
        field.name: getattr(module, field.name)
        for field in dataclasses.fields(module)
        if field.init
    }
    fields |= {"parent": None, "fp8_wrapper": wrapper}
    return _class_outside_of_apply(type(module))(**fields)
