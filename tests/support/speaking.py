"""A checkpoint that speaks nonsense fast: the bundled model's words and shape, fewer layers, calm random weights."""

import json
import shutil
from pathlib import Path

import torch

from cabochon.config import read_config
from cabochon.hub import BUNDLED
from cabochon.model.gemma4 import Gemma4
from cabochon.weights.load import save
from support.toys import calm_


def save_speaking(folder: Path, seed: int = 0) -> Path:
    """Write the checkpoint into `folder` (made if need be) and return it."""
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
