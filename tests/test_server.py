"""The server over HTTP, around a toy network: every endpoint, every feature, whole against streamed."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Iterator
from itertools import groupby
from typing import Any

import httpx
import pytest
from jsonschema import Draft202012Validator
from llguidance import LLParserLimits

from cabochon.chat import grammar
from cabochon.llm import AsyncLLM, Chunk
from cabochon.server.routes_openai import side_by_side
from support.stand import NAME, PICK, bundled_llm, events, post, running, toy_llm

TOOLS = [
    {"type": "function", "function": {"name": "pick", "description": "Pick a distance.", "parameters": PICK}},
    {"type": "function", "function": {"name": "stop-it", "parameters": {"type": "object", "properties": {}}}},
]
ASK = {"model": NAME, "messages": [{"role": "user", "content": "Pick one."}], "max_tokens": 24, "seed": 3}
FORMAT = {"type": "json_schema", "json_schema": {"name": "pick", "schema": PICK, "strict": True}}


@pytest.fixture(scope="module")
def llm() -> Iterator[AsyncLLM]:
    llm = toy_llm()
    yield llm
    llm.close()


@pytest.fixture(scope="module")
def base(llm: AsyncLLM) -> Iterator[str]:
    with running(llm, max_body_bytes=1 << 20, responses_kept=3) as base:
        yield base


def chat(base: str, **more: Any) -> dict[str, Any]:
    answer = post(base, "/v1/chat/completions", {**ASK, **more})
    assert answer.status_code == 200, answer.text
    return answer.json()


def stream(base: str, **more: Any) -> list[dict[str, Any]]:
    answer = post(base, "/v1/chat/completions", {**ASK, "stream": True, **more})
    assert answer.status_code == 200, answer.text
    assert answer.text.endswith("data: [DONE]\n\n")
    return events(answer)


def join(chunks: list[dict[str, Any]], n: int = 1) -> list[dict[str, Any]]:
    """What a client makes of a stream: message, ending and logprobs per choice."""
    joined: list[dict[str, Any]] = [{"content": "", "reasoning": "", "calls": {}, "logprobs": []} for _ in range(n)]
    for chunk in chunks:
        for choice in chunk["choices"]:
            into, delta = joined[choice["index"]], choice["delta"]
            into["content"] += delta.get("content") or ""
            into["reasoning"] += delta.get("reasoning") or ""
            assert delta.get("reasoning") == delta.get("reasoning_content")
            for call in delta.get("tool_calls", ()):
                if "id" in call:
                    assert call["index"] not in into["calls"]
                    into["calls"][call["index"]] = call["function"]
                else:
                    into["calls"][call["index"]]["arguments"] += call["function"]["arguments"]
            into["logprobs"] += (choice["logprobs"] or {"content": []})["content"]
            if choice["finish_reason"]:
                if choice["finish_reason"] == "length" and any("cut off" in one for one in choice.get("warnings", ())):
                    into["calls"].popitem()  # the last one, which the warning is about
                into["ending"] = (choice["finish_reason"], choice["stop_reason"], choice.get("warnings"))
    return joined


def flat(whole: dict[str, Any]) -> list[dict[str, Any]]:
    """The same of a whole reply."""
    return [
        {
            "content": choice["message"]["content"] or "",
            "reasoning": choice["message"]["reasoning"] or "",
            "calls": {i: call["function"] for i, call in enumerate(choice["message"].get("tool_calls", ()))},
            "logprobs": (choice["logprobs"] or {"content": []})["content"],
            "ending": (choice["finish_reason"], choice["stop_reason"], choice.get("warnings")),
        }
        for choice in whole["choices"]
    ]


FEATURES: dict[str, dict[str, Any]] = {
    "plain": {},
    "greedy": {"temperature": 0},
    "sampling": {"top_p": 0.9, "top_k": 20, "min_p": 0.01, "temperature": 1.3},
    "top_k off": {"top_k": -1},
    "penalties": {"presence_penalty": 1, "frequency_penalty": 1, "repetition_penalty": 1.2},
    "bias": {"logit_bias": {"120": 50}},
    "logprobs": {"logprobs": True, "top_logprobs": 3},
    "n": {"n": 3},
    "thinking": {"chat_template_kwargs": {"enable_thinking": True}, "max_tokens": 60},
    "effort": {"reasoning_effort": "low", "max_tokens": 60},
    "all effort": {"reasoning_effort": "max", "max_tokens": 60},
    "budget": {"thinking_token_budget": 12, "max_tokens": 60},
    "tools auto": {"tools": TOOLS},
    "tools none": {"tools": TOOLS, "tool_choice": "none"},
    "tools required": {"tools": TOOLS, "tool_choice": "required", "max_tokens": 80},
    "tool named": {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "pick"}}, "max_tokens": 80},
    "one call": {"tools": TOOLS, "tool_choice": "required", "parallel_tool_calls": False, "max_tokens": 80},
    "json object": {"response_format": {"type": "json_object"}},
    "json schema": {"response_format": FORMAT, "max_tokens": 80},
    "regex": {"structured_outputs": {"regex": "[a-c]{4}"}},
    "grammar": {"structured_outputs": {"grammar": 'start: "yes" | "no"'}},
    "choice": {"structured_outputs": {"choice": ["left", "right"]}},
    "tools and schema": {"tools": TOOLS, "response_format": FORMAT, "max_tokens": 80},
    "stop": {"stop": ["e", "1"], "max_tokens": 80},
}


@pytest.mark.parametrize("feature", FEATURES)
def test_stream_joined_equals_whole(base: str, feature: str) -> None:
    asked = FEATURES[feature]
    whole = flat(chat(base, **asked))
    assert join(stream(base, **asked), asked.get("n", 1)) == whole
    assert len(whole) == asked.get("n", 1)


@pytest.mark.parametrize("feature", ["tools required", "tool named", "one call"])
def test_required_calls_are_valid_calls(base: str, feature: str) -> None:
    for seed in range(6):
        (choice,) = chat(base, **(FEATURES[feature] | {"seed": seed, "max_tokens": 200}))["choices"]
        assert choice["finish_reason"] == "tool_calls", choice
        assert not choice["message"]["content"]
        calls = choice["message"]["tool_calls"]
        assert len({call["id"] for call in calls}) == len(calls)
        assert feature != "one call" or len(calls) == 1
        for call in calls:
            name, arguments = call["function"]["name"], json.loads(call["function"]["arguments"])
            assert feature != "tool named" or name == "pick"
            if name == "pick":
                Draft202012Validator(PICK).validate(arguments)
            else:
                assert arguments == {}


def test_three_calls_of_one_tool_stream_with_their_own_indices(base: str) -> None:
    """The only ends of a reply are barred by bias, so that it goes on calling."""
    barred = {str(token): -100 for token in (1, 50, 106)}
    chunks = stream(base, tools=TOOLS[:1], tool_choice="required", logit_bias=barred, max_tokens=120)
    pieces = [call for c in chunks for o in c["choices"] for call in o["delta"].get("tool_calls", ())]
    opened = [piece["index"] for piece in pieces if "id" in piece]
    assert len(opened) >= 3
    assert opened == list(range(len(opened)))
    assert [piece["index"] for piece in pieces] == sorted(piece["index"] for piece in pieces)


def test_arguments_stream_as_they_are_written(base: str) -> None:
    text = {
        "type": "object",
        "properties": {"text": {"type": "string", "minLength": 100, "maxLength": 200}},
        "required": ["text"],
    }
    tool = {"type": "function", "function": {"name": "say", "parameters": text}}
    asked = {"tools": [tool], "tool_choice": "required", "parallel_tool_calls": False, "max_tokens": 600}
    whole = flat(chat(base, **asked))
    chunks = stream(base, **asked)
    pieces = [call for c in chunks for o in c["choices"] for call in o["delta"].get("tool_calls", ())]
    assert len(pieces) > 3  # a token of the toy may have a dozen letters, a piece more than one token
    assert [sorted(piece) for piece in pieces[:2]] == [["function", "id", "index", "type"], ["function", "index"]]
    assert join(chunks) == whole
    final = events(post(base, "/v1/responses", {
        "input": "Pick one.", "tools": [{"type": "function", "name": "say", "parameters": text}], "stream": True,
        "tool_choice": "required", "parallel_tool_calls": False}))  # fmt: skip
    (item,) = final[-1]["response"]["output"]
    deltas = [event["delta"] for event in final if event["type"] == "response.function_call_arguments.delta"]
    assert len(deltas) > 3 and "".join(deltas) == item["arguments"]


def test_a_call_cut_by_length_is_no_call(base: str) -> None:
    for most in (1, 5, 12):
        (choice,) = chat(base, tools=TOOLS[:1], tool_choice="required", max_tokens=most)["choices"]
        assert choice["finish_reason"] == "length"
        assert "tool_calls" not in choice["message"]
        assert "call" in choice["message"]["content"] or most == 1
        tools = [{"type": "function", "name": "pick", "parameters": PICK}]
        asked = {"input": "Pick one.", "tools": tools, "tool_choice": "required", "max_output_tokens": most}
        whole = post(base, "/v1/responses", asked).json()
        assert (whole["status"], {item["type"] for item in whole["output"]} - {"message"}) == ("incomplete", set())
        final = events(post(base, "/v1/responses", {**asked, "stream": True}))[-1]["response"]
        assert all(item["status"] == "incomplete" for item in final["output"] if item["type"] == "function_call")


def test_schema_texts_are_valid(base: str) -> None:
    for seed in range(6):
        (choice,) = chat(base, response_format=FORMAT, seed=seed, max_tokens=200)["choices"]
        assert choice["finish_reason"] == "stop"
        Draft202012Validator(PICK).validate(json.loads(choice["message"]["content"]))


def test_what_is_beyond_a_grammar_is_refused_or_reported(base: str) -> None:
    schema = {"type": "array", "items": {"enum": [1, 2]}, "minItems": 3, "maxItems": 3, "uniqueItems": True}
    asked = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}}
    answer = post(base, "/v1/chat/completions", {**ASK, "response_format": asked})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "response_format.json_schema.schema.uniqueItems"
    asked["json_schema"] |= {"strict": False}
    (choice,) = chat(base, response_format=asked, max_tokens=200)["choices"]
    assert any("breaks its schema" in warning for warning in choice["warnings"])


def test_reasoning_may_be_left_out() -> None:
    asked = {
        "model": None,
        "messages": [{"role": "user", "content": "What is 347 + 285?"}],
        "chat_template_kwargs": {"enable_thinking": True},
        "max_tokens": 200,
        "temperature": 0,
    }
    llm = bundled_llm()
    with running(llm) as base:
        full, short = chat(base, **asked), chat(base, **asked, include_reasoning=False)
        chunks = stream(base, **asked, include_reasoning=False)
    llm.close()
    (said,), (kept,), (joined,) = full["choices"], short["choices"], join(chunks)
    assert said["message"]["reasoning"]
    assert (kept["message"]["reasoning"], kept["message"]["reasoning_content"], joined["reasoning"]) == (None, None, "")
    assert said["message"]["content"] == kept["message"]["content"] == joined["content"] == "632"
    assert short["usage"]["completion_tokens"] == full["usage"]["completion_tokens"]


@pytest.mark.parametrize("budget", [0, 16, 256])
def test_thinking_stays_within_its_budget(base: str, budget: int) -> None:
    for seed in range(4):
        reply = chat(base, thinking_token_budget=budget, max_tokens=400, seed=seed)
        assert reply["usage"]["completion_tokens_details"]["reasoning_tokens"] <= budget
        assert reply["usage"]["completion_tokens"] > reply["usage"]["completion_tokens_details"]["reasoning_tokens"]
        (choice,) = reply["choices"]
        assert choice["message"]["content"] or choice["finish_reason"] == "stop"


def test_seed_and_usage(base: str) -> None:
    long = [{"role": "user", "content": "Pick one, and say why you picked it and not another one. " * 3}]
    said = chat(base, messages=long)["choices"][0]["message"]
    turn = [*long, {"role": "assistant", "content": said["content"]}, {"role": "user", "content": "And now?"}]
    assert chat(base, messages=turn)["usage"]["prompt_tokens_details"]["cached_tokens"] > 0
    first, second = chat(base), chat(base)
    assert flat(first) == flat(second)
    assert flat(chat(base, seed=4)) != flat(first)
    *_, last = stream(base, n=2, stream_options={"include_usage": True})
    whole = chat(base, n=2)["usage"]
    assert last["choices"] == []
    assert {k: last["usage"][k] for k in ("prompt_tokens", "completion_tokens")} == {
        k: whole[k] for k in ("prompt_tokens", "completion_tokens")
    }


def test_a_conversation_with_tools_goes_round(base: str) -> None:
    history = [
        {"role": "system", "content": [{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}]},
        *ASK["messages"],
        {
            "role": "assistant", "content": None, "refusal": None, "annotations": [], "reasoning_content": "Hm.",
            "tool_calls": [{"id": "call_1", "type": "function", "function": {"name": "pick", "arguments": '{"n": 1}'}}],
        },
        {"role": "tool", "tool_call_id": "call_1", "content": "1 km"},
    ]  # fmt: skip
    assert chat(base, messages=history, tools=TOOLS)["choices"][0]["message"]["role"] == "assistant"


# Faults -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "field", "words"),
    [
        ({"temperature": "hot"}, "temperature", "temperature is 'hot', but must be a valid number"),
        ({"temperature": -1}, "temperature", "greater than or equal to 0"),
        ({"top_p": 0}, "top_p", "greater than 0"),
        ({"n": 0}, "n", "greater than or equal to 1"),
        ({"max_tokens": "9"}, "max_tokens", "must be a valid integer"),
        ({"messages": []}, "messages", "has 0 entries, but must have at least 1"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role", "'robot'"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content", "messages[0].content is 3"),
        ({"messages": [{"role": "user", "content": [{"type": "smell"}]}]}, "messages[0].content[0].type", "'smell'"),
        ({"tools": [{"type": "function", "function": {}}]}, "tools[0].function.name", "is missing"),
        ({"tools": TOOLS + TOOLS}, "tools[2]", "second tool called 'pick'"),
        ({"tool_choice": "required"}, "tool_choice", "tools is empty"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "x"}}}, "tool_choice", "names 'x'"),
        ({"top_logprobs": 2}, "top_logprobs", "logprobs is not true"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "less than or equal to 20"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "is missing"),
        ({"response_format": {"type": "xml"}}, "response_format.type", "'xml'"),
        ({"structured_outputs": {"regex": "("}}, "structured_outputs.regex", "grammar"),
        ({"messages": [{"role": "tool", "tool_call_id": "a", "content": "x"}]}, "messages", "a call must come before"),
        ({"structured_outputs": {}}, "structured_outputs", "exactly one"),
        ({"reasoning_effort": "huge"}, "reasoning_effort", "'huge'"),
        ({"logit_bias": {"x": 1}}, "logit_bias", "x"),
        ({"logit_bias": {"99999": 1}}, "logit_bias", "99999"),
        ({"max_tokens": 5000}, "max_tokens", "4096"),
        ({"model": 3}, "model", "must be a valid string"),
    ],
)  # fmt: skip
def test_wrong_fields_are_named(base: str, change: dict[str, Any], field: str | None, words: str) -> None:
    answer = post(base, "/v1/chat/completions", {**ASK, **change})
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert words in error["message"].replace("must hold one of", "exactly one"), error
    assert "\n" not in error["message"]
    assert field is None or (error["param"] or "").startswith(field), error


def test_a_grammar_that_outgrows_the_limits_is_the_requests_fault(base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It compiles, but every token doubles the ways in which the text may have come about."""
    monkeypatch.setattr(grammar, "_LIMITS", LLParserLimits(max_items_in_row=40, verbose_errors=False))
    asked = {**ASK, "max_tokens": 200, "structured_outputs": {"grammar": 'start: s\ns: s s | "a" | "b"'}}
    answer = post(base, "/v1/chat/completions", asked)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["param"] == "structured_outputs.grammar" and "grew beyond what can be followed" in error["message"]
    *_, last = events(post(base, "/v1/chat/completions", {**asked, "stream": True}))
    assert last["error"] == error


