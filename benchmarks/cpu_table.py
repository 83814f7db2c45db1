"""The whole CPU table: every shape that is aimed at or compared, by `cabochon bench cpu`, a process per group.

    python benchmarks/cpu_table.py [--keep FILE] [--only TEXT] [--llama-bench PATH] [--llama-bench-avx2 PATH]

Wants idle cores and 20 GB of memory; takes a quarter of an hour. Rows are told on stderr as they come. What has been
measured is kept in FILE and is not measured again, so a broken run goes on where it stopped. `--only` takes the groups
whose command has TEXT in it. Groups beside llama.cpp (built as it is, and without AVX-512 and AMX) run only where its
llama-bench is given: on five layers of E2B, since both models are in memory.

A target is a share of the floor (bytes and products at the rates of this machine, measured beside every step) or a
ratio to the peer; tokens per second say nothing about another machine.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

FIVE_LAYERS = "--model random:E2B?media=no&layers=5 --formats int4,int8 --prefill 512 --batches 1 --contexts 64"


@dataclass(frozen=True)
class Group:
    """One run of `cabochon bench cpu`; targets by format and what is timed."""

    name: str
    arguments: str
    shares: dict[str, float] = field(default_factory=dict)
    """Least share of the floor."""
    ratios: dict[str, float] = field(default_factory=dict)
    """Least speed as a multiple of llama.cpp's."""


def groups(llama: Path | None, llama_avx2: Path | None) -> Iterator[Group]:
    yield Group(
        "E2B",
        "--formats int4 --prefill 512,2048 --batches 1,8,32 --contexts 512",
        shares={"int4 decode 1 at 512": 0.80},
    )
    yield Group("E2B", "--formats int8 --prefill 512,2048 --batches 1,8,32 --contexts 512")
    yield Group(
        "E2B",
        "--formats bfloat16 --prefill 512 --batches 1,8 --contexts 512",
        shares={"bfloat16 decode 1 at 512": 0.90},
    )
    yield Group(
        "E2B, cache in int8",
        "--formats int4 --prefill= --batches 1 --contexts 8192,32768 --kv-cache-dtype int8",
        shares={"int4 decode 1 at 32768": 0.85},
    )
    yield Group(
        "E4B",
        "--model random:E4B?media=no --formats int4 --prefill 512 --batches 1 --contexts 512",
        shares={"int4 decode 1 at 512": 0.80},
    )
    yield Group(
        "26B-A4B, 6 layers",
        "--model random:26B-A4B?media=no&layers=6 --formats int4 --prefill 512 --batches 1 --contexts 512",
    )
    if llama is not None:
        yield Group(
            "E2B, 5 layers",
            f"{FIVE_LAYERS} --versus llama.cpp={llama}",
            ratios={"int4 decode 1 at 64": 1.5},
        )
    if llama_avx2 is not None:
        yield Group(
            "E2B, 5 layers, AVX2",
            f"--isa avx2 {FIVE_LAYERS} --versus llama.cpp={llama_avx2}",
            ratios={"int4 prefill 512": 2.0, "int4 decode 1 at 64": 1.3},
        )


def measure(group: Group, kept: dict[str, Any]) -> dict[str, Any]:
    """The last line of the group's run, now or from before."""
    if group.arguments not in kept:
        command = [sys.executable, "-m", "cabochon", "bench", "cpu", *group.arguments.split()]
        print("cabochon", *command[3:], file=sys.stderr, flush=True)
        shown = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout
        kept[group.arguments] = json.loads(shown.splitlines()[-1])
    found: dict[str, Any] = kept[group.arguments]
    return found


def rows(group: Group, result: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    for row in result["rows"]:
        key = f"{row['format']} {row['what']}"
        share, ratio, peer = group.shares.get(key), group.ratios.get(key), row.get("times_llama.cpp")
        yield (
            group.name,
            key,
            f"{row['tokens_per_second']:,.1f}",
            f"{row['reached']:.0%}" + (f" of {share:.0%}" if share else ""),
            ("" if peer is None else f"{peer:.2f}x") + (f" of {ratio:g}x" if ratio else ""),
            f"{result['peak_rss'] / (1 << 30):.1f} GiB",
        )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--keep", type=Path)
    parser.add_argument("--only", default="")
    parser.add_argument("--llama-bench", type=Path)
    parser.add_argument("--llama-bench-avx2", type=Path)
    asked = parser.parse_args()
    kept: dict[str, Any] = {}
    if asked.keep is not None and asked.keep.exists():
        kept = json.loads(asked.keep.read_text())
    table = Table("model", "what", "tokens/s", "of the floor", "llama.cpp", "peak memory", title="CPU")
    for group in groups(asked.llama_bench, asked.llama_bench_avx2):
        if asked.only not in group.arguments:
            continue
        for row in rows(group, measure(group, kept)):
            print("  ".join(row), file=sys.stderr, flush=True)
            table.add_row(*row)
        if asked.keep is not None:
            asked.keep.write_text(json.dumps(kept))
    Console(width=120).print(table)
    print(json.dumps(kept))


if __name__ == "__main__":
    main()
