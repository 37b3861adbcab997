"""FP8 for Flax Linen: a module that runs another one's matrix products in FP8."""

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
from flax.core import DenyList, Scope, lift
from flax.errors import FlaxError
from flax.linen import transforms

from fp8jax._linen_methods import outside_of_apply
from fp8jax._observe import SharedCalls
from fp8jax._patterns import as_rules
from fp8jax._recipe import Recipe
from fp8jax._tensor import Fp8Tensor
from fp8jax._transform import Explanation, Fp8Function, Rule
from fp8jax._transform.arguments import is_array
from fp8jax._transform.names import ROOT
from fp8jax._transform.selection import check_min_flops, check_recipe, check_scan_repeats

COLLECTION, SCALES = "fp8", "scales"


class Fp8(nn.Module):
    """`module` with its matrix products in FP8.

    Its parameters are exactly those of `module`, at the same paths, so that checkpoints go either
    way. A collection "fp8" beside them holds `{"scales": fp8jax.Scales}`: `init` makes it
    from the example's own amaxes; `apply` reads it; and the gradient with respect to it is what was
    observed, for `fp8jax.with_delayed_scaling`. To add the collection to a checkpoint's params,
    `apply` them with `mutable="fp8"`.

    All methods of `module` run in FP8, called on the wrapper; one without any product just runs. So
    do functions that `apply` gets for a method, whose first argument is then the module itself:
    `apply(variables, x, method=lambda module, x: module.encoder(x))`. Outside of `apply`, what
    `module` has the wrapper has too, and where such a method calls `self.apply`, that is the
    wrapper's. It may be the whole model or any submodule, inside `nn.scan`, `nn.remat` and
    `nn.vmap` too (give the collection "fp8" a variable axis where "params" has one; where a scan
    shares its params, wrap the scan itself, since it would add its steps' observations up); and
    what is inside it may be anything.

    A wrapper that is called more than once merges what its calls observe. Where each call is lifted
    by itself, by `nn.remat`, `nn.jit` or `nn.cond`, or is one of several `apply`s in a loss, JAX
    adds their amaxes up outside of it. An update finds the larger of two; of more, a bound.

    Args:
      module: the Flax module.
      recipe: formats, granularity and scaling of the casts.
      rules: as of `fp8jax.fp8`; the names of sites are module paths from the outermost module on.
      min_flops: as of `fp8jax.fp8`.
      scan_repeats: as of `fp8jax.fp8`; of each method that is called.
      enabled: a boolean scalar array to switch FP8 on and off at run time, as
        `fp8jax.Fp8Function.when` does: `model.clone(enabled=step >= 1000).apply(variables, x)`.

    Raises:
      ValueError: from `apply`, where the collection or a site in it is missing; from `init`, where
        no product is selected or a rule matches none.

    >>> import fp8jax, jax, jax.numpy as jnp
    >>> model = fp8jax.linen.Fp8(nn.Dense(3), fp8jax.recipes.delayed())
    >>> variables = model.init(jax.random.key(0), jnp.ones((2, 4)))
    >>> sorted(variables), sorted(variables["params"]), list(variables["fp8"]["scales"])
    (['fp8', 'params'], ['bias', 'kernel'], ['dot'])
    >>> model.apply(variables, jnp.ones((2, 4))).shape
    (2, 3)
    """

    module: nn.Module
    recipe: Recipe
    rules: Sequence[Rule] = ()
    enabled: bool | jax.Array = True
    min_flops: float = 0
    scan_repeats: bool = False

    def __post_init__(self):
        if not isinstance(self.module, nn.Module):
            raise TypeError(
                f"module must be a linen Module; got {self.module!r}. Make one: nn.Dense(8); "
                "wrap functions in fp8jax.fp8, NNX modules in fp8jax.nnx.Fp8."
            )
        check_recipe(self.recipe)
        # A list would make the module unfit to be static.
        object.__setattr__(self, "rules", as_rules(self.rules, Rule, "recipe"))
        super().__post_init__()

    def setup(self):
        nn.share_scope(self, self.module)
        # One wrapper may be called several times, as a shared submodule is.
        self._calls = SharedCalls()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """`module(*args, **kwargs)`, in FP8; in full precision while the scales are being made."""
        return self._run("__call__", *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        """What `module` has: methods and properties, in FP8, and fields; not the modules in it,
        which would not be in FP8.
        """
        module = self.__dict__.get("module")
        if module is None or name.startswith("__"):
            return super().__getattr__(name)
        held = inspect.getattr_static(type(module), name, None)
        if isinstance(held, (classmethod, staticmethod)):
            return getattr(type(module), name)
        if self.scope is None:
            return getattr(outside_of_apply(self), name)
        if isinstance(held, property):
            return self._run(lambda module: getattr(module, name))
        if callable(getattr(type(module), name, None)):
            return functools.partial(self._run, name)
        return self._read(name)

    def _read(self, name: str) -> Any:
        value = getattr(self.module, name)
        if any(isinstance(leaf, nn.Module) for leaf in _leaves_with_modules(value)):
            raise AttributeError(
                f"attribute {name!r} of {type(self.module).__name__} must not be a module or hold "
                "one, since that would not run in FP8 "
                "from here. Use it in a function of the module: model.apply(variables, x, "
                f"method=lambda module, x: module.{name}(x))."
            )
        return value

    @nn.nowrap  # No methods of the model, for nn.tabulate and the names of scopes.
    def apply(self, variables: Any, *args: Any, method: Any = None, **kwargs: Any) -> Any:
        """`flax.linen.Module.apply`; `method` may be one of `module`, or a function of it, as in
        `method=Model.encode`.
        """
        return super().apply(variables, *args, method=_own_method(method), **kwargs)

    @nn.nowrap
    def init_with_output(self, rngs: Any, *args: Any, method: Any = None, **kwargs: Any) -> Any:
        """`flax.linen.Module.init_with_output`; `method` as of `apply`."""
        return super().init_with_output(rngs, *args, method=_own_method(method), **kwargs)

    def _run(self, method: str | Callable, *args: Any, **kwargs: Any) -> Any:
        scales = self.variables.get(COLLECTION, {}).get(SCALES)
        has_state = self._has_state()
        if self.is_initializing() or (
            has_state and scales is None and self.is_mutable_collection(COLLECTION)
        ):
            if not self.is_mutable_collection(COLLECTION):
                raise ValueError(
                    f"collection {COLLECTION!r} must be mutable while scales of "
                    f"{type(self.module).__name__} are made; got it immutable. Call init "
                    f"without `mutable`, or with {COLLECTION!r} in it (params alone come from the "
                    "init of the module itself). If module lies "
                    "inside another Fp8, or holds one: wrap either of them, and use rules for the "
                    "rest."
                )
            if not any(isinstance(leaf, Fp8Tensor) for leaf in self._params()):
                outputs, first = self._lifted(_run_and_seed, method, *args, **kwargs)
                if has_state and scales is None:
                    self.put_variable(COLLECTION, SCALES, first)
                return outputs
            # Weights held as codes have no full precision to run in.
            if has_state and scales is None:
                scales = self._lifted(_seed, method, *args, **kwargs)
                self.put_variable(COLLECTION, SCALES, scales)
        if has_state and scales is None:
            raise ValueError(
                f"variables must hold the collection {COLLECTION!r} with the scales of "
                f"{type(self.module).__name__}; got "
                f"the collections {sorted(self.variables)}. Make it with init, or add it to "
                "existing params with "
                f"_, state = model.apply(variables, *args, mutable={COLLECTION!r})."
            )
        scales = scales or {}
        # Without a leaf where optimizers call a loss without them.
        own = self._calls.own(scales, next(iter(jax.tree.leaves(scales)), None))
        run = functools.partial(_run_in_fp8, own, self.enabled)
        return self._lifted(run, method, *args, **kwargs)

    def _params(self) -> list[Any]:
        params = self.variables.get("params", {})
        return jax.tree.leaves(params, is_leaf=lambda node: isinstance(node, Fp8Tensor))

    def _has_state(self) -> bool:
        return any(
            any(recipe.delayed_casts)
            for recipe in (self.recipe, *(rule.recipe for rule in self.rules))
            if recipe
        )

    def lazy_init(self, rngs: Any, *args: Any, **kwargs: Any) -> Any:
        """`flax.linen.Module.lazy_init`; under delayed scaling the arguments must be arrays, since
        the first scales come from them.
        """
        leaves = jax.tree.leaves((args, kwargs))
        if self._has_state() and any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves):
            raise ValueError(
                "arguments of lazy_init must be arrays under delayed scaling, whose first scales "
                "are made from them; got "
                f"ShapeDtypeStructs for {type(self.module).__name__}. Make params alone by "
                "module.lazy_init, and scales from a "
                f"first batch by _, scales = model.apply(params, batch, mutable={COLLECTION!r})."
            )
        return super().lazy_init(rngs, *args, **kwargs)

    def explain(self, variables: Any, *args: Any, rngs: Any = None, **kwargs: Any) -> Explanation:
        """The table of sites that `apply(variables, *args, **kwargs)` leads through; called on the
        unbound module.

        Arrays may be `jax.ShapeDtypeStruct`s. Of the variables only "params" and what `module`
        reads are needed.
        """
        module = self.module.clone(parent=None)

        def apply(params, others, rngs, *args, **kwargs):
            return module.apply(
                {"params": params, **others}, *args, rngs=rngs, mutable=list(others), **kwargs
            )

        others = {
            name: collection
            for name, collection in variables.items()
            if name not in ("params", COLLECTION)
        }
        return self._function(apply).explain(variables["params"], others, rngs, *args, **kwargs)

    def as_function(self, loss: Callable, variables: Any = None) -> Fp8Function:
        """A loss of the module as a function of its params, with the sites that the module has: for
        `metrics.monitor` and `calibrate`.

        Args:
          loss: a function of `apply` and of a batch, where `apply(*args)` is
            `module.apply({"params": params, **variables}, *args)`.
          variables: what the module reads beside its params, as `{"batch_stats": ...}`, the same
            for all batches. The "params" and "fp8" of the model's own variables, if they are among
            them, are left out.

        Returns:
          An `Fp8Function` of the params and the batch; its scales are `variables["fp8"]`.

        >>> import fp8jax, jax, jax.numpy as jnp
        >>> model = Fp8(nn.Dense(3), fp8jax.recipes.delayed())
        >>> variables = model.init(jax.random.key(0), jnp.ones((2, 4)))
        >>> fp8_loss = model.as_function(lambda apply, x: jnp.square(apply(x)).sum())
        >>> monitor = fp8jax.metrics.monitor(fp8_loss)
        >>> errors = monitor(variables["fp8"], variables["params"], jnp.ones((2, 4)))
        >>> [site.name for site in errors.sites]
        ['dot']
        """
        module = self.module.clone(parent=None)
        others = {
            name: collection
            for name, collection in (variables or {}).items()
            if name not in ("params", COLLECTION)
        }

        def function(params, *batch):
            return loss(functools.partial(module.apply, {"params": params, **others}), *batch)

        return self._function(function)

    def _function(self, fn, scopes: Sequence[Any] = ()) -> Fp8Function:
        """`fn` of the params, or of those of each of `scopes`, transformed."""
        own = () if self.scope is None else _path_of(self.scope)
        lifted = [_path_of(scope) for scope in _topmost(scopes)]

        def place_of(
            path,
        ):  # lifted, a weight is at the scope's position, the collection, and its path there
            if not lifted:
                return (), path
            at = lifted[path[0].idx]
            # What is outside of the wrapper has a path from the root, and never that of something
            # inside.
            return at[len(own) :] if at[: len(own)] == own else ("", *at), path[2:]

        return Fp8Function(
            fn,
            self.recipe,
            tuple(self.rules),
            (0,),
            weights_name="params",
            place_of=place_of,
            strip=self.module.name or type(self.module).__name__,
            prefix="/".join(own),
            min_flops=check_min_flops(self.min_flops),
            scan_repeats=check_scan_repeats(self.scan_repeats),
        )

    def _lifted(self, run: Callable, method: str | Callable, *args: Any, **kwargs: Any) -> Any:
        """`run` on a method of `module`, or a function of it, as a pure function, by the lifting
        that Flax's own transforms use.
        """

        def lifted(core_fn, scopes, *args, **kwargs):
            scopes_given = jax.tree.leaves(scopes, is_leaf=lambda node: isinstance(node, Scope))
            return run(
                lambda fn: self._function(fn, scopes_given), core_fn, scopes, *args, **kwargs
            )

        def call_wrapped(wrapper, *args, **kwargs):
            # Names of sites start below the wrapper, which Flax adds to the name stack here.
            with jax.named_scope(ROOT):
                if callable(method):
                    return method(wrapper.module, *args, **kwargs)
                return getattr(wrapper.module, method)(*args, **kwargs)

        return transforms.lift_direct_transform(lifted, (call_wrapped,), self, *args, **kwargs)


