"""How the cost of preparing data grows: tokens a second of encoding against turns, their length and rows; memory
against the size of the file; and sequences a second of packing against their number and the capacity.

    python -m benchmarks.data_growth [--tokenizer FOLDER] [--quick] [--publish]

Rates are of CPU time in one process, so that what else a machine does matters little. Each point is a process of its
own. It writes data_growth.md and data_growth.png to build/bench, and with --publish docs/reference/benchmarks.md.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import multiprocessing
import random
import resource
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import ByteLevelBPETokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from benchmarks.environments import BUILD
from benchmarks.growth import PAGE, markdown
from benchmarks.plot import draw_growth
from benchmarks.table import write_page
from lightning_sft.data.batches.packing import pack
from lightning_sft.data.tokens.dataset import load_split
from lightning_sft.data.tokens.encode_rows import EncodingConfig
from lightning_sft.demos import CHATML

TOKENS = 4_000_000  # of a point, about, where rows do not grow
WORDS = 5000  # of the language that is written here


def language() -> list[str]:
    """The words that conversations are made of."""
    drawn = random.Random(0)
    return ["".join(drawn.choices("abcdefghijklmnopqrstuvwxyz", k=drawn.randint(2, 9))) for _ in range(WORDS)]


def trained_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer that has a token for most words, with ChatML."""
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator((f" {word}" for word in language() * 3), vocab_size=12_000, show_progress=False)
    marks = ["<|im_start|>", "<|im_end|>"]
    bpe.add_special_tokens(marks)
    return PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token=marks[1], chat_template=CHATML)


def rewriting(tokenizer: Any) -> Any:
    """The tokenizer with Qwen3's template, which writes earlier answers in another way: each is a sequence."""
    [package] = importlib.util.find_spec("trl").submodule_search_locations  # type: ignore[union-attr]  # it is installed
    other = copy.deepcopy(tokenizer)
    other.chat_template = (Path(package) / "chat_templates" / "qwen3.jinja").read_text(encoding="utf-8")
    return other


def write(path: Path, rows: int, turns: int, words: int) -> None:
    """Conversations of so many answers, each of so many words, and questions of half as many."""
    known, drawn = language(), random.Random(1)
    with path.open("w", encoding="utf-8") as file:
        for _ in range(rows):
            messages = []
            for _ in range(turns):
                messages.append({"role": "user", "content": " ".join(drawn.choices(known, k=max(1, words // 2)))})
                messages.append({"role": "assistant", "content": " ".join(drawn.choices(known, k=words))})
            file.write(json.dumps({"messages": messages}) + "\n")


def encoded(tokenizer: Any, folder: Path, rows: int, turns: int, words: int) -> tuple[float, float]:
    """Tokens a second of CPU time, and MB of memory at most, from the file to examples in the cache."""
    folder.mkdir(parents=True)
    path = folder / "rows.jsonl"
    write(path, rows, turns, words)
    settings = {"num_workers": 0, "cache": folder / "cache"}
    begin = time.process_time()
    split = load_split("train", path, EncodingConfig(tokenizer, max_length=1 << 30), **settings)
    seconds, tokens = time.process_time() - begin, int(split.lengths.sum())
    shutil.rmtree(folder)
    return tokens / seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def packed(count: int, capacity: int) -> tuple[float, float]:
    """Sequences a second of CPU time, and the share of positions that is filled; lengths are log-normal."""
    drawn = np.random.default_rng(0).lognormal(np.log(capacity / 16), 1.2, count)
    lengths = np.clip(drawn, 1, capacity).astype(int).tolist()
    begin = time.process_time()
    packs = pack(lengths, capacity)
    return count / (time.process_time() - begin), sum(lengths) / len(packs) / capacity


def apart(measure: Callable[..., tuple[float, float]], *arguments: Any) -> tuple[float, float]:
    """What a process of its own measures."""
    with multiprocessing.get_context("fork").Pool(1) as pool:
        return pool.apply(measure, arguments)


def curves(tokenizer: Any, folder: Path, quick: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each curve as it has been measured: its title, axes and points."""

    def rows_of(turns: int, words: int) -> int:
        return max(1, (TOKENS // 10 if quick else TOKENS) // (turns * words * 3 // 2))

    def curve(x: str, y: str, points: list[tuple[int, float]]) -> dict[str, Any]:
        return {"x": x, "y": y, "systems": {"ours": points}}

    def ends(places: list[int]) -> list[int]:
        return [places[0], places[2]] if quick else places

    rate = "tokens/s of encoding"
    found = [(n, apart(encoded, tokenizer, folder, rows_of(n, 60), n, 60)) for n in ends([1, 5, 20, 80, 320, 1280])]
    yield "turns (answers of 60 words)", curve("answers of a conversation", rate, [(n, both[0]) for n, both in found])
    found = [
        (n, apart(encoded, tokenizer, folder, rows_of(4, n), 4, n)) for n in ends([10, 100, 1000, 10_000, 100_000])
    ]
    yield "length (4 answers)", curve("words of an answer", rate, [(n, both[0]) for n, both in found])
    found = [(n, apart(encoded, tokenizer, folder, n, 2, 60)) for n in ends([1000, 4000, 16_000, 64_000])]
    yield "rows (2 answers of 60 words)", curve("rows", rate, [(n, both[0]) for n, both in found])
    memory = curve("rows", "MB of memory at most", [])
    for name, own in (("ours", tokenizer), ("with Qwen3's template", rewriting(tokenizer))):
        found = [(n, apart(encoded, own, folder, n, 40, 250)) for n in ends([15, 60, 240, 330, 960])]
        memory["systems"][name] = [(n, both[1]) for n, both in found]
    yield "rows of 40 answers of 250 words", memory
    rate = "sequences/s of packing"
    count = 20_000 if quick else 200_000
    found = [(n, apart(packed, count, n)) for n in ends([2048, 8192, 32_768, 131_072])]
    yield f"capacity ({count:,} sequences)", curve("tokens of a pack", rate, [(n, both[0]) for n, both in found])
    found = [(n, apart(packed, n, 2048)) for n in ends([10_000, 100_000, 1_000_000])]
    yield "sequences (packs of 2,048)", curve("sequences", rate, [(n, both[0]) for n, both in found])


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Measure the curves, and return them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokenizer", help="Hugging Face folder; by default one that is trained here")
    parser.add_argument("--quick", action="store_true", help="two points of each curve, of less data")
    parser.add_argument("--out", type=Path, default=BUILD)
    parser.add_argument("--publish", action="store_true", help="write the page and its picture")
    given = parser.parse_args(arguments)
    given.out.mkdir(parents=True, exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(given.tokenizer) if given.tokenizer else trained_tokenizer()
    found = dict(curves(tokenizer, given.out / "data_growth", given.quick))
    text = markdown(found)
    (given.out / "data_growth.md").write_text(text + "\n", encoding="utf-8")
    draw_growth(found, given.out / "data_growth.png")
    if given.publish:
        new = f"{text}\n\n![The curves](data_growth.png)"
        PAGE.write_text(write_page(PAGE.read_text(encoding="utf-8"), "data growth", new), encoding="utf-8")
        shutil.copy(given.out / "data_growth.png", PAGE.with_name("data_growth.png"))
    print(text)
    return found


if __name__ == "__main__":
    main()
