"""Win rate: what a judge made of answers, each against another system's to the same question.

In: answers with their points. Out: a share. Runs in: the driver.
"""

from __future__ import annotations

import numpy as np

from ftcore.evals.answered import Rows
from ftcore.evals.metrics.base import Prepared, mean, metric
from ftcore.evals.words import Language


@metric("win_rate", "win rate", needs=("points",))
def win_rate(rows: Rows, language: Language) -> Prepared:
    """The share of rows won, a tie counting half; the other system's is the rest to 1, so the difference is wins less losses."""
    return mean(np.array([row.points for row in rows], float), "by a judge asked in both orders, ties count half")
