"""The clients that people use, as they are, against the bundled checkpoint."""

from __future__ import annotations

import asyncio
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
from pydantic import BaseModel

from support.stand import bundled_llm, running

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # or its import looks for the price list on the net

import anthropic
import openai

MODEL = "pebble"
WEATHER = {
    "type": "object",
    "properties": {"city": {"type": "string"}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOL: Any = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get the weather of a city.",
        "parameters": WEATHER,
        "strict": True,
    },
}
QUESTION: Any = [{"role": "user", "content": "What is the weather in Paris?"}]
SUM: Any = [{"role": "user", "content": "What is 2 + 3?"}]


class Answer(BaseModel):
    kind: Literal["sum", "difference"]
    sure: bool


@pytest.fixture(scope="module")
def base() -> Iterator[str]:
    llm = bundled_llm()
    with running(llm, api_keys=("secret",)) as base:
        yield base
    llm.close()


@pytest.fixture(scope="module")
def client(base: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{base}/v1", api_key="secret", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def claude(base: str) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=base, api_key="secret", max_retries=0) as client:
        yield client


# openai -------------------------------------------------------------------------------------------------------------


def test_openai_chat(client: openai.OpenAI) -> None:
    reply = client.chat.completions.create(model=MODEL, messages=SUM, max_tokens=100)
    assert reply.choices[0].finish_reason == "stop"
    assert (reply.choices[0].message.content or "").strip()
    assert reply.usage and reply.usage.completion_tokens > 0
    with client.chat.completions.stream(model=MODEL, messages=SUM, max_tokens=100) as stream:
        final = stream.get_final_completion()
    assert final.choices[0].message.content == reply.choices[0].message.content
    assert final.choices[0].finish_reason == "stop"


def test_openai_thinking(client: openai.OpenAI) -> None:
    reply = client.chat.completions.create(model=MODEL, messages=SUM, max_tokens=200, reasoning_effort="low")
    extra = reply.choices[0].message.model_extra or {}
    assert extra["reasoning"] == extra["reasoning_content"]
    assert extra["reasoning"]
    assert reply.usage and reply.usage.completion_tokens_details
    assert reply.usage.completion_tokens_details.reasoning_tokens


def test_openai_logprobs_and_n(client: openai.OpenAI) -> None:
    reply = client.chat.completions.create(model=MODEL, messages=SUM, n=2, logprobs=True, top_logprobs=2, max_tokens=30)
    assert [choice.index for choice in reply.choices] == [0, 1]
    for choice in reply.choices:
        assert choice.logprobs and choice.logprobs.content
        assert all(len(entry.top_logprobs) == 2 for entry in choice.logprobs.content)


def test_openai_tool_loop(client: openai.OpenAI) -> None:
    reply = client.chat.completions.create(model=MODEL, messages=QUESTION, tools=[TOOL], tool_choice="required")
    message = reply.choices[0].message
    assert reply.choices[0].finish_reason == "tool_calls"
    assert message.tool_calls
    call: Any = message.tool_calls[0]
    assert json.loads(call.function.arguments) == {"city": "Paris"}
    with client.chat.completions.stream(model=MODEL, messages=QUESTION, tools=[TOOL], tool_choice="required") as stream:
        streamed: Any = stream.get_final_completion().choices[0].message.tool_calls
    assert streamed[0].function.parsed_arguments == {"city": "Paris"}
    history = [*QUESTION, message.model_dump(exclude_none=True)]
    history += [{"role": "tool", "tool_call_id": one.id, "content": "sunny"} for one in message.tool_calls]
    following = client.chat.completions.create(model=MODEL, messages=history, tools=[TOOL], max_tokens=50)
    assert following.choices[0].finish_reason in ("stop", "length", "tool_calls")


def test_openai_parse(client: openai.OpenAI) -> None:
    reply = client.chat.completions.parse(model=MODEL, messages=SUM, response_format=Answer)
    assert isinstance(reply.choices[0].message.parsed, Answer)


def test_openai_async(base: str) -> None:
    async def ask() -> tuple[str | None, str]:
        async with openai.AsyncOpenAI(base_url=f"{base}/v1", api_key="secret") as client:
            whole = await client.chat.completions.create(model=MODEL, messages=SUM, max_tokens=50)
            pieces = [
                chunk.choices[0].delta.content or ""
                async for chunk in await client.chat.completions.create(
                    model=MODEL, messages=SUM, max_tokens=50, stream=True
                )
                if chunk.choices
            ]
            return whole.choices[0].message.content, "".join(pieces)

    whole, joined = asyncio.run(ask())
    assert whole == joined


def test_openai_completions(client: openai.OpenAI) -> None:
    whole = client.completions.create(model=MODEL, prompt="The", max_tokens=8, seed=1)
    pieces = client.completions.create(model=MODEL, prompt="The", max_tokens=8, seed=1, stream=True)
    assert "".join(piece.choices[0].text for piece in pieces) == whole.choices[0].text


def test_openai_responses(client: openai.OpenAI) -> None:
    reply = client.responses.create(model=MODEL, input="What is 2 + 3?", max_output_tokens=100)
    assert reply.status == "completed"
    assert reply.output_text
    following = client.responses.create(
        model=MODEL, input="And 4 + 4?", previous_response_id=reply.id, max_output_tokens=100
    )
    assert following.usage and reply.usage
    assert following.usage.input_tokens > reply.usage.input_tokens
    assert client.responses.retrieve(reply.id).output_text == reply.output_text
    (item,) = client.responses.input_items.list(reply.id).data
    assert item.type == "message"
    with client.responses.stream(model=MODEL, input="What is 2 + 3?", max_output_tokens=100) as stream:
        deltas = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
        assert stream.get_final_response().output_text == deltas == reply.output_text
    parsed = client.responses.parse(model=MODEL, input="What is 2 + 3?", text_format=Answer)
    assert isinstance(parsed.output_parsed, Answer)
    tool: Any = {"type": "function", **TOOL["function"]}
    called = client.responses.create(model=MODEL, input=QUESTION, tools=[tool], tool_choice="required")
    assert called.output[0].type == "function_call"
    assert json.loads(called.output[0].arguments) == {"city": "Paris"}


def test_openai_errors(base: str, client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="temperature") as caught:
        client.chat.completions.create(model=MODEL, messages=SUM, temperature=-3)
    assert caught.value.param == "temperature"
    with pytest.raises(openai.NotFoundError, match="not served here"):
        client.chat.completions.create(model="gpt", messages=SUM)
    with openai.OpenAI(base_url=f"{base}/v1", api_key="guess") as stranger, pytest.raises(openai.AuthenticationError):
        stranger.models.list()
    assert MODEL in [model.id for model in client.models.list()]


def test_the_documented_example_runs(base: str, capsys: pytest.CaptureFixture[str]) -> None:
    page = (Path(__file__).parents[1] / "docs" / "server.md").read_text()
    (example,) = re.findall(r"^```py\n(.*?)^```", page, re.S | re.M)
    example = example.replace("http://127.0.0.1:8000", base).replace('api_key="none"', 'api_key="secret"')
    exec(compile(example, "server.md", "exec"), {"__name__": "example"})
    assert capsys.readouterr().out.strip()


# anthropic ----------------------------------------------------------------------------------------------------------

CLAUDE_TOOL: Any = {"name": "get_weather", "description": "Get the weather of a city.", "input_schema": WEATHER}


def test_anthropic_create_and_stream(claude: anthropic.Anthropic) -> None:
    reply = claude.messages.create(model=MODEL, max_tokens=100, messages=SUM)
    (block,) = reply.content
    assert block.type == "text"
    assert reply.stop_reason == "end_turn"
    with claude.messages.stream(model=MODEL, max_tokens=100, messages=SUM) as stream:
        assert "".join(stream.text_stream) == block.text
        assert stream.get_final_message().stop_reason == "end_turn"
    counted = claude.messages.count_tokens(model=MODEL, messages=SUM)
    assert counted.input_tokens == reply.usage.input_tokens + (reply.usage.cache_read_input_tokens or 0)


def test_anthropic_thinking(claude: anthropic.Anthropic) -> None:
    thinking: Any = {"type": "enabled", "budget_tokens": 128}
    reply = claude.messages.create(model=MODEL, max_tokens=300, messages=SUM, thinking=thinking)
    assert [block.type for block in reply.content] == ["thinking", "text"]
    with claude.messages.stream(model=MODEL, max_tokens=300, messages=SUM, thinking=thinking) as stream:
        streamed = stream.get_final_message().content
    assert streamed[0].to_dict() == reply.content[0].to_dict()
    assert [getattr(block, "text", "") for block in streamed] == [getattr(block, "text", "") for block in reply.content]


def test_anthropic_tool_loop(claude: anthropic.Anthropic) -> None:
    asked: Any = {"model": MODEL, "max_tokens": 200, "tools": [CLAUDE_TOOL]}
    reply = claude.messages.create(messages=QUESTION, tool_choice={"type": "any"}, **asked)
    assert reply.stop_reason == "tool_use"
    call = reply.content[0]
    assert call.type == "tool_use"
    assert call.input == {"city": "Paris"}
    with claude.messages.stream(messages=QUESTION, tool_choice={"type": "any"}, **asked) as stream:
        streamed = stream.get_final_message().content[0]
    assert streamed.type == "tool_use"
    assert streamed.input == call.input
    history: Any = [
        *QUESTION,
        {"role": "assistant", "content": reply.content},
        {"role": "user", "content": [
            {"type": "tool_result", "tool_use_id": block.id, "content": "sunny"}
            for block in reply.content if block.type == "tool_use"
        ]},
    ]  # fmt: skip
    assert claude.messages.create(messages=history, **asked).role == "assistant"


def test_anthropic_errors(base: str, claude: anthropic.Anthropic) -> None:
    with pytest.raises(anthropic.BadRequestError, match=r"messages\[0\]\.content"):
        wrong: Any = [{"role": "user", "content": 3}]
        claude.messages.create(model=MODEL, max_tokens=5, messages=wrong)
    with anthropic.Anthropic(base_url=base, api_key="guess") as stranger, pytest.raises(anthropic.AuthenticationError):
        stranger.messages.create(model=MODEL, max_tokens=5, messages=SUM)


# litellm and langchain ----------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
def test_litellm(base: str) -> None:
    litellm = pytest.importorskip("litellm")
    asked = {
        "model": f"openai/{MODEL}",
        "messages": SUM,
        "api_base": f"{base}/v1",
        "api_key": "secret",
        "max_tokens": 60,
    }
    whole = litellm.completion(**asked)
    pieces = litellm.completion(**asked, stream=True)
    assert "".join(p.choices[0].delta.content or "" for p in pieces) == whole.choices[0].message.content
    called = litellm.completion(**{**asked, "messages": QUESTION}, tools=[TOOL], tool_choice="required")
    assert json.loads(called.choices[0].message.tool_calls[0].function.arguments) == {"city": "Paris"}
    thought = litellm.completion(**asked, reasoning_effort="low", allowed_openai_params=["reasoning_effort"])
    assert thought.choices[0].message.reasoning_content
    claude = litellm.completion(
        model=f"anthropic/{MODEL}", messages=SUM, api_base=base, api_key="secret", max_tokens=60
    )
    assert claude.choices[0].message.content == whole.choices[0].message.content


@pytest.mark.filterwarnings("ignore")
def test_langchain(base: str) -> None:
    chat_openai = pytest.importorskip("langchain_openai").ChatOpenAI
    model = chat_openai(model=MODEL, base_url=f"{base}/v1", api_key="secret", max_tokens=100)
    assert model.invoke("What is 2 + 3?").content == "".join(chunk.content for chunk in model.stream("What is 2 + 3?"))

    def get_weather(city: str) -> str:
        """Get the weather of a city."""
        return city

    called = model.bind_tools([get_weather], tool_choice="any").invoke("What is the weather in Paris?")
    assert called.tool_calls[0]["args"] == {"city": "Paris"}
    for method in ("json_schema", "function_calling"):
        structured = model.with_structured_output(Answer, method=method)
        assert isinstance(structured.invoke("What is 2 + 3?"), Answer)
