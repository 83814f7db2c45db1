"""Sums, differences and products. The thinking goes digit by digit from the right and says every carry."""

from __future__ import annotations

import random

from case import Case, says, user

PLUS = (
    "What is {a} + {b}?",
    "{a} + {b}",
    "{a}+{b}",
    "Add {a} and {b}.",
    "Compute {a} + {b}.",
    "What is {a} plus {b}?",
    "{a} + {b} = ?",
    "Please add {a} and {b}",
    "How much is {a} + {b}?",
    "Calculate {a}+{b}.",
    "What is the sum of {a} and {b}?",
    "Sum: {a} + {b}",
    "what is {a} + {b}",
    "what is {a}+{b}?",
    "{a} plus {b}",
    "{a}+{b}=",
    "add {a} and {b}",
    "and {a}+{b}?",
    "And {a} + {b}?",
)
MINUS = (
    "What is {a} - {b}?",
    "{a} - {b}",
    "{a}-{b}",
    "Subtract {b} from {a}.",
    "Compute {a} - {b}.",
    "What is {a} minus {b}?",
    "{a} - {b} = ?",
    "How much is {a} - {b}?",
    "Take {b} away from {a}.",
    "what is {a} - {b}",
    "{a} minus {b}",
    "{a}-{b}=",
    "and {a}-{b}?",
    "And {a} - {b}?",
)
TIMES = (
    "What is {a} * {b}?",
    "{a} * {b}",
    "{a}*{b}",
    "Multiply {a} by {b}.",
    "Compute {a} x {b}.",
    "What is {a} times {b}?",
    "{a} x {b} = ?",
    "How much is {a} times {b}?",
)


def think_sum(a: int, b: int) -> str:
    """The written method, one column a line."""
    lines, carry = [], 0
    left, right = str(a)[::-1], str(b)[::-1]
    for i in range(max(len(left), len(right))):
        digits = [int(n[i]) for n in (left, right) if i < len(n)]
        total = sum(digits) + carry
        terms = "+".join(map(str, digits + ([carry] if carry else [])))
        lines.append(f"{terms}={total}")
        carry = total // 10
        if carry:
            lines[-1] += f", {total % 10} carry {carry}"
    return "\n".join(lines)


def think_difference(a: int, b: int) -> str:
    """The written method with borrowing; needs a >= b."""
    lines, borrow = [], 0
    left, right = str(a)[::-1], str(b)[::-1]
    for i in range(len(left)):
        top, under = int(left[i]), int(right[i]) if i < len(right) else 0
        terms = f"{top}-{under}" + ("-1" if borrow else "")
        value = top - under - borrow
        borrow = int(value < 0)
        lines.append(f"{terms}={value}" if not borrow else f"{terms}={value}, {value + 10} borrow 1")
    return "\n".join(lines)


def think_product(a: int, b: int) -> str:
    """Two partial products, each digit by digit, then their sum."""
    lines, partials = [], []
    for place, digit in enumerate(map(int, str(b)[::-1])):
        carry = 0
        for d in map(int, str(a)[::-1]):
            total = d * digit + carry
            extra = f"+{carry}" if carry else ""
            lines.append(f"{d}*{digit}{extra}={total}")
            carry = total // 10
        partials.append(a * digit * 10**place)
        lines.append(f"{a}*{digit}{'0' * place}={partials[-1]}")
    return "\n".join(lines) + f"\n{partials[0]}+{partials[1]}\n" + think_sum(*partials)


def operands(rng: random.Random) -> tuple[int, int]:
    """Mostly three digits, up to four."""
    widths = rng.choice(
        ((1, 1), (2, 2), (2, 1), (3, 3), (3, 3), (3, 3), (3, 3), (3, 2), (2, 3), (4, 4), (4, 4), (4, 3))
    )
    a, b = (rng.randrange(0 if w == 1 else 10 ** (w - 1), 10**w) for w in widths)
    return a, b


def add(rng: random.Random, thinking: bool = True) -> Case:
    a, b = operands(rng)
    ask = rng.choice(PLUS).format(a=a, b=b)
    thought = think_sum(a, b) if thinking else None
    return Case("add", f"{a}+{b}", [user(ask)], says(str(a + b), thought), thinking=thinking)


def subtract(rng: random.Random, thinking: bool = True) -> Case:
    a, b = sorted(operands(rng), reverse=True)
    if rng.random() < 0.15:
        a, b = b, a
    ask = rng.choice(MINUS).format(a=a, b=b)
    thought = think_difference(a, b) if a >= b else f"{a}<{b}, -({b}-{a})\n{think_difference(b, a)}"
    thought = thought if thinking else None
    return Case("subtract", f"{a}-{b}", [user(ask)], says(str(a - b), thought), thinking=thinking)


def multiply(rng: random.Random) -> Case:
    a, b = rng.randrange(10, 100), rng.randrange(10, 100)
    ask = rng.choice(TIMES).format(a=a, b=b)
    return Case("multiply", f"{a}*{b}", [user(ask)], says(str(a * b), think_product(a, b)), thinking=True)


def add_three_digits(rng: random.Random) -> Case:
    """The sums that the first command of the README shows; for scoring only."""
    a, b = rng.randrange(100, 1000), rng.randrange(100, 1000)
    ask = rng.choice(PLUS).format(a=a, b=b)
    return Case("add 3 digits", f"{a}+{b}", [user(ask)], says(str(a + b), think_sum(a, b)), thinking=True)


def add_at_once(rng: random.Random) -> Case:
    """Without thinking: what the same network guesses in one go."""
    return add(rng, thinking=False)


def subtract_at_once(rng: random.Random) -> Case:
    return subtract(rng, thinking=False)
