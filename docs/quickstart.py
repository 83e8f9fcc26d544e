"""The quickstart: a real pretrained model before and after fine-tuning, on data that it has not been trained on.

Everything goes through the command line that users have; `make quickstart` runs this file. Steps: get the model, write
the example data, evaluate, fit, export, evaluate what was exported, compare its logits with the checkpoint's.
"""

from __future__ import annotations

from lightning_sft.machine.noise import quiet_others

quiet_others()  # before others are imported, as on the command line

import argparse
import json
import shutil
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer

from lightning_sft import SFTModule
from lightning_sft.demos.data import write_demo_data
from lightning_sft.demos.pretrained import fetch_demo_model
from lightning_sft.main import main
from lightning_sft.training.checks import bfloat16_is_slow

CONFIG = Path(__file__).parents[1] / "configs" / "quickstart.yaml"


def evaluate(
    pretrained: str, folder: Path, name: str, flags: list[str]
) -> tuple[dict[str, float], list[dict[str, str]]]:
    """Figures on the held-out rows, and greedy answers to them."""
    here = [*flags, "--model.pretrained", pretrained, "--trainer.logger", "false"]
    figures = main(["test", *here]).trainer.callback_metrics
    root = folder / name
    main(["predict", *here, "--trainer.default_root_dir", str(root)])
    rows = [json.loads(line) for line in (root / "predictions.jsonl").read_text(encoding="utf-8").splitlines()]
    exact = sum(row["prediction"].strip() == row["reference"] for row in rows) / len(rows)
    return {key: float(value) for key, value in figures.items()} | {"exact": exact}, rows


def largest_logit_difference(checkpoint: str, exported: Path) -> float:
    """Between the Lightning checkpoint and what plain transformers loads from the exported folder."""
    tokenizer = AutoTokenizer.from_pretrained(exported)
    messages = [{"role": "user", "content": "Heat the attic to 19 degrees"}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    trained = SFTModule.load_from_checkpoint(checkpoint, map_location="cpu", weights_only=True).model
    with torch.no_grad():
        plain = AutoModelForCausalLM.from_pretrained(exported).float().eval()(**ids).logits
        return float((trained.eval()(**ids).logits - plain).abs().max())


def run(folder: Path, extra: list[str]) -> None:
    """The whole of it; prints one table."""
    start, console = time.monotonic(), Console()
    console.rule("1  model and data")
    pretrained = str(fetch_demo_model())
    train, test = write_demo_data(folder)
    flags = ["--config", str(CONFIG), "--data.train", str(train), *extra]
    flags += [flag for key in ("val", "test", "predict") for flag in (f"--data.{key}", str(test))]
    if bfloat16_is_slow():
        console.print("This CPU has no fast bfloat16 arithmetic: float32 is used.")
        flags += ["--trainer.precision", "32-true"]
    console.rule("2  before")
    before, answers_before = evaluate(pretrained, folder, "before", flags)
    console.rule("3  fine-tuning")
    began = time.monotonic()
    fit = main(["fit", *flags, "--model.pretrained", pretrained, "--trainer.default_root_dir", str(folder)])
    minutes = (time.monotonic() - began) / 60
    console.rule("4  export")
    checkpoint = fit.trainer.checkpoint_callback.best_model_path
    shutil.rmtree(folder / "model", ignore_errors=True)  # of an earlier quickstart
    exported = main(["export", "--ckpt", checkpoint, "--out", str(folder / "model")])
    difference = largest_logit_difference(checkpoint, exported)
    console.rule("5  after")
    after, answers_after = evaluate(str(exported), folder, "after", flags)
    table = Table(title=f"100 held-out requests, before and after {minutes:.1f} minutes of fine-tuning")
    for column in ("", "before", "after"):
        table.add_column(column)
    table.add_row("NLL per token", *(f"{f['test/loss']:.3f}" for f in (before, after)))
    table.add_row("perplexity", *(f"{f['test/perplexity']:.2f}" for f in (before, after)))
    table.add_row("token accuracy", *(f"{f['test/token_accuracy']:.1%}" for f in (before, after)))
    table.add_row("exact match of greedy answers", *(f"{f['exact']:.0%}" for f in (before, after)))
    requests = [json.loads(line)["prompt"] for line in test.read_text(encoding="utf-8").splitlines()[:3]]
    for request, old, new in zip(requests, answers_before, answers_after, strict=False):
        table.add_section()
        table.add_row(request, old["prediction"].strip(), new["prediction"])
    console.print(table)
    console.print(
        f"Exported to {exported}: plain transformers gives the same logits (largest difference {difference:.1e})."
    )
    if difference > 1e-4:
        raise SystemExit("The exported model differs from the trained one.")
    console.print(f"The quickstart took {(time.monotonic() - start) / 60:.1f} minutes.")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("build/quickstart"))
    known, others = parser.parse_known_args()
    run(known.folder, others)
