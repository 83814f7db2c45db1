"""Rounding for the inputs that come: beside the textbook's way, through whole networks, and from the command line."""

import json

import pytest
import torch

from cabochon import LLM
from cabochon.calibrate import walk
from cabochon.calibrate.texts import Sample, read_samples, sequences
from cabochon.calibrate.walk import calibrated
from cabochon.errors import CheckpointError, InputError
from cabochon.hub import BUNDLED
from cabochon.llm.loading import load
from cabochon.model.batch import whole_sequences
from cabochon.model.gemma4 import Gemma4
from cabochon.quant import QuantTensor, dequantize, fitted_scales, quantize
from cabochon.rounding import AGAIN, DAMPING, Moments, quantize_for
from cabochon.weights import convert
from cabochon.weights.checkpoint import open_checkpoint
from cabochon.weights.load import fill
from cabochon.weights.params import as_kept, parameters
from support.toys import SIZES, save_toy


def inputs(tokens: int, width: int) -> torch.Tensor:
    """Rows whose numbers go together: a few directions carry most."""
    mixed = torch.randn(tokens, width) * torch.linspace(0.05, 2, width)
    return mixed @ torch.randn(width, width) / width**0.5


def moments(x: torch.Tensor, exact: torch.Tensor) -> Moments:
    made = Moments.none(x.shape[1])
    for some, target in zip(x.split(100), exact.split(100), strict=True):
        made.add(some, target)
    return made


def textbook(weight: torch.Tensor, x: torch.Tensor, exact: torch.Tensor, format: str) -> torch.Tensor:
    """One column after the other over the whole rest, the inverse reduced by elimination; least squares first. Then
    each number goes where the loss is least, as all others are."""
    x, exact, rows = x.double(), exact.double(), weight.double().clone()
    low, high = (-8, 7) if format == "int4" else (-127, 127)
    own = x.T @ x
    own += torch.eye(len(own), dtype=torch.float64) * DAMPING * own.diagonal().mean()
    inverse = own.inverse()
    rows += rows @ ((exact - x).T @ x) @ inverse
    target = rows.clone()
    squares = x.square().sum(0)
    groups = [torch.arange(first, min(first + 32, len(own))) for first in range(0, len(own), 32)]
    groups.sort(key=lambda group: (len(group) < 32, -squares[group].sum()))
    scales = torch.zeros(rows.shape[0], len(own), dtype=torch.float64)
    scales[:] = rows.abs().amax(-1, keepdim=True).float().double() / 127
    levels = torch.zeros_like(rows)
    for group in groups:
        if format == "int4":
            filled = torch.zeros(rows.shape[0], 32)
            filled[:, : len(group)] = rows[:, group]
            scales[:, group] = fitted_scales(filled).double()[:, None]
        for j in group[squares[group].argsort(descending=True)]:
            levels[:, j] = (rows[:, j] / scales[:, j]).round().clamp(low, high)
            lost = (rows[:, j] - levels[:, j] * scales[:, j]) / inverse[j, j]
            rows -= lost[:, None] * inverse[j]
            inverse -= torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    for _ in range(AGAIN):
        for group in groups:
            for j in group[squares[group].argsort(descending=True)]:
                slope = (target - levels * scales) @ own[:, j]
                levels[:, j] = (levels[:, j] + slope / own[j, j] / scales[:, j]).round().clamp(low, high)
    return levels * scales


@pytest.mark.parametrize("width", [32, 70, 160])
@pytest.mark.parametrize("format", ["int8", "int4"])
def test_same_as_column_by_column(monkeypatch, format, width):
    monkeypatch.setattr("cabochon.rounding.NUMBERS_AT_ONCE", 16 * width)
    x = inputs(400, width)
    exact, weight = x + 0.1 * inputs(400, width), torch.randn(40, width)
    (rounded,) = quantize_for(moments(x, exact), [weight], format)
    slow = textbook(weight, x, exact, format)
    # A number that lies between two codes may take either, and all behind it in its row with it.
    same = torch.isclose(dequantize(rounded).double(), slow, rtol=1e-4, atol=0).all(-1)
    assert same.float().mean() >= 0.9


