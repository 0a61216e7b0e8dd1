"""Recipe: one YAML file that says everything about a run: data x method x stage x backend, and where it lands.

In: YAML (or a dict) and `path=value` overrides. Out: a validated Recipe, or a ConfigError that lists every problem with its line.
Runs in: everywhere; imports no torch, ray, peft, transformers (a test holds this).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, ValidationError, field_validator, model_validator

from ftcore.backends.base import BACKENDS, Backend
from ftcore.errors import ConfigError
from ftcore.methods.base import METHODS, Method
from ftcore.optim import Optim
from ftcore.plugins import import_plugins
from ftcore.recipe_checks import impossible
from ftcore.recipe_errors import explain
from ftcore.recipe_file import Problem, Tree, by_line, dump_yaml, override, parse_tree, read_tree
from ftcore.section import Choice, Section, chosen
from ftcore.stages.base import STAGES, Stage
from ftcore.storage import digest_of

REQUIRED = "(required)"

NAME = re.compile(r"^[a-z0-9][a-z0-9._-]{0,62}$")
ADAPTER_NAME = re.compile(r"^[a-z0-9][a-z0-9._-]{0,62}/[a-z0-9][a-z0-9._-]{0,62}$")


class Model(Section):
    """The base model."""

    path: str
    """A local folder or a hub name (`Qwen/Qwen2.5-0.5B`)."""
    revision: str = "main"
    """Branch, tag or commit on the hub; ignored for a folder."""
    adapter: str | None = None
    """Continue from a published adapter: `tenant/name`, `tenant/name@digest`, or a PEFT folder."""
    dtype: Literal["fp32", "bf16", "fp16", "fp64"] = "bf16"
    """What the frozen base is held and computed in; what is trained is kept in fp32 (fp64 with fp64)."""
    attention: Literal["auto", "varlen", "sdpa", "eager"] = "auto"
    """`auto`: our segment-isolating path where the model allows it, else padded SDPA."""
    chat_template: str = "auto"
    """`auto`: the tokenizer's own, else the family's; or a family name (chatml, llama3, ...), or a .jinja file."""
    trust_remote_code: bool = False
    """Run Python that comes with the model. Off: only what transformers itself implements."""


class Source(Section):
    """One place rows come from."""

    path: str
    """A file, folder, glob, s3:// or other fsspec path, or `hf:NAME[:SPLIT]`."""
    format: str = "auto"
    """How a row reads: auto, alpaca, sharegpt, messages, text, ... (`ftcore schema` lists them)."""
    weight: float = Field(1.0, gt=0)
    """Passes over this source within one epoch; 0.5 takes a stable half of it."""
    split: Literal["auto", "train", "validation", "test"] = "auto"
    """`auto`: dealt by the stable hash of `data.validation` and `data.test`; else all of it goes there."""


class Data(Section):
    """Which rows, and how they become tokens."""

    sources: tuple[Source, ...] = Field(min_length=1)
    """Where rows come from; a mixture when several."""
    train_on: Literal["answers", "all", "last"] = "answers"
    """Which turns are labels: every assistant turn, everything, or the last assistant turn only."""
    max_length: int = Field(2048, ge=8)
    """Longest example, in tokens."""
    overlong: Literal["refuse", "drop", "truncate", "split"] = "truncate"
    """What happens to a longer one. `split` cuts it into windows, each a separate example."""
    pack: bool = True
    """Lay several examples end to end in one block, kept apart by attention and positions."""
    block_tokens: int | None = Field(None, ge=8)
    """Tokens in a packed block; unset: `max_length`."""
    validation: float = Field(0.05, ge=0, lt=1)
    """Share of rows held out for validation loss, by a stable hash of the row's content."""
    test: float = Field(0.0, ge=0, lt=1)
    """Share of rows held out and never read by training."""
    duplicates: Literal["drop", "report", "keep"] = "drop"
    """Rows whose content is exactly the same."""
    near_duplicates: Literal["drop", "report", "keep"] = "keep"
    """Rows whose word shingles are alike (MinHash); looked for unless `keep`."""
    near_threshold: float = Field(0.8, gt=0, le=1)
    """Estimated Jaccard similarity from which two rows are near duplicates."""
    redact: Literal["off", "report", "mask"] = "report"
    """Secrets and personal data in rows: look for them and report, or replace them too."""
    max_rejected: float = Field(0.01, ge=0, le=1)
    """Share of rows that may be rejected before the run is refused."""
    max_truncated: float = Field(0.05, ge=0, le=1)
    """Share of trained tokens' examples that may lose labels to `max_length` before the run is refused."""
    cache: str = "prepared"
    """Folder of prepared blocks, by content: a second run on the same data starts at once."""
    engine: Literal["auto", "process", "ray"] = "auto"
    """Where rows are prepared; `auto` uses the cluster from a few megabytes up."""

    @field_validator("sources", mode="before")
    @classmethod
    def _one_or_many(cls, value: object) -> object:
        if isinstance(value, str | dict):
            value = [value]
        return [{"path": item} if isinstance(item, str) else item for item in value] if isinstance(value, list) else value

    @model_validator(mode="after")
    def _fits(self) -> Data:
        if self.validation + self.test >= 1:
            raise ValueError("validation + test must leave rows to train on")
        if self.block_tokens is not None and self.block_tokens < self.max_length:
            raise ValueError(f"block_tokens ({self.block_tokens}) must hold at least one example of max_length ({self.max_length})")
        return self


