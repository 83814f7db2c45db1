"""What protects the server: keys, limits, the queue's bound, clients that leave."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, Iterator
from typing import Any

import httpx
import pytest

from cabochon.errors import BusyError
from cabochon.llm import AsyncLLM
from cabochon.server.sse import EventStream
from support.stand import NAME, post, running, settled, toy_llm

LONG = {"model": NAME, "messages": [{"role": "user", "content": "Go on."}], "max_tokens": 3000, "ignore_eos": True}
SHORT = {**LONG, "max_tokens": 4}
CHAT = "/v1/chat/completions"
OPEN = ("/", "/health", "/ping", "/ready", "/load", "/version", "/metrics")


@pytest.fixture(scope="module")
def llm() -> Iterator[AsyncLLM]:
    llm = toy_llm()
    yield llm
    llm.close()


def test_keys(llm: AsyncLLM) -> None:
    with running(llm, api_keys=("one", "two")) as base:
        for headers in ({"authorization": "Bearer two"}, {"authorization": "bearer one"}, {"x-api-key": "one"}):
            assert post(base, CHAT, SHORT, headers=headers).status_code == 200
        for headers in ({}, {"authorization": "Bearer x"}, {"authorization": "one"}, {"x-api-key": "three"}):
            answer = post(base, CHAT, SHORT, headers=headers)
            assert answer.status_code == 401
            assert answer.json()["error"]["code"] == "invalid_api_key"
            assert "one" not in answer.text.split() and "two" not in answer.text
        assert post(base, "/v1/messages", {}).json()["error"]["type"] == "authentication_error"
        assert [httpx.get(base + path).status_code for path in OPEN] == [200] * len(OPEN)


def test_a_response_that_is_refused_takes_nobodys_place(llm: AsyncLLM) -> None:
    asked = {"model": NAME, "input": "Go on.", "max_output_tokens": 2}
    with running(llm, responses_kept=1) as base:
        kept = post(base, "/v1/responses", asked).json()["id"]
        assert post(base, "/v1/responses", {**asked, "background": True, "stream": True}).status_code == 400
        assert httpx.get(f"{base}/v1/responses/{kept}").status_code == 200


def test_no_page_may_call_unless_it_was_named(llm: AsyncLLM) -> None:
    asked = {"origin": "https://example.org", "access-control-request-method": "POST"}
    with running(llm) as base:
        assert "access-control-allow-origin" not in httpx.options(base + CHAT, headers=asked).headers
    with running(llm, allowed_origins=("https://example.org",), api_keys=("k",)) as base:
        answer = httpx.options(base + CHAT, headers=asked)
        assert answer.headers["access-control-allow-origin"] == "https://example.org"
        other = httpx.options(base + CHAT, headers={**asked, "origin": "https://other.org"})
        assert "access-control-allow-origin" not in other.headers


def test_limits(llm: AsyncLLM) -> None:
    with running(llm, max_output_tokens=6, media_limits={"image": 0}) as base:
        assert post(base, CHAT, LONG).json()["usage"]["completion_tokens"] == 6
        part = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
        answer = post(base, CHAT, {**SHORT, "messages": [{"role": "user", "content": [part]}]})
        assert (answer.status_code, "0 is the most" in answer.json()["error"]["message"]) == (400, True)
    with running(llm, request_timeout=0.2) as base:
        assert post(base, CHAT, LONG).status_code == 504
        streamed = post(base, CHAT, {**LONG, "stream": True})
        last = streamed.text.strip().rsplit("data: ", 1)[1]
        assert "longer than 0.2 seconds" in json.loads(last)["error"]["message"]
    assert settled(llm)


@pytest.mark.parametrize(
    ("body", "sentence", "field"),
    [
        ({"messages": []}, "messages has 0 entries, but must have at least 1.", "messages"),
        ({"stop": ["ok", ""]}, "stop[1] is '': string should have at least 1 character.", "stop[1]"),
        ({"stop": 5}, "stop is 5, but must be a valid string.", "stop"),
    ],
)
def test_what_is_wrong_is_said_without_our_own_words(
    llm: AsyncLLM, body: dict[str, Any], sentence: str, field: str
) -> None:
    with running(llm) as base:
        whole = {"messages": [{"role": "user", "content": "Hi"}], **body}
        error = httpx.post(f"{base}/v1/chat/completions", json=whole).json()["error"]
    assert (error["message"], error["param"]) == (sentence, field)


def test_a_body_that_does_not_say_it_is_json(llm: AsyncLLM) -> None:
    """What curl sends with -d and without a header."""
    with running(llm) as base:
        answer = httpx.post(f"{base}/v1/chat/completions", data={"{}": ""})
    assert answer.status_code == 400
    assert "send it with the header content-type: application/json" in answer.json()["error"]["message"]


def test_an_engine_that_has_stopped_is_not_healthy(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fault outside of any request's own: replies end, and who watches /health can start the server anew."""

    def fail() -> None:
        raise ZeroDivisionError

    llm = toy_llm()
    with running(llm) as base:
        assert httpx.get(f"{base}/health").status_code == 200
        monkeypatch.setattr(llm.front.engine, "step", fail)
        assert post(base, CHAT, SHORT).status_code == 500
        assert httpx.get(f"{base}/health").json() == {"status": "stopped"}
        assert httpx.get(f"{base}/health").status_code == 503
        assert post(base, CHAT, SHORT).status_code == 500, "the second request waits for nobody"
    llm.close()