def _own_method(method: Any) -> Any:
    """What runs a method of the wrapped module, by name or not, or a function of it, on the
    wrapper; the wrapper's own are as they are.
    """
    if inspect.ismethod(method) and isinstance(method.__self__, nn.Module):
        method = method.__func__
    name = method if isinstance(method, str) else getattr(method, "__name__", "")
    if method is None or (hasattr(Fp8, name) and method in (name, getattr(Fp8, name))):
        return method
    return functools.partial(_call_method, method=method)


def _call_method(wrapper: Fp8, *args: Any, method: str | Callable, **kwargs: Any) -> Any:
    return wrapper._run(method, *args, **kwargs)


def _leaves_with_modules(value: Any) -> list[Any]:
    return jax.tree.leaves(value, is_leaf=lambda node: isinstance(node, nn.Module))


def _path_of(scope: Scope) -> tuple[str, ...]:
    """From the outermost module on; where scopes are shared, what a scope itself calls its path is
    of before that.
    """
    return scope.path if scope.parent is None else (*_path_of(scope.parent), str(scope.name))


def _topmost(scopes: Sequence[Scope]) -> list[Scope]:
    """Those of `scopes` that are in none of the others, each once: Flax lifts their variables, in
    this order.
    """

    def is_inside(scope):
        while (scope := scope.parent) is not None:
            if scope in unique:
                return True
        return False

    unique = dict.fromkeys(scopes)
    return [scope for scope in unique if not is_inside(scope)]


