"""Replies to events: the same however they are cut, nothing lost, and what was rendered comes back."""

import json
import random
import re
from dataclasses import replace

import pytest

from cabochon.chat.callsyntax import Writer, write_call
from cabochon.chat.events import ArgumentsDelta, Finish, Reply, TextDelta, ThinkingDelta, ToolCallDelta, Usage
from cabochon.chat.messages import Message, ToolCall
from cabochon.chat.parser import Parser, random_call_id
from cabochon.chat.template import Template
from support.conversations import NAMES, PIECES, Inventor
from support.tokenizers_at_hand import both, tokenizer

STATES = ("start", "thought", "content")


def parse(words, pushes, state="start", reason="stop"):
    """Events of a reply pushed in pieces, neighbouring deltas joined."""
    parser = Parser(words, state, call_id=str)
    events = [event for ids in pushes for event in parser.push(ids)] + parser.finish(reason)
    joined = []
    for event in events:
        if joined and type(event) is type(joined[-1]) and isinstance(event, TextDelta | ThinkingDelta | ArgumentsDelta):
            event = replace(event, text=joined.pop().text + event.text)
        joined.append(event)
    return joined


def ids_of(words, spelt):
    return words.encode_raw(spelt, special_tokens=True)


def read(words, spelt, state="start", reason="stop"):
    return Reply.of(parse(words, [ids_of(words, spelt)], state, reason))


def invented_reply(words, invent):
    """A reply as a model might write it: mostly proper, sometimes cut or with tokens where they don't belong."""
    out = Writer(words)
    if invent.chance():
        out.control(words.channel_open)
        out.text("thought\n" * invent.chance(0.9) + invent.text() + "\n")
        out.control(words.channel_close)
    out.text(invent.text())
    for _ in range(invent.choice([0, 0, 1, 2])):
        write_call(out, ToolCall(invent.choice(NAMES), invent.arguments()))
        out.text(invent.choice(["", "", "\n", "more"]))
    out.control(words.turn_close)
    ids = out.ids
    if invent.chance(0.3):
        ids = ids[: invent.randrange(len(ids) + 1)]
    for _ in range(invent.choice([0, 0, 0, 1, 2])):
        ids.insert(invent.randint(0, len(ids)), invent.choice(list(words.control)))
    if ids and invent.chance(0.2):
        del ids[invent.randrange(len(ids))]
    return ids


def check_cuts(words, seed):
    invent = Inventor(seed)
    ids, state = invented_reply(words, invent), invent.choice(STATES)
    whole = parse(words, [ids], state)
    assert parse(words, [[i] for i in ids], state) == whole, seed
    for _ in range(3):
        cuts = sorted(invent.choices(range(len(ids) + 1), k=invent.randint(0, 6)))
        pieces = [ids[a:b] for a, b in zip([0, *cuts], [*cuts, len(ids)], strict=True)]
        assert parse(words, pieces, state) == whole, seed


def check_identity(words, seed):
    """What the renderer writes for an assistant message, the parser reads as that message."""
    invent = Inventor(seed)
    arguments = [invent.arguments() for _ in range(invent.choice([0, 0, 1, 2]))]
    calls = tuple(ToolCall(invent.choice(NAMES), each) for each in arguments)
    message = {"role": "assistant", "content": invent.text(), "reasoning": invent.text() if invent.chance() else None}
    rendered = Message(**{**vars_of(Message.of(message)), "tool_calls": calls})
    prompt = Template(words).render([rendered], add_generation_prompt=False)
    ((start, end),) = prompt.written
    events = parse(words, [prompt.token_ids[start:end]])
    for read_arguments, streamed in finished_calls(events):
        assert streamed == json.dumps(read_arguments, ensure_ascii=False), seed
    reply = Reply.of(events)
    assert reply.text == message["content"].strip().replace("▁", " "), seed
    assert (reply.thinking or "") == (message["reasoning"] or "").replace("▁", " "), seed
    assert [(call.name, plain(call.arguments)) for call in reply.tool_calls] == [
        (call.name, plain(call.arguments)) for call in calls
    ]
    assert reply.finish_reason == ("tool_calls" if calls else "stop")
    assert reply.warnings == ()


def vars_of(message):
    return {name: getattr(message, name) for name in message.__dataclass_fields__}


def plain(value):
    """A value with its types, and with the space that the tokenizer makes of U+2581."""
    match value:
        case str():
            return value.replace("▁", " ")
        case dict():
            return {plain(key): plain(inner) for key, inner in value.items()}
        case list():
            return [plain(inner) for inner in value]
    return type(value).__name__, value


