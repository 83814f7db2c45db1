"""What the planner says weights take, against the memory of a process that really holds them."""

import json
import subprocess
import sys

import pytest

from cabochon.sizing import Workload, hardware
from cabochon.sizing.memory import weights
from cabochon.weights.random import open_random

PROGRAM = """
import ctypes, gc, json, os, sys
import torch
from cabochon.model.gemma4 import Gemma4
from cabochon.weights.load import fill, quantizer
from cabochon.weights.random import open_random

def resident():
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

name, format, panels = sys.argv[1], sys.argv[2], sys.argv[3] == "panels"
config, source = open_random(name)
with torch.device("meta"):
    model = Gemma4(config)
before = resident()
convert = None if format == "bfloat16" else quantizer(format, panels=panels)
fill(model, source, config, dtype=torch.bfloat16, convert=convert)
print(json.dumps(resident() - before))
"""


def growth(name, format, layout):
    asked = subprocess.run(
        [sys.executable, "-c", PROGRAM, name, format, layout], capture_output=True, text=True, check=True, timeout=900
    )
    return json.loads(asked.stdout)


def predicted(name, format):
    work = Workload(quantization=None if format == "bfloat16" else format)
    device = hardware.find("Raspberry Pi 5")  # any CPU: nothing is kept elsewhere
    return sum(part.bytes for part in weights(open_random(name)[0], work, device))


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    ("format", "layout"),
    [("bfloat16", "rows"), ("int8", "rows"), ("int8", "panels"), ("int4", "rows"), ("int4", "panels")],
)
def test_resident_weights_of_e2b_are_as_predicted(format, layout):
    measured, planned = growth("random:E2B", format, layout), predicted("random:E2B", format)
    print(f"{format} in {layout}: {measured:,} bytes measured, {planned:,} planned, ratio {measured / planned:.4f}")
    assert measured == pytest.approx(planned, rel=0.02)
