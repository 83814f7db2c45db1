"""The parameter table: every tensor of a checkpoint, under each of its names. Loading, saving and sizing
read it; nothing else in the package spells a parameter's name.

The KV-shared layers of published files carry key and value projections that nothing reads ("stored, unused"): they are
in the table too, so that a file is accounted for to the byte.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from ..config import (
    READS_TARGET,
    AudioConfig,
    DrafterConfig,
    LayerSpec,
    ModelConfig,
    UnifiedVisionConfig,
    VisionConfig,
)
from ..errors import CheckpointError, brief
from ..formats import FORMATS, QUANTIZED, Format

Part = Literal["text", "experts", "embedding", "head", "per_layer_embedding", "vision", "audio", "drafter"]
Shape = tuple[int, ...]
OWN_METHOD = "cabochon"
"""What `quantization_config.quant_method` says in folders of our own (`weights.own`)."""


@dataclass(frozen=True, slots=True)
class Param:
    """One tensor."""

    name: str
    """Ours: the dotted attribute path in `model.gemma4.Gemma4` (in the drafter for assistants)."""
    shape: Shape
    hf: str
    """Its name in published safetensors files."""
    part: Part
    gguf: str | None = None
    """Its name in llama.cpp's files; None for what lies in another file (towers) or is not kept there."""
    also: tuple[str, ...] = ()
    """Names under which other writers keep it."""
    shard: int | None = None
    """Axis along which tensor-parallel ranks split it; None: each has it whole."""
    quantize: bool = False
    """May be kept in a quantised format."""
    looked_up: bool = False
    """Never multiplied: rows are looked up, of which a step needs as many as it has tokens."""
    used: bool = True
    """False: in published files, but no computation reads it."""
    integer: bool = False
    """int64 whatever the checkpoint's type is."""

    @property
    def count(self) -> int:
        return math.prod(self.shape)

    def format(self, base: str, quantization: str | None = None) -> Format:
        """What it is kept in when the model runs in `base` ("bfloat16", ...) with its matrices in `quantization`."""
        if not quantization or not self.quantize:
            return FORMATS[base]
        kept = FORMATS[quantization]
        return FORMATS[kept.looked_up] if kept.looked_up and self.looked_up and self.part == "embedding" else kept

    def nbytes(self, base: str, quantization: str | None = None) -> int:
        """Bytes in memory, scales included."""
        return self.bytes_in(self.format(base, quantization))

    def bytes_in(self, format: Format) -> int:
        """Bytes in memory in `format`."""
        return 8 * self.count if self.integer else format.bytes(self.shape or (1,))


def own_format(config: ModelConfig) -> str | None:
    """int8 or int4 where `cabochon quantize` wrote the folder: its matrices stay in that, whatever is asked for.

    Raises:
        CheckpointError: it names another format.
    """
    said = config.quantization or {}
    if said.get("quant_method") != OWN_METHOD:
        return None
    if said.get("format") not in QUANTIZED:
        known = ", ".join(QUANTIZED)
        raise CheckpointError(f"config.json says the format {brief(said.get('format'))}; known are {known}.")
    return str(said["format"])


def as_kept(config: ModelConfig, quantization: str | None) -> ModelConfig:
    """`config` with its matrices in `quantization` (None: as stored): the head may then be a matrix of its own.

    A drafter's table is its head only.
    """
    format = quantization or own_format(config)
    if config.drafter is not None or format is None:
        return config
    return replace(config, text=replace(config.text, tied=FORMATS[format].looked_up is None))


def parameters(config: ModelConfig, *, unused: bool = False) -> tuple[Param, ...]:
    """The table of a checkpoint, in the order of the network; with `unused` also what is stored for nothing."""
    rows = _drafter(config, config.drafter) if config.drafter else _model(config)
    return tuple(param for param in rows if param.used or unused)


def _model(config: ModelConfig) -> Iterator[Param]:
    width = config.text.hidden_size
    flat = config.model_type == "gemma4_text"
    yield from _text(config, "language_model.", "model." if flat else "model.language_model.")
    if isinstance(config.vision, VisionConfig):
        yield from _vision(config.vision, width)
    elif config.vision is not None:
        yield from _unified_vision(config.vision, width)
    if config.audio is None:
        return
    if isinstance(config.audio, AudioConfig):
        yield from _audio(config.audio)
        inputs = config.audio.output_proj_dims
    else:
        inputs = config.audio.audio_embed_dim
    yield _tower("embed_audio.embedding_projection.weight", (width, inputs), "audio")


