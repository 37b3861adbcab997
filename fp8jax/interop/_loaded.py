"""What was read from a checkpoint: parameters, and all else that it says, as fp8jax takes it."""

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import rich.table

from fp8jax._params import WeightRule, named_leaves
from fp8jax._state import map_site_scales
from fp8jax._tables import as_text
from fp8jax._tensor import Fp8Tensor
from fp8jax._transform.sites import Rule
from fp8jax.interop._scheme import Scheme


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class LoadedCheckpoint:
    """What `read_checkpoint` read. Printed, it is a table of the tensors by kind.

    Args:
      params: the tree, with `Fp8Tensor` leaves where the checkpoint holds codes.
      input_scales: static scales of activations, by path of the weight that they are multiplied by:
        float32, with the axes of layers and experts that the weight has.
      kv_scales: static scales of keys and values, by path of the weight that makes them: one for
        each layer, or for each of its heads; for `kv_cache.append`.
      schemes: by path of a quantized weight, how it is quantized, and its activations are to be.
      title: what the checkpoint is, and what told it; None where it is not quantized.
      excluded: paths of the weights that a quantized checkpoint left as they were, and products
        read.
      left: names of tensors that were left unread.
      config: the contents of `config.json`.
      stacked: by path, the number of leading axes of layers and experts, where there are any.
    """

    params: Any
    input_scales: dict[str, np.ndarray]
    kv_scales: dict[str, np.ndarray]
    schemes: dict[str, Scheme]
    title: str | None
    excluded: tuple[str, ...]
    left: tuple[str, ...]
    config: dict[str, Any]
    stacked: dict[str, int]

    @property
    def scheme(self) -> Scheme | None:
        """The scheme that all quantized weights have; None where there are none.

        Raises:
          ValueError: where they have several; see `schemes`.
        """
        found = set(self.schemes.values())
        if len(found) > 1:
            raise ValueError(
                f"scheme must be one for all weights; got {', '.join(sorted(map(str, found)))}. "
                "Use schemes."
            )
        return next(iter(found), None)

    @property
    def rules(self) -> tuple[Rule, ...]:
        """Rules for `fp8` that leave alone what the checkpoint did: products of `excluded` weights.

        Put them before your own. Empty where there is none.
        """
        names = []
        for path in self.excluded:
            module, _, last = path.rpartition("/")
            names.append(
                rf"{re.escape(module)}(?:/{re.escape(last)})?(?:#\d+)?"
                if module
                else re.escape(path)
            )
        return (Rule("|".join(names), None),) if names else ()

    @property
    def weight_rules(self) -> tuple[WeightRule, ...]:
        """Rules for `quantize_params` that hold a dense tree as this checkpoint does."""
        rules = [WeightRule(re.escape(path), None) for path in self.excluded]
        for path, leaf in named_leaves(self.params)[0]:
            if isinstance(leaf, Fp8Tensor):
                stacked = self.stacked.get(path, 0)
                rules.append(WeightRule(re.escape(path), leaf.scaling, leaf.format, stacked))
        return tuple(rules)

    def site_scales(self, scales: Any) -> Any:
        """`scales` with the exponents that fit the checkpoint's static scales of activations.

        For `recipes.delayed()`: to serve, or to train on from there. Each is the checkpoint's
        scale, rounded up to a power of two: what fitted into the format still does.

        Args:
          scales: those of the model, from its `init`; any tree that holds `SiteScales`. A site is
            that of the weight in the module of its name.

        Returns:
          A tree like `scales`. Sites that the checkpoint has no scale for keep their exponents.

        Raises:
          ValueError: where the checkpoint has no static scales, none of a site, or for another
            number of layers.
        """
        modules = {path.rpartition("/")[0]: value for path, value in self.input_scales.items()}
        modules |= self.input_scales  # a site of a plain tree is called as the weight
        matched = set()

        def fitted(node):
            module = node.site.partition("#")[0]
            value = modules.get(module)
            if value is None or node.lhs is None:
                return node
            matched.add(module)
            shape = jnp.shape(node.lhs)
            # Experts that share a site share its scale.
            value = value.max(axis=tuple(range(len(shape), value.ndim)))
            if value.shape != shape:
                raise ValueError(
                    f"scales must have the layers of the checkpoint; got {list(shape)} for site "
                    f"{node.site!r}, and {list(value.shape)} in the checkpoint. Make scales with "
                    "init of the same model."
                )
            old = np.asarray(node.lhs, np.float32)
            new = np.where(value > 0, _exponent(value), old).astype(np.float32)
            return node.replace(lhs=jnp.asarray(new))

        found = map_site_scales(fitted, scales)
        if not matched:
            raise ValueError(
                "scales must hold a site with a delayed lhs for a weight with a static scale; got "
                f"none for {sorted(modules)[:8] or 'a checkpoint without such scales'}."
            )
        return found

    def table(self) -> rich.table.Table:
        """The tensors by kind, as a table of rich's."""
        table = rich.table.Table(
            "kind",
            rich.table.Column("number", justify="right"),
            rich.table.Column("MB", justify="right"),
            "for instance",
            title=self.title or "not quantized",
            title_justify="left",
        )
        for kind, sizes in self._kinds().items():
            known = [size for size in sizes.values() if size is not None]
            megabytes = f"{sum(known) / 1e6:.3g}" if known else ""
            table.add_row(kind, str(len(sizes)), megabytes, next(iter(sizes)))
        return table

    def _kinds(self) -> dict[str, dict[str, int | None]]:
        """By kind, what there is of it, and its bytes."""
        kinds: dict[str, dict[str, int | None]] = {}
        for path, leaf in named_leaves(self.params)[0]:
            scheme = self.schemes.get(path)
            kind = "other parameters"
            if scheme is not None:
                kind = f"FP8 weights, {scheme}, activations {scheme.activations or 'as they are'}"
            elif path in self.excluded:
                kind = "weights left out of quantization"
            nbytes = leaf.nbytes if isinstance(leaf, Fp8Tensor) else jnp.asarray(leaf).nbytes
            kinds.setdefault(kind, {})[path] = nbytes
        kinds["static scales of activations"] = dict.fromkeys(self.input_scales)
        kinds["static scales of keys and values"] = dict.fromkeys(self.kv_scales)
        kinds["tensors left unread"] = dict.fromkeys(self.left)
        return {kind: sizes for kind, sizes in kinds.items() if sizes}

    def __str__(self) -> str:
        return as_text(self.table(), width=110)

    def __repr__(self) -> str:
        arrays = len(jax.tree.leaves(self.params))
        return f"<LoadedCheckpoint: {self.title or 'not quantized'}, {arrays} arrays>"

    def __rich__(self) -> rich.table.Table:
        return self.table()


def _exponent(scale: np.ndarray) -> np.ndarray:
    """The exponent of the next power of two, exactly."""
    mantissa, exponent = np.frexp(scale.astype(np.float64))
    return np.clip(exponent - (mantissa == 0.5), -126, 126)
