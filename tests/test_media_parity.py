"""Text with images, a video and a sound in between: the whole network against the reference, and the engine's part."""

from dataclasses import replace
from functools import cache

import pytest
import torch

from cabochon.engine.engine import Engine
from cabochon.engine.options import EngineOptions
from cabochon.engine.request import Request, SamplingParams
from support.greedy import greedy
from support.mixed_media import mixed
from support.reference import oracle
from support.toys import SIZES, toy_config, toy_model

ONE = SamplingParams(temperature=0.0, top_p=1.0, top_k=0, max_tokens=1)


def engine(size: str, **options: object) -> Engine:
    pool = {"block_size": 8, "num_blocks": (128, 128), "max_num_seqs": 8}
    return Engine(toy_model(size, media=True), EngineOptions(**(pool | options)), max_model_len=512)


def logits(server: Engine, prompt, name: str = "one") -> torch.Tensor:
    """[T, V] through the paged path."""
    parts = []

    def keep(_, part):
        parts.append(part.clone())

    server.add(Request(name, prompt.ids, ONE, spans=prompt.spans, sink=keep))
    while server.busy:
        server.step()
        server.check()
    return torch.cat(parts)


def prompt_of(size: str, seed: int = 1):
    return mixed(toy_config(size, media=True), seed=seed)


@cache
@torch.inference_mode()
def reference_logits(size: str) -> torch.Tensor:
    """In float64, except where the reference has an audio tower, whose attention insists on float32.

    The 12B's `forward` widens the full layers' masks as well; its `generate` does not and is right, so its masks are
    made here.
    """
    prompt, dtype = prompt_of(size), torch.float32 if size.startswith("E") else torch.float64
    network = oracle(size, dtype, media=True)
    inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in prompt.reference.items()}
    if size == "12B":
        from transformers.models.gemma4_unified import modeling_gemma4_unified as unified

        types = inputs.pop("mm_token_type_ids")
        blocks = unified.get_block_sequence_ids_for_mask(types, device="cpu")
        text = network.config.get_text_config()
        inputs["attention_mask"] = unified.create_masks_for_vision_model(
            config=text,
            inputs_embeds=torch.zeros(1, len(prompt.ids), text.hidden_size, dtype=dtype),
            attention_mask=None,
            past_key_values=None,
            position_ids=torch.arange(len(prompt.ids))[None],
            block_sequence_ids=blocks,
        )
    return network(input_ids=torch.tensor([prompt.ids]), **inputs).logits[0].double()


@pytest.mark.parametrize("chunk", [1000, 1, 7, 64])
@pytest.mark.parametrize("size", SIZES)
def test_logits_equal_the_reference(size, chunk):
    expected = reference_logits(size)
    got = logits(engine(size, max_num_batched_tokens=chunk), prompt_of(size))
    torch.testing.assert_close(got.double(), expected, atol=1e-4, rtol=0)
    print(f"{size}, chunks of {chunk}: {float((got.double() - expected).abs().max()):.1e}")


def replies(server: Engine, *prompts, tokens: int = 12) -> list[list[int]]:
    """Greedy replies of all prompts together."""
    for i, prompt in enumerate(prompts):
        request = Request(str(i), prompt.ids, greedy(tokens, ignore_eos=True), spans=prompt.spans)
        server.add(request)
    out: list[list[int]] = [[] for _ in prompts]
    while server.busy:
        for output in server.step():
            assert output.error is None, output.error
            out[int(output.request_id)] += output.token_ids
        server.check()
    return out


@pytest.mark.parametrize("size", ["E2B", "12B", "31B"])
def test_replies_do_not_depend_on_company_chunks_or_hits(size):
    prompts = [prompt_of(size, seed) for seed in (1, 2, 3)]
    single = [replies(engine(size), prompt)[0] for prompt in prompts]
    assert len({tuple(reply) for reply in single}) == 3, "the media should matter"
    shared = engine(size, max_num_batched_tokens=20)
    assert replies(shared, *prompts) == single
    assert replies(shared, *prompts) == single
    tight = engine(size, max_num_batched_tokens=40, num_blocks=(24, 30), max_num_seqs=3)
    assert replies(tight, *prompts) == single


