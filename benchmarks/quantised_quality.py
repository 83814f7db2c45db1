"""What int8 and int4 cost the bundled model: its card in each format, and the divergence of next-token distributions.

    python benchmarks/quantised_quality.py [EXERCISES_PER_TASK]

Divergence is KL(bfloat16 || format) in nats per token, over the prompts and answers of the exercises.
"""

from __future__ import annotations

import json
import sys

import torch

from cabochon import evaluate
from cabochon.llm import AsyncLLM
from cabochon.llm.loading import load
from cabochon.model.batch import whole_sequences

FORMATS = (None, "int8", "int4")
LIMIT = int(sys.argv[1]) if len(sys.argv) > 1 else 100

exercises = evaluate.thin(evaluate.read_tasks(evaluate.BUNDLED_TASKS), LIMIT)
loaded = {format: load(None, "cpu", quantization=format) for format in FORMATS}
tokenizer = loaded[None].tokenizer
assert tokenizer is not None
texts = [f"{e.messages[-1]['content']} {e.expect}" for e in exercises[:: max(1, len(exercises) // 200)]]
batch = whole_sequences([torch.tensor(tokenizer.encode(text)) for text in texts])

with torch.inference_mode():
    exact = loaded[None].model(batch).log_softmax(-1)
    kl = {}
    for format in FORMATS[1:]:
        other = loaded[format].model(batch).log_softmax(-1)
        kl[format] = float((exact.exp() * (exact - other)).sum(-1).mean())

cards = {}
for format in FORMATS:
    llm = AsyncLLM.of(loaded[format])
    try:
        cards[format] = {line.task: line.right / line.n for line in evaluate.evaluate(llm, exercises, withhold=False)}
    finally:
        llm.close()

print(f"{'task':24} {'bfloat16':>9} {'int8':>9} {'int4':>9}")
for task, share in cards[None].items():
    print(f"{task:24} {share:9.1%} {cards['int8'][task] - share:+9.1%} {cards['int4'][task] - share:+9.1%}")
mean = {format: sum(card.values()) / len(card) for format, card in cards.items()}
print(f"{'mean':24} {mean[None]:9.1%} {mean['int8'] - mean[None]:+9.1%} {mean['int4'] - mean[None]:+9.1%}")
print(f"KL per token: int8 {kl['int8']:.2e}, int4 {kl['int4']:.2e} nats")
print(json.dumps({"exercises_per_task": LIMIT, "kl": kl, "cards": {str(k): v for k, v in cards.items()}}))
