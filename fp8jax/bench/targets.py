"""Devices that programs are compiled for without having one.

XLA's compilers need a description of the device, not the device. They come with the extra `aot`.
"""

import importlib.util
import os
import pathlib
from typing import Any, NamedTuple

from jax.experimental import topologies

# By the name of a device, what JAX calls the smallest topology of it.
TPUS = {"TPU 7x": "tpu7x:2x2x1", "TPU v6e": "v6e:2x2"}
GPUS = ("H200", "B200")
INSTALL = "pip install 'fp8jax[aot]'"


class Peak(NamedTuple):
    """What a GPU does at the most, of the vendor's data sheet.

    Args:
      bfloat16, fp8: floating-point operations of dense products in a second.
      memory: bytes read and written in a second.
    """

    bfloat16: float
    fp8: float
    memory: float


# NVIDIA's data sheet of the H200 has 1979 and 3958 TFLOP/s for the SXM, both with sparsity, which
# is twice the dense rate, and 4.8 TB/s. Its Blackwell data sheet has 4.5 and 9 PFLOP/s for a GPU of
# the HGX B200, with sparsity as well, and 7.7 TB/s: a bus of 7680 bits, twice in each cycle of
# 3996 MHz, as drivers report it. The 8 TB/s that one also reads are the GB200's.
PEAKS = {"H200": Peak(989e12, 1979e12, 4.8e12), "B200": Peak(2.25e15, 4.5e15, 7.7e12)}


def has_compiler(device: str) -> bool:
    """Whether XLA's compiler for a device, as `topology` takes it, is installed.

    >>> has_compiler("no device")
    False
    """
    if device in GPUS:
        return any(_is_installed(f"jax_plugins.xla_cuda{version}") for version in (12, 13))
    return (device in TPUS or ":" in device) and _is_installed("libtpu")


def topology(device: str, gpus: int = 1) -> Any:
    """The topology of a device that is not here, for `jax.experimental.topologies.make_mesh`.

    Args:
      device: "H200" or "B200"; "TPU 7x" or "TPU v6e"; or a TPU topology as JAX writes them, as in
        "v5p:4x4x4".
      gpus: how many GPUs, on one host.

    Raises:
      ValueError: where the device is unknown, or its compiler is not installed.
    """
    if not has_compiler(device):
        known = ", ".join((*GPUS, *TPUS))
        raise ValueError(
            f"device must be one of {known}, or a TPU topology, with its compiler installed; got "
            f"{device!r}. Install the compilers: {INSTALL}."
        )
    if device in GPUS:
        folder = pathlib.Path(__file__).with_name("targets")
        target = (folder / f"{device.lower()}.txtpb").read_text()
        # Counted as slices x hosts x GPUs per host.
        shape = f"1x1x{gpus}"
        return topologies.get_topology_desc(platform="cuda", target_config=target, topology=shape)
    # libtpu would ask the cloud which machine this is, and take a lock that one process can have.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    return topologies.get_topology_desc(platform="tpu", topology_name=TPUS.get(device, device))


def _is_installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # of a parent package
        return False
