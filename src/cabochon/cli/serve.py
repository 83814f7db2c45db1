"""`cabochon serve`: a model behind OpenAI's and Anthropic's protocols, and a page to try it."""

from __future__ import annotations

import logging
import sys
from dataclasses import replace
from typing import TYPE_CHECKING

import typer

from .serve_flags import ServeSettings, read_settings

if TYPE_CHECKING:
    from ..llm import AsyncLLM
    from ..server.options import ServerOptions

SETTINGS = {"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []}
"""The flags are read by `serve_flags`; typer only names the command."""


def serve(context: typer.Context) -> None:
    """Serve a model over HTTP (OpenAI's and Anthropic's protocols, and a page). `serve --help` lists the flags."""
    settings = read_settings(context.args)
    logging.basicConfig(level=settings.log_level.upper(), format="%(asctime)s %(levelname)s %(message)s")
    log = logging.getLogger("cabochon.server")
    for notice in settings.notices:
        log.info(notice)
    run(settings)


def run(settings: ServeSettings) -> None:
    """Load the model and serve until told to stop."""
    from ..server.run import serve as serve_forever

    llm, options = build(settings)

    def announce() -> None:
        print(f"{options.names[0]} is ready at http://{options.host}:{options.port}", file=sys.stderr, flush=True)

    serve_forever(llm, options, announce)


def build(settings: ServeSettings) -> tuple[AsyncLLM, ServerOptions]:
    """The engine and the options of its server, as the settings say."""
    from ..chat.jinja import template_for
    from ..llm import AsyncLLM
    from ..llm.loading import load
    from ..llm.prepare import prepare
    from ..media.source import Policy
    from ..server.options import ServerOptions

    begin = prepare(
        settings.model,
        settings.device,
        dtype=settings.dtype,
        quantization=settings.quantization,
        max_model_len=settings.max_model_len,
        engine=settings.engine,
    )
    print(begin.summary(), file=sys.stderr, flush=True)
    loaded = load(settings.model, settings.device, settings.dtype, quantization=begin.quantization)
    if settings.chat_template is not None and loaded.tokenizer is not None:
        template = template_for(None, loaded.tokenizer, "small", settings.chat_template)
        loaded = replace(loaded, template=template)
    names = settings.names or tuple(dict.fromkeys(name for name in (settings.model, loaded.name) if name))
    options = ServerOptions(names=names, **settings.server)
    llm = AsyncLLM.of(
        loaded,
        max_model_len=begin.context,
        policy=Policy(**settings.media),
        loop_guard=settings.loop_guard,
        media_options=settings.media_options,
        **{"max_num_seqs": begin.users, "kv_cache_memory_bytes": begin.cache_bytes, **settings.engine},
    )
    return llm, options
