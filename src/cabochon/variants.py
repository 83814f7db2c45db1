"""The released family as literals: sizes, repositories, names people use for them, and the config of each checkpoint.

Sources: the published config.json and safetensors headers (sizes, shapes), the model card (effective and active
parameters, modalities, licence). Nothing here needs a download, so `random:E2B` and the planner work without the Hub.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from typing import Any, Literal

from .errors import UnknownModelError

Role = Literal["base", "it", "assistant"]
Modality = Literal["text", "image", "video", "audio"]

LICENCE = "Apache-2.0"
OWNER = "google"


@dataclass(frozen=True, slots=True)
class Size:
    """One architecture of the family."""

    name: str
    context: int
    modalities: tuple[Modality, ...]
    stored: int
    """Parameters in the file, all parts."""
    published: str
    """How the model card counts it."""
    active: int
    """Parameters that one text token is multiplied with or added to, as the card counts them."""
    drafter: int
    """Parameters in the assistant's file."""
    draft_tokens: int
    """Tokens to draft per step that the vendor's recipes recommend."""
    hidden_size: int
    layers: int
    period: int
    """Every period-th layer is global."""
    text: dict[str, Any]
    """What the text config of this size has of its own."""
    drafter_text: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Variant:
    """One checkpoint on the Hub."""

    size: Size
    role: Role

    @property
    def name(self) -> str:
        """The repository's name without its owner."""
        suffix = {"base": "", "it": "-it", "assistant": "-it-assistant"}[self.role]
        return f"gemma-4-{self.size.name}{suffix}"

    @property
    def repo(self) -> str:
        return f"{OWNER}/{self.name}"

    @property
    def parameters(self) -> int:
        return self.size.drafter if self.role == "assistant" else self.size.stored

    @property
    def context(self) -> int:
        return self.size.context

    @property
    def modalities(self) -> tuple[Modality, ...]:
        return ("text",) if self.role == "assistant" else self.size.modalities

    @property
    def aliases(self) -> tuple[str, ...]:
        """Other names that mean this checkpoint; the short ones mean the instruction-tuned one."""
        size, tail = self.size.name, {"base": "-base", "it": "", "assistant": "-assistant"}[self.role]
        spellings = {size, size.partition("-")[0]}
        short = [f"{before}{each}{tail}" for each in sorted(spellings) for before in ("", "gemma4:", "gemma-4:")]
        if self.role == "it":
            short += [f"{before}{each}-it" for each in sorted(spellings) for before in ("", "gemma4:")]
        return (self.name, *short)

    def config(self) -> dict[str, Any]:
        """config.json of this checkpoint, in the spelling of the published files, without the writer's notes."""
        return _drafter_config(self.size) if self.role == "assistant" else _config(self.size, self.role)


_SMALL: dict[str, Any] = {
    "attention_k_eq_v": False,
    "hidden_size_per_layer_input": 256,
    "num_attention_heads": 8,
    "sliding_window": 512,
    "use_bidirectional_attention": None,
}
_LARGE: dict[str, Any] = {
    "attention_k_eq_v": True,
    "hidden_size_per_layer_input": 0,
    "num_attention_heads": 16,
    "num_kv_shared_layers": 0,
    "sliding_window": 1024,
    "use_bidirectional_attention": "vision",
}
_HEAR: tuple[Modality, ...] = ("text", "image", "video", "audio")
_SEE: tuple[Modality, ...] = ("text", "image", "video")