def test_files_and_inner_addresses_are_out_of_reach(llm: AsyncLLM) -> None:
    with running(llm) as base:
        for url in ("/etc/passwd", "file:///etc/passwd", "http://127.0.0.1:1/x.png"):
            part = {"type": "image_url", "image_url": {"url": url}}
            answer = post(base, CHAT, {**SHORT, "messages": [{"role": "user", "content": [part]}]})
            assert answer.status_code == 400, url
            assert "root:" not in answer.text


def test_a_full_queue_says_when_to_come_back(llm: AsyncLLM) -> None:
    with running(llm, max_waiting=0) as base:
        seats = llm.front.engine.scheduler.seats
        assert post(base, CHAT, {**SHORT, "n": seats}).status_code == 200
        answer = post(base, CHAT, {**SHORT, "n": seats + 1})
        assert answer.status_code == 429
        assert int(answer.headers["retry-after"]) >= 1
        assert answer.json()["error"]["code"] == "queue_full"


def test_pages_are_freed_when_a_client_leaves(llm: AsyncLLM) -> None:
    with running(llm) as base:
        for streamed in (True, False):
            with pytest.raises(httpx.ReadTimeout), httpx.Client(timeout=0.5) as client:
                if streamed:
                    with client.stream("POST", base + CHAT, json={**LONG, "stream": True}) as answer:
                        for number, _ in enumerate(answer.iter_lines()):
                            if number > 5:
                                raise httpx.ReadTimeout("enough")
                else:
                    client.post(base + CHAT, json=LONG)
            assert settled(llm, 2.0), streamed
    llm.front.engine.check()


def test_the_log_holds_ids_and_no_prompts(llm: AsyncLLM, caplog: pytest.LogCaptureFixture) -> None:
    secret = {**SHORT, "messages": [{"role": "user", "content": "my password is hunter2"}]}
    with caplog.at_level(logging.DEBUG, "cabochon"), running(llm) as base:
        post(base, CHAT, secret, headers={"x-request-id": "abc-1"})
        post(base, CHAT, {**secret, "temperature": "x"})
    assert "abc-1" in caplog.text and "hunter2" not in caplog.text
    with caplog.at_level(logging.DEBUG, "cabochon"), running(llm, log_prompts=True) as base:
        post(base, CHAT, secret)
    assert "hunter2" in caplog.text


def streamed(events: AsyncGenerator[bytes], leave_after: float = 60.0) -> list[dict[str, Any]]:
    """What an `EventStream` with little patience sends to a client that leaves after some seconds."""
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        await asyncio.sleep(leave_after)
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(EventStream(events, keep_alive=0.02)({"type": "http"}, receive, send))
    return sent


def test_silence_is_filled() -> None:
    async def slow() -> AsyncGenerator[bytes]:
        await asyncio.sleep(0.2)
        yield b"data: 1\n\n"

    start, *rest = streamed(slow())
    assert start["status"] == 200
    bodies = [message["body"] for message in rest]
    assert bodies[0] == b": still here\n\n"
    assert bodies[-2:] == [b"data: 1\n\n", b""]


def test_a_stream_that_fails_at_once_keeps_its_status() -> None:
    async def broken() -> AsyncGenerator[bytes]:
        raise BusyError("full")
        yield b""

    with pytest.raises(BusyError):
        streamed(broken())


def test_a_client_that_leaves_ends_the_work() -> None:
    ended = []

    async def endless() -> AsyncGenerator[bytes]:
        try:
            while True:
                yield b"x"
                await asyncio.sleep(0.01)
        finally:
            ended.append(True)

    assert len(streamed(endless(), leave_after=0.1)) > 2
    assert ended == [True]
