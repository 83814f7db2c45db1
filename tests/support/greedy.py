"""Greedy replies compared under the rule for near-ties.

Two float32 runs of one reply may differ where the two best tokens are closer than the arithmetic's noise: torch's
matmuls round a row differently in another company. A first difference is accepted there and only there, and counted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cabochon.engine.engine import Engine
from cabochon.engine.request import Request, SamplingParams, SoftSpan, StepOutput
from cabochon.model.batch import SoftTokens, whole_sequences
from cabochon.model.gemma4 import Gemma4

NOISE = 5e-5
"""Logits of calm toys differ by about 5e-6 between float32 and float64; two of them, with room."""

PENALTY = 6.0
"""Calm toys echo their last token; a repetition penalty makes their greedy replies wander, so that a mistake shows."""


@dataclass
class Ties:
    """How often a comparison ended at a near-tie."""

    compared: int = 0
    ties: int = 0

    def __str__(self) -> str:
        return f"{self.compared} replies compared, {self.ties} near-ties"


def greedy(tokens: int, **more: object) -> SamplingParams:
    params: dict[str, object] = {
        "temperature": 0.0,
        "top_p": 1.0,
        "top_k": 0,
        "max_tokens": tokens,
        "repetition_penalty": PENALTY,
    }
    return SamplingParams(**(params | more))  # type: ignore[arg-type]  # fields of any type, by name


def penalised(logits: Tensor, ids: Sequence[int]) -> Tensor:
    """`logits` [V] under the repetition penalty, by its definition."""
    out = logits.double().clone()
    seen = torch.tensor(sorted(set(ids)))
    out[seen] = torch.where(out[seen] > 0, out[seen] / PENALTY, out[seen] * PENALTY)
    return out


def own_logits(model: Gemma4, spans: Sequence[SoftSpan] = ()) -> Callable[[Sequence[int]], Tensor]:
    """The last token's logits by the network itself, without engine or pages. Each span's item is its features."""

    def last(ids: Sequence[int]) -> Tensor:
        batch = whole_sequences([torch.tensor(list(ids))])
        reach = batch.rows.position.clone()
        for span in spans:
            if span.two_way:
                reach[span.start : span.start + span.length] = span.start + span.length - 1
        batch.rows.see_until = reach
        if spans:
            index = torch.cat([torch.arange(span.start, span.start + span.length) for span in spans])
            batch.soft = SoftTokens(index, torch.cat([span.item for span in spans]))
        with torch.inference_mode():
            return model(batch)[-1]

    return last


def same_reply(
    prompt: Sequence[int],
    got: Sequence[int],
    expected: Sequence[int],
    last_logits: Callable[[Sequence[int]], Tensor],
    ties: Ties,
) -> None:
    """Assert that two greedy replies are equal up to a near-tie."""
    ties.compared += 1
    if list(got) == list(expected):
        return
    at = next(i for i in range(max(len(got), len(expected))) if got[i : i + 1] != expected[i : i + 1])
    assert at < min(len(got), len(expected)), f"replies have {len(got)} and {len(expected)} tokens"
    before = [*prompt, *expected[:at]]
    logits = penalised(last_logits(before), before)
    gap = abs(float(logits[got[at]] - logits[expected[at]]))
    assert gap < NOISE, f"token {at} is {got[at]} instead of {expected[at]}, whose logits differ by {gap:.2g}"
    ties.ties += 1


def finish(engine: Engine, check: bool = False) -> list[StepOutput]:
    """Run an engine until it is idle."""
    outputs = []
    steps = 0
    while engine.busy:
        steps += 1
        assert steps < 20_000, "the engine does not come to an end"
        outputs += engine.step()
        if check:
            engine.check()
    return outputs


def alone(engine: Engine, prompt: Sequence[int], params: SamplingParams, spans: tuple[SoftSpan, ...] = ()) -> list[int]:
    """The reply of one request in an idle engine."""
    engine.add(Request("alone", prompt, params, spans=spans))
    return [token for output in finish(engine) for token in output.token_ids]
