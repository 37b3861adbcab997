"""FP8 for Flax NNX: a module that runs another one's matrix products in FP8."""

import functools
import types
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import jax
from flax import nnx
from jax.core import Tracer

from fp8jax._bank import Scales
from fp8jax._observe import SharedCalls
from fp8jax._recipe import Recipe
from fp8jax._transform import Explanation, Fp8Function, Rule, fp8
from fp8jax._transform.names import ROOT
from fp8jax._transform.reverse_only import in_our_words, reverse_only

_PATH = "_fp8jax_path"


class Fp8Scale(nnx.Param):
    """The `Scales` of all sites: exponents as state, amaxes in the place of their gradient.

    An `nnx.Param`, so that what NNX does with parameters by default, `nnx.grad` and
    ``nnx.Optimizer(..., wrt=nnx.Param)``, includes it: the two halves are never apart by accident.
    Weights alone are ``nnx.All(nnx.Param, nnx.Not(Fp8Scale))``.
    """


class Fp8(nnx.Module):
    """`module` with its matrix products in FP8.

    `module` stays the very object that it was: train, save and restore its parameters as ever,
    `nnx.state(model.module)`. The scales are beside it in one `Fp8Scale`, which
    `init_scales` makes from the amaxes of an example. It is an `nnx.Param`, differentiated and
    updated with the weights: its gradient is what was observed, and `fp8jax.with_delayed_scaling`
    moves the scales after it::

        tx = fp8jax.with_delayed_scaling(optax.adamw(1e-3))
        optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
        loss, grads = nnx.value_and_grad(loss_fn)(model, batch)
        optimizer.update(model, grads)

    Another optimizer takes them for weights. An exponent that is no integer any more makes all
    outputs NaN.

    All methods of `module` run in FP8, called on the wrapper; they compute on a copy of the module,
    and the variables that they change (batch statistics, counts of random keys, caches) are changed
    in `module` afterwards. A method without any product just runs, before `init_scales` too.

    A wrapper that is called more than once merges what its calls observe. Where each call is by
    itself inside `nnx.remat`, `nnx.jit` or `nnx.cond`, or in a scan that shares the wrapper, JAX
    adds their amaxes up outside of it. An update finds the larger of two; of more, a bound.

    Args:
      module: the NNX module: a whole model, or a part of one.
      recipe: formats, granularity and scaling of the casts.
      rules: as of `fp8jax.fp8`; the names of sites are paths of attributes from `module` on, as in
        "layers/0/attn/query".
      name: a path to put before the names of the sites, to tell those of several wrappers in one
        model apart.
      min_flops: as of `fp8jax.fp8`.
      scan_repeats: as of `fp8jax.fp8`; of each method that is called.

    Raises:
      TypeError: where `module` is no NNX module, or recipe or rules are of another type.
      ValueError: where `module` holds another Fp8; from a call, where the scales were not made yet,
        or the parameters are differentiated and the scales are not.

    >>> import fp8jax, jax.numpy as jnp
    >>> model = Fp8(nnx.Linear(4, 3, rngs=nnx.Rngs(0)), fp8jax.recipes.delayed())
    >>> model.init_scales(jnp.ones((2, 4)))
    >>> model(jnp.ones((2, 4))).shape, list(model.scales)
    ((2, 3), ['dot'])
    >>> def loss(model, x):
    ...     return model(x).sum()
    >>> grads = nnx.grad(loss)(model, jnp.full((2, 4), 7.0))
    >>> grads["scales"]["dot"].lhs
    Array(7., dtype=float32)
    """

    def __init__(
        self,
        module: nnx.Module,
        recipe: Recipe,
        rules: Sequence[Rule] = (),
        *,
        name: str = "",
        min_flops: float = 0,
        scan_repeats: bool = False,
    ):
        if not isinstance(module, nnx.Module):
            raise TypeError(
                f"module must be a flax.nnx.Module; got {type(module).__name__}. Wrap Linen "
                "modules in "
                "fp8jax.linen.Fp8, functions in fp8jax.fp8."
            )
        if any(isinstance(inner, Fp8) for _, inner in nnx.iter_modules(module)):
            raise ValueError(
                f"module must hold no other Fp8; got one inside {type(module).__name__}. Wrap "
                "either of them, and use "
                "rules for the rest."
            )
        # Raises where they are of another type.
        fp8(type(module).__call__, recipe, rules, min_flops=min_flops, scan_repeats=scan_repeats)
        self.module = module
        self.recipe = recipe
        self.rules = tuple(rules)
        self.name, self.min_flops, self.scan_repeats = name, min_flops, scan_repeats
        self.scales: Fp8Scale | None = nnx.data(None)
        self._calls = _Calls()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """`module(*args, **kwargs)`, in FP8."""
        return self._run("__call__", args, kwargs)

    def when(self, enabled: Any, method: str = "__call__") -> Callable:
        """A method of `module`, with FP8 switched on or off at run time: `model.when(step >=
        1000)(x)`.

        As `Fp8Function.when`: in one compiled program, on the same scales, which are observed in
        either case.

        Args:
          enabled: a bool, or a boolean scalar array, traced or not.
          method: the name of the method.

        Raises:
          TypeError: from the call, where `enabled` is anything else.
        """
        return lambda *args, **kwargs: self._run(method, args, kwargs, enabled)

    def __getattr__(self, name: str) -> Any:
        """The methods of `module`, in FP8 too."""
        method = getattr(type(self.__dict__.get("module")), name, None)
        if callable(method) and not name.startswith("_"):
            return types.MethodType(functools.partial(_run_method, name=name), self)
        raise AttributeError(
            f"Fp8 has no attribute {name!r}, and it is no method of its module: what is inside is "
            "at .module."
        )

    def init_scales(self, *args: Any, method: str = "__call__", **kwargs: Any) -> None:
        """Makes the scales of the sites that these arguments lead through: as if they had been seen
        the step before.

        As `Fp8Function.init`. Scales of other sites stay, so that each entry method may add its
        own.

        Args:
          *args, **kwargs: those of `module`'s method.
          method: its name.

        Raises:
          ValueError: where no product is selected or a rule matches none.
        """
        function, weights, others = self._pure(method, args, kwargs, outputs_alone=True)
        made = function.init(weights, others)
        self.scales = Fp8Scale(self._own_scales() | made)

    def explain(self, *args: Any, method: str = "__call__", **kwargs: Any) -> Explanation:
        """The table of sites that these arguments lead through. Arrays may be
        `jax.ShapeDtypeStruct`s.
        """
        leaves, structure = jax.tree.flatten(
            (args, kwargs), is_leaf=lambda leaf: isinstance(leaf, (nnx.Pytree, nnx.Variable))
        )
        abstract = {
            index: leaf
            for index, leaf in enumerate(leaves)
            if isinstance(leaf, jax.ShapeDtypeStruct)
        }
        explanations = []

        def trace(arrays):
            args, kwargs = structure.unflatten(
                [arrays.get(index, leaf) for index, leaf in enumerate(leaves)]
            )
            function, weights, others = self._pure(method, args, kwargs)
            explanations.append(function.explain(weights, others))

        jax.eval_shape(trace, abstract)
        return explanations[-1]

    def _run(self, method: str, args: tuple, kwargs: dict[str, Any], enabled: Any = True) -> Any:
        if type(self).when is not _WHEN:  # nnx.tabulate puts others in the place of all methods.
            # They record each call by a program of its own, which they run twice; a table of the
            # module alone has the same shapes.
            return getattr(self.module, method)(*args, **kwargs)
        function, weights, others = self._pure(method, args, kwargs)
        sites, call = (function if enabled is True else function.when(enabled)).inlined(
            weights, others
        )
        if (
            not sites
        ):  # On the module itself: what makes a cache sets variables where there were none.
            return getattr(self.module, method)(*args, **kwargs)
        if self.scales is None and any(site.has_scales for site in sites):
            raise ValueError(
                f"scales of {type(self.module).__name__} must be made before the first call; got "
                "none. Call "
                "model.init_scales(*args) with an example of its arguments, then make the "
                "optimizer."
            )
        outputs, changed = call(self._calls.own(self, _with_weights(self._own_scales(), weights)))
        nnx.update((self.module, args, kwargs), changed)
        return outputs

    def _own_scales(self) -> Scales:
        return Scales((), ()) if self.scales is None else self.scales.get_value()

    def _pure(
        self, method, args, kwargs, outputs_alone=False
    ) -> tuple[Fp8Function, nnx.State, nnx.State]:
        """A method of `module` as a function of its weights and of all its other arrays, those of
        the arguments included.
        """
        graphdef, weights, others = nnx.split((self.module, args, kwargs), nnx.Param, ...)

        def function(weights, others):
            outputs, changed = _call_copy(graphdef, method, weights, others)
            return outputs if outputs_alone else (outputs, changed)

        return self._function(function, place_of=_place_of), weights, others

    def _function(self, function: Callable, **options: Any) -> Fp8Function:
        return Fp8Function(
            function,
            self.recipe,
            self.rules,
            (0,),
            weights_name="params",
            prefix=self.name,
            min_flops=self.min_flops,
            scan_repeats=self.scan_repeats,
            **options,
        )

    def as_function(self, loss: Callable) -> Fp8Function:
        """A loss of the module as a function of its parameters, with the sites that the module has:
        for `metrics.monitor` and `calibrate`.

        Args:
          loss: a function of the module, and of a batch; what it changes in the module is dropped.

        Returns:
          An `Fp8Function` of `nnx.state(model.module, nnx.Param)` and the batch; its scales are
          `nnx.state(model, Fp8Scale)`.

        >>> import fp8jax, jax.numpy as jnp
        >>> model = Fp8(nnx.Linear(4, 3, rngs=nnx.Rngs(0)), fp8jax.recipes.delayed())
        >>> fp8_loss = model.as_function(lambda module, x: module(x).sum())
        >>> list(fp8_loss.init(nnx.state(model.module, nnx.Param), jnp.ones((2, 4))))
        ['dot']
        """
        graphdef, own, others = nnx.split(self.module, nnx.Param, ...)

        def function(params, *batch):
            if _paths(params) != _paths(own):
                raise ValueError(
                    "params must be nnx.state(model.module, nnx.Param); got a state of other "
                    f"paths: {_paths(params)[:3]}, .... Of the wrapper itself only the scales are "
                    "needed, as the first argument: nnx.state(model, fp8jax.nnx.Fp8Scale)."
                )
            module = nnx.merge(graphdef, params, others, copy=True)
            _name_all_scopes(module)
            return loss(module, *batch)

        return self._function(function)