@dataclass(frozen=True, slots=True)
class _Place:
    """The prefixes of one part of the network in each naming."""

    ours: str
    hf: str
    gguf: str = ""

    def vector(self, name: str, shape: Shape, gguf: str, *, part: Part = "text", used: bool = True) -> Param:
        """A tensor that is never quantised or split: norms, scalars, the router, the gates of per-layer embeddings."""
        return Param(self.ours + name, shape, self.hf + name, part, self.gguf + gguf, used=used)

    def matrix(
        self, name: str, shape: Shape, gguf: str, *, part: Part = "text", shard: int | None = None, used: bool = True
    ) -> Param:
        """A tensor that may be quantised."""
        full = self.gguf + gguf
        return Param(self.ours + name, shape, self.hf + name, part, full, shard=shard, quantize=True, used=used)


def _text(config: ModelConfig, ours: str, hf: str) -> Iterator[Param]:
    """Embeddings, layers and final norm; `ours` and `hf` are the prefixes of the two namings."""
    text, width, at = config.text, config.text.hidden_size, _Place(ours, hf)
    table = at.matrix("embed_tokens.weight", (text.vocab_size, width), "token_embd.weight", part="embedding", shard=0)
    yield replace(table, looked_up=not text.tied)
    if ple := text.hidden_size_per_layer_input:
        packed = len(text.layers) * ple
        shape, name = (text.vocab_size_per_layer_input, packed), "embed_tokens_per_layer.weight"
        rows = at.matrix(name, shape, "per_layer_token_embd.weight", part="per_layer_embedding")
        yield replace(rows, looked_up=True)
        yield at.matrix("per_layer_model_projection.weight", (packed, width), "per_layer_model_proj.weight")
        yield at.vector("per_layer_projection_norm.weight", (ple,), "per_layer_proj_norm.weight")
    for spec in text.layers:
        yield from _layer(
            spec, width, _Place(f"{ours}layers.{spec.index}.", f"{hf}layers.{spec.index}.", f"blk.{spec.index}.")
        )
    yield at.vector("norm.weight", (width,), "output_norm.weight")
    if config.drafter is None:
        name, apart = "lm_head.weight", not text.tied
        head = Param(ours + name, table.shape, name, "head", "output.weight", shard=0, quantize=apart, used=apart)
        # Some writers store a copy of the table; elsewhere the table itself is what the head is made from.
        yield replace(head, also=(table.hf,)) if apart else head


def _layer(spec: LayerSpec, width: int, at: _Place) -> Iterator[Param]:
    yield at.vector("input_layernorm.weight", (width,), "attn_norm.weight")
    yield from _attention(spec, width, at)
    yield at.vector("post_attention_layernorm.weight", (width,), "post_attention_norm.weight")
    yield at.vector("pre_feedforward_layernorm.weight", (width,), "ffn_norm.weight")
    inner = spec.ffn_width
    yield at.matrix("mlp.gate_proj.weight", (inner, width), "ffn_gate.weight", shard=0)
    yield at.matrix("mlp.up_proj.weight", (inner, width), "ffn_up.weight", shard=0)
    yield at.matrix("mlp.down_proj.weight", (width, inner), "ffn_down.weight", shard=1)
    yield at.vector("post_feedforward_layernorm.weight", (width,), "post_ffw_norm.weight")
    if routed := spec.experts:
        yield at.vector("router.proj.weight", (routed.count, width), "ffn_gate_inp.weight")
        yield at.vector("router.scale", (width,), "ffn_gate_inp.scale")
        yield at.vector("router.per_expert_scale", (routed.count,), "ffn_down_exps.scale")
        both, down = (routed.count, 2 * routed.width, width), (routed.count, width, routed.width)
        yield at.matrix("experts.gate_up_proj", both, "ffn_gate_up_exps.weight", part="experts", shard=0)
        yield at.matrix("experts.down_proj", down, "ffn_down_exps.weight", part="experts", shard=0)
        yield at.vector("post_feedforward_layernorm_1.weight", (width,), "post_ffw_norm_1.weight")
        yield at.vector("pre_feedforward_layernorm_2.weight", (width,), "pre_ffw_norm_2.weight")
        yield at.vector("post_feedforward_layernorm_2.weight", (width,), "post_ffw_norm_2.weight")
    if ple := spec.ple_width:
        yield at.vector("per_layer_input_gate.weight", (ple, width), "inp_gate.weight")
        yield at.vector("per_layer_projection.weight", (width, ple), "proj.weight")
        yield at.vector("post_per_layer_input_norm.weight", (width,), "post_norm.weight")
    yield at.vector("layer_scalar", (1,), "layer_output_scale.weight")


