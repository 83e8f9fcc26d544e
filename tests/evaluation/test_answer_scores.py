from __future__ import annotations

import re

import pytest

from lightning_sft.evaluation.answer_scores import extracted, normalized, scores
from lightning_sft.types import InputError

GSM8K = r"####\s*(\S+)"


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        ("so 3 * 4 = 12\n#### 12", "12"),
        ("#### 7 no, wait\n#### 1,234.", "1234"),
        ("####-5.50", "-5.50"),
        ("the answer is 12", None),
        ("a,b #### x,y", "x,y"),
    ],
)
def test_the_last_match_counts_without_commas_in_numbers_and_a_final_stop(answer: str, found: str | None) -> None:
    assert extracted(answer, GSM8K) == found


def test_matches_are_shares_of_all_answers() -> None:
    references = ["#### 1", "#### 2", "#### 3,000", "#### 4"]
    answers = ["#### 1 ", "The: 2", "so it is #### 3000", "4"]
    wanted = {"exact_match": 0.25, "normalized_match": 0.75, "extracted_match": 0.5}
    assert scores(answers, references, GSM8K) == wanted


def test_an_answer_that_cannot_be_extracted_from_is_wrong_and_a_reference_is_an_error() -> None:
    assert scores(["12"], ["#### 12"], GSM8K)["extracted_match"] == 0
    with pytest.raises(InputError, match=re.escape("does not match the reference 'twelve'")):
        scores(["#### 12", "x"], ["#### 12", "twelve"], GSM8K)
    with pytest.raises(InputError, match="must have one group"):
        extracted("", "####")
    with pytest.raises(InputError, match="is no regular expression"):
        extracted("", "(")


def test_rouge_and_bleu_are_those_of_hand_counted_words() -> None:
    found = scores(["a b c d e"], ["a b x d e"], rouge=True, bleu=True)
    assert found["rouge1"] == pytest.approx(4 / 5)  # of 5 and 5 words, 4 agree
    assert found["rouge2"] == pytest.approx(2 / 4)
    assert found["rougeL"] == pytest.approx(4 / 5)
    same = scores(["one two three four five"], ["one two three four five"], rouge=True, bleu=True)
    assert [same[name] for name in ("rouge1", "rouge2", "rougeL", "bleu")] == pytest.approx([1.0] * 4)
    assert found["bleu"] < 0.5


def test_normalized_texts_have_no_case_punctuation_articles_or_space() -> None:
    assert normalized("The  quick, brown\tFox.") == normalized("quick brown fox") == "quick brown fox"
    assert normalized("theatre another") == "theatre another"
