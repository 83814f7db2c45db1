"""Our CPU kernels beside llama.cpp's on the same matrices: four layers of E2B's widths, one thread, CPU time.

    python benchmarks/cpu_versus_llama.py PATH/TO/llama-bench

CPU time of one thread says the same on a busy machine as on an idle one; wall time does not. llama.cpp gets a file of
random codes in the plain `llama` architecture without vocabulary, ours gets random codes of the same shapes; both run
the projections of attention and the gated MLP (llama.cpp also its attention, under 2 % of the work here).
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import torch

from cabochon import ops
from cabochon.ops.packing import quantize

WIDTH, INNER, KEYS, LAYERS, VOCABULARY = 1536, 12288, 256, 4, 256
SHAPES = {
    "attn_q": (WIDTH, WIDTH),
    "attn_k": (KEYS, WIDTH),
    "attn_v": (KEYS, WIDTH),
    "attn_output": (WIDTH, WIDTH),
    "ffn_gate": (INNER, WIDTH),
    "ffn_up": (INNER, WIDTH),
    "ffn_down": (WIDTH, INNER),
}
KINDS = {"int8": "Q8_0", "int4": "Q4_0", "bfloat16": "BF16"}
PROMPT, REPLY, REPEATS = 512, 32, 3


def write(path: Path, kind: str) -> None:
    """A model of random codes that llama-bench takes."""
    file = gguf.GGUFWriter(path, "llama")
    file.add_context_length(4096)
    file.add_embedding_length(WIDTH)
    file.add_block_count(LAYERS)
    file.add_feed_forward_length(INNER)
    file.add_head_count(WIDTH // 128)
    file.add_head_count_kv(KEYS // 128)
    file.add_layer_norm_rms_eps(1e-6)
    file.add_rope_dimension_count(128)
    file.add_vocab_size(VOCABULARY)
    file.add_tokenizer_model("no_vocab")
    random, number = np.random.default_rng(0), gguf.GGMLQuantizationType[kind]
    block, size = gguf.GGML_QUANT_SIZES[number]

    def matrix(name: str, rows: int, columns: int) -> None:
        raw = random.integers(0, 256, (rows, columns // block, size), dtype=np.uint8)
        if kind == "BF16":
            raw[..., 1] = raw[..., 1] & 0x80 | 0x3C  # about 0.01, of either sign
        else:
            raw[..., :2] = np.frombuffer(np.float16(0.001).tobytes(), np.uint8)
        file.add_tensor(name, raw.reshape(rows, -1), raw_dtype=number)

    for name in ("token_embd", "output"):
        matrix(f"{name}.weight", VOCABULARY, WIDTH)
    norms = ["output_norm", *(f"blk.{i}.{name}_norm" for i in range(LAYERS) for name in ("attn", "ffn"))]
    for name in norms:
        file.add_tensor(f"{name}.weight", np.ones(WIDTH, np.float32))
    for i in range(LAYERS):
        for name, (rows, columns) in SHAPES.items():
            matrix(f"blk.{i}.{name}.weight", rows, columns)
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()


def peer(bench: str, path: Path, *test: str) -> float:
    """CPU seconds of one run: those of four runs less those of one."""
    spent = []
    for repeats in (1, 4):
        before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
        subprocess.run([bench, "-m", path, "-t", "1", "-r", str(repeats), *test], check=True, capture_output=True)
        spent.append(resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before)
    return (spent[1] - spent[0]) / 3


def ours(format: str) -> Callable[[int], float]:
    """CPU seconds of one pass over `rows` tokens."""
    layers = []
    for _ in range(LAYERS):
        dense = {name: torch.randn(shape).mul_(0.02).bfloat16() for name, shape in SHAPES.items()}
        layers.append(dense if format == "bfloat16" else {n: quantize(w, format, "panels") for n, w in dense.items()})

    def run(rows: int) -> float:
        x = torch.randn(rows, WIDTH).bfloat16()
        begin = time.process_time()
        for w in layers:
            for name in ("attn_q", "attn_k", "attn_v"):
                ops.linear(x, w[name])
            x = ops.linear(x, w["attn_output"])
            x = ops.rms_norm(ops.gated_mlp(x, w["ffn_gate"], w["ffn_up"], w["ffn_down"]), None, 1e-6)
        return time.process_time() - begin

    return run


def torchs() -> Callable[[int], float]:
    """The same in bfloat16 with torch's own products."""
    weights = [{n: torch.randn(s).mul_(0.02).bfloat16() for n, s in SHAPES.items()} for _ in range(LAYERS)]

    def run(rows: int) -> float:
        x = torch.randn(rows, WIDTH).bfloat16()
        begin = time.process_time()
        for w in weights:
            for name in ("attn_q", "attn_k", "attn_v"):
                torch.nn.functional.linear(x, w[name])
            x = torch.nn.functional.linear(x, w["attn_output"])
            x = ops.reference.gated_mlp(x, w["ffn_gate"], w["ffn_up"], w["ffn_down"])
            x = ops.reference.rms_norm(x, None, 1e-6)
        return time.process_time() - begin

    return run


def median(run: Callable[[], float]) -> float:
    return sorted(run() for _ in range(REPEATS))[REPEATS // 2]


def main(bench: str) -> None:
    torch.set_num_threads(1)
    rows = []
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        plain = torchs()
        for format, kind in KINDS.items():
            path = Path(folder) / f"{kind}.gguf"
            write(path, kind)
            run = ours(format)
            run(PROMPT)
            for what, tokens, passes, test in (
                ("prefill", PROMPT, 1, ("-p", PROMPT, "-n", 0)),
                ("decode", 1, REPLY, ("-p", 0, "-n", REPLY)),
            ):
                mine, torch_takes = (
                    median(lambda side=side, n=tokens, passes=passes: sum(side(n) for _ in range(passes)))
                    / (tokens * passes)
                    for side in (run, plain)
                )
                theirs = median(lambda path=path, test=test: peer(bench, path, *map(str, test))) / (tokens * passes)
                rows.append(
                    {
                        "format": format,
                        "what": what,
                        "ours": 1 / mine,
                        "llama.cpp": 1 / theirs,
                        "torch": 1 / torch_takes,
                    }
                )
                print(
                    f"{format:9} {what:8} {1 / mine:9.1f} tokens per CPU second; llama.cpp {1 / theirs:9.1f} "
                    f"({theirs / mine:.2f}x); torch in bfloat16 {1 / torch_takes:9.1f} ({torch_takes / mine:.2f}x)",
                    flush=True,
                )
    print(json.dumps({"layers": LAYERS, "isa": ops.cpu.active(), "rows": rows}))


if __name__ == "__main__":
    main(sys.argv[1])
