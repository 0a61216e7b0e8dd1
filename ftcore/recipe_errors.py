"""Explains what is wrong with a recipe in words: place, key, what was written, what is wanted, and the nearest right name.

In: pydantic's errors and the tree they came from. Out: one Problem a line. Runs in: everywhere a recipe is read; no torch.
"""

from __future__ import annotations

import difflib
from typing import Any, get_origin

from pydantic import BaseModel, ValidationError

from ftcore.foreign_names import RECIPE_PATHS
from ftcore.recipe_file import KeyPath, Problem, Tree, dotted
from ftcore.section import Choice, Section, leaf_paths

BOUNDS = {
    "greater_than": ("greater than {gt}", "gt"),
    "greater_than_equal": ("{ge} or more", "ge"),
    "less_than": ("less than {lt}", "lt"),
    "less_than_equal": ("{le} or less", "le"),
}
WANTED = {
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "int_parsing_size": "a smaller whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "string_type": "text (put it in quotes)",
    "model_type": "a section: keys indented under it",
    "model_attributes_type": "a section: keys indented under it",
    "dict_type": "a section: keys indented under it",
    "tuple_type": "a list",
    "list_type": "a list",
}


def explain(error: ValidationError, tree: Tree, recipe: type[Section]) -> list[Problem]:
    """Every line of a ValidationError as a Problem, in the order of the file."""
    problems = []
    lines = error.errors(include_url=False)
    for line in lines:
        path = _as_written(line["loc"], tree)
        if line["type"] == "too_short" and any(other["loc"][: len(line["loc"])] == line["loc"] for other in lines if other is not line):
            continue  # pydantic counts the valid items only; what is wrong with the others is in lines of their own
        problems.append(Problem(tree.place(path), dotted(path), _sentence(dict(line), path, tree, recipe)))
    return problems


def _as_written(loc: tuple[Any, ...], tree: Tree) -> KeyPath:
    """Pydantic's location without what it adds itself (names of union members)."""
    path: KeyPath = ()
    for key in loc:
        node = tree.value(path)
        if isinstance(key, int) or "[" not in str(key) or (isinstance(node, dict) and key in node):
            path = (*path, key)
    return path


def _sentence(line: dict[str, Any], path: KeyPath, tree: Tree, recipe: type[Section]) -> str:
    kind, context = line["type"], line.get("ctx", {})
    got = shown(line["input"])
    if kind == "extra_forbidden":
        return f"unknown key; got {got}; {_left_over(path, tree) or suggest_key(path, tree, recipe)}"
    if kind == "missing":
        return f"missing; {_documented(path, tree, recipe)}"
    if kind in BOUNDS:
        words, name = BOUNDS[kind]
        return f"out of range; got {got}; wanted {_range(path, tree, recipe) or words.format(**{name: context[name]})}"
    if kind == "literal_error":
        names = [name.strip("'") for name in context["expected"].replace(" or ", ", ").split(", ")]
        return f"unknown value; got {got}; wanted {' | '.join(names)}{_near(line['input'], names)}"
    if kind == "too_short":
        return f"needs at least {context['min_length']} item{'s' if context['min_length'] != 1 else ''}; got {got}"
    if kind in WANTED:
        return f"got {got}; wanted {WANTED[kind]}"
    if kind == "unknown_kind":
        return f"{line['msg']}; got {got}"
    message = line["msg"].removeprefix("Value error, ")
    return message if isinstance(line["input"], dict | list) else f"{message}; got {got}"


def _left_over(path: KeyPath, tree: Tree) -> str:
    """A key of the file's kind, after an override chose another kind for the section."""
    chosen_by = tree.place((path[0], "kind"))
    if len(path) == 2 and chosen_by.startswith("override") and not tree.place(path).startswith("override"):
        kind = tree.value((path[0], "kind"))
        return f"{path[0]} `{kind}` has no such key; write {path[0]}={kind} to replace the file's whole section"
    return ""


def _near(value: object, names: list[str]) -> str:
    near = difflib.get_close_matches(str(value).lower(), names, n=1)
    return f"; did you mean {near[0]}?" if near else ""


