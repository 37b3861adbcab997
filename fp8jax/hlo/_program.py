"""The text of a compiled program as data: its computations, and the kernels that a run of it
launches.

Reads what `jax.stages.Compiled.as_text` prints: HLO after XLA's last pass, on any platform. Of an
instruction it needs the name, the shape, the opcode, the operands' names and some attributes; what
else a version of XLA prints is passed over.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

# Instructions that are no work at all, or that only hold other computations or await what was
# started before.
_FREE = frozenset(
    "parameter constant tuple get-tuple-element bitcast after-all opt-barrier optimization-barrier "
    "partition-id replica-id add-dependency domain while conditional call".split()
)
# Of an asynchronous pair, the start is the work.
_AWAITS = ("-done", "-update")

_LEAF = re.compile(r"([a-z]\w*)\[([\d,<=? ]*)\]")
_NAME = re.compile(r"%?([\w.\-]+)$")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = ")
_OPCODE = re.compile(r"\s*([\w\-]+)\(")
# Not `to_apply`: what a reduction applies to two elements is no part of its work that could be told
# apart, and XLA shares it.
_CALLED = re.compile(
    r"\b(?:calls|body|condition|called_computations"
    r"|branch_computations|true_computation|false_computation)="
    r"(?:\{([^}]*)\}|%?([\w.\-]+))"
)
_APPLIED = re.compile(r"\bto_apply=%?([\w.\-]+)")
_OP_NAME = re.compile(r'op_name="((?:[^"\\]|\\.)*)"')
_TARGET = re.compile(r'custom_call_target="([^"]*)"')
_ROLES = re.compile(r"\b(condition|body)=%?([\w.\-]+)")
_INDEX = re.compile(r"\bindex=(\d+)")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_DECLARED = re.compile(r'"cost_estimate":\s*\{([^}]*)\}')
_DECLARED_ONE = re.compile(r'"(flops|bytes_accessed)":\s*"?(\d+)')
_UNKNOWN_CYCLES = 10**12
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One array: dtype as XLA names it, and shape.

    >>> Leaf("f8e4m3fn", (2, 3)).bytes, Leaf("bf16", ()).bytes, Leaf("pred", (5,)).bytes
    (6, 2, 5)
    """

    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """What it takes in memory, without padding."""
        bits = re.match(r"[a-z]+(\d+)", self.dtype)
        if self.dtype in ("token", "opaque"):
            return 0
        return math.ceil(math.prod(self.shape) * (int(bits[1]) if bits else 8) / 8)

    @property
    def is_fp8(self) -> bool:
        """Whether it holds codes of an 8-bit float format that holds values."""
        return self.dtype.startswith("f8") and self.dtype != "f8e8m0fnu"


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation.

    Args:
      name: unique in the program's text.
      opcode: as XLA prints it, "custom-call" for instance.
      leaves: the arrays of its result.
      operands: names.
      called: names of the computations that it calls.
      op_name: the name stack of the equation that it comes from; empty where XLA made it.
      target: of a custom call.
      value: of a constant, as XLA prints it.
      attributes: all that stands behind the operands.
    """

    name: str
    opcode: str
    leaves: tuple[Leaf, ...]
    operands: tuple[str, ...]
    called: tuple[str, ...]
    op_name: str
    target: str
    value: str
    attributes: str


@dataclasses.dataclass(frozen=True)
class Computation:
    """Instructions by name, in the order of the text, and the name of the one whose result is the
    computation's.
    """

    name: str
    instructions: dict[str, Instruction]
    root: str

    @functools.cached_property
    def parameters(self) -> dict[str, int]:
        """Names of the parameters, and their numbers: the operands' positions at the call."""
        found = [one for one in self.instructions.values() if one.opcode == "parameter"]
        return {one.name: int(one.operands[0]) for one in found}


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One launch: an instruction of a computation that runs by itself, and how often a run of the
    program comes by.

    Args:
      instruction: the fusion, custom call, copy or other instruction.
      computation: the one that it stands in.
      runs: how often; the product of the lengths of the loops around it, 1 for a loop whose length
        the program doesn't tell.
    """

    instruction: Instruction
    computation: Computation
    runs: int

    @property
    def cycles(self) -> int | None:
        """XLA's own estimate for all of its runs; None where there is none, as for all but TPUs."""
        estimate = _CYCLES.search(self.instruction.attributes)
        # What the compiler can't estimate it marks by a number beyond all reason.
        if estimate is None or int(estimate[1]) >= _UNKNOWN_CYCLES:
            return None
        return int(estimate[1]) * self.runs


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled program: computations by name, and which one is the program's."""

    computations: dict[str, Computation]
    entry: str

    @classmethod
    def parse(cls, text: str) -> "Program":
        """The program that `jax.stages.Compiled.as_text` printed.

        Raises:
          ValueError: where the text has no entry computation.

        >>> import jax, jax.numpy as jnp
        >>> compiled = jax.jit(lambda x: x @ x).lower(jnp.ones((2, 2))).compile()
        >>> [leaf.shape for leaf in Program.parse(compiled.as_text()).root.leaves]
        [(2, 2)]
        """
        computations, entry, lines, name, is_open = {}, None, [], None, False
        for line in text.splitlines():
            if is_open:  # An attribute in several lines, as a kernel's declared cost.
                lines[-1], is_open = lines[-1] + line, not line.startswith("}")
            elif name is None:
                if header := _COMPUTATION.match(line):
                    name, lines = header[2], []
                    entry = name if header[1] else entry
            elif line.startswith("}"):
                computations[name], name = _computation(name, lines), None
            elif _INSTRUCTION.match(line):
                lines.append(line)
                is_open = line.endswith("{")
        if entry is None:
            raise ValueError(
                "text must be that of a compiled program, with an ENTRY computation; got none in "
                f"{text[:60]!r}. Pass compiled.as_text()."
            )
        return cls(computations, entry)

    @property
    def root(self) -> Instruction:
        """The instruction whose result is the program's."""
        entry = self.computations[self.entry]
        return entry.instructions[entry.root]

    def kernels(self) -> Iterator[Kernel]:
        """All launches of a run, in the text's order; of a conditional, those of each branch."""
        yield from self._kernels(self.computations[self.entry], 1)

    def _kernels(self, computation: Computation, runs: int) -> Iterator[Kernel]:
        for instruction in computation.instructions.values():
            if instruction.opcode in ("while", "conditional", "call"):
                trips = (
                    self._trips(instruction, computation) if instruction.opcode == "while" else 1
                )
                for name in instruction.called:
                    # How often a loop asks whether it goes on is no work worth counting.
                    if f"condition=%{name}" not in instruction.attributes:
                        yield from self._kernels(self.computations[name], runs * trips)
            elif instruction.opcode not in _FREE and not instruction.opcode.endswith(_AWAITS):
                yield Kernel(instruction, computation, runs)

    def _trips(self, loop: Instruction, computation: Computation) -> int:
        """How often a loop runs: as XLA says it, or as it counts, which is how TPUs' programs tell;
        1 where neither does.
        """
        if said := _TRIPS.search(loop.attributes):
            return int(said[1])
        of_loop = {role: self.computations[name] for role, name in _ROLES.findall(loop.attributes)}
        counted = _counted(computation, loop, of_loop["condition"], of_loop["body"])
        return 1 if counted is None else counted

    def declared(self, kernel: Kernel) -> tuple[int, int] | None:
        """Operations and bytes of all runs of a kernel, as custom calls in it declare them; None
        where none does.
        """
        instructions = (kernel.instruction, *(one for one, _ in self.inside(kernel.instruction)))
        found = [_DECLARED.search(one.attributes) for one in instructions]
        each = [dict(_DECLARED_ONE.findall(one[1])) for one in found if one]
        if not each:
            return None
        flops, moved = (
            kernel.runs * sum(int(one.get(what, 0)) for one in each)
            for what in ("flops", "bytes_accessed")
        )
        return flops, moved

    def inside(self, instruction: Instruction) -> Iterator[tuple[Instruction, Computation]]:
        """The instructions of all computations that `instruction` calls, at any depth, each with
        its computation.
        """
        for name in instruction.called:
            for inner in self.computations[name].instructions.values():
                yield inner, self.computations[name]
                yield from self.inside(inner)

    def bytes_read(self, kernel: Kernel) -> int:
        """Bytes that one launch reads: its operands, each once; of one only sliced, the slices."""
        instruction, instructions = kernel.instruction, kernel.computation.instructions
        sizes = [
            sum(leaf.bytes for leaf in instructions[name].leaves) for name in instruction.operands
        ]
        if len(instruction.called) == 1 and instruction.opcode.startswith(("fusion", "async")):
            sizes = self._read_by(self.computations[instruction.called[0]], sizes)
        elif instruction.opcode == "dynamic-slice":
            sizes = [sum(leaf.bytes for leaf in instruction.leaves)]
        elif instruction.opcode == "dynamic-update-slice":
            sizes = [sizes[1]]
        return sum(sizes)

    def _read_by(self, computation: Computation, sizes: list[int]) -> list[int]:
        read = list(sizes)
        for name, number in computation.parameters.items():
            read[number] = min(sizes[number], self._read_of(computation, name, sizes[number]))
        return read

    def _read_of(self, computation: Computation, name: str, size: int) -> int:
        """Bytes that a computation reads of its value `name`, which has `size` bytes."""
        total = 0
        for user in computation.instructions.values():
            if name not in user.operands:
                continue
            if user.opcode == "bitcast" and user.name != computation.root:
                total += self._read_of(computation, user.name, size)
            elif user.opcode in ("dynamic-slice", "slice", "gather"):
                total += sum(leaf.bytes for leaf in user.leaves) if user.operands[0] == name else 0
            elif user.opcode == "dynamic-update-slice" and user.operands[0] == name:
                continue  # In place: what is not updated is not touched.
            else:
                total += size
        return total

    def bytes_written(self, kernel: Kernel) -> int:
        """Bytes that one launch writes: its results, without workspace; of one that is updated in
        place, the update.
        """
        instruction = kernel.instruction
        if instruction.opcode.startswith(("fusion", "async")) and len(instruction.called) == 1:
            computation = self.computations[instruction.called[0]]
            root = computation.instructions[computation.root]
            roots = (
                [computation.instructions[name] for name in root.operands]
                if root.opcode == "tuple"
                else [root]
            )
            return sum(_written_by(computation, one) for one in roots)
        if instruction.opcode == "dynamic-update-slice":
            return sum(
                leaf.bytes
                for leaf in kernel.computation.instructions[instruction.operands[1]].leaves
            )
        if (
            instruction.opcode == "custom-call" and len(instruction.leaves) > 1
        ):  # The last one is workspace.
            return sum(leaf.bytes for leaf in instruction.leaves[:-1])
        if instruction.opcode.endswith("-start"):
            return sum(leaf.bytes for leaf in instruction.leaves[:1])
        return sum(leaf.bytes for leaf in instruction.leaves)


