"""A function traced for arguments of some shapes, and how it runs."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from fp8jax import shims
from fp8jax.observe import share_over_branches
from fp8jax.ops.cast import Codes
from fp8jax.ops.ready import made_ready
from fp8jax.state import LEAVES, SiteScales, find_site_scales, map_site_scales
from fp8jax.tensor import Fp8Tensor
from fp8jax.transform.analysis import Plan
from fp8jax.transform.arguments import is_coded
from fp8jax.transform.common import with_leaders
from fp8jax.transform.follow import NeedsValues, in_words
from fp8jax.transform.interpreter import evaluate
from fp8jax.transform.mode import Mode
from fp8jax.transform.repeats import Repeat
from fp8jax.transform.reverse_only import reverse_only
from fp8jax.transform.seeding import (
    WITHOUT_GRADIENT,
    cotangents_of,
    has_gradient,
    is_loss,
    with_headroom,
)
from fp8jax.transform.sharing import (
    Scales,
    merge_observed_over_devices,
    merge_observed_over_lanes,
    share_scales_over_devices,
    share_scales_over_lanes,
)
from fp8jax.transform.sites import Site


@dataclasses.dataclass(frozen=True)
class Program:
    """A function traced for arguments of some shapes: its jaxpr, the plan for it, and how its
    outputs fold together.
    """

    jaxpr: Any
    plan: Plan
    sites: tuple[Site, ...]
    out_shape: Any
    coded: tuple[
        str, ...
    ]  # Paths of the weights that are held as FP8 codes, in the order of the arrays.
    weights: tuple[int, ...]  # Which of the arrays are weights.
    repeats: tuple[Repeat, ...] = ()  # What is evaluated as scans.

    def run(
        self,
        scales: Scales,
        arrays: Sequence[Any],
        mode: Mode,
        enabled: jax.Array | None = None,
    ) -> tuple[Any, Scales]:
        """The outputs as the function folds them, and what was observed; quantized where `enabled`,
        a boolean scalar.
        """
        # Inside a shard_map of the caller's, the scales come in for all devices, like the weights.
        manual = frozenset(jax.sharding.get_abstract_mesh().manual_axes)
        selected = self.plan.sites()
        if scales and any(not shims.varying_axes(jax.lax.axis_index(axis)) for axis in manual):
            raise ValueError(
                "fp8 functions with delayed scaling must not be called in a region that does not "
                "track what "
                f"varies over its axes; got one over {sorted(manual)}: the amaxes of its devices "
                "would never meet. "
                "Use jax.shard_map with check_vma=True, around or inside the function, in the "
                "place of pmap."
            )
        scales, arrays = self._reverse_only(scales, list(arrays))
        scales = with_leaders(selected, scales)
        of_devices = share_scales_over_devices(selected, scales, manual, checked=True)
        looped = bool(self.repeats) or any(site.loops for site in selected)
        scales = share_scales_over_lanes(of_devices, looped)

        arrays = self._named(arrays)
        stacked = {name for repeat in self.repeats for name in repeat.own_names()}

        def evaluate_as(mode):
            def run(scales, *arrays):
                alone = {
                    name: node
                    for name, node in scales.items()
                    if mode.quantized and node.seal.ndim == 1
                    if mode.unrolled or name not in stacked
                }  # not stacked, no lanes
                outputs, observed = evaluate(
                    self.jaxpr, self.plan, {**scales, **made_ready(alone)}, arrays, mode
                )
                return mode.allow(outputs, "returned"), observed

            return run

        if enabled is None:
            try:
                outputs, observed = evaluate_as(mode)(scales, *arrays)
            except NeedsValues as error:
                raise ValueError(in_words(self.refused(scales, arrays))) from error
        else:  # One conditional around all, and not one for each product: the device is asked once.
            outputs, observed = jax.lax.cond(
                enabled,
                evaluate_as(mode),
                evaluate_as(dataclasses.replace(mode, quantized=False)),
                share_over_branches(scales, enabled),
                *arrays,
            )
        observed = merge_observed_over_devices(
            selected, merge_observed_over_lanes(of_devices, observed), manual
        )
        return jax.tree.unflatten(jax.tree.structure(self.out_shape), outputs), observed

    def _reverse_only(self, scales: Scales, arrays: list[Any]) -> tuple[Scales, list[Any]]:
        """The same, with reverse-mode derivatives only, and none of weights held as codes."""
        leaves, tree = jax.tree.flatten((scales, arrays))
        index = count = len(jax.tree.leaves(scales))
        names, coded, weights = iter(self.coded), [], []
        for position, array in enumerate(arrays):
            of_array = range(index, index := index + len(jax.tree.leaves(array)))
            if is_coded(array):
                name = next(names)
                coded += [(leaf, name) for leaf in of_array]
            elif position in self.weights:
                weights += of_array
        leaves = reverse_only(leaves, tuple(range(count)), tuple(weights), tuple(coded))
        return jax.tree.unflatten(tree, leaves)

    def _named(self, arrays: Sequence[Any]) -> list[Any]:
        """The arrays, with weights held as codes as they are followed through the program."""
        names = iter(self.coded)
        return [
            Codes.of_weight(array, next(names)) if type(array) is Fp8Tensor else array
            for array in arrays
        ]

    def refused(self, scales: Scales, arrays: Sequence[Any]) -> tuple[tuple[str, str], ...]:
        """The weights held as codes whose values something needs, and what: all that there are."""
        found: list[tuple[str, str]] = []
        mode = Mode(refused=found)

        def run(scales, arrays):
            outputs, _ = evaluate(self.jaxpr, self.plan, scales, self._named(arrays), mode)
            mode.allow(outputs, "returned")

        if self.coded:
            jax.eval_shape(run, scales, list(arrays))
        return tuple(dict.fromkeys(found))

    def zeros(self) -> Scales:
        """Scales of 1 for each site that has any."""
        return {
            site.name: SiteScales.zeros(site.name, site.delayed_casts, site.stack)
            for site in self.sites
            if site.has_scales
        }

    def run_watched(self, watch: Callable, scales: Any, arrays: Sequence[jax.Array]) -> None:
        """Runs forward and backward with `watch` around each site, as `Mode.watch`."""
        floats = [
            index
            for index, array in enumerate(arrays)
            if not is_coded(array) and jnp.issubdtype(array.dtype, jnp.floating)
        ]

        def run(own, values):
            given = list(arrays)
            for index, value in zip(floats, values):
                given[index] = value
            outputs, _ = self.run(own, given, Mode(watch=watch))
            return [
                leaf
                for leaf in jax.tree.leaves(outputs)
                if jnp.issubdtype(leaf.dtype, jnp.floating)
            ]

        own, values = scales_for(self, scales), [arrays[index] for index in floats]
        try:
            leaves, backward = jax.vjp(run, own, values)
            backward(cotangents_of(leaves, is_loss(self.out_shape)))
        except WITHOUT_GRADIENT:
            if has_gradient(self.jaxpr, self.weights, arrays):
                raise
            run(own, values)

    def amaxes_of_seeding(self, scales: Any, arrays: Sequence[jax.Array]) -> Any:
        """What a forward and a backward pass in full precision see: a tree like `scales`.

        Nothing is cast: scales to cast by aren't known yet, and a compiler takes about as long as
        for the plain gradient.
        """
        own = scales_for(self, scales)

        def run(own):
            outputs, observed = self.run(own, arrays, Mode(observing=True, quantized=False))
            return [
                leaf
                for leaf in jax.tree.leaves(outputs)
                if jnp.issubdtype(leaf.dtype, jnp.floating)
            ], observed

        has_loss = is_loss(self.out_shape)
        try:
            leaves, backward, observed = jax.vjp(run, own, has_aux=True)
            (amax,) = backward(cotangents_of(leaves, has_loss))
        except WITHOUT_GRADIENT:
            if has_loss and has_gradient(self.jaxpr, self.weights, arrays):
                raise
            _, observed = run(own)  # It needs no scales for a gradient then.
            amax = jax.tree.map(jnp.zeros_like, own)
        merged = jax.tree.map(
            jnp.maximum,
            amax,
            observed | {name: amax[name] for name in amax.keys() - observed.keys()},
        )
        if not has_loss:
            merged = {name: with_headroom(node) for name, node in merged.items()}
        return observed_like(scales, merged)


def scales_for(program: Program, scales: Any) -> Scales:
    """The scales that the program needs, found in any tree and checked."""
    found: Scales = {}
    for node in find_site_scales(scales):
        if node.site in found:
            raise ValueError(
                f"scales must hold each site once; got site {node.site!r} twice. Pass the scales "
                "of this "
                "function alone."
            )
        found[node.site] = node
    needed = program.zeros()
    missing = sorted(needed.keys() - found.keys())
    masked = jax.tree.leaves(scales, is_leaf=lambda node: isinstance(node, optax.MaskedNode))
    if missing and any(isinstance(node, optax.MaskedNode) for node in masked):
        raise ValueError(
            "scales must be given; got optax.MaskedNode() in the place of those of "
            f"{', '.join(missing)}, as the optimizer sees them "
            "inside with_delayed_scaling. Close over the scales: value_fn=lambda t: "
            "fp8_loss(trained['scales'], t['params'], x)."
        )
    if missing:
        raise ValueError(
            "scales must hold every site that the arguments lead through; got none for "
            f"{', '.join(missing)}. "
            "Make them with init on these arguments; fp8jax.migrate_scales(old, new) carries over "
            "those "
            "that match."
        )
    for name, zeros in needed.items():
        node = found[name]
        if node.casts != zeros.casts:
            raise ValueError(
                f"scales of site {name!r} must be those of its recipe; got scales for the casts "
                f"{node.casts}, "
                f"and the recipe has {zeros.casts}. Make them anew with init."
            )
        for operand in LEAVES:
            got, want = getattr(node, operand), getattr(zeros, operand)
            if want is not None and (
                got is None or (jnp.shape(got), jnp.result_type(got)) != (want.shape, want.dtype)
            ):
                seen = None if got is None else f"{jnp.result_type(got)}{list(jnp.shape(got))}"
                raise ValueError(
                    f"scales of site {name!r} must have {operand} of "
                    f"{want.dtype}{list(want.shape)}; got {seen}. "
                    "They are of another model, or were cast: make them anew with init."
                )
    return {
        name: jax.tree.map(jnp.asarray, found[name]) for name in needed
    }  # NumPy's, too, as states read from bytes are


def observed_like(scales: Any, observed: Scales) -> Any:
    """Observations in a tree like `scales`: 0 where there are none."""
    return map_site_scales(
        lambda node: observed.get(node.site) or jax.tree.map(jnp.zeros_like, node), scales
    )
