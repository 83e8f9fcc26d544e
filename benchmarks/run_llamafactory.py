"""LLaMA-Factory's data path, in its own environment: one task, told by the JSON of the first argument.

encode       each row as it is given to its trainer, or the error that it raises
"""

from __future__ import annotations

import json
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import datasets

# It reads sound with torchaudio, whose wheels need CUDA's libraries: an empty module is enough for texts.
sys.modules["torchaudio"] = ModuleType("torchaudio")
sys.modules["torchaudio"].__spec__ = ModuleSpec("torchaudio", None)

from llamafactory.data import get_dataset, get_template_and_fix_tokenizer  # noqa: E402 - after its torchaudio
from llamafactory.hparams import get_train_args  # noqa: E402
from llamafactory.model import load_tokenizer  # noqa: E402

from benchmarks.record import Record, each_or_error, rows_of, settings  # noqa: E402

_ROLES = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
_ROLES |= {"observation_tag": "tool", "system_tag": "system"}
_INFO: dict[str, dict[str, Any]] = {  # as its data/README.md says
    "alpaca": {},
    "prompt_completion": {"columns": {"prompt": "prompt", "response": "completion"}},
    "sharegpt": {"formatting": "sharegpt"},
    "messages": {"formatting": "sharegpt", "columns": {"messages": "messages"}, "tags": _ROLES},
    "tools": {"formatting": "openai", "columns": {"messages": "messages", "tools": "tools"}, "tags": _ROLES},
}


def encode(given: SimpleNamespace) -> None:
    """Each row's token ids and labels, out of its own data set."""
    folder = Path(given.folder)
    folder.mkdir(parents=True, exist_ok=True)

    def encoded(rows: list[dict[str, Any]]) -> list[Any]:
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        info = {"rows": {"file_name": "rows.jsonl", **_INFO[given.dialect]}}
        (folder / "dataset_info.json").write_text(json.dumps(info), encoding="utf-8")
        arguments = {"model_name_or_path": given.model, "stage": "sft", "do_train": True, "finetuning_type": "full"}
        arguments |= {"dataset": "rows", "dataset_dir": str(folder), "template": given.prompt_style}
        arguments |= {"output_dir": str(folder / "out"), "overwrite_cache": True, "cutoff_len": 1 << 20}
        arguments |= {"report_to": "none", "use_cpu": True}
        model, data, training, _, _ = get_train_args(arguments)
        module = load_tokenizer(model)
        template = get_template_and_fix_tokenizer(module["tokenizer"], data)
        found = get_dataset(template, model, data, training, stage="sft", **module)["train_dataset"]
        return [[{key: list(row[key]) for key in ("input_ids", "labels")}] for row in found]

    Record(given.out).write(rows=each_or_error(encoded, rows_of(given.rows)))


if __name__ == "__main__":
    datasets.disable_caching()
    datasets.disable_progress_bars()
    chosen = settings()
    {"encode": encode}[chosen.task](chosen)