# Everything but the scales: those are read outside of the function that is transformed.
_GROUPS = ("params", DenyList((COLLECTION, "params")))


def _run_in_fp8(scales, enabled, function_of, core_fn, scopes, *args, **kwargs):
    def inner(scope_fn, repack_fn, variables, rngs, *args, **kwargs):
        structure, others_of_outputs = None, []

        def pure(params, others, rngs, *args, **kwargs):
            nonlocal structure, others_of_outputs
            scopes = scope_fn((params, others), rngs)
            leaves, structure = jax.tree.flatten(core_fn(scopes, *args, **kwargs))
            # What is no array a method returns as it is, as numbers and names that it has of the
            # module.
            others_of_outputs = [None if is_array(leaf) else leaf for leaf in leaves]
            return [leaf if is_array(leaf) else None for leaf in leaves], repack_fn(scopes)

        function = function_of(pure)
        _, call = (function if enabled is True else function.when(enabled)).inlined(
            *variables, rngs, *args, **kwargs
        )
        arrays, updated = call(scales)
        leaves = [
            other if array is None else array
            for array, other in zip(arrays, others_of_outputs, strict=True)
        ]
        return jax.tree.unflatten(structure, leaves), updated

    return lift.pack(inner, _GROUPS, _GROUPS, (True,), name="fp8", enable_kwargs=True)(
        scopes, *args, **kwargs
    )


