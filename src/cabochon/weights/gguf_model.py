"""What a GGUF file says about a Gemma 4 model, in the words of a checkpoint folder, and the other way round.

llama.cpp's `gemma4` architecture keeps the checkpoint's numbers under its own keys and the tokenizer as bare lists. A
few things are not said at all and are read off the tensors: whether values are keys (no `attn_v` on global layers) and
how much of a global head turns (`rope_freqs` is 1 where it turns and 1e30 where it doesn't).

A drafter is an architecture of its own, `gemma4-assistant`, with the same keys. llama.cpp's converter leaves the
clusters of E2B's and E4B's drafters out, so from GGUF these look at every token instead.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from ..config import ModelConfig
from ..errors import CheckpointError, brief
from .gguf import GGUFFile

ARCHITECTURE = "gemma4"
DRAFTER = "gemma4-assistant"
CONTROL, USER_DEFINED, BYTE, NORMAL = 3, 4, 6, 1
_STOPS = ("<eos>", "<turn|>", "<|tool_response>")


def config_of(file: GGUFFile) -> dict[str, Any]:
    """A config.json (text part only) for the model or the drafter in `file`."""
    found = _Reader(file.metadata)
    architecture = found.take("general.architecture")
    if architecture == "clip":
        raise CheckpointError("this GGUF file holds eyes and ears only; name the text model that lies beside it.")
    if architecture not in (ARCHITECTURE, DRAFTER):
        raise CheckpointError(
            f"this GGUF file holds a {brief(architecture)} model; {ARCHITECTURE!r} is what can be run here."
        )
    sliding = found.take("attention.sliding_window_pattern")
    layers = found.take("block_count")
    if not isinstance(sliding, list) or len(sliding) != layers or not all(type(s) is bool for s in sliding):
        raise CheckpointError(
            f"the GGUF file has {brief(layers)} layers, but its sliding_window_pattern does not list as many."
        )
    kv_sliding, kv_global = _per_kind(found.counts("attention.head_count_kv"), sliding, "attention.head_count_kv")
    widths = found.counts("feed_forward_length")
    experts = found.take("expert_count", 0)
    ple = found.take("embedding_length_per_layer_input", 0)
    vocabulary = file.tensors["token_embd.weight"].shape[0] if "token_embd.weight" in file.tensors else 0
    text = {
        "model_type": "gemma4_text",
        "vocab_size": vocabulary or len(listed(file.metadata, "tokenizer.ggml.tokens", str)),
        "hidden_size": found.take("embedding_length"),
        "num_hidden_layers": layers,
        "layer_types": ["sliding_attention" if s else "full_attention" for s in sliding],
        "intermediate_size": min(widths),
        "use_double_wide_mlp": max(widths) > min(widths),
        "num_attention_heads": found.take("attention.head_count"),
        "num_key_value_heads": kv_sliding,
        "num_global_key_value_heads": kv_global,
        "head_dim": found.take("attention.key_length_swa"),
        "global_head_dim": found.take("attention.key_length"),
        "attention_k_eq_v": _keys_are_values(file, sliding)
        if architecture == ARCHITECTURE
        else kv_sliding != kv_global,
        "sliding_window": found.take("attention.sliding_window"),
        "num_kv_shared_layers": found.take("attention.shared_kv_layers", 0),
        "hidden_size_per_layer_input": ple,
        "vocab_size_per_layer_input": vocabulary if ple else 0,
        "rms_norm_eps": _decimal(found.number("attention.layer_norm_rms_epsilon")),
        "final_logit_softcapping": found.take("final_logit_softcapping", None),
        "max_position_embeddings": found.take("context_length"),
        "rope_parameters": {
            "full_attention": {
                "rope_type": "proportional",
                "rope_theta": _decimal(found.number("rope.freq_base")),
                "partial_rotary_factor": _turning_share(file),
            },
            "sliding_attention": {"rope_type": "default", "rope_theta": _decimal(found.number("rope.freq_base_swa"))},
        },
        "enable_moe_block": bool(experts),
        # The sizes with per-layer embeddings are causal everywhere; the others let image spans see themselves.
        "use_bidirectional_attention": None if ple or architecture == DRAFTER else "vision",
        "bos_token_id": file.metadata.get("tokenizer.ggml.bos_token_id", 2),
        "pad_token_id": file.metadata.get("tokenizer.ggml.padding_token_id", 0),
    }
    if experts:
        text |= {
            "num_experts": experts,
            "top_k_experts": found.take("expert_used_count"),
            "moe_intermediate_size": found.take("expert_feed_forward_length"),
        }
    raw = {"text_config": text, "eos_token_id": stops_of(file.metadata), "dtype": "bfloat16"}
    if architecture == DRAFTER:
        return raw | {"model_type": "gemma4_assistant", "backbone_hidden_size": found.take("embedding_length_out")}
    return raw | {"model_type": "gemma4"}


class _Reader:
    """Metadata by key, with the architecture's prefix where a key has no section of its own."""

    def __init__(self, metadata: Mapping[str, Any]) -> None:
        self.metadata = metadata
        self.prefix = DRAFTER if metadata.get("general.architecture") == DRAFTER else ARCHITECTURE

    def take(self, key: str, *default: Any) -> Any:
        full = key if key.startswith(("general.", "tokenizer.")) else f"{self.prefix}.{key}"
        if full not in self.metadata and not default:
            raise CheckpointError(
                f"the GGUF file does not say {full}; convert the model again with a current llama.cpp."
            )
        return self.metadata.get(full, *default)

    def number(self, key: str) -> float:
        value = self.take(key)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise CheckpointError(f"the GGUF file says {self.prefix}.{key} is {brief(value)}; it must be a number.")
        return value

    def counts(self, key: str, *default: Any) -> list[int]:
        """One count, or one per layer."""
        value = self.take(key, *default)
        listed = value if isinstance(value, list) else [value]
        if not listed or not all(type(v) is int and 0 <= v < 2**31 for v in listed):
            raise CheckpointError(f"the GGUF file says {self.prefix}.{key} is {brief(value)}; it must be a count.")
        return listed


