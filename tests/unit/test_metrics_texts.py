"""Metrics of texts against published values and second implementations: sacreBLEU's own totals, rouge_score, nltk, plain loops."""

# ruff: noqa: RUF001 (Chinese has marks of its own)

from __future__ import annotations

import random

import numpy as np
import pytest
from nltk.translate.bleu_score import corpus_bleu
from rouge_score.rouge_scorer import RougeScorer
from rouge_score.tokenizers import Tokenizer
from sacrebleu.metrics import BLEU, CHRF

from ftcore.errors import DataError
from ftcore.evals.answered import Answered
from ftcore.evals.metrics.base import METRICS, Prepared
from ftcore.evals.metrics.rouge import common_subsequence
from ftcore.evals.words import Language, words, words_and_marks

# sacreBLEU's README, "Using SacreBLEU from Python": three answers, two references each
ANSWERS = ["The dog bit the man.", "It wasn't surprising.", "The man had just bitten him."]
REFERENCES = [
    ("The dog bit the man.", "The dog had bit the man."),
    ("It was not unexpected.", "No one was surprised."),
    ("The man bit him first.", "The man had bitten the dog."),
]
# Papineni's guide to action, as nltk's documentation of METEOR has it
GUIDE = "It is a guide to action which ensures that the military always obeys the commands of the party"
GUIDE_REFERENCE = "It is a guide to action that ensures that the military will forever heed Party commands"


def answered(texts: list[str], references: list[tuple[str, ...]]) -> list[Answered]:
    return [Answered(str(i), text, right) for i, (text, right) in enumerate(zip(texts, references, strict=True))]


def prepared(name: str, rows: list[Answered], language: Language = "en") -> Prepared:
    return METRICS[name].prepare(rows, language)


def value(name: str, rows: list[Answered], language: Language = "en") -> float:
    return float(prepared(name, rows, language).score(np.ones((1, len(rows))))[0])


def one(name: str, text: str, *references: str, language: Language = "en") -> float:
    return value(name, [Answered("1", text, references)], language)


