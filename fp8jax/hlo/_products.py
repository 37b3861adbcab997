"""The matrix products of a compiled program: of which site, by which engine, on which dtypes."""

import dataclasses
import re
from collections.abc import Iterator

from fp8jax._transform.names import site_in
from fp8jax.hlo._program import Instruction, Kernel, Leaf, Program

PRODUCTS = ("forward", "dlhs", "drhs")
# Custom calls that multiply matrices, by the beginning of their target.
_LIBRARIES = {
    "__cublas$lt": "cuBLASLt",
    "__cublas": "cuBLAS",
    "__cudnn$blockScaledDot": "cuDNN block-scaled",
    "__cudnn$conv": "cuDNN",
    "__cudnn$fmha": "cuDNN",
    "__onednn$": "oneDNN",
    "__triton": "Triton",
}
# Kernels of fp8jax's own, by their name; all read codes, and one decodes them where it multiplies.
_DECODING = "Pallas, decoding"
_OWN = {
    "fp8jax_decoding_product": _DECODING,
    "fp8jax_two_level_product": "Pallas, two-level",
}
_OPCODES = ("dot", "convolution", "ragged-dot", "scaled-dot")


@dataclasses.dataclass(frozen=True)
class Product:
    """One matrix product of a compiled program.

    Args:
      site: name of the site; None where the product is of none.
      product: "forward", "dlhs" or "drhs"; None where the product is of no site.
      engine: "cuBLASLt", "cuDNN", "cuDNN block-scaled" or "oneDNN", the libraries; "Triton"; "XLA",
        a `dot` or `convolution` that XLA itself writes the code of (on TPUs the native one);
        "Pallas, decoding" and "Pallas, two-level", fp8jax's kernels for scales within a sum;
        "reduction" where XLA made sums of multiplications of it.
      lhs, rhs: dtypes of the operands as the engine gets them.
      out: dtype of the result.
      runs: how often a run of the program comes by.
      bytes: what one run of it reads and writes, with all that is fused with it.
      kernel: name of the instruction that launches it.
    """

    site: str | None
    product: str | None
    engine: str
    lhs: str
    rhs: str
    out: str
    runs: int
    bytes: int
    kernel: str

    @property
    def in_fp8(self) -> bool:
        """Whether the engine multiplies 8-bit codes; if not, they were decoded first."""
        return self.engine != _DECODING and all(
            Leaf(dtype, ()).is_fp8 for dtype in (self.lhs, self.rhs)
        )

    def __str__(self) -> str:
        return f"{self.engine} {self.lhs}.{self.rhs}" + ("" if self.in_fp8 else ", decoded")


def products_of(program: Program) -> Iterator[Product]:
    """All matrix products of a program, in the order of its text."""
    for kernel in program.kernels():
        yield from products_in(program, kernel)


def products_in(program: Program, kernel: Kernel) -> list[Product]:
    """The matrix products that one kernel computes."""
    found = []
    for instruction, computation in (
        (kernel.instruction, kernel.computation),
        *program.inside(kernel.instruction),
    ):
        if engine := _engine_of(instruction, kernel):
            lhs, rhs = (
                computation.instructions[name].leaves[0].dtype for name in instruction.operands[:2]
            )
            found.append(_product(program, kernel, instruction, engine, lhs, rhs))
    if not found and (rewritten := _rewritten_product(program, kernel)):
        found.append(
            _product(
                program,
                kernel,
                rewritten,
                "reduction",
                rewritten.leaves[0].dtype,
                rewritten.leaves[0].dtype,
            )
        )
    return found


def product_in(op_name: str) -> str | None:
    """Which of a site's products an instruction is of; None where it is of none, as a cast is.

    >>> product_in("jit(f)/fp8jax_site.mlp%2Fup/jit(_backward)/dlhs/cond/branch_0_fun/dot_general")
    'dlhs'
    """
    below = op_name.rpartition("fp8jax_site.")[2].split("/")
    return (
        next((element for element in below[1:] if element in PRODUCTS), None)
        if site_in(op_name)
        else None
    )


def _product(program, kernel, instruction, engine, lhs, rhs) -> Product:
    op_name = instruction.op_name if site_in(instruction.op_name) else kernel.instruction.op_name
    return Product(
        site=site_in(op_name),
        product=product_in(op_name),
        engine=engine,
        lhs=lhs,
        rhs=rhs,
        out=instruction.leaves[0].dtype,
        runs=kernel.runs,
        kernel=kernel.instruction.name,
        bytes=program.bytes_read(kernel) + program.bytes_written(kernel),
    )


def _engine_of(instruction: Instruction, kernel: Kernel) -> str | None:
    if instruction.opcode == "custom-call":
        names = (name for start, name in _LIBRARIES.items() if instruction.target.startswith(start))
        own = (name for kernel, name in _OWN.items() if f"{kernel}/" in instruction.op_name)
        if len(instruction.operands) < 2:
            return None
        return next(names, None) or next(own, None)
    if instruction.opcode in _OPCODES:
        return "Triton" if re.search(r'"kind":"__triton', kernel.instruction.attributes) else "XLA"
    return None


def _rewritten_product(program: Program, kernel: Kernel) -> Instruction | None:
    """The instruction that a product has become where XLA multiplies and sums by itself, as it does
    with vectors.
    """
    inner = [instruction for instruction, _ in program.inside(kernel.instruction)] or [
        kernel.instruction
    ]
    return next(
        (
            one
            for one in inner
            if one.opcode == "multiply"
            and product_in(one.op_name)
            and re.search(r"(dot_general|conv_general_dilated)$", one.op_name)
        ),
        None,
    )
