"""`cabochon bench serve`: what a server costs beside the engine's own steps.

The same conversations are answered by bare steps of the engine, by `LLM.generate`, and over HTTP by the server that
`cabochon serve` runs, whole and streamed. They take turns in one process, so that ratios hold on a machine with other
work, too. The client is a process of its own, which takes its share of the cores as any client on this machine would.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .flag_values import numbers

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..engine.engine import Engine
    from ..engine.request import SamplingParams, StepOutput
    from ..llm import LLM, AsyncLLM
    from ..llm.loading import Loaded


def serve(
    model: Annotated[str | None, typer.Argument(help="As for chat; also random:E2B?media=no.")] = None,
    streams: Annotated[str, typer.Option(help="Conversations at once, separated by commas.")] = "1,8",
    input_len: Annotated[int, typer.Option(min=1, help="Tokens of each question.")] = 16,
    output_len: Annotated[int, typer.Option(min=2, help="Tokens of each reply.")] = 128,
    fresh: Annotated[str, typer.Option(help="Lengths of questions whose first token is timed.")] = "512",
    cached: Annotated[str, typer.Option(help="The same for questions that were answered before.")] = "",
    repeats: Annotated[int, typer.Option(min=1, help="Turns; medians count.")] = 3,
    quantization: Annotated[str | None, typer.Option(help="int8 or int4: round matrices while loading.")] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or auto.")] = "auto",
    device: Annotated[str, typer.Option(help="cpu, cuda, mps or auto.")] = "auto",
) -> None:
    """What a server costs beside the engine's own steps.

    Tokens per second and times to the first token, of the same replies.
    """
    from ..llm import LLM, AsyncLLM
    from ..server.door import take
    from ..server.options import ServerOptions
    from ..server.run import serve as serve_forever

    crowds, new, known = numbers(streams, "--streams"), numbers(fresh, "--fresh"), numbers(cached, "--cached")
    loaded = _load(model, device, dtype, quantization)
    context = max([input_len, *new, *known]) + output_len
    context += context // 2 + 64  # what the template adds; a question's pieces may be read as more tokens
    options = {"max_model_len": context, "max_num_seqs": max(crowds, default=1)}
    here, there = LLM.of(loaded, **options), AsyncLLM.of(loaded, **options)
    doors = take("127.0.0.1", 0)

    def measure() -> list[Row]:
        try:
            with _client(doors[0].getsockname()[1]) as client:
                bench = Bench(here, there, client)
                bench.rows("to touch everything", 1, input_len, 2, 1)
                rows = [bench.rows(f"{crowd} at once", crowd, input_len, output_len, repeats) for crowd in crowds]
                rows += [bench.rows(f"first token, {length} new", 1, length, 1, repeats) for length in new]
                rows += [
                    bench.rows(f"first token, {length} known", 1, length, 1, repeats, again=True) for length in known
                ]
                return [row for several in rows for row in several]
        finally:
            os.kill(os.getpid(), signal.SIGTERM)  # the server drains and returns

    with ThreadPoolExecutor(1) as driver:
        running: list[Future[list[Row]]] = []
        serve_forever(there, ServerOptions(names=("bench",)), doors, lambda: running.append(driver.submit(measure)))
        rows = running[0].result()
    _show(loaded.name, rows)
    print(json.dumps({"bench": "serve", "model": loaded.name, "rows": [asdict(row) for row in rows]}))


def _load(model: str | None, device: str, dtype: str, quantization: str | None) -> Loaded:
    """The model; random weights as codes in the true shapes, made in seconds, at whose values no step looks."""
    from ..llm.loading import Loaded, load, open_named, template_of
    from ..weights.random import is_random
    from .bench_shapes import Wordy, random_codes

    if model is None or not is_random(model):
        return load(model, device, dtype, quantization=quantization, media=())
    found, name = open_named(model)
    assert found.tokenizer is not None
    tokenizer = Wordy.from_json(found.tokenizer, name)
    network = random_codes(found.config, quantization or "bfloat16")
    return Loaded(name, network, tokenizer, template_of(found, name, tokenizer), found.generation)


def _client(port: int) -> subprocess.Popen[str]:
    """See `bench_client`; it leaves when its stdin is closed."""
    command = [sys.executable, "-S", str(Path(__file__).with_name("bench_client.py")), str(port)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def step(engine: Engine) -> list[StepOutput]:
    """One step; a request that fails is an error, not a figure."""
    from ..llm.replies import failure

    outputs = engine.step()
    for output in outputs:
        if output.error is not None:
            raise failure(output)
    return outputs


@dataclass(slots=True)
class Row:
    what: str
    way: str
    seconds: float
    """Of all replies."""
    tokens_per_second: float
    of_engine: float
    """The engine's seconds by ours, in the same turn."""
    loop_ms_per_step: float | None
    """What the server's event loop computed, where there is one."""