def _counted(
    around: Computation, loop: Instruction, condition: Computation, body: Computation
) -> int | None:
    """How often a loop runs that counts by ones, from a constant up to a constant, as scans do."""
    ask = condition.instructions[condition.root]
    before, after = around.instructions[loop.operands[0]], body.instructions[body.root]
    if (
        ask.opcode != "compare"
        or "direction=LT" not in ask.attributes
        or before.opcode != "tuple"
        or after.opcode != "tuple"
    ):
        return None
    position, end = _position(condition, ask.operands[0]), _integer(condition, ask.operands[1])
    if position is None or end is None:
        return None
    first, step = (
        _integer(around, before.operands[position]),
        body.instructions[after.operands[position]],
    )
    by_ones = step.opcode == "add" and (
        _position(body, step.operands[0]),
        _integer(body, step.operands[1]),
    ) == (position, 1)
    return max(end - first, 0) if by_ones and first is not None else None


def must_match(match: re.Match | None) -> re.Match:
    """A match of what must be there; ValueError where it isn't."""
    if match is None:
        raise ValueError("text must be HLO as XLA prints it; got other text.")
    return match


def _position(computation: Computation, name: str) -> int | None:
    """Which element of a loop's state a value is, or a copy of; TPUs copy their counters."""
    instruction = computation.instructions[name]
    while instruction.opcode == "copy":
        instruction = computation.instructions[instruction.operands[0]]
    return (
        int(must_match(_INDEX.search(instruction.attributes))[1])
        if instruction.opcode == "get-tuple-element"
        else None
    )