def _attention(spec: LayerSpec, width: int, at: _Place) -> Iterator[Param]:
    """A layer that shares keeps unused projections in the published files; a drafter's layers don't."""
    heads, keys, owns = spec.q_heads * spec.head_dim, spec.kv_heads * spec.head_dim, spec.owns_kv
    yield at.matrix("self_attn.q_proj.weight", (heads, width), "attn_q.weight", shard=0)
    yield at.vector("self_attn.q_norm.weight", (spec.head_dim,), "attn_q_norm.weight")
    if spec.reads_kv_of != READS_TARGET:
        yield at.matrix("self_attn.k_proj.weight", (keys, width), "attn_k.weight", shard=0, used=owns)
        yield at.vector("self_attn.k_norm.weight", (spec.head_dim,), "attn_k_norm.weight", used=owns)
        if not spec.k_eq_v:
            yield at.matrix("self_attn.v_proj.weight", (keys, width), "attn_v.weight", shard=0, used=owns)
    yield at.matrix("self_attn.o_proj.weight", (width, heads), "attn_output.weight", shard=1)


def _drafter(config: ModelConfig, drafter: DrafterConfig) -> Iterator[Param]:
    """An assistant's: its own text layers without keys and values, and the ways in and out of the target's width."""
    width, backbone = config.text.hidden_size, drafter.backbone_hidden_size
    for param in _text(config, "", "model."):
        # With clusters a guess reads a few rows of the table from anywhere, which must lie together: it stays as it is.
        whole = param.part != "embedding" or not drafter.use_ordered_embeddings
        yield replace(param, part="drafter", shard=None, quantize=param.quantize and whole)
    for name, shape in (
        ("pre_projection.weight", (width, 2 * backbone)),
        ("post_projection.weight", (backbone, width)),
    ):
        yield Param(name, shape, name, "drafter", f"nextn.{name}", quantize=True)
    if drafter.use_ordered_embeddings:
        name = "masked_embedding.centroids.weight"
        yield Param(name, (drafter.num_centroids, width), name, "drafter")
        name = "masked_embedding.token_ordering"
        yield Param(name, (config.text.vocab_size,), name, "drafter", integer=True)


def _tower(name: str, shape: Shape, part: Part, also: tuple[str, ...] = ()) -> Param:
    return Param(name, shape, f"model.{name}", part, also=also)


def _norms(at: str, names: tuple[str, ...], width: int, part: Part) -> Iterator[Param]:
    for name in names:
        yield _tower(f"{at}{name}.weight", (width,), part)


def _clipped(name: str, shape: Shape, part: Part, clipped: bool) -> Iterator[Param]:
    """A tower's matrix, with the four bounds of its inputs and outputs where the config says so."""
    yield _tower(f"{name}.linear.weight", shape, part)
    if clipped:
        for bound in ("input_min", "input_max", "output_min", "output_max"):
            yield _tower(f"{name}.{bound}", (), part)


def _vision(vision: VisionConfig, text_width: int) -> Iterator[Param]:
    width, inner, clipped = vision.hidden_size, vision.intermediate_size, vision.use_clipped_linears
    heads = vision.num_attention_heads * vision.head_dim
    yield _tower("vision_tower.patch_embedder.input_proj.weight", (width, 3 * vision.patch_size**2), "vision")
    table = (2, vision.position_embedding_size, width)
    yield _tower("vision_tower.patch_embedder.position_embedding_table", table, "vision")
    for i in range(vision.num_hidden_layers):
        at = f"vision_tower.encoder.layers.{i}."
        sandwich = ("input_layernorm", "post_attention_layernorm")
        yield from _norms(at, (*sandwich, "pre_feedforward_layernorm", "post_feedforward_layernorm"), width, "vision")
        for name in ("q_proj", "k_proj", "v_proj"):
            yield from _clipped(f"{at}self_attn.{name}", (heads, width), "vision", clipped)
        yield from _clipped(f"{at}self_attn.o_proj", (width, heads), "vision", clipped)
        yield from _norms(f"{at}self_attn.", ("q_norm", "k_norm"), vision.head_dim, "vision")
        for name in ("gate_proj", "up_proj"):
            yield from _clipped(f"{at}mlp.{name}", (inner, width), "vision", clipped)
        yield from _clipped(f"{at}mlp.down_proj", (width, inner), "vision", clipped)
    if vision.standardize:
        yield _tower("vision_tower.std_bias", (width,), "vision")
        yield _tower("vision_tower.std_scale", (width,), "vision")
    yield _tower("embed_vision.embedding_projection.weight", (text_width, width), "vision")