E2B = Size(
    name="E2B",
    context=131_072,
    modalities=_HEAR,
    stored=5_123_178_979,
    published="2.3B effective, 5.1B with embeddings",
    active=2_300_000_000,
    drafter=77_993_476,
    draft_tokens=2,
    hidden_size=1536,
    layers=35,
    period=5,
    text={
        **_SMALL,
        "intermediate_size": 6144,
        "num_key_value_heads": 1,
        "num_kv_shared_layers": 20,
        "use_double_wide_mlp": True,
    },
    drafter_text={"hidden_size": 256, "intermediate_size": 2048, "num_attention_heads": 4},
)
E4B = Size(
    name="E4B",
    context=131_072,
    modalities=_HEAR,
    stored=7_996_157_418,
    published="4.5B effective, 8B with embeddings",
    active=4_500_000_000,
    drafter=78_779_908,
    draft_tokens=4,
    hidden_size=2560,
    layers=42,
    period=6,
    text={**_SMALL, "intermediate_size": 10240, "num_key_value_heads": 2, "num_kv_shared_layers": 18},
    drafter_text={"hidden_size": 256, "intermediate_size": 2048, "num_attention_heads": 4},
)
B12 = Size(
    name="12B",
    context=262_144,
    modalities=_HEAR,
    stored=11_959_730_224,
    published="12B",
    active=11_959_730_224,
    drafter=422_856_964,
    draft_tokens=4,
    hidden_size=3840,
    layers=48,
    period=6,
    text={**_LARGE, "intermediate_size": 15360, "num_key_value_heads": 8, "num_global_key_value_heads": 1},
    drafter_text={"hidden_size": 1024, "intermediate_size": 8192},
)
B26 = Size(
    name="26B-A4B",
    context=262_144,
    modalities=_SEE,
    stored=25_805_936_206,
    published="25.2B, 3.8B active",
    active=3_800_000_000,
    drafter=419_711_236,
    draft_tokens=4,
    hidden_size=2816,
    layers=30,
    period=6,
    text={
        **_LARGE,
        "intermediate_size": 2112,
        "num_key_value_heads": 8,
        "num_global_key_value_heads": 2,
        "enable_moe_block": True,
        "moe_intermediate_size": 704,
        "num_experts": 128,
        "top_k_experts": 8,
    },
    drafter_text={"hidden_size": 1024, "intermediate_size": 8192},
)
B31 = Size(
    name="31B",
    context=262_144,
    modalities=_SEE,
    stored=31_273_088_876,
    published="30.7B",
    active=30_700_000_000,
    drafter=469_518_596,
    draft_tokens=4,
    hidden_size=5376,
    layers=60,
    period=6,
    text={
        **_LARGE,
        "intermediate_size": 21504,
        "num_attention_heads": 32,
        "num_key_value_heads": 16,
        "num_global_key_value_heads": 4,
    },
    drafter_text={"hidden_size": 1024, "intermediate_size": 8192},
)

SIZES = (E2B, E4B, B12, B26, B31)
_ROLES: tuple[Role, ...] = ("base", "it", "assistant")
VARIANTS = tuple(Variant(size, role) for size in SIZES for role in _ROLES)


def lookup(name: str) -> Variant | None:
    """The variant that `name` means: a repository, an alias like `gemma4:e4b` or `E4B`; None for anything else."""
    return _BY_NAME.get(name.strip().lower())


def find(name: str) -> Variant:
    """Like `lookup`, but raises `UnknownModelError` with the nearest names."""
    variant = lookup(name)
    if variant is None:
        near = suggest(name)
        hint = f"did you mean {near}?" if near else f"known sizes are {', '.join(size.name for size in SIZES)}."
        raise UnknownModelError(f"There is no model {name!r}; {hint}")
    return variant


def suggest(name: str) -> str | None:
    """The repository that a misspelt name (`google/gemma-4-26b-it`) most likely means; None when nothing is near."""
    if exact := lookup(name):
        return exact.repo
    wanted = name.strip().lower().removeprefix(f"{OWNER}/")
    found = re.search(r"(?<![a-z0-9])e?(\d{1,2})b", wanted)
    if found is None or not ("gemma" in wanted or wanted.startswith(found[0])):
        near = difflib.get_close_matches(wanted, _BY_NAME, 1, cutoff=0.8)
        return _BY_NAME[near[0]].repo if near else None
    billions = {2: E2B, 4: E4B, 12: B12, 26: B26, 31: B31}
    size = billions[min(billions, key=lambda known: abs(known - int(found[1])))]
    role: Role = "assistant" if "assistant" in wanted else "base" if wanted.endswith(("-base", "-pt")) else "it"
    return Variant(size, role).repo


_BY_NAME = {name.lower(): variant for variant in VARIANTS for name in (*variant.aliases, variant.repo)}


def _layer_types(layers: int, period: int) -> list[str]:
    return ["sliding_attention" if (i + 1) % period else "full_attention" for i in range(layers)]


def _text(size: Size, **own: Any) -> dict[str, Any]:
    unified = size is B12
    text = {
        "attention_bias": False,
        "attention_k_eq_v": False,
        "bos_token_id": 2,
        "dtype": "bfloat16",
        "enable_moe_block": False,
        "eos_token_id": 1,
        "final_logit_softcapping": 30.0,
        "global_head_dim": 512,
        "head_dim": 256,
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": size.hidden_size,
        "layer_types": _layer_types(size.layers, size.period),
        "max_position_embeddings": size.context,
        "model_type": "gemma4_unified_text" if unified else "gemma4_text",
        "moe_intermediate_size": None,
        "num_experts": None,
        "num_global_key_value_heads": None,
        "num_hidden_layers": size.layers,
        "pad_token_id": 0,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {
            "full_attention": {"partial_rotary_factor": 0.25, "rope_theta": 1e6, "rope_type": "proportional"},
            "sliding_attention": {"rope_theta": 1e4, "rope_type": "default"},
        },
        "tie_word_embeddings": True,
        "top_k_experts": None,
        "use_double_wide_mlp": False,
        "vocab_size": 262_144,
        "vocab_size_per_layer_input": 262_144,
        **size.text,
        **own,
    }
    if unified:  # its own text class knows no experts
        for key in ("enable_moe_block", "moe_intermediate_size", "num_experts", "top_k_experts"):
            del text[key]
    return text


