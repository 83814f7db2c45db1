"""Reading config.json and generation_config.json.

Unusual here: no key is skipped in silence. Every key is used, or listed as ignored with a reason, or an error that
names it; and all that differs from layer to layer is worked out once into `LayerSpec`s, so that no block asks.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from ..errors import ConfigError, brief
from .media import IGNORED, read_audio, read_dtype, read_vision
from .strict_json import Section, read_object
from .values import (
    READS_TARGET,
    DrafterConfig,
    Experts,
    GenerationConfig,
    Kind,
    LayerSpec,
    ModelConfig,
    ModelType,
    Rope,
    TextConfig,
    TokenIds,
)


def read_config(source: str | Path | Mapping[str, Any], *, ignore: Collection[str] = ()) -> ModelConfig:
    """The config of a checkpoint folder, a config.json or its parsed content.

    `ignore` names keys (as the error printed them, e.g. `text_config.foo`) that are passed over on the caller's word.
    Raises `ConfigError` when a key is unknown, missing or contradicts another, `CheckpointError` when there is no file.
    """
    raw = source if isinstance(source, Mapping) else read_object(Path(source), "config.json")
    section = Section(raw, ignore=ignore)
    name = section.text("model_type")
    if name not in _MODEL_TYPES:
        raise ConfigError(_refusal(name))
    model_type = _MODEL_TYPES[name]
    if model_type == "gemma4_text":
        return _flat(section, raw)
    text_section = section.child("text_config")
    text_ids = _text_ids(text_section)
    read_dtype(text_section)
    config = ModelConfig(
        text=_text(text_section, drafter=model_type == "gemma4_assistant"),
        model_type=model_type,
        vision=read_vision(section),
        audio=read_audio(section),
        drafter=_drafter(section) if model_type == "gemma4_assistant" else None,
        tokens=_token_ids(section, *text_ids),
        dtype=read_dtype(section),
        quantization=section.mapping("quantization_config"),
        raw=raw,
    )
    section.must("tie_word_embeddings", True)
    section.close((*IGNORED, "rope_parameters"))  # a tool's default beside the text part's, which alone is read
    return config


def read_generation_config(source: str | Path | Mapping[str, Any] | None) -> GenerationConfig:
    """Sampling defaults of a checkpoint folder, a generation_config.json or its content; the family's without one."""
    if source is None:
        return GenerationConfig()
    if not isinstance(source, Mapping):
        path = Path(source)
        if path.is_dir():
            path = path / "generation_config.json"
        if not path.exists():
            return GenerationConfig()
        source = read_object(path, "generation_config.json")
    section = Section(source, file="generation_config.json")
    base = GenerationConfig()
    greedy = not section.flag("do_sample", True)
    temperature = section.number("temperature", base.temperature)
    return GenerationConfig(
        temperature=0.0 if greedy else temperature,
        top_p=section.number("top_p", base.top_p),
        top_k=section.count("top_k", base.top_k, least=0),
        eos=section.ids("eos_token_id"),
        suppress=section.ids("suppress_tokens"),
        repetition_penalty=section.number("repetition_penalty", base.repetition_penalty),
        min_p=section.number("min_p", base.min_p),
        unread=tuple(key for key, value in section.left().items() if value is not None and key not in _QUIET),
    )


def to_json(config: ModelConfig) -> dict[str, Any]:
    """config.json of a checkpoint as it was read, free to be changed by the caller."""
    return copy.deepcopy(dict(config.raw))


_MODEL_TYPES: dict[str, ModelType] = {
    "gemma4": "gemma4",
    "gemma4_unified": "gemma4_unified",
    "gemma4_text": "gemma4_text",
    "gemma4_unified_text": "gemma4_text",
    "gemma4_assistant": "gemma4_assistant",
    "gemma4_unified_assistant": "gemma4_assistant",
}

_QUIET = {"do_sample", "bos_token_id", "pad_token_id", "transformers_version", "_from_model_config"}


def _refusal(name: str) -> str:
    known = ", ".join(sorted(_MODEL_TYPES))
    if name == "diffusion_gemma":
        return (
            f"model_type '{name}' writes text by block diffusion, which is not supported; take an autoregressive "
            "checkpoint of the same size, for example google/gemma-4-26B-A4B-it"
        )
    return f"model_type {brief(name)} is not of this family; known are {known}"


def _flat(section: Section, raw: Mapping[str, Any]) -> ModelConfig:
    """A text-only checkpoint, whose config.json is the text config itself."""
    quantization, text_ids, dtype = section.mapping("quantization_config"), _text_ids(section), read_dtype(section)
    bos, eos, pad = text_ids
    tokens = TokenIds(bos, eos or (1,), pad, None, None, None, None, None, None, None)
    return ModelConfig(_text(section), "gemma4_text", tokens=tokens, dtype=dtype, quantization=quantization, raw=raw)


