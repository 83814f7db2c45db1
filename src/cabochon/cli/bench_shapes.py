"""Networks and steps of the true shapes, filled with what costs nothing to draw: for `bench cpu` and `bench gpu`.

Everything is made where it is used: under `with torch.device("cuda")` a network of 60 GB is there in seconds.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..chat.tokenizer import Tokenizer
from ..config import Kind, ModelConfig
from ..formats import FORMATS
from ..kv.layout import kv_groups
from ..model.batch import Batch
from ..model.gemma4 import Gemma4
from ..ops import Pages, Past, Rows, ScaledPages
from ..ops.cpu import prefer_huge_pages
from ..quant import QuantTensor
from ..weights.load import host, place, quantizer
from ..weights.params import Param, as_kept, parameters
from ..weights.random import calm_tensor

PAGE = 32


class Wordy(Tokenizer):
    """Random weights say every id of the vocabulary, of which the bundled tokenizer knows few; all of them are text."""

    def token_bytes(self, token_id: int) -> bytes:
        return super().token_bytes(token_id) or f" w{token_id}".encode()


def random_codes(config: ModelConfig, format: str) -> Gemma4:
    """The network of `config` with matrices of random codes in `format`; everything else is calm and bfloat16."""
    config = as_kept(config, format)
    with torch.device("meta"):
        network = Gemma4(config)
    there, as_loaded = set(network.state_dict()), quantizer(None, panels=device().type == "cpu")
    for param in parameters(config):
        if param.name in there:
            weight = as_loaded(param, random_weight(param, format))
            place(network, param.name, host(weight, device()) if param.looked_up else weight)
    return network.eval()


def device() -> torch.device:
    """Where tensors are made now."""
    return torch.empty(0).device


def random_weight(param: Param, format: str) -> Tensor | QuantTensor:
    """A matrix of random codes in `format`, in rows; another tensor calm and in bfloat16."""
    if not param.quantize:
        return calm_tensor(param.name, param.shape, dtype=torch.bfloat16).to(device())
    *rows, width = param.shape
    format = param.format("bfloat16", format).name
    if not FORMATS[format].quantized:
        draw = torch.randn(min(param.count, 1 << 20)).mul_(width**-0.5).to(torch.bfloat16)
        return _repeated(draw, param.shape)
    if format == "int8":  # codes are spread evenly over -127 .. 127, so their deviation is about 73
        codes, scales = _bytes(*rows, width).view(torch.int8), torch.full(rows, width**-0.5 / 73)
    else:
        groups = FORMATS[format].groups(width)
        codes, scales = _bytes(*rows, groups, 16), torch.full((*rows, groups), width**-0.5 / 4.6, dtype=torch.float16)
    return QuantTensor(codes, scales, format, param.shape)


def _bytes(*shape: int) -> Tensor:
    return _repeated(torch.randint(1, 256, (min(math.prod(shape), 1 << 20),), dtype=torch.uint8), shape)


def _repeated(draw: Tensor, shape: tuple[int, ...]) -> Tensor:
    out = torch.empty(shape, dtype=draw.dtype)
    if out.is_cpu:
        prefer_huge_pages(out)
    flat = out.view(-1)
    for begin in range(0, len(flat), len(draw)):
        flat[begin : begin + len(draw)] = draw[: len(flat) - begin]
    return out


def weight_bytes(network: Gemma4) -> int:
    """Bytes of weights that a step reads whole: all matrices, of the experts those that one token takes."""
    total = 0
    for param in parameters(network.config):
        owner, _, leaf = param.name.rpartition(".")
        if param.looked_up or param.part in ("vision", "audio"):
            continue
        value = getattr(network.get_submodule(owner), leaf)
        taken = 1.0
        if param.part == "experts":
            spec = next(spec.experts for spec in network.config.text.layers if spec.experts)
            taken = spec.per_token / spec.count
        total += int(value.nbytes * taken)
    return total


def past_bytes(network: Gemma4, requests: int, context: int) -> int:
    """Bytes of stored keys and values that a decode step reads, once for each layer that reads them."""
    total, groups = 0, kv_groups(network.config.text.layers)
    for spec in network.config.text.layers:
        group = groups[spec.kind]
        seen = context if spec.window is None else min(context, spec.window)
        total += seen * group.kv_heads * group.row_width * 2
    return requests * total


def prefill_batch(network: Gemma4, length: int) -> Batch:
    """A prompt of `length` tokens in one step, logits for its last token; nothing is stored."""
    position = torch.arange(length, dtype=torch.int32)
    ends = torch.tensor([0, length], dtype=torch.int32)
    rows = Rows(None, ends, position, position, length)
    last = torch.tensor([length - 1])
    tail = Rows(last, torch.tensor([0, 1], dtype=torch.int32), position[last], position[last], 1)
    context = torch.zeros(1, dtype=torch.int32)
    ids = torch.randint(network.config.text.vocab_size, (length,))
    return Batch(ids, ends, context, rows, tail, None)


def _stored(shape: tuple[int, ...], head_dim: int, kv_cache_dtype: str) -> Pages:
    """Pages of random rows, in bfloat16 or int8."""
    if kv_cache_dtype == "auto":
        return _repeated(torch.randn(min(math.prod(shape), 1 << 20)).to(torch.bfloat16), shape)
    return ScaledPages(_bytes(*shape).view(torch.int8), torch.full((*shape[:3], 2), 1 / 73), head_dim)


def decode_batch(network: Gemma4, requests: int, context: int, kv_cache_dtype: str = "auto") -> Batch:
    """One token for each of `requests` requests after `context` tokens each, over pages of random rows."""
    text = network.config.text
    position = torch.full((requests,), context, dtype=torch.int32)
    ends = torch.arange(requests + 1, dtype=torch.int32)
    rows = Rows(None, ends, position, position, 1)
    past: dict[Kind, Past] = {}
    pages: dict[int, Pages] = {}
    for kind, group in kv_groups(text.layers).items():
        first = 0 if group.window is None else max(0, context + 1 - group.window) // PAGE * PAGE
        count = (context - first) // PAGE + 1
        table = torch.randperm(requests * count, dtype=torch.int32).view(requests, count)
        slots = table[:, -1].long() * PAGE + (context - first) % PAGE
        past[kind] = Past(table, torch.full((requests,), first, dtype=torch.int32), slots, context - first)
        for layer in group.layers:
            shape = (requests * count, PAGE, group.kv_heads, group.row_width)
            pages[layer] = _stored(shape, group.head_dim, kv_cache_dtype if kind == "global" else "auto")
    ids = torch.randint(text.vocab_size, (requests,))
    return Batch(ids, ends, position, rows, rows, None, past, pages)
