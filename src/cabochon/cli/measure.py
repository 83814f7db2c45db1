"""Timing this machine: how fast memory is read and matrices are multiplied. What the planner's rooflines stand on.

Every format is multiplied as a layer multiplies it, since no rate follows from another's: AVX2 has 1.6 times as many
operations a second for nibbles as for bytes. The best of some runs counts, because a limit that an interruption lowered
is none.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch

from .. import ops
from ..ops import cpu
from ..ops.packing import quantize
from ..sizing.hardware import Measured

SECONDS = 0.2
"""How long each rate is looked for, at least."""
READ_BYTES = 1 << 29
SHAPE = (512, 2560, 10240)
"""Rows, inputs and outputs of the products: a prompt in E4B's feed-forward; smaller ones lose more at their ends."""

Run = Callable[[], object]


class Meter:
    """What is read and multiplied to see how fast this machine is, made once and run as often as wanted; by `clock`."""

    def __init__(
        self,
        read_bytes: int = READ_BYTES,
        shape: tuple[int, int, int] = SHAPE,
        seconds: float = SECONDS,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.clock = clock
        self._seconds = seconds
        rows, inputs, outputs = shape
        self._work = [read_bytes, *[2.0 * rows * inputs * outputs] * 3]
        self._runs = [[_reader(read_bytes)], *_products(torch.rand(rows, inputs), torch.rand(outputs, inputs))]
        for runs in self._runs:
            for run in runs:
                run()  # touches everything

    def now(self) -> Measured:
        """Rates at this moment."""
        each = zip(self._work, self._runs, strict=True)
        bandwidth, bf16, int8, int4 = (work / self._best(runs) for work, runs in each)
        return Measured(bandwidth, bf16, int8, int4, torch.get_num_threads())

    def _best(self, runs: Sequence[Run]) -> float:
        """Seconds of the shortest of all `runs`, each at least once, in turns until the time for it is over."""
        best, start = float("inf"), self.clock()
        while True:
            for run in runs:
                begin = self.clock()
                with torch.inference_mode():
                    run()
                best = min(best, self.clock() - begin)
            if self.clock() - start >= self._seconds:
                return best


def _reader(size: int) -> Run:
    """Our own walk through memory where it is installed, which is the fastest; else torch's sum."""
    numbers = torch.empty(size // 4)
    if not cpu.on():
        return numbers.fill_(1).sum
    cpu.prefer_huge_pages(numbers)
    numbers.fill_(1)
    return lambda: cpu.read(numbers)


def _products(x: torch.Tensor, weight: torch.Tensor) -> list[list[Run]]:
    """Products in bfloat16 and in each quantised format, as a layer has them.

    The first also by torch, which may be the faster one; not beside kernels that stay below what this CPU can do.
    """
    rows, dense = x.bfloat16(), weight.bfloat16()
    by_torch: list[Run] = [lambda: rows @ dense.T] if cpu.active() in (*cpu.supported()[:1], "reference") else []
    packed = [quantize(weight, format, "panels" if cpu.on() else "rows") for format in ("int8", "int4")]
    return [[lambda: ops.linear(rows, dense), *by_torch], *([_linear(rows, one)] for one in packed)]


def _linear(rows: torch.Tensor, weight: ops.Weight) -> Run:
    return lambda: ops.linear(rows, weight)
