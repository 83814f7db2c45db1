"""What a checkpoint is, as frozen values (standard library only)."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

Kind = Literal["sliding", "global"]
ModelType = Literal["gemma4", "gemma4_unified", "gemma4_text", "gemma4_assistant"]

MEDIA = ("image", "video", "audio")
"""What a conversation may show besides text."""
READS_TARGET = -1
"""`LayerSpec.reads_kv_of` in a drafter: the target's last layer of the same kind that owns keys and values."""


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
    """Index of the layer whose K and V this layer attends to; its own unless it shares; READS_TARGET in drafters."""
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
    tied: bool = True
    """The head multiplies with the table that rows are looked up in, as in every published file. False: in a format of
    its own (`weights.params.as_kept`)."""


@dataclass(frozen=True, slots=True)
class VisionConfig:
    """The vision transformer of E2B, E4B, 26B-A4B and 31B."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    """Base of the two-dimensional rotary embedding: x turns the first half of a head, y the second."""
    patch_size: int
    pooling_kernel_size: int
    position_embedding_size: int
    use_clipped_linears: bool
    standardize: bool
    soft_tokens: int
    """Tokens of an image unless a request asks for another budget."""


@dataclass(frozen=True, slots=True)
class UnifiedVisionConfig:
    """The encoder-free image input of the 12B: one matrix over `patch_size * pooling_kernel_size` pixel squares."""

    patch_size: int
    pooling_kernel_size: int
    mm_embed_dim: int
    mm_posemb_size: int
    rms_norm_eps: float
    soft_tokens: int

    @property
    def model_patch_size(self) -> int:
        return self.patch_size * self.pooling_kernel_size


@dataclass(frozen=True, slots=True)
class AudioConfig:
    """The conformer of E2B and E4B."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    attention_chunk_size: int
    attention_context_left: int
    attention_context_right: int
    attention_logit_cap: float
    attention_invalid_logits_value: float
    subsampling_conv_channels: tuple[int, int]
    conv_kernel_size: int
    residual_weight: float
    gradient_clipping: float
    use_clipped_linears: bool
    rms_norm_eps: float
    output_proj_dims: int


@dataclass(frozen=True, slots=True)
class UnifiedAudioConfig:
    """The encoder-free sound input of the 12B: one matrix over frames of raw samples."""

    audio_embed_dim: int
    """Samples per token and width of the frame vector."""
    rms_norm_eps: float


@dataclass(frozen=True, slots=True)
class DrafterConfig:
    """What an assistant has besides its text layers."""

    backbone_hidden_size: int
    use_ordered_embeddings: bool
    num_centroids: int
    centroid_intermediate_top_k: int


@dataclass(frozen=True, slots=True)
class TokenIds:
    """Ids with a meaning; None where the checkpoint has no such token."""

    bos: int | None
    eos: tuple[int, ...]
    pad: int
    boi: int | None
    image: int | None
    eoi: int | None
    boa: int | None
    audio: int | None
    eoa: int | None
    video: int | None


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """A whole checkpoint."""

    text: TextConfig
    model_type: ModelType = "gemma4"
    vision: VisionConfig | UnifiedVisionConfig | None = None
    audio: AudioConfig | UnifiedAudioConfig | None = None
    drafter: DrafterConfig | None = None
    tokens: TokenIds = field(default=TokenIds(2, (1,), 0, None, None, None, None, None, None, None))
    dtype: str = "bfloat16"
    """The type that the weights were saved in."""
    quantization: Mapping[str, Any] | None = field(default=None, compare=False)
    """`quantization_config` as it stands; the reader of that format checks it."""
    raw: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)
    """config.json as it was read."""

    def taking(self, media: Collection[str]) -> ModelConfig:
        """The same without the towers that none of `media` (of image, video, audio) needs."""
        sees, hears = bool({"image", "video"} & set(media)), "audio" in media
        return replace(self, vision=self.vision if sees else None, audio=self.audio if hears else None)

    @property
    def unified(self) -> bool:
        """The 12B's layout: no encoders, other names for the media parameters."""
        return self.model_type == "gemma4_unified"


@dataclass(frozen=True, slots=True)
class GenerationConfig:
    """How a checkpoint wants to be sampled; the family's published values where it doesn't say."""

    temperature: float = 1.0
    top_p: float = 0.95
    top_k: int = 64
    eos: tuple[int, ...] = ()
    """Ids that end a reply. Empty: use `ModelConfig.tokens.eos`."""
    suppress: tuple[int, ...] = ()
    """Ids that are never sampled."""
    repetition_penalty: float = 1.0
    min_p: float = 0.0
    unread: tuple[str, ...] = ()
    """Keys that no part of the engine follows, for the log."""