def _paths(state: nnx.State) -> list[tuple]:
    return [path for path, _ in nnx.to_flat_state(state)]


_WHEN = Fp8.when


def _place_of(path: tuple) -> tuple[tuple[str, ...], tuple]:
    """Where a weight of the triple (module, args, kwargs) is: those of the module by their path in
    it.
    """
    position = getattr(path[0], "key", getattr(path[0], "idx", None))
    return (() if position == 0 else ("arguments",)), path[1:]


def _run_method(wrapper: Fp8, *args: Any, name: str, **kwargs: Any) -> Any:
    return wrapper._run(name, args, kwargs)


def _call_copy(
    graphdef: nnx.GraphDef, method: str, weights: nnx.State, others: nnx.State
) -> tuple[Any, Any]:
    """The outputs of a module's method, and the variables that it changed."""
    tree = nnx.merge(graphdef, weights, others, copy=True)
    module, args, kwargs = tree
    _name_all_scopes(module)
    before, graphdef = _values(tree), nnx.graphdef(tree)
    outputs = getattr(module, method)(*args, **kwargs)
    after = _values(tree)
    if before.keys() == after.keys() and graphdef != nnx.graphdef(tree):
        raise ValueError(
            f"attributes of {type(module).__name__} that are no variables must stay as they are in "
            "a call; it sets "
            "some. Hold what changes in an nnx.Variable."
        )
    changed = [
        (path, leaf)
        for path, leaf in nnx.to_flat_state(nnx.state(tree))
        if path not in before or not _is_same(before[path], after[path])
    ]
    return outputs, nnx.from_flat_state(changed)


