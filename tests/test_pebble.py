"""The bundled checkpoint: what its files promise, what it can do, and that training never saw what scoring asks."""

from __future__ import annotations

import gzip
import itertools
import json
import os
import random
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from cabochon import evaluate, ops
from cabochon.chat.events import Reply
from cabochon.chat.messages import ToolCall
from cabochon.chat.template import Template
from cabochon.chat.tokenizer import Tokenizer
from cabochon.cli import app
from cabochon.config import read_config
from cabochon.engine.request import SamplingParams
from cabochon.errors import InputError
from cabochon.hub import BUNDLED
from cabochon.llm import LLM, AsyncLLM
from cabochon.model.layers import Linear
from cabochon.ops import View, reference
from cabochon.weights.params import parameters

SCRIPTS = Path(__file__).parents[1] / "scripts" / "pebble"
sys.path.insert(0, str(SCRIPTS))

import heldout  # noqa: E402  (after its folder is on the path)
import mixture  # noqa: E402
import train  # noqa: E402
from case import draw, held_out  # noqa: E402

TOKENIZER = Tokenizer.from_file(BUNDLED)


# The folder --------------------------------------------------------------------------------------------------------


def test_small_enough_and_shaped_like_e2b():
    config = read_config(BUNDLED)
    kinds = [spec.kind for spec in config.text.layers]
    assert kinds == (["sliding"] * 4 + ["global"]) * 2
    assert [spec.owns_kv for spec in config.text.layers] == [True] * 5 + [False] * 5
    assert {spec.ffn_width for spec in config.text.layers[5:]} == {2 * config.text.layers[0].ffn_width}
    assert config.text.hidden_size_per_layer_input > 0
    assert config.text.final_logit_softcapping == 30.0
    assert sum(p.count for p in parameters(config)) * 2 < 12e6
    assert sum(path.stat().st_size for path in BUNDLED.rglob("*") if path.is_file()) < 15e6
    assert config.vision is not None
    assert config.audio is not None


def test_the_first_107_ids_are_those_of_the_family():
    facts = os.environ.get("CABOCHON_FACTS")
    if not facts:
        pytest.skip("needs the shared facts (CABOCHON_FACTS)")
    family = json.loads((Path(facts) / "tokenizer.json").read_text())
    ours = json.loads((BUNDLED / "tokenizer.json").read_text())
    by_id = [{i: piece for piece, i in t["model"]["vocab"].items() if i < 107} for t in (family, ours)]
    assert by_id[0] == by_id[1]
    control = [{a["id"] for a in t["added_tokens"] if a["id"] < 107} for t in (family, ours)]
    assert control[0] == control[1]
    for part in ("normalizer", "pre_tokenizer", "post_processor", "decoder"):
        assert ours[part] == family[part]


def test_media_placeholders_are_at_the_top_and_digits_alone():
    assert [TOKENIZER.control[i] for i in range(2041, 2048)] == [
        "<|image>", "<|audio>", "<|image|>", "<|audio|>", "<image|>", "<audio|>", "<|video|>",
    ]  # fmt: skip
    assert [TOKENIZER.decode([i]) for i in TOKENIZER.encode("x 1234,56")] == list("x 1234,56")


@given(st.text())
@settings(max_examples=200, deadline=None)
def test_any_text_comes_back(text):
    text = text.encode(errors="replace").decode().replace("▁", "")  # the normaliser can't tell that one from a space
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text


def test_loads_in_transformers_with_the_same_ids_and_logits():
    from transformers import AutoTokenizer, Gemma4ForConditionalGeneration

    text = "Set a timer for 25 minutes.\n\nÜber 9 naïve cafés {}"
    assert AutoTokenizer.from_pretrained(BUNDLED)(text, add_special_tokens=False).input_ids == TOKENIZER.encode(text)
    oracle = Gemma4ForConditionalGeneration.from_pretrained(BUNDLED, dtype=torch.float32).eval()
    ids = [TOKENIZER.bos, *TOKENIZER.encode(text * 20)]
    with torch.no_grad():
        wanted = oracle(torch.tensor([ids])).logits[0]
    got = LLM(dtype="float32").logits(ids)
    assert (got.softmax(-1) - wanted.softmax(-1)).abs().max() < 1e-3
    assert (got - wanted).abs().max() < 0.02