def listed(metadata: Mapping[str, Any], key: str, kind: type) -> list[Any]:
    """The list of `kind` that `metadata` has under `key`; empty without one."""
    value = metadata.get(key, [])
    if not isinstance(value, list) or not all(type(item) is kind for item in value):
        raise CheckpointError(f"the GGUF file's {key} is {brief(value)}; it must be a list of {kind.__name__}.")
    return value


def _per_kind(value: Sequence[int], sliding: Sequence[bool], key: str) -> tuple[int, int]:
    """(on sliding layers, on global layers) of a number that is stored once or per layer."""
    if len(value) == 1:
        return value[0], value[0]
    kinds = [{v for v, s in zip(value, sliding, strict=False) if s is kind} for kind in (True, False)]
    if len(value) != len(sliding) or any(len(kind) != 1 for kind in kinds):
        raise CheckpointError(f"the GGUF file's {key} is not one value per kind of layer.")
    return kinds[0].pop(), kinds[1].pop()


def _keys_are_values(file: GGUFFile, sliding: Sequence[bool]) -> bool:
    first_global = sliding.index(False) if False in sliding else 0
    return (
        f"blk.{first_global}.attn_k.weight" in file.tensors and f"blk.{first_global}.attn_v.weight" not in file.tensors
    )


def _turning_share(file: GGUFFile) -> float:
    if "rope_freqs.weight" not in file.tensors:
        return 0.25
    factors = file.tensors["rope_freqs.weight"].dequantize()
    return float((factors == 1).float().mean())


def _decimal(value: float) -> float:
    """The short decimal that was meant before it was stored as float32 (1e-06, not 9.999999974752427e-07)."""
    return float(f"{value:.7g}")


def stops_of(metadata: Mapping[str, Any]) -> list[int]:
    tokens = listed(metadata, "tokenizer.ggml.tokens", str)
    return [i for i, token in enumerate(tokens[:512]) if token in _STOPS] or [1]


