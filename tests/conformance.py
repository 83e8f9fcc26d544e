"""Published chat templates × kinds of conversations: exact and by which mechanism, or refused and why.

``python -m tests.conformance > docs/reference/conformance.md`` writes the page; test_conformance holds it to be true.
What is exact, :mod:`tests.oracle` finds out without our code. The part on further templates needs the folder that
``CHAT_TEMPLATES`` names (tests/oracle/SOURCES.md); without it, that part of the page stays as it is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from lightning_sft.types import Conversation
from tests.oracle import kinds, prompts
from tests.oracle.inference import Clock as FrozenClock
from tests.oracle.kinds import answer, user
from tests.oracle.outcomes import MECHANISMS, Case, Outcome
from tests.oracle.possible import REASONS
from tests.oracle.templates import of_trl as templates
from tests.oracle.templates import published
from tests.oracle.vocabularies import tokenizer_for

__all__ = ["CONVERSATIONS", "TOOLS", "FrozenClock", "answer", "conversation", "templates", "tokenizer_for", "user"]

PAGE = Path(__file__).parents[1] / "docs" / "reference" / "conformance.md"
OTHERS = "\n## Turns that no model generates\n"
FURTHER = "\n## Further templates\n"
GROUPS = {
    "Texts": tuple(kind for kind in kinds.TEXTS if "thought" not in kind),
    "Thoughts": (*(kind for kind in kinds.TEXTS if "thought" in kind), *kinds.VARIABLES),
    "Tools": tuple(kinds.CALLS),
    "Control tokens and weights": tuple(kinds.SPECIAL),
}
VOCABULARY_NAMES = {
    "bytes": "byte-level",
    "markers": "byte-level, turn markers not special",
    "metaspace": "SentencePiece, blank before the first word",
    "metaspace_always": "SentencePiece, blank after each control token",
    "legacy": "SentencePiece by a normalizer, control tokens that take blanks",
}

TOOLS = [kinds.WEATHER]
CONVERSATIONS: dict[str, list[Any]] = {
    **{
        kind: list(kinds.TEXTS[kind])
        for kind in ("plain", "system", "turns", "thought", "thoughts", "twice", "unicode")
    },
    **{kind: list(kinds.TEXTS[kind]) for kind in ("space", "echo", "empty")},
    **{kind: list(kinds.CALLS[kind][0]) for kind in ("call", "tool")},
    "forged": [],
}
"""A few kinds, for tests that go through them all."""


def conversation(name: str, tokenizer: PreTrainedTokenizerFast) -> Conversation:
    """A conversation of one of those few kinds."""
    return kinds.conversation("forged by user" if name == "forged" else name, tokenizer)


def outcomes(sources: Mapping[str, str], vocabulary: str = "bytes") -> dict[str, dict[str, Outcome]]:
    """Template -> kind -> what becomes of it."""
    cases = {name: Case(template, vocabulary) for name, template in sources.items()}
    return {name: {kind: case.outcome(kind) for kind in kinds.NAMES} for name, case in cases.items()}


def totals(found: Iterable[Outcome]) -> str:
    """The cells of a row on some outcomes."""
    counts = Counter((outcome.of, outcome.cell[0] == "=") for outcome in found)
    legitimate, needless = counts["refused", False], counts["needless", False]
    numbers = counts["exact", True], counts["exact", False], needless, counts["wrong", False], legitimate
    return " | ".join(f"{number:,}" for number in numbers)


HEAD = "| in one sequence | in several | refused, though possible | wrong | impossible |"

PREFACE = f"""# Chat templates, tested

Written by `python -m tests.conformance`; `tests/data/tokens/test_conformance.py` holds it to be true. Vendors'
templates, as trl 1.16 carries them, by {len(kinds.NAMES)} kinds of conversations (`tests/oracle/kinds.py`).
Whether a training sequence is exact, an oracle says that knows nothing of the code that makes it (`tests/oracle`):
each answer has the context that inference gives it, token for token, all that the row says, its stop token, and
nothing else.

