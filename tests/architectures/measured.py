"""What a fit of one architecture does, beside plain transformers on each document alone.

python -m tests.architectures.measured MODEL_TYPE FOLDER              all that one process shows, to FOLDER/alone.json
python -m tests.architectures.measured MODEL_TYPE FOLDER ddp fsdp2    a step of two processes, to FOLDER/together.json
"""

from __future__ import annotations

import json
import math
import random
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import transformers
from lightning.pytorch import Callback, Trainer
from torch import Tensor, nn
from torch.optim import SGD
from transformers import PreTrainedModel
from transformers.integrations import moe

from lightning_sft import SFTDataModule, SFTModule
from lightning_sft.export.convert import export_checkpoint
from lightning_sft.model.backbone import language_model
from lightning_sft.model.tuning.adapters import Lora, inject
from lightning_sft.strategies import FSDP2Strategy
from lightning_sft.types import InputError
from tests.architectures.configs import auto_class, save
from tests.helpers.gradients import QUIET

Parameters = dict[str, Tensor]
EXACT = 1e-9  # largest relative error in float64; a leak between documents or a wrong factor is above 1e-3
LENGTHS = (23, 9, 40, 14, 31, 5)  # three packs of 48 tokens
LORA = {"r": 2, "alpha": 8}
LARGE = 1e3  # learning rate of a step that the rounding of parameters does not hide