def _text_ids(section: Section) -> tuple[int | None, tuple[int, ...], int]:
    return section.one_id("bos_token_id"), section.ids("eos_token_id"), section.count("pad_token_id", 0, least=0)


def _token_ids(section: Section, bos: int | None, eos: tuple[int, ...], pad: int) -> TokenIds:
    """Top-level ids win over the text part's; the end-of-audio id goes by two names."""
    eoa = [found for key in ("eoa_token_id", "eoa_token_index") if (found := section.one_id(key)) is not None]
    if len(set(eoa)) > 1:
        raise section.error("eoa_token_id", f"is {eoa[0]} but eoa_token_index is {eoa[1]}; make them equal")
    top_bos, top_pad = section.one_id("bos_token_id"), section.one_id("pad_token_id")
    return TokenIds(
        bos=bos if top_bos is None else top_bos,
        eos=section.ids("eos_token_id") or eos or (1,),
        pad=pad if top_pad is None else top_pad,
        boi=section.one_id("boi_token_id"),
        image=section.one_id("image_token_id"),
        eoi=section.one_id("eoi_token_id"),
        boa=section.one_id("boa_token_id"),
        audio=section.one_id("audio_token_id"),
        eoa=eoa[0] if eoa else None,
        video=section.one_id("video_token_id"),
    )


def _text(section: Section, *, drafter: bool = False) -> TextConfig:
    section.must("model_type", "gemma4_text", "gemma4_unified_text")
    section.must("hidden_activation", "gelu_pytorch_tanh")
    section.must("attention_bias", False)
    section.must("tie_word_embeddings", True)
    spans = section.text("use_bidirectional_attention", "")
    if spans not in ("", "vision"):
        raise section.error(
            "use_bidirectional_attention", f"is {brief(spans)}; a text generator has 'vision' or null here"
        )
    ple_width = section.count("hidden_size_per_layer_input", 0, least=0)
    ple_vocab = section.count("vocab_size_per_layer_input", 0, least=0)
    if ple_width and not ple_vocab:
        raise section.error("vocab_size_per_layer_input", f"is 0 but hidden_size_per_layer_input is {ple_width}")
    config = TextConfig(
        vocab_size=section.count("vocab_size"),
        hidden_size=section.count("hidden_size"),
        layers=_layers(section, ple_width, drafter),
        rms_norm_eps=section.number("rms_norm_eps"),
        final_logit_softcapping=section.optional_number("final_logit_softcapping"),
        hidden_size_per_layer_input=ple_width,
        # Published files of sizes without per-layer embeddings carry a stray vocabulary for them.
        vocab_size_per_layer_input=ple_vocab if ple_width else 0,
        two_way_spans=spans == "vision",
        max_position_embeddings=section.count("max_position_embeddings"),
    )
    section.close(IGNORED)
    return config


def _layers(section: Section, ple_width: int, drafter: bool) -> tuple[LayerSpec, ...]:
    kinds = _kinds(section)
    q_heads = section.count("num_attention_heads")
    k_eq_v = section.flag("attention_k_eq_v", False)
    heads = _heads(section, kinds, k_eq_v)
    ropes = _ropes(section, {kind: head_dim for kind, (head_dim, _) in zip(kinds, heads, strict=True)})
    window, width = section.count("sliding_window"), section.count("intermediate_size")
    wide, experts = section.flag("use_double_wide_mlp", False), _experts(section)
    sources = _sources(section, kinds, drafter)
    if q_heads % max(kv for _, kv in heads):
        raise section.error("num_attention_heads", f"is {q_heads}, not a multiple of the key-value heads")
    return tuple(
        LayerSpec(
            index=i,
            kind=kind,
            q_heads=q_heads,
            kv_heads=heads[i][1],
            head_dim=heads[i][0],
            window=window if kind == "sliding" else None,
            rope=ropes[kind],
            k_eq_v=k_eq_v and kind == "global",
            reads_kv_of=sources[i],
            ffn_width=2 * width if wide and sources[i] != i else width,
            experts=experts,
            ple_width=ple_width,
        )
        for i, kind in enumerate(kinds)
    )


def _kinds(section: Section) -> list[Kind]:
    """Sliding or global per layer; five to one when the file doesn't say."""
    count = section.count("num_hidden_layers", most=section.MOST_LAYERS)
    names: dict[str, Kind] = {"sliding_attention": "sliding", "full_attention": "global"}
    default = ["sliding_attention" if (i + 1) % 6 else "full_attention" for i in range(count)]
    listed = section.take("layer_types", default)
    if not isinstance(listed, list) or len(listed) != count:
        raise section.error("layer_types", f"must list num_hidden_layers = {count} entries")
    if strange := [item for item in listed if not isinstance(item, str) or item not in names]:
        raise section.error("layer_types", f"holds {brief(strange[0])}; known are {' and '.join(names)}")
    if listed[-1] != "full_attention":
        raise section.error("layer_types", "ends with a sliding layer; the last layer of this family is full_attention")
    return [names[item] for item in listed]


