"""Steps of Muon and AdamW together under each strategy, and again from a checkpoint; run under torchrun too."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.distributed.tensor import DTensor
from torch.optim import AdamW, Muon

from lightning_sft.training.optimizers import OptimizerPart
from tests.helpers.parallel import Case, steps

PARTS = [OptimizerPart(partial(Muon, lr=1e-2), ["*_proj.weight"]), OptimizerPart(partial(AdamW, lr=1e-3))]
OWN = {"optimizers": PARTS}
CASES = {
    "single": Case("single device", 1, 4, 30, model=OWN),
    "ddp": Case("`ddp`", model=OWN),
    "fsdp2": Case("`fsdp2`", model=OWN),
}


class Weights(Callback):
    """A digest of the weights at the end."""

    digest = ""

    def on_train_end(self, trainer: Any, module: Any) -> None:
        digest = hashlib.sha256()
        for weight in module.parameters():
            whole = weight.full_tensor() if isinstance(weight, DTensor) else weight
            digest.update(whole.detach().numpy().tobytes())
        self.digest = digest.hexdigest()


def run(pretrained: str, name: str, out: Path) -> None:
    """The losses of six steps and the weights after them, and those of the last three again from a checkpoint."""
    case, ckpt = CASES[name], out / name / "step=3.ckpt"
    saver = partial(ModelCheckpoint, ckpt.parent, filename="{step}", every_n_train_steps=3, save_top_k=-1)
    settings = {"max_steps": 6, "enable_checkpointing": True}
    weights = Weights(), Weights()
    whole = steps(pretrained, case, callbacks=[saver(), weights[0]], **settings)
    resumed = steps(pretrained, case, ckpt_path=ckpt, callbacks=[saver(), weights[1]], **settings)
    if int(os.environ.get("RANK", "0")) == 0:
        (out / f"{name}.json").write_text(json.dumps([whole.losses, resumed.losses, *(one.digest for one in weights)]))


if __name__ == "__main__":
    given, where, *chosen = sys.argv[1:]
    for one in chosen:
        run(given, one, Path(where))
