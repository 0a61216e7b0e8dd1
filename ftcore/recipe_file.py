"""The text of a recipe: YAML with the line of every key, `path=value` overrides, and YAML written so that it reads back the same.

In: a file or text, overrides. Out: plain values with the place each came from; every problem, not just the first. Runs in: everywhere.

YAML here means YAML 1.2's core schema: `1e-4` is a number, `off` and `no` are words, and a key written twice is refused.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ftcore.errors import ConfigError

KeyPath = tuple[str | int, ...]
MAX_BYTES = 1 << 20

BOOL = re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$")
NULL = re.compile(r"^(?:~|null|Null|NULL|)$")
INT = re.compile(r"^[-+]?[0-9]+$")
FLOAT = re.compile(r"^[-+]?(?:(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|\.inf|\.Inf|\.INF)$|^\.(?:nan|NaN|NAN)$")


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong: `recipe.yaml:12  method.rnk  unknown key; got 16; did you mean method.rank?`"""

    place: str
    path: str
    text: str

    def __str__(self) -> str:
        return "  ".join(part for part in (self.place, self.path, self.text) if part)


@dataclass
class Tree:
    """Plain values, and for each path the place a person wrote it (`recipe.yaml:12` or `override optim.lr=0`)."""

    values: dict[str, Any]
    places: dict[KeyPath, str] = field(default_factory=dict)
    name: str = "recipe"
    problems: list[Problem] = field(default_factory=list)

    def place(self, path: KeyPath) -> str:
        """Where `path` was written, or its nearest written parent."""
        for length in range(len(path), -1, -1):
            if path[:length] in self.places:
                return self.places[path[:length]]
        return self.name

    def value(self, path: KeyPath) -> Any:
        node: Any = self.values
        for key in path:
            if isinstance(node, list):
                node = dict(enumerate(node))
            if not isinstance(node, dict) or key not in node:
                return None
            node = node[key]
        return node


class _Loader(yaml.SafeLoader):
    """SafeLoader with YAML 1.2 scalars and no aliases (a recipe has no inheritance, and aliases can be made to explode)."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 - PyYAML's own class attribute

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.events.AliasEvent):
            event = self.peek_event()
            raise yaml.composer.ComposerError(
                None, None, "aliases (`*name`) are not read in recipes; write the value out", event.start_mark
            )
        return super().compose_node(parent, index)


for _tag, _pattern, _first in (
    ("bool", BOOL, list("tTfF")),
    ("null", NULL, ["~", "n", "N", ""]),
    ("int", INT, list("-+0123456789")),
    ("float", FLOAT, list("-+.0123456789")),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", _pattern, _first)


class _Dumper(yaml.SafeDumper):
    """Quotes what either YAML 1.1 or 1.2 would read as something else, so that other programs agree with us."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        super().increase_indent(flow, False)


_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", FLOAT, list("-+.0123456789"))


def read_tree(path: str | Path) -> Tree:
    """Reads a recipe file. Raises ConfigError for a file that is not there (naming near ones) or is not text."""
    path = Path(path)
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ConfigError(
                "this is too large to be a recipe", where=path, got=f"{path.stat().st_size} bytes", wanted=f"at most {MAX_BYTES}"
            )
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        near = near_files(path)
        remedy = f"did you mean {' or '.join(near)}?" if near else "check the path; recipes live in pipelines/recipes/"
        raise ConfigError("there is no recipe at this path", where=path, remedy=remedy) from error
    except UnicodeDecodeError as error:
        raise ConfigError("this is not a text file", where=path, got=str(error), wanted="YAML in UTF-8") from error
    except OSError as error:
        raise ConfigError("this recipe cannot be read", where=path, got=error.strerror or str(error), wanted="a YAML file") from error
    return parse_tree(text, str(path))


def near_files(path: Path) -> list[str]:
    """Recipes with nearly this name: beside it, in the working directory's and in the installed pipelines/recipes."""
    folders = [path.parent, Path("pipelines/recipes"), Path(__file__).resolve().parent.parent / "pipelines" / "recipes"]
    found: dict[str, str] = {}
    for folder in folders:
        if folder.is_dir():
            for other in sorted([*folder.glob("*.yaml"), *folder.glob("*.yml")]):
                found.setdefault(other.stem, str(other))
    return [found[name] for name in difflib.get_close_matches(path.stem, found, n=2, cutoff=0.6)]


def parse_tree(text: str, name: str = "recipe") -> Tree:
    """YAML text -> values with places. Duplicate keys become problems; broken YAML raises ConfigError with its line."""
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{name}:{mark.line + 1}:{mark.column + 1}" if mark else name
        raise ConfigError(
            "this is not readable YAML", where=where, got=error.problem or str(error), remedy=_yaml_remedy(str(error.problem))
        ) from error
    except (yaml.YAMLError, RecursionError) as error:
        raise ConfigError("this is not readable YAML", where=name, got=str(error) or type(error).__name__) from error
    finally:
        loader.dispose()
    tree = Tree({}, {(): f"{name}:1"}, name)
    if node is None:
        raise ConfigError("this recipe is empty", where=name, wanted="at least name, model, data, method and stage")
    values = _construct(node, (), tree, loader)
    if not isinstance(values, dict):
        raise ConfigError("a recipe is a mapping of keys", where=f"{name}:1", got=_shown(values), wanted="name: ..., model: ..., data: ...")
    tree.values = values
    return tree


