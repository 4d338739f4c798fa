"""Deliberate faults as data: a mutant is one change of one function's source.

`old` is a Python expression or statement. It is found in the syntax tree, so line breaks do not matter. `...` in it
stands for any expression, or, as the last argument of a call, for all further arguments. `...` in `new` stands for what
was found there: `return ...` -> `return 0.7 * ...` changes what a function returns, whatever that is.
"""

import ast
import inspect
import sys
import textwrap
from copy import deepcopy
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

PACKAGE = "flash_entmax"


class Mutant(NamedTuple):
    """In the function `name` of a module or a class, `old` becomes `new`, exactly `times` times."""

    owner: ModuleType | type
    name: str
    old: str
    new: str
    times: int = 1


def plant(mutant: Mutant, monkeypatch, folder: Path) -> None:
    """Set the changed function in every module that holds the original, until monkeypatch is undone.

    Its source goes to `folder`, where Triton reads it. Triton's interpreter runs it from then on. Triton's compiler
    keeps the kernels that it has compiled: there, plant before the first launch.
    """
    original = vars(mutant.owner)[mutant.name]
    changed = compiled(mutant, original, folder)
    modules = [module for name, module in sys.modules.items() if name.partition(".")[0] == PACKAGE]
    for place in {mutant.owner, *modules}:
        for name, value in list(vars(place).items()):
            if value is original:
                monkeypatch.setattr(place, name, changed)


def compiled(mutant: Mutant, original: object, folder: Path) -> object:
    """The changed function, decorated as the original is, in the namespace of the original's module."""
    function = original
    for inner in ("fn", "fget", "__func__"):  # of a kernel, a property and a class method
        function = getattr(function, inner, function)
    path = folder / f"{mutant.name}.py"
    path.write_text(changed_source(textwrap.dedent(inspect.getsource(function)), mutant))
    made = {}
    exec(compile(path.read_text(), path, "exec"), function.__globals__, made)
    return made[mutant.name]


def changed_source(source: str, mutant: Mutant) -> str:
    change = Change(mutant.old, mutant.new)
    tree = change.visit(ast.parse(source))
    if change.found != mutant.times:
        raise ValueError(f"{mutant.name} has {mutant.old!r} {change.found} times, not {mutant.times}:\n{source}")
    return ast.unparse(ast.fix_missing_locations(tree)) + "\n"


class Change(ast.NodeTransformer):
    """Replaces each match of `old` and counts them. What stands there then is not searched again."""

    def __init__(self, old: str, new: str) -> None:
        (self.old,), self.new, self.found = ast.parse(old).body, ast.parse(new).body, 0
        if isinstance(self.old, ast.Expr):
            self.old, self.new = self.old.value, [statement.value for statement in self.new]

    def visit(self, node: ast.AST) -> ast.AST | list[ast.AST]:
        found = match(self.old, node)
        if found is None:
            return self.generic_visit(node)
        self.found += 1
        filled = [Fill(found).visit(deepcopy(part)) for part in self.new]
        return filled if isinstance(node, ast.stmt) else filled[0]


class Fill(ast.NodeTransformer):
    """Puts what was found in place of each `...`."""

    def __init__(self, found: list[ast.expr]) -> None:
        self.found = found

    def visit_Call(self, node: ast.Call) -> ast.Call:
        node.args = [argument for old in node.args for argument in (self.found if is_any(old) else [old])]
        return self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> ast.expr:
        if not is_any(node):
            return node
        (found,) = self.found
        return deepcopy(found)


def is_any(node: object) -> bool:
    return isinstance(node, ast.Constant) and node.value is Ellipsis


def match(pattern: object, node: object) -> list[ast.expr] | None:
    """What `...` stands for where a node is as the pattern says, or None."""
    if is_any(pattern):
        return [node] if isinstance(node, ast.expr) else None
    if type(pattern) is not type(node):
        return None
    if isinstance(pattern, ast.AST):
        return match_all(
            [getattr(pattern, field) for field in pattern._fields], [getattr(node, f) for f in node._fields]
        )
    if isinstance(pattern, list):
        if not pattern or not is_any(pattern[-1]):
            return match_all(pattern, node)
        last = len(pattern) - 1
        found = match_all(pattern[:last], node[:last])
        return None if found is None else found + node[last:]
    return [] if pattern == node else None


def match_all(patterns: list, nodes: list) -> list[ast.expr] | None:
    if len(patterns) != len(nodes):
        return None
    parts = [match(pattern, node) for pattern, node in zip(patterns, nodes, strict=True)]
    return None if None in parts else [expression for part in parts for expression in part]
