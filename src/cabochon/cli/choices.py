"""How a model is loaded and sampled: the options that `chat` and `run` share.

typer reads a command's options from its signature and knows no groups of them. So a command takes one `Choices`, and
`with_choices` shows typer the fields instead.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

if TYPE_CHECKING:
    from ..engine.request import SamplingParams


@dataclass(frozen=True, slots=True)
class Choices:
    """What the caller chose; None leaves it to the checkpoint or to what fits."""

    device: Annotated[str, typer.Option(help="cpu, cuda, mps or auto.")] = "auto"
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or auto.")] = "auto"
    quantization: Annotated[str | None, typer.Option(help="int8 or int4: round matrices while loading.")] = None
    drafter: Annotated[
        str | None,
        typer.Option(
            help="Guess tokens ahead with this checkpoint; auto: the model's own; ngram: from repetitions.",
            metavar="MODEL",
        ),
    ] = None
    max_model_len: Annotated[
        str | None,
        typer.Option(help="Context, as 32768 or 32K (32k is 32,000); less needs less memory.", metavar="TOKENS"),
    ] = None
    chat_template: Annotated[
        Path | None, typer.Option(help="Render conversations through this Jinja file.", metavar="FILE")
    ] = None
    temperature: Annotated[float | None, typer.Option(help="0 is greedy; unset: what the checkpoint says.")] = None
    top_p: Annotated[float | None, typer.Option(help="Draw from the likeliest tokens of this joint share.")] = None
    top_k: Annotated[int | None, typer.Option(help="Draw from so many likeliest tokens.")] = None
    max_tokens: Annotated[int | None, typer.Option(help="End a reply after so many tokens.")] = None
    seed: Annotated[int | None, typer.Option(help="Draw the same reply again.")] = None

    def sampling(self) -> SamplingParams:
        from ..engine.request import SamplingParams

        names = ("temperature", "top_p", "top_k", "max_tokens", "seed")
        return SamplingParams(**{name: getattr(self, name) for name in names})


def with_choices(command: Callable[..., None]) -> Callable[..., None]:
    """`command` with the fields of `Choices` as options of its own, which reach it as its parameter `choices`."""

    @wraps(command)
    def gathered(**given: Any) -> None:
        choices = Choices(**{field.name: given.pop(field.name) for field in fields(Choices)})
        command(**given, choices=choices)

    own = inspect.signature(command, eval_str=True).parameters.values()
    kept = [one.replace(kind=one.KEYWORD_ONLY) for one in own if one.name != "choices"]
    hints = get_type_hints(Choices, include_extras=True)
    more = [
        inspect.Parameter(
            field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=hints[field.name]
        )
        for field in fields(Choices)
    ]
    signature = inspect.Signature([*kept, *more])
    gathered.__annotations__ = {name: one.annotation for name, one in signature.parameters.items()}
    setattr(gathered, "__signature__", signature)  # noqa: B010  # an attribute that functions have only when it is set
    return gathered
