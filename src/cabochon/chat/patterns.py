"""Regular expressions for strings: JSON schema's `pattern` and `format` in the syntax of the grammar's lexer.

A schema's pattern searches (it may match anywhere), the lexer's pattern spans the whole string; and look-around and
back-references, which a lexer can't have, are refused by name.
"""

from __future__ import annotations

from ..errors import RequestError

_YEAR = "[1-9][0-9]{3}"
_LEAP_YEAR = "(?:[1-9][0-9](?:0[48]|[2468][048]|[13579][26])|(?:[2468][048]|[13579][26])00)"
_DATE = (
    f"(?:{_YEAR}-(?:(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])|(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)"
    f"|02-(?:0[1-9]|1[0-9]|2[0-8]))|{_LEAP_YEAR}-02-29)"
)
_TIME = r"(?:[01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](?:\.[0-9]{1,6})?(?:Z|[+-](?:[01][0-9]|2[0-3]):[0-5][0-9])"
_LABEL = "[A-Za-z0-9](?:[A-Za-z0-9-]{0,30}[A-Za-z0-9])?"
_HOST = rf"{_LABEL}(?:\.{_LABEL}){{0,4}}"
_BYTE = "(?:25[0-5]|2[0-4][0-9]|1[0-9][0-9]|[1-9]?[0-9])"
_CLOCK = "T(?:[0-9]{1,4}H(?:[0-9]{1,4}M)?(?:[0-9]{1,4}S)?|[0-9]{1,4}M(?:[0-9]{1,4}S)?|[0-9]{1,4}S)"
_DAYS = "(?:[0-9]{1,4}Y(?:[0-9]{1,4}M)?(?:[0-9]{1,4}D)?|[0-9]{1,4}M(?:[0-9]{1,4}D)?|[0-9]{1,4}D)"

FORMATS = {
    "date": _DATE,
    "time": _TIME,
    "date-time": f"{_DATE}T{_TIME}",
    "duration": f"P(?:{_DAYS}(?:{_CLOCK})?|{_CLOCK}|[0-9]{{1,4}}W)",
    "email": rf"[A-Za-z0-9_+-]{{1,32}}(?:\.[A-Za-z0-9_+-]{{1,31}})?@{_HOST}\.[A-Za-z]{{2,12}}",
    "hostname": _HOST,
    "ipv4": rf"{_BYTE}(?:\.{_BYTE}){{3}}",
    "ipv6": "(?:[0-9a-f]{1,4}:){7}[0-9a-f]{1,4}|(?:[0-9a-f]{1,4}:){1,6}(?::[0-9a-f]{1,4})|::(?:[0-9a-f]{1,4})?",
    "uuid": "[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}",
    "uri": r"[a-z][a-z0-9+.-]{1,9}:(?://)?[A-Za-z0-9._~:/?#@!$&'()*+,;=-]{1,2000}",
}
"""What a string of each known `format` looks like. Formats outside this table are checked after the reply."""


_CLASSES = {"d": "[0-9]", "D": "[^0-9]", "w": "[A-Za-z0-9_]", "W": "[^A-Za-z0-9_]",
            "s": r"[ \t\n\r\f\v]", "S": r"[^ \t\n\r\f\v]"}  # fmt: skip
_INSIDE = {"d": "0-9", "w": "A-Za-z0-9_", "s": r" \t\n\r\f\v"}


def whole(pattern: str, name: str) -> str:
    """The lexer's expression for a string in which `pattern` (ECMA 262) is found; it spans the whole string.

    Raises `RequestError` (field `name`) for what a lexer can't match.
    """
    branches = []
    for branch in _alternatives(pattern):
        start = branch.startswith("^")
        end = branch.endswith("$") and not _escaped(branch, len(branch) - 1)
        body = _translate(branch[1 if start else 0 : -1 if end else None], pattern, name)
        branches.append(f"{'' if start else '(?s:.*)'}(?:{body}){'' if end else '(?s:.*)'}")
    return "|".join(branches)


def _escaped(text: str, index: int) -> bool:
    slashes = 0
    while index - slashes > 0 and text[index - slashes - 1] == "\\":
        slashes += 1
    return slashes % 2 == 1


def _alternatives(pattern: str) -> list[str]:
    """The branches between the bars that stand outside groups and classes."""
    branches, start, depth, in_class = [], 0, 0, False
    for index, char in enumerate(pattern):
        if _escaped(pattern, index):
            continue
        if in_class:
            in_class = char != "]"
        elif char == "[":
            in_class = True
        elif char in "()":
            depth += 1 if char == "(" else -1
        elif char == "|" and depth == 0:
            branches.append(pattern[start:index])
            start = index + 1
    return [*branches, pattern[start:]]


def _translate(body: str, pattern: str, name: str) -> str:
    def refuse(what: str) -> RequestError:
        return RequestError(
            f"{name} has the pattern {pattern!r} with {what}, which can't be enforced; rewrite it without.", name
        )

    out, index, in_class = [], 0, False
    while index < len(body):
        char, after = body[index], body[index + 1 : index + 2]
        index += 1
        if char == "\\":
            index += 1
            if (after.isdigit() and after != "0") or after == "k":
                raise refuse("a back-reference")
            if after in ("b", "B") and not in_class:
                raise refuse("a word boundary")
            classes = _INSIDE if in_class else _CLASSES
            if after in "DWS" and after and in_class:
                raise refuse(f"\\{after} inside a class")
            out.append(classes.get(after, "\\/" if after == "/" else char + after))
        elif in_class:
            in_class = char != "]"
            out.append("\\[" if char == "[" else "\\/" if char == "/" else char)
        elif char == "[":
            in_class = True
            out.append(char)
            if body[index : index + 1] == "^":
                out.append("^")
                index += 1
        elif char == "(" and after == "?":
            if body[index + 1 : index + 2] != ":":
                named = body[index + 1 : index + 2] == "<" and body[index + 2 : index + 3] not in ("=", "!")
                if not named:
                    raise refuse("look-around")
                index = body.find(">", index) + 1
                out.append("(?:")
            else:
                index += 2
                out.append("(?:")
        elif char in "^$":
            raise refuse(f"{char} in the middle")
        else:
            out.append("\\/" if char == "/" else char)
    return "".join(out)


def lexeme(expression: str) -> str:
    """`expression` between the slashes that the grammar's syntax wants."""
    return "/" + "".join(_VISIBLE.get(char, char) for char in expression) + "/"


_VISIBLE = {"\n": "\\n", "\r": "\\r", "\t": "\\t", "\f": "\\f", "\v": "\\v"}
