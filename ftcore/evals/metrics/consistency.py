"""Consistency: how far the sources of answers support them, as an entailment model or a judge found.

In: answers with their support. Out: a share. Runs in: the driver.
"""

from __future__ import annotations

import numpy as np

from ftcore.evals.answered import Rows
from ftcore.evals.metrics.base import Prepared, mean, metric
from ftcore.evals.words import Language


@metric("consistency", "consistency", needs=("support",))
def consistency(rows: Rows, language: Language) -> Prepared:
    """The mean support of a row: see `ftcore.evals.entailment` and `ftcore.evals.support`, who find it."""
    return mean(np.array([row.support for row in rows], float))
