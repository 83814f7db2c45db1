"""The drafter against the reference implementation, and its two ways of seeing the target: whole rows and pages."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import DynamicCache
from transformers.models.gemma4.configuration_gemma4 import Gemma4TextConfig
from transformers.models.gemma4_assistant import Gemma4AssistantConfig, Gemma4AssistantForCausalLM
from transformers.models.gemma4_unified.configuration_gemma4_unified import Gemma4UnifiedTextConfig
from transformers.models.gemma4_unified_assistant import (
    Gemma4UnifiedAssistantConfig,
    Gemma4UnifiedAssistantForCausalLM,
)

from cabochon.config import read_config
from cabochon.model import fused
from cabochon.model.drafter import Drafter, Stored
from cabochon.ops import Past, Rows, cpu
from cabochon.weights.load import place, quantizer
from cabochon.weights.params import parameters
from support.reference import oracle
from support.toys import SIZES, WINDOW, calm_, random_ids, toy_drafter_json, toy_model, with_dtype

STEPS = 3
NOISE = 3e-5
"""The reference takes angles in float32 and its constants where we do not; wrong semantics differ by 1e-2 and more."""


def drafter(size: str) -> Drafter:
    model = Drafter(read_config(with_dtype(toy_drafter_json(size), torch.float64))).double()
    return calm_(model).eval()


def stored_rows(size: str, ids: list[int], dtype: torch.dtype = torch.float64) -> tuple[Stored, torch.Tensor]:
    """What the target stores of `ids`, and its hidden state of the last."""
    from cabochon.model.batch import whole_sequences

    model = toy_model(size, dtype=dtype)
    text, rows = model.language_model, {}
    with torch.no_grad():
        hidden = text.hidden(whole_sequences([torch.tensor(ids)]), rows)[-1:]
    weights = {layer.spec.kind: layer.self_attn.k_norm.weight for layer in text.layers if layer.spec.owns_kv}
    last = torch.tensor([len(ids) - 1], dtype=torch.int32)
    asks = Rows(torch.zeros(1, dtype=torch.long), torch.tensor([0, 1], dtype=torch.int32), last, last, 1)
    start, context = torch.tensor([0, len(ids)], dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    return Stored(asks, start, context, rows, k_weight=weights), hidden


def reference_drafter(size: str, monkeypatch: pytest.MonkeyPatch) -> torch.nn.Module:
    """Its config class refuses a network in which all layers share, which every assistant is."""
    reuse = property(lambda config: ["reuse"] * config.num_hidden_layers)
    monkeypatch.setattr(Gemma4TextConfig, "kv_sharing_modes", reuse)
    monkeypatch.setattr(Gemma4UnifiedTextConfig, "kv_sharing_modes", reuse)
    raw = with_dtype(toy_drafter_json(size), torch.float64)
    if raw["model_type"] == "gemma4_unified_assistant":
        made = Gemma4UnifiedAssistantForCausalLM(Gemma4UnifiedAssistantConfig.from_dict(raw))
    else:
        made = Gemma4AssistantForCausalLM(Gemma4AssistantConfig.from_dict(raw))
    return calm_(made.double()).eval()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("length", [WINDOW // 2, 3 * WINDOW])
def test_a_burst_equals_the_reference(size, length, monkeypatch):
    ids, newest = random_ids(length, 5), torch.tensor([7])
    target, ours = toy_model(size, dtype=torch.float64), drafter(size)
    stored, hidden = stored_rows(size, ids)
    with torch.no_grad():
        # A cache that was not told of the config keeps all rows; sizes without KV sharing hand out no shared states.
        said = oracle(size)(torch.tensor([ids]), output_hidden_states=True, past_key_values=DynamicCache())
    assert (said.hidden_states[-1][0, -1] - hidden[0]).abs().max() < NOISE
    # The published mask lets sliding layers see one row more than the window where the cache still has it.
    owners = {spec.kind: spec.index for spec in target.config.text.layers if spec.owns_kv}
    shared = {
        name: tuple(x[:, :, -kept:] for x in (caches.keys, caches.values))
        for name, kept, caches in (
            ("sliding_attention", WINDOW, said.past_key_values.layers[owners["sliding"]]),
            ("full_attention", length, said.past_key_values.layers[owners["global"]]),
        )
    }
    theirs = reference_drafter(size, monkeypatch)
    scale, their_hidden = math.sqrt(target.config.text.hidden_size), said.hidden_states[-1][:, -1:]
    with torch.no_grad():
        for _ in range(STEPS):
            embedded = target.language_model.embed_tokens(newest, scale)
            x, hidden = ours(embedded, hidden, stored)
            out = theirs(
                inputs_embeds=torch.cat([embedded[None], their_hidden], -1),
                position_ids=torch.tensor([[length]]),
                shared_kv_states=shared,
            )
            their_hidden = out.last_hidden_state
            assert (hidden - their_hidden[0]).abs().max() < NOISE
            assert (ours.logits(x) - out.logits[0]).abs().max() < NOISE
            newest = ours.likeliest(x)
            assert newest == out.logits[0].argmax(-1)
            assert out.logits.std() > 0.1


@pytest.mark.parametrize("size", SIZES)
def test_pages_are_seen_like_rows(size):
    """What was stored may lie in pages in any order, and in part in the rows of the step."""
    ids, page, split = random_ids(3 * WINDOW, 6), 4, WINDOW + 4
    target, model = toy_model(size, dtype=torch.float64).language_model, drafter(size)
    whole, hidden = stored_rows(size, ids)
    order = torch.randperm(len(ids) // page)
    pages, past = {}, {}
    for kind, rows in whole.step.items():
        paged = torch.zeros(len(order), page, *rows.shape[1:], dtype=rows.dtype)
        paged[order] = rows.unflatten(0, (-1, page))
        pages[kind] = paged
        none = torch.full((len(ids) - split,), -1)
        past[kind] = Past(order[None].int(), torch.zeros(1, dtype=torch.int32), none, split)
    mixed = Stored(
        whole.rows,
        torch.tensor([0, len(ids) - split], dtype=torch.int32),
        torch.tensor([split], dtype=torch.int32),
        {kind: rows[split:] for kind, rows in whole.step.items()},
        pages,
        past,
        whole.k_weight,
    )
    newest = torch.tensor([9])
    with torch.no_grad():
        assert torch.equal(model.burst(target, newest, hidden, whole, 4), model.burst(target, newest, hidden, mixed, 4))
        embedded = target.embed_tokens(newest, 1.0)
        torch.testing.assert_close(model(embedded, hidden, whole)[1], model(embedded, hidden, mixed)[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("format", [None, "int8", "int4"])
@pytest.mark.parametrize("size", SIZES)
def test_a_burst_in_few_calls_equals_the_ops(size, format, dtype, monkeypatch):
    """Bit for bit."""
    target = toy_model(size, dtype=dtype).language_model
    model = calm_(Drafter(read_config(with_dtype(toy_drafter_json(size), dtype))).to(dtype)).eval()
    convert = quantizer(format, panels=bool(cpu.supported()))
    for param in parameters(model.config):
        place(model, param.name, convert(param, model.state_dict()[param.name]))
    stored, hidden = stored_rows(size, random_ids(3 * WINDOW, 5), dtype)
    calls, run = [], fused.FusedLayers.run
    monkeypatch.setattr(fused.FusedLayers, "run", lambda *a: calls.append(run(*a)) or calls[-1])
    newest = torch.tensor([7])
    with torch.inference_mode():
        embedded = target.embed_tokens(newest, 1.0)
        whole, guesses = model(embedded, hidden, stored), model.burst(target, newest, hidden, stored, STEPS)
        monkeypatch.setattr(fused, "fused", lambda layers, x, last_reader: None)
        single = model(embedded, hidden, stored)
        assert torch.equal(guesses, model.burst(target, newest, hidden, stored, STEPS))
    assert all(torch.equal(a, b) for a, b in zip(whole, single, strict=True))
    assert all(y is not None for y in calls)
    assert len(calls) == 2 * (1 + STEPS) * bool(cpu.supported())


def test_far_clusters_get_one_less_than_the_least_candidate():
    model = drafter("E2B")
    x = torch.randn(5, model.config.text.hidden_size, dtype=torch.float64)
    out = model.logits(x)
    floor = out.amin(-1, keepdim=True)
    inside = out > floor
    assert inside.sum(-1).eq(8 * 10).all()  # eight clusters of ten tokens
    torch.testing.assert_close(torch.where(inside, out, torch.inf).amin(-1, keepdim=True) - 1.0, floor)
