"""How long a quantised model takes to load and what memory it needs, in fresh processes, its file in the page cache.

    python benchmarks/load.py PLACE [--model random:E2B] [--format int4] [--tokenizer FILE] [--media] [--context 4096]
                              [--unclaimed]

Writes the model to the folder PLACE unless it lies there already (E2B: 3 GB, and for a while 7 GB of memory), with the
given tokenizer.json, whose reading belongs to a load. Then, in each process: importing the package, `LLM(...)` for text
only (with `--media` towers too), a prompt that fills the context but for a short reply, and the reply. Anonymous memory
is what a process has for itself; the rest of what is resident are pages of files, which the system may take back.

Right before a load another process takes as much memory and ends: a virtual machine that returns free memory to its
host (a balloon with free page reporting) waits for the host at every page it takes again, some 2 s per GiB, whatever
the program. `--unclaimed` leaves that out.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

from cabochon.config import GenerationConfig
from cabochon.weights import convert
from cabochon.weights.checkpoint import Checkpoint
from cabochon.weights.random import open_random

REPLY = 16

CLAIM = """
import mmap, sys
memory = mmap.mmap(-1, int(sys.argv[1]), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
memory.madvise(mmap.MADV_HUGEPAGE)
for page in range(0, len(memory), mmap.PAGESIZE):
    memory[page] = 1
"""
FRESH = """
import json, subprocess, sys, threading, time
from pathlib import Path

def clocks():
    return time.perf_counter(), time.process_time()

def memory():
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {name: int(status[name].split()[0]) << 10 for name in ("VmHWM", "VmRSS", "RssAnon")}

most, over = 0, threading.Event()
def watch():
    global most
    while not over.wait(0.01):
        most = max(most, memory()["RssAnon"])

place, context, reply, media = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4] == "media"
begin = clocks()
from cabochon import LLM, SamplingParams
imported = clocks()
if len(sys.argv) > 5:
    subprocess.run([sys.executable, "-c", *sys.argv[5:]], check=True)
watcher = threading.Thread(target=watch)
watcher.start()
start = clocks()
llm = LLM(place, device="cpu", max_model_len=context, max_num_seqs=1, media=None if media else ())
loaded = clocks()
after = memory()
prompt = [2, *(300 + i % 5000 for i in range(context - reply - 1))]
llm.generate([prompt], SamplingParams(temperature=0, max_tokens=reply))
over.set()
watcher.join()
print(json.dumps({
    "import": imported[0] - begin[0], "import_cpu": imported[1] - begin[1],
    "load": loaded[0] - start[0], "load_cpu": loaded[1] - start[1],
    "loaded_resident": after["VmRSS"], "loaded_anonymous": after["RssAnon"],
    "peak_resident": memory()["VmHWM"], "peak_anonymous": most,
}))
"""


def write(model: str, format: str, place: Path) -> None:
    config, source = open_random(model)
    convert.write(Checkpoint(config, source, GenerationConfig(), folder=None), place, format, place.name)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("place", type=Path)
    parser.add_argument("--model", default="random:E2B")
    parser.add_argument("--format", default="int4")
    parser.add_argument("--tokenizer", type=Path)
    parser.add_argument("--media", action="store_true")
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--unclaimed", action="store_true")
    asked = parser.parse_args()
    if not asked.place.exists():
        write(asked.model, asked.format, asked.place)
    if asked.tokenizer is not None:
        shutil.copy(asked.tokenizer, asked.place / "tokenizer.json")
    files = list(asked.place.glob("*.safetensors"))
    for file in files:
        subprocess.run(["cat", file], stdout=subprocess.DEVNULL, check=True)
    fresh = [
        sys.executable,
        "-c",
        FRESH,
        asked.place,
        str(asked.context),
        str(REPLY),
        "media" if asked.media else "text",
        *([] if asked.unclaimed else [CLAIM, str(sum(file.stat().st_size for file in files))]),
    ]
    runs = [json.loads(subprocess.run(fresh, stdout=subprocess.PIPE, check=True).stdout) for _ in range(asked.repeats)]
    middle = {name: sorted(run[name] for run in runs)[len(runs) // 2] for name in runs[0]}
    for name, value in middle.items():
        unit = f"{value:.2f} s" if isinstance(value, float) else f"{value / (1 << 30):.2f} GiB"
        print(f"{name.replace('_', ' '):18} {unit}")
    print(json.dumps({"model": asked.model, "format": asked.format, "context": asked.context, **middle}))


if __name__ == "__main__":
    main()