_MEDIA_IDS = {
    "audio_token_id": 258_881,
    "boa_token_id": 256_000,
    "boi_token_id": 255_999,
    "eoa_token_index": 258_883,
    "eoi_token_id": 258_882,
    "image_token_id": 258_880,
}


def _config(size: Size, role: Role) -> dict[str, Any]:
    unified = size is B12
    return {
        "architectures": [f"Gemma4{'Unified' if unified else ''}ForConditionalGeneration"],
        "audio_config": _audio(size),
        "dtype": "bfloat16",
        "eos_token_id": [1, 106] if role == "it" else 1,
        "model_type": "gemma4_unified" if unified else "gemma4",
        "text_config": _text(size),
        "tie_word_embeddings": True,
        "video_token_id": 258_884,
        "vision_config": _vision(size),
        **_MEDIA_IDS,
    }


def _drafter_config(size: Size) -> dict[str, Any]:
    unified = size is B12
    text = _text(
        size,
        final_logit_softcapping=None,
        hidden_size_per_layer_input=0,
        layer_types=_layer_types(4, 4),
        num_hidden_layers=4,
        num_kv_shared_layers=4,
        use_bidirectional_attention="vision" if unified else None,
        use_double_wide_mlp=False,
        vocab_size_per_layer_input=0,
        **size.drafter_text,
    )
    if size is B26:
        text |= {"enable_moe_block": False, "moe_intermediate_size": None, "num_experts": None, "top_k_experts": None}
    return {
        "architectures": [f"Gemma4{'Unified' if unified else ''}AssistantForCausalLM"],
        "backbone_hidden_size": size.hidden_size,
        "centroid_intermediate_top_k": 32,
        "dtype": "bfloat16",
        "model_type": "gemma4_unified_assistant" if unified else "gemma4_assistant",
        "num_centroids": 2048,
        "text_config": text,
        "tie_word_embeddings": True,
        "use_ordered_embeddings": size in (E2B, E4B),
        **_MEDIA_IDS,
    }


def _vision(size: Size) -> dict[str, Any]:
    if size is B12:
        return {
            "mm_embed_dim": 3840,
            "mm_posemb_size": 1120,
            "model_patch_size": 48,
            "model_type": "gemma4_unified_vision",
            "num_soft_tokens": 280,
            "output_proj_dims": 3840,
            "patch_size": 16,
            "pooling_kernel_size": 3,
            "rms_norm_eps": 1e-6,
        }
    small = size in (E2B, E4B)
    return {
        "default_output_length": 280,
        "dtype": "bfloat16",
        "head_dim": 64 if small else 72,
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": 768 if small else 1152,
        "intermediate_size": 3072 if small else 4304,
        "max_position_embeddings": 131_072,
        "model_type": "gemma4_vision",
        "num_attention_heads": 12 if small else 16,
        "num_hidden_layers": 16 if small else 27,
        "num_key_value_heads": 12 if small else 16,
        "patch_size": 16,
        "pooling_kernel_size": 3,
        "position_embedding_size": 10_240,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_theta": 100.0, "rope_type": "default"},
        "standardize": not small,
        "use_clipped_linears": small,
    }


def _audio(size: Size) -> dict[str, Any] | None:
    if size is B12:
        return {"audio_embed_dim": 640, "model_type": "gemma4_unified_audio", "rms_norm_eps": 1e-6}
    if size not in (E2B, E4B):
        return None
    return {
        "attention_chunk_size": 12,
        "attention_context_left": 13,
        "attention_context_right": 0,
        "attention_invalid_logits_value": -1e9,
        "attention_logit_cap": 50.0,
        "conv_kernel_size": 5,
        "dtype": "bfloat16",
        "gradient_clipping": 1e10,
        "hidden_act": "silu",
        "hidden_size": 1024,
        "model_type": "gemma4_audio",
        "num_attention_heads": 8,
        "num_hidden_layers": 12,
        "output_proj_dims": 1536,
        "residual_weight": 0.5,
        "rms_norm_eps": 1e-6,
        "subsampling_conv_channels": [128, 32],
        "use_clipped_linears": True,
    }