def test_faults_outside_the_body(base: str) -> None:
    assert post(base, "/v1/chat/completions", {**ASK, "model": "other"}).status_code == 404
    assert httpx.get(base + "/v1/models/other").status_code == 404
    assert httpx.get(base + "/nowhere").json()["error"]["type"] == "invalid_request_error"
    assert httpx.get(base + "/v1/chat/completions").status_code == 405
    bad = httpx.post(base + "/v1/chat/completions", content=b"{", headers={"content-type": "application/json"})
    assert (bad.status_code, "JSON" in bad.json()["error"]["message"]) == (400, True)
    large = httpx.post(base + "/v1/chat/completions", content=b"x" * (2 << 20))
    assert (large.status_code, "MiB" in large.json()["error"]["message"]) == (413, True)

    def pieces() -> Iterator[bytes]:
        for _ in range(32):
            yield b" " * (64 << 10)

    assert httpx.post(base + "/v1/chat/completions", content=pieces()).status_code == 413
    wrong = post(base, "/v1/messages", {"messages": [], "max_tokens": 1})
    assert (wrong.status_code, wrong.json()["type"]) == (400, "error")
    context = post(base, "/v1/completions", {"prompt": list(range(4, 300)) * 20, "max_tokens": 5})
    assert context.status_code == 400
    assert "5920" in context.json()["error"]["message"] and "4096" in context.json()["error"]["message"]
    assert context.json()["error"]["code"] == "context_length_exceeded"


