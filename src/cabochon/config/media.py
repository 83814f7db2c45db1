"""Reading the parts of a config that describe images and sound."""

from __future__ import annotations

from ..errors import brief
from .strict_json import Section
from .values import AudioConfig, UnifiedAudioConfig, UnifiedVisionConfig, VisionConfig

_WRITER = "written by the library that saved the file, without effect on the network"
IGNORED = {
    **dict.fromkeys(("_name_or_path", "architectures", "transformers_version", "return_dict", "problem_type"), _WRITER),
    **dict.fromkeys(("id2label", "label2id", "is_encoder_decoder", "chunk_size_feed_forward", "use_cache"), _WRITER),
    **dict.fromkeys(("output_attentions", "output_hidden_states", "unsloth_version", "unsloth_fixed"), _WRITER),
    "model_name": _WRITER,
    "initializer_range": "only a fresh network is drawn with it",
    "attention_dropout": "used in Google's training only",
}
_VISION_ONLY = {
    "global_head_dim": "repeats head_dim",
    "max_position_embeddings": "a bound that position_embedding_size replaces",
}


def read_dtype(section: Section) -> str:
    old = section.text("torch_dtype", "bfloat16")
    return section.text("dtype", old)


def read_vision(section: Section) -> VisionConfig | UnifiedVisionConfig | None:
    """The image part. `vision_soft_tokens_per_image` repeats its default number of tokens."""
    repeated = section.count("vision_soft_tokens_per_image", 280)
    if not section.has("vision_config"):
        return None
    part = section.child("vision_config")
    kind = part.text("model_type")
    if kind not in ("gemma4_vision", "gemma4_unified_vision"):
        raise part.error("model_type", f"is {brief(kind)}; known are gemma4_vision and gemma4_unified_vision")
    read_dtype(part)
    return _vision_transformer(part, repeated) if kind == "gemma4_vision" else _vision_unified(part)


def _vision_transformer(part: Section, soft_tokens: int) -> VisionConfig:
    rope = part.child("rope_parameters")
    rope.must("rope_type", "default", "axial")
    heads = part.count("num_attention_heads")
    part.must("num_key_value_heads", heads)
    part.must("attention_bias", False)
    part.must("hidden_activation", "gelu_pytorch_tanh")
    config = VisionConfig(
        hidden_size=part.count("hidden_size"),
        intermediate_size=part.count("intermediate_size"),
        num_hidden_layers=part.count("num_hidden_layers", most=part.MOST_LAYERS),
        num_attention_heads=heads,
        head_dim=part.count("head_dim"),
        rms_norm_eps=part.number("rms_norm_eps"),
        rope_theta=rope.number("rope_theta", 100.0),
        patch_size=part.count("patch_size"),
        pooling_kernel_size=part.count("pooling_kernel_size"),
        position_embedding_size=part.count("position_embedding_size"),
        use_clipped_linears=part.flag("use_clipped_linears", False),
        standardize=part.flag("standardize", False),
        soft_tokens=part.count("default_output_length", soft_tokens),
    )
    if config.soft_tokens != soft_tokens:
        raise part.error(
            "default_output_length", f"is {config.soft_tokens} but vision_soft_tokens_per_image is {soft_tokens}"
        )
    rope.close()
    part.close({**IGNORED, **_VISION_ONLY})
    return config


def _vision_unified(part: Section) -> UnifiedVisionConfig:
    config = UnifiedVisionConfig(
        patch_size=part.count("patch_size"),
        pooling_kernel_size=part.count("pooling_kernel_size"),
        mm_embed_dim=part.count("mm_embed_dim"),
        mm_posemb_size=part.count("mm_posemb_size"),
        rms_norm_eps=part.number("rms_norm_eps"),
        soft_tokens=part.count("num_soft_tokens", 280),
    )
    part.must("model_patch_size", config.model_patch_size)
    part.must("output_proj_dims", config.mm_embed_dim)
    part.close(IGNORED)
    return config


def read_audio(section: Section) -> AudioConfig | UnifiedAudioConfig | None:
    if not section.has("audio_config"):
        return None
    part = section.child("audio_config")
    kind = part.text("model_type")
    if kind not in ("gemma4_audio", "gemma4_unified_audio"):
        raise part.error("model_type", f"is {brief(kind)}; known are gemma4_audio and gemma4_unified_audio")
    read_dtype(part)
    if kind == "gemma4_audio":
        return _audio_conformer(part)
    width = part.count("audio_embed_dim", 640)
    for key in ("audio_samples_per_token", "hidden_size", "output_proj_dims"):
        part.must(key, width)
    config = UnifiedAudioConfig(width, part.number("rms_norm_eps"))
    part.close(IGNORED)
    return config


def _audio_conformer(part: Section) -> AudioConfig:
    part.must("hidden_act", "silu")
    channels = part.ids("subsampling_conv_channels")
    if len(channels) != 2:
        raise part.error("subsampling_conv_channels", f"is {list(channels)}; it must hold two numbers")
    config = AudioConfig(
        hidden_size=part.count("hidden_size"),
        num_hidden_layers=part.count("num_hidden_layers", most=part.MOST_LAYERS),
        num_attention_heads=part.count("num_attention_heads"),
        attention_chunk_size=part.count("attention_chunk_size"),
        attention_context_left=part.count("attention_context_left"),
        attention_context_right=part.count("attention_context_right", least=0),
        attention_logit_cap=part.number("attention_logit_cap"),
        attention_invalid_logits_value=part.number("attention_invalid_logits_value"),
        subsampling_conv_channels=(channels[0], channels[1]),
        conv_kernel_size=part.count("conv_kernel_size"),
        residual_weight=part.number("residual_weight"),
        gradient_clipping=part.number("gradient_clipping"),
        use_clipped_linears=part.flag("use_clipped_linears"),
        rms_norm_eps=part.number("rms_norm_eps"),
        output_proj_dims=part.count("output_proj_dims"),
    )
    part.close(IGNORED)
    return config
