"""`cabochon create`: a model's name for another model with a system prompt and sampling defaults."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .. import hub, modelfile, variants
from ..errors import InputError


def create(
    name: Annotated[str, typer.Argument(help="The new name.")],
    file: Annotated[Path, typer.Option("--file", "-f", help="The Modelfile.")] = Path("Modelfile"),
) -> None:
    """Name a model with a system prompt and sampling of its own.

    The name works wherever a model is named.
    """
    if variants.lookup(name) is not None or name == hub.BUNDLED.name or name.startswith("random:"):
        raise InputError(f"{name} is the name of another model already; take a new one.")
    try:
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"{file} can't be read ({error.strerror}); name the Modelfile with --file.") from None
    except UnicodeDecodeError:
        raise InputError(f"{file} isn't UTF-8 text; save it as UTF-8.") from None
    recipe = modelfile.read_modelfile(text, file.parent)
    below = modelfile.made(recipe.base)
    if below is not None:
        recipe = recipe.over(below)
    hub.locate(recipe.base)
    modelfile.keep(name, recipe)
    print(f"{name} is made from {recipe.base}; try: cabochon chat {name}")