def check_soup(words, draw):
    """Random tokens, mostly markers: nothing raises, and no letter is lost or moved."""
    pieces = [*PIECES, "call:f{", "}", "call:g{a:", "thought\n", "tho", ":", ","]
    ids = []
    for _ in range(draw.randint(0, 25)):
        match draw.random():
            case p if p < 0.45:
                ids.append(draw.choice(list(words.control)))
            case p if p < 0.9:
                ids += words.encode(draw.choice(pieces))
            case _:
                ids.append(draw.randrange(len(words)))
    state = draw.choice(STATES)
    events = parse(words, [ids], state)
    assert isinstance(events[-1], Finish)
    assert events[-1].usage.completion_tokens == len(ids)
    assert letters("".join(map(spell, events))) == letters(expected_soup(words, ids, state)), (ids, state)


def spell(event):
    match event:
        case TextDelta(text) | ThinkingDelta(text):
            return re.sub(r"<\|tool_call>|<tool_call\|>", "", text)
        case ToolCallDelta(_, call):
            return f"call:{call.name}" + spell_value(call.arguments)
    return ""


def spell_value(value):
    match value:
        case dict():
            return "{" + ",".join(f"{key}:{spell_value(inner)}" for key, inner in value.items()) + "}"
        case list():
            return "[" + ",".join(map(spell_value, value)) + "]"
        case bool() | None:
            return {True: "true", False: "false", None: "null"}[value]
    return str(value)


def expected_soup(words, ids, state):
    """The text of all tokens but the control tokens and the headings of thoughts."""
    runs, run = [], []
    for token_id in [*ids, None]:
        if token_id is None or token_id in words.control:
            runs.append(words.decode(run))
            runs.append(
                "\ue000"
                if token_id == words.channel_open
                else "\ue001"
                if token_id == words.channel_close
                else "\ue002"
            )
            run = []
        else:
            run.append(token_id)
    text = "".join(runs)
    if state == "start":
        text = re.sub("^thought\n\ue001", "\ue001", text)
    return re.sub("\ue000thought(\n|(?=[\ue000-\ue002]))", "", text)


def finished_calls(events):
    """(arguments, JSON text that was streamed of them) of every finished call."""
    streamed = {}
    for event in events:
        match event:
            case ArgumentsDelta(_, call_id, name, text):
                streamed[call_id] = (name, streamed.get(call_id, ("", ""))[1] + text)
            case ToolCallDelta(_, call):
                name, text = streamed.pop(call.id)
                assert name == call.name
                yield call.arguments, text


def letters(text):
    """Without white space and the characters of quotes, which a call that was read has lost."""
    return re.sub(r"[\s\"<|>\ue000-\ue002]", "", text)


@both
def test_cuts_make_no_difference(name):
    for seed in range(300):
        check_cuts(tokenizer(name), seed)


@both
def test_what_is_rendered_is_read_back(name):
    for seed in range(300):
        check_identity(tokenizer(name), seed)


@both
def test_token_soup_loses_nothing(name):
    draw = random.Random(11)
    for _ in range(1500):
        check_soup(tokenizer(name), draw)


@pytest.mark.slow
@both
def test_cuts_and_rendering_at_length(name):
    for seed in range(300, 5300):
        check_cuts(tokenizer(name), seed)
        check_identity(tokenizer(name), seed)


@pytest.mark.slow
@both
def test_token_soup_at_length(name):
    draw = random.Random(12)
    for _ in range(100_000):
        check_soup(tokenizer(name), draw)


# One reply each -------------------------------------------------------------------------------------------------------

WORDS = tokenizer("bundled")


def call(name, arguments, index=0):
    return ToolCall(name, arguments, str(index))