def _integer(computation: Computation, name: str) -> int | None:
    """A value that is a constant integer, or a copy of one."""
    instruction = computation.instructions[name]
    while instruction.opcode == "copy":
        instruction = computation.instructions[instruction.operands[0]]
    return int(instruction.value) if re.fullmatch(r"-?\d+", instruction.value) else None


def _written_by(computation: Computation, instruction: Instruction) -> int:
    while instruction.opcode == "bitcast":
        instruction = computation.instructions[instruction.operands[0]]
    if instruction.opcode == "dynamic-update-slice":
        return sum(leaf.bytes for leaf in computation.instructions[instruction.operands[1]].leaves)
    return (
        0 if instruction.opcode == "parameter" else sum(leaf.bytes for leaf in instruction.leaves)
    )


def _computation(name: str, lines: list[str]) -> Computation:
    instructions, root = {}, ""
    for line in lines:
        instruction = _instruction(line)
        instructions[instruction.name] = instruction
        if must_match(_INSTRUCTION.match(line))[1]:
            root = instruction.name
    return Computation(name, instructions, root)


def _instruction(line: str) -> Instruction:
    head = must_match(_INSTRUCTION.match(line))
    shape_end = _end_of_shape(line, head.end())
    opcode = _OPCODE.match(line, shape_end)
    if opcode is None:
        raise ValueError(
            f"line must be an instruction of a compiled program; got {line[:120]!r}. This version "
            "of XLA prints "
            "them otherwise: please report it."
        )
    operands_end = _closing(line, opcode.end() - 1)
    attributes = line[operands_end + 1 :]
    called = [
        name
        for group, single in _CALLED.findall(attributes)
        for name in (group.split(",") if group else (single,))
    ]
    if opcode[1] == "call":
        called += _APPLIED.findall(attributes)
    op_name, target = _OP_NAME.search(attributes), _TARGET.search(attributes)
    operands = _names(line[opcode.end() : operands_end]) if opcode[1] != "constant" else ()
    return Instruction(
        name=head[2],
        opcode=opcode[1],
        leaves=_leaves(line[head.end() : shape_end]),
        operands=operands,
        called=tuple(name.strip().lstrip("%") for name in called),
        op_name=op_name[1] if op_name else "",
        target=target[1] if target else "",
        value=line[opcode.end() : operands_end] if opcode[1] == "constant" else "",
        attributes=attributes,
    )


def _leaves(shape: str) -> tuple[Leaf, ...]:
    return tuple(
        Leaf(
            dtype, tuple(int(size.strip("<=? ")) for size in sizes.split(",") if size.strip("<=? "))
        )
        for dtype, sizes in _LEAF.findall(shape)
    )


def _names(operands: str) -> tuple[str, ...]:
    """Names of operands, which stand alone or behind their shapes."""
    named = re.findall(r"%([\w.\-]+)", operands)
    if named:
        return tuple(named)
    parts = re.sub(r"/\*.*?\*/", "", operands).split(",")
    return tuple(found[1] for part in parts if (found := _NAME.search(part.strip())))


def _end_of_shape(line: str, start: int) -> int:
    if line[start] == "(":
        return _closing(line, start) + 1
    return line.index(" ", start)


def _closing(line: str, start: int) -> int:
    """Position of the parenthesis that closes the one at `start`."""
    depth = 0
    for position in range(start, len(line)):
        depth += {"(": 1, ")": -1}.get(line[position], 0)
        if depth == 0:
            return position
    raise ValueError(
        f"line must close its parentheses; got {line[:120]!r}. Pass the whole text of "
        "compiled.as_text()."
    )
