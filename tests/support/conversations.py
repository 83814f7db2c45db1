"""Invented conversations for the proofs of renderer and parser: every role, switch, schema keyword and odd character.

Seeded, so a failure is named by its number. What the native renderer does differently from the published template on
purpose (docs/chat.md) is left out here and shown in tests of its own.
"""

import random
import re

CONTROL = [
    *("<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<|think|>", "<|turn>", "<turn|>", "<|channel>", "<channel|>"),
    *("<|tool>", "<tool|>", "<|tool_call>", "<tool_call|>", "<|tool_response>", "<tool_response|>", '<|"|>'),
    *("<|image>", "<|image|>", "<image|>", "<|audio>", "<|audio|>", "<audio|>", "<|video|>"),
]
FORGED = re.compile("|".join(map(re.escape, CONTROL)))
PIECES = [
    *(
        "hello",
        "world",
        "The answer",
        "is",
        "42",
        "3.14",
        "-7",
        "naïve",
        "Straße",
        "日本語",
        "Ελλάδα",
        "שלום",
        "🧑‍🚀",
        "e\u0301",
    ),
    *(" ", "  ", "\n", "\n\n", "\t", "\t\t", "\r\n", "\u00a0", "\u2028", "\u200b", "\x1f", "\x00", "▁", "\ufeff"),
    *(
        "<",
        "|",
        ">",
        "<|",
        "|>",
        "<turn",
        "turn|",
        "<table>",
        "<unused3>",
        "<0x41>",
        "[multimodal]",
        '<|"',
        '"',
        "'",
        "\\",
    ),
    *(
        "{",
        "}",
        "[",
        "]",
        ":",
        ",",
        "call:f{a:1}",
        "thought\n",
        "model\n",
        "```py\nx = 1\n```",
        "# Title\n",
        "* item\n",
    ),
]
THOUGHTS = ["<|channel>thought\nhm\n<channel|>", "<|channel>", "<channel|>"]
NAMES = ["look_up", "get-weather", "files.read", "f", "Add", "search_web2", "mcp__x__y"]
KEYS = [
    "city",
    "City",
    "n",
    "unit_of-measure",
    "a.b",
    "first name",
    "größe",
    "x1",
    "Zeta",
    "_",
    "items",
    "type",
    "required",
]