class Elastic(Section):
    """As many workers as there is room for, between two bounds; the result does not depend on how many there were."""

    min: int = Field(1, ge=1)
    """Fewer than this do not train: the run waits for room, and gives up when none comes."""
    max: int = Field(ge=1)
    """More than this are never started."""

    @model_validator(mode="after")
    def _ordered(self) -> Elastic:
        if self.min > self.max:
            raise ValueError(f"min ({self.min}) must not be above max ({self.max})")
        return self


def _number_or_bounds(value: object) -> str:
    return "[bounds]" if isinstance(value, dict | Elastic) else "[number]"


class Resources(Section):
    """What the run asks of the cluster."""

    workers: Annotated[
        Annotated[int, Field(ge=1), Tag("[number]")] | Annotated[Elastic, Tag("[bounds]")], Discriminator(_number_or_bounds)
    ] = 1
    """Training processes: a number, or `{min: 2, max: 4}` to go on with fewer when a node is gone and with more when it is back."""
    cpus_per_worker: float = Field(1, gt=0)
    """CPU cores (and compute threads) each worker takes."""
    gpus_per_worker: float = Field(0, ge=0)
    """GPUs each worker takes."""
    max_failures: int = Field(3, ge=-1)
    """Worker failures to recover from before the run fails; -1 for no limit."""
    placement: Literal["PACK", "SPREAD", "STRICT_SPREAD"] = "PACK"
    """How workers are laid over nodes."""

    @property
    def min_workers(self) -> int:
        return self.workers if isinstance(self.workers, int) else self.workers.min

    @property
    def max_workers(self) -> int:
        return self.workers if isinstance(self.workers, int) else self.workers.max


class Eval(Section):
    """Validation loss while training, and what the result is meant to reach."""

    every_steps: int | None = Field(None, ge=1)
    """Steps between validations; unset: at the end of each epoch."""
    patience: int | None = Field(None, ge=1)
    """Stop after this many validations without a better loss; unset: never."""
    max_blocks: int | None = Field(None, ge=1)
    """Look at no more validation blocks than this."""
    choose: Literal["best", "last"] = "best"
    """Which step the result is made of, when there are validation rows."""
    targets: dict[str, float] = Field(default_factory=dict)
    """Metric -> the value aimed at, in its own unit: `{exact_match: 0.8}`; `ftcore evaluate` says how far each system is from it."""


class Gate(Section):
    """What a new version must show on the recipe's test rows before its name points at it."""

    metric: str
    """Of `ftcore evaluate`: exact_match, accuracy, perplexity, ..."""
    min: float | None = None
    """At least as good as this, in the metric's own unit: 0.8 for 80 points of exact match; a perplexity may be at most this."""
    better_than: Literal["current"] | None = None
    """Told better than the version that the name points at; a first version has none to beat."""

    @model_validator(mode="after")
    def _asks_something(self) -> Gate:
        if self.min is None and self.better_than is None:
            raise ValueError("a gate needs `min`, or `better_than: current`")
        return self


class Output(Section):
    """Where things land."""

    runs: str = "runs"
    """Folder (or fsspec path) of run folders."""
    store: str = "adapters"
    """The adapter store."""
    adapter: str | None = None
    """Publish as `tenant/name`; unset: train and keep the result in the run folder only."""
    promote: bool = True
    """Point the name at the new version once it is published."""
    gate: Gate | None = None
    """Promote only what passes."""
    checkpoint_every: int = Field(50, ge=1)
    """Steps between checkpoints (one is always made at the end)."""
    keep: int = Field(2, ge=1)
    """Checkpoints kept: the newest ones and the best."""
    log_every: int = Field(1, ge=1)
    """Steps between journal lines."""
    loggers: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = ()
    """Also write there (each must be installed)."""
    sign_key: str | None = None
    """Private Ed25519 key file (PEM) to sign the card with."""

    @field_validator("adapter")
    @classmethod
    def _named(cls, value: str | None) -> str | None:
        if value is not None and not ADAPTER_NAME.match(value):
            raise ValueError("must read tenant/name, each of lower-case letters, digits, '.', '_', '-'")
        return value


