"""OpenAI's Responses over HTTP, around a toy network."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from jsonschema import Draft202012Validator

from support.stand import NAME, PICK, events, post, running, toy_llm


@pytest.fixture(scope="module")
def base() -> Iterator[str]:
    llm = toy_llm()
    with running(llm, max_body_bytes=1 << 20, responses_kept=3) as base:
        yield base
    llm.close()


def test_responses(base: str) -> None:
    asked = {"model": NAME, "input": "Pick one.", "max_output_tokens": 200, "instructions": "Be brief.",
             "tools": [{"type": "function", "name": "pick", "parameters": PICK}], "tool_choice": "required",
             "parallel_tool_calls": False}  # fmt: skip
    whole = post(base, "/v1/responses", asked).json()
    assert whole["status"] == "completed"
    (call,) = whole["output"]
    Draft202012Validator(PICK).validate(json.loads(call["arguments"]))
    assert httpx.get(f"{base}/v1/responses/{whole['id']}").json() == whole
    (item,) = httpx.get(f"{base}/v1/responses/{whole['id']}/input_items").json()["data"]
    assert item["content"][0]["text"] == "Pick one."
    answer = [{"type": "function_call_output", "call_id": call["call_id"], "output": "7 km"}]
    following = {**asked, "input": answer, "previous_response_id": whole["id"], "tool_choice": "auto"}
    streamed = events(post(base, "/v1/responses", {**following, "stream": True}))
    assert [event["sequence_number"] for event in streamed] == list(range(len(streamed)))
    final = streamed[-1]["response"]
    assert final == httpx.get(f"{base}/v1/responses/{final['id']}").json()
    text = "".join(event["delta"] for event in streamed if event["type"] == "response.output_text.delta")
    spoken = "".join(part["text"] for item in final["output"] if item["type"] == "message" for part in item["content"])
    assert text == spoken
    spelt = [{"role": "user", "content": "Pick one."}, call, *answer]
    assert final["usage"]["input_tokens"] == post(base, "/v1/responses", {
        **asked, "input": spelt, "tool_choice": "auto", "store": False}).json()["usage"]["input_tokens"]  # fmt: skip
    assert httpx.delete(f"{base}/v1/responses/{final['id']}").json()["deleted"]
    assert httpx.get(f"{base}/v1/responses/{final['id']}").status_code == 404
    for _ in range(3):
        post(base, "/v1/responses", {**asked, "max_output_tokens": 2})
    assert httpx.get(f"{base}/v1/responses/{whole['id']}").status_code == 404


def test_responses_take_what_all_endpoints_take(base: str) -> None:
    asked = {"model": NAME, "input": "Pick one.", "max_output_tokens": 12}

    def text(**more: Any) -> str:
        answer = post(base, "/v1/responses", {**asked, **more})
        assert answer.status_code == 200, answer.text
        return "".join(part["text"] for item in answer.json()["output"] for part in item["content"])

    greedy = text(temperature=0)
    assert text(temperature=2, top_k=1) == greedy != text(temperature=2, top_k=0, top_p=1, seed=1)
    assert text(temperature=0, stop=greedy[4:6]) == greedy[: greedy.index(greedy[4:6])]
    error = post(base, "/v1/responses", {**asked, "conversation": {"id": "conv_1"}})
    assert (error.status_code, error.json()["error"]["param"]) == (400, "conversation")


def test_responses_with_logprobs(base: str) -> None:
    """Of the answer's tokens only: what they spell is the text, thinking aside."""
    asked = {
        "model": NAME,
        "input": "Go on.",
        "max_output_tokens": 60,
        "reasoning": {"effort": "low"},
        "top_logprobs": 2,
    }
    final = events(post(base, "/v1/responses", {**asked, "stream": True}))[-1]["response"]
    assert final["top_logprobs"] == 2
    for asked_for in (final, post(base, "/v1/responses", asked).json()):
        parts = [part for item in asked_for["output"] if item["type"] == "message" for part in item["content"]]
        for part in parts:
            # Bytes that are no letter show as one mark or as several: the tokenizer and Python differ there.
            spelt = b"".join(bytes(entry["bytes"]) for entry in part["logprobs"]).decode(errors="ignore")
            assert spelt.replace('<|"|>', '"') == part["text"].replace("\ufffd", "").replace('<|"|>', '"')
            assert all(len(entry["top_logprobs"]) == 2 and entry["logprob"] <= 0 for entry in part["logprobs"])
    included = {**asked, "top_logprobs": None, "reasoning": None, "include": ["message.output_text.logprobs"]}
    (item, *_) = post(base, "/v1/responses", included).json()["output"]
    assert item["content"][0]["logprobs"] and item["content"][0]["logprobs"][0]["top_logprobs"] == []


def test_responses_in_the_background(base: str) -> None:
    """A schema keeps the reply from ending before the cancel comes: random weights end one at any token."""
    endless = {"type": "json_schema", "name": "text", "schema": {"type": "string", "minLength": 3000}, "strict": True}
    asked = {"model": NAME, "input": "Go on.", "background": True, "max_output_tokens": 3000}
    begun = post(base, "/v1/responses", {**asked, "text": {"format": endless}}).json()
    assert begun["status"] == "in_progress"
    ended = post(base, f"/v1/responses/{begun['id']}/cancel", None).json()
    assert ended["status"] == "cancelled"
    following = {**asked, "background": False, "previous_response_id": begun["id"]}
    assert post(base, "/v1/responses", following).status_code == 400
    short = post(base, "/v1/responses", {**asked, "max_output_tokens": 2}).json()
    for _ in range(500):
        if (seen := httpx.get(f"{base}/v1/responses/{short['id']}").json())["status"] != "in_progress":
            break
        time.sleep(0.02)
    assert seen["status"] in ("completed", "incomplete")
