"""`cabochon serve`: a model behind OpenAI's and Anthropic's protocols, and a page to try it."""

from __future__ import annotations

import logging
import sys
from dataclasses import replace
from importlib.util import find_spec
from typing import TYPE_CHECKING

import typer

from ..config import MEDIA
from ..errors import InputError
from .serve_flags import ServeSettings, read_settings

if TYPE_CHECKING:
    from ..llm import AsyncLLM
    from ..server.options import ServerOptions

SETTINGS = {"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []}
"""The flags are read by `serve_flags`; typer only names the command."""
PACKAGES = ("fastapi", "uvicorn", "prometheus_client", "python_multipart")
"""What the extra `server` brings."""


def serve(context: typer.Context) -> None:
    """Serve a model over HTTP; `serve --help` lists the flags."""
    if missing := [package for package in PACKAGES if find_spec(package) is None]:
        raise InputError(f"serve needs {', '.join(missing)}, not installed here: pip install 'cabochon[server]'")
    settings = read_settings(context.args)
    logging.basicConfig(level=settings.log_level.upper(), format="%(asctime)s %(levelname)s %(message)s")
    log = logging.getLogger("cabochon.server")
    for notice in settings.notices:
        log.info(notice)
    run(settings)


def run(settings: ServeSettings) -> None:
    """Load the model and serve until told to stop."""
    from ..server.door import take
    from ..server.run import serve as serve_forever

    doors = take(settings.server["host"], settings.server["port"])
    llm, options = build(settings)

    def announce() -> None:
        port = doors[0].getsockname()[1]
        print(f"{options.names[0]} is ready at http://{options.host}:{port}", file=sys.stderr, flush=True)

    serve_forever(llm, options, doors, announce)


def build(settings: ServeSettings) -> tuple[AsyncLLM, ServerOptions]:
    """The engine and the options of its server, as the settings say."""
    from ..chat.jinja import template_for
    from ..llm import AsyncLLM
    from ..llm.loading import load
    from ..llm.prepare import prepare
    from ..media.source import Policy
    from ..server.options import ServerOptions

    folder = settings.media["folder"]
    if folder is not None and not folder.is_dir():
        raise InputError(f"--allowed-media-dir names {str(folder)!r}, which is no folder.")
    options, policy = ServerOptions(names=settings.names, **settings.server), Policy(**settings.media)
    media = [kind for kind in MEDIA if options.media_limits.get(kind) != 0]
    begin = prepare(
        settings.model,
        settings.device,
        dtype=settings.dtype,
        quantization=settings.quantization,
        max_model_len=settings.max_model_len,
        engine=settings.engine,
        drafter=settings.drafter,
        media=media,
    )
    print(begin.summary(), file=sys.stderr, flush=True)
    loaded = load(
        settings.model,
        settings.device,
        settings.dtype,
        quantization=begin.quantization,
        drafter=settings.drafter,
        media=media,
    )
    if settings.chat_template is not None and loaded.tokenizer is not None:
        template = template_for(None, loaded.tokenizer, "small", settings.chat_template)
        loaded = replace(loaded, template=template)
    if not options.names:
        names = dict.fromkeys(name for name in (settings.model, loaded.name) if name)
        options = replace(options, names=tuple(names))
    llm = AsyncLLM.of(
        loaded,
        max_model_len=begin.context,
        policy=policy,
        loop_guard=settings.loop_guard,
        media_options=settings.media_options,
        **{"max_num_seqs": begin.users, "kv_cache_memory_bytes": begin.cache_bytes, **settings.engine},
    )
    return llm, options
