"""The vision and audio towers and the encoder-free embedders against the reference, on calm weights in float32."""

import numpy as np
import pytest
import torch
from transformers import Gemma4AudioConfig, Gemma4VisionConfig
from transformers.models.gemma4.modeling_gemma4 import Gemma4AudioModel, Gemma4MultimodalEmbedder, Gemma4VisionModel
from transformers.models.gemma4_unified.configuration_gemma4_unified import (
    Gemma4UnifiedAudioConfig,
    Gemma4UnifiedTextConfig,
    Gemma4UnifiedVisionConfig,
)
from transformers.models.gemma4_unified.modeling_gemma4_unified import (
    Gemma4UnifiedMultimodalEmbedder,
    Gemma4UnifiedVisionEmbedder,
)

from cabochon.config import AudioConfig, UnifiedVisionConfig, VisionConfig
from cabochon.media import audio as sound
from cabochon.media import image
from cabochon.model.audio import AudioTower
from cabochon.model.layers import Projector
from cabochon.model.unified import VisionEmbedder
from cabochon.model.vision import VisionTower

VISION = {
    "E": VisionConfig(64, 96, 3, 4, 16, 1e-6, 100.0, 16, 3, 512, True, False, 280),
    "large": VisionConfig(72, 104, 3, 4, 24, 1e-6, 100.0, 16, 3, 512, False, True, 280),
}
AUDIO = AudioConfig(64, 3, 4, 12, 13, 0, 50.0, -1e9, (128, 32), 5, 0.5, 1e10, True, 1e-6, 80)


