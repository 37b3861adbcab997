"""What is cast, to which format, at which granularity, in each of a site's three products.

A product `out = lhs . rhs` has two gradients, so a site runs three products over six casts:

    forward   out  = lhs  . rhs
    dlhs      dlhs = grad . rhs^T
    drhs      drhs = lhs^T . grad

A `Recipe` holds one `CastSpec` for each of the six. It is plain frozen data: hashable, so it can be
static under `jax.jit`; comparable, so a checkpoint can be held against it; and it goes to JSON and
back.
"""

import dataclasses
import json
from typing import Any, Literal, TypeGuard

from fp8jax._formats import Format, get_format
from fp8jax._scaling import BlockWise, PerChannel, PerTensor, PerToken, Scaling

REDUCTIONS = ("max", "most_recent")
ROUNDINGS = ("nearest", "toward_zero")
EXECUTIONS = ("auto", "native", "emulated")
PRODUCTS = {"forward": ("lhs", "rhs"), "dlhs": ("grad", "rhs"), "drhs": ("lhs", "grad")}
OPERANDS = ("lhs", "rhs", "grad")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DelayedScaling:
    """How an operand's scale follows the amaxes that were observed for it in earlier steps.

    Args:
      interval: observations of the operand from one regular move of its scale to the next; at least
        1.
      margin: factor of headroom over the reduced amax, as in `scale = amax * margin / format.max`;
        positive.
      history_window: number of latest observations whose amaxes are kept; at least 1.
      update_threshold: share of the representable range in (0, 1]. An amax above `update_threshold
        * format.max * scale` moves the scale at once, without waiting for `interval`.
      reduce: "max" over the window, "most_recent", or a percentile in (0, 100] of the window's
        observations, by the nearest-rank rule (so the 99th percentile of 100 observations is the
        99th smallest and not the largest).
      outlier_ratio: an amax more than so many times all others in the window is an outlier: until
        the window holds a second one like it, it counts as no more than the square root of this
        ratio times the others, and only at the update that it came with. So one bad batch costs
        hardly any precision later, and a real jump of the amax, by more than this ratio, one step
        more of saturation; n products in a chain, with no normalization between them, take n + 1
        steps (see `fp8jax.delayed_scaling`). Above 1; None makes each amax count at once. A window
        of 1 has no others to compare with.
      flushed: also observe the share of the operand that its cast turns into zeros (see
        `fp8jax.metrics.flushed_shares`). Amaxes can't tell it; it costs a pass over the operand,
        and where that is divided over devices a collective of its own.

    Raises:
      ValueError, TypeError: where a field is outside its range.

    >>> DelayedScaling(history_window=4).reduce
    'max'
    """

    interval: int = 1
    margin: float = 1.0
    history_window: int = 16
    update_threshold: float = 0.95
    reduce: Literal["max", "most_recent"] | float = "max"
    outlier_ratio: float | None = 1024.0
    flushed: bool = False

    def __post_init__(self):
        for field in ("interval", "history_window"):
            value = getattr(self, field)
            if not _is_int(value) or value < 1:
                raise ValueError(
                    f"{field} must be a whole number of observations, at least 1; got {value!r}. "
                    f"Use {field}=1 for the shortest."
                )
        if not _is_number(self.margin) or not 0 < self.margin < 2.0**64:
            raise ValueError(
                f"margin must be a positive factor below 2**64; got {self.margin!r}. "
                "Use 1.0 for no headroom, 2.0 for one binade."
            )
        if not _is_number(self.update_threshold) or not 0 < self.update_threshold <= 1:
            raise ValueError(
                "update_threshold must be a share of the range in (0, 1]; got "
                f"{self.update_threshold!r}. "
                "Use 1.0 to move early only where values saturated."
            )
        percentile = self.percentile
        if self.reduce not in REDUCTIONS and (percentile is None or not 0 < percentile <= 100):
            raise ValueError(
                f"reduce must be one of {REDUCTIONS} or a percentile in (0, 100]; got "
                f"{self.reduce!r}. "
                "Use 'max' unless outliers are to be ignored."
            )
        ratio = self.outlier_ratio
        if ratio is not None and (not _is_number(ratio) or not 1 < ratio < 2.0**64):
            raise ValueError(
                f"outlier_ratio must be a factor above 1 and below 2**64, or None; got {ratio!r}. "
                "Use None where each amax is to count at once."
            )
        if not isinstance(self.flushed, bool):
            raise TypeError(
                f"flushed must be True or False; got {self.flushed!r}. Use True to observe what is "
                "flushed to zero."
            )

    @property
    def percentile(self) -> float | None:
        """What `reduce` is where it is a number."""
        return self.reduce if _is_number(self.reduce) else None


