"""Which device a program is traced for."""

from typing import NamedTuple

import jax


class Device(NamedTuple):
    """A device as JAX names it.

    Args:
      platform: "cpu", "gpu" or "tpu".
      kind: as `jax.Device.device_kind`, "NVIDIA B200" for instance.
    """

    platform: str
    kind: str


def device_of(*arrays: jax.Array) -> Device:
    """The device that arrays are traced for.

    That of the mesh their types name, which is known for devices that are not here, too; else of
    the mesh at hand; else the default device.

    >>> device_of(jax.numpy.ones(2)).platform
    'cpu'
    """
    meshes = [jax.typeof(array).sharding.mesh for array in arrays]
    for mesh in (*meshes, jax.sharding.get_abstract_mesh()):
        device = getattr(mesh, "abstract_device", None)
        if device is not None and device.platform is not None:
            return Device(device.platform, device.device_kind)
    default = jax.config.jax_default_device
    if default is None or isinstance(default, str):
        default = jax.devices(default)[0]
    return Device(default.platform, default.device_kind)
