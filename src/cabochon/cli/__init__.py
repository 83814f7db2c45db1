"""The command line: parse, call, print.

Modules of this folder import torch, the engine and the Hub inside functions only, so that `--help` answers at once.
"""

from __future__ import annotations

import errno
import gc
import os
import sys
from typing import Annotated

import typer

from .. import __version__
from ..errors import CabochonError
from . import bench, catalogue, create, doctor, look, plan, quantize, serve, talk, verify
from .eval import eval_models

app = typer.Typer(
    name="cabochon",
    help="Run, serve, size, quantise and check the Gemma 4 models on your own machine.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode=None,
)
for command in (
    *(talk.chat, talk.run),
    *(catalogue.models, catalogue.pull, catalogue.list_models, catalogue.show, catalogue.rm),
    *(look.tokenize, verify.verify),
    *(quantize.quantize, quantize.inspect, create.create),
    *(plan.plan, doctor.doctor),
    eval_models,
):
    app.command(command.__name__.removesuffix("_models"))(command)
app.add_typer(bench.app)
app.command("serve", context_settings=serve.SETTINGS)(serve.serve)


_OUTPUT_LOST = {errno.EPIPE, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO}


def _version(wanted: bool) -> None:
    if wanted:
        print(f"cabochon {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """The `cabochon` command. Bad input ends in one sentence on stderr and exit code 2."""
    # Imports make half a million objects that stay; to look through them every 700 takes a tenth of the start.
    gc.set_threshold(10_000, 20, 50)
    try:
        try:
            app()
        finally:
            sys.stdout.flush()  # here, where a full disk is told in our words
    except CabochonError as error:
        print(f"cabochon: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except OSError as error:
        if error.errno not in _OUTPUT_LOST:
            raise
        # Python would complain once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if error.errno != errno.EPIPE:  # the reader of our output (`| head`) has gone: nobody wants to know
            print(f"cabochon: {error.filename or 'The output'} can't be written ({error.strerror}).", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