class Recipe(Section):
    """Everything about one run."""

    name: str
    """Names the run folder; the same name continues the same run."""
    model: Model
    data: Data
    method: chosen(Method, METHODS)  # type: ignore[valid-type]
    stage: chosen(Stage, STAGES)  # type: ignore[valid-type]
    backend: chosen(Backend, BACKENDS, "plain") = Field(default_factory=lambda: BACKENDS["plain"](kind="plain"))  # type: ignore[valid-type]
    optim: Optim = Optim()
    resources: Resources = Resources()
    eval: Eval = Eval()
    output: Output = Output()
    plugins: tuple[str, ...] = ()
    """Python modules that register further methods, stages, formats...; only names the process allows (FTCORE_PLUGINS)."""

    @field_validator("name")
    @classmethod
    def _named(cls, value: str) -> str:
        if not NAME.match(value):
            raise ValueError("must be lower-case letters, digits, '.', '_', '-' and start with a letter or digit")
        return value


def load_recipe(path: str | Path, overrides: Sequence[str] = (), *, plugins: Sequence[str] | None = None) -> Recipe:
    """Reads a recipe file and applies `path=value` overrides (values are YAML).

    `plugins` is the allow-list of plugin modules; None takes FTCORE_PLUGINS. Raises ConfigError that lists every problem with its line.
    """
    return _recipe_of(read_tree(path), overrides, plugins)


def parse_recipe(text: str, name: str = "recipe", overrides: Sequence[str] = (), *, plugins: Sequence[str] | None = None) -> Recipe:
    """Like `load_recipe`, from text: how a worker gets the driver's recipe back (`parse_recipe(dump_recipe(recipe))`)."""
    return _recipe_of(parse_tree(text, name), overrides, plugins)


def _recipe_of(tree: Tree, overrides: Sequence[str], plugins: Sequence[str] | None) -> Recipe:
    for text in overrides:
        override(tree, text)
    import_plugins(tree.values.get("plugins"), plugins, tree.place(("plugins",)))
    problems = list(tree.problems)
    recipe: Recipe | None = None
    try:
        recipe = Recipe.model_validate(tree.values)
    except ValidationError as error:
        problems += explain(error, tree, Recipe)
    if recipe is not None:
        problems += [Problem(tree.place(tuple(at.split("."))), at, text) for at, text in impossible(recipe)]
    if recipe is None or problems:
        count = f"{len(problems)} problem{'s' if len(problems) != 1 else ''}"
        lines = "".join(f"\n  {problem}" for problem in sorted(problems, key=by_line))
        raise ConfigError(f"{count} in the recipe{lines}", remedy="`ftcore schema` describes every key")
    return recipe


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML, every key written out; `parse_recipe` reads back an equal one."""
    return dump_yaml(recipe.model_dump(mode="json"))


def recipe_digest(recipe: Recipe) -> str:
    """SHA-256 of the resolved recipe: the same for two files that ask for the same run."""
    return digest_of(recipe.model_dump(mode="json"))


def differences(recipe: Section, prefix: str = "") -> list[tuple[str, Any, Any]]:
    """(path, value, default) of every key that is not at its default; `REQUIRED` where a key has none."""
    found: list[tuple[str, Any, Any]] = []
    for name, field in type(recipe).model_fields.items():
        value, path = getattr(recipe, name), f"{prefix}{name}"
        default = REQUIRED if field.is_required() else field.get_default(call_default_factory=True, validated_data={})
        if isinstance(value, Section):
            if isinstance(value, Choice) and getattr(default, "kind", default) != value.kind:
                found.append((f"{path}.kind", value.kind, getattr(default, "kind", default)))
            found += [line for line in differences(value, f"{path}.") if not line[0].endswith(".kind")]
        elif isinstance(value, tuple) and value and all(isinstance(item, Section) for item in value):
            found += [line for index, item in enumerate(value) for line in differences(item, f"{path}.{index}.")]
        elif value != default:
            found.append((path, value, default))
    return found
