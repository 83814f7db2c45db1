"""Fields of OpenAI's and vLLM's that would change the reply and that nothing here obeys.

Unknown fields are ignored; these are known, and to ignore them would be to answer something else than was asked.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import RequestError, brief

_STRUCTURED = 'write it as structured_outputs: {{"{}": ...}}'
_WHOLE_TURNS = "a chat is answered with a turn of the model's own; continue raw text at /v1/completions"

REFUSED: Mapping[str, tuple[tuple[Any, ...], str]] = {
    **{f"guided_{kind}": ((), _STRUCTURED.format(kind)) for kind in ("json", "regex", "choice", "grammar")},
    "functions": ((), "declare them in tools"),
    "function_call": (("none", "auto"), "say it with tool_choice"),
    "modalities": ((["text"],), "replies are text"),
    "audio": ((), "replies are text"),
    "web_search_options": ((), "nothing is searched; offer a search in tools"),
    "suffix": ((), "text is only continued at its end"),
    "best_of": ((1,), "ask for all with n and choose"),
    "use_beam_search": ((), "replies are drawn; temperature 0 is greedy"),
    "length_penalty": ((1,), "it belongs to beam search, which isn't there"),
    "min_tokens": ((), "a reply ends when the model ends it; ignore_eos with max_tokens makes all of one length"),
    "bad_words": ((), "bar tokens with logit_bias, or shape the reply with structured_outputs"),
    "allowed_token_ids": ((), "shape the reply with structured_outputs"),
    "include_stop_str_in_output": ((), "stop strings are never part of a reply; append yours"),
    "skip_special_tokens": ((True,), "control tokens are never part of a reply"),
    "truncate_prompt_tokens": ((), "no prompt is cut; send the part that matters"),
    "add_generation_prompt": ((True,), _WHOLE_TURNS),
    "continue_final_message": ((), _WHOLE_TURNS),
    "chat_template": ((), "the template is the server's; start it with --chat-template"),
    "documents": ((), "put their text into a message"),
    "conversation": ((), "continue a response with previous_response_id"),
    "priority": ((), "requests are served in the order in which they come"),
    "cache_salt": ((), "prefixes are shared by all clients; start with --no-enable-prefix-caching to share none"),
}
"""Name -> values that ask for what is done anyway (null, false, 0 and what is empty always do), what to do instead."""


def check(body: Any) -> Any:
    """`body` as it came. Raises `RequestError` for a field that is refused."""
    for name in REFUSED.keys() & body if isinstance(body, dict) else ():
        harmless, instead = REFUSED[name]
        if body[name] and body[name] not in harmless:
            raise RequestError(f"{name} is {brief(body[name])}, which is not done here: {instead}.", name)
    return body
