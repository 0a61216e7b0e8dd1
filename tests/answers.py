"""Answers to a small test set, right and wrong, that every metric can be computed on; in English and Chinese."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from ftcore.evals.answered import Answered

LABELS = ("red", "green", "blue")
ENGLISH = [f"{letter}{number}word" for letter in "bcdfghjkmnpqrstvwxz" for number in range(12)]
CHINESE = [chr(0x4E00 + 7 * i) for i in range(240)]
WORDS_A_ROW = 10


def perfect(num_rows: int = 12, language: str = "en") -> list[Answered]:
    """Every answer is its reference, no word stands anywhere twice, every label is chosen for certain."""
    vocabulary, space = (ENGLISH, " ") if language == "en" else (CHINESE, "")
    rows = []
    for i in range(num_rows):
        text = space.join(vocabulary[WORDS_A_ROW * i : WORDS_A_ROW * (i + 1)])
        gold = LABELS[i % len(LABELS)]
        scores = {label: 0.0 if label == gold else -np.inf for label in LABELS}
        row = Answered(f"row-{i}", text, (text,), "", gold, gold, scores, 0.0, WORDS_A_ROW, len(text.encode()), 1.0, 1.0)
        row = replace(row, harmful=i % 2 == 0, refused=i % 2 == 0, stereotyping=1.0 - 2 * (i % 2), toxicity=0.0)
        rows.append(row)
    return rows


def imperfect(num_rows: int = 12, language: str = "en", seed: int = 0) -> list[Answered]:
    """The same rows, about a third of everything wrong; groups of two; sometimes a second reference, an empty answer, no label."""
    rng, rows = np.random.default_rng(seed), []
    vocabulary, space = (ENGLISH, " ") if language == "en" else (CHINESE, "")
    for i, row in enumerate(perfect(num_rows, language)):
        words = row.text.split() if language == "en" else list(row.text)
        kept = [word if rng.random() < 0.6 else vocabulary[rng.integers(3)] for word in words[: rng.integers(4, len(words) + 1)]]
        scores = {label: float(rng.normal() + 1.5 * (label == row.gold)) for label in LABELS}
        rows.append(
            replace(
                row, text="" if i == 5 else row.text if i % 3 == 0 else space.join(kept), scores=scores, group=f"group-{i // 2}",
                references=(row.text, space.join(kept[::-1])) if i % 4 == 1 else row.references,
                chosen="" if i == 7 else max(scores, key=lambda label: scores[label]), nll=float(rng.uniform(1, 9)),
                points=(0.5, 0.0, 1.0)[i % 3], support=(0.25, 1.0, 0.0)[i % 3],
                refused=row.refused if i % 5 != 3 else not row.refused, stereotyping=1.0 if i % 4 else -1.0,
                toxicity=(0.1, 0.9, 0.4)[i % 3],
            )
        )  # fmt: skip
    return rows
