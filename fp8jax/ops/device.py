"""Which device a program is traced for, and how its arrays are divided there."""

from typing import Any, NamedTuple

import jax
from jax.sharding import AxisType


class Device(NamedTuple):
    """A device as JAX names it.

    Args:
      platform: "cpu", "gpu" or "tpu".
      kind: as `jax.Device.device_kind`, "NVIDIA B200" for instance.
    """

    platform: str
    kind: str


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
