"""Published chat templates: exact as the oracle has it, or refused for a reason that it has too."""

from __future__ import annotations

import os
from collections import Counter

import pytest

from tests.conformance import FURTHER, PAGE, matrix, others, outcomes, templates
from tests.conformance import OTHERS as OTHER_TURNS
from tests.helpers.pages import tables
from tests.oracle.kinds import NAMES
from tests.oracle.outcomes import Case
from tests.oracle.templates import published
from tests.oracle.vocabularies import KINDS as VOCABULARIES

OTHERS = [vocabulary for vocabulary in VOCABULARIES if vocabulary != "bytes"]
FEW = ("plain", "turns", "calls", "thoughts", "same thought", "forged by answer", "empty and more", "code")


def test_a_third_of_the_pairs_is_what_the_page_says() -> None:
    """Of each template and of each kind; all of them are a slow test."""
    written = PAGE.read_text(encoding="utf-8").partition(OTHER_TURNS)[0]
    cells = {
        (row[0], kind): cell
        for head, *rows in tables(written)
        if head[0] == "template"
        for row in rows
        for kind, cell in zip(head[1:], row[1:], strict=True)
    }
    names = list(templates())
    chosen = [(n, kind) for i, n in enumerate(names) for j, kind in enumerate(NAMES) if (i + j) % 3 == 0]
    cases = {name: Case(template) for name, template in templates().items()}
    found = {(name, kind): cases[name].outcome(kind) for name, kind in chosen}
    assert {place: outcome.said for place, outcome in found.items() if outcome.of == "wrong"} == {}
    assert {place: outcome.cell for place, outcome in found.items()} == {place: cells[place] for place in chosen}


@pytest.mark.slow
def test_nothing_is_wrong_little_is_refused_needlessly_and_the_page_says_so() -> None:
    found = outcomes(templates())
    everything = {(name, kind): outcome for name, own in found.items() for kind, outcome in own.items()}
    assert {place: outcome.said for place, outcome in everything.items() if outcome.of == "wrong"} == {}
    counts = Counter(outcome.of for outcome in everything.values())
    assert counts["needless"] <= 0.1 * (counts["needless"] + counts["exact"])
    written = PAGE.read_text(encoding="utf-8").partition(OTHER_TURNS)[0]
    assert written == matrix(found), "run: python -m tests.conformance > docs/reference/conformance.md"


@pytest.mark.slow
def test_the_page_says_what_becomes_of_turns_that_no_model_generates() -> None:
    written = PAGE.read_text(encoding="utf-8").partition(FURTHER)[0]
    assert written.endswith(others()), "run: python -m tests.conformance > docs/reference/conformance.md"


@pytest.mark.parametrize("vocabulary", OTHERS)
@pytest.mark.parametrize("name", templates())
def test_a_few_kinds_are_exact_or_refused_with_other_tokenizers(name: str, vocabulary: str) -> None:
    case = Case(templates()[name], vocabulary)
    assert {kind: found.said for kind in FEW if (found := case.outcome(kind)).of == "wrong"} == {}


@pytest.mark.slow
@pytest.mark.parametrize("vocabulary", OTHERS)
@pytest.mark.parametrize("name", templates())
def test_all_kinds_are_exact_or_refused_with_other_tokenizers(name: str, vocabulary: str) -> None:
    case = Case(templates()[name], vocabulary)
    assert {kind: found.said for kind in NAMES if (found := case.outcome(kind)).of == "wrong"} == {}


@pytest.mark.slow
@pytest.mark.skipif("CHAT_TEMPLATES" not in os.environ, reason="CHAT_TEMPLATES names no folder of further templates")
@pytest.mark.parametrize("vocabulary", VOCABULARIES)
@pytest.mark.parametrize("name", published())
def test_further_published_templates_are_exact_or_refused(name: str, vocabulary: str) -> None:
    case = Case(published()[name], vocabulary)
    assert {kind: found.said for kind in NAMES if (found := case.outcome(kind)).of == "wrong"} == {}
