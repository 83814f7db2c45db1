"""How fast a device could be at most: a roofline over bytes read and operations done per step.

A step takes as long as the slower of the two: reading what it must from memory once, or multiplying. No kernel, launch
or interpreter is in it, so the figures are ceilings; `cabochon bench` prints what is really reached.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from ..config import ModelConfig
from ..kv.layout import bytes_read
from ..weights.params import Param, as_kept, parameters
from .hardware import Hardware
from .memory import Workload, is_split, stored_as, value_bytes

BATCHES = (1, 8, 64)
PREFILL = 512


@dataclass(frozen=True, slots=True)
class Speed:
    """Ceilings at one batch size."""

    batch: int
    decode: float
    """Tokens per second of all users together."""
    decode_with_drafter: float | None
    prefill: float
    """Prompt tokens per second, one prompt of 512 tokens per user in a step."""

    @property
    def per_user(self) -> float:
        return self.decode / self.batch


def speed(
    config: ModelConfig,
    work: Workload,
    hardware: Hardware,
    batch: int,
    drafter: ModelConfig | None = None,
    draft_tokens: int = 4,
) -> Speed:
    """The ceilings for `batch` users at the workload's context. `drafter` is the assistant's config."""
    step = step_seconds(config, work, hardware, batch, 1)
    drafted = None
    if drafter is not None:
        verify = step_seconds(config, work, hardware, batch, 1 + draft_tokens)
        draft = draft_tokens * draft_seconds(drafter, work, hardware, batch)
        drafted = batch * expected_tokens(work.acceptance, draft_tokens) / (verify + draft)
    return Speed(batch, batch / step, drafted, batch * PREFILL / prefill_seconds(config, work, hardware, batch))


def expected_tokens(acceptance: float, drafted: int) -> float:
    """Tokens per verified burst: 1 + a + a^2 + ... + a^drafted."""
    return sum(acceptance**i for i in range(drafted + 1))


def step_seconds(config: ModelConfig, work: Workload, hardware: Hardware, batch: int, tokens: int) -> float:
    """One step in which each of `batch` users gets `tokens` tokens verified at the workload's context."""
    rows = batch * tokens
    read = operations = 0.0
    for param in _multiplied(config, work.quantization):
        size, share = _mine(param, config, work), _share(param, config)
        read += size * _distinct(param, config, rows)
        operations += 2 * rows * param.count * share / (work.ranks if is_split(param, config, work.ranks) else 1)
    read += batch * kv_read(config, work)
    operations += rows * attention_operations(config, work) / work.ranks
    return max(read / hardware.bandwidth, operations / hardware.rate(work.quantization))


def prefill_seconds(
    config: ModelConfig, work: Workload, hardware: Hardware, batch: int, length: int = PREFILL
) -> float:
    """One step over `batch` prompts of `length` tokens. Layers that share keys and values run for last tokens only."""
    read = operations = 0.0
    for param in _multiplied(config, work.quantization):
        rows = batch * (1 if _for_wanted_rows_only(param, config) else length)
        read += _mine(param, config, work) * _distinct(param, config, rows)
        split = work.ranks if is_split(param, config, work.ranks) else 1
        operations += 2 * rows * param.count * _share(param, config) / split
    return max(read / hardware.bandwidth, operations / hardware.rate(work.quantization))


def draft_seconds(drafter: ModelConfig, work: Workload, hardware: Hardware, batch: int) -> float:
    """One drafted token each. With ordered embeddings only the chosen clusters' rows of the head are read."""
    its = drafter.drafter
    assert its is not None
    looked_at = its.centroid_intermediate_top_k / its.num_centroids if its.use_ordered_embeddings else 1.0
    read = operations = 0.0
    for param in parameters(drafter):
        if len(param.shape) > 1:
            share = looked_at if param.name == "embed_tokens.weight" else 1.0
            read += share * param.bytes_in(stored_as(param, work.dtype, work.quantization, work.kept))
            operations += 2 * batch * share * param.count
    return max(read / hardware.bandwidth, operations / hardware.rate(work.quantization))


def kv_read(config: ModelConfig, work: Workload) -> int:
    """Bytes of keys and values that one decoded token of one user reads, on one rank."""
    sizes = value_bytes(work)
    total = 0
    for spec in config.text.layers:
        parts = work.ranks if spec.kv_heads % work.ranks == 0 else 1
        total += bytes_read([spec], work.context, sizes) // parts
    return total


def attention_operations(config: ModelConfig, work: Workload) -> float:
    """Scores and weighted sums of one token at the workload's context."""
    return sum(
        4.0 * spec.q_heads * spec.head_dim * min(work.context, spec.window or work.context)
        for spec in config.text.layers
    )


def active_parameters(config: ModelConfig) -> int:
    """Parameters that one token is multiplied with: matrices, its experts' share, the head once."""
    return round(sum(param.count * _share(param, config) for param in _multiplied(config, None)))


@lru_cache(maxsize=16)
def _multiplied(config: ModelConfig, quantization: str | None) -> tuple[Param, ...]:
    """Matrices of the text network (a tied embedding is the head); tables that are only looked up are left out."""
    table = parameters(as_kept(config, quantization))
    matrices = (p for p in table if p.part not in ("vision", "audio") and len(p.shape) > 1)
    return tuple(param for param in matrices if not param.looked_up)


def _mine(param: Param, config: ModelConfig, work: Workload) -> float:
    size = param.bytes_in(stored_as(param, work.dtype, work.quantization, work.kept))
    return size / work.ranks if is_split(param, config, work.ranks) else float(size)


def _share(param: Param, config: ModelConfig) -> float:
    """Part of a tensor that one token is multiplied with."""
    experts = config.text.layers[0].experts
    return experts.per_token / experts.count if experts and param.part == "experts" else 1.0


def _distinct(param: Param, config: ModelConfig, rows: int) -> float:
    """Part of a tensor that `rows` tokens read together: with routed experts, those that at least one token chose."""
    return 1 - (1 - _share(param, config)) ** rows if param.part == "experts" else 1.0


def _for_wanted_rows_only(param: Param, config: ModelConfig) -> bool:
    if param.part in ("embedding", "head"):
        return True
    if ".layers." not in param.name:
        return False
    return not config.text.layers[int(param.name.split(".layers.")[1].split(".")[0])].owns_kv