@contextmanager
def in_float64() -> Iterator[None]:
    """Compute in float64 also where a model asks for float32 by name, as norms, softmaxes and positions do."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with (
            patch.multiple(torch, float32=torch.float64, float=torch.float64),
            patch.object(torch.Tensor, "float", torch.Tensor.double),
            patch.object(moe, "_can_use_grouped_mm", return_value=False),  # torch's has no float64
        ):
            yield
    finally:
        torch.set_default_dtype(before)


def documents() -> list[dict[str, list[int]]]:
    """Rows of random tokens, two thirds of which are targets."""
    draw = random.Random(0)
    rows = [[draw.randrange(256) for _ in range(length)] for length in LENGTHS]
    return [
        {"input_ids": ids, "labels": [i if draw.random() < 2 / 3 else -100 for i in ids[:-1]] + ids[-1:]}
        for ids in rows
    ]


@dataclass
class Seen(Callback):
    """The trained parameters before each step, their gradients, and the parameters at the end."""

    before: list[Parameters] = field(default_factory=list)
    gradients: list[Parameters] = field(default_factory=list)
    after: Parameters = field(default_factory=dict)

    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
        self.before.append(trained(module.model))
        self.gradients.append(gradient(module.model))

    def on_train_end(self, trainer: Any, module: Any) -> None:
        self.after = trained(module.model)


def trained(model: nn.Module) -> Parameters:
    """A copy of each trained parameter, unsharded."""
    return {name: whole(p) for name, p in model.named_parameters() if p.requires_grad}


def gradient(model: nn.Module) -> Parameters:
    """A copy of the gradient of each trained parameter, unsharded; zeros where it has none."""
    wanted = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    return {name: whole(torch.zeros_like(p) if p.grad is None else p.grad) for name, p in wanted}


def whole(tensor: Any) -> Tensor:
    unsharded: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return unsharded.detach().clone()


def fit(
    pretrained: str, model: Mapping[str, Any] | None = None, lr: float = 0.1, **settings: Any
) -> tuple[Seen, Trainer]:
    """Steps of SGD, each on all documents."""
    seen = Seen()
    optimizer = partial(SGD, lr=lr)
    module = SFTModule(pretrained, optimizer=optimizer, schedule="constant", warmup=0.0, **(model or {}))
    defaults = {"accelerator": "cpu", "devices": 1, "max_epochs": 1, "accumulate_grad_batches": len(LENGTHS)}
    trainer = Trainer(**QUIET | defaults | settings, callbacks=[seen])
    trainer.fit(module, SFTDataModule(train=documents(), tokens_per_batch=48, cache=None))
    assert len(seen.gradients) == trainer.max_epochs, "an epoch is one step"
    return seen, trainer


def plain(pretrained: str | Path) -> PreTrainedModel:
    """The model as a user of transformers loads it."""
    model: PreTrainedModel = auto_class(pretrained).from_pretrained(pretrained, dtype="auto")
    return model


def reference(model: PreTrainedModel) -> Parameters:
    """∇ of −Σ log Pr(t) / Z in plain transformers: the full logits of each document alone, a loop over the formula."""
    rows = documents()
    total = sum(label != -100 for row in rows for label in row["labels"][1:])
    model.train()
    for row in rows:
        logits = language_model(model)(input_ids=torch.tensor([row["input_ids"]]), use_cache=False).logits[0]
        log_probs = logits.log_softmax(-1)
        targets = [(i, label) for i, label in enumerate(row["labels"]) if label != -100 and i]
        (-sum(log_probs[i - 1, label] for i, label in targets) / total).backward()
    return gradient(model)


def error(found: Parameters, wanted: Parameters) -> float:
    """Largest error of a parameter relative to its largest entry, or to a 10,000th of the largest entry of all."""
    assert found.keys() == wanted.keys(), sorted(found.keys() ^ wanted.keys())[:3]
    least = 1e-4 * max(float(tensor.abs().max()) for tensor in wanted.values())
    errors = [float((found[name] - x).abs().max()) / max(float(x.abs().max()), least) for name, x in wanted.items()]
    return math.nan if any(map(math.isnan, errors)) else max(errors)


@torch.no_grad()
def logits(model: PreTrainedModel) -> Parameters:
    """The logits of each document alone."""
    model = language_model(model.eval())
    rows = [torch.tensor([row["input_ids"]]) for row in documents()]
    return {f"document {i}": model(input_ids=ids, use_cache=False).logits for i, ids in enumerate(rows)}


def rated(value: float, most: float = EXACT) -> str:
    """An error as a cell of the table."""
    return f"{'exact' if value <= most else 'wrong'} {value:.0e}"


@dataclass
class Alone:
    """All that one process shows of an architecture, column by column."""

    model_type: str
    folder: Path
    cells: dict[str, str] = field(default_factory=dict)

    def run(self) -> None:
        """Measure all columns; what one raises is its outcome."""
        self.pretrained = save(self.model_type, self.folder / "model", torch.float64)
        self.in_float32 = save(self.model_type, self.folder / "in_float32", torch.float32)
        self._column("loads", self.loads)
        if self.cells["loads"] == "yes":
            for name in ("gradient", "checkpointing", "LoRA", "export"):
                self._column(name, getattr(self, name.lower()))

    def _column(self, name: str, measure: Callable[[], str]) -> None:
        try:
            self.cells[name] = measure()
        except Exception as raised:
            self.cells[name] = told(raised, self.folder)
        write(self.folder / "alone.json", self.cells)

    def loads(self) -> str:
        module = SFTModule(self.pretrained)
        module.configure_model()
        assert module.attention is not None
        name, reason = module.attention.name, module.attention.why.partition("because ")[2]
        self.cells |= {"packs": "yes" if module.isolates_documents else f"one document a row: {reason}"}
        self.cells |= {"attention": f"`{name}`"}
        return "yes"

    def gradient(self) -> str:
        with in_float64():
            self.step, _ = fit(self.pretrained, lr=LARGE)
            model = plain(self.pretrained)
            for name, parameter in model.named_parameters():  # a vision tower is not trained
                parameter.requires_grad_(name in self.step.after)
            wanted = reference(model)
        torch.save([self.step.before[0], self.step.after], self.folder / "step.pt")
        return rated(error(self.step.gradients[0], wanted))

    def checkpointing(self) -> str:
        with in_float64():
            seen, _ = fit(self.pretrained, {"gradient_checkpointing": True})
        return rated(error(seen.gradients[0], self.step.gradients[0]))

    def lora(self) -> str:
        """The second step, since the gradient of one half is zero at first; then a merged model, in float32."""
        with in_float64():
            seen, _ = fit(self.pretrained, {"lora": LORA}, max_epochs=2)
            model = plain(self.pretrained)
            inject(model, Lora(**LORA))
            model.load_state_dict(seen.before[1], strict=False)
            cell = rated(error(seen.gradients[1], reference(model)))
        _, trainer = fit(self.in_float32, {"lora": LORA}, max_epochs=2)
        off = error(logits(plain(exported(trainer, self.folder / "merged"))), logits(trainer.lightning_module.model))
        return cell if off <= 1e-5 else f"wrong: logits of the merged model {off:.0e}"

    def export(self) -> str:
        """Every weight after a step in float32, bit for bit, and the logits."""
        _, trainer = fit(self.in_float32)
        model = trainer.lightning_module.model
        again = plain(exported(trainer, self.folder / "exported"))
        ours, theirs = model.state_dict(), again.state_dict()
        unequal = ours.keys() ^ theirs.keys() or [
            name for name in ours if ours[name].dtype != theirs[name].dtype or not torch.equal(ours[name], theirs[name])
        ]
        if unequal:
            return f"wrong: {len(unequal)} tensors differ, such as {min(unequal)}"
        off = error(logits(again), logits(model))
        return "bit-equal" if off <= 1e-5 else f"wrong: logits {off:.0e}"


def exported(trainer: Trainer, folder: Path) -> Path:
    trainer.save_checkpoint(folder.with_suffix(".ckpt"))
    return export_checkpoint(folder.with_suffix(".ckpt"), folder)


def together(strategies: list[str], folder: Path) -> None:
    """Compare the parameters after a step of two processes with those after the step of one."""
    before, after = torch.load(folder / "step.pt")
    plain(folder / "model")  # its module is imported outside of in_float64, as in the other process
    cells: dict[str, str] = {}
    for name in strategies:
        strategy: Any = "ddp" if name == "ddp" else FSDP2Strategy()
        try:
            with in_float64():
                seen, trainer = fit(str(folder / "model"), lr=LARGE, devices=2, strategy=strategy)
            assert trainer.world_size == 2
            two, one = ({name: before[name] - end[name] for name in before} for end in (seen.after, after))
            cells[name] = rated(error(two, one))
        except InputError as refused:
            cells[name] = told(refused, folder)
        write(folder / "together.json", cells)  # the same of both processes


def told(raised: Exception, folder: Path) -> str:
    """What an exception says, as a cell."""
    said = " ".join(str(raised).replace(f"{folder}/", "").split()).replace("|", r"\|")
    if isinstance(raised, InputError):
        return f"refused: {said}"
    return f"fails: {type(raised).__name__}: {said[:200]}"


def write(path: Path, cells: dict[str, str]) -> None:
    path.write_text(json.dumps(cells), encoding="utf-8")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    given, where, *strategies = sys.argv[1:]
    if strategies:
        together(strategies, Path(where))
    else:
        Alone(given, Path(where)).run()
