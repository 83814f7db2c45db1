"""One product, [M, 1536] x [1536, 12288], in every format beside torch's bfloat16; CPU time of one thread.

    python benchmarks/cpu_products.py [ISA]

Weights take turns so that a single row reads them from memory, not from a cache.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable

import torch

from cabochon.ops import cpu
from cabochon.ops.packing import quantize

INPUTS, OUTPUTS, COPIES = 1536, 12288, 6
BYTES = {"torch": 2.0, "bfloat16": 2.0, "int8": 1.0, "int4": 0.5625}


def median(run: Callable[[int], object], times: int) -> float:
    """CPU seconds."""
    spent = []
    for i in range(times + 1):
        begin = time.process_time()
        run(i % COPIES)
        spent.append(time.process_time() - begin)
    return sorted(spent[1:])[times // 2]


def main() -> None:
    if len(sys.argv) > 1:
        cpu.use(sys.argv[1])
    torch.set_num_threads(1)
    dense = [torch.randn(OUTPUTS, INPUTS).mul_(0.02).bfloat16() for _ in range(COPIES)]
    packed = {format: [quantize(weight, format, "panels") for weight in dense] for format in ("int8", "int4")}
    rows = []
    with torch.inference_mode():
        assert cpu.ready(dense[0])
        for count in (1, 8, 64, 512):
            x = torch.randn(count, INPUTS).bfloat16()
            runs: dict[str, Callable[[int], object]] = {
                "torch": lambda i, x=x: torch.nn.functional.linear(x, dense[i]),
                "bfloat16": lambda i, x=x: cpu.linear(x, dense[i]),
                "int8": lambda i, x=x: cpu.linear(x, packed["int8"][i]),
                "int4": lambda i, x=x: cpu.linear(x, packed["int4"][i]),
            }
            for name, run in runs.items():
                seconds = median(run, 12 if count < 64 else 3)
                work, moved = 2 * count * INPUTS * OUTPUTS, BYTES[name] * INPUTS * OUTPUTS
                rows.append({"M": count, "what": name, "ms": seconds * 1e3})
                print(f"M={count:<4} {name:9} {seconds * 1e3:8.3f} ms {moved / seconds / 1e9:6.1f} GB/s", end="")
                print(f" {work / seconds / 1e9:6.0f} GOP/s", flush=True)
    print(json.dumps({"isa": cpu.active(), "rows": rows}))


if __name__ == "__main__":
    main()
