"""What became of each site in a compiled program: as data, and as a table."""

import dataclasses
import json
from typing import Any

import jax
import rich.box
import rich.markup
import rich.table

from fp8jax._tables import as_text
from fp8jax._transform.joined_names import names_in
from fp8jax._transform.names import site_in
from fp8jax.devices import figures_of, notes_on
from fp8jax.hlo._products import PRODUCTS, Product, products_in, products_of
from fp8jax.hlo._program import Kernel, Program


@dataclasses.dataclass(frozen=True)
class Around:
    """What a site has beside its products: the kernels that hold any instruction of it, casts and
    amaxes above all.

    A kernel that several sites share counts for each of them; so does all else that XLA fuses with
    these instructions.

    Args:
      kernels: how many there are, those in a loop once.
      bytes: what one run of each reads and writes, all together.
    """

    kernels: int
    bytes: int


@dataclasses.dataclass(frozen=True)
class Report:
    """What became of each site in a compiled program; printed, a table of them.

    Args:
      products: all products of sites, in the order of the program's text.
      others: its other matrix products: those that no recipe was for.
      around: what each site has beside its products.
      device: the kind of the device that it is compiled for, as `jax.Device.device_kind`; "" where
        that isn't known, as of a text.
    """

    products: tuple[Product, ...]
    others: tuple[Product, ...]
    around: dict[str, Around]
    device: str = dataclasses.field(default="", compare=False)

    @property
    def notes(self) -> tuple[str, ...]:
        """What the device makes of it: whether it multiplies none of the sites' products as codes,
        and whether FP8 can be slower than bfloat16 there.
        """
        if not self.products:
            return ()
        figures = figures_of(self.device)
        # An older TPU's compiler takes codes, and decodes them itself.
        decodes = figures is not None and not figures.multiplies
        in_fp8 = 0 if decodes else sum(product.in_fp8 for product in self.products)
        return notes_on(self.device, in_fp8)

    @property
    def fallen_back(self) -> tuple[Product, ...]:
        """The products of sites whose codes are decoded before they are multiplied; on CPUs, all
        are.
        """
        return tuple(product for product in self.products if not product.in_fp8)

    def of(self, site: str, product: str) -> tuple[Product, ...]:
        """A site's products of one kind; several where a rematerialization computes it again."""
        return tuple(
            one
            for one in self.products
            if one.product == product and site in (one.site, *names_in(one.site or ""))
        )

    def verdict(self, site: str) -> str:
        """What became of a site, in some words: "cuBLASLt FP8" where all of its products went the
        same way.

        Fewer than three products are no fault: without a backward pass there is one, and nothing
        may ask for a gradient.
        """
        words = {kind: sorted({_words(one) for one in self.of(site, kind)}) for kind in PRODUCTS}
        found = {kind: " and ".join(of_kind) for kind, of_kind in words.items() if of_kind}
        if not found:
            return "not in the program"
        missing = "".join(f", no {kind}" for kind in PRODUCTS if kind not in found)
        if len(set(found.values())) == 1:
            return f"{next(iter(found.values()))}{missing}"
        return ", ".join(f"{kind}: {word}" for kind, word in found.items()) + missing

    def to_json(self) -> str:
        """The report as a JSON object."""

        def rows(products):
            return [
                dataclasses.asdict(product) | {"in_fp8": product.in_fp8} for product in products
            ]

        around = {site: dataclasses.asdict(one) for site, one in self.around.items()}
        return json.dumps(
            {
                "products": rows(self.products),
                "others": rows(self.others),
                "around": around,
                "device": self.device,
                "notes": self.notes,
            },
            indent=1,
        )

    def table(self) -> rich.table.Table:
        """The table, for a `rich` console of one's own."""
        in_fp8 = sum(product.in_fp8 for product in self.products)
        others = f"; {len(self.others)} other matrix products in the program" if self.others else ""
        table = rich.table.Table(
            box=rich.box.SIMPLE_HEAD,
            title=f"{in_fp8} of {len(self.products)} products of sites run in FP8",
            caption="\n".join(
                map(rich.markup.escape, (f"MB read and written in one run{others}", *self.notes))
            ),
        )
        for name in ("site", "product", "became"):
            table.add_column(name, overflow="fold")
        for name in ("runs", "MB"):
            table.add_column(name, justify="right", overflow="fold")
        for site in dict.fromkeys((*(product.site for product in self.products), *self.around)):
            name = str(site)
            for product in sorted(
                (one for one in self.products if one.site == site),
                key=lambda one: PRODUCTS.index(one.product),
            ):
                row = (
                    name,
                    str(product.product),
                    str(product),
                    str(product.runs),
                    f"{product.bytes / 1e6:.2f}",
                )
                table.add_row(
                    *map(rich.markup.escape, row), style=None if product.in_fp8 else "bold red"
                )
                name = ""
            if around := self.around.get(str(site)):
                table.add_row(
                    rich.markup.escape(name),
                    "around",
                    f"{around.kernels} kernels",
                    "",
                    f"{around.bytes / 1e6:.2f}",
                    style="dim",
                )
        return table

    def __str__(self) -> str:
        return as_text(self.table())

    def __rich__(self) -> rich.table.Table:
        return self.table()


