"""What is trained on: rows with the lengths of GSM8K's, or those of a file; short documents and long ones."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

from transformers import AutoTokenizer

from lightning_sft.demos import tiny_tokenizer

_WORDS = (
    "each every total number half twice three apples boxes hours dollars cents miles minutes days week bought sold "
    "gave left spent earned shares equal more fewer than how many much does she he they have and the of in to for so "
    "then is are 2 4 6 8 10 12 20 25 36 48 60 100 + - * / = per rate cost price time over sum"
)
_SHORT = ((60, 0.35), (100, 0.5))  # tokens of a prompt and of an answer: mean, standard deviation of the logarithm
_LONG = ((120, 0.35), (1850, 0.15))
_ROWS_OF_A_LONG_ONE = 12  # rows of a file that one long document is made of

Row = dict[str, str]


def generated(tokenizer: Any, num_rows: int, lengths: tuple[tuple[float, float], ...], seed: int = 0) -> Iterator[Row]:
    """Rows of random words whose lengths in tokens are log-normal.

    Args:
        tokenizer: Its tokens are counted.
        num_rows: How many rows.
        lengths: Of prompts and of completions: mean in tokens, and standard deviation of the logarithm.
        seed: Seed of the rows.
    """
    random, known = Random(seed), _WORDS.split()
    costs = {word: len(tokenizer(f" {word}", add_special_tokens=False)["input_ids"]) for word in known}
    for _ in range(num_rows):
        texts = []
        for mean, deviation in lengths:
            wanted, words = mean * random.lognormvariate(-(deviation**2) / 2, deviation), [random.choice(known)]
            tokens = costs[words[0]]
            while tokens < wanted:
                words.append(random.choice(known))
                tokens += costs[words[-1]]
            texts.append(" ".join(words))
        yield {"prompt": texts[0], "completion": texts[1]}


def of_file(path: Path, prompt: str, completion: str) -> list[Row]:
    """The rows of a JSONL file.

    Args:
        path: The file.
        prompt: Its column for the prompt.
        completion: Its column for the answer.
    """
    lines = path.read_text(encoding="utf-8").splitlines()
    return [{"prompt": row[prompt], "completion": row[completion]} for row in map(json.loads, lines)]


def joined(rows: list[Row], size: int = _ROWS_OF_A_LONG_ONE) -> list[Row]:
    """Long documents: the prompt of a row, and an answer made of several rows."""
    groups = [rows[i : i + size] for i in range(0, len(rows) - size + 1, size)]
    return [
        {"prompt": group[0]["prompt"], "completion": "\n\n".join(f"{r['prompt']}\n{r['completion']}" for r in group)}
        for group in groups
    ]


def write_rows(
    folder: Path, tokenizer: str, data: Path | None, prompt: str, completion: str, quick: bool
) -> dict[str, str]:
    """Write ``short.jsonl``, ``long.jsonl`` and ``val.jsonl`` and return their paths by name."""
    loaded = AutoTokenizer.from_pretrained(tokenizer)
    shrink = 8 if quick else 1  # a tiny model's packs are short, too
    scaled = [tuple((mean / shrink, deviation) for mean, deviation in lengths) for lengths in (_SHORT, _LONG)]
    short = of_file(data, prompt, completion) if data else list(generated(loaded, 3000 // shrink, scaled[0]))
    long = joined(short) if data else list(generated(loaded, 400 // shrink, scaled[1], seed=1))
    folder.mkdir(parents=True, exist_ok=True)
    paths = {}
    for name, rows in (("short", short), ("long", long), ("val", short[:64])):
        paths[name] = str(folder / f"{name}.jsonl")
        Path(paths[name]).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return paths


def write_tokenizer(folder: Path, given: Path | None, quick: bool = False) -> str:
    """The folder of the tokenizer: the one given, the demo model's where it has been fetched, else one of bytes.

    Args:
        folder: Where to write the one of bytes.
        given: What was asked for.
        quick: Whether models are tiny; the demo model's tokens are too many for these.
    """
    demo = Path("~/.cache/lightning-sft/SmolLM2-135M-Instruct").expanduser()
    for candidate in (given, None if quick else demo):
        if candidate is not None and (candidate / "tokenizer.json").exists():
            return str(candidate.resolve())
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)