def _unified_vision(vision: UnifiedVisionConfig, text_width: int) -> Iterator[Param]:
    """The 12B's; `transformers` moved the embedder below `embed_vision` and may write it there."""
    width, pixels = vision.mm_embed_dim, 3 * vision.model_patch_size**2

    def row(name: str, shape: Shape) -> Param:
        return _tower(f"vision_embedder.{name}", shape, "vision", (f"model.embed_vision.{name}",))

    for name, inputs in (("patch_ln1", pixels), ("patch_ln2", width), ("pos_norm", width)):
        yield row(f"{name}.weight", (inputs,))
        yield row(f"{name}.bias", (inputs,))
    yield row("patch_dense.weight", (width, pixels))
    yield row("patch_dense.bias", (width,))
    yield row("pos_embedding", (vision.mm_posemb_size, 2, width))
    name = "embed_vision.embedding_projection.weight"
    yield _tower(name, (text_width, width), "vision", (f"model.embed_vision.multimodal_embedder.{name[13:]}",))


def _audio(audio: AudioConfig) -> Iterator[Param]:
    width, clipped = audio.hidden_size, audio.use_clipped_linears
    first, second = audio.subsampling_conv_channels
    at = "audio_tower.subsample_conv_projection."
    for layer, (inputs, outputs) in enumerate(((1, first), (first, second))):
        yield _tower(f"{at}layer{layer}.conv.weight", (outputs, inputs, 3, 3), "audio")
        yield _tower(f"{at}layer{layer}.norm.weight", (outputs,), "audio")
    # (frequency, channel) side by side; the first convolution has as many channels as the spectrum has bins.
    yield _tower(f"{at}input_proj_linear.weight", (width, first // 4 * second), "audio")
    for i in range(audio.num_hidden_layers):
        yield from _conformer(audio, f"audio_tower.layers.{i}.", width, clipped)
    yield _tower("audio_tower.output_proj.weight", (audio.output_proj_dims, width), "audio")
    yield _tower("audio_tower.output_proj.bias", (audio.output_proj_dims,), "audio")


def _conformer(audio: AudioConfig, at: str, width: int, clipped: bool) -> Iterator[Param]:
    for half in ("feed_forward1.", "feed_forward2."):
        yield from _clipped(f"{at}{half}ffw_layer_1", (4 * width, width), "audio", clipped)
        yield from _clipped(f"{at}{half}ffw_layer_2", (width, 4 * width), "audio", clipped)
        yield from _norms(at + half, ("pre_layer_norm", "post_layer_norm"), width, "audio")
    for name in ("q_proj", "k_proj", "v_proj", "post"):
        yield from _clipped(f"{at}self_attn.{name}", (width, width), "audio", clipped)
    yield _tower(f"{at}self_attn.relative_k_proj.weight", (width, width), "audio")
    yield _tower(f"{at}self_attn.per_dim_scale", (width // audio.num_attention_heads,), "audio")
    yield from _clipped(f"{at}lconv1d.linear_start", (2 * width, width), "audio", clipped)
    yield from _clipped(f"{at}lconv1d.linear_end", (width, width), "audio", clipped)
    yield _tower(f"{at}lconv1d.depthwise_conv1d.weight", (width, 1, audio.conv_kernel_size), "audio")
    yield from _norms(f"{at}lconv1d.", ("pre_layer_norm", "conv_norm"), width, "audio")
    yield from _norms(at, ("norm_pre_attn", "norm_post_attn", "norm_out"), width, "audio")
