"""The field's words, in the package and on the pages: one glossary, and entries of Args that stand alone.

Docstrings, comments and string literals of `lightning_sft/` and the text of the pages are searched for the phrases in
`BANNED`. Names (`normalised_match`, the argument `likeliest`), tags of HTML and the addresses of links are left out.
"""

import ast
import re
import tokenize
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CODE = sorted((ROOT / "lightning_sft").rglob("*.py"))
PAGES = sorted(
    [
        *(ROOT / "docs").rglob("*.md"),
        *(ROOT / "docs" / "notebooks").glob("*.py"),
        ROOT / "README.md",
        ROOT / "CHANGELOG.md",
    ]
)

STEMS = "initiali|maximi|minimi|normali|optimi|organi|penali|quanti|recogni|seriali|summari|synchroni|tokeni|utili"

BANNED = {
    r"\b(goes|go|gone|going|went) on\b": "resumes, continues",
    r"\bbit by bit\b": "bit for bit (bit by bit means gradually)",
    r"\b(let|lets|letting) go of\b": "frees, releases",
    r"\bno numbers?\b": "non-finite, NaN or infinite",
    r"\bonce more\b|\banew\b": "again, new",
    r"\bbe had\b": "available, supported",
    r"\bas there\b": "describe it here",
    r"\bkeeps? (\w+ ){0,3}company\b": "keeps collectives in step",
    r"\bin good order\b": "gracefully",
    r"\bmost tokens\b": "maximum number of tokens (most tokens are a majority)",
    r"\btold to end\b": "received SIGTERM, preempted",
    r"(?<!`)\blikeliest\b(?![`:])": "most likely",
    r"\bmatrix products?\b": "matmul",
    r"\bin 16 bits?\b": "in half precision",
    r"(?<![<./-])\bfigures?\b(?!>)": "metric, where it is logged; chart, where it is drawn; number",
    rf"\b\w*({STEMS})s(e|ed|es|er|ers|ing|ation|ations)\b": "-ize, as the API spells it",
    r"\b\w*(colour|neighbour|behaviour)\w*": "-or, as the API spells it",
}
"""Regular expression of a phrase that is not used, and what is said instead."""

DEPENDENT = {
    r"the same\b": "'The same'",
    r"as (?!many|much|long|well)": "'As'",
    r"of (?!\d)": "'Of'",
    r"(that|those) (of|with)\b": "'That of'",
    r"(what|which|whose|likewise|ditto)\W*$|(which|whose)[;.]": "a question word alone",
    r"(its?|theirs?|his|they|them|these|see)\b": "a pronoun or a reference",
    r"(by|for|with|from|to|at|on) (it|them|which|that)\b": "a preposition and a pronoun",
}
"""How an entry of Args begins that says nothing without the entry before it: `--help` prints entries one by one."""

UNIT = re.compile(r"\[.+\]|\b(bytes?|seconds?|tokens?|rows?|steps?|[KMG]iB|ranks?|devices?|path|logits|ids?)\b", re.I)


def code_text(path: Path) -> Iterator[tuple[int, str]]:
    """Line number and text of each line of comments and string literals of `path`, f-strings included."""
    kinds = {tokenize.COMMENT, tokenize.STRING, getattr(tokenize, "FSTRING_MIDDLE", tokenize.STRING)}
    with tokenize.open(path) as file:
        for token in tokenize.generate_tokens(file.readline):
            if token.type in kinds:
                for offset, line in enumerate(token.string.splitlines()):
                    yield token.start[0] + offset, line


def page_text(path: Path) -> Iterator[tuple[int, str]]:
    """Line number and text of each line of `path`, without addresses of links."""
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        yield number, re.sub(r"\]\([^)]*\)|https?://\S+", "]", line)


def found(lines: Iterable[tuple[int, str]]) -> Iterator[tuple[int, str, str]]:
    """Line number, phrase and what to say instead, for each banned phrase in `lines`, also across the end of a line."""
    numbered = list(lines)
    text = "\n".join(line.replace("\n", " ") for _, line in numbered)
    for pattern, instead in BANNED.items():
        for match in re.finditer(pattern.replace(" ", r"[ \n#]+"), text, re.I):
            yield numbered[text.count("\n", 0, match.start())][0], " ".join(match.group().split()), instead


def entries(path: Path) -> Iterator[tuple[int, str, str]]:
    """Line number, name and text of each entry under `Args:` in the docstrings of the public names of `path`."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) or node.name.startswith("_"):
            continue
        lines = (ast.get_docstring(node, clean=True) or "").splitlines()
        first = node.body[0].lineno
        entry: list[str] | None = None
        name, number = "", 0
        inside = False
        for offset, line in enumerate([*lines, ""]):
            head = re.fullmatch(r" {4}(\*{0,2}\w+)(?: \([^)]*\))?: ?(.*)", line) if inside else None
            if entry is not None and (head or not line.startswith(" " * 5)):
                yield number, name, " ".join(entry)
                entry = None
            if head:
                name, number, entry = head[1], first + offset, [head[2]]
            elif entry is not None:
                entry.append(line.strip())
            inside = line == "Args:" or (inside and (not line or line.startswith(" ")))


def dependent(text: str) -> str | None:
    """Why the entry `text` says nothing by itself, or `None` if it does say something."""
    for pattern, begins in DEPENDENT.items():
        if re.match(pattern, text, re.I):
            return f"begins with {begins}"
    if len(re.findall(r"\w+", text)) < 2 and not UNIT.search(text):
        return "is one word, without a unit"
    return None


def failures(path: Path, lines: Iterable[tuple[int, str]]) -> list[str]:
    name = path.relative_to(ROOT)
    return [f"{name}:{number}: {phrase!r}: say {instead}" for number, phrase, instead in sorted(found(lines))]


@pytest.mark.parametrize("path", CODE, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_package_speaks_in_the_words_of_the_field(path: Path) -> None:
    wrong = failures(path, code_text(path))
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_page_speaks_in_the_words_of_the_field(path: Path) -> None:
    wrong = failures(path, page_text(path))
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("path", CODE, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_entry_of_args_stands_alone(path: Path) -> None:
    name = path.relative_to(ROOT)
    wrong = [f"{name}:{n}: {arg}: {text!r} {why}" for n, arg, text in entries(path) if (why := dependent(text))]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    "said", ["a run goes\n on", "optimises", "Most tokens of", "is no number", "colours", "pre-tokenised"]
)
def test_a_phrase_of_the_glossary_is_found_also_across_lines(said: str) -> None:
    assert list(found(enumerate(said.splitlines(), 1)))


@pytest.mark.parametrize(
    "said", ["optimizer", "bit for bit", "`likeliest`", "normalised_match", "<figure>", "precise", "raise"]
)
def test_a_word_of_the_field_is_not_found(said: str) -> None:
    assert not list(found(enumerate([said], 1)))


@pytest.mark.parametrize(
    "text", ["The same, for validation.", "As there.", "What.", "Of the model.", "Its scale, times r.", "Loss."]
)
def test_an_entry_of_args_that_needs_its_neighbor_is_found(text: str) -> None:
    assert dependent(text)


@pytest.mark.parametrize(
    "text", ["Maximum number of tokens per sequence.", "States `[N, H]`.", "Seconds.", "As many as fit."]
)
def test_an_entry_of_args_that_stands_alone_is_not_found(text: str) -> None:
    assert dependent(text) is None
