"""What a checkpoint is, read strictly from its config.json (standard library only)."""

from .read import read_config, read_generation_config, to_json
from .values import (
    MEDIA,
    READS_TARGET,
    AudioConfig,
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
    UnifiedAudioConfig,
    UnifiedVisionConfig,
    VisionConfig,
)

__all__ = [
    "MEDIA",
    "READS_TARGET",
    "AudioConfig",
    "DrafterConfig",
    "Experts",
    "GenerationConfig",
    "Kind",
    "LayerSpec",
    "ModelConfig",
    "ModelType",
    "Rope",
    "TextConfig",
    "TokenIds",
    "UnifiedAudioConfig",
    "UnifiedVisionConfig",
    "VisionConfig",
    "read_config",
    "read_generation_config",
    "to_json",
]