def sentences(count: int, vocabulary: str, space: str = " ", seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    return [space.join(rng.choice(vocabulary.split()) for _ in range(rng.randint(1, 14))) for _ in range(count)]


LATIN = "the cat sat on a mat and The dog, ran. runs running Cat's x-ray 3.5 under_score"
HAN = "我 们 今 天 学 习 语 言 模 型"


def test_exact_match_and_f1_by_hand() -> None:
    rows = answered(["The Cat.", "a dog", ""], [("cat", "dog"), ("big dog house",), ("",)])
    assert value("exact_match", rows) == pytest.approx(2 / 3)
    assert value("token_f1", rows) == pytest.approx((1 + 0.5 + 1) / 3)
    assert one("token_f1", "", "cat") == 0


def test_exact_match_and_f1_in_chinese_by_hand() -> None:
    assert one("exact_match", "《红楼梦》。", "红楼梦", language="zh") == 1
    assert one("token_f1", "北京大学", "北京，南京", language="zh") == pytest.approx(0.5)  # 北 and 京 of four and four
    assert one("token_f1", "北京大学", "北京大学", language="en") == 1


def test_repeated_words_count_as_often_as_the_reference_has_them() -> None:
    assert one("token_f1", "cat cat cat", "cat dog") == pytest.approx(0.4)


def test_bleu_and_chrf_of_sacrebleus_manual() -> None:
    rows = answered(ANSWERS, REFERENCES)
    assert value("bleu", rows) == pytest.approx(48.53, abs=0.005)
    assert value("chrf", rows) == pytest.approx(59.73, abs=0.005)
    assert prepared("bleu", rows).how.startswith("nrefs:2|case:mixed|eff:no|tok:13a|smooth:exp|version:")
    assert prepared("chrf", rows).how.startswith("nrefs:2|case:mixed|eff:yes|nc:6|nw:0|space:no|version:")


def test_rows_may_have_different_numbers_of_references() -> None:
    rows = answered(ANSWERS, [REFERENCES[0], REFERENCES[1][:1], REFERENCES[2]])
    streams = [[r[0] for r in REFERENCES], [REFERENCES[0][1], None, REFERENCES[2][1]]]
    assert value("bleu", rows) == pytest.approx(BLEU().corpus_score(ANSWERS, streams).score)
    assert value("chrf", rows) == pytest.approx(CHRF().corpus_score(ANSWERS, streams).score)
    assert "nrefs:var" in prepared("bleu", rows).how


def test_bleu_in_chinese_is_by_characters() -> None:
    right = [f"今天我们{text}" for text in sentences(40, HAN, "")]  # nltk counts one 4-gram in an answer of three characters
    texts = [text[:-2] + "学" if i % 2 else text for i, text in enumerate(right)]
    rows = answered(texts, [(text,) for text in right])
    assert value("bleu", rows, "zh") == pytest.approx(100 * corpus_bleu([[list(text)] for text in right], [list(text) for text in texts]))
    assert value("bleu", rows, "zh") == pytest.approx(BLEU(tokenize="zh").corpus_score(texts, [right]).score)
    assert "tok:zh" in prepared("bleu", rows, "zh").how and value("bleu", rows, "en") < value("bleu", rows, "zh")


def test_resampled_bleu_is_that_of_the_rows_drawn() -> None:
    right = sentences(20, LATIN)
    texts = [text.replace("cat", "dog") for text in right]
    rows = answered(texts, [(text,) for text in right])
    picks = np.random.default_rng(0).integers(0, 20, (3, 20))
    weights = np.stack([np.bincount(pick, minlength=20) for pick in picks]).astype(float)
    for name, sacre in (("bleu", BLEU()), ("chrf", CHRF())):
        drawn = prepared(name, rows).score(weights)
        again = [sacre.corpus_score([texts[i] for i in pick], [[right[i] for i in pick]]).score for pick in picks]
        assert drawn == pytest.approx(again)


@pytest.mark.parametrize(("name", "theirs"), [("rouge_1", "rouge1"), ("rouge_2", "rouge2"), ("rouge_l", "rougeL")])
def test_rouge_is_that_of_rouge_score(name: str, theirs: str) -> None:
    texts, right, more = (sentences(60, LATIN, seed=seed) for seed in range(3))
    scorer = RougeScorer([theirs])
    expected = np.mean([scorer.score_multi([r, m], t)[theirs].fmeasure for t, r, m in zip(texts, right, more, strict=True)])
    assert 0.05 < value(name, answered(texts, list(zip(right, more, strict=True)))) == pytest.approx(expected)


class Characters(Tokenizer):
    def tokenize(self, text: str) -> list[str]:
        return list(text)


@pytest.mark.parametrize(("name", "theirs"), [("rouge_1", "rouge1"), ("rouge_2", "rouge2"), ("rouge_l", "rougeL")])
def test_rouge_in_chinese_is_by_characters(name: str, theirs: str) -> None:
    texts, right = (sentences(60, HAN, "", seed=seed) for seed in range(2))
    scorer = RougeScorer([theirs], tokenizer=Characters())
    expected = np.mean([scorer.score(r, t)[theirs].fmeasure for t, r in zip(texts, right, strict=True)])
    assert value(name, answered([f"{t}。" for t in texts], [(r,) for r in right])) == pytest.approx(expected)


def test_the_rouge_papers_example() -> None:
    """Lin 2004, section 3.1: S2 shares three words in order with S1, S3 two; ROUGE-2 cannot tell S2 and S3 apart."""
    right = "police killed the gunman"
    assert one("rouge_l", "police kill the gunman", right) == pytest.approx(3 / 4)
    assert one("rouge_l", "the gunman kill police", right) == pytest.approx(2 / 4)
    assert one("rouge_2", "police kill the gunman", right) == one("rouge_2", "the gunman kill police", right)


def test_the_longest_common_subsequence_is_that_of_the_table() -> None:
    rng = random.Random(0)
    for _ in range(200):
        ours, right = (rng.choices("abcd", k=rng.randint(0, 80)) for _ in range(2))
        table = np.zeros((len(ours) + 1, len(right) + 1), int)
        for i, a in enumerate(ours):
            for j, b in enumerate(right):
                table[i + 1, j + 1] = table[i, j] + 1 if a == b else max(table[i, j + 1], table[i + 1, j])
        assert common_subsequence(ours, right) == table[-1, -1]


def test_meteor_of_published_examples() -> None:
    """The two usual ones of exact matches: 1 - 0.5 / 6**3, and P 6/7, R 1, two chunks of six; and nltk's, where no synonym takes part."""
    assert one("meteor_stem", "the cat sat on the mat", "the cat sat on the mat") == pytest.approx(0.9977, abs=5e-5)
    assert one("meteor_stem", "the cat was sat on the mat", "the cat sat on the mat") == pytest.approx(0.9654, abs=5e-5)
    assert one("meteor_stem", GUIDE, GUIDE_REFERENCE) == pytest.approx(0.6944, abs=5e-5)
    assert one("meteor_stem", "non matching words", "this is a cat") == 0


def test_meteor_matches_stems_and_takes_the_best_reference() -> None:
    assert one("meteor_stem", "dogs running", "dog runs") == one("meteor_stem", "dog runs", "dog runs")
    assert one("meteor_stem", "a dog", "a fish", "a dog") == one("meteor_stem", "a dog", "a dog")
    assert one("meteor_stem", "buy", "purchase") == 0  # a synonym: not in this form


def test_meteor_in_chinese_is_by_characters() -> None:
    """P and R 3/4, two chunks of three."""
    assert one("meteor_stem", "我爱北京", "我也爱北") == pytest.approx(0.75 * (1 - 0.5 * (2 / 3) ** 3))


def test_distinct_is_that_of_a_plain_count() -> None:
    texts = [*sentences(30, LATIN), "好好学习"]
    rows = answered(texts, [()] * len(texts))
    for order in (1, 2):
        grams = [gram for text in texts for gram in zip(*(words_and_marks(text)[i:] for i in range(order)), strict=False)]
        assert value(f"distinct_{order}", rows) == pytest.approx(len(set(grams)) / len(grams))


def test_answers_without_words_have_no_diversity() -> None:
    with pytest.raises(DataError, match="no answer has 2 words or more"):
        value("distinct_2", answered(["one", ""], [(), ()]))
    with pytest.raises(DataError, match="compares answers with each other"):
        value("self_bleu", answered(["one two"], [()]))


@pytest.mark.parametrize(("vocabulary", "space"), [(LATIN, " "), (HAN, "")])
def test_self_bleu_is_sacrebleus_with_all_others_as_references(vocabulary: str, space: str) -> None:
    texts = [*sentences(25, vocabulary, space), *sentences(2, vocabulary, space), ""]
    cut = [" ".join(words_and_marks(text)) for text in texts]
    bleu = BLEU(tokenize="none", effective_order=True, force=True)
    each = [bleu.sentence_score(text, cut[:i] + cut[i + 1 :]).score for i, text in enumerate(cut)]
    assert value("self_bleu", answered(texts, [()] * len(texts))) == pytest.approx(np.mean(each), rel=1e-5)
    assert 10 < np.mean(each) < 90


def test_rouge_and_meteor_cut_chinese_within_other_words() -> None:
    assert words("用GPU训练") == ["用", "gpu", "训", "练"]
    assert one("rouge_1", "用GPU训练", "gpu") == pytest.approx(2 / 5)
