"""Runs of drawn settings that are killed and told to end at drawn places, and resumed.

python -m tests.fuzzing FOLDER FIRST_SEED RESUMES

prints a line for each run, and at last how many resumes there were and the seeds of those that differ.
"""

from __future__ import annotations

import json
import random
import shutil
import sys
from functools import partial
from pathlib import Path
from typing import Any

from torch.optim import SGD, AdamW, Muon

from lightning_sft.demos import tiny_pretrained
from lightning_sft.model.tuning.adapters import Lora
from lightning_sft.training.optimizers import OptimizerPart
from tests.helpers.resuming import MIXTURE, STREAM, Run, drawn, killed
from tests.training.test_optimizers import Estimating, ScheduleFree

OPTIMIZERS: list[dict[str, Any]] = [
    {},
    {"optimizer": partial(SGD, lr=0.1, momentum=0.9), "schedule": "wsd"},
    {"optimizer": partial(AdamW, lr=1e-2, amsgrad=True), "schedule": "linear"},
    {"optimizer": Estimating},
    {"optimizer": ScheduleFree, "schedule": "constant"},
]
PARTS = {
    "optimizers": [OptimizerPart(partial(Muon, lr=1e-2), ["*_proj.weight"]), OptimizerPart(partial(AdamW, lr=1e-2))]
}
ADAPTERS: list[dict[str, Any]] = [
    {},
    {"lora": Lora(r=2, dropout=0.1)},
    {"neftune_alpha": 5.0},
    {"frozen": ["*.layers.0.*"]},
]


def drawn_run(seed: int) -> Run:
    """A run of some ten to thirty optimizer steps; the same for the same seed."""
    of = random.Random(seed)
    data = of.choice([{}, {}, {"packing": "padded"}, {"train": MIXTURE}, {**STREAM, "num_workers": 0}])
    trainer: dict[str, Any] = {
        "max_epochs": of.choice([2, 3]),
        "accumulate_grad_batches": of.choice([1, 2, 3]),
        "limit_train_batches": of.choice([1.0, 0.5, 0.8, 3, 4, 5, 7]),
        "gradient_clip_val": of.choice([None, 1.0]),
    }
    if "streaming" in data:
        trainer |= {"max_steps": of.choice([7, 12]), "limit_train_batches": of.choice([1.0, 3, 5])}  # no fractions
    if of.random() < 0.25:
        data = {**data, "val": None}
    else:
        trainer |= {"check_val_every_n_epoch": of.choice([1, 1, 2])}
        if of.random() < 0.5:  # counted in micro-batches, and not beyond an epoch
            trainer |= {"val_check_interval": of.choice([1, 2, 3]), "limit_val_batches": of.choice([1, 0.5, 1.0])}
    model = {**of.choice(ADAPTERS), **of.choice(OPTIMIZERS)}
    if "lora" not in model and of.random() < 0.2:
        model = {**{name: value for name, value in model.items() if name != "optimizer"}, **PARTS}
    ranks = 2 if of.random() < 0.15 else 1
    patience = of.choice([0, 0, 1, 2]) if data.get("val", True) else 0
    return Run(data, trainer, ranks, of.randint(1, 5), model, patience=patience)


def fuzz(root: Path, first: int, wanted: int) -> dict[str, Any]:
    """Draw runs until there were so many resumes; says which seeds differ from runs that were never interrupted."""
    pretrained = tiny_pretrained(root / "model", attention_dropout=0.3)
    seed, resumes, differ = first, 0, dict[int, Any]()
    while resumes < wanted:
        stops = drawn(random.Random(f"stops {seed}"), 4, 2.0)
        try:
            found = killed(str(seed), pretrained, root, stops, drawn_run(seed))
        except Exception as error:
            found = {"kills": 0, "differ": f"{type(error).__name__}: {error}"}
        resumes += found["kills"]
        if found["differ"]:
            differ[seed] = found["differ"]
        print(json.dumps({"seed": seed, **found}), file=sys.stderr, flush=True)
        shutil.rmtree(root / str(seed))
        seed += 1
    return {"runs": seed - first, "resumes": resumes, "differ": differ}


if __name__ == "__main__":
    folder, seed_, count = sys.argv[1:]
    print(json.dumps(fuzz(Path(folder), int(seed_), int(count))))