def _seed(function_of, core_fn, scopes, *args, **kwargs):
    """The first scales, of weights that are there already."""

    def inner(scope_fn, repack_fn, variables, rngs, *args, **kwargs):
        def called(params, others, rngs, *args, **kwargs):
            return _arrays_of(core_fn(scope_fn((params, others), rngs), *args, **kwargs))

        first = function_of(called).init(*variables, rngs, *args, **kwargs)
        return first, repack_fn(scope_fn(variables, rngs))

    return lift.pack(inner, _GROUPS, _GROUPS, (True,), name="fp8", enable_kwargs=True)(
        scopes, *args, **kwargs
    )


def _run_and_seed(function_of, core_fn, scopes, *args, **kwargs):
    """The outputs in full precision, and the first scales; those from the variables as they were
    before, and the params after.
    """

    def inner(scope_fn, repack_fn, variables, rngs, *args, **kwargs):
        scopes = scope_fn(variables, rngs)
        outputs = core_fn(scopes, *args, **kwargs)
        updated = repack_fn(scopes)
        # What the call has made or moved beside the params, a cache for instance, may not fit the
        # same call again.
        params, others = (
            tuple(new or old for new, old in zip(updated[0], variables[0], strict=True)),
            variables[1],
        )

        def called(params, others, rngs, *args, **kwargs):
            # As in a later call: modules that do something else while they are initialized have
            # other sites there, or products of weights that they make themselves.
            scopes = scope_fn((params, others), rngs, DenyList("params"))
            _end_initializing(scopes)
            return _arrays_of(core_fn(scopes, *args, **kwargs))

        def initialized(params, others, rngs, *args, **kwargs):
            return _arrays_of(core_fn(scope_fn((params, others), rngs), *args, **kwargs))

        try:
            first = function_of(called).init(params, others, rngs, *args, **kwargs)
        except (NameError, TypeError, AttributeError, FlaxError):
            # What only an initialization can do without: the axis name of a BatchNorm, or a
            # collection that it makes.
            first = function_of(initialized).init(params, others, rngs, *args, **kwargs)
        return (outputs, first), updated

    return lift.pack(inner, _GROUPS, _GROUPS, (True,), name="fp8", enable_kwargs=True)(
        scopes, *args, **kwargs
    )


def _arrays_of(outputs: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf if is_array(leaf) else None, outputs)


def _end_initializing(scopes: Any) -> None:
    for scope in jax.tree.leaves(scopes, is_leaf=lambda node: isinstance(node, Scope)):
        while scope is not None:
            scope.flags = {
                name: flag for name, flag in scope.flags.items() if name != "initializing"
            }
            scope = scope.parent
