"""Ten steps of a fit under each strategy, run under torchrun by test_strategies, and the table of what they show.

python -m tests.helpers.parallel    writes the table of docs/reference/strategies.md anew
"""

from __future__ import annotations

import json
import os
import re
import sys
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.optim import SGD
from transformers import AutoModelForCausalLM

from lightning_sft import SFTDataModule, SFTModule
from lightning_sft.demos import tiny_pretrained
from lightning_sft.export.convert import export_checkpoint
from lightning_sft.strategies import FSDP2Strategy
from tests.helpers.gradients import QUIET, ROWS
from tests.helpers.processes import ROOT, torchrun

PAGE = ROOT / "docs" / "reference" / "strategies.md"
TOLERANCE = 1e-5
TRAIN = [{**row, "prompt": f"{i} {row['prompt']}"} for i in range(4) for row in ROWS]


@dataclass(frozen=True)
class Case:
    """A strategy: its processes, micro-batches a step and an epoch, and how to name it to the trainer."""

    title: str
    processes: int = 2
    accumulate: int = 2
    limit: int = 15  # 30 micro-batches in all, so that the epoch's last step is short; DeepSpeed has no such steps
    sizes: tuple[int, int] = (2, 1)  # data-parallel, tensor-parallel
    stage: int = 0
    layout: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    reference: str = "single"

    @property
    def strategy(self) -> Any:
        if self.stage:
            from tests.helpers.deepspeed_cpu import DeepSpeedOnCPU

            return DeepSpeedOnCPU(self.stage)
        if self.title.startswith("`ddp"):
            return "ddp"
        return FSDP2Strategy(*self.sizes, **self.layout) if self.processes > 1 or self.layout else "auto"

    @property
    def settings(self) -> dict[str, Any]:
        return {
            "accumulate_grad_batches": self.accumulate,
            "limit_train_batches": self.limit,
            "devices": self.processes,
        }