@dataclass(slots=True)
class Way:
    """One way to be answered, and the seconds that it took."""

    name: str
    answer: Callable[[list[str], int], object]
    seconds: list[float] = field(default_factory=list)
    loop: list[float] = field(default_factory=list)


class Bench:
    """An engine here, one behind a server there, and a client."""

    def __init__(self, here: LLM, there: AsyncLLM, client: subprocess.Popen[str]) -> None:
        self.here, self.there, self._client = here, there, client
        self._draw = random.Random(0)

    def rows(self, what: str, crowd: int, words: int, tokens: int, repeats: int, *, again: bool = False) -> list[Row]:
        """Medians of `repeats` turns; with `again` all of them ask the same, which was asked before."""
        ways = [Way("engine steps", self._steps), Way("LLM.generate", self._generate)]
        ways += [Way("server, whole", partial(self._post, stream=False))]
        ways += [Way("server, streamed", partial(self._post, stream=True))]
        loop = time.pthread_getcpuclockid(threading.main_thread().ident or 0)
        asked = [self._question(words) for _ in range(crowd)] if again else []
        for turn in range(repeats + again):
            for way in ways:
                questions = asked or [self._question(words) for _ in range(crowd)]
                steps, computed, begin = self.there.stats.steps, time.clock_gettime(loop), time.perf_counter()
                way.answer(questions, tokens)
                if turn or not again:
                    way.seconds.append(time.perf_counter() - begin)
                    if (done := self.there.stats.steps - steps) > 0:
                        way.loop.append((time.clock_gettime(loop) - computed) / done)
        return [_row(what, way, ways[0], crowd * tokens) for way in ways]

    def _question(self, words: int) -> str:
        """Text of about so many tokens."""
        tokenizer = self.here.tokenizer
        assert tokenizer is not None
        return tokenizer.decode(self._draw.choices(range(len(tokenizer)), k=words))

    # Ways -------------------------------------------------------------------------------------------------------------

    def _steps(self, questions: list[str], tokens: int) -> None:
        engine = self.here.front.engine
        for question in questions:
            engine.add(self.here.front.chat([{"role": "user", "content": question}], params=_params(tokens)).request)
        while engine.busy:
            step(engine)

    def _generate(self, questions: list[str], tokens: int) -> None:
        prompts = [self.here.render([{"role": "user", "content": question}]).token_ids for question in questions]
        self.here.generate([list(prompt) for prompt in prompts], _params(tokens))

    def _post(self, questions: list[str], tokens: int, *, stream: bool) -> None:
        sampling = {"temperature": 1, "top_k": 64, "top_p": 0.95, "seed": 1, "ignore_eos": True}
        bodies = [
            {"messages": [{"role": "user", "content": question}], "max_tokens": tokens, "stream": stream, **sampling}
            for question in questions
        ]
        assert self._client.stdin and self._client.stdout
        print(json.dumps(bodies), file=self._client.stdin, flush=True)
        for answer in json.loads(self._client.stdout.readline()):
            if answer["status"] != 200 or (stream and answer["events"] < tokens):
                raise RuntimeError(f"the server answered {answer}")


def _params(tokens: int) -> SamplingParams:
    from ..engine.request import SamplingParams

    return SamplingParams(temperature=1.0, top_k=64, top_p=0.95, seed=1, max_tokens=tokens, ignore_eos=True)


def _row(what: str, way: Way, engine: Way, tokens: int) -> Row:
    seconds = _middle(way.seconds)
    ratio = _middle([theirs / mine for theirs, mine in zip(engine.seconds, way.seconds, strict=True)])
    return Row(what, way.name, seconds, tokens / seconds, ratio, 1e3 * _middle(way.loop) if way.loop else None)


def _middle(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


def _show(name: str, rows: list[Row]) -> None:
    from rich.table import Table

    from .tables import console

    table = Table("what", "way", "seconds", "tokens/s", "of the engine's", "event loop, ms a step", title=name)
    for row in rows:
        rates = (f"{row.seconds:.3f}", f"{row.tokens_per_second:.1f}", f"{row.of_engine:.1%}")
        table.add_row(row.what, row.way, *rates, "" if row.loop_ms_per_step is None else f"{row.loop_ms_per_step:.2f}")
    console().print(table)
