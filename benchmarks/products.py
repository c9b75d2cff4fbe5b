"""The matrix products of a step alone: what it would cost if all else were free.

Each layer has three: its output, the gradient of its input, the gradient of its weight. Each is given to every way
that torch has for it, of which the fastest counts.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from .timing import Step, timed
from .ways import Work

ENCODER, DECODER = (784, 200, 200, 100), (50, 200, 200, 784)


@dataclass(frozen=True)
class Product:
    """(rows, inner) @ (inner, columns), either of which may be the transpose of what lies in memory."""

    name: str
    rows: int
    inner: int
    columns: int
    transposed: tuple[bool, bool]

    @property
    def flop(self) -> int:
        """A multiplication and an addition each."""
        return 2 * self.rows * self.inner * self.columns

    def factors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Random ones."""
        sizes = (self.rows, self.inner), (self.inner, self.columns)
        left, right = (
            torch.randn(n, m, dtype=dtype).t() if transposed else torch.randn(m, n, dtype=dtype)
            for (m, n), transposed in zip(sizes, self.transposed, strict=True)
        )
        return left, right


def of_layer(name: str, data: int, width_in: int, width_out: int) -> list[Product]:
    """Output, gradient of the input, gradient of the weight (out, in), for so many rows of data."""
    return [
        Product(f"{name}, output", data, width_in, width_out, (False, True)),
        Product(f"{name}, input's gradient", data, width_out, width_in, (False, False)),
        Product(f"{name}, weight's gradient", width_out, data, width_in, (True, False)),
    ]


def of_step(work: Work) -> list[Product]:
    """Those of a training step: no gradient of x is wanted."""
    found = []
    for network, widths, data in (("encoder", ENCODER, work.batch), ("decoder", DECODER, work.batch * work.samples)):
        for width_in, width_out in pairwise(widths):
            found += of_layer(f"{network} {width_in} -> {width_out}", data, width_in, width_out)
    return [product for product in found if product.name != "encoder 784 -> 200, input's gradient"]


def of_decoding(data: int) -> list[Product]:
    """Those of the decoder's forward pass."""
    return [of_layer(f"decoder {n} -> {m}", data, n, m)[0] for n, m in pairwise(DECODER)]


# ------------------------------------------------------------------------------------------------ ways
def ways_of(product: Product, dtype: torch.dtype) -> dict[str, Callable[[], Tensor]]:
    """torch.mm; oneDNN's linear, by which torch.compile goes; and torch.mm with less than fp32 allowed inside."""
    left, right = product.factors(dtype)
    ways: dict[str, Callable[[], Tensor]] = {"mm": lambda: torch.mm(left, right)}
    if torch.backends.mkldnn.is_available():
        ways["oneDNN"] = lambda: torch.ops.mkldnn._linear_pointwise(left, right.t(), None, "none", [], "")
    if dtype == torch.float32:
        ways["mm, medium"] = at_medium(lambda: torch.mm(left, right))
    return ways


def at_medium(way: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """With float32_matmul_precision at medium."""

    def step() -> Tensor:
        with medium():
            return way()

    return step


@contextmanager
def medium() -> Iterator[None]:
    """Inside, torch may take bf16 within products of fp32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@dataclass(frozen=True)
class Fastest:
    """A product, the fastest way to it, and what that took when it was chosen."""

    product: Product
    way: str
    step: Step
    seconds: float

    @property
    def rate(self) -> float:
        """FLOP a second."""
        return self.product.flop / self.seconds


def fastest(product: Product, dtype: torch.dtype, tries: int = 5) -> Fastest:
    """By the best of a few tries. "medium" counts as fp32 only where it changes nothing."""
    ways = ways_of(product, dtype)
    if "mm, medium" in ways and not torch.allclose(ways["mm, medium"](), ways["mm"](), atol=1e-3, rtol=1e-5):
        del ways["mm, medium"]
    best = {name: min(timed(step, 1) for _ in range(1 + tries)) for name, step in ways.items()}
    way = min(best, key=lambda name: best[name])
    return Fastest(product, way, ways[way], best[way])


class Limit:
    """The products of one step: `each` does all, each in its fastest way; `best` does that one which is done at the
    highest rate, whose time times `scale` is what all would take at that rate.
    """

    def __init__(self, products: list[Product], dtype: torch.dtype = torch.float32) -> None:
        self.found = [fastest(product, dtype) for product in products]
        top = max(self.found, key=lambda found: found.rate)
        self.flop = sum(product.flop for product in products)
        self.best, self.scale = top.step, self.flop / top.product.flop

    def each(self) -> None:
        """All of them, one after another."""
        for found in self.found:
            found.step()

    def table(self) -> list[dict]:
        """Name, FLOP, fastest way and its rate."""
        return [{"name": f.product.name, "flop": f.product.flop, "way": f.way, "rate": f.rate} for f in self.found]
