"""Search: which keys of a recipe are looked for, among which values, for how long; and the recipe of each trial.

In: a search file or PATH=RANGE words, the recipe around it. Out: a Search; the recipe that a set of values stands for. Runs in: the
driver and trials; imports no torch and no ray.

    optim.lr:     {log: [1e-4, 1e-2]}           by factors            method.rank:  {choice: [4, 8, 16]}
    optim.clip:   {range: [0.5, 2]}             evenly                method.alpha: {equals: 2 * method.rank}
"""

from __future__ import annotations

import difflib
import json
import math
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice, product
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, ValidationError, field_validator, model_validator

from ftcore.backends.base import BACKENDS
from ftcore.errors import ConfigError
from ftcore.formula import Formula
from ftcore.methods.base import METHODS
from ftcore.recipe import Recipe, parse_recipe
from ftcore.recipe_errors import explain
from ftcore.recipe_file import by_line, override, parse_tree, read_tree
from ftcore.section import Section
from ftcore.sharing import base_key, refusal, refusal_of_base
from ftcore.stages.base import STAGES

Value = int | float | str | bool | None | list[Any] | dict[str, Any]


class Choices(Section):
    """One of these."""

    choice: tuple[Value, ...] = Field(min_length=1)

    def samples(self) -> list[Value]:
        return list(self.choice)


class _Between(Section):
    @abstractmethod
    def bounds(self) -> tuple[float, float]:
        """Both ends, which are included."""

    @property
    def is_whole(self) -> bool:
        """Both ends are whole numbers: so is what lies between. See `settled`."""
        return all(isinstance(end, int) for end in self.bounds())

    def samples(self) -> list[Value]:
        return list(self.bounds())


class Even(_Between):
    """Evenly between two numbers, both included."""

    range: tuple[int | float, int | float]

    def bounds(self) -> tuple[float, float]:
        return self.range

    @field_validator("range")
    @classmethod
    def _rises(cls, value: tuple[float, float]) -> tuple[float, float]:
        return _rising(value)


class Log(_Between):
    """Between two positive numbers, each factor as likely as any other."""

    log: tuple[int | float, int | float]

    def bounds(self) -> tuple[float, float]:
        return self.log

    @field_validator("log")
    @classmethod
    def _rises(cls, value: tuple[float, float]) -> tuple[float, float]:
        if value[0] <= 0:
            raise ValueError(f"the lower end of a log range is above 0; got {value[0]:g}")
        return _rising(value)


def _rising(value: tuple[float, float]) -> tuple[float, float]:
    if not value[0] < value[1]:
        raise ValueError(f"the lower end comes first; got {value[0]:g} to {value[1]:g}")
    return value


class Relation(Section):
    """Follows from other keys: `2 * method.rank`. Numbers, recipe paths, + - * / // **, min, max, round, and brackets."""

    equals: str

    @field_validator("equals")
    @classmethod
    def _reads(cls, value: str) -> str:
        Formula(value)
        return value


def _form(value: object) -> str:
    if isinstance(value, Section):
        return next(iter(type(value).model_fields))
    found = set(value) & FORMS.keys() if isinstance(value, dict) else set()
    return next(iter(found)) if found else "choice"


FORMS: dict[str, Any] = {"choice": Choices, "range": Even, "log": Log, "equals": Relation}
Span = Annotated[
    Annotated[Choices, Tag("choice")] | Annotated[Even, Tag("range")] | Annotated[Log, Tag("log")] | Annotated[Relation, Tag("equals")],
    Discriminator(_form),
]


class Scheduler(Section):
    """Which trials end early."""

    kind: Literal["asha", "median", "pbt", "none"] = "asha"
    """asha: of those that came as far, only the best go on. median: who is worse than the others' median ends.
    pbt: the worst go on from the best, with other values."""
    grace: int = Field(10, ge=1, le=100)
    """Percent of a trial that is always run."""
    reduction: float = Field(3, gt=1)
    """asha: one in so many goes on at each rung; rungs lie this factor apart."""
    every: float = Field(25, gt=0, le=100)
    """pbt: percent of a trial between two looks at who is worst."""