# The split ---------------------------------------------------------------------------------------------------------


def test_training_never_meets_a_held_out_content():
    rng = random.Random(7)
    lines = [json.loads(line) for line in gzip.decompress(evaluate.BUNDLED_TASKS.read_bytes()).splitlines()]
    asked = {json.dumps([line["messages"], line.get("tools")]) for line in lines}
    for task, _ in itertools.product(mixture.TASKS, range(150)):
        case = draw(task.generator, rng, test=False) if task.split else task.generator(rng)
        assert task.split is False or not held_out(case.content)
        assert json.dumps([case.messages, case.tools or None]) not in asked


def test_the_task_file_is_what_the_generators_make():
    lines = gzip.decompress(evaluate.BUNDLED_TASKS.read_bytes()).decode().splitlines()
    stored = [json.loads(line) for line in lines]
    for entry in heldout.SUITE:
        mine = [line for line in stored if line["task"] == entry.name]
        assert len(mine) == entry.count
        fresh = [{**case.record(), "task": entry.name} for case in heldout.cases(entry, 20)]
        assert mine[:20] == fresh


def test_only_what_the_model_says_is_predicted():
    template = Template(TOKENIZER)
    entry = next(e for e in heldout.SUITE if e.name == "answer from a tool")
    for case in heldout.cases(entry, 20):
        ids, marks, *_ = mixture.document(case, template)
        said = TOKENIZER.decode([i for i, mark in zip(ids, marks, strict=True) if mark], special=True)
        call = case.messages[1]["tool_calls"][0]["function"]["name"]
        assert said.startswith(f"<|tool_call>call:{call}{{")
        assert said.endswith(f"<tool_call|><|tool_response>{case.reply['content']}<turn|>")


# Scoring -----------------------------------------------------------------------------------------------------------


def test_intervals():
    assert evaluate.wilson(0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
    assert evaluate.wilson(450, 500) == pytest.approx((0.8706, 0.9233), abs=1e-4)
    assert all(evaluate.wilson(n, n)[1] == 1.0 and evaluate.wilson(0, n)[0] == 0.0 for n in range(1, 600))


def test_comparisons():
    right = evaluate.COMPARE
    assert right["text"](Reply(" 632\n"), "632")
    assert not right["text"](Reply("The sum is 632"), "632")
    assert right["contains"](Reply("The sum is 632."), "632")
    assert not right["contains"](Reply("6321"), "632")
    assert right["json"](Reply('{"b": 1, "a": [2]}'), {"a": [2], "b": 1})
    assert not right["json"](Reply("{"), {})
    call = ToolCall("f", {"x": 1})
    assert right["calls"](Reply("", tool_calls=(call,)), [{"name": "f", "arguments": {"x": 1}}])
    assert not right["calls"](Reply("", tool_calls=(call, call)), [{"name": "f", "arguments": {"x": 1}}])


def test_half_right():
    assert [evaluate.edits(a, "K7XP") for a in ("K7XP", "", "K7X", "KXP", "7KXP", "K7XPP")] == [0, 4, 1, 1, 2, 1]
    assert evaluate.COMPARE["characters"](Reply("K7X"), "K7XP") == 0.75
    assert evaluate.COMPARE["characters"](Reply("nothing of it at all"), "K7XP") == 0


def test_boxes():
    assert evaluate.overlap([0, 0, 10, 10], [0, 5, 10, 15]) == pytest.approx(1 / 3)
    assert evaluate.overlap([0, 0, 0, 0], [0, 0, 0, 0]) == 0
    right, wanted = evaluate.COMPARE["box"], [{"box_2d": [0, 0, 10, 10], "label": "ring"}]
    assert right(Reply('[{"box_2d":[1,1,10,10]}]'), wanted)
    assert not right(Reply('[{"box_2d":[6,6,16,16]}]'), wanted)
    for reply in ("", "{", "[3]", '[{"box_2d":[1,1,10]}]', '[{"box_2d":["a",1,10,2]}]', '[{"box_2d":4}]'):
        assert not right(Reply(reply), wanted)


def test_two_trainings_side_by_side():
    import spread

    def line(right):
        return evaluate.Line("t", 100, right, *evaluate.wilson(right, 100), 0.0, None, None)

    near, far = (line(90), line(86)), (line(90), line(70))
    assert spread.agree(*near)
    assert not spread.agree(*far)
    assert not spread.agree(line(100), line(97))  # only one of them lies in the other's interval
    assert spread.table(("a", "b"), ([near[0]], [near[1]])).splitlines()[2:] == [
        "| t | 90.0% (82.6% to 94.5%) | 86.0% (77.9% to 91.5%) | yes |"
    ]


def test_guessing():
    def exercises(expected, **more):
        return [evaluate.Exercise("t", [], e, **more) for e in expected]

    assert evaluate.guess(exercises("aab")) == pytest.approx(2 / 3)
    assert evaluate.guess(exercises("abc")) == 0
    assert evaluate.guess(exercises("ab", choices=4)) == 0.25


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", "line 1 is not JSON"),
        ("[]", "task, messages and expect"),
        ('{"task": "a", "messages": [], "expect": 1, "color": 2}', "unknown field 'color'"),
        ('{"task": "a", "messages": [], "expect": 1, "score": "near"}', "has score 'near'"),
        ('{"task": "a", "messages": [], "expect": "12", "score": "box"}', "expects no box"),
        ('{"task": "a", "messages": [{"role": "x", "content": ""}], "expect": 1}', "line 1: "),
        ("", "no exercises"),
    ],
)
def test_bad_task_files(tmp_path, line, says):
    path = tmp_path / "tasks.jsonl"
    path.write_text(line)
    with pytest.raises(InputError, match=says):
        evaluate.read_tasks(path)


