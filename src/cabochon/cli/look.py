"""`cabochon tokenize`: what a model reads."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from .. import hub
from . import inputs


def tokenize(
    text: Annotated[str | None, typer.Argument(help="The text; none: standard input.")] = None,
    model: Annotated[str | None, typer.Option("--model", "-m", help="Whose tokenizer; none: the bundled one.")] = None,
    special: Annotated[bool, typer.Option(help="Spellings of control tokens count as the tokens.")] = False,
    count: Annotated[bool, typer.Option("--count", help="Print only how many there are.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the ids as a JSON list.")] = False,
) -> None:
    """Show a text's tokens, one a line: id and text."""
    from ..chat.tokenizer import Tokenizer

    tokenizer = Tokenizer.from_file(hub.locate(model))
    ids = tokenizer.encode_raw(inputs.read_stdin() if text is None else text, special)
    if count:
        print(len(ids))
    elif as_json:
        print(json.dumps(ids))
    else:
        for token_id in ids:
            text = tokenizer.token_bytes(token_id).decode("utf-8", "backslashreplace")
            print(f"{token_id}\t{json.dumps(text, ensure_ascii=False)}")
