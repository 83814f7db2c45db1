"""Accelerators and CPUs as data: how much memory, how fast it is read, how fast numbers are multiplied.

Rates are dense (without sparsity) with 32-bit sums, from the makers' data sheets; makers print the sparse figure, twice
as much, in larger type. Memory is what the driver reports. A roofline over these numbers is a ceiling, not a promise.
"""

from __future__ import annotations

import difflib
import json
import os
import platform
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from ..errors import InputError

Kind = Literal["gpu", "unified", "cpu"]


@dataclass(frozen=True, slots=True)
class Hardware:
    """One device. Rates are in operations per second, two for a multiply and add."""

    name: str
    kind: Kind
    """A gpu has memory of its own; unified memory is shared with the CPU."""
    memory: int
    """Bytes."""
    bandwidth: float
    """Bytes per second."""
    bf16: float
    """Rate of bfloat16 (float16 where there is none) matrix products."""
    int8: float
    source: str
    int4: float | None = None
    """On a CPU, where it differs from int8: AVX2 multiplies small numbers faster than bytes."""

    def rate(self, quantization: str | None) -> float:
        """Of the products of a step. GPUs multiply integer weights as bfloat16; our CPU kernels in integers."""
        if quantization is None or self.kind != "cpu":
            return self.bf16
        return self.int4 if quantization == "int4" and self.int4 is not None else self.int8


def _gpu(name: str, mib: int, gb_per_s: float, bf16: float, int8: float, source: str) -> Hardware:
    return Hardware(name, "gpu", mib << 20, gb_per_s * 1e9, bf16 * 1e12, int8 * 1e12, source)


def _unified(name: str, gib: int, gb_per_s: float, bf16: float, int8: float, source: str) -> Hardware:
    return Hardware(name, "unified", gib << 30, gb_per_s * 1e9, bf16 * 1e12, int8 * 1e12, source)


_APPLE = "Apple technical specifications; rate = cores x 256 x clock, Apple prints none"
HARDWARE = (
    _gpu("RTX 3060 12GB", 12_288, 360, 25.3, 101, "NVIDIA GA102 white paper, scaled to 28 SMs"),
    _gpu("RTX 3090", 24_576, 936, 71, 284, "NVIDIA GA102 white paper"),
    _gpu("RTX 4070 Ti", 12_282, 504, 80.2, 321, "NVIDIA Ada white paper"),
    _gpu("RTX 4090", 24_564, 1_008, 165.2, 660.6, "NVIDIA Ada white paper"),
    _gpu("RTX 5090", 32_607, 1_792, 209.5, 838, "NVIDIA RTX Blackwell white paper"),
    _gpu("RTX PRO 6000", 97_887, 1_792, 503.8, 1_007.6, "NVIDIA RTX PRO Blackwell white paper"),
    _gpu("T4", 15_360, 320, 65, 130, "NVIDIA T4 data sheet (float16; no bfloat16)"),
    _gpu("L4", 23_034, 300, 121, 242, "NVIDIA L4 data sheet, halved for density"),
    _gpu("L40S", 46_068, 864, 362, 733, "NVIDIA L40S data sheet"),
    _gpu("A100 40GB", 40_960, 1_555, 312, 624, "NVIDIA A100 data sheet"),
    _gpu("A100 80GB", 81_920, 2_039, 312, 624, "NVIDIA A100 data sheet (SXM)"),
    _gpu("H100", 81_559, 3_350, 989, 1_979, "NVIDIA H100 data sheet (SXM), halved for density"),
    _gpu("H200", 143_771, 4_800, 989, 1_979, "NVIDIA H200 data sheet (SXM), halved for density"),
    _gpu("B200", 183_359, 8_000, 2_250, 4_500, "NVIDIA DGX B200 data sheet, per GPU, halved for density"),
    _gpu("MI300X", 196_592, 5_300, 1_307, 2_614, "AMD Instinct MI300X data sheet"),
    _gpu("MI355X", 294_896, 8_000, 2_516, 5_033, "AMD Instinct MI355X data sheet"),
    _unified("DGX Spark", 119, 273, 125, 250, "NVIDIA DGX Spark data sheet: 1 PFLOP sparse FP4, divided by 8"),
    _unified("Apple M4", 16, 120, 3.8, 3.8, _APPLE),
    _unified("Apple M4 Pro", 48, 273, 7.6, 7.6, _APPLE),
    _unified("Apple M4 Max", 128, 546, 15.1, 15.1, _APPLE),
    _unified("Apple M3 Ultra", 256, 819, 28.2, 28.2, _APPLE),
    Hardware("Raspberry Pi 5", "cpu", 8 << 30, 17.1e9, 0.154e12, 0.614e12, "LPDDR4X-4267 x 32 bit; 4 A76 at 2.4 GHz"),
)
THIS_MACHINE = "this machine"


