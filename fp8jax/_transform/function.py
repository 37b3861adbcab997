"""`fp8`: a function whose matrix products run in FP8, with its scales as an explicit argument."""

import contextlib
import copy
import functools
import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

from fp8jax import _xla
from fp8jax._bank import Scales
from fp8jax._observe import batched_like
from fp8jax._patterns import as_rules
from fp8jax._recipe import Recipe
from fp8jax._state import check_exponents
from fp8jax._transform.analysis import analyze
from fp8jax._transform.arguments import (
    Static,
    coded_among,
    held_as,
    is_array,
    on_arrays,
    take_apart,
    weights_among,
)
from fp8jax._transform.explain import Explanation
from fp8jax._transform.given import observed_like, scales_for
from fp8jax._transform.mode import Mode
from fp8jax._transform.program import Program
from fp8jax._transform.repeats import with_repeats
from fp8jax._transform.reverse_only import in_our_words
from fp8jax._transform.seeding import first_exponents
from fp8jax._transform.selection import (
    check_min_flops,
    check_recipe,
    check_scan_repeats,
    check_that_rules_match,
)
from fp8jax._transform.sites import Rule, Site
from fp8jax.devices import device_of


def fp8(
    fn: Callable,
    recipe: Recipe,
    rules: Sequence[Rule] = (),
    weights: int | Sequence[int] = 0,
    *,
    min_flops: float = 0,
    scan_repeats: bool = False,
) -> "Fp8Function":
    """`fn` with its matrix products in FP8, in the forward and the backward pass.

    A product is selected where exactly one of its operands is computed from `weights` only, unless
    it asks for precision HIGHEST of float32 operands; `rules` overrule that by name, and `explain`
    tells for each one what was decided and why.

    Args:
      fn: a function of arrays, pytrees of arrays, and static arguments (all leaves that are not
        arrays; hashable).
      recipe: formats, granularity and scaling of the casts, for instance
        `fp8jax.recipes.delayed()`.
      rules: ordered; the first whose pattern matches a site's name gives the recipe, or None, to
        that site.
      weights: the position or positions of `fn`'s arguments that hold weights. Their leaves may be
        `Fp8Tensor`s, as from `quantize_params`: `fn` then sees arrays of the dtypes that they stand
        for, and its products use the codes as they are. Such weights have no gradient; what else is
        differentiated has its own.
      min_flops: leave out products of fewer floating-point operations (forward, once): small ones
        gain nothing on a GPU. A rule that names a site overrules it.
      scan_repeats: evaluate unrolled layers that are alike as one `jax.lax.scan`, which a compiler
        sees once. Names, scales and weights stay as they are; the weights are stacked in front, in
        each call, and their gradients taken apart.

    Returns:
      An `Fp8Function`: call it as `(scales, *args)`, with `scales` from its `init(*args)`; `{}`
      where the recipe has no delayed scaling.

    Raises:
      TypeError: where an argument is of another type. ValueError, from the function returned, when
        it is traced: where no product is selected, `weights` names no argument, or
        `scan_repeats` finds no layers that are alike; and, from `init` and `explain`, and from
        calls where there is no state, where a rule matches no site.

    >>> import fp8jax
    >>> def loss(params, x):
    ...     return jnp.square(x @ params["w"]).mean()
    >>> fp8_loss = fp8jax.fp8(loss, fp8jax.recipes.delayed())
    >>> params, x = {"w": jnp.full((4, 3), 0.5)}, jnp.ones((2, 4))
    >>> scales = fp8_loss.init(params, x)
    >>> value, (amax, grads) = jax.value_and_grad(fp8_loss, argnums=(0, 1))(scales, params, x)
    >>> float(value), float(amax["w"].lhs), float(amax["w"].rhs)
    (4.0, 1.0, 0.5)
    """
    if not callable(fn):
        raise TypeError(
            f"fn must be a function; got {fn!r}. Pass the function itself, not its result."
        )
    check_recipe(recipe)
    rules = as_rules(rules, Rule, "recipe")
    positions = tuple(weights) if isinstance(weights, Iterable) else (weights,)
    if any(
        isinstance(position, bool) or not hasattr(position, "__index__") or position < 0
        for position in positions
    ):
        raise TypeError(
            f"weights must be the position of an argument, or several, from 0 on; got {weights!r}. "
            "Use 0 where the parameters are fn's first argument."
        )
    return Fp8Function(
        fn,
        recipe,
        rules,
        tuple(map(int, positions)),
        min_flops=check_min_flops(min_flops),
        scan_repeats=check_scan_repeats(scan_repeats),
    )