class Search(Section):
    """What is looked for, and how."""

    space: dict[str, Span] = Field(min_length=1)
    """Recipe path -> values: {choice: [...]}, {range: [low, high]}, {log: [low, high]}, {equals: "2 * method.rank"}."""
    searcher: Literal["tpe", "random", "grid"] = "tpe"
    """tpe: where good trials were before (Bergstra et al. 2011; Optuna's). grid: every combination of choices."""
    scheduler: Scheduler = Scheduler()
    metric: str = "validation_loss"
    """Which figure decides."""
    goal: Literal["auto", "min", "max"] = "auto"
    """auto: losses and perplexity are to be small, everything else large."""
    trials: int = Field(16, ge=1)
    """How many, more of them later too; a grid has its own number."""
    minutes: float | None = Field(None, gt=0)
    """No trial goes on after this long, unless the same search is given more."""
    concurrent: int | None = Field(None, ge=1)
    """Trials at once; unset: as many as the cluster holds, of tpe a quarter of all (4 at least), for it learns from those that ended."""
    shared: Literal["auto", "on", "off"] = "auto"
    """Trials of LoRA over one base are trained together, in one forward and backward pass; auto: where all of the space allows it."""
    together: int = Field(4, ge=1)
    """Trials that share one base at once; each takes the memory of its own activations."""
    looks: int = Field(10, ge=1)
    """Validations within a whole trial; between two of them nothing is decided."""
    seed: int = 0
    """The same seed draws the same trials."""

    @property
    def mode(self) -> str:
        if self.goal != "auto":
            return self.goal
        return "min" if self.metric.endswith(("loss", "perplexity", "seconds")) else "max"

    @property
    def free(self) -> dict[str, Choices | Even | Log]:
        """The keys that are drawn; all others follow from them."""
        return {path: span for path, span in self.space.items() if not isinstance(span, Relation)}

    @model_validator(mode="after")
    def _can_be_searched(self) -> Search:
        if not self.free:
            raise ValueError("space: every key follows from another; wanted at least one with a choice, range or log")
        uneven = [path for path, span in self.free.items() if not isinstance(span, Choices)]
        if self.searcher == "grid" and uneven:
            raise ValueError(f"searcher grid takes choices only; {', '.join(uneven)} has none: list values, or take random or tpe")
        if self.scheduler.kind == "pbt" and self.searcher != "random":
            raise ValueError("scheduler pbt changes values itself, and begins with random ones: take searcher random")
        return self

    @property
    def most_at_once(self) -> int:
        """A searcher that learns from trials has a quarter of them under way at most, for what it draws beside others it draws without
        them."""
        return self.concurrent or (max(4, self.num_trials // 4) if self.searcher == "tpe" else self.num_trials)

    @property
    def num_trials(self) -> int:
        if self.searcher != "grid":
            return self.trials
        return math.prod(len(span.choice) for span in self.free.values() if isinstance(span, Choices))


REPORTED = ("validation_loss", "perplexity", "loss", "grad_norm", "lr", "epoch", "step", "tokens", "trained_tokens", "seconds")
"""What every run reports with a validation; the stage of a plugin may report more."""
KINDS: dict[str, Any] = {"method.kind": METHODS, "stage.kind": STAGES, "backend.kind": BACKENDS}
FIXED = ("name", "output.", "plugins", "eval.", "data.validation", "data.test", "data.cache", "data.engine", "resources.")
"""What trials must have in common: where things land, and which rows judge them."""
PREPARES = ("model", "data", "stage")
"""Sections that decide what rows become: tokenizer, data, stage."""
NOT_PUBLISHED: dict[str, None] = {"adapter": None, "sign_key": None, "gate": None}
"""Keys of `output` in trials, and of a winner that is no adapter."""
WHILE_RUNNING = ("optim.lr", "optim.weight_decay", "optim.betas", "optim.clip_norm", "optim.min_lr_ratio", "method.dropout")
"""What a run can go on with another value of, its weights and optimizer state as they are."""


def load_search(path: str | Path | None, words: Sequence[str] = (), options: Mapping[str, Any] | None = None) -> Search:
    """Reads a search file, adds `PATH=RANGE` words to its space and sets `options` over it. Raises ConfigError for all that is wrong."""
    tree = read_tree(path) if path is not None else parse_tree("space: {}", "command line")
    if not isinstance(tree.values.get("space"), dict):
        tree.values["space"] = {}
    for word in words:
        key, _, text = word.partition("=")
        holder = parse_tree("{}", f"`{word}`")
        override(holder, f"range={text}")
        tree.values["space"][key.strip()] = holder.values["range"]
    for name, value in (options or {}).items():
        if value is not None:
            override(tree, f"{name}={value}")
    problems = list(tree.problems)
    search: Search | None = None
    try:
        search = Search.model_validate(tree.values)
    except ValidationError as error:
        problems += explain(error, tree, Search)
    if search is None or problems:
        lines = "".join(f"\n  {problem}" for problem in sorted(problems, key=by_line))
        raise ConfigError(
            f"the search cannot be understood{lines}",
            remedy="e.g. ftcore tune RECIPE optim.lr='{log: [1e-4, 1e-2]}' method.rank='{choice: [4, 8, 16]}'",
        )
    return search


def is_range(word: str) -> bool:
    """Whether a `PATH=VALUE` word gives a range to search rather than a value."""
    text = word.partition("=")[2].strip()
    return text.startswith("{") and any(text[1:].lstrip(" \"'").startswith(form) for form in FORMS)


def check(search: Search, recipe: Recipe) -> bool:
    """Whether trials are to share a base. Raises ConfigError unless each key is one of the recipe's that may differ, and the recipe is
    sound at both ends of every range; and the metric one that its runs report."""
    if search.metric not in REPORTED and not recipe.plugins:
        near = difflib.get_close_matches(search.metric, REPORTED, n=1)
        raise ConfigError(
            "no run reports this metric", where="metric", got=search.metric, wanted=" | ".join(REPORTED),
            remedy=f"did you mean {near[0]}?" if near else "",
        )  # fmt: skip
    for path in search.space:
        if path.startswith(FIXED) or path == "data":
            raise ConfigError(
                "this key is the same in all trials", where="space", got=path,
                wanted="a key of model, method, stage, backend, optim, or of data that does not say which rows judge",
            )  # fmt: skip
        if search.scheduler.kind == "pbt" and path not in WHILE_RUNNING:
            raise ConfigError(
                "scheduler pbt changes a trial while it trains, and this cannot change then", where="space", got=path,
                wanted=", ".join(WHILE_RUNNING), remedy="take scheduler asha for it",
            )  # fmt: skip
    return _shares(search, _at_all_ends(search, recipe))


def _at_all_ends(search: Search, recipe: Recipe) -> list[Recipe]:
    """Each key at every choice and both ends, the others at their first."""
    middle = {path: span.samples()[0] for path, span in search.free.items()}
    tried: list[dict[str, Any]] = [middle]
    for path, span in search.free.items():
        tried += [middle | {path: value} for value in span.samples()[1:]]
    return [recipe_of(search, recipe, values) for values in tried]


def settled(search: Search, recipe: Recipe) -> Search:
    """The same search, its ranges of the kind that their keys are: one of a key that takes fractions, `[0, 1]`, is not of 0 and 1 alone."""
    trees = [each.model_dump() for each in _at_all_ends(search, recipe)]
    space: dict[str, Span] = dict(search.space)
    for path, span in search.free.items():
        if not isinstance(span, Choices) and any(isinstance(_at(tree, path), float) for tree in trees):
            space[path] = type(span).model_validate({_form(span): [float(end) for end in span.bounds()]})
    return search.model_copy(update={"space": space})


def _at(tree: Any, path: str) -> Any:
    """None where there is no such key."""
    for name in path.split("."):
        if isinstance(tree, list | tuple) and name.isdigit() and int(name) < len(tree):
            tree = tree[int(name)]
        else:
            tree = tree.get(name) if isinstance(tree, dict) else None
    return tree


def _shares(search: Search, recipes: Sequence[Recipe]) -> bool:
    if search.shared == "off":
        return False
    reason = next(filter(None, map(refusal, recipes)), "")
    if not reason and len(set(map(base_key, recipes))) > 1:
        reason = "the space holds other bases, data or stages"
    if not reason and search.scheduler.kind == "pbt":
        reason = "scheduler pbt goes on from checkpoints, which shared trials have none of"
    reason = reason or refusal_of_base(recipes[0].model)
    if reason and search.shared == "on":
        raise ConfigError("these trials cannot share a base", where="shared", got=reason, remedy="shared: auto, or off")
    return not reason


def grid(search: Search) -> list[dict[str, Any]]:
    """Every combination, the first key's values changing slowest."""
    return [dict(zip(search.free, values, strict=True)) for values in product(*(span.samples() for span in search.free.values()))]


def data_recipes(search: Search, recipe: Recipe) -> Iterator[Recipe]:
    """A recipe for every way in which trials may have their rows prepared, as far as it is chosen from lists; as many as trials at most."""
    middle = {path: span.samples()[0] for path, span in search.free.items()}
    deciding = {path: span for path, span in search.free.items() if path.split(".")[0] in PREPARES and isinstance(span, Choices)}
    for values in islice(product(*(span.samples() for span in deciding.values())), search.num_trials if deciding else 0):
        try:
            yield recipe_of(search, recipe, middle | dict(zip(deciding, values, strict=True)))
        except ConfigError:
            continue  # two choices that do not go together: the trial that draws them says so


def recipe_of(search: Search, recipe: Recipe, values: Mapping[str, Any]) -> Recipe:
    """The recipe that these values stand for, relations worked out; it publishes nothing, so that its method need not make an adapter.

    A key of a choice whose drawn `kind` has no such key is left out, the recipe's own keys and relations too. Raises ConfigError with the
    values when the recipe refuses them.
    """
    tree = recipe.model_dump(mode="json")
    tree["output"] |= NOT_PUBLISHED
    for path, value in values.items():
        if path in KINDS:
            _put_kind(tree, path, str(value))
    words = [f"{path}={json.dumps(value)}" for path, value in values.items() if path not in KINDS and not _is_foreign(tree, path, values)]
    try:
        drawn = parse_recipe(json.dumps(tree), recipe.name, words, plugins=recipe.plugins)
        known = drawn.model_dump(mode="json")
        relations = [(path, span) for path, span in search.space.items() if isinstance(span, Relation)]
        words = [f"{path}={Formula(span.equals).value(known)}" for path, span in relations if not _is_foreign(tree, path, values)]
        return parse_recipe(json.dumps(known), recipe.name, words, plugins=recipe.plugins) if words else drawn
    except ConfigError as error:
        shown = ", ".join(f"{path}={value}" for path, value in values.items())
        raise ConfigError(error.what, where=f"the trial with {shown}", got=error.got, wanted=error.wanted, remedy=error.remedy) from error


def _put_kind(tree: dict[str, Any], path: str, kind: str) -> None:
    """Changes a choice's kind, keeping of its other keys those that the new kind has too. Raises ConfigError for an unknown one."""
    axis = path.removesuffix(".kind")
    keys = KINDS[path][kind].model_fields
    tree[axis] = {"kind": kind} | {key: value for key, value in tree[axis].items() if key in keys and key != "kind"}


def _is_foreign(tree: dict[str, Any], path: str, values: Mapping[str, Any]) -> bool:
    """Whether `path` is a key of a choice whose drawn kind has no such key."""
    axis, _, rest = path.partition(".")
    return f"{axis}.kind" in values and rest.split(".")[0] not in KINDS[f"{axis}.kind"][tree[axis]["kind"]].model_fields
