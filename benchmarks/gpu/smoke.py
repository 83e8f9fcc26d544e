"""Command lines of `lightning-sft`, verbs and settings, each in processes of its own: they end well, or they do not."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

from transformers import AutoTokenizer

from benchmarks.gpu.shapes import architecture, write_model
from benchmarks.record import Record

Commands = list[list[str]]

_VERB = [sys.executable, "-m", "lightning_sft"]
_CALLBACK = "--trainer.callbacks+=lightning_sft.callbacks."
_BF16 = {"trainer.precision": "bf16-mixed"}
_FSDP2 = {
    "trainer.strategy": "lightning_sft.strategies.FSDP2Strategy",
    "trainer.strategy.compute_dtype": "bfloat16",
    "trainer.devices": "1",
}
_FITS: dict[str, dict[str, str]] = {  # fits of a few steps that differ in their settings alone
    "float32": {"trainer.precision": "32-true"},
    "float32, deterministic": {"trainer.deterministic": "true"},
    "bf16-mixed, deterministic": {**_BF16, "trainer.deterministic": "true"},
    "bf16-true": {"trainer.precision": "bf16-true"},
    "16-mixed, accumulated, clipped": {
        "trainer.precision": "16-mixed",
        "trainer.accumulate_grad_batches": "2",
        "trainer.gradient_clip_val": "1.0",
    },
    "QLoRA, 4 bits": {**_BF16, "model.lora.r": "8", "model.quantize": "4bit"},
    "QLoRA, 8 bits": {**_BF16, "model.lora.r": "8", "model.quantize": "8bit"},
    "kernels: compiled": {**_BF16, "model.kernels": "compiled"},
    "kernels: liger": {**_BF16, "model.kernels": "liger"},
    "gradient checkpointing": {**_BF16, "model.gradient_checkpointing": "true"},
    "gradient checkpointing, offloaded": {**_BF16, "model.gradient_checkpointing": "offload"},
    "padded": {**_BF16, "data.packing": "padded"},
    "attention: sdpa": {**_BF16, "model.attn_implementation": "sdpa"},
    "attention: flash_attention_2": {**_BF16, "model.attn_implementation": "flash_attention_2"},
    "attention: flex_attention": {**_BF16, "model.attn_implementation": "flex_attention"},
    "ddp": {**_BF16, "trainer.strategy": "ddp", "trainer.devices": "1"},
    "fsdp2, CPU offload": {**_FSDP2, "trainer.strategy.cpu_offload": "true"},
    "NEFTune": {**_BF16, "model.neftune_alpha": "5"},
    "stream": {**_BF16, "data.streaming": "true", "data.num_workers": "2"},
}


def _flags(settings: Mapping[str, str]) -> list[str]:
    return [part for name, value in settings.items() for part in (f"--{name}", value)]


def command_lines(model: str, rows: Mapping[str, str], runs: Path, device: str, tokens: int) -> dict[str, Commands]:
    """All cases, by name: the command lines of each, which run one after the other.

    Args:
        model: Hugging Face folder.
        rows: JSONL files: ``short`` to train on, ``val`` for validation.
        runs: Folder for what the cases write.
        device: ``cuda`` or ``cpu``.
        tokens: Of a micro-batch.
    """
    accelerator = {"trainer.accelerator": "gpu" if device == "cuda" else "cpu"}
    given = {"model.pretrained": model, "data.train": rows["short"], **accelerator}

    def fit(name: str, settings: Mapping[str, str], *others: str, steps: int = 4) -> list[str]:
        here = {"trainer.max_steps": str(steps), "trainer.default_root_dir": str(runs / name)}
        logged = {"trainer.logger": "CSVLogger", "trainer.logger.save_dir": str(runs / name)}
        own = {**given, "data.tokens_per_batch": str(tokens), **here, **logged, "trainer.log_every_n_steps": "1"}
        return [*_VERB, "fit", *_flags({**own, "seed_everything": "1", **settings}), *others]

    def export(name: str) -> list[str]:
        return [*_VERB, "export", "--ckpt", str(runs / name), "--out", str(runs / f"{name} exported")]

    def verify(name: str, settings: Mapping[str, str]) -> list[str]:
        here = {**given, "data.train": rows["val"], "trainer.default_root_dir": str(runs / name), **settings}
        return [*_VERB, "verify", *_flags(here)]

    exported = {"model.pretrained": str(runs / "everything exported"), "trainer.logger": "false", **accelerator}
    answers = {"data.predict": rows["val"], "model.max_new_tokens": "16", **_BF16}
    callbacks = f"{_CALLBACK}SampleGenerations", f"{_CALLBACK}DriftMonitor"
    validated = {"data.val": rows["val"], "trainer.val_check_interval": "2", "model.max_new_tokens": "16", **_BF16}
    question = f"printf 'What is 2+2?\\n' | {sys.executable} -m lightning_sft chat --model {model} --max_new_tokens 8"
    replayed = (
        f"{sys.executable} -m lightning_sft replay --config \"$(find '{runs / 'replay'}' -name config.yaml | head -1)\""
    )
    return {
        "doctor": [[*_VERB, "doctor"]],
        "fit, export, validate, predict, report": [
            fit("everything", validated, *callbacks),
            export("everything"),
            [*_VERB, "validate", *_flags({**exported, "data.val": rows["val"]})],
            [*_VERB, "predict", *_flags({**exported, **answers, "trainer.default_root_dir": str(runs / "predict")})],
            [*_VERB, "report", str(runs / "everything"), "--out", str(runs / "report.html")],
        ],
        "LoRA and its export": [fit("lora", {**_BF16, "model.lora.r": "8"}), export("lora")],
        "fsdp2 and its export": [fit("fsdp2", _FSDP2), export("fsdp2")],
        "OptimizerInBackward": [fit("in backward", _BF16, f"{_CALLBACK}OptimizerInBackward")],
        "resume": [
            fit("resume", _BF16, "--ckpt_path", "last", steps=3),
            fit("resume", _BF16, "--ckpt_path", "last", steps=6),
        ],
        "plan": [[*_VERB, "plan", *_flags({**given, **_BF16, "data.tokens_per_batch": str(tokens)})]],
        "verify, float32": [verify("verify float32", {})],
        "verify, bf16-mixed": [verify("verify bf16-mixed", _BF16)],
        "chat": [["bash", "-c", question]],
        "replay": [fit("replay", _BF16), ["bash", "-c", f"{replayed} --step 2"]],
        **{name: [fit(name, settings)] for name, settings in _FITS.items()},
    }


def names() -> list[str]:
    """The names of all cases."""
    return list(command_lines("", {"short": "", "val": ""}, Path(), "cuda", 0))


def check(given: SimpleNamespace) -> None:
    """Run the command lines of a case and record whether all of them ended well.

    Args:
        given: ``name``, and what all cases get.
    """
    runs = Path(given.folder)
    model = write_model(
        runs / "model",
        architecture("llama", given.quick),
        AutoTokenizer.from_pretrained(given.tokenizer),
        "cpu",
        given.seed,
    )
    for command in command_lines(model, given.rows, runs, given.device, 256 if given.quick else 4096)[given.name]:
        print("$", *command, flush=True)
        code = subprocess.run(command, check=False, stdin=subprocess.DEVNULL).returncode
        if code:
            Record(given.out).write(passed=False)
            sys.exit(code)
    Record(given.out).write(passed=True)