@pytest.mark.parametrize(
    ("state", "spelt", "thinking", "text"),
    [
        ("start", "Hello.<turn|>", None, "Hello."),
        ("start", "<|channel>thought\nHm.\n<channel|>Hello.<turn|>", "Hm.", "Hello."),
        ("start", "<|channel>thought\n<channel|>Hello.", None, "Hello."),
        ("start", "<|channel>thought<channel|>Hello.", None, "Hello."),
        ("start", "thought\n<channel|>Hello.", None, "Hello."),
        ("start", "thought", None, "thought"),
        ("start", "thoughtful", None, "thoughtful"),
        ("content", "thought\nful", None, "thought\nful"),
        ("thought", "Hm.\n<channel|>Hello.<turn|>", "Hm.", "Hello."),
        ("thought", "Hm.\n\n<channel|>Hello.", "Hm.\n", "Hello."),
        ("thought", "\n<channel|>Hello.", None, "Hello."),
        ("thought", "<|channel>thought\nHm.\n<channel|>Hello.", "Hm.", "Hello."),
        ("content", "<|channel>thought\nHm.\n<channel|>Hello.", "Hm.", "Hello."),
        ("start", "<|channel>thought\nHm, cut", "Hm, cut", ""),
        ("start", "<|channel>thought\nHm, cut\n", "Hm, cut\n", ""),
        ("start", "<|channel>thought\nHm.<turn|>", "Hm.", ""),
        ("start", 'a <|"|>b<|"|> c', None, 'a "b" c'),
        ("start", "", None, ""),
    ],
)
def test_thinking_and_text(state, spelt, thinking, text):
    reply = read(WORDS, spelt, state)
    assert (reply.thinking, reply.text, reply.warnings) == (thinking, text, ())
    assert reply.finish_reason == "stop"


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("call:f{}", call("f", {})),
        (
            'call:get-weather{city:<|"|>New {York}, <x> \\ "<|"|>}',
            call("get-weather", {"city": 'New {York}, <x> \\ "'}),
        ),
        (
            "call:a.b.c{n:-12,x:1.5e-3,t:true,f:false,z:null}",
            call("a.b.c", {"n": -12, "x": 0.0015, "t": True, "f": False, "z": None}),
        ),
        (
            'call:f{l:[1,[],<|"|>a<|"|>,{}],o:{p:{q:<|"|><|"|>}}}',
            call("f", {"l": [1, [], "a", {}], "o": {"p": {"q": ""}}}),
        ),
        ('call:f{<|"|>odd: key<|"|>:1,first name:2}', call("f", {"odd: key": 1, "first name": 2})),
        (" call:f { a : 1 , b : [ 1 , 2 ] } ", call("f", {"a": 1, "b": [1, 2]})),
        ("call:f{x:None,y:True}", call("f", {"x": None, "y": True})),
        ("call:mcp:server:tool{}", call("mcp:server:tool", {})),
        ("call:f{big:123456789012345678901234567890}", call("f", {"big": 123456789012345678901234567890})),
    ],
)
def test_a_call_is_read(body, expected):
    reply = read(WORDS, f"<|tool_call>{body}<tool_call|><|tool_response>")
    assert reply.tool_calls == (expected,)
    assert [type(value) for value in reply.tool_calls[0].arguments.values()] == [
        type(value) for value in expected.arguments.values()
    ]
    assert (reply.text, reply.warnings, reply.finish_reason) == ("", (), "tool_calls")


@pytest.mark.parametrize(
    "body",
    [
        *(
            "",
            "f{}",
            "call:",
            "call:{}",
            "call:f",
            "call:f(x)",
            "call:f{",
            "call:f{a}",
            "call:f{a:}",
            "call:f{a:1,}",
            "call:f{,}",
        ),
        *(
            "call:f{a:1}}",
            "call:f{a:[1}",
            "call:f{a:1]",
            "call:f{}more",
            "call:f{a::1}",
            "call:f{a:http://x}",
            "call:f{{}:1}",
        ),
        *('call:f{a:<|"|>never closed}', 'call:f{a:<|"|>x<|"|>y}', "call:f{a:" + "[" * 200 + "]" * 200 + "}"),
        "call:f{a:" + "9" * 5000 + "x:1}",
    ],
)
@pytest.mark.parametrize("end", ["<tool_call|><turn|>", "<turn|>", ""])
def test_a_malformed_call_is_text_with_a_warning(body, end):
    reply = read(WORDS, f"Now: <|tool_call>{body}{end}")
    assert reply.tool_calls == ()
    assert reply.text == f"Now: <|tool_call>{body}" + ("<tool_call|>" if end.startswith("<tool_call|>") else "")
    assert len(reply.warnings) == 1
    assert reply.warnings[0].startswith("A tool call could not be read (")
    assert reply.finish_reason == "stop"


@pytest.mark.parametrize(
    ("body", "value"),
    [("London", "London"), ("New York", "New York"), ("007", "007"), ('"x"', "x"), ("2024-01-02", "2024-01-02")],
)
def test_a_bare_word_is_taken_for_a_string_with_a_warning(body, value):
    reply = read(WORDS, f"<|tool_call>call:f{{a:{body}}}<tool_call|>")
    assert reply.tool_calls == (call("f", {"a": value}),)
    assert reply.warnings == ("The call of f lacks quotes around text.",)


