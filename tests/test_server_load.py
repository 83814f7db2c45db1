"""The server under load, and told to stop in the midst of it."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest

from cabochon.chat.tokenizer import Tokenizer
from cabochon.engine.stats import Histogram
from cabochon.hub import BUNDLED
from support.serving import serving
from support.stand import bundled_llm, running, settled

CHAT = "/v1/chat/completions"
QUESTION = {"messages": [{"role": "user", "content": "What is 3 + 4? "}], "stream": True}
BARRED = {str(token): -100 for token in Tokenizer.from_file(BUNDLED).control}
LOOSE = {"temperature": 2, "top_k": 0, "top_p": 1, "logit_bias": BARRED}
"""Without control tokens every token is text that a client sees come, and no reply ends before its length."""


@dataclass
class Users:
    """What clients met: how their requests ended, and the seconds between the pieces of their replies."""

    ends: Counter[str] = field(default_factory=Counter)
    gaps: list[float] = field(default_factory=list)
    running: int = 0
    """Replies whose first piece has come and whose last has not."""

    async def ask(self, client: httpx.AsyncClient, leave_after: int | None, **more: Any) -> str:
        """One streamed reply; how it ended."""
        try:
            async with client.stream("POST", CHAT, json={**QUESTION, **LOOSE, **more}) as answer:
                if answer.status_code != 200:
                    end = str(answer.status_code)
                else:
                    end = await self._read(answer, leave_after)
        except httpx.ConnectError:
            end = "no server"
        self.ends[end] += 1
        return end

    async def _read(self, answer: httpx.Response, leave_after: int | None) -> str:
        pieces, before = 0, 0.0
        try:
            async for line in answer.aiter_lines():
                if line == "data: [DONE]":
                    return "answered"
                if line.startswith('data: {"error"'):
                    return "cut"
                if not line.startswith("data:"):
                    continue
                now = time.perf_counter()
                if pieces:
                    self.gaps.append(now - before)
                else:
                    self.running += 1
                pieces, before = pieces + 1, now
                if leave_after is not None and pieces > leave_after:
                    return "left"
            return "broken"
        finally:
            self.running -= pieces > 0


async def load(base: str, users: Users, number: int, seconds: float) -> None:
    """`number` streams at any time, each replaced by another when it ends or its client leaves, until refused."""
    until = time.perf_counter() + seconds

    async def user(place: int, client: httpx.AsyncClient) -> None:
        dice = random.Random(place)
        while time.perf_counter() < until:
            leave_after = dice.randint(0, 40) if dice.random() < 0.3 else None
            words = [{"role": "user", "content": "What is 3 + 4? " * dice.randint(1, 20)}]
            length, seed = dice.randint(5, 200), dice.randint(0, 999)
            if await users.ask(client, leave_after, messages=words, max_tokens=length, seed=seed) in (
                "503",
                "no server",
            ):
                return

    async with client_for(base, number) as client, asyncio.TaskGroup() as group:
        for place in range(number):
            group.create_task(user(place, client))


def client_for(base: str, number: int) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=base, timeout=120, limits=httpx.Limits(max_connections=number + 1))


def percentiles(seconds: Sequence[float]) -> str:
    ordered = sorted(seconds)
    p50, p99 = (ordered[int(share * (len(ordered) - 1))] * 1e3 for share in (0.5, 0.99))
    return f"p50 {p50:.1f} ms, p99 {p99:.1f} ms"


class Recorder(Histogram):
    """Keeps what it counts, for true percentiles instead of a bucket's bound."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds: list[float] = []

    def add(self, seconds: float) -> None:
        self.seconds.append(seconds)
        super().add(seconds)


