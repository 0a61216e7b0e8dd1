"""Ceiling: the best predictor that there can be of the simulated desktops, to judge others by.

In: held-out sessions with the simulator's own odds. Out: Forecasts. Runs in: the driver.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from ftcore.data.types import Conversation
from ftcore.demo.simulator import Session
from ftcore.evals.ngram import answers
from ftcore.evals.predictors import Forecast

CEILING = "ceiling (knows the habits)"


class Ceiling:
    """It knows the simulator's probabilities. Its hits are expected ones, so they carry no luck."""

    def __init__(self, held_out: Sequence[Session], name: str = CEILING) -> None:
        self.name, self.held_out = name, held_out

    def forecast(self, conversations: Sequence[Conversation]) -> list[Forecast]:
        made = []
        for session, seen in zip(self.held_out, conversations, strict=True):
            assert [odds.operation for odds in session.odds] == [answer for _, answer in answers(seen)]
            hits = np.array([odds.best_probability for odds in session.odds])
            nlls = np.array([-math.log(odds.probability) for odds in session.odds])
            made.append(Forecast(hits, nlls, np.zeros(len(hits), np.int64)))
        return made
