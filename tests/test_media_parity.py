"""Text with images, a video and a sound in between: the whole network against the reference, and the engine's part."""

from functools import cache

import pytest
import torch

from cabochon.engine.engine import Engine
from cabochon.engine.options import EngineOptions
from cabochon.engine.request import Request, SamplingParams
from support.mixed_media import mixed
from support.oracle import oracle
from support.toys import SIZES, toy_config, toy_model

ONE = SamplingParams(temperature=0.0, top_p=1.0, top_k=0, max_tokens=1)


def engine(size: str, **options: object) -> Engine:
    pool = {"block_size": 8, "num_blocks": (128, 128), "max_num_seqs": 8}
    return Engine(toy_model(size, media=True), EngineOptions(**(pool | options)), max_model_len=512)


def logits(server: Engine, prompt, name: str = "one") -> torch.Tensor:
    """[T, V] through the paged path."""
    parts = []
    sink = lambda _, part: parts.append(part.clone())  # noqa: E731
    server.add(Request(name, prompt.ids, ONE, spans=prompt.spans, sink=sink))
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
