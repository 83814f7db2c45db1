"""What a model takes: weights by part, keys and values by group, and what a step needs besides.

Nothing is estimated where the code knows: weights come from the table that loading reads (`weights.params`), keys and
values from the plan that the page pool allocates (`kv.layout.plan_pages`). Only activations and runtime are formulas.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

from ..config import Kind, ModelConfig, UnifiedVisionConfig
from ..errors import InputError
from ..formats import FORMATS, Format
from ..kv.layout import CacheDtype, KVGroup, bytes_read, kv_groups, plan_pages, request_pages, token_bytes
from ..weights.params import Param, Part, as_kept, parameters
from .hardware import Hardware

Place = Literal["device", "host"]

PAGE = 32
"""Tokens per page."""
STEP_TOKENS = 2048
"""Tokens that one step takes at most."""
RUNTIME_BYTES = 450 << 20
"""Python, torch and the kernels' own buffers; on a GPU the context."""
ENCODER_CACHE_TOKENS = 16_384
"""Soft tokens that stay when their picture or sound has been read, for when it comes again."""
IMAGE_MARKS = 2
"""Begin and end token around the soft tokens of an image."""


@dataclass(frozen=True, slots=True)
class Workload:
    """What is asked of the model."""

    context: int = 8192
    """Tokens of prompt and reply together, per user."""
    users: int = 1
    """Conversations at once."""
    images: int = 0
    """Images in a conversation; their tokens count in the context."""
    quantization: str | None = None
    """Format of the matrices; None: the type that the model runs in, but for what is `kept`."""
    kept: frozenset[str] = frozenset()
    """Matrices that the file brings as int4 and that stay it when no format is asked for (`Checkpoint.kept`)."""
    dtype: str = "bfloat16"
    kv_cache_dtype: CacheDtype = "auto"
    drafter: bool = False
    acceptance: float = 0.6
    """Share of drafted tokens that the model accepts, each given that the ones before it were."""
    ranks: int = 1
    """Devices that split the model (tensor parallel)."""

    @property
    def precision(self) -> str:
        """What most weights are kept in, for people."""
        return self.quantization or ("int4 as stored" if self.kept else self.dtype)


@dataclass(frozen=True, slots=True)
class WeightPart:
    """The weights of one part of the network."""

    part: Part
    parameters: int
    bytes: int
    """In memory, on one rank."""
    replicated: int
    """Of these, bytes that every rank holds whole."""
    format: str
    place: Place


