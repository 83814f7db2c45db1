"""Reading the dicts that clients write: what is understood, and one sentence for what isn't."""

import json

import pytest

from cabochon.chat.events import Finish, Reply, TextDelta, ThinkingDelta, ToolCallDelta, Usage, Warned
from cabochon.chat.messages import Media, Message, Text, Tool, ToolCall, read_messages, read_tools
from cabochon.errors import RequestError
from support.conversations import Inventor


def test_a_message_as_openai_clients_echo_it():
    call = {"id": "1", "type": "function", "index": 0, "function": {"name": "f", "arguments": '{"a": [1, null]}'}}
    echoed = {
        "role": "assistant",
        "content": None,
        "refusal": None,
        "annotations": [],
        "audio": None,
        "tool_calls": [call],
    }
    assert Message.of(echoed) == Message("assistant", tool_calls=(ToolCall("f", {"a": [1, None]}, "1"),))
    empty = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": ""}}]}
    assert Message.of(empty).tool_calls == (ToolCall("f", {}),)
    message = Message("user", (Text("x"),))
    assert Message.of(message) is message


@pytest.mark.parametrize(
    ("part", "expected"),
    [
        ({"type": "image_url", "image_url": {"url": "u", "detail": "low"}}, Media("image", "u", {"detail": "low"})),
        ({"type": "image_url", "image_url": "u"}, Media("image", "u")),
        ({"type": "image", "image": b"\x89", "max_soft_tokens": 70}, Media("image", b"\x89", {"max_soft_tokens": 70})),
        ({"type": "image", "url": "u"}, Media("image", "u")),
        (
            {"type": "input_audio", "input_audio": {"data": "AAE=", "format": "wav"}},
            Media("audio", b"\0\1", {"format": "wav"}),
        ),
        ({"type": "audio_url", "audio_url": {"url": "u"}}, Media("audio", "u")),
        ({"type": "video", "path": "p", "fps": 1}, Media("video", "p", {"fps": 1})),
        ({"type": "video_url", "video_url": {"url": "u", "max_frames": 8}}, Media("video", "u", {"max_frames": 8})),
    ],
)
def test_media_parts(part, expected):
    assert Message.of({"role": "user", "content": [part]}).content == (expected,)


@pytest.mark.parametrize(
    ("message", "field", "words"),
    [
        ({}, "role", "role is missing"),
        ({"role": "robot"}, "role", "role is 'robot', but must be one of system, developer, user, assistant, tool"),
        ({"role": "user", "content": 3}, "content", "is a number, but must be text or a list of parts"),
        ({"role": "user", "contents": "Hi"}, "contents", "contents isn't known here"),
        ({"role": "user", "content": [{"type": "txt"}]}, "content[0].type", "'txt', but must be one of text, image"),
        ({"role": "user", "content": [{"type": "text"}]}, "content[0].text", "is a null, but must be text"),
        ({"role": "user", "content": ["Hi"]}, "content[0]", "is a text, but must be an object"),
        ({"role": "user", "content": [{"type": "image"}]}, "content[0]", "has no source"),
        ({"role": "user", "content": [{"type": "image", "url": "u", "path": "p"}]}, "content[0]", "has url and path"),
        (
            {"role": "user", "content": [{"type": "image", "url": 3}]},
            "content[0].url",
            "must be a URL, a path or bytes",
        ),
        ({"role": "user", "content": [{"type": "image", "url": "u", "size": 3}]}, "content[0].size", "isn't known"),
        (
            {"role": "user", "content": [{"type": "input_audio", "input_audio": {"data": "?"}}]},
            "content[0].input_audio.data",
            "isn't base64",
        ),
        ({"role": "user", "tool_calls": [{}]}, "tool_calls", "only an assistant calls tools"),
        ({"role": "assistant", "tool_calls": {"a": 1}}, "tool_calls", "must be a list of calls"),
        ({"role": "assistant", "tool_calls": [{"type": "custom"}]}, "tool_calls[0].type", "only 'function' is known"),
        ({"role": "assistant", "tool_calls": [{}]}, "tool_calls[0].function", "is a null, but must be an object"),
        (
            {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]},
            "tool_calls[0].function.arguments",
            "isn't JSON",
        ),
        (
            {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "[]"}}]},
            "tool_calls[0].function.arguments",
            "must be a JSON object",
        ),
        (
            {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "[" * 99999}}]},
            "tool_calls[0].function.arguments",
            "isn't JSON",
        ),
        ({"role": "tool", "content": "x", "tool_call_id": 3}, "tool_call_id", "is a number, but must be text"),
        ({"role": "user", "tool_responses": [{"name": "f"}]}, "tool_responses", "in an assistant message"),
    ],
)
def test_what_is_not_understood_is_named(message, field, words):
    with pytest.raises(RequestError) as caught:
        read_messages([{"role": "user", "content": "Hi"}, message])
    assert caught.value.field == f"messages[1].{field}"
    assert words in str(caught.value)
    assert str(caught.value).endswith(".")


def test_a_conversation_is_a_list():
    for wrong in ("Hi", {"role": "user"}, 3):
        with pytest.raises(RequestError, match="must be a list of messages"):
            read_messages(wrong)


def test_messages_survive_being_written_as_dicts():
    for seed in range(200):
        messages = read_messages(Inventor(seed).conversation())
        written = json.loads(json.dumps([message.as_dict() for message in messages]))
        assert [plain(message) for message in read_messages(written)] == [plain(message) for message in messages]


def plain(message):
    """Sources given as bytes come back under another key, one-part lists as text; the values are equal."""
    return (
        message.role,
        message.content,
        message.thinking or None,
        message.tool_calls,
        message.tool_call_id,
        message.tool_responses,
    )


def test_tools():
    schema = {"type": "object", "properties": {}}
    wrapped = {"type": "function", "function": {"name": "f", "description": "d", "parameters": schema, "strict": True}}
    assert read_tools([wrapped, {"name": "g"}]) == (Tool("f", "d", schema, strict=True), Tool("g"))
    assert read_tools(None) == ()


@pytest.mark.parametrize(
    ("tool", "words"),
    [
        ({}, "name is a null, but must be text"),
        ({"name": " "}, "name is empty"),
        ({"name": "f", "parameters": [1]}, "parameters is a list, but must be a JSON schema"),
        ({"name": "f", "parameters": {"properties": [1]}}, "parameters.properties is a list, but must be an object"),
        ({"name": "f", "parameters": {"required": "a"}}, "parameters.required is a text, but must be a list"),
        ({"type": "web_search", "function": {"name": "f"}}, "only 'function' is known"),
        ({"name": "f", "arguments": {"a": 1}}, "arguments isn't known"),
        ("f", "is a text, but must be an object"),
    ],
)
def test_tools_that_are_not_understood(tool, words):
    with pytest.raises(RequestError) as caught:
        read_tools([tool])
    assert words in str(caught.value)
    assert caught.value.field.startswith("tools[0]")


def test_two_tools_of_one_name():
    with pytest.raises(RequestError, match="a second tool named 'f'"):
        read_tools([{"name": "f"}, {"name": "f"}])


def test_a_reply_gathers_events():
    call, usage = ToolCall("f", {}, "1"), Usage(1, 2, 3, 4)
    events = [
        ThinkingDelta("a"),
        ThinkingDelta("b"),
        TextDelta("c"),
        Warned("w"),
        TextDelta("d"),
        ToolCallDelta(0, call),
    ]
    expected = Reply("cd", "ab", (call,), "tool_calls", usage, ("w",))
    assert Reply.of([*events, Finish("tool_calls", usage)]) == expected
    assert Reply.of([]) == Reply("")
