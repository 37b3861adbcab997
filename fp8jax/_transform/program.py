"""A function traced for arguments of some shapes, and how it runs."""

import collections
import dataclasses
from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fp8jax import _shims
from fp8jax._bank import Group, Scales
from fp8jax._observe import exponents_of, led_by, share_over_branches, unbind
from fp8jax._site_exponents import SiteExponents
from fp8jax._site_scales import SiteScales, observes_flushed
from fp8jax._state import with_stacks
from fp8jax._tensor import Fp8Tensor
from fp8jax._transform.analysis import Plan
from fp8jax._transform.arguments import is_coded
from fp8jax._transform.common import sources_of, with_leaders
from fp8jax._transform.follow import NeedsValues, in_words
from fp8jax._transform.given import observed_like, scales_for
from fp8jax._transform.interpreter import evaluate
from fp8jax._transform.mode import Mode
from fp8jax._transform.repeats import Repeat
from fp8jax._transform.reverse_only import reverse_only
from fp8jax._transform.seeding import (
    WITHOUT_GRADIENT,
    cotangents_of,
    has_gradient,
    is_loss,
    with_headroom,
)
from fp8jax._transform.sharing import (
    ScalesBySite,
    merge_observed_over_devices,
    merge_observed_over_lanes,
    share_scales_over_devices,
    share_scales_over_lanes,
)
from fp8jax._transform.sites import Site
from fp8jax.ops._cast import Codes
from fp8jax.ops._ready import Ready, rows_of


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
    ) -> tuple[Any, ScalesBySite]:
        """The outputs as the function folds them, and what was observed; quantized where `enabled`,
        a boolean scalar.

        Args:
          scales: as from `scales_for`.
        """
        # Inside a shard_map of the caller's, the scales come in for all devices, like the weights.
        manual = frozenset(jax.sharding.get_abstract_mesh().manual_axes)
        selected = self.plan.sites()
        if len(scales) and any(
            not _shims.varying_axes(jax.lax.axis_index(axis)) for axis in manual
        ):
            raise ValueError(
                "fp8 functions with delayed scaling must not be called in a region that does not "
                "track what "
                f"varies over its axes; got one over {sorted(manual)}: the amaxes of its devices "
                "would never meet. "
                "Use jax.shard_map with check_vma=True, around or inside the function, in the "
                "place of pmap."
            )
        scales, arrays = self._reverse_only(scales, list(arrays))
        stacked = {name for repeat in self.repeats for name in repeat.own_names()}
        without_rows = set() if mode.unrolled else stacked
        apart, rows, kinds = self._apart(scales, selected, without_rows if mode.quantized else None)
        of_devices = share_scales_over_devices(selected, apart, manual, checked=True)
        looped = stacked | {site.name for site in selected if site.loops}
        by_site = share_scales_over_lanes(with_leaders(selected, of_devices, kinds), looped)

        arrays = self._named(arrays)

        def evaluate_as(mode):
            def run(by_site, rows, *arrays):
                ready = {
                    name: Ready.of(node, _varying_as(rows.get(name), node))
                    for name, node in by_site.items()
                    if mode.quantized and not node.ndim
                    if mode.unrolled or name not in stacked
                }  # not stacked, no lanes
                outputs, observed = evaluate(
                    self.jaxpr, self.plan, {**by_site, **ready}, arrays, mode
                )
                return mode.allow(outputs, "returned"), observed

            return run

        if enabled is None:
            try:
                outputs, observed = evaluate_as(mode)(by_site, rows, *arrays)
            except NeedsValues as error:
                raise ValueError(in_words(self.refused(scales, arrays))) from error
        else:  # One conditional around all, and not one for each product: the device is asked once.
            outputs, observed = jax.lax.cond(
                enabled,
                evaluate_as(mode),
                evaluate_as(dataclasses.replace(mode, quantized=False)),
                share_over_branches(by_site, enabled),
                rows,
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

    def _by_site(self, scales: Scales) -> ScalesBySite:
        """The scales of the sites that there are here, apart."""
        return self._apart(scales, (), without_rows=None)[0]

    def _apart(
        self, scales: Scales, selected: Sequence[Site], without_rows: Collection[str] | None
    ) -> tuple[ScalesBySite, dict[str, jax.Array], list[tuple[str, ...]]]:
        """The same, where some of the sites selected take those of others; what products read of
        them, by site; and the names of sites whose scales are of one kind.

        Args:
          scales: of all sites.
          selected: the sites that run in FP8.
          without_rows: sites that something else makes the rows of; None where nothing reads any.
        """
        own = {site.name for site in self.sites}
        apart, rows, kinds = {}, {}, []
        for arrays, groups in _kinds_of(scales):
            kinds.append(tuple(site for group in groups for site in group.sites))
            exponents = exponents_of(arrays, tuple(group.casts for group in groups))
            sources = sources_of(selected, kinds[-1])
            exponents = exponents if sources is None else led_by(exponents, sources)
            if without_rows is not None and exponents.ndim == 2:
                at = [index for index, name in enumerate(kinds[-1]) if name not in without_rows]
                some = exponents if len(at) == len(exponents) else exponents[np.asarray(at, int)]
                made = rows_of(some) if at else []
                rows |= zip([kinds[-1][index] for index in at], made, strict=True)
            nodes = unbind(exponents, groups)
            apart |= {node.site: node for node in nodes if node.site in own}
        return apart, rows, kinds

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
            by_site = self._by_site(scales)
            outputs, _ = evaluate(self.jaxpr, self.plan, by_site, self._named(arrays), mode)
            mode.allow(outputs, "returned")

        if self.coded:
            jax.eval_shape(run, scales, list(arrays))
        return tuple(dict.fromkeys(found))

    def zeros(self) -> Scales:
        """Scales of 1 for each site that has any."""
        return Scales.of(
            SiteScales.zeros(site.name, site.delayed_casts, site.stack)
            for site in self.sites
            if site.has_scales
        )

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

        own, values = scales_for(self.sites, scales), [arrays[index] for index in floats]
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
        own = scales_for(self.sites, scales)

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
        amax = jax.tree.map(jnp.maximum, amax, observed_like(own, observed))
        if not has_loss:
            amax = with_stacks(amax, map(with_headroom, amax.stacks()))
        if isinstance(scales, Scales) and scales.groups == amax.groups:
            return amax
        return observed_like(scales, self._by_site(amax))


def _kinds_of(
    scales: Scales,
) -> list[tuple[tuple[jax.Array, ...], tuple[Group, ...]]]:
    """The arrays of `scales`, with their groups, by what can be one array: of one stack, varying
    over the same devices.
    """
    kinds = collections.defaultdict(list)
    for array, group in zip(scales.arrays, scales.groups, strict=True):
        kind = array.shape[:-2], _shims.varying_axes(array), observes_flushed(group.casts)
        kinds[kind].append((array, group))
    return [
        (tuple(array for array, _ in alike), tuple(group for _, group in alike))
        for alike in kinds.values()
    ]


def _varying_as(row: jax.Array | None, node: SiteExponents) -> jax.Array | None:
    if row is None:
        return None
    axes = _shims.varying_axes(node.values) - _shims.varying_axes(row)
    return jax.lax.pcast(row, tuple(axes), to="varying") if axes else row
