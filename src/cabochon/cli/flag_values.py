"""What the values of flags mean, most of them of `cabochon serve`. Functions raise `InputError` with one sentence."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..config import MEDIA
from ..errors import InputError
from ..formats import QUANTIZED
from .vllm_flags import STORED_QUANTIZATION

BUILT_IN_TEMPLATES = frozenset({"tool_chat_template_gemma4.jinja", "gemma4.jinja", "chat_template_gemma4.jinja"})
"""File names of vLLM's examples; they stand for the built-in template, which is the published one."""

_SCALES = {"": 1, "k": 1000, "K": 1024, "m": 1_000_000, "M": 1 << 20}


def quantization(value: str, notices: list[str]) -> str:
    if value in STORED_QUANTIZATION:
        notices.append(f"--quantization {value}: A quantised checkpoint says itself how it is quantised.")
        return "none"
    if value not in ("auto", "none", *QUANTIZED):
        raise InputError(
            f"--quantization {value}: only {' and '.join(QUANTIZED)} can be made while loading; else load a "
            "checkpoint that is quantised already."
        )
    return value


def speculation(drafter: str | None, guesses: int | None, config: str | None) -> tuple[str | None, int | None]:
    """The drafter and the most guesses, as our flags or vLLM's JSON say."""
    if config is None:
        if guesses is not None and drafter is None:
            raise InputError("--num-speculative-tokens needs somebody who guesses; name one with --drafter.")
        return drafter, guesses
    flag, told = "--speculative-config", _json(config, "--speculative-config")
    if drafter is not None or guesses is not None:
        raise InputError(f"{flag} says what --drafter and --num-speculative-tokens say; give one or the other.")
    method, drafter = told.pop("method", "mtp"), "auto"
    if method == "ngram":
        drafter = _ngram(flag, told)
    elif method in ("mtp", "draft_model"):
        drafter = told.pop("model", drafter)
    else:
        raise InputError(f"{flag} asks for the method {method!r}; known are mtp (the model's own drafter) and ngram.")
    guesses = told.pop("num_speculative_tokens", None)
    if told:
        raise InputError(
            f"{flag} holds {next(iter(told))!r}; known are method, num_speculative_tokens, model (of mtp), "
            "prompt_lookup_max and prompt_lookup_min (of ngram)."
        )
    if not isinstance(drafter, str) or not isinstance(guesses, int | None):
        raise InputError(f"{flag}: model must be a name and num_speculative_tokens a number.")
    return drafter, guesses


def _ngram(flag: str, told: dict[str, Any]) -> str:
    """Prompt lookup by our name; where vLLM's JSON gives one length, it means that one alone."""
    lengths = [told.pop(name) for name in ("prompt_lookup_min", "prompt_lookup_max") if name in told]
    if not all(type(length) is int and 1 <= length <= 9999 for length in lengths):
        raise InputError(f"{flag}: prompt_lookup_min and prompt_lookup_max must be numbers of tokens, 1 to 9999.")
    return f"ngram:{lengths[0]}-{lengths[-1]}" if lengths else "ngram"


def length(text: str | None) -> int | None:
    """`32768`, `32k` (thousands), `32K` (1024s), `auto`; as vLLM reads them."""
    if text is None or text in ("auto", "-1"):
        return None
    found = re.fullmatch(r"([0-9]{1,15}(?:\.[0-9]+)?)([kKmM]?)", text)
    tokens = 0 if found is None else int(float(found[1]) * _SCALES[found[2]])
    if tokens < 1:
        raise InputError(f"--max-model-len is {text!r}, but must be a number of tokens like 32768, 32k or 32K.")
    return tokens


def kv_dtype(text: str | None) -> str | None:
    same = {None: None, "auto": "auto", "fp8": "fp8", "fp8_e4m3": "fp8", "int8": "int8", "bfloat16": "auto"}
    if text not in same:
        raise InputError(f"--kv-cache-dtype is {text!r}, but must be auto, fp8 (e4m3) or int8.")
    return same[text]


def template(text: str | None, notices: list[str]) -> Path | None:
    if text is None:
        return None
    if Path(text).name in BUILT_IN_TEMPLATES and not Path(text).exists():
        notices.append(f"--chat-template {text}: the built-in template is the published one and is used.")
        return None
    if not Path(text).is_file():
        raise InputError(f"--chat-template names {text!r}, which is no file.")
    return Path(text)


