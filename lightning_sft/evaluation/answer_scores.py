"""Agreement of answers with the references of a data set."""

from __future__ import annotations

import re
import string
from collections.abc import Iterable, Sequence

from lightning_sft.types import InputError

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def scores(
    answers: Sequence[str],
    references: Sequence[str],
    extract: str | None = None,
    rouge: bool = False,
    bleu: bool = False,
) -> dict[str, float]:
    r"""Scores between 0 and 1; higher is better.

    ====================  ==============================================================================================
    ``exact_match``       the share of answers that are the reference, but for space around them
    ``normalized_match``  the same for :func:`normalized` texts
    ``extracted_match``   the share whose :func:`extracted` part is that of the reference
    ``rouge1``            F-measure of words, of torchmetrics; ``rouge2`` of pairs of words
    ``rougeL``            F-measure of the longest common subsequence of words, of torchmetrics
    ``bleu``              BLEU of the corpus, of torchmetrics, with the tokenization of sacrebleu (13a)
    ====================  ==============================================================================================

    Args:
        answers: Answers of the model.
        references: Reference answers of the data set.
        extract: A regular expression with one group, as ``####\s*(\S+)``, for ``extracted_match``.
        rouge: Whether to compute ROUGE.
        bleu: Whether to compute BLEU.

    Raises:
        InputError: When the expression is none, has no group, or does not match every reference.

    >>> scores(["The cat.", "so #### 1,000"], ["cat", "#### 1000"], extract=r"(?:#### )?(\S+)$")
    {'exact_match': 0.0, 'normalized_match': 0.5, 'extracted_match': 1.0}
    """
    pairs = list(zip(answers, references, strict=True))
    found = {
        "exact_match": _share(answer.strip() == reference.strip() for answer, reference in pairs),
        "normalized_match": _share(normalized(answer) == normalized(reference) for answer, reference in pairs),
    }
    if extract is not None:
        wanted = extracted_from_all(references, extract)
        found["extracted_match"] = _share(extracted(a, extract) == w for a, w in zip(answers, wanted, strict=True))
    if rouge:
        from torchmetrics.functional.text import rouge_score

        keys = ("rouge1", "rouge2", "rougeL")
        values = rouge_score(list(answers), list(references), rouge_keys=keys)
        found |= {key: float(values[f"{key}_fmeasure"]) for key in keys}
    if bleu:
        from torchmetrics.functional.text import sacre_bleu_score

        found["bleu"] = float(sacre_bleu_score(list(answers), [[reference] for reference in references]))
    return found


def extracted_from_all(references: Sequence[str], pattern: str, sources: Sequence[str] = ()) -> list[str]:
    """The :func:`extracted` part of each reference.

    Args:
        references: Reference answers of the data set.
        pattern: Regular expression with one group.
        sources: Names of the references' rows, as ``file:line``, for the message.

    Raises:
        InputError: When the expression is none, has no group, or does not match every reference.
    """
    found = [extracted(reference, pattern) for reference in references]
    for number, (reference, part) in enumerate(zip(references, found, strict=True)):
        if part is None:
            where = f"{sources[number]}: " if sources else ""
            raise InputError(
                f"{where}extract={pattern!r} does not match the reference {reference[-80:]!r}. Give an expression that "
                r"matches every answer of the data set, as '####\s*(\S+)' for GSM8K."
            )
    return [part for part in found if part is not None]


def normalized(text: str) -> str:
    """In lower case, without punctuation and articles, with single spaces, as SQuAD compares answers.

    >>> normalized("  The Cat,  sat!")
    'cat sat'
    """
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def extracted(text: str, pattern: str) -> str | None:
    r"""What the group of an expression matches last in a text; commas within numbers, and a final stop, do not count.

    Raises:
        InputError: When the expression is none, or does not have one group.

    >>> extracted("3 * 400 = 1,200\n#### 1,200.", r"####\s*(\S+)")
    '1200'
    """
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise InputError(f"extract={pattern!r} is no regular expression: {error}.") from error
    if compiled.groups != 1:
        raise InputError(f"extract={pattern!r} must have one group, the part to compare, as '####\\s*(\\S+)'.")
    matches = compiled.findall(text)
    return re.sub(r"(?<=\d),(?=\d)", "", matches[-1]).strip().removesuffix(".") if matches else None


def _share(flags: Iterable[bool]) -> float:
    listed = list(flags)
    return sum(listed) / len(listed)
