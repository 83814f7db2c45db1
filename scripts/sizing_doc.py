"""Writes docs/sizing.md from the planner: `python scripts/sizing_doc.py`."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from cabochon import variants
from cabochon.config import ModelConfig, read_config
from cabochon.formats import QUANTIZED
from cabochon.kv.layout import kv_groups
from cabochon.sizing import Workload, hardware
from cabochon.sizing.memory import measure, weights
from cabochon.sizing.report import PART_NAMES
from cabochon.sizing.speed import active_parameters
from cabochon.sizing.units import gib, kilo
from cabochon.weights.header import file_bytes
from cabochon.weights.params import parameters

TARGET = Path(__file__).parents[1] / "docs" / "sizing.md"
DEVICE = hardware.find("Raspberry Pi 5")  # a CPU: everything lies in one memory
FORMATS = (None, *QUANTIZED)
CONTEXTS = (4096, 32_768, 131_072, 262_144)


def document() -> str:
    """The whole page."""
    parts = (_head, _stored, _resident, _cache, _pages, _totals, _circulating, _devices)
    return "\n\n".join(part() for part in parts) + "\n"


def _head() -> str:
    return (
        "# How much a model takes\n\n"
        "Written by `python scripts/sizing_doc.py` from the code that loads weights and allocates pages; a test fails "
        "when it is stale. `cabochon plan` answers the same for any device, context and number of users. "
        "1 GiB is 1,073,741,824 bytes, 1 GB is 1,000,000,000."
    )


def _stored() -> str:
    rows = []
    for size in variants.SIZES:
        config = _config(size)
        stored = [p for p in parameters(config, unused=True) if p.part != "head"]
        count, unused = sum(p.count for p in stored), sum(p.count for p in stored if not p.used)
        tensors = sum(p.nbytes("bfloat16") for p in stored)
        single = file_bytes((p.hf, "BF16", p.shape) for p in stored)
        shown = f"{single:,}" if size.name in ("E2B", "E4B", "12B") else f"{tensors:,} (tensors, in two files)"
        active = f"{active_parameters(config):,}"
        rows.append((size.name, f"{count:,}", f"{unused:,}" if unused else "-", active, size.published, shown))
    headings = ("size", "parameters", "stored for nothing", "a token is multiplied with", "the card says", "bytes")
    note = (
        "What is stored for nothing are key and value projections of layers that read another layer's. "
        "The third count is matrices of the text network, the head once and an expert's share; tables are looked up. "
        "The cards' 2.3B and 4.5B follow no one rule: counted so it is 2.28 and 4.64, without the matrices around the "
        "per-layer embeddings 2.24 and 4.56, and the technical report's own parts of E4B (0.67 and 3.94) make 4.61."
    )
    return f"## In the published files (bfloat16)\n\n{_table(headings, rows)}\n\n{note}"


def _resident() -> str:
    names = list(PART_NAMES.values())[:-1]
    rows = []
    for size in variants.SIZES:
        for format in FORMATS:
            took = weights(_config(size), Workload(quantization=format), DEVICE)
            parts = {PART_NAMES[part.part]: gib(part.bytes) for part in took}
            total = gib(sum(part.bytes for part in took))
            rows.append((size.name, format or "bfloat16", *(parts.get(name, "-") for name in names), total))
    headings = ("size", "format", *names, "in all")
    note = (
        "int8 has one float32 scale per row, int4 a float16 scale per 32 numbers. Norms, routers, the gates of "
        "per-layer embeddings and the towers stay in bfloat16. The embedding is the head too, except with int4: there "
        "rows are looked up in a table of int8, and the head is another in four bits. Tables that are only looked up "
        "stay in the file where `cabochon quantize` wrote it, and only rows come into memory; on a GPU they lie in "
        "host memory."
    )
    return f"## Weights in memory\n\n{_table(headings, rows)}\n\n{note}"


def _cache() -> str:
    rows = []
    for size in variants.SIZES:
        config = _config(size)
        took = {part.kind: part for part in measure(config, Workload(context=8192), DEVICE).kv}
        groups = kv_groups(config.text.layers)
        wide, slide = took["global"], took["sliding"]
        eight = {p.kind: p for p in measure(config, Workload(context=8192, kv_cache_dtype="int8"), DEVICE).kv}["global"]
        rows.append(
            (
                size.name,
                f"{len(groups['global'].layers)} x {groups['global'].kv_heads} x {groups['global'].row_width}",
                f"{wide.token_bytes:,}",
                f"{eight.token_bytes:,}",
                f"{wide.saved_by_k_eq_v:,}" if wide.saved_by_k_eq_v else "-",
                f"{wide.saved_by_sharing + slide.saved_by_sharing:,}" if wide.saved_by_sharing else "-",
                f"{slide.token_bytes:,} x {groups['sliding'].window:,}",
            )
        )
    headings = (
        *("size", "global layers x heads x row", "bytes per token", "in 8 bits", "value = key saves"),
        *("sharing saves", "window, bytes"),
    )
    note = (
        "Only global layers grow with the context. Where the value is the normalised key projection, a row holds 1.25 "
        "head widths instead of 2."
    )
    return f"## Keys and values\n\n{_table(headings, rows)}\n\n{note}"


def _pages() -> str:
    stored, read = [], []
    for size in variants.SIZES:
        contexts = [context for context in CONTEXTS if context <= size.context]
        blank = ["-"] * (len(CONTEXTS) - len(contexts))
        for kept in ("auto", "int8"):
            parts = [measure(_config(size), Workload(context=c, kv_cache_dtype=kept), DEVICE).kv for c in contexts]
            took = [sum(part.user_bytes for part in kv) for kv in parts]
            stored.append((size.name, kept, *(f"{count:,} = {gib(count)}" for count in took), *blank))
            read.append((size.name, kept, *(f"{sum(part.read_bytes for part in kv):,}" for kv in parts), *blank))
    headings = ("size", "`--kv-cache-dtype`", *(kilo(context) for context in CONTEXTS))
    note = (
        "Windows stay in bfloat16; fp8 takes what int8 does. A pool for one conversation allocates exactly these "
        "bytes, whatever the number of tokens in a step. E2B and E4B end at 128k."
    )
    return (
        f"## Pages of one conversation, in bytes\n\n{_table(headings, stored)}\n\n{note}\n\n"
        f"## Read for every token of a reply, in bytes\n\n{_table(headings, read)}\n\n"
        "Layers that share keys and values read them too."
    )


def _totals() -> str:
    rows = []
    for size in variants.SIZES:
        for format in FORMATS:
            cells = []
            for context in CONTEXTS:
                if context > size.context:
                    cells.append("-")
                    continue
                cells.append(gib(measure(_config(size), Workload(context=context, quantization=format), DEVICE).total))
            rows.append((size.name, format or "bfloat16", *cells))
    headings = ("size", "format", *(kilo(context) for context in CONTEXTS))
    note = "Weights, pages, one kept window, activations of a 2,048-token step and the runtime, all in one memory."
    return f"## In all, for one user\n\n{_table(headings, rows)}\n\n{note}"


def _circulating() -> str:
    e2b, b26, b31 = (_config(variants.find(name).size) for name in ("E2B", "26B-A4B", "31B"))
    sharing = sum(not spec.owns_kv for spec in e2b.text.layers)
    experts = sum(p.count for p in parameters(b26) if p.part == "experts")
    bf16 = {size.name: size.stored * 2 for size in variants.SIZES}
    rows = [
        ("its licence is the Gemma Terms of Use", f"{variants.LICENCE}, all sizes; the terms were the older models'"),
        ("26B-A4B has 128K of context", f"{variants.find('26B-A4B').context:,} tokens = 256k; 128k is E2B's and E4B's"),
        ("it reads text only", "all read images and video; E2B, E4B and 12B hear as well"),
        (
            "31B has per-layer embeddings",
            f"hidden_size_per_layer_input is {b31.text.hidden_size_per_layer_input}; the vocabulary for them in its "
            "config.json is a leftover. E2B has them: 262,144 x 35 x 256 = 2,348,810,240 numbers",
        ),
        (
            "the large models share keys and values across layers",
            f"the small ones do: {sharing} of E2B's {len(e2b.text.layers)} layers, "
            f"{sum(not s.owns_kv for s in b31.text.layers)} of 31B's {len(b31.text.layers)}",
        ),
        (
            "E4B needs 15 GB, 31B 58.3 GB",
            f"those are GiB: {bf16['E4B']:,} bytes are {bf16['E4B'] / 1e9:.2f} GB or {gib(bf16['E4B'])}, "
            f"{bf16['31B']:,} are {bf16['31B'] / 1e9:.2f} GB or {gib(bf16['31B'])}",
        ),
        (
            "26B-A4B needs memory for 4B",
            f"a token uses {active_parameters(b26):,} parameters, but which is decided token by token: all {experts:,} "
            f"of the experts must be there, {gib(2 * experts)} in bfloat16",
        ),
        (
            "E stands for edge",
            "for effective: E2B stores 5,123,178,979 parameters, 2,348,810,240 of them looked-up tables",
        ),
    ]
    return f"## Figures that circulate and are wrong\n\n{_table(('said', 'so it is'), rows)}"


def _devices() -> str:
    rows = [
        (
            device.name,
            gib(device.memory),
            f"{device.bandwidth / 1e9:,.0f} GB/s",
            f"{device.bf16 / 1e12:,.1f}",
            f"{device.int8 / 1e12:,.1f}",
            device.source,
        )
        for device in hardware.HARDWARE
    ]
    headings = ("device", "memory", "bandwidth", "bfloat16, T/s", "int8, T/s", "source")
    return f"## Devices that the planner knows\n\n{_table(headings, rows)}"


def _config(size: variants.Size) -> ModelConfig:
    return read_config(variants.Variant(size, "it").config())


def _table(headings: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    lines = [list(headings), *(list(row) for row in rows)]
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


if __name__ == "__main__":
    TARGET.write_text(document(), encoding="utf-8")
