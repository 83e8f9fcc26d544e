"""Six steps of adapters under each strategy, and the last three again from a checkpoint; run under torchrun too."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_sft.model.tuning.adapters import Lora
from tests.helpers.parallel import Case, Curve, steps
from tests.helpers.processes import torchrun

LORA = {"lora": Lora(r=4, alpha=64), "new_tokens": ["<|a|>"], "trained": ["*norm*"]}
BFLOAT16 = {**LORA, "lora": Lora(r=4, alpha=64, base_dtype="bfloat16")}  # held so under bf16-mixed alone
CASES = {
    "single": Case("single device", 1, 4, 30, model=LORA),
    "ddp": Case("`ddp`", model=LORA),
    "distributed": Case("`fsdp2`", model=LORA),
    "one_file": Case("`fsdp2`", layout={"save_distributed_checkpoint": False}, model=LORA),
    "deepspeed": Case("`deepspeed_stage_2`", limit=14, stage=2, model=LORA),
    "single_bfloat16": Case("single device", 1, 4, 30, model=BFLOAT16),
    "ddp_bfloat16": Case("`ddp`", model=BFLOAT16),
    "distributed_bfloat16": Case("`fsdp2`", model=BFLOAT16),
    **{f"ddp_{bits}": Case("`ddp`", model={**LORA, "quantize": bits}) for bits in ("4bit", "8bit")},
    **{
        f"single_{bits}": Case("single device", 1, 4, 30, model={**LORA, "quantize": bits}) for bits in ("4bit", "8bit")
    },
}


def run(pretrained: str, name: str, out: Path) -> None:
    """Losses and norms of all steps, the losses of the resumed ones, and the size of the checkpoint."""
    case, ckpt = CASES[name], out / name / "step=3.ckpt"

    def fit(**more: Any) -> Curve:
        saver = ModelCheckpoint(ckpt.parent, filename="{step}", every_n_train_steps=3, save_top_k=-1)
        if case.model is BFLOAT16:
            more |= {"precision": "bf16-mixed"}
        return steps(pretrained, case, callbacks=[saver], enable_checkpointing=True, max_steps=6, **more)

    done, resumed = fit(), fit(ckpt_path=ckpt)
    if int(os.environ.get("RANK", "0")) == 0:
        files = [ckpt] if ckpt.is_file() else [path for path in ckpt.rglob("*") if path.is_file()]
        size = sum(path.stat().st_size for path in files)
        (out / f"{name}.json").write_text(json.dumps([done.losses, done.norms, resumed.losses, size]))


def launch(names: list[str], pretrained: str, out: Path) -> None:
    """Run cases one after the other in two processes."""
    torchrun("tests.helpers.adapting", pretrained, str(out), *names)


if __name__ == "__main__":
    given, where, *chosen = sys.argv[1:]
    for one in chosen:
        run(given, one, Path(where))