def test_unknown_fields_are_ignored_and_ids_come_back(base: str) -> None:
    answer = post(base, "/v1/chat/completions", {**ASK, "user": "u", "mystery": 1}, headers={"x-request-id": "mine"})
    assert answer.status_code == 200
    assert answer.headers["x-request-id"] == "mine"
    assert post(base, "/tokenize", {"prompt": "x"}).headers["x-request-id"].startswith("req_")


@pytest.mark.parametrize(
    ("field", "value", "harmless"),
    [
        ("guided_json", {"type": "object"}, None),
        ("functions", [{"name": "pick"}], []),
        ("min_tokens", 5, 0),
        ("best_of", 4, 1),
        ("skip_special_tokens", False, True),
        ("modalities", ["text", "audio"], ["text"]),
        ("continue_final_message", True, False),
        ("cache_salt", "mine", ""),
        ("priority", 3, 0),
    ],
)
def test_fields_that_would_change_the_reply_elsewhere_are_not_ignored(
    base: str, field: str, value: object, harmless: object
) -> None:
    for path, asked in (("/v1/chat/completions", ASK), ("/v1/completions", {"prompt": "x", "max_tokens": 1})):
        error = post(base, path, {**asked, field: value})
        if value or field != "skip_special_tokens":
            assert error.status_code == 400, error.text
            assert error.json()["error"]["param"] == field
            assert error.json()["error"]["message"].startswith(f"{field} is ")
        assert post(base, path, {**asked, field: harmless}).status_code == 200