def _heads(section: Section, kinds: list[Kind], k_eq_v: bool) -> list[tuple[int, int]]:
    """(head_dim, kv_heads) of every layer.

    Published files give the global layers' values in two keys; newer writers use `per_layer_config`, a sparse map from
    layer number ("05") to what differs there.
    """
    head_dim, kv_heads = section.count("head_dim"), section.count("num_key_value_heads")
    overrides = section.mapping("per_layer_config")
    if overrides is None:
        global_dim = section.count("global_head_dim", 512)
        global_kv = section.count("num_global_key_value_heads", kv_heads)
        one = {"sliding": (head_dim, kv_heads), "global": (global_dim, global_kv if k_eq_v else kv_heads)}
        return [one[kind] for kind in kinds]
    heads = [(head_dim, kv_heads)] * len(kinds)
    for key, values in overrides.items():
        if not key.isdecimal() or int(key) >= len(kinds):
            raise section.error(f"per_layer_config.{key}", f"is not a layer number below {len(kinds)}")
        if not isinstance(values, Mapping):
            raise section.error(f"per_layer_config.{key}", f"is {brief(values)}; it must be an object")
        here = Section(values, section.name(f"per_layer_config.{key}"), file=section.file, ignore=section.ignore)
        heads[int(key)] = here.count("head_dim", head_dim), here.count("num_key_value_heads", kv_heads)
        here.close()
    for kind in ("sliding", "global"):
        if len({pair for pair, its in zip(heads, kinds, strict=True) if its == kind}) > 1:
            raise section.error("per_layer_config", f"gives {kind} layers different heads; they must be alike")
    return heads


def _ropes(section: Section, head_dims: dict[Kind, int]) -> dict[Kind, Rope]:
    both = section.mapping("rope_parameters")
    names: dict[Kind, str] = {"sliding": "sliding_attention", "global": "full_attention"}
    if both is None:
        return {
            kind: Rope(*(1e4, dim) if kind == "sliding" else (1e6, 2 * (dim // 8))) for kind, dim in head_dims.items()
        }
    parts = Section(both, section.name("rope_parameters"), file=section.file, ignore=section.ignore)
    ropes: dict[Kind, Rope] = {}
    for kind, name in names.items():
        part = parts.child(name)
        proportional = part.text("rope_type", "default") == "proportional"
        if not proportional and kind == "global":
            raise part.error("rope_type", "must be 'proportional' on full_attention layers")
        share = part.number("partial_rotary_factor", 1.0)
        part.must("factor", 1.0)
        if proportional is (kind == "sliding") or not 0 < share <= 1 or (kind == "sliding" and share != 1):
            raise part.error("partial_rotary_factor", f"or rope_type does not fit {name} layers")
        if kind in head_dims:
            ropes[kind] = Rope(part.number("rope_theta"), 2 * int(share * head_dims[kind] // 2))
        part.close(("rope_theta",))
    parts.close()
    return ropes


def _experts(section: Section) -> Experts | None:
    """Early files call the experts' width expert_intermediate_size; files without experts hold nulls or leftovers."""
    count, per_token = (section.count(key, 0, least=0) for key in ("num_experts", "top_k_experts"))
    old = section.count("expert_intermediate_size", 0, least=0)
    width = section.count("moe_intermediate_size", old, least=0)
    if not section.flag("enable_moe_block", False):
        return None
    if not (count and width and 0 < per_token <= count) or old not in (0, width):
        raise section.error(
            "enable_moe_block", f"is true but the experts are {count} of width {width}, {per_token} per token"
        )
    return Experts(count, per_token, width)


def _sources(section: Section, kinds: list[Kind], drafter: bool) -> list[int]:
    """`reads_kv_of` of every layer: the last layers read the last layer of their kind that does not share."""
    count = len(kinds)
    shared = section.count("num_kv_shared_layers", count if drafter else 0, least=0)
    if drafter:
        if shared != count:
            raise section.error("num_kv_shared_layers", f"is {shared}; all {count} layers of an assistant share")
        return [READS_TARGET] * count
    own = list(range(count - shared)) if shared < count else []
    last = {kinds[i]: i for i in own}
    if missing := [kind for kind in kinds if kind not in last]:
        raise section.error("num_kv_shared_layers", f"is {shared}; no {missing[0]} layer is left to share from")
    return own + [last[kind] for kind in kinds[len(own) :]]


def _drafter(section: Section) -> DrafterConfig:
    return DrafterConfig(
        backbone_hidden_size=section.count("backbone_hidden_size"),
        use_ordered_embeddings=section.flag("use_ordered_embeddings", False),
        num_centroids=section.count("num_centroids", 2048),
        centroid_intermediate_top_k=section.count("centroid_intermediate_top_k", 32),
    )