@pytest.mark.parametrize("format", ["int8", "int4"])
def test_products_suffer_less_than_from_nearest_codes(format):
    x, weight = inputs(600, 128), torch.randn(64, 128)
    (rounded,) = quantize_for(moments(x, x), [weight], format)
    lost, plain = ((x @ (dequantize(w) - weight).T).square().sum() for w in (rounded, quantize(weight, format)))
    assert lost < 0.7 * plain


def test_errors_of_the_inputs_are_made_good_in_part():
    exact, weight = inputs(600, 128), torch.randn(64, 128)
    x = exact @ (torch.eye(128) + 0.1 * torch.randn(128, 128) / 128**0.5)
    errors = []
    for target in (exact, x):
        (rounded,) = quantize_for(moments(x, target), [weight], "int8")
        errors.append((exact @ weight.T - x @ dequantize(rounded).T).square().sum())
    assert errors[0] < 0.3 * errors[1]


def test_too_few_tokens_teach_nothing():
    weight, x = torch.randn(8, 64), torch.randn(63, 64)
    (rounded,) = quantize_for(moments(x, x), [weight], "int4")
    assert torch.equal(rounded.codes, quantize(weight, "int4").codes)


def test_inputs_that_are_always_zero_round_to_the_nearest():
    weight, x = torch.randn(8, 64), torch.zeros(64, 64)
    (rounded,) = quantize_for(moments(x, x), [weight], "int4")
    assert torch.equal(rounded.codes, quantize(weight, "int4").codes)


def test_what_is_no_number_is_told():
    x = torch.randn(64, 32)
    x[3, 4] = torch.inf
    with pytest.raises(CheckpointError, match="infinities"):
        quantize_for(moments(x, x), [torch.randn(4, 32)], "int4")


# Networks -------------------------------------------------------------------------------------------------------------


def rounded_alone(found, param) -> QuantTensor:
    return quantize(convert.fetch(found.source, param).bfloat16(), param.format("bfloat16", "int4").name)


def token_ids(count: int, length: int = 40) -> list[list[int]]:
    return torch.randint(0, 300, (count, length)).tolist()


def apart(found) -> Gemma4:
    """The plain network whose head is a matrix of its own."""
    config = as_kept(found.config, "int4")
    with torch.device("meta"):
        network = Gemma4(config)
    fill(network, found.source, config, dtype=torch.float32)
    return network


def moved(network, found, sequences) -> torch.Tensor:
    """Mean KL of a network with the weights `found` to the plain one, on `sequences`."""
    batch = whole_sequences([torch.tensor(ids) for ids in sequences])
    with torch.inference_mode():
        before = network(batch).log_softmax(-1)
        for name, weight in found.items():
            walk.place(network, name, dequantize(weight))
        after = network(batch).log_softmax(-1)
    return (before.exp() * (before - after)).sum(-1).mean()


@pytest.mark.parametrize("size", SIZES)
def test_every_shape_goes_through(tmp_path, size):
    save_toy(tmp_path, size)
    found = open_checkpoint(tmp_path)
    made = dict(calibrated(found, token_ids(60), "int4"))
    assert [param.name for param in made] == [param.name for param in parameters(as_kept(found.config, "int4"))]
    matrices = {param.name: weight for param, weight in made.items() if isinstance(weight, QuantTensor)}
    assert {param.name for param in made if param.quantize} == set(matrices)
    plain = {p.name: rounded_alone(found, p) for p in made if p.quantize}
    for name, weight in matrices.items():
        assert (weight.shape, weight.codes.shape, weight.scales.shape) == (
            plain[name].shape,
            plain[name].codes.shape,
            plain[name].scales.shape,
        )
        assert torch.equal(weight.codes, plain[name].codes) == ("embed" in name)
    unseen = token_ids(8)
    here, there = (moved(apart(found), weights, unseen) for weights in (matrices, plain))
    assert here < there


@pytest.mark.parametrize("size", SIZES)
def test_a_layer_in_stages_is_the_layer(tmp_path, size):
    """What the texts go through is `Layer.forward`, to the bit."""
    save_toy(tmp_path, size)
    text = load(tmp_path, dtype="float32").model.language_model
    batch = whole_sequences([torch.tensor(ids) for ids in token_ids(3, 20)])
    with torch.inference_mode():
        x = text.embed(batch)
        ple = text.per_layer_inputs(x, batch)
        stream, step = walk._Stream(batch, x, ple), {}
        for i, layer in enumerate(text.layers):
            spec = layer.spec
            k_weight = text.layers[spec.reads_kv_of].self_attn.k_norm.weight if spec.k_eq_v else None
            angles = walk.angles_by_kind([spec], batch.rows.position)[spec.kind]
            x = layer(x, None if ple is None else ple[:, i], step, batch.view(spec, False), angles, k_weight)
            assert len(list(walk._stages(layer, stream, k_weight))) == len(walk._order(spec))
            assert torch.equal(stream.x, x)


