"""Other engines on the shapes that `cabochon bench cpu` times: llama.cpp's `llama-bench`, and `transformers`.

They get random weights in the true shapes, like ours: llama.cpp a file that our own writer makes (int8 as Q8_0, int4 as
Q4_0 with the embedding in Q8_0), transformers the network in bfloat16, whatever the format, since it has no kernels for
the others. One run at a time, so that the caller can take turns.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ..config import ModelConfig
from ..errors import InputError
from ..hub import BUNDLED
from ..model.gemma4 import Gemma4
from ..weights.gguf_write import save_gguf
from ..weights.load import save
from ..weights.params import parameters
from .bench_shapes import random_codes, random_weight

KINDS = {"bfloat16": "bf16", "int8": "q8_0", "int4": "q4_0"}
GENERATED = 16
"""Steps of a decode run."""


class Peer(Protocol):
    name: str

    def prefill(self, length: int) -> float | None:
        """Seconds for a prompt of `length` tokens; None where the peer has no such run."""

    def decode(self, requests: int, context: int) -> float | None:
        """Seconds of a step for `requests` requests after `context` tokens each."""


def known_peers(versus: list[str]) -> dict[str, Path | None]:
    """Name of each peer and where its program is.

    Raises:
        InputError: a peer is unknown, or there is no program at its path.
    """
    found: dict[str, Path | None] = {}
    for words in versus:
        name, _, path = words.partition("=")
        if name == "llama.cpp" and path:
            if not os.access(path, os.X_OK) or Path(path).is_dir():
                raise InputError(
                    f"--versus llama.cpp={path}: there is no program; build its llama-bench and name that."
                )
            found[name] = Path(path)
        elif words == "transformers":
            found[name] = None
        else:
            raise InputError(f"--versus is {words!r}, but must be llama.cpp=PATH/TO/llama-bench or transformers.")
    return found


class LlamaCpp:
    """`llama-bench` on a file of random weights that is written into `folder`."""

    name = "llama.cpp"

    def __init__(self, program: Path, config: ModelConfig, format: str, folder: Path, cpu_time: bool) -> None:
        self.program, self.cpu_time = program, cpu_time
        self.file = folder / f"{KINDS[format]}.gguf"
        params = {param.name: param for param in parameters(config)}
        words = (BUNDLED / "tokenizer.json").read_text()  # llama.cpp wants some; it pads them

        def weight(name: str) -> Tensor:
            made = random_weight(params[name], "bfloat16")
            assert isinstance(made, Tensor)
            return made

        save_gguf(self.file, config, weight, KINDS[format], tokenizer_json=words)

    def prefill(self, length: int) -> float | None:
        test = ("-p", str(length), "-n", "0")
        if self.cpu_time:  # what three runs take more than one
            return (self._spent(*test, "-r", "3") - self._spent(*test, "-r", "1")) / 2
        return length / self._rate(*test)

    def decode(self, requests: int, context: int) -> float | None:
        if requests > 1:
            return None
        depth = ("-p", "0", "-d", str(context), "-r", "1")
        if self.cpu_time:
            few, more = (self._spent(*depth, "-n", str(steps)) for steps in (GENERATED // 2, GENERATED * 3 // 2))
            return (more - few) / GENERATED
        return 1 / self._rate(*depth, "-n", str(GENERATED))

    def _spent(self, *test: str) -> float:
        """CPU seconds of a whole run."""
        before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
        self._run(*test)
        return resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before

    def _rate(self, *test: str) -> float:
        """Tokens per second, as it says itself."""
        (found,) = json.loads(self._run(*test, "-r", "1") if "-r" not in test else self._run(*test))
        return float(found["avg_ts"])

    def _run(self, *test: str) -> str:
        threads = str(torch.get_num_threads())
        done = subprocess.run(
            [self.program, "-m", self.file, "-t", threads, "-o", "json", *test], capture_output=True, text=True
        )
        if done.returncode:
            said = done.stderr.strip().splitlines() or ["nothing"]
            raise InputError(f"{self.program} ended with {done.returncode}; it said: {said[-1]}")
        return done.stdout


class Transformers:
    """The network of `transformers` in bfloat16."""

    name = "transformers"

    def __init__(self, config: ModelConfig, cpu_time: bool) -> None:
        try:
            from transformers import AutoModelForCausalLM
        except ImportError:
            raise InputError("--versus transformers needs that library: pip install transformers") from None
        self.clock = time.thread_time if cpu_time else time.perf_counter
        self.vocabulary = config.text.vocab_size
        with tempfile.TemporaryDirectory() as folder:
            ours: Gemma4 = random_codes(config, "bfloat16")
            save(Path(folder), ours, config)
            del ours
            self.network: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
        self.past: dict[tuple[int, int], Any] = {}

    def prefill(self, length: int) -> float | None:
        return self._timed(self._ids(1, length), None)[0]

    def decode(self, requests: int, context: int) -> float | None:
        """A step; the past grows by a token with each."""
        key = (requests, context)
        if key not in self.past:
            self.past[key] = self._timed(self._ids(requests, context), None)[1]
        return self._timed(self._ids(requests, 1), self.past[key])[0]

    def _ids(self, requests: int, length: int) -> Tensor:
        return torch.randint(self.vocabulary, (requests, length))

    def _timed(self, ids: Tensor, past: Any) -> tuple[float, Any]:
        with torch.inference_mode():
            begin = self.clock()
            out = self.network(input_ids=ids, past_key_values=past, use_cache=True, logits_to_keep=1)
            return self.clock() - begin, out.past_key_values