CONTEXT: dict[str, Any] = {"context_parallel_size": 2}
LORA: dict[str, Any] = {"lora": {"r": 4, "dropout": 0.0}}
TILES: dict[str, Any] = {"gradient_checkpointing": True, "mlp_tile_size": 16}  # of up to 100 tokens
IN_4_BITS, IN_8_BITS = ({**LORA, "quantize": bits} for bits in ("4bit", "8bit"))
CASES = {
    "single": Case("single device", 1, 4, 30),
    "single_whole": Case("single device", 1, 4, 28, reference="single_whole"),
    "single_lora": Case("single device, `model.lora`", 1, 4, 30, model=LORA, reference="single_lora"),
    "single_4bit": Case("single device, `model.quantize: 4bit`", 1, 4, 30, model=IN_4_BITS, reference="single_4bit"),
    "single_8bit": Case("single device, `model.quantize: 8bit`", 1, 4, 30, model=IN_8_BITS, reference="single_8bit"),
    "ddp": Case("`ddp`"),
    "ddp_tiles": Case("`ddp`, `model.mlp_tile_size`", model=TILES),
    "ddp_lora": Case("`ddp`, `model.lora`", model=LORA, reference="single_lora"),
    "fsdp2": Case("`fsdp2`"),
    "fsdp2_lora": Case("`fsdp2`, `model.lora`", model=LORA, reference="single_lora"),
    "fsdp2_4bit": Case("`fsdp2`, `model.quantize: 4bit`", model=IN_4_BITS, reference="single_4bit"),
    "fsdp2_8bit": Case("`fsdp2`, `model.quantize: 8bit`", model=IN_8_BITS, reference="single_8bit"),
    "checkpointing": Case("`fsdp2`, `model.gradient_checkpointing`", model={"gradient_checkpointing": True}),
    "tiles": Case("`fsdp2`, `model.gradient_checkpointing`, `model.mlp_tile_size`", model=TILES),
    "offload": Case("`fsdp2`, `cpu_offload`", layout={"cpu_offload": True}),
    "offload_alone": Case("the same", 1, 4, 30, sizes=(1, 1), layout={"cpu_offload": True}),
    "tensor": Case("`fsdp2`, `tensor_parallel_size: 2`", accumulate=4, limit=30, sizes=(1, 2)),
    "both": Case("the same on 2 × 2", processes=4, sizes=(2, 2)),
    "tensor_tiles": Case(
        "`fsdp2`, `tensor_parallel_size: 2`, `model.mlp_tile_size`", accumulate=4, limit=30, sizes=(1, 2), model=TILES
    ),
    "context": Case("`fsdp2`, `context_parallel_size: 2`", accumulate=4, limit=30, layout=CONTEXT),
    "context_lora": Case(
        "the same with `model.lora`, `model.gradient_checkpointing`, `model.mlp_tile_size`",
        accumulate=4,
        limit=30,
        layout=CONTEXT,
        model={**LORA, **TILES},
        reference="single_lora",
    ),
    "context_both": Case("`context_parallel_size: 2` on 2 × 2", processes=4, sizes=(4, 1), layout=CONTEXT),
    "context_both_lora": Case(
        "the same with `model.lora`, `model.gradient_checkpointing`, `model.mlp_tile_size`",
        processes=4,
        sizes=(4, 1),
        layout=CONTEXT,
        model={**LORA, **TILES},
        reference="single_lora",
    ),
    "context_tensor": Case(
        "`context_parallel_size: 2`, `tensor_parallel_size: 2`",
        processes=4,
        accumulate=4,
        limit=30,
        sizes=(2, 2),
        layout=CONTEXT,
    ),
    **{f"deepspeed{n}": Case(f"`deepspeed_stage_{n}`", limit=14, stage=n, reference="single_whole") for n in (1, 2, 3)},
}
ALONE = ["single", "single_whole", "single_lora", "single_4bit", "single_8bit"]
QUICK = [
    ["ddp", "ddp_lora", "fsdp2", "fsdp2_lora", "fsdp2_4bit", "tiles"],
    ["offload", "tensor"],
    ["context_lora"],
    ["deepspeed3"],
]
SLOW = [
    ["ddp_tiles", "fsdp2_8bit", "checkpointing", "tensor_tiles"],
    ["offload_alone"],
    ["context"],
    ["both", "context_both", "context_both_lora", "context_tensor"],
    ["deepspeed1", "deepspeed2"],
]
LAUNCHES = [*QUICK, *SLOW]  # cases that processes run one after the other