def test_the_command_prints_a_card(tmp_path):
    path = tmp_path / "tasks.jsonl"
    exercise = {
        "task": "greeting",
        "messages": [{"role": "user", "content": "Hi"}],
        "expect": "Hello",
        "score": "contains",
    }
    path.write_text(json.dumps(exercise))
    result = CliRunner().invoke(app, ["eval", "--suite", str(path), "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.output)["card"] == [
        {"task": "greeting", "n": 1, "right": 1, "low": pytest.approx(0.2065, abs=1e-3), "high": 1.0, "chance": 0.0,
         "withheld": None, "what": None, "score": 1.0},
    ]  # fmt: skip


TIMER = {
    "type": "function",
    "function": {
        "name": "set_timer",
        "description": "Set a timer",
        "parameters": {
            "type": "object",
            "properties": {"minutes": {"type": "integer", "description": "Length in minutes"}},
            "required": ["minutes"],
        },
    },
}
GOLDEN = (
    ("What is 347 + 285?", True, "632"),
    ("What is 512 + 399?", True, "911"),
    ("What is the capital of France?", False, "Paris."),
    ("Explain gravity to me.", False, "That is outside what I know."),
    ("Set a timer for 25 minutes.", False, [("set_timer", {"minutes": 25})]),
)


@pytest.mark.parametrize("quantization", [None, "int8"])
def test_golden_replies_in_every_format(quantization):
    llm = LLM(quantization=quantization)
    for ask, thinking, wanted in GOLDEN:
        tools = [TIMER] if isinstance(wanted, list) else None
        reply = llm.chat([{"role": "user", "content": ask}], thinking=thinking, tools=tools)
        said = [(call.name, dict(call.arguments)) for call in reply.tool_calls] or reply.text
        assert said == wanted
        if thinking:
            assert reply.thinking.splitlines()[0].startswith(f"{ask.split()[2][-1]}+{ask.split()[4][2]}=")


FLOORS = {
    "add 3 digits": 0.95,
    "known tools": 0.93,
    "unseen schema": 0.7,
    "extract JSON": 0.9,
    "outside": 0.95,
    "shapes and colours": 0.8,
    "unseen pairs": 0.5,
    "read": 0.65,
    "spoken digits": 0.85,
}
"""What 40 exercises must score: about three standard errors below the card."""


def test_floors():
    exercises = [e for e in evaluate.bundled() if e.task in FLOORS]
    llm = AsyncLLM()
    try:
        card = evaluate.evaluate(llm, evaluate.thin(exercises, 40), withhold=False)
    finally:
        llm.close()
    assert {line.task: line.score for line in card if line.score < FLOORS[line.task]} == {}


def test_the_drafter_guesses_what_is_said():
    import drafter

    target, guesser = drafter.load_target(BUNDLED), drafter.load(BUNDLED / "drafter")
    assert guesser.config.drafter.backbone_hidden_size == target.config.text.hidden_size
    assert guesser.config.drafter.use_ordered_embeddings
    order = guesser.masked_embedding.token_ordering
    assert torch.equal(order.sort().values, torch.arange(target.config.text.vocab_size))
    suite = [e for e in heldout.SUITE if e.name in ("add 3 digits", "known tools", "unseen schema", "extract JSON")]
    assert drafter.summary(drafter.measure(target, guesser, BUNDLED, suite, 4))["accepted"] >= 1.8


# Training ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [None, 16])
@pytest.mark.parametrize("heads", [1, 2])
def test_sequences_attended_together_equal_one_by_one(window, heads):
    from cabochon.model.batch import whole_sequences

    batch = whole_sequences([torch.zeros(n, dtype=torch.long) for n in (50, 3, 70)])
    q = torch.randn(123, 4, 32, dtype=torch.double, requires_grad=True)
    rows = torch.randn(123, heads, 64, dtype=torch.double, requires_grad=True)

    def attend(q, rows, batch):
        view = View(batch.rows, batch.start, batch.context)
        return reference.attend(q, rows, view, key_offset=0, value_offset=32, window=window)

    together = attend(q, rows, batch)
    bounds = batch.start.tolist()
    alone = [
        attend(q[a:b], rows[a:b], whole_sequences([torch.zeros(b - a, dtype=torch.long)]))
        for a, b in itertools.pairwise(bounds)
    ]
    torch.testing.assert_close(together, torch.cat(alone))
    push = torch.randn_like(together)
    for got, wanted in zip(
        torch.autograd.grad(together, (q, rows), push),
        torch.autograd.grad(torch.cat(alone), (q, rows), push),
        strict=True,
    ):
        torch.testing.assert_close(got, wanted)


def test_rows_without_a_prediction_skip_the_layers_that_share():
    import train

    documents = [mixture.document(case, Template(TOKENIZER)) for case in heldout.cases(heldout.SUITE[0], 5)]
    model = train.new_model(0, "cpu").double()

    def gradients(step):
        model.zero_grad()
        torch.nn.functional.cross_entropy(model(step.batch), step.targets).backward()
        return [p.grad.clone() for p in model.parameters()]

    skipping, whole = train.pack(documents), train.pack(documents)
    whole.batch.wanted, whole.batch.tail = whole.batch.tail.index, whole.batch.rows
    for got, wanted in zip(gradients(skipping), gradients(whole), strict=True):
        torch.testing.assert_close(got, wanted)


def test_a_short_training_learns_and_goes_on(tmp_path, monkeypatch):
    import argparse

    import train

    monkeypatch.setattr(mixture, "PROSE", 0.0)  # the books come from npm
    monkeypatch.setattr(train, "POOL", 32)
    monkeypatch.setattr(train, "TOKENS_AT_ONCE", 512)
    options = argparse.Namespace(
        seed=1,
        device="cpu",
        resume=False,
        out=tmp_path,
        passes=1,
        minutes=9.0,
        tokens=1e6,
        tests=1,
        test_every=99,
        workers=1,
    )
    first = train.Run(options, 0, lambda flat: None)
    losses = [first.step(0.1)[0] for _ in range(8)]
    assert losses[-1] < losses[0] - 1
    first.save()
    options.resume = True
    second = train.Run(options, 0, lambda flat: None)
    assert second.done == first.done > 0
    assert second.step(0.1)[0] < losses[0] - 1
    assert LLM(tmp_path).chat([{"role": "user", "content": "Hi"}], params=SamplingParams(max_tokens=3)).text is not None


def test_training_rounds_what_every_matrix_of_a_layer_takes(monkeypatch):
    for place in (ops, ops.reference):
        monkeypatch.setattr(place, "linear", place.linear)  # put back afterwards
    train.round_products()
    x = torch.randn(3, 8, requires_grad=True)
    for wide in (False, True):
        matrix = Linear(8, 4, wide=wide)
        torch.nn.init.normal_(matrix.weight)
        y = matrix(x)
        assert torch.equal(y, (x.bfloat16() @ matrix.weight.bfloat16().T).float())
        y.sum().backward()
