"""From a model's name to a network with its tokenizer, template and sampling defaults."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch

from ..chat.jinja import template_for, template_from
from ..chat.template import ChatTemplate, Family
from ..chat.tokenizer import Tokenizer
from ..config import MEDIA, GenerationConfig, ModelConfig
from ..engine.guessers import Lookup
from ..errors import CheckpointError, InputError
from ..formats import QUANTIZED
from ..hub import BUNDLED, locate
from ..model.drafter import Drafter
from ..model.gemma4 import Gemma4
from ..modelfile import Recipe, made
from ..ops.cpu import give_back
from ..weights.checkpoint import Checkpoint, open_checkpoint
from ..weights.load import Progress, Source, fill, quantizer
from ..weights.params import as_kept, own_format
from ..weights.random import is_random, open_random

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


@dataclass(frozen=True, slots=True)
class Loaded:
    """A checkpoint in memory. A folder without a tokenizer still serves token ids."""

    name: str
    model: Gemma4
    tokenizer: Tokenizer | None = None
    template: ChatTemplate | None = None
    generation: GenerationConfig = field(default_factory=GenerationConfig)
    recipe: Recipe | None = None
    """What `cabochon create` put on top of the checkpoint."""
    drafter: Drafter | Lookup | None = None
    """Guesses the model's next tokens."""

    @property
    def config(self) -> ModelConfig:
        return self.model.config


def load(
    model: str | Path | None = None,
    device: str = "auto",
    dtype: str | torch.dtype = "auto",
    progress: Progress | None = None,
    quantization: str | None = None,
    drafter: str | Path | None = None,
    media: Collection[str] | None = None,
) -> Loaded:
    """The checkpoint `model`: a folder, a .gguf file, a cached repository or name, `random:...`; None: bundled.

    `quantization` (int8 or int4) rounds matrices while they stream in; what is stored in such a format stays in it. The
    drafter's are rounded like the model's. `progress` runs through the model, then through its drafter.
    `drafter` is a checkpoint too: the model's assistant, or `auto` for the one that lies in its folder `drafter`; or
    nobody but the conversation, `ngram` (see `engine.guessers.Lookup`).
    `media` are the kinds (image, video, audio) that it will be shown, None all that it takes: towers which none of them
    needs are left in the file.
    """
    if quantization is not None and quantization not in QUANTIZED:
        raise InputError(f"quantization is {quantization!r}, but must be one of {', '.join(QUANTIZED)}.")
    there, kind = pick_device(device), pick_dtype(dtype)
    found, name = open_named(model)
    config = found.config
    check_media(media)
    if config.drafter is not None:
        raise InputError(f"{name} is a drafter, which only speaks along with its model; load that one instead.")
    # Before the model takes its minutes: a wrong drafter or tokenizer is told at once.
    pair = open_drafter(drafter, config, found.folder)
    tokenizer = tokenizer_of(found, name)
    template = template_of(found, name, tokenizer) if tokenizer else None
    give_back()  # parsing 262,144 words took three times what they take, which the weights shall not lie on top of
    network = build(config, found.source, there, kind or DTYPES[config.dtype], progress, quantization, media)
    rounded = quantization or own_format(config)
    guesser = _drafter(pair, network, there, progress, rounded) if isinstance(pair, Checkpoint) else pair
    recipe = made(model) if isinstance(model, str) and not Path(model).expanduser().exists() else None
    if recipe is None:
        return Loaded(name, network, tokenizer, template, found.generation, drafter=guesser)
    return Loaded(str(model), network, tokenizer, template, _settled(found.generation, recipe), recipe, guesser)


def open_drafter(drafter: str | Path | None, model: ModelConfig, folder: Path | None) -> Checkpoint | Lookup | None:
    """The drafter of that name, made for `model`; for `auto` the one beside the model in `folder`."""
    if drafter is None:
        return None
    if lookup := Lookup.named(str(drafter)):
        return lookup
    if drafter == "auto":
        if folder is None or not (folder / "drafter").is_dir():
            raise InputError(
                "No folder `drafter` lies beside the model; name its drafter instead, for example gemma4:e2b-assistant."
            )
        drafter = folder / "drafter"
    found, name = open_named(drafter)
    if found.config.drafter is None:
        raise InputError(f"{name} is no drafter; the published ones end in -assistant.")
    mine, its, text = found.config.text, found.config.drafter, model.text
    shapes = {(spec.kind, spec.kv_heads, spec.head_dim, spec.k_eq_v) for spec in text.layers if spec.owns_kv}
    fits = {(spec.kind, spec.kv_heads, spec.head_dim, spec.k_eq_v) for spec in mine.layers} <= shapes
    if not fits or its.backbone_hidden_size != text.hidden_size or mine.vocab_size != text.vocab_size:
        raise InputError(
            f"{name} was made for another model: it expects a width of {its.backbone_hidden_size} and "
            f"{mine.vocab_size} tokens, this model has {text.hidden_size} and {text.vocab_size}; take its own drafter."
        )
    return found