def _values(tree: Any) -> dict[tuple, tuple]:
    return {path: jax.tree.flatten(leaf) for path, leaf in nnx.to_flat_state(nnx.state(tree))}


def _is_same(old: tuple, new: tuple) -> bool:
    """Whether a value is the very one that it was: what changes in a trace is replaced."""
    return old[1] == new[1] and all(before is after for before, after in zip(old[0], new[0]))


# --------------------------------------------------------------------------------------------------
# names of sites


def _name_all_scopes(module: nnx.Module) -> None:
    for path, inner in nnx.iter_modules(module):
        _name_scopes(inner, "/".join(map(str, path)))


def _name_scopes(module: nnx.Module, path: str) -> None:
    """Has a module's methods trace in the name scope of its path, which NNX itself leaves out.

    Of this one object alone, by a subclass; its path is an attribute, which goes through `nnx.scan`
    and the like with it.
    """
    if path:
        setattr(module, _PATH, path)
        is_pytree = not jax.tree_util.all_leaves([module])
        object.__setattr__(module, "__class__", _with_scopes(type(module), is_pytree))


@functools.cache
def _with_scopes(cls: type, is_pytree: bool) -> type:
    def scoped(name: str) -> Callable:
        def method(self, *args, **kwargs):
            # Below the root: a path is whole, whoever calls.
            with jax.named_scope(ROOT), jax.named_scope(getattr(self, _PATH)):
                return getattr(super(subclass, self), name)(*args, **kwargs)

        return method

    names = {
        name
        for base in cls.__mro__
        if base not in nnx.Module.__mro__
        for name, value in vars(base).items()
        if (name == "__call__" or not name.startswith("_"))
        and callable(value)
        and not isinstance(value, (type, staticmethod, classmethod))
    }
    body = {name: scoped(name) for name in names} | {
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
    }
    subclass = type(cls)(cls.__name__, (cls,), body, pytree=is_pytree)
    return subclass