def test_an_expert_that_hardly_any_token_reaches_is_rounded_plainly(tmp_path):
    save_toy(tmp_path, "26B-A4B")
    found = open_checkpoint(tmp_path)
    width = found.config.text.hidden_size
    made = {param.name: weight for param, weight in calibrated(found, token_ids(1, width + 10), "int4")}
    params = {param.name: param for param in parameters(found.config)}
    name = "language_model.layers.0.experts.gate_up_proj"
    plain = rounded_alone(found, params[name])
    same = [torch.equal(*pair) for pair in zip(made[name].codes, plain.codes, strict=True)]
    assert any(same)
    query = "language_model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(made[query].codes, rounded_alone(found, params[query]).codes)


# Texts ----------------------------------------------------------------------------------------------------------------


def test_texts_and_conversations_become_prompts_and_replies(tmp_path):
    file = tmp_path / "texts.jsonl"
    question = {"role": "user", "content": "What is 12 + 30?"}
    lines = [
        {"text": "Water boils at 100 degrees. " * 20},
        {"messages": [question, {"role": "assistant", "content": "42"}]},
        {"messages": [question], "task": "add", "expect": "42"},
    ]
    file.write_text("\n".join(map(json.dumps, lines)))
    llm, asked = LLM(dtype="float32"), []
    read = sequences(open_checkpoint(BUNDLED), "pebble", read_samples(file), 1000, lambda: asked.append(1) or llm)
    said = sorted(llm.tokenizer.decode(ids, special=True) for ids in read)
    assert len(said) == 3 and asked == [1]
    assert any(text.startswith("<bos>Water") for text in said)
    assert sum("42<turn|>" in text for text in said) == 2
    again = sequences(open_checkpoint(BUNDLED), "pebble", read_samples(file), 1000, lambda: llm)
    assert read == again


def test_a_long_text_is_cut_into_pieces_and_to_the_wish():
    samples = [Sample("a stone in the sun " * 4000)]
    read = sequences(open_checkpoint(BUNDLED), "pebble", samples, 5000, LLM)
    assert sum(map(len, read)) == 5000
    assert {ids[0] for ids in read} == {2} and max(map(len, read)) == 2048


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.txt", " ", "is empty"),
        ("a.jsonl", "", "is empty"),
        ("a.csv", "x", "no .txt, .jsonl or .jsonl.gz"),
        ("a.txt", b"\xff", "can't be read"),
        ("a.jsonl.gz", b"plain", "can't be read"),
        ("a.jsonl", "[]", "line 1 must be a JSON object with either text or messages"),
        ("a.jsonl", '{"text": "a", "messages": []}', "either text or messages"),
        ("a.jsonl", '\n{"text": ""', "line 2 is not JSON"),
        ("a.jsonl", '{"text": 3}', "empty or no string"),
        ("a.jsonl", '{"text": "a", "wight": 3}', "unknown field 'wight'"),
        ("a.jsonl", '{"messages": []}', "line 1"),
        ("a.jsonl", '{"messages": [{"role": "nobody", "content": "x"}]}', "line 1: "),
        ("a.jsonl", '{"messages": [{"role": "user", "content": "x"}], "thinking": 1}', "thinking 1"),
        ("a.txt", "Too short.", "takes at least 128"),
    ],
)
def test_bad_texts_are_told_in_one_sentence(tmp_path, name, content, expected):
    file = tmp_path / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=expected) as told:
        sequences(open_checkpoint(BUNDLED), "pebble", read_samples(file), 1000, LLM)
    assert len(str(told.value).splitlines()) == 1


def test_a_checkpoint_without_words_cannot_read(tmp_path):
    save_toy(tmp_path, "12B")
    with pytest.raises(InputError, match="no tokenizer"):
        sequences(open_checkpoint(tmp_path), "toy", [Sample("Hello")], 10, LLM)