def suggest_key(path: KeyPath, tree: Tree, recipe: type[Section]) -> str:
    """`did you mean ...?` for a key that does not exist: its siblings, then every leaf of the recipe, then other programs' names."""
    key, parent = str(path[-1]), path[:-1]
    owner = section_at(parent, tree, recipe)
    siblings = list(owner.model_fields) if owner else []
    swapped = [name for name in siblings if sorted(name) == sorted(key)]
    if swapped:
        return f"did you mean {dotted((*parent, swapped[0]))}?"
    foreign = RECIPE_PATHS.get(key)
    if foreign and foreign != dotted(path):
        return f"did you mean {foreign}?" if "." in foreign and " " not in foreign else foreign
    near = difflib.get_close_matches(key, siblings, n=1, cutoff=0.6)
    if near:
        return f"did you mean {dotted((*parent, near[0]))}?"
    leaves = all_leaf_paths(tree, recipe)
    exact = [leaf for leaf in leaves if leaf.rsplit(".", 1)[-1] == key or leaf == key]
    close = exact or difflib.get_close_matches(dotted(path), leaves, n=1, cutoff=0.75) or _by_last(key, leaves) or _by_foreign(key)
    if close:
        return f"did you mean {close[0]}?"
    return f"keys here are {', '.join(siblings)}" if siblings else "`ftcore schema` lists the keys"


def _by_last(key: str, leaves: list[str]) -> list[str]:
    last = {leaf.rsplit(".", 1)[-1]: leaf for leaf in reversed(leaves)}
    return [last[name] for name in difflib.get_close_matches(key, last, n=1, cutoff=0.7)]


def _by_foreign(key: str) -> list[str]:
    near = difflib.get_close_matches(key, RECIPE_PATHS, n=1, cutoff=0.85)
    return [RECIPE_PATHS[name] for name in near if " " not in RECIPE_PATHS[name]]


def section_at(path: KeyPath, tree: Tree, recipe: type[Section]) -> type[BaseModel] | None:
    """The Section class that owns the keys under `path`, following choices by the kind that was written."""
    cls: type[BaseModel] | None = recipe
    is_name = False
    for depth, key in enumerate(path):
        if isinstance(key, int) or is_name:  # an item of a list, or one that its owner named
            is_name = False
            continue
        if cls is None or key not in cls.model_fields:
            return None
        is_name = get_origin(cls.model_fields[str(key)].annotation) is dict
        cls = _section_of(cls, str(key), tree.value(path[: depth + 1]))
    return cls


def _section_of(owner: type[BaseModel], key: str, written: Any) -> type[BaseModel] | None:
    field = owner.model_fields[key]
    for mark in field.metadata:
        registry = getattr(mark, "registry", None)
        if registry is not None:
            kind = written.get("kind", mark.default) if isinstance(written, dict) else written or mark.default
            chosen: type[BaseModel] | None = registry[kind] if isinstance(kind, str) and kind in registry else None
            return chosen
    found = [cls for cls in _classes(field.annotation) if issubclass(cls, BaseModel)]
    return found[0] if found else None


def _classes(annotation: Any) -> list[type]:
    if isinstance(annotation, type) and not getattr(annotation, "__args__", None):
        return [annotation]
    return [cls for inner in getattr(annotation, "__args__", ()) for cls in _classes(inner)]


def all_leaf_paths(tree: Tree, recipe: type[Section]) -> list[str]:
    """Leaf paths of the recipe, with those of the chosen kinds and of one source."""
    leaves = leaf_paths(recipe)
    for name in recipe.model_fields:
        cls = section_at((name,), tree, recipe)
        if cls is not None and issubclass(cls, Choice):
            leaves += [f"{name}.{key}" for key in cls.model_fields if f"{name}.{key}" not in leaves]
    source = section_at(("data", "sources"), tree, recipe)
    return leaves + [f"data.sources.0.{key}" for key in (source.model_fields if source else ())]


def _range(path: KeyPath, tree: Tree, recipe: type[Section]) -> str:
    """Both bounds of a field in words: `from 0 to 1`, `greater than 0`."""
    owner = section_at(path[:-1], tree, recipe)
    field = owner.model_fields.get(str(path[-1])) if owner else None
    bounds = {
        name: getattr(mark, name) for mark in (field.metadata if field else ()) for name in ("gt", "ge", "lt", "le") if hasattr(mark, name)
    }
    low = f"from {bounds['ge']}" if "ge" in bounds else f"greater than {bounds['gt']}" if "gt" in bounds else ""
    high = f"to {bounds['le']}" if "le" in bounds else f"less than {bounds['lt']}" if "lt" in bounds else ""
    if low and high:
        return f"{low} {high}" if (low.startswith("from") and high.startswith("to")) else f"{low.replace('from', 'at least')} and {high}"
    return ""


def _documented(path: KeyPath, tree: Tree, recipe: type[Section]) -> str:
    owner = section_at(path[:-1], tree, recipe)
    field = owner.model_fields.get(str(path[-1])) if owner else None
    return (field.description or "").split("\n")[0] if field and field.description else "this key is required"


def shown(value: object, limit: int = 60) -> str:
    """A value as a person wrote it, short, on one line, harmless to a terminal."""
    text = "null" if value is None else str(value).lower() if isinstance(value, bool) else value if isinstance(value, str) else repr(value)
    text = "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in str(text))
    return text if len(text) <= limit else text[: limit - 3] + "..."
