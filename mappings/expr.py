"""Sizes in mappings: integers, names, and + - * // between them. Nothing else, and never executed as Python."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from functools import lru_cache

MAX_TEXT = 200
"""Characters of one size. Python's parser goes as deep as a text is long, and a stack has an end."""


class ExprError(ValueError):
    """The text is not a size, or names a size that is not known."""


@lru_cache(maxsize=4096)
def parse(text: str) -> ast.expr:
    """The syntax tree of a size. Raises ExprError if it is anything but integers, names, + - * //."""
    if len(text) > MAX_TEXT:
        raise ExprError(f"{text[:20]!r}… is not a size: it has more than {MAX_TEXT} characters")
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError):  # ValueError: a NUL
        raise ExprError(f"{text!r} is not a size: use integers, names, + - * //") from None
    for node in ast.walk(tree):
        fine = isinstance(node, ast.BinOp | ast.Name | ast.Load | ast.Add | ast.Sub | ast.Mult | ast.FloorDiv) or (
            isinstance(node, ast.Constant) and type(node.value) is int
        )
        if not fine:
            raise ExprError(f"{text!r} is not a size: use integers, names, + - * //")
    return tree


def names(text: str) -> frozenset[str]:
    """The names that a size refers to."""
    return frozenset(node.id for node in ast.walk(parse(text)) if isinstance(node, ast.Name))


def evaluate(text: str | int, sizes: Mapping[str, int]) -> int:
    """The value of a size. Raises ExprError for an unknown name (the known ones are listed)."""
    return text if isinstance(text, int) else _value(parse(text), sizes)


def _value(node: ast.expr, sizes: Mapping[str, int]) -> int:
    match node:
        case ast.Constant(value=int(value)):
            return value
        case ast.Name(id=name):
            if name not in sizes:
                raise ExprError(f"unknown size {name!r}; known: {', '.join(sorted(sizes)) or 'none'}")
            return sizes[name]
        case ast.BinOp(left=left, op=op, right=right):
            return _combine(op, _value(left, sizes), _value(right, sizes))
        case _:
            raise ExprError(f"not a size: {ast.unparse(node)}")


def _combine(op: ast.operator, a: int, b: int) -> int:
    match op:
        case ast.Add():
            return a + b
        case ast.Sub():
            return a - b
        case ast.Mult():
            return a * b
        case _:
            if b == 0:
                raise ExprError("division by zero")
            return a // b