def _drafter(
    found: Checkpoint, network: Gemma4, device: torch.device, progress: Progress | None, quantization: str | None
) -> Drafter:
    """An opened drafter in memory, in the type of its model."""
    with torch.device("meta"):
        made = Drafter(found.config)
    dtype = network.language_model.norm.weight.dtype
    convert = quantizer(quantization, panels=device.type == "cpu")
    fill(made, found.source, found.config, dtype=dtype, device=device, convert=convert, progress=progress)
    return made.eval()


def _settled(said: GenerationConfig, recipe: Recipe) -> GenerationConfig:
    """The checkpoint's sampling with the recipe's on top."""
    ours = {"repeat_penalty": "repetition_penalty"}
    known = {field.name for field in fields(GenerationConfig)}
    wanted = {ours.get(name, name): value for name, value in recipe.parameters.items()}
    settings: dict[str, Any] = {name: value for name, value in wanted.items() if name in known}
    return replace(said, **settings)


def open_named(model: str | Path | None) -> tuple[Checkpoint, str]:
    """The checkpoint and the name to show for it. Random weights speak through the bundled tokenizer."""
    if isinstance(model, str) and is_random(model):
        config, source = open_random(model)
        words = (BUNDLED / "tokenizer.json").read_text(encoding="utf-8")
        return Checkpoint(config, source, GenerationConfig(), folder=None, tokenizer=words), model
    path = locate(model)
    return open_checkpoint(path), path.name


def tokenizer_of(found: Checkpoint, name: str) -> Tokenizer | None:
    """The tokenizer that a checkpoint carries; None where it has none. `name` is for messages."""
    if found.folder is None:
        return Tokenizer.from_json(found.tokenizer, name) if found.tokenizer else None
    return Tokenizer.from_file(found.folder) if (found.folder / "tokenizer.json").is_file() else None


def template_of(found: Checkpoint, name: str, tokenizer: Tokenizer) -> ChatTemplate:
    """What renders conversations for a checkpoint with its `tokenizer`. `name` is for messages."""
    family: Family = "small" if found.config.text.hidden_size_per_layer_input else "large"
    if found.folder is None:
        return template_from(found.template, name, tokenizer, family)
    return template_for(found.folder, tokenizer, family)


def build(
    config: ModelConfig,
    source: Source,
    device: torch.device,
    dtype: torch.dtype,
    progress: Progress | None = None,
    quantization: str | None = None,
    media: Collection[str] | None = None,
) -> Gemma4:
    """The network of `config`, with the towers that `media` need (None: all), and the weights of `source`."""
    config = as_kept(config, quantization)
    try:
        with torch.device("meta"):
            network = Gemma4(config if media is None else config.taking(media))
    except RuntimeError:  # no memory was asked for: a size does not fit into 63 bits
        raise CheckpointError(f"{source.origin}: its config.json describes a network of impossible size.") from None
    convert = quantizer(quantization, panels=device.type == "cpu")
    away = device.type == "cuda"  # half of E2B, of which a token reads 11 KB
    fill(network, source, config, dtype=dtype, device=device, convert=convert, progress=progress, rows_on_host=away)
    return network.eval()


def check_media(media: Collection[str] | None) -> None:
    """Raises `InputError` where a kind is named that there is not."""
    if strange := sorted(set(media or ()) - set(MEDIA)):
        raise InputError(f"media names {strange[0]!r}, but the kinds are {', '.join(MEDIA)} (none of them: text only).")


def pick_device(device: str) -> torch.device:
    """`auto` is the first accelerator that torch sees, else the CPU."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        picked = torch.device(device)
    except RuntimeError:
        raise InputError(f"device is {device!r}, but must be auto, cpu, cuda, cuda:N or mps.") from None
    there = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    if (picked.index or 0) >= there.get(picked.type, 0):
        raise InputError(f"device is {device!r}, which torch {torch.__version__} can't use on this machine; take auto.")
    return picked


def pick_dtype(dtype: str | torch.dtype) -> torch.dtype | None:
    """None for `auto`: the type that the checkpoint was saved in."""
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype == "auto":
        return None
    if dtype not in DTYPES:
        raise InputError(f"dtype is {dtype!r}, but must be auto or one of {', '.join(DTYPES)}.")
    return DTYPES[dtype]