@pytest.mark.parametrize("size", ["E2B", "12B"])
def test_every_item_is_encoded_once(size):
    prompt = prompt_of(size)
    server = engine(size, max_num_batched_tokens=9)
    replies(server, prompt, prompt_of(size))
    assert server.encoder.runs == len(prompt.spans)
    replies(server, prompt)
    assert server.encoder.runs == len(prompt.spans)


def test_features_go_when_others_need_the_room():
    server = engine("E2B", encoder_cache_tokens=30)
    first, second = prompt_of("E2B", 1), prompt_of("E2B", 2)
    replies(server, first)
    replies(server, second)
    assert server.encoder._held <= 30
    assert server.encoder.runs == len(first.spans) + len(second.spans)


@pytest.mark.parametrize("size", ["E2B", "31B"])
def test_prefix_hits_go_by_the_media_and_never_into_a_span(size):
    """The same text with the same images is a hit; with another first image nothing behind it is."""
    server = engine(size)
    prompt, other = prompt_of(size), prompt_of(size)
    first = prompt.spans[0]
    end = first.start + first.length + 1
    boundaries = (end, len(prompt.ids))
    other.spans = (
        replace(prompt.spans[0], key=b"another", item=mixed(toy_config(size, media=True), seed=5).spans[0].item),
        *prompt.spans[1:],
    )

    def ask(name: str, what) -> tuple[int, list[int]]:
        server.add(Request(name, what.ids, greedy(6, ignore_eos=True), spans=what.spans, boundaries=boundaries))
        outputs = []
        while server.busy:
            outputs += server.step()
            server.check()
        return outputs[-1].cached_tokens, [t for o in outputs for t in o.token_ids]

    cold, reply = ask("a", prompt)
    warm, again = ask("b", prompt)
    assert cold == 0 and warm >= end and again == reply
    changed, _ = ask("c", other)
    assert changed <= first.start
    for span in prompt.spans:
        assert not span.start < warm < span.start + span.length or not span.two_way


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda rows: rows[:-1], "gave 1 features for 2 placeholders"),
        (lambda rows: rows * torch.nan, "not finite"),
        (lambda rows: rows * 0, "all zero"),
    ],
)
def test_bad_features_end_their_own_request_only(monkeypatch, spoil, message):
    server = engine("E2B")
    good, bad = prompt_of("E2B", 1), prompt_of("E2B", 2)
    (alone,) = replies(engine("E2B"), good)
    culprit, real = bad.spans[-1], server.encoder.model.encode

    def encode(items):
        return [spoil(rows) if item is culprit.item else rows for item, rows in zip(items, real(items), strict=True)]

    monkeypatch.setattr(server.encoder.model, "encode", encode)
    for name, prompt in (("good", good), ("bad", bad)):
        server.add(Request(name, prompt.ids, greedy(12, ignore_eos=True), spans=prompt.spans))
    outputs = []
    while server.busy:
        outputs += server.step()
        server.check()
    error = next(o.error for o in outputs if o.request_id == "bad" and o.finish_reason == "error")
    assert message in error and f"tokens {culprit.start} to {culprit.start + culprit.length - 1}" in error
    assert [t for o in outputs if o.request_id == "good" for t in o.token_ids] == alone


def test_an_encoder_that_raises_ends_its_own_request_only(monkeypatch, caplog):
    server = engine("E2B")
    good, bad = prompt_of("E2B", 1), prompt_of("E2B", 2)
    real = server.encoder.model.encode

    def encode(items):
        if any(item is bad.spans[0].item for item in items):
            raise RuntimeError("no room")
        return real(items)

    monkeypatch.setattr(server.encoder.model, "encode", encode)
    for name, prompt in (("good", good), ("bad", bad)):
        server.add(Request(name, prompt.ids, greedy(4, ignore_eos=True), spans=prompt.spans))
    outputs = []
    while server.busy:
        outputs += server.step()
    ends = {o.request_id: o for o in outputs if o.finish_reason}
    assert ends["good"].finish_reason == "length"
    assert ends["bad"].finish_reason == "error" and "could not be encoded: no room" in ends["bad"].error
