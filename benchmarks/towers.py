"""The towers at full size beside `transformers` (sdpa, bfloat16), in one run: time, and memory above the weights.

    python benchmarks/towers.py [--layers N] [--repeat 3] [--threads 2] [vision:280 vision:1120 audio:30]

Random weights; both sides get the same ones. A picture is square, as large as its budget allows; a sound is noise. Each
measurement is a process of its own that loads and runs once; ours and theirs take turns. Seconds
are of wall clock and, less sensitive to who else uses the machine, of CPU. `--layers` cuts the towers for a quick look.

Beside each case stand the operations of its matrix products (ours pad nothing, and none is counted that isn't needed),
the share of the CPU's peak that either side reaches with them, and the largest ratio that the peak would leave: theirs
against a tower of nothing but products that never wait. The peak is measured in registers, before and after every run.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

CASES = ("vision:280", "vision:1120", "audio:30")
VISION = {"hidden_size": 1152, "intermediate_size": 4304, "num_attention_heads": 16, "head_dim": 72}


def measure(side: str, case: str, layers: int | None, threads: int) -> dict[str, float]:
    """Run one side of one case in this process."""
    import numpy as np
    import torch

    torch.set_num_threads(threads)
    kind, size = case.split(":")
    draw = np.random.default_rng(0)
    build = vision if kind == "vision" else audio
    run = build(side, int(size), layers, draw)
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before, can = peak_kib(), speed(threads)
    with torch.inference_mode():
        wall, cpu = time.perf_counter(), time.process_time()
        out = run()
        seconds = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
    above, can = peak_kib() - before, max(can, speed(threads))
    return {**seconds, "mib": above / 1024, "sum": float(out.float().abs().mean()), "peak": can}


def speed(threads: int) -> float:
    """Operations a second that `threads` threads multiply bfloat16 with, in registers; 0 without our kernels."""
    from cabochon.ops import cpu

    if not cpu.supported():
        return 0.0
    cpu._cpu.set_threads(threads)
    best = 0.0
    for _ in range(5):
        start = time.perf_counter()
        best = max(best, cpu._cpu.spin(200_000) / (time.perf_counter() - start))
    return best


def operations(case: str, layers: int | None) -> float:
    """Multiplications and additions of the matrix products, convolutions and attention of a case."""
    kind, size = case.split(":")
    if kind == "vision":
        rows, width, inner = (3 * int(int(size) ** 0.5)) ** 2, VISION["hidden_size"], VISION["intermediate_size"]
        each = 4 * width * width + 3 * width * inner + 2 * rows * width
        return 2.0 * rows * (768 * width + (layers or 27) * each)
    frames, width, reach = int(size) * 100, 1024, 12
    tokens = frames // 4
    each = (16 + 4 + 3) * width * width + 2 * reach * width  # two feed-forwards, attention, convolution
    convolutions = frames // 2 * 64 * 128 * 9 + tokens * 32 * 32 * 128 * 9
    ends = tokens * width * (width + 1536)
    return 2.0 * ((layers or 12) * (tokens * each + reach * width * width) + convolutions + ends)


def peak_kib() -> int:
    return int(next(line for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line).split()[1])


def fill(module: Any) -> Any:
    import torch

    torch.manual_seed(0)
    with torch.no_grad():
        for name, tensor in sorted(module.state_dict().items()):
            if name.endswith(("_min", "_max")):
                tensor.fill_(-20.0 if name.endswith("_min") else 20.0)
            elif tensor.dim() > 1:
                tensor.normal_(0, tensor[0].numel() ** -0.5)
            else:
                tensor.fill_(0.3)
    return module.bfloat16().eval()


def vision(side: str, budget: int, layers: int | None, draw: Any) -> Any:
    import numpy as np
    import torch

    tiles = int(budget**0.5)
    rows = 3 * tiles
    pixels = draw.integers(0, 256, (1, rows * rows, 768)).astype(np.uint8)
    count = layers or 27
    if side == "ours":
        from cabochon.config import VisionConfig
        from cabochon.model.vision import VisionTower

        config = VisionConfig(
            **VISION,
            num_hidden_layers=count,
            rms_norm_eps=1e-6,
            rope_theta=100.0,
            patch_size=16,
            pooling_kernel_size=3,
            position_embedding_size=10240,
            use_clipped_linears=False,
            standardize=True,
            soft_tokens=280,
        )
        tower = fill(VisionTower(config))
        return lambda: tower(torch.from_numpy(pixels), rows, rows)
    from transformers import Gemma4VisionConfig
    from transformers.models.gemma4.modeling_gemma4 import Gemma4VisionModel

    theirs = Gemma4VisionConfig(
        **VISION, num_hidden_layers=count, num_key_value_heads=16, global_head_dim=72, standardize=True
    )
    theirs._attn_implementation = "sdpa"
    network = fill(Gemma4VisionModel(theirs))
    values = torch.zeros(1, budget * 9, 768)
    values[:, : rows * rows] = torch.from_numpy(pixels) / 255
    places = torch.full((1, budget * 9, 2), -1)
    at = torch.arange(rows * rows)
    places[0, : rows * rows] = torch.stack([at % rows, at // rows], -1)
    return lambda: network(values, places).last_hidden_state


def audio(side: str, seconds: int, layers: int | None, draw: Any) -> Any:
    import numpy as np
    import torch

    from cabochon.media.audio import RATE, log_mel

    mel = torch.from_numpy(log_mel((draw.standard_normal(seconds * RATE) * 0.1).astype(np.float32)))
    count = layers or 12
    if side == "ours":
        from cabochon.config import AudioConfig
        from cabochon.model.audio import AudioTower

        config = AudioConfig(
            hidden_size=1024, num_hidden_layers=count, num_attention_heads=8, attention_chunk_size=12,
            attention_context_left=13, attention_context_right=0, attention_logit_cap=50.0,
            attention_invalid_logits_value=-1e9, subsampling_conv_channels=(128, 32), conv_kernel_size=5,
            residual_weight=0.5, gradient_clipping=1e10, use_clipped_linears=True, rms_norm_eps=1e-6,
            output_proj_dims=1536,
        )  # fmt: skip
        tower = fill(AudioTower(config))
        return lambda: tower(mel.bfloat16())
    from transformers import Gemma4AudioConfig
    from transformers.models.gemma4.modeling_gemma4 import Gemma4AudioModel

    network = fill(Gemma4AudioModel(Gemma4AudioConfig(num_hidden_layers=count, use_clipped_linears=True)))
    mask = torch.ones(1, len(mel), dtype=torch.bool)
    return lambda: network(mel[None], mask).last_hidden_state


def apart(side: str, case: str, options: argparse.Namespace) -> dict[str, float]:
    """`measure` in a process of its own."""
    words = [sys.executable, __file__, "--side", side, case, "--threads", str(options.threads)]
    words += ["--layers", str(options.layers)] if options.layers else []
    environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads)}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", default=CASES)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--side", choices=("ours", "theirs"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        print(json.dumps(measure(options.side, options.cases[0], options.layers, options.threads)))
        return
    result: dict[str, Any] = {}
    print(f"{'case':12} {'ours s':>8} {'theirs s':>9} {'faster':>7} {'by CPU':>7} {'ours MiB':>9} {'theirs MiB':>10} "
          f"{'Gop':>7} {'Gop/s':>6} {'ours %':>7} {'theirs %':>8} {'at most':>8}")  # fmt: skip
    for case in options.cases:
        runs = [(apart("ours", case, options), apart("theirs", case, options)) for _ in range(options.repeat)]
        ours, theirs = ({key: statistics.median(run[i][key] for run in runs) for key in runs[0][i]} for i in (0, 1))
        assert abs(ours["sum"] / theirs["sum"] - 1) < 0.02, "the two towers disagree"
        faster, by_cpu = (statistics.median(t[k] / o[k] for o, t in runs) for k in ("wall", "cpu"))
        work, peak = operations(case, options.layers), max(side["peak"] for run in runs for side in run)
        share, theirs_share = (work / side["wall"] / peak if peak else 0.0 for side in (ours, theirs))
        bound = theirs["wall"] * peak / work
        print(
            f"{case:12} {ours['wall']:8.2f} {theirs['wall']:9.2f} {faster:7.2f} {by_cpu:7.2f} "
            f"{ours['mib']:9.0f} {theirs['mib']:10.0f} {work / 1e9:7.0f} {peak / 1e9:6.0f} {share:7.1%} "
            f"{theirs_share:8.1%} {bound:8.2f}",
            flush=True,
        )
        result[case] = {"ours": ours, "theirs": theirs, "faster": faster, "faster_by_cpu": by_cpu}
        result[case] |= {"operations": work, "peak": peak, "bound": bound}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