def calm(module: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Matrices that keep the scale, norms near one, clip ranges that do cut: all parts have something to say."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            noise = torch.randn(tensor.shape, generator=draw)
            if name.endswith(("_min", "_max")):
                tensor.copy_((2.0 + 0.5 * noise.abs()) * (-1 if name.endswith("_min") else 1))
            elif "_norm.weight" in name and any(part in name for part in ("q_norm", "k_norm")):
                tensor.copy_(tensor.shape[-1] ** -0.25 * (1 + 0.1 * noise))
            elif "norm" in name or "_ln" in name or "std_" in name:
                bias = name.endswith("bias")
                tensor.copy_(0.1 * noise if bias else 0.5 + 0.1 * noise)
            elif tensor.dim() >= 2 and "position" not in name and "pos_" not in name:
                tensor.copy_(noise * (tensor[0].numel() ** -0.5))
            else:
                tensor.copy_(0.3 * noise)
    return module.eval()


def same_weights(ours: torch.nn.Module, theirs: torch.nn.Module) -> None:
    ours.load_state_dict(theirs.state_dict(), strict=True)


def vision_pair(kind: str) -> tuple[VisionTower, Gemma4VisionModel]:
    config = VISION[kind]
    theirs = Gemma4VisionModel(
        Gemma4VisionConfig(
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=config.num_attention_heads,
            num_key_value_heads=config.num_attention_heads,
            head_dim=config.head_dim,
            global_head_dim=config.head_dim,
            position_embedding_size=config.position_embedding_size,
            use_clipped_linears=config.use_clipped_linears,
            standardize=config.standardize,
        )
    )
    calm(theirs, 7)
    ours = VisionTower(config)
    same_weights(ours, theirs)
    return ours, theirs


def padded(patches: image.Patches, budget: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What the published processor makes of a picture: values in 0..1, everything filled up to the budget."""
    missing = budget * 9 - len(patches.values)
    values = np.pad(patches.values.astype(np.float32) / 255, ((0, missing), (0, 0)))
    positions = np.pad(patches.positions, ((0, missing), (0, 0)), constant_values=-1)
    return torch.from_numpy(values)[None], torch.from_numpy(positions)[None]


def picture(height: int, width: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8)


@pytest.mark.parametrize("kind", VISION)
@pytest.mark.parametrize("size", [(48, 96), (131, 95), (600, 30)])
@torch.inference_mode()
def test_vision_tower_equals_reference(kind, size):
    ours, theirs = vision_pair(kind)
    patches = image.cut(image.resize(picture(*size, 1), 70), 16)
    expected = theirs(*padded(patches, 70)).last_hidden_state
    got = ours(torch.from_numpy(patches.values)[None], patches.rows, patches.columns)[0]
    assert got.shape == expected.shape == (patches.rows * patches.columns // 9, VISION[kind].hidden_size)
    assert expected.std() > 0.1
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=0)


@torch.inference_mode()
def test_pictures_of_one_size_do_not_touch_each_other():
    ours, _ = vision_pair("E")
    pair = [image.cut(picture(96, 144, seed), 16) for seed in (1, 2)]
    together = ours(torch.from_numpy(np.stack([p.values for p in pair])), 6, 9)
    for one, patches in zip(together, pair, strict=True):
        alone = ours(torch.from_numpy(patches.values)[None], 6, 9)[0]
        torch.testing.assert_close(one, alone, atol=2e-5, rtol=0)


@pytest.mark.parametrize("samples", [161, 640, 16_001, 44_100, 83_333])
@torch.inference_mode()
def test_audio_tower_equals_reference(samples):
    """83,333 samples make 131 tokens: eleven blocks of twelve, the last one short, and windows that cross blocks."""
    theirs = Gemma4AudioModel(
        Gemma4AudioConfig(
            hidden_size=64, num_hidden_layers=3, num_attention_heads=4, output_proj_dims=80, use_clipped_linears=True
        )
    )
    calm(theirs, 3)
    ours = AudioTower(AUDIO)
    same_weights(ours, theirs)
    wave = (np.random.default_rng(samples).standard_normal(samples) * 0.1).astype(np.float32)
    mel = torch.from_numpy(sound.log_mel(wave))
    filled = torch.cat([mel, torch.zeros(5, 128)])[None]
    mask = torch.arange(len(mel) + 5)[None] < len(mel)
    out = theirs(filled, mask)
    expected = out.last_hidden_state[out.attention_mask]
    got = ours(mel)
    assert len(got) == len(expected) == sound.soft_tokens(samples, tower=True)
    assert expected.std() > 0.1
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=0)


@torch.inference_mode()
def test_projector_equals_reference():
    theirs = calm(
        Gemma4MultimodalEmbedder(Gemma4VisionConfig(hidden_size=64), Gemma4UnifiedTextConfig(hidden_size=48)), 5
    )
    ours = Projector(64, 48, 1e-6)
    same_weights(ours, theirs)
    x = torch.randn(9, 64)
    torch.testing.assert_close(ours(x), theirs(x), atol=1e-5, rtol=0)


@torch.inference_mode()
def test_encoder_free_embedders_equal_reference():
    text = Gemma4UnifiedTextConfig(hidden_size=56)
    theirs = Gemma4UnifiedVisionEmbedder(
        Gemma4UnifiedVisionConfig(mm_embed_dim=40, output_proj_dims=40, mm_posemb_size=64), text
    )
    calm(theirs, 11)
    state = theirs.state_dict()
    ours, last = VisionEmbedder(UnifiedVisionConfig(16, 3, 40, 64, 1e-6, 280)), Projector(40, 56, 1e-6)
    prefix = "multimodal_embedder."
    ours.load_state_dict({name: t for name, t in state.items() if not name.startswith(prefix)}, strict=True)
    last.load_state_dict({n.removeprefix(prefix): t for n, t in state.items() if n.startswith(prefix)}, strict=True)
    tiles = image.cut(picture(144, 240, 4), 48)
    positions = torch.from_numpy(tiles.positions)[None]
    expected = theirs(torch.from_numpy(tiles.values.astype(np.float32) / 255)[None], positions).pooler_output[0]
    got = last(ours(torch.from_numpy(tiles.values)[None], tiles.rows, tiles.columns))[0]
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=0)

    their_ear = calm(Gemma4UnifiedMultimodalEmbedder(Gemma4UnifiedAudioConfig(), text), 2)
    ear = Projector(640, 56, 1e-6)
    same_weights(ear, their_ear)
    frames = torch.from_numpy(sound.raw_frames(np.random.default_rng(1).standard_normal(3000).astype(np.float32)))
    torch.testing.assert_close(ear(frames), their_ear(frames), atol=1e-4, rtol=0)


def rounding_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got.double() - expected.double()).square().mean().sqrt())


@pytest.mark.parametrize("kind", VISION)
@torch.inference_mode()
def test_vision_tower_in_bfloat16_errs_no_more_than_the_reference_does(kind):
    ours, theirs = vision_pair(kind)
    patches = image.cut(image.resize(picture(600, 400, 1), 280), 16)
    inputs = padded(patches, 280)
    ours.bfloat16()
    theirs.bfloat16()
    theirs_rounded = theirs(*inputs).last_hidden_state
    got = ours(torch.from_numpy(patches.values)[None], patches.rows, patches.columns)[0]
    exact = theirs.float()(*inputs).last_hidden_state  # of the same, rounded weights
    assert rounding_error(got, exact) < rounding_error(theirs_rounded, exact)


@torch.inference_mode()
def test_audio_tower_in_bfloat16_errs_no_more_than_the_reference_does():
    theirs = Gemma4AudioModel(
        Gemma4AudioConfig(
            hidden_size=64, num_hidden_layers=3, num_attention_heads=4, output_proj_dims=80, use_clipped_linears=True
        )
    )
    calm(theirs, 3)
    ours = AudioTower(AUDIO)
    same_weights(ours, theirs)
    mel = torch.from_numpy(sound.log_mel((np.random.default_rng(0).standard_normal(83_333) * 0.1).astype(np.float32)))
    mask = torch.ones(1, len(mel), dtype=torch.bool)
    theirs.bfloat16()
    theirs_rounded = theirs(mel[None].bfloat16(), mask).last_hidden_state[0]
    got = ours.bfloat16()(mel.bfloat16())
    exact = theirs.float()(mel[None].bfloat16().float(), mask).last_hidden_state[0]
    assert rounding_error(got, exact) < rounding_error(theirs_rounded, exact)