class Fp8Function:
    """A function with its matrix products in FP8; made by `fp8jax.fp8`.

    Pure: what it needs of earlier calls is in `scales`, and what it sees comes out as their
    gradient. It goes through `jit`, `grad`, `vmap`, `scan` and `jax.checkpoint` like any function;
    forward-mode derivatives it has none, second ones where the recipe says so.
    """

    def __init__(
        self,
        fn: Callable,
        recipe: Recipe,
        rules: tuple[Rule, ...],
        weights: tuple[int, ...],
        *,
        strip: str = "",
        prefix: str = "",
        weights_name: str | None = None,
        place_of: Callable | None = None,
        min_flops: float = 0,
        scan_repeats: bool = False,
    ):
        self._scan_repeats = scan_repeats
        self._fn, self.recipe, self.rules, self.weights = fn, recipe, rules, weights
        self._names = {"strip": strip, "prefix": prefix, "min_flops": min_flops}
        self._place_of = place_of or (lambda path: ((), path))
        self._weights_name = weights_name or f"weights (argument {', '.join(map(str, weights))})"
        self._enabled: jax.Array | None = None
        functools.update_wrapper(self, fn, updated=())
        # Not fn's own signature, since `jax.jit` resolves the names of static and donated arguments
        # by it.
        vars(self).pop("__wrapped__")
        try:
            parameters = inspect.signature(fn).parameters.values()
            own = inspect.Parameter("scales", inspect.Parameter.POSITIONAL_ONLY)
            only = [
                parameter
                for parameter in parameters
                if parameter.kind == inspect.Parameter.POSITIONAL_ONLY
            ]
            self.__signature__ = inspect.Signature(
                [own, *only, *(p for p in parameters if p not in only)]
            )
        except (TypeError, ValueError):
            pass  # Some callables of C have no signature.
        # One jit for each entry, made once, so that eager calls find their compiled program again.
        self._call = jax.jit(self.apply, static_argnums=0)
        self._observe = jax.jit(self.apply_observing, static_argnums=0)
        self._seed = jax.jit(self._amaxes_of_seeding, static_argnums=0)

    def __repr__(self) -> str:
        return f"fp8({getattr(self._fn, '__name__', self._fn)}, {self.recipe.name})"

    def __call__(self, scales: Any, *args: Any, **kwargs: Any) -> Any:
        """`fn(*args, **kwargs)` in FP8.

        Args:
          scales: what `init` made; or any tree that holds the `Scales`, or `SiteScales`, of all
            sites that the arguments lead through. More do no harm.
          *args, **kwargs: those of `fn`.

        Returns:
          What `fn` returns. The gradient with respect to `scales` is what was observed: amaxes in
          the place of exponents, for `fp8jax.delayed_scaling`.

        Raises:
          ValueError: where the scales of a site are missing, twice there, or of another shape or
            recipe; or no integers any more. In a compiled program, where that can't be raised, what
            is computed by them is NaN.
          TypeError: where an argument of `fn` is missing.
        """
        with in_our_words(), self._asking_for_scales(scales, args, kwargs):
            return self._call(*self._split(scales, args, kwargs), self._enabled)

    def when(self, enabled: Any) -> "Fp8Function":
        """This function, with FP8 switched on or off at run time: in one compiled program, on the
        same scales.

        Off, it is `fn` itself, values and gradients; and it observes what it would have cast, so
        that after a warm-up FP8 begins on scales that fit. What the backward pass keeps of the
        forward one is allocated for both: where memory is scarce, put the gradients of two
        functions behind a `jax.lax.cond` of your own.

        Args:
          enabled: a bool, or a boolean scalar array, traced or not.

        Raises:
          TypeError: where `enabled` is anything else.

        >>> import fp8jax
        >>> fp8_fn = fp8jax.fp8(lambda w, x: x @ w, fp8jax.recipes.current())
        >>> w, x = jnp.full((2, 2), 1.03), jnp.ones((1, 2))
        >>> step = jax.jit(lambda w, x, enabled: fp8_fn.when(enabled)({}, w, x))
        >>> step(w, x, False), step(w, x, True)
        (Array([[2.06, 2.06]], dtype=float32), Array([[2., 2.]], dtype=float32))
        """
        if (
            not hasattr(enabled, "dtype")
            and not isinstance(enabled, bool)
            or jnp.shape(enabled)
            or jnp.result_type(enabled) != jnp.bool_
        ):
            got = repr(enabled)
            if is_array(enabled):
                got = f"{jnp.result_type(enabled)}{list(jnp.shape(enabled))}"
            raise TypeError(
                f"enabled must be a bool or a boolean scalar array; got {got}. Compare to get one: "
                "step >= 1000."
            )
        switched = copy.copy(self)
        switched._enabled = jnp.asarray(enabled)
        return switched

    def inlined(self, *args: Any, **kwargs: Any) -> tuple[tuple[Site, ...], Callable[[Any], Any]]:
        """The sites, and the call as a function of the scales, without a jit: for callers traced as
        a whole or made anew for each call.

        Modules run all of their methods so, of which some may have no product at all.
        """
        static, arrays = take_apart(self, args, kwargs, self.weights)
        program = self._trace(static, arrays, may_be_empty=True)

        def call(scales):
            check_exponents(scales, "scales")
            with in_our_words():
                return program.run(
                    scales_for(program.sites, scales), arrays, Mode(), self._enabled
                )[0]

        return program.sites, call

    def init(self, *args: Any, **kwargs: Any) -> Scales:
        """First scales, by site name, in few arrays: as if these arguments had been seen the step
        before.

        Each operand's scale fits its amax in a run on these arguments, in full precision. Where
        `fn` returns a scalar, or a pair whose first half is one, that run has a backward pass, for
        the gradients' scales; otherwise cotangents as from a mean of a loss over all axes but the
        last stand in, with 16-fold headroom.

        Raises:
          ValueError: where no product is selected.
        """
        static, arrays = take_apart(self, args, kwargs, self.weights)
        if any(isinstance(array, jax.ShapeDtypeStruct) for array in arrays):
            raise TypeError(
                "arguments of init must be arrays, since first scales fit their values; got a "
                "ShapeDtypeStruct. For the shapes "
                "of scales alone, use jax.eval_shape(fp8_fn.init, ...)."
            )
        if any(isinstance(array, Tracer) for array in arrays):
            # Within a derivative, scales are no part of it. And what makes the arrays, such as the
            # random numbers of a module's init, has many uses.
            arrays = _xla.made_once(jax.lax.stop_gradient(arrays))
        program = self._trace(static, arrays, check_rules=True)
        # Under `vmap`, members with weights of their own have their own scales.
        zeros = batched_like(program.zeros(), [arrays[index] for index in program.weights])
        return first_exponents(zeros, self._seed(static, zeros, arrays))

    def observe(self, scales: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """The outputs, and what the forward pass observed: a tree like `scales`, amaxes in the
        place of exponents.

        For inference and for loops without a backward pass; the observations go to
        `fp8jax.delayed_scaling` as gradients would.
        """
        with self._asking_for_scales(scales, args, kwargs):
            return self._observe(*self._split(scales, args, kwargs), self._enabled)

    def explain(self, *args: Any, **kwargs: Any) -> Explanation:
        """The table of sites that these arguments lead through. Arrays may be
        `jax.ShapeDtypeStruct`s.

        Where weights are held as codes, it tells, too, which of them can't be, all of them.
        """
        static, arrays = take_apart(self, args, kwargs, self.weights)
        program = self._trace(static, arrays, check_rules=True, check_selected=False)
        refused = program.refused(program.zeros(), arrays)
        return Explanation(
            program.sites,
            refused=refused,
            device=device_of(*jax.tree.leaves(arrays)).kind,
            scans=tuple(repeat.said for repeat in program.repeats),
        )

    def amaxes(self, scales: Any, *args: Any, **kwargs: Any) -> Any:
        """What a forward and a backward pass in full precision see: a tree like `scales`."""
        with self._asking_for_scales(scales, args, kwargs):
            return self._seed(*self._split(scales, args, kwargs))

    def apply(
        self,
        static: Static,
        scales: Any,
        arrays: Sequence[Any],
        enabled: jax.Array | None = None,
    ) -> Any:
        """The call without a jit of its own, on arguments that `_split` took apart."""
        program = self._trace(static, arrays)
        if not any(site.has_scales for site in program.sites):
            # Without state no `init` comes first, to hold the rules to the sites.
            check_that_rules_match(self.rules, program.sites)
        return program.run(scales_for(program.sites, scales), arrays, Mode(), enabled)[0]

    def apply_observing(
        self,
        static: Static,
        scales: Any,
        arrays: Sequence[Any],
        enabled: jax.Array | None = None,
    ) -> tuple[Any, Any]:
        """The same of `observe`."""
        program = self._trace(static, arrays)
        outputs, observed = program.run(
            scales_for(program.sites, scales), arrays, Mode(observing=True), enabled
        )
        return outputs, observed_like(scales, observed)

    def watching(self, watch: Callable) -> Callable[..., None]:
        """A function of `(scales, *args)` that runs forward and backward with `watch` around each
        site, as `Mode.watch`.

        For what `watch` sees, not for results: it returns none.
        """
        run = jax.jit(functools.partial(self._run_watched, watch), static_argnums=0)

        def watched(scales, *args, **kwargs):
            with self._asking_for_scales(scales, args, kwargs):
                run(*self._split(scales, args, kwargs))

        return watched

    def _run_watched(self, watch, static, scales, arrays) -> None:
        self._trace(static, arrays).run_watched(watch, scales, arrays)

    def _amaxes_of_seeding(self, static, scales, arrays):
        return self._trace(static, arrays).amaxes_of_seeding(scales, arrays)

    @contextlib.contextmanager
    def _asking_for_scales(self, scales: Any, args: tuple, kwargs: dict):
        """For a call without scales, which fails for lack of the argument that stands in their
        place.
        """
        try:
            yield
        except (TypeError, ValueError) as error:
            signature = getattr(self, "__signature__", None)
            if signature is None:
                raise
            try:
                signature.bind(scales, *args, **kwargs)
            except TypeError as missing:
                raise TypeError(
                    f"a call of {self!r} must have the scales first, then the arguments of the "
                    f"function: {signature}; got one with {missing}. Pass what init gave, or {{}} "
                    "where the recipe has no state."
                ) from error
            raise

    def _split(self, scales, args, kwargs) -> tuple[Static, Any, list[Any]]:
        check_exponents(scales, "scales")
        static, arrays = take_apart(self, args, kwargs, self.weights)
        return static, scales, arrays

    def _trace(
        self,
        static: Static,
        arrays: Sequence[Any],
        *,
        check_rules: bool = False,
        check_selected: bool = True,
        may_be_empty: bool = False,
    ) -> Program:
        """The program for arguments. A call may lead through a part of the function that some rules
        have no site in.
        """
        weights = weights_among(self._fn, static, arrays, self.weights, self._place_of, repr(self))
        fn, dense = on_arrays(self._fn, static, arrays)
        jaxpr, out_shape = jax.make_jaxpr(fn, return_shape=True)(*dense)
        plan, sites = analyze(
            jaxpr, weights, self.recipe, self.rules, self._weights_name, **self._names
        )
        if check_rules:
            check_that_rules_match(self.rules, sites)
        left_out = any(
            rule.recipe is None and rule.matches(site.name) for rule in self.rules for site in sites
        )
        if (
            check_selected
            and not left_out
            and (sites or not may_be_empty)
            and not any(site.selected for site in sites)
        ):
            raise ValueError(
                f"fn must have a product to run in FP8; got {self!r} with none "
                f"selected.\n{Explanation(sites)}\n"
                "Name with `weights` the arguments that hold the weights, or select a site with a "
                "Rule."
            )
        repeats = ()
        if self._scan_repeats and plan.equations:
            plan, repeats = with_repeats(jaxpr, plan, list(map(held_as, arrays)))
        return Program(
            jaxpr,
            plan,
            sites,
            out_shape,
            coded_among(static, arrays, self.weights),
            tuple(index for index, weight in enumerate(weights) if weight is not None),
            repeats,
        )
