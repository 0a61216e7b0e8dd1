"""Judge options: who judges and on what terms, as command lines have it.

In: words of a command line. Out: JudgeOptions. Runs in: a person's terminal, the driver; no torch.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from ftcore.errors import ConfigError
from ftcore.evals.spending import Limit, Prices


@dataclass(frozen=True)
class JudgeOptions:
    """Who judges and on what terms, as a command line has it."""

    judge: str
    base: str = ""
    store: str = "adapters"
    key_variable: str = "OPENAI_API_KEY"
    limit: tuple[str, ...] = ()
    prices: tuple[float, ...] = (0.0, 0.0)
    max_tokens: int = 512
    at_once: int = 8
    context: int = 4096
    rubric: str = ""
    human: str = ""
    most_unjudged: float = 0.1
    confidence: float = 0.95

    def check(self) -> None:
        """What can be refused without reading anything."""
        if self.max_tokens < 1 or self.at_once < 1:
            raise ConfigError("a judge says at least one token, to one question at least", where="--judge-tokens, --at-once")
        if not 0 <= self.most_unjudged < 1:
            raise ConfigError("there is no such share of rows", where="--unjudged", got=self.most_unjudged, wanted="0 to below 1")
        if min(self.prices) < 0:
            raise ConfigError("there is no such price", where="--judge-prices", got=self.prices, wanted="0 or more")
        Limit.parse(self.limit, Prices(*self.prices))

    @classmethod
    def of(cls, options: argparse.Namespace) -> JudgeOptions:
        return cls(
            options.judge, options.base, options.store or "adapters", options.key_variable, tuple(options.judge_limit),
            tuple(options.judge_prices), options.judge_tokens, options.at_once, options.context, options.rubric,
            most_unjudged=options.unjudged,
        )  # fmt: skip


def add_judge_options(parser: argparse.ArgumentParser, what: str) -> None:
    """Beside `--base`, `--store`, `--key-variable`, `--at-once` and `--context`, which the command has. `what` the judge is for."""
    group = parser.add_argument_group("a judge", what)
    group.add_argument(
        "--judge", metavar="SYSTEM", default="", help="URL#MODEL, or base, tenant/name, FOLDER: a language model that judges"
    )
    group.add_argument("--rubric", metavar="FILE", default="", help="what to judge by, in plain words (default: a built-in one)")
    group.add_argument(
        "--judge-limit", nargs="+", default=[], metavar="LIMIT", help="400 (calls), calls=400, tokens=200000, money=2.50: stops before it"
    )
    group.add_argument(
        "--judge-prices", nargs=2, type=float, default=[0, 0], metavar=("IN", "OUT"), help="of a million tokens of questions, of replies"
    )
    group.add_argument("--judge-tokens", type=int, default=512, help="of a reply (default: 512)")
    group.add_argument("--unjudged", type=float, default=0.1, help="the share of rows that may be without a verdict (default: 0.1)")