@pytest.mark.parametrize(("number", "seconds"), [(8, 2), pytest.param(64, 60, marks=pytest.mark.slow)], ids=["8", "64"])
def test_load_with_disconnects(number: int, seconds: float) -> None:
    """Every request is answered or left by its client, and no page is lost."""
    llm, users = bundled_llm(max_num_seqs=64), Users()
    llm.stats.inter_token = times = Recorder()
    try:
        with running(llm) as base:
            asyncio.run(load(base, users, number, seconds))
            assert settled(llm)
        llm.front.engine.check()
        gauges = llm.gauges()
        assert set(users.ends) <= {"answered", "left"} and users.ends["answered"]
        assert gauges.pages["sliding"] == gauges.snapshot_pages
    finally:
        llm.close()
    rate = llm.stats.tokens_out / seconds
    figures = f"{rate:.0f} tokens/s, inter-token {percentiles(times.seconds)}"
    print(f"{number} streams, {seconds} s: {dict(users.ends)}, {figures}")


# Told to stop ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "seconds"), [(32, 0), pytest.param(64, 60, marks=pytest.mark.slow)], ids=["32", "64"]
)
def test_sigterm_in_mid_load(number: int, seconds: float) -> None:
    """Running streams go on to their ends, new requests get 503, and the process leaves with 0.

    Before that, `seconds` of load; then `number` long replies run when the signal comes.
    """
    before, last = Users(), Users()

    async def scene(process: Any) -> tuple[int, httpx.Response]:
        await load(process.base, before, number, seconds)
        async with client_for(process.base, number) as client, asyncio.TaskGroup() as group:
            for seed in range(number):
                group.create_task(last.ask(client, None, max_tokens=300, seed=seed))
            while last.running < number and not last.ends:
                await asyncio.sleep(0.01)
            await asyncio.to_thread(process.terminate)
            still = last.running
            return still, await client.post(CHAT, json={**QUESTION, "max_tokens": 1})

    with serving(
        "--drain", "120", "--max-num-seqs", str(number), "--max-model-len", "1024", "--loop-guard", "0"
    ) as process:
        still, refused = asyncio.run(scene(process))
        assert process.code() == 0, process.log
    assert still == number, "the signal came too late to meet the replies"
    assert (refused.status_code, refused.headers["retry-after"]) == (503, "5")
    assert "shutting down" in refused.json()["error"]["message"]
    assert last.ends == {"answered": number}
    assert set(before.ends) <= {"answered", "left"}
    assert "Traceback" not in process.log, process.log
    told = (
        f", before it {dict(before.ends)} within {seconds} s, pieces {percentiles(before.gaps)}" if before.gaps else ""
    )
    print(f"{number} streams finished after SIGTERM{told}")


def test_what_outlasts_the_drain_is_cut_with_a_word() -> None:
    users = Users()

    async def scene(process: Any) -> httpx.Response:
        async with client_for(process.base, 6) as client, asyncio.TaskGroup() as group:
            for _ in range(4):
                group.create_task(users.ask(client, None, max_tokens=8000))
            asked = {**QUESTION, **LOOSE, "stream": False, "max_tokens": 8000}
            whole = group.create_task(client.post(CHAT, json=asked))
            while "cabochon_requests_running 5.0" not in (await client.get("/metrics")).text or users.running < 4:
                await asyncio.sleep(0.01)
            await asyncio.to_thread(process.terminate)
            return await whole

    with serving("--drain", "0.5", "--loop-guard", "0") as process:
        whole = asyncio.run(scene(process))
        assert process.code() == 0, process.log
    assert users.ends == {"cut": 4}
    assert (whole.status_code, whole.json()["error"]["message"][:28]) == (503, "The server had to leave befo")
    assert "Traceback" not in process.log, process.log


@pytest.mark.slow
def test_ready_in_time() -> None:
    """From process start to the first answer, best of three: below 5 s on an idle machine."""
    times = []
    for _ in range(3):
        with serving() as process:
            times.append(process.ready_after)
            asked = {**QUESTION, "stream": False, "max_tokens": 4}
            assert httpx.post(process.base + CHAT, json=asked, timeout=60).status_code == 200
    print(f"ready after {', '.join(f'{seconds:.2f}' for seconds in sorted(times))} s")
    assert min(times) < 5
