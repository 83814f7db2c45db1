"""Timing this machine: how fast memory is read and matrices are multiplied. What the planner's rooflines stand on."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from ..ops import cpu
from ..ops.packing import quantize
from ..sizing.hardware import Measured

REPEATS = 5
READ_BYTES = 1 << 29
SIZE = 2048
"""Side of the matrices that are multiplied."""


class Meter:
    """What is read and multiplied to see how fast this machine is, made once and run as often as wanted; by `clock`."""

    def __init__(
        self, read_bytes: int = READ_BYTES, size: int = SIZE, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self.clock = clock
        operations = 2.0 * size**3
        self.work = (read_bytes, operations, operations)
        self.runs = (_reader(read_bytes), _product(size), _integer_product(size))
        self.now()  # touches everything

    def now(self) -> Measured:
        """Rates at this moment, one run each."""
        bandwidth, bf16, int8 = (work / self._seconds(run) for work, run in zip(self.work, self.runs, strict=True))
        return Measured(bandwidth=bandwidth, bf16=bf16, int8=int8, cores=torch.get_num_threads())

    def _seconds(self, run: Callable[[], object]) -> float:
        begin = self.clock()
        run()
        return self.clock() - begin


def measure(read_bytes: int = READ_BYTES, size: int = SIZE, clock: Callable[[], float] = time.perf_counter) -> Measured:
    """The best of a few runs each: reading memory far larger than the caches, and matrix products; by `clock`."""
    meter = Meter(read_bytes, size, clock)
    runs = [meter.now() for _ in range(REPEATS)]
    bandwidth, bf16, int8 = (max(getattr(run, rate) for run in runs) for rate in ("bandwidth", "bf16", "int8"))
    return Measured(bandwidth, bf16, int8, torch.get_num_threads())


def _reader(size: int) -> Callable[[], object]:
    """Our own walk through memory where it is installed, which is the fastest; else torch's sum."""
    numbers = torch.empty(size // 4)
    if not cpu.on():
        return numbers.fill_(1).sum
    cpu.prefer_huge_pages(numbers)
    numbers.fill_(1)
    return lambda: cpu.read(numbers)


def _product(size: int) -> Callable[[], object]:
    a, b = (torch.rand(size, size).bfloat16() for _ in range(2))
    return lambda: a @ b


def _integer_product(size: int) -> Callable[[], object]:
    """Our own kernels where they are installed, else torch's."""
    x, weight = torch.rand(size, size), torch.rand(size, size)
    if not cpu.supported():
        left, right = ((t * 100).to(torch.int8) for t in (x, weight))
        return lambda: torch._int_mm(left, right)
    packed, rows = quantize(weight, "int8", "panels"), x.bfloat16()
    with torch.no_grad():
        usable = cpu.ready(rows)

    def run() -> object:
        with torch.no_grad():
            return cpu.linear(rows, packed)

    assert usable
    return run