{HEAD}
|---|---|---|---|---|
| {{}} |

`=` is exact in one sequence, `+2` in two, since the template renders earlier turns differently later. Letters behind it
name what made it exact:
"""
BETWEEN = """A capital letter says why nobody could train it exactly with this template, and `?` that it is refused
though one could:"""
OTHERS_PREFACE = f"""`data.train_on: prompts`, and a weight on a turn of the user, the system or a tool, by the same
templates and {len(prompts.KINDS)} kinds of conversations. Exact is a turn whose ids are those that the next answer
is given, with all of its text, and besides it no character of another turn, no stop of an answer, and nothing that the
template says of its own but a header and what closes the turn (`tests/oracle/prompts.py`). Impossible is what the
template drops, changes or raises an error on.

| trained | exact | refused, though possible | wrong | impossible |
|---|---|---|---|---|"""
FURTHER_PREFACE = f"""Templates that other projects publish (`tests/oracle/SOURCES.md` says where they come from),
and all kinds of tokenizers. These numbers are of the day on which the page was written: the tests have trl's
templates alone.

| templates | tokenizer {HEAD}
|---|---|---|---|---|---|---|"""


def matrix(found: Mapping[str, Mapping[str, Outcome]]) -> str:
    """The part of the page on trl's templates, by their outcomes with a tokenizer that is byte-level."""
    rows = []
    for title, names in GROUPS.items():
        rows += ["", f"## {title}", "", f"| {' | '.join(['template', *names])} |", "|---" * (len(names) + 1) + "|"]
        rows += [f"| {stem} | {' | '.join(own[name].cell for name in names)} |" for stem, own in found.items()]
    mechanisms = [f"- `{letter}` {meaning}" for letter, (_, meaning) in MECHANISMS.items()]
    reasons = [f"- `{letter.upper()}` {meaning}" for letter, meaning in REASONS.items()]
    everything = [outcome for own in found.values() for outcome in own.values()]
    return "\n".join([PREFACE.format(totals(everything)), *mechanisms, "", BETWEEN, "", *reasons, *rows, ""])


def others() -> str:
    """The part of the page on turns that no model generates."""
    counts: Counter[tuple[bool, str]] = Counter()
    for template in templates().values():
        case = Case(template)
        for kind in prompts.KINDS:
            counts.update((what == "prompts", found.of) for what, found in prompts.outcomes(case, kind))
    rows = []
    for is_all, words in ((False, "one turn by itself, answers with the weight 0"), (True, "all turns together")):
        numbers = (f"{counts[is_all, of]:,}" for of in ("exact", "needless", "wrong", "refused"))
        rows.append(f"| {words} | {' | '.join(numbers)} |")
    return "\n".join([OTHERS, OTHERS_PREFACE, *rows, ""])


def further() -> str:
    """The part of the page on all tokenizers and on further templates."""
    rows = []
    for vocabulary, words in VOCABULARY_NAMES.items():
        own = [outcome for found in outcomes(templates(), vocabulary).values() for outcome in found.values()]
        rows.append(f"| trl 1.16, {len(templates())} | {words} | {totals(own)} |")
    found = outcomes(published())
    own = [outcome for kinds_of in found.values() for outcome in kinds_of.values()]
    rows.append(f"| others, {len(found)} | {VOCABULARY_NAMES['bytes']} | {totals(own)} |")
    each = [f"| {stem} | {totals(kinds_of.values())} |" for stem, kinds_of in sorted(found.items())]
    tables = [*rows, "", "The others, by template:", "", f"| template {HEAD}", "|---|---|---|---|---|---|", *each]
    return "\n".join([FURTHER, FURTHER_PREFACE, *tables, ""])


if __name__ == "__main__":
    kept = PAGE.read_text(encoding="utf-8").partition(FURTHER) if PAGE.exists() else ("", "", "")
    print(matrix(outcomes(templates())), end="")
    print(others(), end="")
    print(further() if published() else "".join(kept[1:]), end="")
