"""What becomes of the files of a folder: how many rows are used, which keys are ignored, and why rows are refused.

``python -m tests.real_files FOLDER`` prints the table of docs/reference/rows.md; FOLDER/README.md, if there is one,
names where each file comes from. The test that holds the table to be true needs the folder too: ``REAL_FILES``.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from lightning_sft.data.rows.messages import Reading
from lightning_sft.data.tokens.dataset import load_split
from lightning_sft.data.tokens.encode_rows import EncodingConfig
from lightning_sft.data.tokens.row_report import RowReport
from lightning_sft.io.words import counted
from lightning_sft.types import InputError
from tests.oracle.templates import of_trl
from tests.oracle.vocabularies import tokenizer_for

TEMPLATES = {"Qwen 2.5": "qwen2_5", "Qwen3": "qwen3", "Llama 3.1": "llama3_1"}
COLUMNS = {"gsm8k_train.jsonl": {"prompt": "question", "completion": "answer"}}
"""Settings of files whose keys are of no format."""


def table(folder: Path) -> str:
    """Each file with each template."""
    tokenizers = {name: tokenizer_for(of_trl()[template]) for name, template in TEMPLATES.items()}
    sources = _sources(folder)
    lines = [f"| file | {' | '.join(tokenizers)} | ignored, and refused |", f"|---|{'---|' * len(tokenizers)}---|"]
    for file in sorted(file for file in folder.iterdir() if file.suffix in (".json", ".jsonl")):
        found = {name: _outcome(file, tokenizer) for name, tokenizer in tokenizers.items()}
        said: dict[str, list[str]] = {}
        for name, (_, remarks) in found.items():
            for remark in remarks:
                said.setdefault(remark, []).append(name)
        words = (text + ("" if len(who) == len(found) else f" ({', '.join(who)})") for text, who in said.items())
        cells = (cell for cell, _ in found.values())
        lines.append(f"| {sources.get(file.name, file.name)} | {' | '.join(cells)} | {'; '.join(words)} |")
    return "\n".join(lines) + "\n"


def _outcome(file: Path, tokenizer: PreTrainedTokenizerBase) -> tuple[str, list[str]]:
    """Rows that are used, of how many, and in how many sequences; and what is said."""
    recipe = EncodingConfig(tokenizer, Reading(columns=COLUMNS.get(file.name, {})))
    try:
        split = load_split("train", file, recipe, invalid_rows="skip", num_workers=0)
    except InputError as error:
        return "refused", [_plain(str(error).splitlines()[-1], file)]
    account, sequences = split.account, len(split.examples)
    used = account.num_rows - len(account.refused)
    cell = f"{used:,} of {account.num_rows:,}" + (f", {sequences:,} sequences" if sequences != used else "")
    return cell, list(_said(account, file))


def _said(account: RowReport, file: Path) -> list[str]:
    reasons = Counter(_plain(reason, file) for reason in account.refused)
    ignored = ", ".join(f"`{key}`" for key in account.ignored)
    refused = [f"{counted(count, 'row')} refused: {text}" for text, count in reasons.most_common()]
    return [f"ignored: {ignored}", *refused] if ignored else refused


def _plain(text: str, file: Path) -> str:
    """The first sentence of a message without the place of the row and what the row says, as a cell of a table."""
    text = re.sub(rf"^\s*\S*{re.escape(file.name)}(:\d+)?: (turn \d+: )?", "", text)
    text = re.sub(r"render (['\"]).*?\1 of", "render a text of", text).partition(". ")[0]
    return text.replace("|", "\\|").rstrip(".!")


def _sources(folder: Path) -> dict[str, str]:
    """Where each file comes from: repository, commit and path, by its README."""
    readme = folder / "README.md"
    if not readme.is_file():
        return {}
    rows = (line.split("|") for line in readme.read_text(encoding="utf-8").splitlines() if line.startswith("| "))
    return {row[1].strip(): f"`{row[1].strip()}`, {row[-3].strip()}" for row in rows}  # the source is the last but one


if __name__ == "__main__":
    print(table(Path(sys.argv[1])), end="")
