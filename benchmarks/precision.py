"""Whether a fine-tune in bf16-mixed has the loss curve of one in float32: several seeds of both, on the same data.

    python -m benchmarks.precision [--model FOLDER] [--data NAME=FILE.jsonl ...] [--prompt question --completion answer]
        [--seeds 3] [--steps 200] [--tokens 512] [--accelerator cpu] [--out build/precision]

Without `--data` it is the quickstart's example data, with the demo model. A seed decides the order of the rows; the
difference between precisions is taken at the same seed, and compared with the spread over seeds. Runs that the folder
has are not run again. Writes a JSON file a run, precision.md and precision.png.
"""

from __future__ import annotations

import argparse
import json
import warnings
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from lightning.pytorch import Callback, Trainer, seed_everything
from matplotlib.figure import Figure
from torch.optim import AdamW

from benchmarks.environments import BUILD
from lightning_sft import SFTDataModule, SFTModule
from lightning_sft.demos.data import write_demo_data
from lightning_sft.demos.pretrained import fetch_demo_model

PRECISIONS = ("32-true", "bf16-mixed")
WINDOW = 20  # steps that a drawn point is the mean of

Curves = dict[tuple[str, str, int], dict[str, Any]]
"""Of each data set, precision and seed: the loss of each step, and that on held-out rows at the end."""


def parsed(arguments: list[str] | None = None) -> argparse.Namespace:
    """The settings of the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="Hugging Face folder; the demo model by default")
    parser.add_argument("--data", nargs="+", default=[], metavar="NAME=FILE", help="JSONL; 100 rows are held out")
    parser.add_argument("--prompt", default="prompt", help="the data's column for the prompt")
    parser.add_argument("--completion", default="completion")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--tokens", type=int, default=512, help="of a step")
    parser.add_argument("--accelerator", default="auto")
    parser.add_argument("--out", type=Path, default=BUILD.parent / "precision")
    return parser.parse_args(arguments)


class Losses(Callback):
    """The loss of every step."""

    def __init__(self) -> None:
        self.of_steps: list[float] = []

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """Read what the module has logged."""
        self.of_steps.append(float(trainer.callback_metrics["train/loss"]))


def run(given: argparse.Namespace, model: str, rows: list[Any], precision: str, seed: int) -> dict[str, Any]:
    """A fit of so many steps, and the loss on the last 100 rows."""
    seed_everything(seed, verbose=False)
    losses = Losses()
    module = SFTModule(model, optimizer=partial(AdamW, lr=1e-4, weight_decay=0.01, fused=True))
    data = SFTDataModule(train=rows[:-100], val=rows[-100:], tokens_per_batch=given.tokens, seed=seed)
    trainer = Trainer(
        accelerator=given.accelerator,
        devices=1,
        precision=precision,  # type: ignore[arg-type]  # one of the literals that Lightning lists
        max_steps=given.steps,
        max_epochs=-1,
        gradient_clip_val=1.0,
        limit_val_batches=0,
        callbacks=[losses],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, data)
    trainer.limit_val_batches = 1.0
    [held_out] = trainer.validate(module, data, verbose=False)
    return {"train": losses.of_steps, "val": held_out["val/loss"]}


def table(found: Curves) -> str:
    """Of each data set: losses in both precisions, their difference at the same seed, and the spread over seeds."""
    lines = [
        "| data | loss on held-out rows, float32 | bf16-mixed | largest difference at the same seed "
        "| standard deviation over seeds |",
        "|---|---|---|---|---|",
    ]
    for name in dict.fromkeys(name for name, _, _ in found):
        of = {p: {s: r["val"] for (n, q, s), r in found.items() if (n, q) == (name, p)} for p in PRECISIONS}
        wide, mixed = (of[precision] for precision in PRECISIONS)
        both = sorted(wide.keys() & mixed.keys())
        if len(both) < 2:
            continue
        largest = max((mixed[seed] - wide[seed] for seed in both), key=abs)
        means = " | ".join(f"{mean(losses[seed] for seed in both):.4f}" for losses in (wide, mixed))
        lines.append(f"| {name}, {len(both)} seeds | {means} | {largest:+.4f} | {stdev(wide[s] for s in both):.4f} |")
    return "\n".join(lines) + "\n"


def draw(found: Curves, path: Path) -> None:
    """Smoothed losses of all runs, float32 dashed and bf16-mixed solid, a color a seed."""
    names = list(dict.fromkeys(name for name, _, _ in found))
    figure = Figure(figsize=(5.5 * len(names), 3.6), layout="tight")
    for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        for (of, precision, seed), result in sorted(found.items()):
            if of == name:
                losses = result["train"]
                smooth = [mean(losses[i : i + WINDOW]) for i in range(len(losses) - WINDOW + 1)]
                style = "--" if precision == PRECISIONS[0] else "-"
                label = f"{precision}, seed {seed}"
                axes.plot(range(WINDOW, len(losses) + 1), smooth, style, color=f"C{seed}", alpha=0.7, label=label)
        axes.set(title=name, xlabel="optimizer step", ylabel=f"training loss, mean of {WINDOW} steps")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=7)
    figure.savefig(path, dpi=110)


def main(arguments: list[str] | None = None) -> None:
    """Run what has not been run, and write the table and the picture."""
    given = parsed(arguments)
    given.out.mkdir(parents=True, exist_ok=True)
    warnings.simplefilter("ignore")
    model = given.model or str(fetch_demo_model())
    files = dict(item.split("=", 1) for item in given.data) or {"quickstart": str(write_demo_data(given.out)[0])}
    found: Curves = {}
    for seed in range(given.seeds):
        for name, file in files.items():
            rows = [{"prompt": row[given.prompt], "completion": row[given.completion]} for row in read(file)]
            for precision in PRECISIONS:
                path = given.out / f"{name}-{precision}-{seed}.json"
                if not path.is_file():
                    path.write_text(json.dumps(run(given, model, rows, precision, seed)), encoding="utf-8")
                found[name, precision, seed] = json.loads(path.read_text(encoding="utf-8"))
    text = table(found)
    (given.out / "precision.md").write_text(text, encoding="utf-8")
    draw(found, given.out / "precision.png")
    print(text)


def read(file: str) -> list[dict[str, Any]]:
    """The rows of a JSONL file."""
    return [json.loads(line) for line in Path(file).read_text(encoding="utf-8").splitlines() if line.strip()]


if __name__ == "__main__":
    main()
