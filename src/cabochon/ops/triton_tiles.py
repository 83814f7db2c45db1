"""The tile sizes of the Triton kernels, per GPU generation: the one place to change them.

A kernel compiled with a line of this table fits the shared memory of that generation (`LIMITS`); a test compiles them
all ahead of time, which needs no GPU. The choice among those that fit is a prediction until somebody times them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch

LIMITS = {75: 65_536, 80: 166_912, 86: 101_376, 90: 232_448}
"""Bytes of shared memory that one block may use, by line of the table (compute capability)."""


@dataclass(frozen=True, slots=True)
class AttendTile:
    """`rows` query rows (tokens x heads of a group) against `keys` at a time, `columns` of the value per program."""

    rows: int
    keys: int
    columns: int
    warps: int
    stages: int


@dataclass(frozen=True, slots=True)
class MatmulTile:
    """`outputs` rows of a weight against `rows` of x, `inputs` of their common axis at a time."""

    rows: int
    outputs: int
    inputs: int
    warps: int
    stages: int


_ATTEND = {
    # (generation, head width, decode?) -> tile. Narrow heads of toy models take the line of 256.
    (75, 256, True): AttendTile(rows=16, keys=16, columns=256, warps=4, stages=2),
    (75, 256, False): AttendTile(rows=16, keys=16, columns=256, warps=4, stages=1),
    (75, 512, True): AttendTile(rows=16, keys=16, columns=256, warps=4, stages=1),
    (75, 512, False): AttendTile(rows=16, keys=16, columns=256, warps=4, stages=1),
    (80, 256, True): AttendTile(rows=16, keys=32, columns=256, warps=4, stages=3),
    (80, 256, False): AttendTile(rows=32, keys=32, columns=256, warps=8, stages=2),
    (80, 512, True): AttendTile(rows=16, keys=32, columns=512, warps=8, stages=2),
    (80, 512, False): AttendTile(rows=32, keys=32, columns=256, warps=8, stages=1),
    (86, 256, True): AttendTile(rows=16, keys=32, columns=256, warps=4, stages=2),
    (86, 256, False): AttendTile(rows=32, keys=32, columns=256, warps=8, stages=2),
    (86, 512, True): AttendTile(rows=16, keys=16, columns=512, warps=8, stages=2),
    (86, 512, False): AttendTile(rows=32, keys=16, columns=512, warps=8, stages=1),
    (90, 256, True): AttendTile(rows=16, keys=32, columns=256, warps=4, stages=3),
    (90, 256, False): AttendTile(rows=64, keys=32, columns=256, warps=8, stages=2),
    (90, 512, True): AttendTile(rows=16, keys=32, columns=512, warps=8, stages=3),
    (90, 512, False): AttendTile(rows=64, keys=32, columns=256, warps=8, stages=2),
}


@cache
def generation(device: torch.device) -> int:
    """Which lines of the table a GPU takes."""
    if device.type != "cuda":  # Triton's interpreter
        return 80
    if torch.version.hip:  # AMD's local memory is as small as the oldest NVIDIA generation's
        return 75
    major, minor = torch.cuda.get_device_capability(device)
    if major >= 12:  # workstation Blackwell has the shared memory of 8.6
        return 86
    return max((line for line in (75, 80, 86, 90) if line <= 10 * major + minor), default=75)


def attend_tile(arch: int, head: int, decode: bool) -> AttendTile:
    return _ATTEND[arch, 512 if head > 256 else 256, decode]


_FEW = {
    # generation -> tile for few rows, where the weight's bytes are the work
    75: MatmulTile(rows=16, outputs=32, inputs=64, warps=4, stages=1),
    80: MatmulTile(rows=16, outputs=32, inputs=256, warps=4, stages=3),
    86: MatmulTile(rows=16, outputs=32, inputs=128, warps=4, stages=3),
    90: MatmulTile(rows=16, outputs=32, inputs=256, warps=4, stages=4),
}
_MANY = {
    # generation -> tile for many rows
    75: MatmulTile(rows=32, outputs=32, inputs=32, warps=4, stages=1),
    80: MatmulTile(rows=64, outputs=64, inputs=64, warps=4, stages=3),
    86: MatmulTile(rows=64, outputs=64, inputs=32, warps=4, stages=3),
    90: MatmulTile(rows=64, outputs=64, inputs=64, warps=4, stages=4),
}


def matmul_tile(arch: int) -> MatmulTile:
    """One shape for every number of rows, so that a row's sums never change."""
    return _FEW[arch]


def experts_tile(arch: int, pairs: int, experts: int) -> MatmulTile:
    """Blocks of many rows once an expert has that many pairs on average."""
    return (_FEW if pairs <= 16 * experts else _MANY)[arch]
