"""What a checkpoint is, read strictly from its config.json (standard library only)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["sliding", "global"]


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary embedding of one layer.

    `inv_freq[i] = theta ** (-2 * i / head_dim)` for `i < rotated // 2`; the other dimensions do not turn. Pairs are
    `(i, i + head_dim // 2)`, so the rotated dimensions are `0..rotated/2` and `head_dim/2..head_dim/2 + rotated/2`.
    """

    theta: float
    rotated: int


@dataclass(frozen=True, slots=True)
class Experts:
    """Routed experts beside the dense MLP."""

    count: int
    per_token: int
    width: int


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """Everything that a decoder layer needs to know, so that no block asks the config."""

    index: int
    kind: Kind
    q_heads: int
    kv_heads: int
    head_dim: int
    window: int | None
    """Keys j with `i - window < j` are seen from position i; None sees all."""
    rope: Rope
    k_eq_v: bool
    """The value is the normalised key projection; there is no v_proj."""
    reads_kv_of: int
    """Index of the layer whose K and V this layer attends to; its own index unless it shares."""
    ffn_width: int
    experts: Experts | None
    ple_width: int
    """Width of the per-layer embedding, 0 without."""

    @property
    def owns_kv(self) -> bool:
        return self.reads_kv_of == self.index


@dataclass(frozen=True, slots=True)
class TextConfig:
    """The text network. `layers` holds all that differs from layer to layer."""

    vocab_size: int
    hidden_size: int
    layers: tuple[LayerSpec, ...]
    rms_norm_eps: float
    final_logit_softcapping: float | None
    hidden_size_per_layer_input: int
    vocab_size_per_layer_input: int
    two_way_spans: bool
    """Image and video spans see each other on sliding layers (use_bidirectional_attention: vision)."""
    max_position_embeddings: int


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """A whole checkpoint."""

    text: TextConfig