@dataclasses.dataclass(frozen=True)
class CastSpec:
    """One cast: the format, the granularity of its scales, the rounding, and where the scales come
    from.

    Args:
      format: a `Format`, or its name.
      scaling: granularity of the scales: `PerTensor()`; `PerToken()`, one for each vector along the
        contracted axes ("row-wise"); `BlockWise((a, b))`, one for each box of `a` elements of the
        last kept and `b` of the last contracted axis (see `fp8jax.ops._cast`); `BlockWise(b)` is
        `BlockWise((1, b))`.
      rounding: "nearest" (ties to even) or "toward_zero".
      delayed: a `DelayedScaling` where the scale comes from earlier steps' amaxes; None where it is
        computed from the operand itself ("current" scaling).
      power_of_two: whether scales are powers of two, rounded up, or take the amax to exactly the
        largest value. Scales that differ along a contracted axis then cost products in float32,
        because bfloat16 can't hold their values.

      clip_infinities: whether infinities become the largest value of the cast, as finite values do
        that are too large. By default they stay what they are, or become NaN where the format has
        no infinities. Clipped, they are lost: results and gradients may be finite where those of
        the plain function are not, so `optax.apply_if_finite`, dynamic loss scales and
        `jax_debug_nans` see nothing, and the step is taken. NaN stays NaN.

    Raises:
      ValueError, TypeError: where a field is unknown or a product can't honour it.

    >>> CastSpec("E5M2").format.max
    57344.0
    """

    format: Format
    scaling: Scaling = PerTensor()
    rounding: Literal["nearest", "toward_zero"] = "nearest"
    delayed: DelayedScaling | None = None
    power_of_two: bool = True
    clip_infinities: bool = False

    def __post_init__(self):
        object.__setattr__(self, "format", get_format(self.format))
        if not self.format.mantissa_bits:
            raise ValueError(
                f"format must hold values; got {self.format.name}, which holds scales only. Use "
                "E4M3 or E5M2."
            )
        box = self.scaling.extents if isinstance(self.scaling, BlockWise) else ()
        if len(box) not in (1, 2) and not isinstance(self.scaling, (PerTensor, PerToken)):
            raise ValueError(
                "scaling of a product's operand must be PerTensor(), PerToken() or BlockWise of "
                "one or two extents; "
                f"got {self.scaling!r}. PerToken() gives a scale for each vector along the "
                "contracted axes, "
                "which for weights is a scale for each channel."
            )
        if len(box) == 1:
            object.__setattr__(self, "scaling", BlockWise((1, *box)))
        if self.rounding not in ROUNDINGS:
            raise ValueError(
                f"rounding of a product's operand must be one of {ROUNDINGS}; got "
                f"{self.rounding!r}. "
                "Stochastic rounding needs a key, which a product has none of: use fp8jax.encode."
            )
        if self.delayed is not None and not isinstance(self.delayed, DelayedScaling):
            raise TypeError(
                f"delayed must be a DelayedScaling or None; got {self.delayed!r}. "
                "Use DelayedScaling() for its defaults."
            )
        if not isinstance(self.power_of_two, bool):
            raise TypeError(f"power_of_two must be True or False; got {self.power_of_two!r}.")
        if not isinstance(self.clip_infinities, bool):
            raise TypeError(f"clip_infinities must be True or False; got {self.clip_infinities!r}.")
        if self.delayed is not None and not isinstance(self.scaling, PerTensor):
            raise ValueError(
                f"delayed scaling must be PerTensor(); got {self.scaling!r}. Finer groups differ "
                "from batch to batch, and "
                "earlier steps' amaxes say nothing about them: use delayed=None."
            )
        if self.delayed is not None and not self.power_of_two:
            raise ValueError(
                "delayed scaling keeps exponents, so its scales are powers of two; got "
                "power_of_two=False. "
                "Use power_of_two=True, or delayed=None."
            )

    def to_json(self) -> str:
        """The cast as a JSON object; `CastSpec.from_json` gives an equal one."""
        return json.dumps(_to_data(self))

    @classmethod
    def from_json(cls, text: str) -> "CastSpec":
        """The cast that `to_json` wrote. Unknown, missing or malformed fields raise ValueError or
        TypeError.
        """
        return _cast_from_data(json.loads(text))


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProductCasts:
    """The casts of one product, of two of `lhs`, `rhs` and `grad`. What has None stays in its own
    precision.

    >>> ProductCasts(lhs=CastSpec("E4M3"), rhs=CastSpec("E4M3")).grad is None
    True
    """

    lhs: CastSpec | None = None
    rhs: CastSpec | None = None
    grad: CastSpec | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """The six casts of a site, and how its products are executed.

    Written for products whose rhs is the weight; the transform mirrors it where the lhs is.

    Args:
      name: how `explain` calls it.
      forward: casts of lhs and rhs in `out = lhs . rhs`.
      dlhs: casts of grad and rhs in `dlhs = grad . rhs^T`.
      drhs: casts of lhs and grad in `drhs = lhs^T . grad`.
      execution: "native" feeds float8 operands to the product; "emulated" decodes the same codes to
        bf16 or f32 first, where every FP8 value is exact; "auto" takes native where the hardware
        has it for the formats in question. With scales that differ along a sum, "native" takes the
        device's kernel for them, or raises when it is traced where there is none; `explain` says
        which one "auto" takes.
      second_order: keep operands beside their codes, for second derivatives: the gradient of a
        gradient then is that of the quantized values, with casts as the identity. Without effect on
        first derivatives, and under `jax.jit` on their cost. Needs JAX 0.12.

    Raises:
      ValueError, TypeError: where a cast is surplus, or there is none at all; where an operand with
        delayed scaling is cast in two ways (it has one scale, so it has one cast); where
        `execution` is native and some product can't be.

    >>> from fp8jax import recipes
    >>> recipe = recipes.delayed()
    >>> recipe.dlhs.grad.format.name
    'E5M2'
    >>> Recipe.from_json(recipe.to_json()) == recipe
    True
    """

    name: str = "custom"
    forward: ProductCasts
    dlhs: ProductCasts
    drhs: ProductCasts
    execution: Literal["auto", "native", "emulated"] = "auto"
    second_order: bool = False

    def __post_init__(self):
        if self.execution not in EXECUTIONS:
            raise ValueError(
                f"execution must be one of {EXECUTIONS}; got {self.execution!r}. "
                "Use 'auto' to choose by the hardware."
            )
        if not isinstance(self.second_order, bool):
            raise TypeError(f"second_order must be True or False; got {self.second_order!r}.")
        for product, used in PRODUCTS.items():
            casts = getattr(self, product)
            if not isinstance(casts, ProductCasts):
                raise TypeError(
                    f"{product} must be a ProductCasts; got {casts!r}. "
                    f"Write ProductCasts({used[0]}=CastSpec(...), {used[1]}=CastSpec(...))."
                )
            surplus = tuple(
                operand
                for operand in OPERANDS
                if operand not in used and getattr(casts, operand) is not None
            )
            if surplus:
                raise ValueError(
                    f"{product} must have casts for {used[0]} and {used[1]} alone; got one for "
                    f"{surplus[0]}. "
                    "These are the operands of that product."
                )
        for operand in OPERANDS:
            casts = set(self.casts_of(operand))
            if len(casts) > 1 and any(cast.delayed for cast in casts):
                raise ValueError(
                    f"{operand} has delayed scaling, so both products that read it must cast it "
                    "alike; got "
                    f"{' and '.join(map(str, self.casts_of(operand)))}. Use one CastSpec for both, "
                    "or delayed=None."
                )
        if not any(self.casts_of(operand) for operand in OPERANDS):
            raise ValueError(
                "a recipe must cast something; got none for any operand. To leave sites as they "
                "are, use "
                "Rule(pattern, None)."
            )
        if self.execution == "native":
            for product, used in PRODUCTS.items():
                self._check_native(
                    product, [getattr(getattr(self, product), operand) for operand in used]
                )

    def _check_native(self, product: str, casts: list[CastSpec | None]) -> None:
        if any(cast is None for cast in casts) and any(cast is not None for cast in casts):
            raise ValueError(
                f"execution 'native' needs float8 for both operands of {product}; got {casts}. Use "
                "'auto', which "
                "decodes the one."
            )

    def casts_of(self, operand: str) -> tuple[CastSpec, ...]:
        """The casts of `operand` in the products that read it, in the order forward, dlhs, drhs; at
        most two.
        """
        casts = (getattr(getattr(self, product), operand) for product in PRODUCTS)
        return tuple(cast for cast in casts if cast is not None)

    @property
    def delayed_casts(self) -> tuple[CastSpec | None, CastSpec | None, CastSpec | None]:
        """For lhs, rhs and grad: the cast where its scaling is delayed, so that its scale is state;
        else None.
        """
        lhs, rhs, grad = (
            next((cast for cast in self.casts_of(operand) if cast.delayed is not None), None)
            for operand in OPERANDS
        )
        return lhs, rhs, grad

    def mirrored(self) -> "Recipe":
        """The recipe with lhs and rhs in each other's place: for products whose weights are the
        lhs.

        >>> from fp8jax import recipes
        >>> recipes.blockwise().mirrored().forward.lhs.scaling
        BlockWise(block_shape=(128, 128))
        """
        return dataclasses.replace(
            self,
            forward=ProductCasts(lhs=self.forward.rhs, rhs=self.forward.lhs),
            dlhs=ProductCasts(grad=self.drhs.grad, rhs=self.drhs.lhs),
            drhs=ProductCasts(lhs=self.dlhs.rhs, grad=self.dlhs.grad),
        )

    def to_json(self) -> str:
        """The recipe as a JSON object; `Recipe.from_json` gives an equal one."""
        return json.dumps(_to_data(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> "Recipe":
        """The recipe that `to_json` wrote. Unknown, missing or malformed fields raise ValueError or
        TypeError.
        """
        data = json.loads(text)
        if not isinstance(data, dict):
            raise ValueError(
                f"text must be a JSON object; got {data!r}. Pass what Recipe.to_json returned."
            )
        for product in PRODUCTS:
            if isinstance(data.get(product), dict):
                data[product] = _from_data(
                    ProductCasts,
                    {operand: _cast_from_data(cast) for operand, cast in data[product].items()},
                )
        return _from_data(cls, data)


_SCALINGS = {kind.__name__: kind for kind in (PerTensor, PerChannel, PerToken, BlockWise)}


def _to_data(value: Any) -> Any:
    if isinstance(value, Format):
        return value.name
    if isinstance(value, tuple(_SCALINGS.values())):
        return {"kind": type(value).__name__} | dataclasses.asdict(value)
    if dataclasses.is_dataclass(value):
        fields = ((field, getattr(value, field.name)) for field in dataclasses.fields(value))
        return {
            field.name: _to_data(item)
            for field, item in fields
            if item is not None or field.default is not None
        }
    return value


def _cast_from_data(data: dict) -> CastSpec:
    data = dict(data)
    if "scaling" in data:
        scaling = dict(data["scaling"])
        kind = scaling.pop("kind", None)
        if kind not in _SCALINGS:
            raise ValueError(
                f"kind of scaling must be one of {tuple(_SCALINGS)}; got {kind!r}. Correct the "
                "recipe's text."
            )
        data["scaling"] = _from_data(_SCALINGS[kind], scaling)
    if "delayed" in data:
        data["delayed"] = _from_data(DelayedScaling, data["delayed"])
    return _from_data(CastSpec, data)


def _from_data(cls: type, data: dict) -> Any:
    known = {field.name for field in dataclasses.fields(cls)}
    unknown = sorted(set(data) - known)
    if unknown:
        raise ValueError(
            f"{cls.__name__} has no field {unknown}; its fields are {sorted(known)}. "
            "Remove them, or read the text with the version that wrote it."
        )
    return cls(**data)


def _is_number(value: Any) -> TypeGuard[int | float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