def _json(text: str, flag: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise InputError(f"{flag} is not JSON ({error}).") from error
    if not isinstance(value, dict):
        raise InputError(f"{flag} must be a JSON object.")
    return value


def media_limits(text: str | None) -> dict[str, int]:
    """Most parts per request by kind. Also the older spelling `image=4,audio=1`, and vLLM's objects with a count."""
    if text is None:
        return {}
    flag = "--limit-mm-per-prompt"
    if "{" in text:
        pairs = _json(text, flag)
    else:
        pairs = {kind: number(count, flag) for kind, _, count in (pair.partition("=") for pair in text.split(","))}
    limits: dict[str, int] = {}
    for kind, count in pairs.items():
        count = count.get("count", 999) if isinstance(count, dict) else count
        if kind not in MEDIA or not isinstance(count, int) or count < 0:
            raise InputError(f"{flag} holds {kind!r}: {count!r}, but needs image, video or audio with a number.")
        limits[kind] = count
    return limits


def media_options(text: str | None, cap: int) -> dict[str, Any]:
    """Defaults for parts; they must lie within the server's own cap."""
    flag = "--mm-processor-kwargs"
    options = _as_in_requests(text, "MediaKwargs", flag)
    if options.get("max_soft_tokens", 0) > cap:
        raise InputError(f"{flag} asks for {options['max_soft_tokens']} tokens, but --max-image-tokens is {cap}.")
    return options


def template_defaults(text: str | None) -> dict[str, Any]:
    """Whether the model thinks, and keeps its earlier thoughts, where a request doesn't say."""
    options = _as_in_requests(text, "TemplateKwargs", "--default-chat-template-kwargs")
    return {name.removeprefix("enable_"): value for name, value in options.items()}


def _as_in_requests(text: str | None, kind: str, flag: str) -> dict[str, Any]:
    """Options as a request may hold them; here, where nobody ignores them, an unknown one is an error."""
    if text is None:
        return {}
    from pydantic import ValidationError  # here, so that other commands need no server

    from ..server import wire
    from ..server.faults import wire_fault

    options, model = _json(text, flag), getattr(wire, kind)
    for name in options:
        if name not in model.model_fields:
            raise InputError(f"{flag} holds {name!r}, but known are {', '.join(sorted(model.model_fields))}.")
    try:
        return dict(model.model_validate(options).model_dump(exclude_none=True))
    except ValidationError as error:
        raise InputError(f"{flag}: {wire_fault(error.errors())[0]}") from None


def keys(keys: Sequence[str] | None, path: Path | None) -> tuple[str, ...]:
    found = [key for key in keys or () if key]
    if path is not None:
        try:
            found += [line.strip() for line in path.read_text().splitlines() if line.strip() and line[0] != "#"]
        except OSError as error:
            raise InputError(f"--api-key-file {path} can't be read ({error.strerror}).") from error
        except UnicodeDecodeError:
            raise InputError(f"--api-key-file {path} isn't text; it must hold one key per line.") from None
        if not found:
            raise InputError(f"--api-key-file {path} holds no key.")
    return tuple(found)


def origins(given: Sequence[str] | None) -> tuple[str, ...]:
    """Pages by their origins, one by one, or as the JSON list that vLLM takes."""
    found: list[str] = []
    for text in given or ():
        try:
            found += json.loads(text) if text.startswith("[") else [text]
        except ValueError as error:
            raise InputError(f"--allowed-origins is not JSON ({error}).") from None
    return tuple(found)


def number(text: str, flag: str) -> int:
    if not text.isdigit():
        raise InputError(f"{flag} is {text!r}, but must be a number.")
    return int(text)


def numbers(text: str, flag: str) -> list[int]:
    """`1,8`, or nothing. Raises `InputError`."""
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not all(part.isascii() and part.isdigit() and 0 < int(part) <= 1 << 20 for part in parts):
        raise InputError(f"{flag} is {text!r}, but must be numbers from 1 to {1 << 20:,}, separated by commas.")
    return [int(part) for part in parts]
