"""How an engine is set up, and what that means in pages."""

from __future__ import annotations

import os
from bisect import bisect_left
from dataclasses import dataclass

import torch

from ..config import Kind, TextConfig
from ..errors import InputError
from ..kv.layout import CacheDtype, KVPlan, kv_groups, plan_pages, request_pages
from ..sizing.memory import ENCODER_CACHE_TOKENS


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """How an engine is set up; names are vLLM's where the thing is the same."""

    max_num_seqs: int = 64
    """Most replies that run at once."""
    max_num_batched_tokens: int = 2048
    """Tokens per step."""
    block_size: int = 32
    """Tokens per page."""
    kv_cache_dtype: CacheDtype = "auto"
    """Of the global group; "auto" is the model's type."""
    kv_window_dtype: CacheDtype = "auto"
    """Of the sliding group."""
    kv_cache_memory_bytes: int | None = None
    """Most bytes for pages; None: what is sensible on this device."""
    gpu_memory_utilization: float = 0.9
    num_blocks: tuple[int, int] | None = None
    """Pages of the sliding and of the global group, instead of what the memory gives."""
    enable_prefix_caching: bool = True
    max_snapshots: int | None = None
    """Windows kept for later requests; None: one per seat."""
    encoder_cache_tokens: int = ENCODER_CACHE_TOKENS
    """Soft tokens of images, frames and sounds whose features are kept for later steps and requests."""
    num_speculative_tokens: int = 4
    """Most guesses per reply and step, if somebody guesses."""
    skip_unwanted: bool = True
    """Tokens whose logits nobody wants skip the KV-shared layers."""
    cuda_graphs: bool = False
    """Replay decode steps from CUDA graphs; off until it has been timed on a GPU (docs/gpu.md)."""

    def __post_init__(self) -> None:
        for name in ("max_num_seqs", "max_num_batched_tokens", "block_size", "num_speculative_tokens"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}, but must be 1 or more.")
        if self.max_snapshots is not None and self.max_snapshots < 0:
            raise InputError(f"max_snapshots is {self.max_snapshots}, but must be 0 (none) or more.")
        if not 0 < self.gpu_memory_utilization <= 1:
            raise InputError(
                f"gpu_memory_utilization is {self.gpu_memory_utilization}, but must be above 0 and at most 1."
            )
        for name in ("kv_cache_dtype", "kv_window_dtype"):
            if getattr(self, name) not in ("auto", "fp8", "int8"):
                raise InputError(f"{name} is {getattr(self, name)!r}, but must be auto, fp8 or int8.")

    def formats(self) -> dict[Kind, CacheDtype]:
        """Number format of each group's pages."""
        return {"sliding": self.kv_window_dtype, "global": self.kv_cache_dtype}


def plan_cache(
    text: TextConfig, options: EngineOptions, max_tokens: int, device: torch.device, dtype: torch.dtype
) -> tuple[KVPlan, int]:
    """The page plan of an engine, and how many sliding pages snapshots may hold."""
    groups, value_bytes = kv_groups(text.layers), _value_bytes(options, dtype)
    snapshots = options.max_snapshots if options.max_snapshots is not None else options.max_num_seqs
    each = request_pages(groups["sliding"], max_tokens, options.block_size)
    if options.num_blocks is not None:
        sliding, full = options.num_blocks
        return KVPlan(groups, options.block_size, {"sliding": sliding, "global": full}, value_bytes), snapshots * each
    plan = plan_pages(
        groups,
        value_bytes,
        page_size=options.block_size,
        max_tokens=max_tokens,
        requests=options.max_num_seqs,
        snapshots=snapshots,
        budget=_memory(options, device),
    )
    return plan, snapshots * each


def context_that_fits(text: TextConfig, options: EngineOptions, device: torch.device, dtype: torch.dtype) -> int:
    """The model's context, or as much of it as one request's pages leave room for; at least one page."""
    if options.num_blocks is not None:
        return text.max_position_embeddings
    groups, value_bytes = kv_groups(text.layers), _value_bytes(options, dtype)
    memory, size = _memory(options, device), options.block_size

    def fits(tokens: int) -> bool:
        pages = {kind: request_pages(group, tokens, size) for kind, group in groups.items()}
        return KVPlan(groups, size, pages, value_bytes).bytes() <= memory

    if fits(text.max_position_embeddings):
        return text.max_position_embeddings
    return size * max(
        1, bisect_left(range(1, text.max_position_embeddings // size), True, key=lambda n: not fits(n * size))
    )


def _value_bytes(options: EngineOptions, dtype: torch.dtype) -> dict[Kind, int]:
    return {kind: dtype.itemsize if kept == "auto" else 1 for kind, kept in options.formats().items()}


def _memory(options: EngineOptions, device: torch.device) -> int:
    """Bytes for pages: what was asked, or on a GPU what utilisation leaves, on a CPU a quarter of the free memory."""
    if options.kv_cache_memory_bytes is not None:
        return options.kv_cache_memory_bytes
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return int(free - total * (1 - options.gpu_memory_utilization))
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 4