# Other endpoints ----------------------------------------------------------------------------------------------------


def test_completions(base: str) -> None:
    asked = {"model": NAME, "prompt": ["one", "two"], "max_tokens": 8, "n": 2, "seed": 5, "logprobs": 2}
    whole = post(base, "/v1/completions", asked).json()
    assert "choices" in whole, whole
    assert [choice["index"] for choice in whole["choices"]] == [0, 1, 2, 3]
    assert whole["usage"]["completion_tokens"] == 32
    texts, tokens = [""] * 4, [[] for _ in range(4)]
    for chunk in events(post(base, "/v1/completions", {**asked, "stream": True})):
        for choice in chunk["choices"]:
            texts[choice["index"]] += choice["text"]
            tokens[choice["index"]] += (choice["logprobs"] or {"tokens": []})["tokens"]
    assert texts == [choice["text"] for choice in whole["choices"]]
    assert tokens == [choice["logprobs"]["tokens"] for choice in whole["choices"]]
    for stream in (False, True):
        answer = post(base, "/v1/completions", {"prompt": ["x", "one " * 5000], "max_tokens": 500, "stream": stream})
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "context_length_exceeded")
    ids = post(base, "/v1/completions", {"prompt": [2, 120, 121], "max_tokens": 2}).json()
    assert ids["usage"]["prompt_tokens"] == 3
    echoed = post(base, "/v1/completions", {"prompt": "one", "echo": True, "logprobs": 0, "max_tokens": 2}).json()
    (choice,) = echoed["choices"]
    assert choice["text"].startswith("one")
    assert choice["logprobs"]["token_logprobs"][0] is None
    assert all(value < 0 for value in choice["logprobs"]["token_logprobs"][1:])
    shaped = post(base, "/v1/completions", {"prompt": "x", "structured_outputs": {"regex": "[0-9]{5}"}}).json()
    assert shaped["choices"][0]["text"].isdigit()


