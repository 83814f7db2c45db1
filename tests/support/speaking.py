"""Checkpoints that speak nonsense fast: the bundled model's words, a small shape, calm random weights."""

import json
import shutil
from pathlib import Path

import torch

from cabochon.config import read_config
from cabochon.hub import BUNDLED
from cabochon.model.gemma4 import Gemma4
from cabochon.variants import find
from cabochon.weights.load import save
from support.toys import IDS, calm_, save_toy


def save_speaking(folder: Path, seed: int = 0) -> Path:
    """Write one of the bundled model's shape into `folder` (made if need be) and return it."""
    folder.mkdir(parents=True, exist_ok=True)
    raw = json.loads((BUNDLED / "config.json").read_text(encoding="utf-8"))
    raw["dtype"] = raw["text_config"]["dtype"] = "float32"
    (folder / "config.json").write_text(json.dumps(raw), encoding="utf-8")
    config = read_config(folder)
    with torch.device("meta"):
        model = Gemma4(config)
    model = calm_(model.to_empty(device="cpu"), seed)
    save(folder, model, config)
    for name in ("tokenizer.json", "generation_config.json"):
        shutil.copy(BUNDLED / name, folder)
    return folder


def save_seeing(folder: Path, size: str = "E2B", seed: int = 0) -> Path:
    """The same in the shape of `size`, with its towers and its context: it sees, and hears if that size does."""
    bundled = json.loads((BUNDLED / "config.json").read_text(encoding="utf-8"))
    words = bundled["text_config"]["vocab_size"]
    context = find(size).config()["text_config"]["max_position_embeddings"]
    shape = {"vocab_size": words, "vocab_size_per_layer_input": words, "max_position_embeddings": context}
    save_toy(folder, size, seed=seed, media=True, **shape)
    raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    raw |= {key: bundled[key] for key in (*IDS, "eos_token_id")}
    (folder / "config.json").write_text(json.dumps(raw), encoding="utf-8")
    for name in ("tokenizer.json", "generation_config.json"):
        shutil.copy(BUNDLED / name, folder)
    return folder
