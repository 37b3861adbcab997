"""What is known of FP8 on each kind of device: how it converts, what it multiplies as codes, and
what a training step takes. And which device a program is traced for.

The figures of README and of the documentation. On accelerators they are estimates of training steps
that were compiled for the device and not run, the large one and the small one of `python -m
fp8jax.bench ahead`: two layers of width 4096, and three of width 2048 with attention. On the CPU
they are those of `python -m fp8jax.bench step`.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
from jax.sharding import AxisType

from fp8jax._formats import E4M3, E5M2, Format

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
      converts_to_nearest: whether its conversion to FP8 is known to round to nearest, ties to even.
        Where not, values are rounded before, or converted by the integer codec.
      large, small: times of training steps of a large and of a small model by `recipe`, relative to
        bfloat16's; None where not known.
      basis: how these were found.
      recipe: the name in `fp8jax.recipes` of the one that takes the least time.
    """

    name: str
    kinds: tuple[str, ...]
    multiplies: bool
    multiplies_blocks: bool
    converts_to_nearest: bool = dataclasses.field(default=False, kw_only=True)
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
        """Whether it multiplies codes of two formats as they are."""
        return self.multiplies and are_multiplied(*formats)

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

# GPUs of compute capability 10 and 9 convert in one instruction, to nearest, ties to even. How
# other GPUs are made to convert is not documented, and to round before takes them more than the
# integer codec does. Which way a TPU rounds is not documented; there, values are rounded before.
FIGURES = (
    DeviceFigures(
        "Blackwell GPUs",
        ("NVIDIA B100", "NVIDIA B200", "NVIDIA B300", "NVIDIA GB200", "NVIDIA GB300")
        + ("B200", "GB200"),
        *(True, True, 0.733, None, _PEAK),
        converts_to_nearest=True,
    ),
    DeviceFigures(
        "Hopper GPUs",
        ("NVIDIA H", "NVIDIA GH", "H100", "H200"),
        *(True, False, 0.677, None, _PEAK),
        converts_to_nearest=True,
    ),
    DeviceFigures("TPU 7x", ("TPU7x", "TPU 7x", "TPU v7x"), True, False, 0.576, 0.826, _ESTIMATE),
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


def are_multiplied(*formats: Format) -> bool:
    """Whether devices that multiply codes do so of these formats: of OFP8's two, but not E5M2 by
    E5M2.

    >>> are_multiplied(E4M3, E5M2), are_multiplied(E5M2, E5M2)
    (True, False)
    """
    return set(formats) in ({E4M3}, {E4M3, E5M2})


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


class Device(NamedTuple):
    """A device as JAX names it.

    Args:
      platform: "cpu", "gpu" or "tpu".
      kind: as `jax.Device.device_kind`, "NVIDIA B200" for instance.
    """

    platform: str
    kind: str

    @property
    def figures(self) -> DeviceFigures | None:
        """What is known of its generation, if anything."""
        return figures_of(self.kind)


def device_of(*arrays: Any) -> Device:
    """The device that arrays, or their abstract values, are traced for.

    That of the mesh their types name, which is known for devices that are not here, too; else of
    the mesh at hand; else the default device.

    >>> device_of(jax.numpy.ones(2)).platform
    'cpu'
    """
    for mesh in _meshes(arrays):
        device = getattr(mesh, "abstract_device", None)
        if device is not None and device.platform is not None:
            return Device(device.platform, device.device_kind)
    default = jax.config.jax_default_device
    if default is None or isinstance(default, str):
        default = jax.devices(default)[0]
    return Device(default.platform, default.device_kind)


def division_of(*arrays: Any) -> str:
    """How arrays are divided over devices: "" where each device has its own, inside of a
    `jax.shard_map` or on one device alone; else "automatic", "explicit", or "unknown" where no mesh
    is named and there are several devices.

    >>> division_of(jax.numpy.ones(2)) == ("" if jax.device_count() == 1 else "unknown")
    True
    """
    meshes = _meshes(arrays)
    if not meshes:
        return "" if jax.device_count() == 1 else "unknown"
    kinds = {
        kind
        for mesh in meshes
        for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True)
        if mesh.shape[name] > 1
    }
    if AxisType.Explicit in kinds:
        return "explicit"
    return "automatic" if AxisType.Auto in kinds else ""


def _meshes(arrays) -> list:
    """The meshes that are known of, those of the arrays first."""
    shardings = (
        array.sharding
        if hasattr(array, "sharding") and not isinstance(array, jax.Array)
        else jax.typeof(array).sharding
        for array in arrays
    )
    meshes = [getattr(sharding, "mesh", None) for sharding in shardings]
    meshes.append(jax.sharding.get_abstract_mesh())
    return [mesh for mesh in meshes if mesh is not None and mesh.axis_names]