@dataclass(frozen=True, slots=True)
class KVPart:
    """The keys and values of one group."""

    kind: Kind
    layers: int
    window: int | None
    token_bytes: int
    """Stored per token, all owning layers together, on one rank."""
    user_bytes: int
    """Most that one conversation holds at this context, in whole pages."""
    read_bytes: int
    """Read per decoded token at this context; layers that share read too."""
    saved_by_k_eq_v: int
    """Bytes per token that storing value and key in one row saves."""
    saved_by_sharing: int
    """Bytes per token that layers without keys and values of their own save."""


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes on one rank for a workload. `total` is what the device must have free."""

    weights: tuple[WeightPart, ...]
    kv: tuple[KVPart, ...]
    pool: int
    """Pages for every user at full context."""
    snapshots: int
    """Pages of kept windows, one per user, for the next turn."""
    activations: int
    encoder: int
    """Peak of encoding an image, and the features that are kept."""
    runtime: int = RUNTIME_BYTES

    @property
    def on_device(self) -> int:
        return sum(part.bytes for part in self.weights if part.place == "device")

    @property
    def on_host(self) -> int:
        return sum(part.bytes for part in self.weights if part.place == "host")

    @property
    def total(self) -> int:
        return self.on_device + self.pool + self.snapshots + self.activations + self.encoder + self.runtime


def measure(
    config: ModelConfig, work: Workload, hardware: Hardware | None = None, drafter: ModelConfig | None = None
) -> Memory:
    """The memory that `work` takes. On a GPU, tables that are only looked up lie in host memory.

    Raises:
        InputError: the context is longer than the model's, or the model can't be split over so many ranks.
    """
    _check(config, work)
    groups = kv_groups(config.text.layers)
    sizes = value_bytes(work)
    plan = plan_pages(groups, sizes, page_size=PAGE, max_tokens=work.context, requests=work.users, snapshots=work.users)
    each = {kind: plan.page_bytes(kind) // split_heads(group, work.ranks) for kind, group in groups.items()}
    window_pages = request_pages(groups["sliding"], work.context, PAGE) * work.users if "sliding" in groups else 0
    snapshots = window_pages * each.get("sliding", 0)
    kv = tuple(_kv_part(config, group, work, each[kind]) for kind, group in groups.items())
    return Memory(
        weights=weights(config, work, hardware, drafter),
        kv=kv,
        pool=sum(each[kind] * count for kind, count in plan.pages.items()) - snapshots,
        snapshots=snapshots,
        activations=activations(config, work),
        encoder=encoder(config, work.dtype) if work.images else 0,
    )


def value_bytes(work: Workload) -> dict[Kind, int]:
    """Bytes of a stored number per group. The 8-bit cache is the global group's; windows are small and stay exact."""
    wide = FORMATS[work.dtype].bits // 8
    return {"sliding": wide, "global": wide if work.kv_cache_dtype == "auto" else 1}


def weights(
    config: ModelConfig, work: Workload, hardware: Hardware | None = None, drafter: ModelConfig | None = None
) -> tuple[WeightPart, ...]:
    """Weights by part, on one rank, as they lie in memory after loading."""
    away = hardware is not None and hardware.kind == "gpu"
    pair = drafter if work.drafter else None
    return _weights(config, pair, work.dtype, work.quantization, work.kept, work.ranks, away)


@lru_cache(maxsize=64)
def _weights(
    config: ModelConfig,
    drafter: ModelConfig | None,
    dtype: str,
    quantization: str | None,
    kept: frozenset[str],
    ranks: int,
    away: bool,
) -> tuple[WeightPart, ...]:
    parts: dict[Part, WeightPart] = {}
    for param in (*parameters(as_kept(config, quantization)), *(parameters(drafter) if drafter else ())):
        format = stored_as(param, dtype, quantization, kept)
        size = param.bytes_in(format)
        split = is_split(param, config, ranks)
        mine = size // ranks if split else size
        place: Place = "host" if away and param.looked_up else "device"
        empty = WeightPart(param.part, 0, 0, 0, format.name, place)
        old = parts.get(param.part, empty)
        named = format.name if param.quantize else old.format
        parts[param.part] = WeightPart(
            old.part,
            old.parameters + param.count,
            old.bytes + mine,
            old.replicated + (0 if split else mine),
            named,
            place,
        )
    return tuple(parts.values())


def stored_as(param: Param, dtype: str, quantization: str | None, kept: frozenset[str]) -> Format:
    """What `param` is kept in in memory when the model runs in `dtype`."""
    return FORMATS["int4"] if quantization is None and param.name in kept else param.format(dtype, quantization)


def is_split(param: Param, config: ModelConfig, ranks: int) -> bool:
    """Ranks share a tensor when its axis divides; key and value heads only whole."""
    if ranks == 1 or param.shard is None:
        return False
    if param.name.endswith(("k_proj.weight", "v_proj.weight")):
        layer = int(param.name.split(".layers.")[1].split(".")[0])
        return config.text.layers[layer].kv_heads % ranks == 0
    return param.shape[param.shard] % ranks == 0


def split_heads(group: KVGroup, ranks: int) -> int:
    """By how much a rank's share of a group's rows is smaller: heads are split whole or not at all."""
    return ranks if group.kv_heads % ranks == 0 else 1


