"""The machine code in a program compiled for CUDA GPUs, as `cuobjdump` reads it.

XLA keeps kernels as ELF files, in blocks that are compressed in the format of Snappy
(https://github.com/google/snappy/blob/main/format_description.txt).
"""

import os
import pathlib
import re
import shutil
import subprocess
import sysconfig
from collections import Counter

import pytest

_ELF = b"\x7fELF"
_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*)", re.MULTILINE)


def instructions_by_kernel(compiled, folder: pathlib.Path) -> dict[str, Counter[str]]:
    """How often each instruction stands in each kernel; what fills it up to a round size doesn't
    count.
    """
    found = {}
    for number, elf in enumerate(_elves(compiled.runtime_executable().serialize())):
        path = folder / f"{number}.cubin"
        path.write_bytes(elf)
        for part in re.split(r"Function : ", listing(path))[1:]:
            counted = Counter(_INSTRUCTION.findall(part))
            found[part.split()[0]] = counted - Counter(NOP=counted["NOP"])
    assert found, "no machine code was found in the program"
    return found


def listing(cubin: pathlib.Path) -> str:
    """The machine code in a file of it, in words."""
    cuobjdump = tool("cuobjdump")
    # It calls another tool, which lies beside it.
    environment = os.environ | {"PATH": f"{cuobjdump.parent}{os.pathsep}{os.environ['PATH']}"}
    command = [cuobjdump, "--dump-sass", cubin]
    return subprocess.check_output(command, text=True, env=environment)


def tool(name: str) -> pathlib.Path:
    """A program of CUDA: from its wheel, or else from the path."""
    packages = pathlib.Path(sysconfig.get_path("purelib"))
    found = next(packages.glob(f"nvidia/*/bin/{name}"), shutil.which(name))
    if found is None:
        pytest.skip(f'reading machine code needs {name}: pip install -e ".[aot]"')
    return pathlib.Path(found)


def _elves(program: bytes):
    """The ELF files in a serialized program."""
    at = program.find(_ELF)
    while at >= 0:
        # A block begins somewhere before; it holds other things first.
        blocks = (_decompressed(program, start) for start in range(at - 1, -1, -1))
        block, end = next((one for one in blocks if one is not None), (b"", at + 1))
        for piece in block.split(_ELF)[1:]:
            yield _ELF + piece
        at = program.find(_ELF, end)


def _is_whole(elf: bytes) -> bool:
    """Whether an ELF file reaches to the end of its table of sections."""
    start, size, count = (
        int.from_bytes(elf[at : at + wide], "little") for at, wide in ((40, 8), (58, 2), (60, 2))
    )
    return 64 <= start <= start + size * count <= len(elf)


def _decompressed(data: bytes, start: int) -> tuple[bytes, int] | None:
    """A block that begins at `start` and holds a whole ELF file, and where it ends; None where
    none does.
    """
    try:
        size, at = _size(data, start)
        out = bytearray()
        while len(out) < size:
            kind, upper = data[at] & 3, data[at] >> 2
            at += 1
            if kind == 0:  # bytes as they are
                more = max(upper - 59, 0)
                length = (
                    upper + 1 if not more else int.from_bytes(data[at : at + more], "little") + 1
                )
                out += data[at + more : at + more + length]
                at += more + length
                continue
            if kind == 1:
                length, back = (upper & 7) + 4, (upper >> 3) << 8 | data[at]
                at += 1
            else:
                length, wide = upper + 1, 2 * kind - 2
                back = int.from_bytes(data[at : at + wide], "little")
                at += wide
            if not 0 < back <= len(out):
                return None
            for _ in range(length):
                out.append(out[-back])
    except IndexError:
        return None
    first = out.find(_ELF)
    return (bytes(out), at) if len(out) == size and first >= 0 and _is_whole(out[first:]) else None


def _size(data: bytes, at: int) -> tuple[int, int]:
    """The number of bytes that a block has once decompressed, seven bits at a time."""
    size = shift = 0
    while True:
        size, at = size | (data[at] & 127) << shift, at + 1
        if data[at - 1] < 128:
            return size, at
        shift += 7
