"""What is known of FP8 on each kind of device: what is multiplied as codes there, and what a
training step takes.

The figures of README and of the documentation. On accelerators they are estimates of training steps
that were compiled for the device and not run, the large one and the small one of `python -m
fp8jax.bench ahead`: two layers of width 4096, and three of width 2048 with attention. On the CPU
they are those of `python -m fp8jax.bench step`.
"""

import dataclasses

from fp8jax.formats import E4M3, E5M2, Format

__all__ = ["FIGURES", "DeviceFigures", "figures_of"]


@dataclasses.dataclass(frozen=True)
class DeviceFigures:
    """What FP8 is worth on one generation of devices.

    Args:
      name: of the generation.
      kinds: what `jax.Device.device_kind` begins with there.
      multiplies: whether it multiplies E4M3 codes faster than bfloat16, where scales are outside of
        the sum: per tensor, per row. Where not, codes are decoded, and the values are the same.
      multiplies_blocks: the same of blocks of 32 or more within the sum.
      large, small: times of training steps of a large and of a small model by `recipe`, relative to
        bfloat16's; None where not known.
      basis: how these were found.
      recipe: the name in `fp8jax.recipes` of the one that takes the least time.
    """

    name: str
    kinds: tuple[str, ...]
    multiplies: bool
    multiplies_blocks: bool
    large: float | None = None
    small: float | None = None
    basis: str = ""
    recipe: str = "delayed"

    @property
    def pays(self) -> bool | None:
        """Whether steps are faster than in bfloat16, those of small models too; None where nothing
        is known.
        """
        known = [step for step in (self.large, self.small) if step is not None]
        return all(step < 1 for step in known) if known else None

    def multiplies_formats(self, *formats: Format) -> bool:
        """Whether it multiplies codes of two formats as they are: of OFP8's two, but not E5M2 by
        E5M2.
        """
        return self.multiplies and set(formats) in ({E4M3}, {E4M3, E5M2})

    def __str__(self) -> str:
        if self.large is None:
            return f"{self.name}: no figures"
        small = "" if self.small is None else f" in a large model, {self.small:.2f} in a small one"
        return (
            f"{self.name}: {self.recipe!r} takes {self.large:.2f} of bfloat16's time{small}, "
            f"{self.basis}"
        )


_ESTIMATE = "by XLA's estimate"
_PEAK = "at the vendor's peak rates"

FIGURES = (
    DeviceFigures(
        "Blackwell GPUs", ("NVIDIA B", "NVIDIA GB", "B200", "GB200"), True, True, 0.746, None, _PEAK
    ),
    DeviceFigures(
        "Hopper GPUs", ("NVIDIA H", "NVIDIA GH", "H100", "H200"), True, False, 0.690, None, _PEAK
    ),
    DeviceFigures("TPU 7x", ("TPU7x", "TPU 7x", "TPU v7x"), True, False, 0.583, 0.855, _ESTIMATE),
    DeviceFigures("TPU v6e", ("TPU v6 lite", "TPU v6e"), False, False, 0.757, 1.148, _ESTIMATE),
    DeviceFigures("TPU v5e", ("TPU v5 lite", "TPU v5e"), False, False, 0.844, 1.095, _ESTIMATE),
    DeviceFigures("CPU", ("cpu",), False, False, 0.515, 0.531, "measured"),
    DeviceFigures("older TPUs", ("TPU v2", "TPU v3", "TPU v4", "TPU v5"), False, False),
    DeviceFigures(
        "older GPUs",
        ("NVIDIA A100", "NVIDIA A10", "NVIDIA A30", "NVIDIA A40", "Tesla "),
        False,
        False,
    ),
)


def notes_on(device_kind: str, multiplied: int) -> tuple[str, ...]:
    """What a user of FP8 products should know of a device, in words.

    Args:
      device_kind: as `jax.Device.device_kind`; "" where it isn't known.
      multiplied: how many of the program's FP8 products the device multiplies as codes.

    >>> notes_on("cpu", 0)
    ('cpu multiplies none of these products as FP8 codes: they are decoded first',)
    """
    figures, notes = figures_of(device_kind), []
    if not multiplied:
        which = device_kind or "the device"
        notes.append(
            f"{which} multiplies none of these products as FP8 codes: they are decoded first"
        )
    if figures is not None and figures.pays is False:
        notes.append(f"FP8 can be slower than bfloat16 there. {figures}")
    return tuple(notes)


def figures_of(device_kind: str) -> DeviceFigures | None:
    """The figures of a device; None where there are none.

    Args:
      device_kind: as `jax.Device.device_kind`, "NVIDIA H200" for instance.

    Raises:
      TypeError: where `device_kind` is no string.

    >>> figures_of("TPU v6 lite").name, figures_of("NVIDIA H200").multiplies_blocks
    ('TPU v6e', False)
    >>> figures_of("an abacus") is None
    True
    """
    if not isinstance(device_kind, str):
        raise TypeError(
            "device_kind must be a string, as a device's device_kind is; got "
            f"{device_kind!r}. Use jax.devices()[0].device_kind, for instance."
        )
    # The longest of those that fit: "TPU v5 lite" is no "TPU v5".
    fitting = {
        kind: figures
        for figures in FIGURES
        for kind in figures.kinds
        if device_kind.startswith(kind)
    }
    return fitting[max(fitting, key=len)] if fitting else None