class Inventor(random.Random):
    """A source of random conversations; `Inventor(7)` always invents the same."""

    thoughts = THOUGHTS
    """What assistant texts may hold besides the odd pieces."""

    def chance(self, p=0.5):
        return self.random() < p

    def text(self, longest=8, extra=()):
        """Odd text. By chance pieces may spell a control token together; such a text is thrown away."""
        while True:
            drawn = [self.choice(PIECES) for _ in range(self.randint(0, longest))]
            if not FORGED.search("".join(drawn)):
                break
        for piece in extra:
            if self.chance(0.1):
                drawn.insert(self.randint(0, len(drawn)), piece)
        return "".join(drawn)

    def value(self, depth=0):
        kinds = ["text", "int", "float", "bool", "null"] + ["list", "dict"] * (depth < 3)
        match self.choice(kinds):
            case "text":
                return self.text(5)
            case "int":
                return self.choice([0, -1, 7, 10**18, self.randint(-999, 999)])
            case "float":
                return self.choice([0.0, -0.5, 1e22, 1e-9, 3.141592653589793, 100.0])
            case "bool":
                return self.chance()
            case "null":
                return None
            case "list":
                return [self.value(depth + 1) for _ in range(self.randint(0, 3))]
            case "dict":
                return self.arguments(depth + 1)

    def arguments(self, depth=0):
        return {key: self.value(depth) for key in self.sample(KEYS, self.randint(0, 4))}

    # Tools ----------------------------------------------------------------------------------------------------------

    def schema(self, depth=0):
        kinds = ["string", "integer", "number", "boolean", "null"] + ["array", "object"] * (2 if depth < 3 else 0)
        kind = self.choice(kinds)
        schema = {"type": self.choice([kind, kind, kind.upper()])} if self.chance(0.95) else {}
        if self.chance():
            schema["description"] = self.text(4)
        if self.chance(0.2):
            schema["nullable"] = self.chance()
        if self.chance(0.3):
            schema["enum"] = [self.text(2) for _ in range(self.randint(0, 3))]
        if self.chance(0.2):
            schema |= {"default": self.value(2), "minimum": 1, "format": "date"}
        if kind == "array" and self.chance(0.8):
            schema["items"] = self.items(depth + 1)
        if kind == "object" and self.chance(0.8):
            schema["properties"] = self.properties(depth + 1)
        if kind == "object" and self.chance():
            schema["required"] = self.sample(KEYS, self.randint(0, 2))
        if kind == "object" and self.chance(0.2):
            schema["additionalProperties"] = self.choice([False, True, {"type": "string"}])
        return schema

    def items(self, depth):
        items = self.schema(depth)
        if "type" in items and self.chance(0.2):
            items["type"] = [items["type"], "null"]
        if self.chance(0.1):
            items["maxItems"] = None
        return self.choice([items, items, items, {}])

    def properties(self, depth=0):
        return {key: self.schema(depth) for key in self.sample(KEYS, self.randint(0, 4))}

    def tool(self, name):
        function = {"name": name, "description": self.text(5)}
        if self.chance(0.9):
            function["parameters"] = {"type": self.choice(["object", "OBJECT"])}
            if self.chance(0.9):
                function["parameters"]["properties"] = self.properties()
            if self.chance():
                function["parameters"]["required"] = self.sample(KEYS, self.randint(0, 3))
        if self.chance(0.2):
            function["response"] = {"type": "object"} | ({"description": self.text(3)} if self.chance() else {})
        return {"type": "function", "function": function}

    def tools(self):
        return [self.tool(name) for name in self.sample(NAMES, self.randint(0, 3))]

    # Messages -------------------------------------------------------------------------------------------------------

    def content(self, extra=(), media=0.2):
        if self.chance(0.6):
            return self.text(10, extra)
        while True:
            parts = [self.part(extra, media) for _ in range(self.randint(0, 4))]
            shown = "".join(FORGED.sub("", part.get("text", "\0")).strip() for part in parts)
            if not FORGED.search(shown):
                return parts

    def part(self, extra=(), media=0.2):
        if self.chance(1 - media):
            return {"type": "text", "text": self.text(6, extra)}
        return self.choice(
            [
                {"type": "image", "url": "cat.png"},
                {"type": "image_url", "image_url": {"url": "https://example.org/cat.png"}},
                {"type": "audio", "audio": "song.wav"},
                {"type": "input_audio", "input_audio": {"data": "UklGRg==", "format": "wav"}},
                {"type": "video", "video": "film.mp4"},
            ]
        )

    def opening(self):
        content = self.text(6)
        if self.chance(0.3):
            content = [{"type": "text", "text": self.text(4)} for _ in range(self.choice([0, 2, 3]))]
        return {"role": self.choice(["system", "developer"]), "content": content}

    def assistant(self):
        message = {"role": "assistant", "content": self.choice([None, "", self.content(self.thoughts, media=0.05)])}
        if self.chance(0.4):
            message[self.choice(["reasoning", "reasoning_content"])] = self.text(6)
        if self.chance(0.4):
            message["tool_calls"] = [self.call(i) for i in range(self.choice([1, 1, 2, 3]))]
        if self.chance(0.08):
            pairs = [{"name": self.choice([*NAMES, ""]), "response": self.value()} for _ in range(self.randint(1, 2))]
            message["tool_responses"] = pairs
        return message

    def call(self, index):
        arguments = self.choice([None, self.arguments(), self.arguments(), self.arguments()])
        name = self.choice(NAMES)
        return {"id": f"call_{index}", "type": "function", "function": {"name": name, "arguments": arguments}}

    def answers(self, message):
        calls = message["tool_calls"]
        if len(calls) == 1 and self.chance(0.2):
            del calls[0]["id"]
            return [{"role": "tool", "content": self.content()}]
        answered = self.sample(calls, self.randint(0, len(calls)))
        answers = [{"role": "tool", "tool_call_id": call["id"], "content": self.content()} for call in answered]
        for answer in answers:
            if self.chance(0.1):
                answer |= {"tool_call_id": "nobody"} | ({"name": self.choice(NAMES)} if self.chance() else {})
        return answers

    def conversation(self):
        messages = [self.opening()] if self.chance() else []
        for _ in range(self.randint(0, 5)):
            match self.choices(["user", "assistant", "system", "developer", "tool"], [8, 10, 1, 1, 0.5])[0]:
                case "assistant":
                    message = self.assistant()
                    messages.append(message)
                    if message.get("tool_calls"):
                        messages += self.answers(message)
                case "user":
                    messages.append({"role": "user", "content": self.content()})
                case "tool":
                    messages.append({"role": "tool", "tool_call_id": "call_0", "content": self.content()})
                case role:
                    if messages:
                        messages.append({"role": role, "content": self.text(4)})
        return messages