_ALIASES = {
    "3060": "RTX 3060 12GB",
    "a100": "A100 80GB",
    "spark": "DGX Spark",
    "gb10": "DGX Spark",
    "pi": "Raspberry Pi 5",
    "pi5": "Raspberry Pi 5",
    "raspberrypi": "Raspberry Pi 5",
}


def find(name: str) -> Hardware:
    """The device that `name` means (`h200`, `4090`, `a100-80`, `m4 max`).

    Raises:
        InputError: there is no data for it; the message has the nearest name, or all of them.
    """
    wanted = _plain(name)
    by_name = {_plain(device.name): device for device in HARDWARE}
    by_name |= {alias: by_name[_plain(full)] for alias, full in _ALIASES.items()}
    if wanted in by_name:
        return by_name[wanted]
    near = difflib.get_close_matches(wanted, by_name, 1, cutoff=0.75)
    known = ", ".join(device.name for device in HARDWARE)
    hint = f"did you mean {by_name[near[0]].name}" if near else f"known are {known}"
    raise InputError(f"There is no data for the device {name!r}; {hint}, or give its memory: --memory 24GiB")


def _plain(name: str) -> str:
    """`NVIDIA GeForce RTX 4070 Ti` -> `4070ti`."""
    lower = re.sub(r"[^a-z0-9]", "", name.lower())
    return re.sub(r"nvidia|geforce|tesla|apple|amd|instinct|rtx(?=\d)|gb$|sxm\d?|blackwell", "", lower)


# This machine --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Measured:
    """What `cabochon doctor --measure` found, per second."""

    bandwidth: float
    bf16: float
    int8: float
    int4: float
    cores: int


def measurement_file() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "cabochon" / f"{platform.node() or 'machine'}.json"


def remember(measured: Measured) -> Path:
    """Keep a measurement for the planner."""
    path = measurement_file()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(measured), indent=2) + "\n")
    except OSError as error:
        raise InputError(f"{path} can't be written ({error.strerror}); set XDG_CACHE_HOME to another folder.") from None
    return path


def recall() -> Measured | None:
    """The last measurement of this machine; None when there is none that can be read."""
    try:
        return Measured(**json.loads(measurement_file().read_text()))
    except (OSError, ValueError, TypeError):
        return None


def this_machine() -> Hardware:
    """The CPU side of this machine: free memory now, rates as measured or, without a measurement, a cautious guess."""
    measured = recall()
    if measured is None:
        cores = os.cpu_count() or 1
        guess = "not measured: a guess from the number of cores; run `cabochon doctor --measure`"
        bandwidth = min(40e9, 12e9 * cores)
        return Hardware(THIS_MACHINE, "cpu", free_memory(), bandwidth, 0.1e12 * cores, 0.2e12 * cores, guess)
    return as_hardware(measured)


def as_hardware(measured: Measured) -> Hardware:
    """This machine with rates that were just measured."""
    source = f"measured on {measured.cores} cores"
    rates = (measured.bandwidth, measured.bf16, measured.int8)
    return Hardware(THIS_MACHINE, "cpu", free_memory(), *rates, source, measured.int4)


def free_memory() -> int:
    """Bytes that can be had without swapping, page cache included; within the container's limit."""
    available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        available = int(lines["MemAvailable"].split()[0]) << 10
        limit, used = (Path(f"/sys/fs/cgroup/memory.{part}").read_text().strip() for part in ("max", "current"))
    except (OSError, KeyError, ValueError):
        return available
    return available if limit == "max" else min(available, max(0, int(limit) - int(used)))
