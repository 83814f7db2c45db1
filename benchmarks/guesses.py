"""Tokens per second against the share of guesses that come true.

    python benchmarks/guesses.py [--model random:E2B?media=no] [--drafter random:E2B-assistant] [--cpu-time]

Random weights agree on nothing, so an oracle guesses: it knows the reply and says each next token with a given
probability, else another one. The drafter runs for every guess all the same, and its time counts; only its answer is
put aside. All else is the engine as it is: its controller decides how many guesses a step gets, and every reply is
compared with the one made without guesses, timed beside it. With `--cpu-time` one thread is timed by what it computes,
which means the same on a busy machine.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from cabochon.engine.engine import Engine
from cabochon.engine.guessers import Guesser
from cabochon.engine.request import Request, SamplingParams
from cabochon.engine.track import Track
from cabochon.llm import LLM

SHARES = (0.5, 0.7, 0.8, 0.9, 1.0)


class Oracle:
    """Guesses of `drafter`'s cost, each true with probability `share`."""

    doubt: ClassVar[str] = "was no reply taken down?"

    def __init__(self, drafter: Guesser, reply: Sequence[int], share: float) -> None:
        self.drafter, self.reply, self.share, self.draw = drafter, reply, share, random.Random(0)

    def __call__(self, tracks: Sequence[Track], hidden: Tensor, count: int) -> list[list[int]]:
        self.drafter(tracks, hidden, count)
        (track,) = tracks
        coming = self.reply[track.generated : track.generated + count]
        return [[token if self.draw.random() < self.share else token ^ 1 for token in coming]]


def reply_to(engine: Engine, prompt: list[int], length: int) -> tuple[list[int], float]:
    """The greedy reply and its tokens per second after the first."""
    engine.add(Request("x", prompt, SamplingParams(temperature=0, max_tokens=length, ignore_eos=True)))
    tokens: list[int] = []
    while not tokens:
        tokens += [token for output in engine.step() for token in output.token_ids]
    begin = engine.clock()
    while engine.busy:
        tokens += [token for output in engine.step() for token in output.token_ids]
    return tokens, (length - 1) / (engine.clock() - begin)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="random:E2B?media=no")
    parser.add_argument("--drafter", default="random:E2B-assistant")
    parser.add_argument("--quantization", default="int4")
    parser.add_argument("--guesses", type=int, default=3)
    parser.add_argument("--input-len", type=int, default=64)
    parser.add_argument("--output-len", type=int, default=96)
    parser.add_argument("--cpu-time", action="store_true")
    asked = parser.parse_args()
    if asked.cpu_time:
        torch.set_num_threads(1)
    llm = LLM(
        asked.model,
        quantization=asked.quantization,
        drafter=asked.drafter,
        num_speculative_tokens=asked.guesses,
        max_model_len=asked.input_len + asked.output_len,
        max_num_seqs=1,
        enable_prefix_caching=False,
    )
    engine = llm.front.engine
    assert engine.speculator is not None
    if asked.cpu_time:
        engine.clock = engine.speculator.clock = time.process_time
    measure(engine, asked.input_len, asked.output_len)


def measure(engine: Engine, input_len: int, output_len: int) -> None:
    draw = random.Random(0)
    prompt = [draw.randrange(256, engine.vocab_size) for _ in range(input_len)]
    speculator, stats = engine.speculator, engine.stats
    assert speculator is not None
    drafter, engine.speculator = speculator.guesser, None
    reply_to(engine, prompt, 4)
    rows = []
    for share in SHARES:
        engine.speculator = None
        reply, alone = reply_to(engine, prompt, output_len)
        engine.speculator = speculator
        speculator.guesser = Oracle(drafter, reply, share)
        steps, seconds, drafted = stats.steps, stats.draft_seconds, stats.drafted
        again, speed = reply_to(engine, prompt, output_len)
        assert again == reply, "guesses changed the reply"
        steps, drafted = stats.steps - steps, stats.drafted - drafted
        guess = 1e3 * (stats.draft_seconds - seconds) / max(1, drafted)
        rows.append(
            {
                "share": share,
                "tokens_per_s": speed,
                "alone_tokens_per_s": alone,
                "times": speed / alone,
                "guess_ms": guess,
            }
        )
        print(
            f"{share:4.0%} true: {speed:5.1f} tokens/s, {speed / alone:4.2f} times {alone:.1f}; "
            f"{output_len / steps:.2f} tokens and {drafted / steps:.2f} guesses of {guess:.2f} ms a step",
            flush=True,
        )
    print(json.dumps({"bench": "guesses", "rows": rows}))


if __name__ == "__main__":
    main()
