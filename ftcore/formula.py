"""Formula: arithmetic over recipe paths, `2 * method.rank`; nothing else of Python is in it.

In: text, a resolved recipe as plain values. Out: a number. Runs in: the driver and trials.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping
from typing import Any

from ftcore.errors import ConfigError

OPERATORS: dict[type[ast.AST], Callable[..., Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv, ast.FloorDiv: operator.floordiv,
    ast.Pow: operator.pow, ast.USub: operator.neg, ast.UAdd: operator.pos,
}  # fmt: skip
FUNCTIONS: dict[str, Callable[..., Any]] = {"min": min, "max": max, "round": round}


class Formula:
    """Arithmetic over recipe paths; nothing else of Python is in it."""

    def __init__(self, text: str) -> None:
        """Raises ValueError for what is not plain arithmetic."""
        self.text = text
        try:
            self._tree = ast.parse(text.strip(), mode="eval").body
        except SyntaxError as error:
            raise ValueError(f"cannot read `{text}`: wanted arithmetic over recipe paths, like 2 * method.rank") from error
        self._check(self._tree)

    def value(self, recipe: Mapping[str, Any]) -> Any:
        """Its value in a resolved recipe. Raises ConfigError for a path that is none, or that holds no number."""
        try:
            found = self._value(self._tree, recipe)
        except (ZeroDivisionError, OverflowError) as error:
            raise ConfigError(f"`{self.text}` has no value here", got=str(error)) from error
        return int(found) if isinstance(found, float) and found.is_integer() and "/" not in self.text.replace("//", "") else found

    def _check(self, node: ast.AST) -> None:
        if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
            self._check(node.left)
            self._check(node.right)
        elif isinstance(node, ast.UnaryOp) and type(node.op) in OPERATORS:
            self._check(node.operand)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in FUNCTIONS and not node.keywords:
            for each in node.args:
                self._check(each)
        elif not (isinstance(node, ast.Constant) and type(node.value) in (int, float)) and not _path(node):
            raise ValueError(f"`{ast.unparse(node)}` in `{self.text}`: wanted numbers, recipe paths, + - * / // **, min, max, round")

    def _value(self, node: ast.AST, recipe: Mapping[str, Any]) -> Any:
        if isinstance(node, ast.Constant):
            return node.value
        if isinstance(node, ast.BinOp):
            return OPERATORS[type(node.op)](self._value(node.left, recipe), self._value(node.right, recipe))
        if isinstance(node, ast.UnaryOp):
            return OPERATORS[type(node.op)](self._value(node.operand, recipe))
        if isinstance(node, ast.Call):
            assert isinstance(node.func, ast.Name)
            return FUNCTIONS[node.func.id](*(self._value(each, recipe) for each in node.args))
        path, found = _path(node), recipe
        for key in path:
            found = found.get(key) if isinstance(found, Mapping) else None  # type: ignore[assignment]
        if type(found) not in (int, float):
            raise ConfigError(
                f"`{'.'.join(path)}` is no number of this recipe",
                where=f"the relation `{self.text}`",
                got=found,
                wanted="a path like method.rank",
            )
        return found


def _path(node: ast.AST) -> tuple[str, ...]:
    """`method.rank` as ("method", "rank"); empty for anything else."""
    if isinstance(node, ast.Name):
        return (node.id,)
    if isinstance(node, ast.Attribute) and (before := _path(node.value)):
        return (*before, node.attr)
    return ()
