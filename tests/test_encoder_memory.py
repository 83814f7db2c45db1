"""However many pictures arrive together: no more memory than the planner sets aside for one of the largest."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import json, sys
from dataclasses import replace
from pathlib import Path
import numpy as np
import torch
from cabochon.config import VisionConfig
from cabochon.engine.encoder import Encoder
from cabochon.engine.request import SoftSpan
from cabochon.media.image import Patches
from cabochon.model.gemma4 import Gemma4
from cabochon.sizing.memory import encoder
from support.toys import toy_config

def peak():
    return int(next(x for x in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in x).split()[1]) << 10

torch.set_num_threads(1)
width, inner, layers, head, warm = map(int, sys.argv[3:])
wide = VisionConfig(width, inner, layers, width // head, head, 1e-6, 100.0, 16, 3, 10240, True, False, 280)
config = replace(toy_config("E2B", media=True), vision=wide, audio=None)
model = Gemma4(config).bfloat16()
for tensor in model.state_dict().values():
    tensor.normal_(0, 0.02)
side = int(sys.argv[1])
def span(seed, side=side):
    values = np.random.default_rng(seed).integers(0, 256, (side * side, 768)).astype(np.uint8)
    return SoftSpan(1, side * side // 9, bytes([seed]), Patches(values, side, side), False)
server = Encoder(model, 0)
server.encode([span(0, warm)])  # loads what the first call loads
spans = [span(seed) for seed in range(1, int(sys.argv[2]) + 1)]
Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
before = peak()
features, faults = server.encode(spans)
assert len(features) == len(spans) and not faults and server.runs == len(spans) + 1
print(json.dumps({"above": peak() - before, "planned": encoder(config, "bfloat16")}))
"""


def measured(side, pictures, *shape, **environment):
    asked = subprocess.run(
        [sys.executable, "-c", PROGRAM, *map(str, (side, pictures, *shape))],
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
        cwd=Path(__file__).parent,
        env={**os.environ, **environment},
    )
    return json.loads(asked.stdout)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="no peak of resident memory on this system")
def test_many_pictures_take_the_memory_of_one():
    """Six of 2,304 patches; their features are a few hundred kilobytes."""
    freed = {"MALLOC_MMAP_THRESHOLD_": "131072"}  # what is freed goes back: the peak is what is alive
    one, six = (measured(48, pictures, 768, 3072, 1, 64, 48, **freed) for pictures in (1, 6))
    assert six["above"] < one["above"] + (8 << 20) < 2 * one["above"]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="no peak of resident memory on this system")
def test_the_planner_sets_enough_aside_for_the_largest_picture():
    took = measured(99, 1, 1152, 4304, 6, 72, 3)  # the large sizes' tower; what lies between pieces no longer grows
    print(f"one picture of 9,801 patches: {took['above'] >> 20} MiB, planned {took['planned'] >> 20} MiB")
    assert 0.5 * took["planned"] < took["above"] < took["planned"]
