"""Every line of the tile table compiles for its GPU, fits its shared memory and spills no registers. No GPU needed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed (pip install triton): its kernels are not compiled here")

from cabochon.ops.triton_tiles import LIMITS

PROGRAM = Path(__file__).parent / "support" / "ahead_of_time.py"
FORMATS = ("plain", "int8", "int4")


def compile_all(requests: list[tuple]) -> list[dict]:
    # A process of its own: where kernels are interpreted, they can't be compiled.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(PROGRAM), json.dumps(requests)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def check(requests: list[tuple]) -> None:
    found = compile_all(requests)
    assert len(found) == len(requests)
    for kernel in found:
        assert kernel["shared"] <= LIMITS[kernel["kernel"][1]], kernel
        assert kernel["spilled"] == 0, kernel


def test_the_widest_heads_fit_the_smallest_and_the_newest_gpu():
    check([("attention", 75, 512, True), ("attention", 90, 512, False), ("matmul", 90, "int4"), ("store", 80, True)])


@pytest.mark.slow
@pytest.mark.parametrize("arch", LIMITS)
def test_every_line_of_the_table(arch):
    kinds = [(head, decode, "bfloat16") for head in (256, 512) for decode in (True, False)]
    kinds += [(head, True, pages) for head in (256, 512) for pages in ("int8", "float8")]
    attention = [("attention", arch, *kind) for kind in kinds]
    matmul = [("matmul", arch, format) for format in FORMATS]
    experts = [("experts", arch, pairs, format) for pairs in (8, 100_000) for format in FORMATS]
    rest = [("join", arch, 256), ("join", arch, 512), ("store", arch, True), ("store", arch, False), ("route", arch)]
    rest += [("rows", arch, name) for name in ("norm", "rope", "embed", "gate")]
    check([*attention, *matmul, *experts, *rest])
