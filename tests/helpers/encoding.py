"""A fit of one step that notes which rows it encodes, run under torchrun by test_encoding_once."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer

from lightning_sft import SFTDataModule, SFTModule
from lightning_sft.data.tokens import cache, encode_rows
from lightning_sft.training import checks
from tests.helpers.gradients import QUIET, ROWS


def main(pretrained: str, kind: str, folder: Path) -> None:
    """Fit on rows of a kind, and append the places of all rows that this process encodes to a file."""
    rank, encode_all = os.environ["RANK"], encode_rows.encode_all

    def noted(conversations: Any, *settings: Any) -> Any:
        with (folder / f"encoded-{rank}.txt").open("a") as file:
            file.writelines(f"{conversation.provenance}\n" for conversation in conversations)
        return encode_all(conversations, *settings)

    encode_rows.encode_all = noted
    cache._SMALL = 10**6 if kind == "small" else 0
    source: Any = ROWS
    if kind != "rows":
        source = str(folder / "rows.jsonl")
    own = folder / ("cache" if kind != "apart" else f"cache-{int(rank) // 2}")  # two machines of two processes
    checks.rank_zero_info = lambda text: (folder / f"said-{rank}.txt").write_text(text)
    data = SFTDataModule(train=source, cache=own, num_workers=0, tokens_per_batch=100)
    trainer = Trainer(accelerator="cpu", strategy="ddp", devices=int(os.environ["WORLD_SIZE"]), max_steps=1, **QUIET)
    trainer.fit(SFTModule(pretrained), data)
    found = [example.input_ids.tolist() for example in data.splits["train"].examples]
    (folder / f"examples-{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