@dataclass
class Curve(Callback):
    """Loss and gradient norm (before clipping) of every step."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    steps: int = 0

    def on_train_start(self, trainer: Any, module: Any) -> None:
        self.steps = trainer.global_step

    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
        if not trainer.strategy.handles_gradient_accumulation:
            gradients = [p.grad for p in module.parameters() if p.grad is not None]
            whole = [g.full_tensor() if hasattr(g, "full_tensor") else g for g in gradients]
            self.norms.append(float(torch.stack([gradient.double().norm() for gradient in whole]).norm()))

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step > self.steps:
            self.steps = trainer.global_step
            self.losses.append(trainer.callback_metrics["train/loss"].item())
            if trainer.strategy.handles_gradient_accumulation:
                self.norms.append(float(trainer.strategy.deepspeed_engine.get_global_grad_norm()))
            else:
                logged = trainer.callback_metrics["train/gradient_norm"].item()
                assert abs(logged - self.norms[-1]) < 1e-5 * self.norms[-1], (logged, self.norms[-1])


def steps(pretrained: str, case: Case, ckpt_path: Any = None, callbacks: Any = (), **settings: Any) -> Curve:
    """Clipped steps of SGD with momentum, which a wrong factor of one gradient would change for good."""
    curve = Curve()
    optimizer: dict[str, Any] = {} if "optimizers" in case.model else {"optimizer": partial(SGD, lr=0.1, momentum=0.9)}
    module = SFTModule(pretrained, schedule="constant", warmup=0.0, **optimizer, **case.model)
    common: dict[str, Any] = {"max_steps": 10, "max_epochs": -1, "gradient_clip_val": 0.5, "strategy": case.strategy}
    trainer = Trainer(
        accelerator="cpu", callbacks=[curve, *callbacks], **{**QUIET, **common, **case.settings, **settings}
    )
    trainer.fit(module, SFTDataModule(train=TRAIN, tokens_per_batch=100), ckpt_path=ckpt_path)
    return curve


def run(pretrained: str, name: str, out: Path) -> None:
    """Ten steps, with a checkpoint after the fourth, and again from there on."""
    case, ckpt = CASES[name], out / name / "step=4.ckpt"
    saver = partial(ModelCheckpoint, ckpt.parent, filename="{step}", every_n_train_steps=4, save_top_k=-1)
    done = steps(pretrained, case, enable_checkpointing=True, callbacks=[saver()])
    resumed = steps(pretrained, case, ckpt_path=ckpt, enable_checkpointing=True, callbacks=[saver()])
    if int(os.environ.get("RANK", "0")) == 0:
        (out / f"{name}.json").write_text(json.dumps([done.losses, done.norms, resumed.losses]))


def launch(names: list[str], pretrained: str, out: Path) -> None:
    """Run cases one after the other in processes of their own."""
    torchrun("tests.helpers.parallel", pretrained, str(out), *names, processes=CASES[names[0]].processes)


def measured(name: str, out: Path) -> dict[str, bool]:
    """What a case has shown, beside a single device that takes the same data in the same steps."""
    losses, norms, resumed = json.loads((out / f"{name}.json").read_text())
    reference = CASES[name].reference
    true_losses, true_norms, _ = json.loads((out / f"{reference}.json").read_text())
    assert len(losses) == len(norms) == len(true_losses) == 10
    return {
        "loss": _close(losses, true_losses),
        "gradient norm": _close(norms, true_norms),
        "resume": resumed == losses[4:],
        "export": _close(logits_of_export(name, out), logits_of_export(reference, out)),
    }


def logits_of_export(name: str, out: Path) -> list[float]:
    """Those of the folder that the case's checkpoint is exported to, in plain transformers."""
    folder = out / name / "exported"
    if not folder.exists():
        export_checkpoint(str(out / name / "step=4.ckpt"), str(folder))
    logits: list[float] = AutoModelForCausalLM.from_pretrained(folder)(torch.arange(50)[None]).logits.flatten().tolist()
    return logits


def _close(given: list[float], wanted: list[float]) -> bool:
    largest = max(map(abs, wanted))
    return all(abs(a - b) <= TOLERANCE * largest for a, b in zip(given, wanted, strict=True))


def table(out: Path) -> str:
    """What all cases have shown, as the table of the page."""
    columns = {name: measured(name, out) for name in CASES if name != "single_whole"}
    head = ["strategy", "processes", *columns["single"]]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for name, shown in columns.items():
        marks = ("=" if value else "**no**" for value in shown.values())
        lines.append(f"| {CASES[name].title} | {CASES[name].processes} | {' | '.join(marks)} |")
    return "\n".join(lines)


def write_page(text: str, new: str) -> str:
    """The page with another table."""
    return re.sub(r"(?<=<!-- table -->\n).*?(?=<!-- end -->)", lambda _: f"\n{new}\n\n", text, flags=re.DOTALL)


def run_all(pretrained: str, out: Path, launches: list[list[str]]) -> None:
    """All cases; those of a single process here."""
    for name in ALONE:
        run(pretrained, name, out)
    for names in launches:
        launch(names, pretrained, out)


def model(folder: Path) -> str:
    """One whose heads can be split, and whose embeddings are tied to its head."""
    return tiny_pretrained(folder, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        given, where, *chosen = sys.argv[1:]
        for one in chosen:
            run(given, one, Path(where))
    else:
        with TemporaryDirectory() as temporary:
            run_all(model(Path(temporary, "model")), Path(temporary), LAUNCHES)
            PAGE.write_text(write_page(PAGE.read_text(encoding="utf-8"), table(Path(temporary))), encoding="utf-8")
