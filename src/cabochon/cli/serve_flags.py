"""The flags of `cabochon serve`: our own, and those that people know from vLLM.

A table instead of forty function parameters, because the work is in what a flag *means* here: used, always on
(accepted, and the log says so), or not available (refused with the reason). Later sources win: `--config FILE`, then
`CABOCHON_...` in the environment, then the command line.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NoReturn

from ..config import MEDIA
from ..errors import InputError
from ..server.options import MIB, ServerOptions
from . import flag_values
from .vllm_flags import ALWAYS, FIXED, PASSED, REASONS, REFUSED


@dataclass(frozen=True, slots=True)
class ServeSettings:
    """What `cabochon serve` was told, in our words."""

    model: str | None
    device: str
    dtype: str
    quantization: str
    """int8 or int4; none: as stored; auto: what fits."""
    drafter: str | None
    max_model_len: int | None
    engine: dict[str, Any]
    """Options of the engine."""
    server: dict[str, Any]
    """Options of the server, names aside."""
    names: tuple[str, ...]
    chat_template: Path | None
    media_options: dict[str, Any]
    media: dict[str, Any]
    """Limits of `media.source.Policy`."""
    loop_guard: int
    log_level: str
    notices: tuple[str, ...] = field(default=())


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message[0].upper()}{message[1:]}; `cabochon serve --help` lists the flags.")


def read_settings(arguments: Sequence[str], environment: Mapping[str, str] | None = None) -> ServeSettings:
    """What the command line, the environment and the file together say. Raises `InputError` with one sentence."""
    parser = _parser()
    spelt = [_normal(argument) for argument in arguments]
    first = _config_file(spelt)
    everything = [*(_from_file(first, parser) if first else ()), *_from_environment(environment, parser), *spelt]
    everything, limits = _limits_with_dots(everything)
    notices = _fixed_notices(everything)
    read = parser.parse_args(everything)
    if read.model_flag is not None and read.model is not None and read.model_flag != read.model:
        raise InputError(f"Two models are named, {read.model!r} and {read.model_flag!r}; one is served at a time.")
    for flag, sentence in ALWAYS.items():
        if getattr(read, _destination(flag)):
            notices.append(f"{flag}: {sentence}")
    return _settings(read, limits, notices)


def _settings(read: argparse.Namespace, limits: dict[str, int], notices: list[str]) -> ServeSettings:
    template = flag_values.template(read.chat_template, notices)
    engine = {
        "max_num_seqs": read.max_num_seqs,
        "max_num_batched_tokens": read.max_num_batched_tokens,
        "block_size": read.block_size,
        "gpu_memory_utilization": read.gpu_memory_utilization,
        "kv_cache_dtype": flag_values.kv_dtype(read.kv_cache_dtype),
        "kv_cache_memory_bytes": read.kv_cache_memory_bytes,
        "enable_prefix_caching": read.enable_prefix_caching,
    }
    drafter, guesses = flag_values.speculation(read.drafter, read.num_speculative_tokens, read.speculative_config)
    engine["num_speculative_tokens"] = guesses
    limits = {**flag_values.media_limits(read.limit_mm_per_prompt), **limits}
    server = {
        "host": read.host,
        "port": read.port,
        "api_keys": flag_values.keys(read.api_key, read.api_key_file),
        "allowed_origins": flag_values.origins(read.allowed_origins),
        "max_body_bytes": None if read.max_body_mib is None else int(read.max_body_mib * MIB),
        "max_waiting": read.max_waiting,
        "max_output_tokens": read.max_output_tokens,
        "request_timeout": read.request_timeout,
        "drain": read.drain,
        "responses_kept": read.responses_kept,
        "log_prompts": read.enable_log_requests,
        **flag_values.template_defaults(read.default_chat_template_kwargs),
        "media_limits": dict.fromkeys(MEDIA, 0) if read.language_model_only else limits,
    }
    return ServeSettings(
        model=read.model if read.model is not None else read.model_flag,
        device=read.device,
        dtype={"half": "float16", "float": "float32"}.get(read.dtype, read.dtype),
        quantization=flag_values.quantization(read.quantization, notices),
        drafter=drafter,
        max_model_len=flag_values.length(read.max_model_len),
        engine=_given(engine),
        server=_given(server),
        names=tuple(read.served_model_name or ()),
        chat_template=template,
        media_options=flag_values.media_options(read.mm_processor_kwargs, read.max_image_tokens),
        media={
            "folder": read.allowed_local_media_path,
            "max_bytes": int(read.max_media_mib * MIB),
            "max_image_tokens": read.max_image_tokens,
            "max_frames": read.max_video_frames,
            "private_addresses": read.allow_private_media_urls,
        },
        loop_guard=read.loop_guard,
        log_level=read.log_level,
        notices=tuple(notices),
    )


def _given(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


# The table ----------------------------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="cabochon serve", description="Serve a model over HTTP.", allow_abbrev=False)
    add = parser.add_argument
    add("model", nargs="?", help="a folder, a repository or a short name; none: the bundled model")
    add("--model", dest="model_flag", metavar="MODEL", help="the same, as a flag")
    add("--config", type=Path, metavar="FILE", help="flags from a YAML file, without the dashes")
    add("--served-model-name", nargs="+", metavar="NAME", help="names that clients ask for")
    add("--host", default="127.0.0.1", help="address to listen on (%(default)s)")
    add("--port", type=int, default=8000, help="port to listen on (%(default)s); 0: one that is free")
    add("--device", default="auto", help="cpu, cuda, mps or auto")
    add("--dtype", default="auto", choices=["auto", "bfloat16", "half", "float16", "float", "float32"])
    add("--chat-template", metavar="FILE", help="a Jinja template instead of the checkpoint's")
    add(
        "--default-chat-template-kwargs", metavar="JSON", help='for requests that don\'t say: {"enable_thinking": true}'
    )

    engine = parser.add_argument_group("engine")
    add = engine.add_argument
    add("--quantization", default="auto", metavar="FORMAT", help="int8 or int4; none; auto: coarser only if it must be")
    add(
        "--drafter",
        metavar="MODEL",
        help="guess tokens ahead with this checkpoint; auto: the model's own; ngram: from repetitions",
    )
    add("--num-speculative-tokens", type=int, metavar="N", help="most guesses per reply and step (4)")
    add("--speculative-config", metavar="JSON", help="both, as vLLM spells them")
    add("--max-model-len", metavar="TOKENS", help="context, as 32768 or 32K (32k is 32,000)")
    add("--max-num-seqs", type=int, metavar="N", help="most replies that run at once")
    add("--max-num-batched-tokens", type=int, metavar="N", help="tokens per step")
    add("--block-size", type=int, metavar="N", help="tokens per page")
    add("--gpu-memory-utilization", type=float, metavar="SHARE", help="most of the device's memory to use, as 0.9")
    add("--kv-cache-dtype", metavar="TYPE", help="of pages that see the whole context: auto, fp8, int8")
    add("--kv-cache-memory-bytes", type=int, metavar="BYTES", help="most memory for pages")
    add("--enable-prefix-caching", action=argparse.BooleanOptionalAction, help="on unless switched off")
    add(
        "--loop-guard",
        type=int,
        default=200,
        metavar="N",
        help="end a reply whose last N tokens repeat; 0: never (%(default)s)",
    )

    media = parser.add_argument_group("media")
    add = media.add_argument
    add("--limit-mm-per-prompt", metavar="JSON", help='most parts per request, as {"image": 4, "audio": 1}')
    add("--mm-processor-kwargs", metavar="JSON", help='defaults for parts, as {"max_soft_tokens": 560}')
    add("--language-model-only", action="store_true", help="refuse every image, video and sound")
    add(
        "--allowed-media-dir",
        "--allowed-local-media-path",
        dest="allowed_local_media_path",
        type=Path,
        metavar="FOLDER",
        help="files that requests may name",
    )
    add("--allow-private-media-urls", action="store_true", help="fetch media from private and loopback addresses too")
    add(
        "--max-image-tokens",
        type=int,
        default=1120,
        metavar="N",
        help="most soft tokens of an image, 70 to 1120 (%(default)s)",
    )
    add("--max-video-frames", type=int, default=128, metavar="N", help="most frames of a video (%(default)s)")
    add("--max-media-mib", type=float, default=64, metavar="MIB", help="of one image, video or sound (%(default)s)")

    door = parser.add_argument_group("door")
    usual: dict[str, Any] = {option.name: option.default for option in fields(ServerOptions)}
    add = door.add_argument
    add("--api-key", nargs="+", action="extend", metavar="KEY", help="any of these opens the door")
    add("--api-key-file", type=Path, metavar="FILE", help="one key per line")
    add("--allowed-origins", nargs="+", metavar="ORIGIN", help="pages that may call from a browser")
    add("--max-body-mib", type=float, metavar="MIB", help=f"of a request ({usual['max_body_bytes'] // MIB})")
    add("--max-waiting", type=int, metavar="N", help=f"replies that may wait; then 429 ({usual['max_waiting']})")
    add("--max-output-tokens", type=int, metavar="N", help="most tokens of one reply")
    timeout, drain, kept = (usual[name] for name in ("request_timeout", "drain", "responses_kept"))
    add("--request-timeout", type=float, metavar="SECONDS", help=f"longest time for a reply ({timeout:g})")
    add("--drain", type=float, metavar="SECONDS", help=f"time that running replies get after SIGTERM ({drain:g})")
    add("--responses-kept", type=int, metavar="N", help=f"responses that can be continued ({kept})")
    add("--enable-log-requests", action="store_true", help="log prompts as well")
    add("--log-level", default="info", choices=["debug", "info", "warning", "error"])

    known = parser.add_argument_group("accepted for compatibility")
    for flag in ALWAYS:
        known.add_argument(flag, action="store_true", help=argparse.SUPPRESS)
    for flag in (*FIXED, *PASSED):
        known.add_argument(flag, help=argparse.SUPPRESS)
    for flag in REFUSED:
        known.add_argument(flag, nargs="*", action=_Refused, help=argparse.SUPPRESS)
    return parser


class _Refused(argparse.Action):
    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> NoReturn:
        raise InputError(f"{option_string}: {REFUSED[option_string or '']}.")


def _fixed_notices(arguments: Sequence[str]) -> list[str]:
    """Check the flags with fixed values, and say what they come to."""
    notices = []
    for flag, value in _pairs(arguments):
        if flag in FIXED:
            allowed, sentence = FIXED[flag]
            if value not in allowed:
                reason = REASONS.get(flag, f"known are {', '.join(sorted(allowed))}")
                raise InputError(f"{flag} {value}: {reason}.")
            if sentence:
                notices.append(f"{flag} {value}: {sentence}")
        elif flag in PASSED:
            notices.append(f"{flag}: {PASSED[flag]}")
    return notices


def _pairs(arguments: Sequence[str]) -> list[tuple[str, str | None]]:
    pairs: list[tuple[str, str | None]] = []
    for index, argument in enumerate(arguments):
        if argument.startswith("--"):
            flag, equals, value = argument.partition("=")
            following = arguments[index + 1] if index + 1 < len(arguments) else None
            pairs.append((flag, value if equals else following))
    return pairs


# Spellings ----------------------------------------------------------------------------------------------------------

_SHORT = {"-tp": "--tensor-parallel-size", "-pp": "--pipeline-parallel-size", "-dp": "--data-parallel-size",
          "-q": "--quantization", "-O": "--optimization-level", "-cc": "--compilation-config",
          "-sc": "--speculative-config", "-ep": "--enable-expert-parallel"}  # fmt: skip


def _normal(argument: str) -> str:
    """vLLM takes underscores for dashes and has a few short forms."""
    head, equals, value = argument.partition("=")
    head = _SHORT.get(head, head)
    return (head.replace("_", "-") if head.startswith("--") else head) + equals + value


def _destination(flag: str) -> str:
    return flag.removeprefix("--").replace("-", "_")


def _limits_with_dots(arguments: Sequence[str]) -> tuple[list[str], dict[str, int]]:
    """`--limit-mm-per-prompt.image 4` as vLLM's dotted form of a JSON flag."""
    rest: list[str] = []
    limits: dict[str, int] = {}
    queue = list(arguments)
    while queue:
        head, equals, value = queue.pop(0).partition("=")
        if head.startswith("--limit-mm-per-prompt."):
            text = value if equals else (queue.pop(0) if queue else "")
            limits |= flag_values.media_limits(json.dumps({head.rpartition(".")[2]: flag_values.number(text, head)}))
        else:
            rest.append(head + equals + value)
    return rest, limits


