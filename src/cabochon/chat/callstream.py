"""A call's arguments as JSON text while the model is still writing them.

What it gives, joined, is `json.dumps` of what `callsyntax.read_call` reads in the end, so that a stream says the same
as a whole reply. Text inside strings comes at once; a number or a bare word only when its end is seen, because `1.50`
becomes `1.5` and `tru` may become `true`. It doesn't look for mistakes: a call that turns out to be malformed never
gets its final event, whatever was said of it before.
"""

from __future__ import annotations

import json

from .callsyntax import MARKS, NAME, bare, unquoted


class ArgumentsStream:
    """One call, from behind `<|tool_call>` on."""

    def __init__(self) -> None:
        self.name: str | None = None
        """Known from the opening brace on."""
        self._head = ""
        self._inside: list[str] = []
        """The brackets that are open."""
        self._word = ""
        self._quoted = False
        self._key = False
        """The next word is a key."""

    def text(self, text: str) -> str:
        """More of the call; returns the JSON text that became certain."""
        if self.name is None:
            self._head += text
            found = NAME.match(self._head)
            if found is None:
                return ""
            self.name, text = found[1], self._head[found.end() :]
        if self._quoted:
            return json.dumps(text, ensure_ascii=False)[1:-1]
        return "".join(map(self._mark, MARKS.findall(text)))

    def quote(self) -> str:
        """A quote token."""
        self._quoted = not self._quoted
        return '"' if self.name is not None else ""

    def _mark(self, mark: str) -> str:
        if mark not in ("{", "}", "[", "]", ":", ","):
            self._word += mark
            return ""
        word = self._take_word()
        if mark in ("{", "["):
            self._inside.append(mark)
        elif mark in ("}", "]") and self._inside:
            self._inside.pop()
        self._key = mark in ("{", ",") and self._inside[-1:] == ["{"]
        return word + mark + (" " if mark in (":", ",") else "")

    def _take_word(self) -> str:
        word, self._word = self._word.strip(), ""
        if not word:
            return ""
        return json.dumps(unquoted(word) if self._key else bare(word)[0], ensure_ascii=False)