def _yaml_remedy(problem: str) -> str:
    if "cannot start any token" in problem:
        return "indent with spaces, not tabs; put text with special characters in quotes"
    if "mapping values are not allowed" in problem:
        return "put text that holds ': ' in quotes, or check the indentation of this line"
    return ""


def by_line(problem: Problem) -> tuple[int, int]:
    """Sorts problems as a person reads the file: by line, overrides last."""
    line = problem.place.rsplit(":", 1)[-1]
    return (0, int(line)) if line.isdigit() else (1, 0)


def _construct(node: yaml.Node, path: KeyPath, tree: Tree, loader: _Loader) -> Any:
    if path:
        tree.places[path] = f"{tree.name}:{node.start_mark.line + 1}"
    if isinstance(node, yaml.MappingNode):
        result: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key, place = str(getattr(key_node, "value", "?")), f"{tree.name}:{key_node.start_mark.line + 1}"
            if key in result:
                first = tree.places[(*path, key)].rsplit(":", 1)[-1]
                tree.problems.append(Problem(place, dotted((*path, key)), f"this key is written twice (first in line {first}); remove one"))
                continue
            result[key] = _construct(value_node, (*path, key), tree, loader)
            tree.places[(*path, key)] = place
        return result
    if isinstance(node, yaml.SequenceNode):
        return [_construct(item, (*path, index), tree, loader) for index, item in enumerate(node.value)]
    return _scalar(node)


def _scalar(node: yaml.Node) -> Any:
    text, tag = str(node.value), node.tag.rsplit(":", 1)[-1]
    if tag == "bool" and BOOL.match(text):
        return text.lower() == "true"
    if tag == "null":
        return None
    if tag == "int" and INT.match(text) and len(text) < 100:
        return int(text)
    if tag == "float" and FLOAT.match(text):
        return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
    return text


def parse_value(text: str) -> Any:
    """The right side of `path=value`: a YAML value; what is not readable as one is the text itself (`s3://bucket`, `[a`)."""
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
    except yaml.YAMLError:
        return text
    return None if node is None else _construct(node, (), Tree({}), loader)


def override(tree: Tree, text: str) -> None:
    """Applies one `path=value`: dotted path, list items by index. What cannot be applied becomes a problem."""
    dotted_path, equals, value = text.partition("=")
    place = f"override `{text}`"
    keys = dotted_path.strip().split(".")
    if not equals or not all(keys):
        tree.problems.append(Problem(place, "", "an override reads path=value, like optim.lr=1e-4"))
        return
    path: KeyPath = ()
    node: Any = tree.values
    for position, key in enumerate(keys):
        last = position == len(keys) - 1
        if isinstance(node, list):
            if not key.isdigit() or int(key) >= len(node):
                wanted = f"an index from 0 to {len(node) - 1}" if node else "nothing: the list is empty"
                tree.problems.append(Problem(place, dotted(path), f"this is a list; got index {key!r}; wanted {wanted}"))
                return
            index: str | int = int(key)
        else:
            index = key
        path = (*path, index)
        if last:
            node[index] = parse_value(value)
            tree.places = {p: where for p, where in tree.places.items() if p[: len(path)] != path}
        else:
            node = _opened(node, index)
            tree.places.setdefault(path, place)
            if node is None:
                tree.problems.append(Problem(place, dotted(path), f"holds {_shown(tree.value(path))}, so nothing can be set under it"))
                return
    tree.places[path] = place


def _opened(parent: Any, key: str | int) -> Any:
    """The container at parent[key], made where it is missing or written in a short form (`method: lora`, `sources: rows.json`)."""
    child = parent.get(key) if isinstance(parent, dict) else parent[key]
    if child is None:
        child = {}
    elif key == "sources" and not isinstance(child, list):
        child = [child]
    elif isinstance(child, str) and isinstance(key, int):
        child = {"path": child}
    elif isinstance(child, str) and key in ("method", "stage", "backend"):
        child = {"kind": child}
    elif not isinstance(child, dict | list):
        return None
    parent[key] = child
    return child


def dotted(path: KeyPath) -> str:
    return ".".join(str(key) for key in path)


def _shown(value: Any, limit: int = 60) -> str:
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."


def dump_yaml(values: Any) -> str:
    """YAML text that `parse_tree` (and any YAML 1.1 program) reads back as the same values; keys keep their order."""
    return str(yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=140, default_flow_style=False))