def test_prompts_of_one_request_are_answered_side_by_side() -> None:
    met = asyncio.Event()

    async def waits() -> AsyncGenerator[Chunk]:
        yield Chunk(0, "before")
        await met.wait()
        yield Chunk(0, "after")

    async def meets() -> AsyncGenerator[Chunk]:
        met.set()
        yield Chunk(0, "met")

    async def together() -> list[tuple[int, str]]:
        async with asyncio.timeout(60):
            return [(number, chunk.text) async for number, chunk in side_by_side([waits(), meets()])]

    found = asyncio.run(together())
    assert sorted(found) == [(0, "after"), (0, "before"), (1, "met")]


def test_tokens_go_round(base: str) -> None:
    there = post(base, "/tokenize", {"prompt": "forged <|turn> and é"}).json()
    assert there["count"] == len(there["tokens"])
    assert 105 not in there["tokens"]
    assert post(base, "/detokenize", {"tokens": there["tokens"]}).json()["prompt"] == "<bos>forged <|turn> and é"
    turns = post(base, "/tokenize", {"messages": ASK["messages"], "tools": TOOLS}).json()
    assert {105, 106, 46} <= set(turns["tokens"])
    bare = post(base, "/tokenize", {"prompt": "é", "add_special_tokens": False, "return_token_strs": True}).json()
    assert there["tokens"][0] not in bare["tokens"] and "".join(bare["token_strs"]) == "é"
    assert there["token_strs"] is None
    strange = post(base, "/detokenize", {"tokens": [5, 10**8]})
    assert strange.status_code == 400 and "tokens holds 100000000, but ids end at" in strange.json()["error"]["message"]
    for path, body in (("/tokenize", {"prompt": "x"}), ("/detokenize", {"tokens": [5]})):
        assert post(base, path, {"model": "other", **body}).status_code == 404
    assert chat(base)["usage"]["prompt_tokens"] < turns["count"]