def report(compiled: Any) -> Report:
    """What became of each site's products in a compiled program: multiplied in FP8, and by which
    engine, or fallen back.

    Whether XLA finds an FP8 product is its own affair, and it says nothing where it doesn't; so
    look.

    Args:
      compiled: a `jax.stages.Compiled`, for a device or compiled ahead of time for one that is not
        there; or its text.

    Returns:
      The products with their engines and dtypes, and the kernels around them; printed, a table.

    Raises:
      TypeError: where `compiled` is neither.
      ValueError: where the text is not that of a compiled program.

    >>> import jax, jax.numpy as jnp, fp8jax
    >>> fp8_fn = fp8jax.fp8(lambda w, x: x @ w, fp8jax.recipes.current())
    >>> compiled = jax.jit(fp8_fn).lower({}, jnp.ones((64, 64)), jnp.ones((64, 64))).compile()
    >>> [(one.site, one.product) for one in report(compiled).products]
    [('dot', 'forward')]
    """
    program = program_of(compiled)
    found = tuple(products_of(program))
    # XLA may sum a part of a product by itself beside the product: that alone is no second one.
    known = {(one.site, one.product) for one in found if one.engine != "reduction"}
    found = [
        one for one in found if one.engine != "reduction" or (one.site, one.product) not in known
    ]
    return Report(
        products=tuple(one for one in found if one.site is not None),
        others=tuple(one for one in found if one.site is None),
        around=_around(program),
        device=_device_kind(compiled),
    )


def _device_kind(compiled: Any) -> str:
    """Of the device that a program is compiled for, where its arguments or results tell."""
    for shardings in ("input_shardings", "output_shardings"):
        for sharding in jax.tree.leaves(getattr(compiled, shardings, ())):
            for device in sharding.device_set:
                return device.device_kind
    return ""


def program_of(compiled: Any) -> Program:
    """A compiled program, or the text of one, as data."""
    text = compiled if isinstance(compiled, str) else getattr(compiled, "as_text", lambda: None)()
    if not isinstance(text, str):
        raise TypeError(
            f"compiled must be a jax.stages.Compiled or its text; got {compiled!r}. Compile first: "
            "jax.jit(function).lower(*args).compile()."
        )
    return Program.parse(text)


def sites_of(program: Program, kernel: Kernel) -> set[str]:
    """The sites that a kernel holds instructions of."""
    instructions = (kernel.instruction, *(inner for inner, _ in program.inside(kernel.instruction)))
    return {site for one in instructions if (site := site_in(one.op_name)) is not None}


def _around(program: Program) -> dict[str, Around]:
    counted: dict[str, list[int]] = {}
    for kernel in program.kernels():
        if not products_in(program, kernel):
            for site in sites_of(program, kernel):
                counted.setdefault(site, []).append(
                    program.bytes_read(kernel) + program.bytes_written(kernel)
                )
    return {site: Around(len(sizes), sum(sizes)) for site, sizes in counted.items()}


def _words(product: Product) -> str:
    if product.in_fp8:
        return f"{product.engine} FP8"
    return product.engine if "decoding" in product.engine else f"{product.engine} in {product.lhs}"
