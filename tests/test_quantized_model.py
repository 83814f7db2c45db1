"""The bundled model in every format: the same tokens in any company, and quality beside bfloat16."""

import gzip
import json

import pytest
import torch

from cabochon import LLM, SamplingParams
from cabochon.hub import BUNDLED
from cabochon.llm.loading import load
from cabochon.ops import cpu

pytestmark = pytest.mark.skipif(not cpu.supported(), reason="installed without the compiled kernels")

FORMATS = [None, "int8", "int4"]
GREEDY = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)


@pytest.fixture(scope="module")
def prompts():
    """Sixteen prompts of many lengths, as token ids."""
    tokenizer = load(None, "cpu").tokenizer
    lines = gzip.decompress((BUNDLED / "tasks.jsonl.gz").read_bytes()).decode().splitlines()
    texts = [json.loads(line)["messages"][0]["content"] for line in lines[:: len(lines) // 16][:16]]
    return [tokenizer.encode(text * (1 + i % 3))[:150] for i, text in enumerate(texts)]


@pytest.mark.parametrize("format", FORMATS)
def test_greedy_tokens_do_not_depend_on_batch_or_threads(format, prompts):
    llm = LLM.of(load(None, "cpu", quantization=format), max_num_batched_tokens=64)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        together = [reply.token_ids for reply in llm.generate(prompts, GREEDY)]
        torch.set_num_threads(1)
        alone = [llm.generate([prompt], GREEDY)[0].token_ids for prompt in prompts[::3]]
    finally:
        torch.set_num_threads(threads)
    assert alone == together[::3]
