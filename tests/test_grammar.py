"""Schemas become grammars: what they accept and refuse, and that everything sampled under them is valid."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
import torch
from jsonschema import Draft202012Validator

from cabochon.chat.constraint import ReplyConstraint, ReplyRules
from cabochon.chat.events import Reply
from cabochon.chat.grammar import Grammar, Vocabulary
from cabochon.chat.messages import Tool
from cabochon.chat.parser import Parser
from cabochon.errors import RequestError
from support.schemas import Schemas
from support.words import small_tokenizer

Q = '<|"|>'
TREE = {"$ref": "#/$defs/tree"}
SIZE = 640
"""Wider than the tokenizer, as padded embeddings are."""


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    return Vocabulary(small_tokenizer(), SIZE)


def accepts(vocabulary: Vocabulary, grammar: Grammar, text: str) -> bool:
    walk = vocabulary.walk(grammar)
    for token in small_tokenizer().encode_raw(text, special_tokens=True):
        if not walk.allowed()[token]:
            return False
        walk.advance(token)
    return walk.complete()


def call(vocabulary: Vocabulary, schema: dict[str, Any] | None, arguments: str, *, strict: bool = False) -> bool:
    grammar, _ = vocabulary.call([Tool("f", "", schema, strict=strict)])
    return accepts(vocabulary, grammar, f"call:f{arguments}<tool_call|>")


def obj(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties}


@pytest.mark.parametrize(
    ("schema", "good", "bad"),
    [
        (None, ["{}"], ["{a:1}", "{"]),
        ({"type": "object"}, ["{}", "{a:1}", f"{{a:[{{b:{Q}x{Q}}}],c:null}}"], ["{a}", '{"a":1}']),
        (obj(a={"type": "string"}), ["{}", f"{{a:{Q}{Q}}}", f'{{a:{Q}"}}]\n,:日{Q}}}'], ["{a:1}", "{b:1}", "{a:x}"]),
        (obj(a={"type": "integer"}), ["{a:-12}", "{a:0}"], ["{a:1.5}", "{a:01}", f"{{a:{'9' * 19}}}", "{a:}"]),
        (obj(a={"type": "integer", "minimum": 3, "maximum": 40}), ["{a:3}", "{a:40}"], ["{a:2}", "{a:41}"]),
        (obj(a={"type": "integer", "multipleOf": 5, "minimum": 0}), ["{a:15}"], ["{a:14}", "{a:-5}"]),
        (obj(a={"type": "number"}), ["{a:1}", "{a:-0.5e-3}"], ["{a:1e999}", "{a:.5}", "{a:NaN}"]),
        (obj(a={"type": "boolean"}), ["{a:true}", "{a:false}"], ["{a:True}", "{a:1}"]),
        (obj(a={"type": ["integer", "null"]}), ["{a:1}", "{a:null}"], ["{a:true}"]),
        (obj(a={"type": "integer", "nullable": True}), ["{a:1}", "{a:null}"], ["{a:true}"]),
        (obj(a={"enum": ["x", "", 3, None]}), [f"{{a:{Q}x{Q}}}", f"{{a:{Q}{Q}}}", "{a:3}", "{a:null}"], ["{a:x}"]),
        (obj(a={"const": {"k": [True, "v"]}}), [f"{{a:{{k:[true,{Q}v{Q}]}}}}"], ["{a:{}}"]),
        (obj(a={"type": "string", "maxLength": 2}), [f"{{a:{Q}日本{Q}}}"], [f"{{a:{Q}abc{Q}}}"]),
        (obj(a={"type": "string", "pattern": "b+"}), [f"{{a:{Q}abbc{Q}}}"], [f"{{a:{Q}ac{Q}}}"]),
        (obj(a={"type": "string", "pattern": "^a|z$"}), [f"{{a:{Q}ab{Q}}}", f"{{a:{Q}xz{Q}}}"], [f"{{a:{Q}ba{Q}}}"]),
        (obj(a={"type": "string", "pattern": r"^\d/[[\]]$"}), [f"{{a:{Q}1/]{Q}}}"], [f"{{a:{Q}1/){Q}}}"]),
        (
            obj(a={"type": "string", "format": "date"}),
            [f"{{a:{Q}2024-02-29{Q}}}", f"{{a:{Q}2000-02-29{Q}}}"],
            [f"{{a:{Q}2023-02-29{Q}}}", f"{{a:{Q}1900-02-29{Q}}}", f"{{a:{Q}2024-13-01{Q}}}"],
        ),
        (obj(a={"type": "array", "items": {"type": "integer"}}), ["{a:[]}", "{a:[1,2,3]}"], ["{a:[,]}", "{a:[true]}"]),
        (obj(a={"type": "array", "minItems": 2, "maxItems": 3, "items": {"const": 1}}), ["{a:[1,1]}", "{a:[1,1,1]}"],
         ["{a:[1]}", "{a:[1,1,1,1]}"]),
        (obj(a={"type": "array", "maxItems": 0}), ["{a:[]}"], ["{a:[1]}"]),
        (
            obj(a={"type": "array", "prefixItems": [{"const": 1}, {"const": 2}], "items": {"const": 3}, "minItems": 1}),
            ["{a:[1]}", "{a:[1,2]}", "{a:[1,2,3,3]}"],
            ["{a:[]}", "{a:[2]}", "{a:[1,3]}"],
        ),
        ({**obj(a={"const": 1}, b={"const": 2}, C={"const": 3}), "required": ["b"]}, ["{b:2}", "{a:1,b:2,C:3}"],
         ["{a:1}", "{}", "{b:2,a:1}", "{b:2,d:1}"]),
        ({**obj(aa={"const": 1}), "additionalProperties": {"type": "boolean"}}, ["{aa:1,b:true}", "{a:true,aaa:false}"],
         ["{aa:true}", "{b:1}", "{b:true,aa:true}"]),
        ({"type": "object", "required": ["x"]}, ["{x:1}", "{x:1,y:2}"], ["{}", "{y:2}"]),
        (obj(**{"two words": {"const": 1}}), [f"{{{Q}two words{Q}:1}}"], ["{two words:1}"]),
        (obj(a={"anyOf": [{"type": "integer"}, {"type": "string"}]}), ["{a:1}", f"{{a:{Q}x{Q}}}"], ["{a:true}"]),
        (obj(a={"allOf": [{"minimum": 2}, {"type": "integer", "maximum": 4}]}), ["{a:2}", "{a:4}"], ["{a:1}", "{a:5}"]),
        (
            {**obj(a=TREE), "$defs": {"tree": obj(kids={"type": "array", "items": TREE})}},
            ["{a:{}}", "{a:{kids:[{},{kids:[{}]}]}}"],
            ["{a:{kids:[1]}}"],
        ),
    ],
)  # fmt: skip
def test_calls_follow_their_schema(
    vocabulary: Vocabulary, schema: dict[str, Any], good: list[str], bad: list[str]
) -> None:
    assert [text for text in good if not call(vocabulary, schema, text)] == []
    assert [text for text in bad if call(vocabulary, schema, text)] == []


def test_strings_bar_control_tokens_and_take_everything_else(vocabulary: Vocabulary) -> None:
    grammar, _ = vocabulary.call([Tool("f", "", obj(a={"type": "string"}))])
    walk = vocabulary.walk(grammar)
    tokenizer = small_tokenizer()
    for token in tokenizer.encode_raw(f"call:f{{a:{Q}", special_tokens=True):
        walk.advance(token)
    allowed = walk.allowed()
    assert [i for i in tokenizer.control if allowed[i]] == [tokenizer.quote]
    pieces = [i for i in range(len(tokenizer)) if tokenizer.token_bytes(i).isascii() and i not in tokenizer.control]
    assert all(allowed[i] for i in pieces)
    assert not allowed[len(tokenizer) :].any()


@pytest.mark.parametrize(
    ("part", "named"),
    [
        ({"type": "array", "uniqueItems": True, "items": {}}, "properties.a.uniqueItems"),
        ({"type": "string", "not": {"const": "x"}}, "properties.a.not"),
        ({"type": "string", "format": "iban"}, "properties.a.format"),
        ({"type": "object", "minProperties": 2}, "properties.a.minProperties"),
        ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "properties.a.oneOf"),
        ({"items": {"if": {}, "then": {}}}, "properties.a.items.if"),
    ],
)
def test_what_a_grammar_cannot_hold_is_refused_by_name_or_listed(vocabulary: Vocabulary, part: Any, named: str) -> None:
    _, beyond = vocabulary.call([Tool("f", "", obj(a=part))])
    assert named in beyond["f"]
    with pytest.raises(RequestError, match=r"can't be enforced") as caught:
        vocabulary.call([Tool("f", "", obj(a=part), strict=True)])
    assert caught.value.field is not None
    assert caught.value.field.startswith("tools[0].function.parameters.properties.a")


@pytest.mark.parametrize(
    ("schema", "sentence"),
    [
        ({"type": "array"}, "a tool's parameters are an object"),
        ({"type": "objekt"}, "not valid JSON schema"),
        (obj(a={"$ref": "http://example.org/x"}), "only references inside the schema"),
        (obj(a={"$ref": "#/$defs/none"}), "does not exist"),
        (obj(a={"$ref": "#/properties/a", "type": "object"}), "without end"),
        (obj(a=False) | {"required": ["a"]}, "false"),
        (obj(a={"type": "string", "pattern": "(?=x)y"}), "look-around"),
        (obj(a={"type": "string", "pattern": r"(.)\1"}), "back-reference"),
        (obj(a={"type": "string", "pattern": "("}), "grammar"),
        (obj(a={"patternProperties": {"^x": {}}}), "declare the properties by name"),
        (obj(a={"minLength": 3, "maxLength": 2}), "at least 3 and at most 2"),
        (obj(a={"enum": [1], "type": "string"}), "no value"),
    ],
)
def test_impossible_schemas_get_one_sentence(vocabulary: Vocabulary, schema: Any, sentence: str) -> None:
    with pytest.raises(RequestError, match=sentence) as caught:
        vocabulary.call([Tool("f", "", schema)])
    assert "\n" not in str(caught.value)


def test_text_schemas(vocabulary: Vocabulary) -> None:
    grammar = vocabulary.json_schema(
        obj(a={"type": "integer"}) | {"additionalProperties": False}, strict=True, field="s"
    )
    assert accepts(vocabulary, grammar, '{"a": 12}')
    assert accepts(vocabulary, grammar, '{\n  "a":1\n}')
    assert not accepts(vocabulary, grammar, '{"a": 12, "b": 1}')
    assert not accepts(vocabulary, grammar, "{" + " " * 40 + '"a": 12}')
    with pytest.raises(RequestError, match=r"'properties\.a\.not'"):
        vocabulary.json_schema(obj(a={"not": {}}), strict=True, field="s")
    assert vocabulary.json_schema(obj(a={"not": {}}), strict=False, field="s").unenforced == ("properties.a.not",)
    assert accepts(vocabulary, vocabulary.json_object("s"), '{"x": [1, {"y": null}]}')
    assert not accepts(vocabulary, vocabulary.json_object("s"), "[1]")
    assert accepts(vocabulary, vocabulary.regex("[a-c]+", "regex"), "abc")
    assert accepts(vocabulary, vocabulary.lark('start: "a" | "b"', "grammar"), "b")
    assert accepts(vocabulary, vocabulary.choice(['"yes"', "no\n"], "choice"), '"yes"')
    for broken in (lambda: vocabulary.regex("(", "regex"), lambda: vocabulary.lark("start: nothing", "grammar")):
        with pytest.raises(RequestError, match="can't be made into a grammar"):
            broken()


# Replies ------------------------------------------------------------------------------------------------------------


def sample(constraint: ReplyConstraint, generator: torch.Generator, limit: int = 1500) -> list[int] | None:
    """A reply drawn from equal logits under the constraint; None when the limit cut it."""
    tokenizer = small_tokenizer()
    ids: list[int] = []
    while len(ids) < limit:
        row = torch.zeros(SIZE)
        constraint.mask(row)
        forced = constraint.forced()
        token = int(torch.multinomial(torch.softmax(row, 0), 1, generator=generator))
        assert not forced or token == forced[0]
        ids.append(token)
        if token in (tokenizer.eos, tokenizer.turn_close, tokenizer.tool_response_open):
            return ids
        constraint.advance(token)
        if constraint.done():
            return ids
    return None


def parse(ids: list[int]) -> Reply:
    parser = Parser(small_tokenizer())
    return Reply.of([*parser.push(ids), *parser.finish("stop")])


def sampled_calls(vocabulary: Vocabulary, seeds: range) -> dict[str, Any]:
    """Compile and sample one schema per seed; every finished call must parse and be valid."""
    figures: dict[str, Any] = {"schemas": len(seeds), "compiled": 0, "finished": 0, "calls": 0, "ms": []}
    for seed in seeds:
        schema = Schemas(seed).parameters()
        started = time.perf_counter()
        grammar, beyond = vocabulary.call([Tool("look-up", "", schema), Tool("noop")])
        figures["ms"].append((time.perf_counter() - started) * 1e3)
        figures["compiled"] += not beyond
        rules = ReplyRules(small_tokenizer(), vocabulary, call=grammar, must_call=True, may_think=False)
        ids = sample(rules.begin("start", None), torch.Generator().manual_seed(seed))
        if ids is None or beyond:
            continue
        reply = parse(ids)
        assert reply.text == ""
        assert reply.tool_calls and not reply.warnings, (schema, reply)
        for made in reply.tool_calls:
            if made.name == "look-up":
                Draft202012Validator(schema).validate(json.loads(json.dumps(made.arguments)))
            else:
                assert (made.name, made.arguments) == ("noop", {})
        figures["finished"] += 1
        figures["calls"] += len(reply.tool_calls)
    return figures


def report(figures: dict[str, Any]) -> None:
    times = sorted(figures["ms"])
    p50, p99 = times[len(times) // 2], times[int(len(times) * 0.99)]
    counts = ", ".join(f"{value} {name}" for name, value in figures.items() if name != "ms")
    print(f"{counts}; compile p50 {p50:.1f} ms, p99 {p99:.1f} ms")


@pytest.mark.parametrize(
    "seeds", [range(60), pytest.param(range(1000, 2000), marks=pytest.mark.slow)], ids=["60", "1000"]
)
def test_every_finished_call_is_valid(vocabulary: Vocabulary, seeds: range) -> None:
    figures = sampled_calls(vocabulary, seeds)
    report(figures)
    assert figures["compiled"] >= 0.95 * len(seeds)
    assert figures["finished"] >= 0.9 * len(seeds)


@pytest.mark.parametrize(
    "seeds", [range(60), pytest.param(range(1000, 2000), marks=pytest.mark.slow)], ids=["60", "1000"]
)
def test_every_finished_text_is_valid(vocabulary: Vocabulary, seeds: range) -> None:
    figures: dict[str, Any] = {"schemas": len(seeds), "compiled": 0, "finished": 0, "ms": []}
    for seed in seeds:
        schema = Schemas(seed).parameters()
        started = time.perf_counter()
        grammar = vocabulary.json_schema(schema, strict=False, field="schema")
        figures["ms"].append((time.perf_counter() - started) * 1e3)
        figures["compiled"] += not grammar.unenforced
        constraint = ReplyRules(small_tokenizer(), vocabulary, content=grammar).begin("content", None)
        ids = sample(constraint, torch.Generator().manual_seed(seed))
        if ids is not None:
            Draft202012Validator(schema).validate(json.loads(parse(ids).text))
            figures["finished"] += 1
    report(figures)
    assert figures["compiled"] >= 0.95 * len(seeds)
    assert figures["finished"] >= 0.9 * len(seeds)


@pytest.mark.parametrize("budget", [0, 4, 16, 256])
@pytest.mark.parametrize("state", ["start", "thought"])
def test_thoughts_stay_within_their_budget_and_leave_an_answer(budget: int, state: Any) -> None:
    rules = ReplyRules(small_tokenizer(), budget=budget)
    for seed in range(20):
        ids = sample(rules.begin(state, 400), torch.Generator().manual_seed(seed), limit=400) or [0] * 400
        parser = Parser(small_tokenizer(), state)
        reply = Reply.of([*parser.push(ids), *parser.finish("stop")])
        # A thought that the prompt opened costs at least its closing token.
        assert reply.usage.reasoning_tokens <= max(budget, 1 if state == "thought" else 0)
        assert reply.usage.completion_tokens > reply.usage.reasoning_tokens


def test_a_small_room_shrinks_the_budget() -> None:
    rules = ReplyRules(small_tokenizer(), budget=256)
    for room in (1, 8, 24, 64):
        constraint = rules.begin("start", room)
        ids = sample(constraint, torch.Generator().manual_seed(room), limit=room) or []
        parser = Parser(small_tokenizer())
        parser.push(ids)
        assert parser.reasoning_tokens <= max(0, room - max(16, room // 4))


def test_thinking_stays_free_and_the_schema_begins_after_it(vocabulary: Vocabulary) -> None:
    tokenizer = small_tokenizer()
    constraint = ReplyRules(tokenizer, vocabulary, content=vocabulary.regex("[0-9]{3}", "regex")).begin("start", None)
    row = torch.zeros(SIZE)
    constraint.mask(row)
    digits = {i for i in range(len(tokenizer)) if tokenizer.token_bytes(i).isdigit()}
    assert set(torch.nonzero(row == 0).flatten().tolist()) == digits | {tokenizer.channel_open}
    for token in [tokenizer.channel_open, *tokenizer.encode("thought\nfree { words"), tokenizer.channel_close]:
        constraint.advance(token)
    row = torch.zeros(SIZE)
    constraint.mask(row)
    assert set(torch.nonzero(row == 0).flatten().tolist()) == digits
    for token in tokenizer.encode("123"):
        constraint.advance(token)
    assert constraint.done()


def test_auto_calls_are_free_until_one_opens(vocabulary: Vocabulary) -> None:
    tokenizer = small_tokenizer()
    grammar, _ = vocabulary.call([Tool("f", "", obj(a={"type": "integer"}) | {"required": ["a"]})])
    for many in (True, False):
        constraint = ReplyRules(tokenizer, vocabulary, call=grammar, many_calls=many).begin("start", None)
        row = torch.zeros(SIZE)
        constraint.mask(row)
        assert bool((row == 0).all())
        for token in tokenizer.encode_raw("Let me see.<|tool_call>", special_tokens=True):
            constraint.advance(token)
        assert tokenizer.decode(constraint.forced()).startswith("call:f{a:"[:1])
        for token in tokenizer.encode_raw("call:f{a:7}<tool_call|>", special_tokens=True):
            row = torch.zeros(SIZE)
            constraint.mask(row)
            assert row[token] == 0
            constraint.advance(token)
        assert constraint.done() is not many


def test_without_tools_no_call_and_no_second_thought() -> None:
    tokenizer = small_tokenizer()
    constraint = ReplyRules(tokenizer, budget=8).begin("content", None)
    row = torch.zeros(SIZE)
    constraint.mask(row)
    assert set(torch.nonzero(row != 0).flatten().tolist()) == {tokenizer.channel_open, tokenizer.tool_call_open}