def tokenizer_of(metadata: Mapping[str, Any]) -> str:
    """tokenizer.json for the vocabulary in the metadata (byte-fallback BPE over spaces written as U+2581)."""
    for key in ("token_type", "merges"):
        if f"tokenizer.ggml.{key}" not in metadata:
            raise CheckpointError(
                f"the GGUF file holds no tokenizer.ggml.{key}; give a folder with tokenizer.json instead."
            )
    tokens, kinds = listed(metadata, "tokenizer.ggml.tokens", str), listed(metadata, "tokenizer.ggml.token_type", int)
    merges = [merge.split(" ") for merge in listed(metadata, "tokenizer.ggml.merges", str)]
    if any(len(pair) != 2 for pair in merges) or len(kinds) != len(tokens):
        raise CheckpointError("the GGUF file's vocabulary lists don't fit together; convert the model again.")
    added = [
        {
            "id": i,
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for i, (token, kind) in enumerate(zip(tokens, kinds, strict=True))
        if kind in (CONTROL, USER_DEFINED)
    ]
    return json.dumps(
        {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": added,
            "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
            "pre_tokenizer": None,
            "post_processor": None,
            "decoder": {
                "type": "Sequence",
                "decoders": [
                    {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                    {"type": "ByteFallback"},
                    {"type": "Fuse"},
                ],
            },
            "model": {
                "type": "BPE",
                "dropout": None,
                "unk_token": "<unk>",
                "fuse_unk": True,
                "byte_fallback": True,
                "ignore_merges": False,
                "vocab": {token: i for i, token in enumerate(tokens)},
                "merges": merges,
            },
        },
        ensure_ascii=False,
    )


def metadata_of(config: ModelConfig, tokenizer_json: str | None, template: str | None, name: str) -> dict[str, Any]:
    """The metadata that llama.cpp's loader wants for `config`; the inverse of `config_of` and `tokenizer_of`."""
    text = config.text
    slide = next(spec for spec in text.layers if spec.kind == "sliding")
    wide = next(spec for spec in text.layers if spec.kind == "global")
    assert slide.window is not None
    said: dict[str, Any] = {
        "block_count": len(text.layers),
        "context_length": text.max_position_embeddings,
        "embedding_length": text.hidden_size,
        "feed_forward_length": [spec.ffn_width for spec in text.layers],
        "attention.head_count": slide.q_heads,
        "attention.head_count_kv": [spec.kv_heads for spec in text.layers],
        "attention.layer_norm_rms_epsilon": text.rms_norm_eps,
        "attention.key_length": wide.head_dim,
        "attention.value_length": wide.head_dim,
        "attention.key_length_swa": slide.head_dim,
        "attention.value_length_swa": slide.head_dim,
        "attention.sliding_window": slide.window,
        "attention.sliding_window_pattern": [spec.kind == "sliding" for spec in text.layers],
        "attention.shared_kv_layers": sum(not spec.owns_kv for spec in text.layers),
        "embedding_length_per_layer_input": text.hidden_size_per_layer_input,
        "rope.freq_base": wide.rope.theta,
        "rope.freq_base_swa": slide.rope.theta,
        "rope.dimension_count": wide.head_dim,
        "rope.dimension_count_swa": slide.head_dim,
    }
    if text.final_logit_softcapping is not None:
        said["final_logit_softcapping"] = text.final_logit_softcapping
    if experts := slide.experts:
        said |= {
            "expert_count": experts.count,
            "expert_used_count": experts.per_token,
            "expert_feed_forward_length": experts.width,
        }
    if config.drafter is not None:
        said |= {
            "embedding_length_out": config.drafter.backbone_hidden_size,
            "nextn_predict_layers": len(text.layers),
        }
    architecture = DRAFTER if config.drafter else ARCHITECTURE
    metadata: dict[str, Any] = {"general.architecture": architecture, "general.type": "model", "general.name": name}
    metadata |= {f"{architecture}.{key}": value for key, value in said.items()}
    metadata["general.quantization_version"] = 2
    if tokenizer_json is not None:
        metadata |= _vocabulary(json.loads(tokenizer_json), text.vocab_size)
        metadata["tokenizer.ggml.bos_token_id"] = config.tokens.bos if config.tokens.bos is not None else 2
        metadata["tokenizer.ggml.eos_token_id"] = config.tokens.eos[0]
        metadata["tokenizer.ggml.padding_token_id"] = config.tokens.pad
    if template is not None:
        metadata["tokenizer.chat_template"] = template
    return metadata


_RENDERED = {
    "<|channel>",
    "<channel|>",
    "<|tool_call>",
    "<tool_call|>",
    "<|tool_response>",
    "<tool_response|>",
    '<|"|>',
}
"""Control tokens that llama.cpp's chat parser has to see as text."""


def _vocabulary(tokenizer: Mapping[str, Any], size: int) -> dict[str, Any]:
    pieces = {i: token for token, i in tokenizer["model"]["vocab"].items()}
    special = {token["id"]: token["content"] for token in tokenizer["added_tokens"]}
    tokens = [special.get(i, pieces.get(i, f"<unused{i}>")) for i in range(size)]
    kinds = [NORMAL] * size
    for i, token in special.items():
        kinds[i] = USER_DEFINED if token in _RENDERED else CONTROL
    for i, token in pieces.items():
        if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            kinds[i] = BYTE
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in tokenizer["model"]["merges"]]
    return {
        "tokenizer.ggml.model": ARCHITECTURE,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [-1000.0] * size,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.add_space_prefix": False,
        "tokenizer.ggml.add_bos_token": True,
    }
