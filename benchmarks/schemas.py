"""Does every call and text that finishes under a schema obey it, at temperature 1.5 on trained and on random weights?

    python benchmarks/schemas.py [--schemas 300]

Schemas, requests and checks are those of the tests; replies go through the server's own service, 32 at a time. The last
line is one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import Any

from jsonschema import Draft202012Validator

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from cabochon.chat.events import Event, Reply
from cabochon.chat.messages import Message, Text, Tool
from cabochon.config import read_config
from cabochon.engine.request import SamplingParams
from cabochon.errors import RequestError
from cabochon.hub import BUNDLED
from cabochon.llm import AsyncLLM
from cabochon.llm.loading import Loaded, build, load, pick_device
from cabochon.server.ask import Ask, Shape
from cabochon.server.options import ServerOptions
from cabochon.server.service import Service
from cabochon.weights.random import RandomSource
from support.schemas import Schemas

TEMPERATURE = 1.5
LONGEST = 800


def random_twin(loaded: Loaded) -> Loaded:
    """The bundled architecture and tokenizer with calm random weights."""
    config = read_config(BUNDLED)
    network = build(config, RandomSource(config), pick_device("cpu"), next(loaded.model.parameters()).dtype)
    return replace(loaded, name="random", model=network)


def asked(schema: dict[str, Any], kind: str, seed: int) -> Ask:
    params = SamplingParams(temperature=TEMPERATURE, top_p=1.0, top_k=0, max_tokens=LONGEST, seed=seed)
    messages = (Message("user", (Text("Look it up."),)),)
    if kind == "text":
        return Ask(messages, params, shape=Shape("json_schema", schema), thinking=False)
    tools = (Tool("look-up", "Looks something up.", schema, strict=True),)
    return Ask(messages, params, tools=tools, callable=tools, must_call=True, thinking=False)


async def one(service: Service, schema: dict[str, Any], kind: str, seed: int, figures: dict[str, Any]) -> None:
    ask = asked(schema, kind, seed)
    started = time.perf_counter()
    try:
        service.constrainer.rules(ask)
    except RequestError:
        return
    figures["ms"].append((time.perf_counter() - started) * 1e3)
    events: list[Event] = []
    async with aclosing(service.chat(ask, str(seed))) as chunks:
        async for chunk in chunks:
            events += chunk.events
    reply = Reply.of(events)
    if reply.finish_reason == "length":
        # A reply that was cut has no finished call after the cut, but those before it count.
        figures["cut"] += 1
    else:
        figures["finished"] += 1
        assert kind == "text" or reply.tool_calls, reply
    values = [dict(call.arguments) for call in reply.tool_calls]
    if kind == "text" and reply.finish_reason == "stop":
        values = [json.loads(reply.text)]
    figures["checked"] += len(values)
    figures["invalid"] += sum(not Draft202012Validator(schema).is_valid(value) for value in values)


async def measure(service: Service, kind: str, count: int) -> dict[str, Any]:
    figures: dict[str, Any] = {"schemas": count, "finished": 0, "cut": 0, "checked": 0, "invalid": 0, "ms": []}
    seats = asyncio.Semaphore(32)

    async def queued(seed: int) -> None:
        async with seats:
            await one(service, Schemas(seed).parameters(), kind, seed, figures)

    async with asyncio.TaskGroup() as group:
        for seed in range(count):
            group.create_task(queued(seed))
    times = sorted(figures.pop("ms"))
    figures["compiled"] = len(times)
    return figures | {"compile_p50_ms": times[len(times) // 2], "compile_p99_ms": times[int(len(times) * 0.99)]}


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--schemas", type=int, default=300)
    count = arguments.parse_args().schemas
    bundled = load()
    table: dict[str, Any] = {}
    for loaded in (bundled, random_twin(bundled)):
        llm = AsyncLLM.of(loaded)
        service = Service(llm, ServerOptions(names=(loaded.name,)))
        for kind in ("call", "text"):
            figures = table[f"{loaded.name}/{kind}"] = asyncio.run(measure(service, kind, count))
            print(
                f"{loaded.name:8} {kind:5}", {k: round(v, 1) if isinstance(v, float) else v for k, v in figures.items()}
            )
        llm.close()
    print(json.dumps(table))


if __name__ == "__main__":
    main()