def _config_file(arguments: Sequence[str]) -> Path | None:
    return next((Path(value) for flag, value in reversed(_pairs(arguments)) if flag == "--config" and value), None)


def _from_file(path: Path, parser: argparse.ArgumentParser) -> list[str]:
    import yaml

    try:
        content = yaml.safe_load(path.read_text())
    except OSError as error:
        raise InputError(f"{path} can't be read ({error.strerror}).") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not YAML: {str(error).splitlines()[0]}.") from error
    if not isinstance(content, Mapping):
        raise InputError(f"{path} must hold flags and their values, as in `port: 8000`.")
    return [part for key, value in content.items() for part in _as_arguments(str(key), value, str(path), parser)]


def _from_environment(environment: Mapping[str, str] | None, parser: argparse.ArgumentParser) -> list[str]:
    """`CABOCHON_MAX_MODEL_LEN=32k` and so on; variables that name no flag belong to somebody else."""
    known = {option for action in parser._actions for option in action.option_strings}
    arguments = []
    for name, value in (os.environ if environment is None else environment).items():
        flag = "--" + name.removeprefix("CABOCHON_").lower().replace("_", "-")
        if name.startswith("CABOCHON_") and flag in known:
            plain: Any = {"true": True, "1": True, "false": False, "0": False}.get(value.lower(), value)
            switch = any(flag in action.option_strings and action.nargs == 0 for action in parser._actions)
            arguments += _as_arguments(flag[2:], plain if switch else value, name, parser)
    return arguments


def _as_arguments(key: str, value: Any, origin: str, parser: argparse.ArgumentParser) -> list[str]:
    flag = "--" + key.replace("_", "-")
    known = {option for action in parser._actions for option in action.option_strings}
    if flag not in known:
        raise InputError(f"{origin} names {key!r}, which is no flag; `cabochon serve --help` lists them.")
    if value is None or value is False:
        opposite = flag.replace("--", "--no-", 1)
        return [opposite] if value is False and opposite in known else []
    if value is True:
        return [flag]
    if isinstance(value, list):
        return [flag, *map(str, value)]
    return [f"{flag}={json.dumps(value) if isinstance(value, Mapping) else value}"]
