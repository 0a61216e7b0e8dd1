"""Words: what texts are cut into before they are compared, and the language they are read in.

In: texts. Out: lists of words; a Reading. Runs in: everywhere; no numpy.

A Chinese character is a word of its own everywhere, so only answers that are compared whole, and BLEU, need to know the language.
"""

from __future__ import annotations

import re
import string
import unicodedata
from dataclasses import dataclass
from typing import Literal

from ftcore.errors import ConfigError
from ftcore.evals.answered import Rows

Language = Literal["en", "zh"]
LANGUAGES: dict[str, Language] = {"en": "en", "zh": "zh"}

IDEOGRAPHS = "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
IDEOGRAPH = re.compile(f"[{IDEOGRAPHS}]")
WORD = re.compile(rf"[{IDEOGRAPHS}]|[^\W_{IDEOGRAPHS}]+")
WORD_OR_MARK = re.compile(rf"{WORD.pattern}|[^\s\w]|_")
ARTICLE = re.compile(r"\b(a|an|the)\b")
ASCII_MARKS = frozenset(string.punctuation)
FULLWIDTH_TILDE = "\uff5e"
"""CMRC drops it; Unicode calls it a symbol, no punctuation."""
CHINESE_FROM = 0.3
"""The share of Chinese characters among the references' letters from which a run is read as Chinese. One says what two letters or more
say elsewhere: Chinese with many foreign names stays above it, English that quotes some Chinese below."""


@dataclass(frozen=True)
class Reading:
    """How a run's texts are read. `share`: of Chinese characters among the letters of the references; nan where there are none."""

    language: Language
    share: float
    asked: str

    def __str__(self) -> str:
        if self.asked != "auto":
            return f"{self.language}, as asked for"
        return f"{self.language}: {100 * self.share:.0f} % of the references' letters are Chinese" if self.share >= 0 else self.language


def read_as(rows: Rows, asked: str = "auto") -> Reading:
    """Decides once for all systems of a run: they are judged against the same references. Raises ConfigError for another language."""
    texts = [reference for row in rows for reference in row.references]
    letters = sum(character.isalpha() for text in texts for character in text)
    share = sum(len(IDEOGRAPH.findall(text)) for text in texts) / letters if letters else float("nan")
    if asked == "auto":
        return Reading("zh" if share >= CHINESE_FROM else "en", share, asked)
    if asked not in LANGUAGES:
        raise ConfigError("texts cannot be read in that language", got=asked, wanted=" | ".join(["auto", *LANGUAGES]))
    return Reading(LANGUAGES[asked], share, asked)


def words(text: str) -> list[str]:
    """Runs of letters and digits in lower case, Chinese characters one by one; no marks. On ASCII the words of ROUGE-1.5.5."""
    return WORD.findall(text.lower())


def words_and_marks(text: str) -> list[str]:
    """Like `words`, with each mark as a word of its own."""
    return WORD_OR_MARK.findall(text.lower())


def answer_words(text: str, language: Language) -> list[str]:
    """What an answer is compared by: two answers with equal words are the same answer.

    en: lower case, without ASCII marks and articles, cut at spaces (SQuAD's normalisation, Rajpurkar et al. 2016). zh: lower case, without
    marks, Chinese characters one by one (CMRC 2018, Cui et al. 2019); spaces between Chinese characters do not count.
    """
    if language == "en":
        return ARTICLE.sub(" ", "".join(c for c in text.lower() if c not in ASCII_MARKS)).split()
    kept = "".join(c for c in text.lower() if c not in ASCII_MARKS and c != FULLWIDTH_TILDE and not unicodedata.category(c).startswith("P"))
    return IDEOGRAPH.sub(lambda found: f" {found[0]} ", kept).split()