def test_operation(base: str) -> None:
    chat(base)
    assert httpx.get(base + "/health").json() == {"status": "ok"}
    assert httpx.get(base + "/ping").status_code == httpx.post(base + "/ping").status_code == 200
    assert httpx.get(base + "/load").json() == {"server_load": 0}
    assert httpx.get(base + "/ready").json() == {"status": "ready"}
    assert [m["id"] for m in httpx.get(base + "/v1/models").json()["data"]] == [NAME, "toy-alias"]
    page = httpx.get(base + "/metrics").text
    for line in ("cabochon_requests_running 0.0", 'cabochon_finished_total{reason="length"}',
                 'cabochon_http_requests_total{route="/v1/chat/completions",status="200"}',
                 'cabochon_inter_token_seconds_bucket{le="+Inf"}', 'cabochon_pages_used{group="global"}',
                 f'vllm:num_requests_waiting{{model_name="{NAME}"}} 0.0',
                 f'vllm:request_success_total{{finished_reason="length",model_name="{NAME}"}}',
                 f'vllm:inter_token_latency_seconds_bucket{{le="+Inf",model_name="{NAME}"}}'):  # fmt: skip
        assert line in page
    families = [line.split()[2] for line in page.splitlines() if line.startswith("# TYPE")]
    assert len(families) == len(set(families)) > 30
    described = httpx.get(base + "/openapi.json").json()
    assert {"/v1/chat/completions", "/v1/responses", "/v1/messages"} <= described["paths"].keys()
    assert "422" not in described["paths"]["/v1/chat/completions"]["post"]["responses"]
    assert httpx.get(base + "/docs").status_code == 200


def test_anthropic(base: str) -> None:
    tools = [{"name": "pick", "input_schema": PICK}]
    asked = {"model": NAME, "max_tokens": 200, "messages": ASK["messages"], "tools": tools, "top_k": 1,
             "tool_choice": {"type": "any", "disable_parallel_tool_use": True}, "system": "Be brief."}  # fmt: skip
    whole = post(base, "/v1/messages", asked).json()
    assert whole["stop_reason"] == "tool_use"
    (block,) = whole["content"]
    Draft202012Validator(PICK).validate(block["input"])
    streamed = events(post(base, "/v1/messages", {**asked, "stream": True}))
    assert [kind for kind, _ in groupby(event["type"] for event in streamed)] == [
        *("message_start", "content_block_start", "content_block_delta", "content_block_stop"),
        *("message_delta", "message_stop"),
    ]
    pieces = [event["delta"]["partial_json"] for event in streamed if event["type"] == "content_block_delta"]
    assert len(pieces) > 1 and json.loads("".join(pieces)) == block["input"]
    answered = [
        *asked["messages"],
        {"role": "assistant", "content": [{"type": "thinking", "thinking": "Hm.", "signature": ""}, block]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": block["id"], "content": "fine"}]},
    ]
    counted = post(base, "/v1/messages/count_tokens", {**asked, "messages": answered}).json()["input_tokens"]
    reply = post(base, "/v1/messages", {**asked, "messages": answered, "tool_choice": {"type": "auto"}}).json()
    assert counted == reply["usage"]["input_tokens"] + reply["usage"]["cache_read_input_tokens"]
    stopped = post(base, "/v1/messages", {**asked, "tools": [], "tool_choice": None, "stop_sequences": ["e", "a", "1"],
                                          "top_k": 0, "max_tokens": 400}).json()  # fmt: skip
    assert stopped["stop_reason"] in ("stop_sequence", "end_turn")
    assert stopped["stop_reason"] == "end_turn" or stopped["stop_sequence"] in ("e", "a", "1")