# --------------------------------------------------------------------------------------------------
# scales


class _Calls:
    """The calls of a wrapper, and of the copies that NNX makes of it with its static attributes.

    They are no part of what a model is: all are equal, and none is copied or written.
    """

    def __init__(self):
        self._of = weakref.WeakKeyDictionary()

    def own(self, wrapper: Fp8, scales: Any) -> Any:
        """The scales of this call of a wrapper, which may be called again as a shared module is."""
        if not any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(scales)):
            return scales
        calls = self._of.setdefault(wrapper, SharedCalls())
        return calls.own(scales, jax.tree.leaves(wrapper._own_scales())[0])

    def __eq__(self, other: Any) -> bool:
        return isinstance(other, _Calls)

    def __hash__(self) -> int:
        return hash(_Calls)

    def __reduce__(self):
        return _Calls, ()


def _with_weights(scales: Any, weights: Any) -> Any:
    arrays, structure = jax.tree.flatten((scales, weights))
    with in_our_words():
        return _differentiated_with(*structure.unflatten(reverse_only(arrays)))


@jax.custom_vjp
def _differentiated_with(scales: Any, weights: Any) -> Any:
    """`scales`; raises where weights are differentiated and they are not: what was observed would
    be lost in silence.
    """
    return scales


def _forward(scales, weights):
    if scales and _is_perturbed(weights) and not _is_perturbed(scales):
        raise ValueError(
            "gradients with respect to the parameters must come with those of the scales, which "
            "carry what was observed; "
            "got the former alone. nnx.Param, the default, includes both; a filter of your own "
            "needs the scales beside: argnums=nnx.DiffState(0, nnx.Any(filter, "
            "fp8jax.nnx.Fp8Scale)), and the same as nnx.Optimizer's wrt."
        )
    return jax.tree.map(lambda primal: primal.value, scales), None


def _backward(_, observed):
    return observed, None


_differentiated_with.defvjp(_forward, _backward, symbolic_zeros=True)


def _is_perturbed(primals: Any) -> bool:
    return any(primal.perturbed for primal in jax.tree.leaves(primals))