def activations(config: ModelConfig, work: Workload) -> int:
    """The largest tensors that live at once in a full step, and the logits.

    Of a layer, either the attention's (norm, queries, result, stored rows) or the feed-forward's (norm, gate, up, their
    product) are alive, beside the stream in float32; the per-layer inputs of all layers live through the step.
    """
    text, size = config.text, FORMATS[work.dtype].bits // 8
    tokens = min(STEP_TOKENS, max(work.users, work.context))
    attention = max(2 * text.hidden_size + (3 * s.q_heads + 2 * s.kv_heads) * s.head_dim for s in text.layers)
    dense = max(2 * text.hidden_size + 3 * s.ffn_width for s in text.layers)
    routed = max((2 * e.per_token * e.width for s in text.layers if (e := s.experts)), default=0)
    inside = max(attention, dense + routed) + 2 * text.hidden_size_per_layer_input * len(text.layers)
    logits = 2 * 4 * work.users * text.vocab_size
    return tokens * (4 * text.hidden_size + inside * size) + logits


def encoder(config: ModelConfig, dtype: str) -> int:
    """Peak of encoding one image of the largest budget (1,120 soft tokens), and the features that are kept.

    However many arrive together, no more than one such image is in a tower at a time. In a layer's attention seven rows
    are alive per patch: stream, norm, query, key, value, result, and what is added. The allocator's gaps between them
    come to as much again (measured over many layers). 30 s of sound take a quarter.
    """
    vision, size = config.vision, FORMATS[dtype].bits // 8
    if vision is None:
        return 0
    if isinstance(vision, UnifiedVisionConfig):
        peak = 1120 * (2 * 3 * vision.model_patch_size**2 + 3 * vision.mm_embed_dim) * 4
    else:
        patch = 2 * 7 * vision.hidden_size * size + 2 * 3 * vision.patch_size**2
        peak = 1120 * vision.pooling_kernel_size**2 * patch
    return peak + ENCODER_CACHE_TOKENS * config.text.hidden_size * size


def image_tokens(config: ModelConfig, images: int) -> int:
    """Tokens of the context that `images` images of the usual budget take."""
    return images * (config.vision.soft_tokens + IMAGE_MARKS) if config.vision else 0


def _kv_part(config: ModelConfig, group: KVGroup, work: Workload, page_bytes: int) -> KVPart:
    sizes = value_bytes(work)
    size, parts = sizes[group.kind], split_heads(group, work.ranks)
    stored = token_bytes(group, size) // parts
    two_tensors = token_bytes(replace(group, row_width=2 * group.head_dim), size) // parts
    same_kind = [spec for spec in config.text.layers if spec.kind == group.kind]
    sharing = stored // len(group.layers) * (len(same_kind) - len(group.layers))
    return KVPart(
        kind=group.kind,
        layers=len(group.layers),
        window=group.window,
        token_bytes=stored,
        user_bytes=request_pages(group, work.context, PAGE) * page_bytes,
        read_bytes=bytes_read(same_kind, work.context, sizes) // parts,
        saved_by_k_eq_v=two_tensors - stored,
        saved_by_sharing=sharing,
    )


def _check(config: ModelConfig, work: Workload) -> None:
    longest = config.text.max_position_embeddings
    if work.context > longest:
        raise InputError(f"A context of {work.context:,} tokens is more than the model's {longest:,}; ask for less.")
    if (taken := image_tokens(config, work.images)) >= work.context:
        raise InputError(
            f"{work.images} images take {taken:,} tokens, but the context is {work.context:,}; show fewer."
        )
    if work.images and config.vision is None:
        raise InputError("This checkpoint has no vision part; leave the images out.")
    heads = config.text.layers[0].q_heads
    if work.ranks < 1 or heads % work.ranks:
        raise InputError(f"{work.ranks} ranks can't share {heads} attention heads evenly; take a divisor of {heads}.")