@pytest.mark.parametrize("end", ["", "<turn|>", "<|tool_response>", "<|tool_call>call:f{a:2}<tool_call|>"])
def test_a_complete_call_that_was_not_closed_counts(end):
    reply = read(WORDS, "<|tool_call>call:f{a:1}" + end)
    assert reply.tool_calls[0] == call("f", {"a": 1})
    assert reply.warnings == ("The call of f was not closed, but is complete.",)


def test_parallel_calls_keep_their_order_and_have_ids_of_their_own():
    spelt = "".join(f"<|tool_call>call:same{{n:{n}}}<tool_call|>" for n in range(3))
    parser = Parser(WORDS, call_id=random_call_id)
    deltas = [event for event in parser.push(ids_of(WORDS, spelt)) if isinstance(event, ToolCallDelta)]
    assert [(delta.index, delta.call.arguments["n"]) for delta in deltas] == [(0, 0), (1, 1), (2, 2)]
    assert len({delta.call.id for delta in deltas}) == 3


def test_markers_that_are_only_spelt_are_text():
    text = '<|channel>thought\n<|tool_call>call:f{a:<|"|>x<|"|>}<tool_call|><turn|>'
    assert parse(WORDS, [WORDS.encode(text)])[0] == TextDelta(text)


def test_a_string_may_spell_every_marker():
    value = '<tool_call|><|"|>}<turn|>\n<|channel>'
    out = Writer(WORDS)
    write_call(out, ToolCall("f", {"a": value}))
    assert Reply.of(parse(WORDS, [out.ids])).tool_calls == (call("f", {"a": value}),)


def test_stray_markers_are_left_out_with_one_warning():
    reply = read(WORDS, "a<|turn>user\nb<|turn>c<mask>")
    assert reply.text == "auser\nbc"
    assert reply.warnings == (
        "The reply held a stray <|turn>, which was left out.",
        "The reply held a stray <mask>, which was left out.",
    )


def test_another_channel_is_shown_as_thinking_with_a_warning():
    reply = read(WORDS, "<|channel>analysis\nHm.\n<channel|>Hello.")
    assert (reply.thinking, reply.text) == ("analysis\nHm.", "Hello.")
    assert len(reply.warnings) == 1


def test_deltas_come_as_early_as_they_are_certain():
    parser = Parser(WORDS)
    assert parser.push(ids_of(WORDS, "<|channel>thought\n")) == []
    assert parser.thinking
    assert parser.push(ids_of(WORDS, "Hm\n")) == [ThinkingDelta("Hm")]
    assert parser.push(ids_of(WORDS, "<channel|>")) == []
    assert not parser.thinking
    assert parser.push(ids_of(WORDS, "Hi")) == [TextDelta("Hi")]
    assert parser.push(ids_of(WORDS, "<|tool_call>call:f")) == []
    (opened,) = parser.push(ids_of(WORDS, '{a:<|"|>Os'))
    assert (opened.index, opened.name, opened.text) == (0, "f", '{"a": "Os')
    assert [event.text for event in parser.push(ids_of(WORDS, 'lo "<|"|>,b:1.5'))] == ['lo \\"", "b": ']
    assert [event.text for event in parser.push(ids_of(WORDS, "0}"))] == ["1.5}"]
    assert isinstance(parser.push(ids_of(WORDS, "<tool_call|>"))[0], ToolCallDelta)


def test_the_end_counts_tokens_and_names_the_reason():
    thought, answer = ids_of(WORDS, "<|channel>thought\nHm.\n<channel|>"), ids_of(WORDS, "Hello.<turn|>")
    parser = Parser(WORDS)
    parser.push(thought + answer)
    usage = Usage(7, len(thought + answer), len(thought), 3)
    assert parser.finish("stop", prompt_tokens=7, cached_tokens=3) == [Finish("stop", usage)]
    cut = Parser(WORDS, "thought")
    cut.push(ids_of(WORDS, "Hm"))
    assert cut.finish("length")[-1].usage.reasoning_tokens == len(ids_of(WORDS, "Hm"))
    assert read(WORDS, "<|tool_call>call:f{}<tool_call|>", reason="length").finish_reason == "length"


def test_a_reply_becomes_the_next_message():
    reply = read(WORDS, "<|channel>thought\nHm.\n<channel|><|tool_call>call:f{a:1}<tool_call|>")
    assert reply.message() == Message("assistant", (), thinking="Hm.", tool_calls=(call("f", {"a": 1}),))
