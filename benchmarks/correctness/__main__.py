"""The scoreboard of correctness: `python -m benchmarks.correctness`, in the environment of the tests.

Three questions to each system, in an environment of its own: whether the same rows of five dialects become the right
targets, whether a step that is split into micro-batches is the same step, and whether a run that was killed and resumed
ends where one ends that was not. It writes correctness.json, .md and .png to build/bench, and with --publish the page.
What is asked of some systems alone is renewed among what an earlier call found with as many rows.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks import environments
from benchmarks.correctness.masks import verdicts
from benchmarks.correctness.page import draw, markdown, rewritten
from benchmarks.correctness.rows import DIALECTS, conversations, lines
from benchmarks.environments import BUILD, ROOT
from benchmarks.measure import Scripts
from tests.oracle.templates import of_trl
from tests.oracle.vocabularies import tokenizer_for

PAGE = ROOT / "docs" / "reference" / "correctness.md"
SYSTEMS = ("ours", "trl", "litgpt", "llamafactory")
TEMPLATES = {  # by their names in trl's wheel; what the other systems call them
    "qwen2_5": {"litgpt": "qwen2.5", "llamafactory": "qwen"},
    "qwen3": {"litgpt": "qwen3", "llamafactory": "qwen3"},
}
QUESTIONS = ("targets", "step", "resumed")
STEP_ROWS, RESUME_ROWS, RESUME_STEPS, DIES_AFTER = 8, 24, 4, 3
_SGD = {"class_path": "torch.optim.SGD", "init_args": {"lr": 1.0}}


def parsed(arguments: list[str] | None = None) -> argparse.Namespace:
    """The settings of the scoreboard."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--systems", nargs="+", default=list(SYSTEMS), choices=SYSTEMS)
    parser.add_argument("--questions", nargs="+", default=list(QUESTIONS), choices=QUESTIONS)
    parser.add_argument("--rows", type=int, default=200, help="of each dialect")
    parser.add_argument("--templates", nargs="+", default=list(TEMPLATES), choices=TEMPLATES)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=BUILD)
    parser.add_argument("--python", type=Path, help="one interpreter that has all systems, instead of environments")
    parser.add_argument("--publish", action="store_true", help="write the page and its picture")
    return parser.parse_args(arguments)


class Scoreboard:
    """The questions, and the answers so far.

    Args:
        given: Its settings.
    """

    def __init__(self, given: argparse.Namespace) -> None:
        self.given, self.out = given, given.out.resolve() / "correctness"
        self.out.mkdir(parents=True, exist_ok=True)
        self.model = _random_model(self.out / "SmolLM2-135M", tokenizer_for(of_trl()["qwen2_5"]))
        self.converted = str(self.out / "converted" / Path(self.model).name)
        common = {"model": self.model, "seed": given.seed, "given": None, "precision": "float32"}
        common |= {"converted": self.converted, "length": 512}
        self.script = Scripts(self.out / "runs", given.threads, given.python, common)
        self.results: dict[str, Any] = {"targets": {}, "step": {}, "resumed": {}, "missing": {}}
        self.results["settings"] = {"rows": given.rows, "seed": given.seed}
        if self.file.is_file():
            before = json.loads(self.file.read_text(encoding="utf-8"))
            if before["settings"] == self.results["settings"]:
                self.results = before

    @property
    def file(self) -> Path:
        """Where results are kept."""
        return self.out.parent / "correctness.json"

    def prepare(self) -> list[str]:
        """Make environments; returns the systems that have one."""
        shutil.rmtree(self.out / "runs", ignore_errors=True)
        found = []
        for name in self.given.systems:
            try:
                if self.given.python is None:
                    environments.make(name)
                found.append(name)
                self.results["missing"].pop(name, None)
            except Exception as error:
                self.results["missing"][name] = str(error)[-300:]
        return found

    def targets(self, systems: list[str]) -> None:
        """Whether rows become the right targets."""
        for template in self.given.templates:
            tokenizer = tokenizer_for(of_trl()[template])
            model = _random_model(self.out / template, tokenizer)
            results = self.results["targets"].setdefault(template, {})
            for dialect in DIALECTS:
                found = conversations(dialect, self.given.rows, self.given.seed)
                path = self.out / f"{dialect}.jsonl"
                path.write_text(lines(dialect, found), encoding="utf-8")
                for system in systems:
                    settings = {"rows": str(path), "dialect": dialect, "model": model}
                    settings |= {"prompt_style": TEMPLATES[template].get(system)}
                    done = self.script(system, f"{system}-{template}-{dialect}", task="encode", **settings)
                    rows = done.lines[0]["rows"] if done.lines else ["failed"] * len(found)
                    said = verdicts(tokenizer, found, rows)
                    reasons = Counter(reason for _, reason in said if reason)
                    kinds = Counter(verdict for verdict, _ in said)
                    results.setdefault(system, {})[dialect] = {**kinds, "reasons": reasons.most_common(4)}
                self.save()

    def pairs(self, name: str, count: int) -> str:
        """A file of rows of unlike lengths, with a prompt and a completion."""
        path = self.out / f"{name}.jsonl"
        path.write_text(lines("prompt_completion", conversations("prompt_completion", count, 1)), encoding="utf-8")
        return str(path)

    def train(self, system: str, folder: str, *, dies_after: int | None = None, **settings: Any) -> None:
        """Run a training, which has to succeed, or to kill itself if it is told to."""
        told = {"weights": str(self.out / "runs" / f"{folder}.pt"), "dies_after": dies_after}
        if system == "ours":
            hooks = {f"--trainer.callbacks.{key}": value for key, value in told.items() if value is not None}
            flags = {key: str(value) for key, value in (settings["flags"] | hooks).items()}
            settings = settings | {"flags": flags}
        done = self.script(system, folder, task="train", **told, **settings)
        if bool(done.error) != bool(dies_after):
            raise RuntimeError(done.error[-300:] if done.error else f"It ended before step {dies_after}.")

    def after(self, system: str, folder: str) -> dict[str, torch.Tensor]:
        """The weights after a training."""
        runs = self.out / "runs"
        return _weights(
            runs / folder / "output" / "final" / "lit_model.pth" if system == "litgpt" else runs / f"{folder}.pt"
        )

    def before(self, system: str) -> dict[str, torch.Tensor]:
        """The weights before it, by the names of the system."""
        if system == "litgpt":
            return _weights(Path(self.converted, "lit_model.pth"))
        state = AutoModelForCausalLM.from_pretrained(self.model, dtype=torch.float32).state_dict()
        return {key: value.double() for key, value in state.items()}

    def step(self, system: str) -> None:
        """A step of the same rows, in one micro-batch and one row at a time."""
        rows = self.pairs("step", STEP_ROWS + 4 * (system == "litgpt"))  # of which it keeps 4 for its validation
        whole, split = (f"{system}-step-{size}" for size in (STEP_ROWS, 1))
        self.train(system, whole, rows=rows, **_step_settings(system, STEP_ROWS))
        self.train(system, split, rows=rows, **_step_settings(system, 1))
        self.results["step"][system] = self.difference(system, split, whole)

    def resumed(self, system: str) -> None:
        """A run that is killed after its third step, and resumed from the checkpoint after the second."""
        rows = self.pairs("resume", RESUME_ROWS + 4 * (system == "litgpt"))
        settings = {"rows": rows, "steps": RESUME_STEPS, **_resume_settings(system)}
        whole, killed = f"{system}-whole", f"{system}-killed"
        self.train(system, whole, **settings)
        self.train(system, killed, dies_after=DIES_AFTER, **settings)
        self.train(system, killed, resumes=True, **settings)
        self.results["resumed"][system] = self.difference(system, killed, whole)

    def difference(self, system: str, folder: str, other: str) -> dict[str, float]:
        """How far a run ended from another, as a share of what the other has moved; and the number of unlike values."""
        a, b, before = self.after(system, folder), self.after(system, other), self.before(system)
        off = sum(float((a[key] - b[key]).square().sum()) for key in b)
        way = sum(float((b[key] - before[key]).square().sum()) for key in b.keys() & before.keys())
        unlike = sum(int((a[key] != b[key]).sum()) for key in b)
        return {"share": (off / way) ** 0.5, "unlike": unlike, "values": sum(value.numel() for value in b.values())}

    def save(self) -> None:
        """Keep what there is so far."""
        self.file.write_text(json.dumps(self.results, indent=1), encoding="utf-8")


def _random_model(folder: Path, tokenizer: PreTrainedTokenizerFast) -> str:
    """A model of a shape that all systems know, that of HuggingFaceTB/SmolLM2-135M."""
    size = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9}
    size |= {"num_key_value_heads": 3, "vocab_size": 49152, "max_position_embeddings": 8192}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**size, rms_norm_eps=1e-5, rope_theta=100_000.0, tie_word_embeddings=True))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def _step_settings(system: str, size: int) -> dict[str, Any]:
    """Settings of one step of stochastic gradient descent with rate 1: its update is the gradient."""
    if system == "ours":
        flags = {"--model.optimizer": "torch.optim.SGD", "--model.optimizer.lr": 1.0, "--model.schedule": "constant"}
        flags |= {"--model.warmup": 0.0, "--trainer.logger": "false", "--trainer.enable_checkpointing": "false"}
        flags |= {"--data.tokens_per_batch": 4096 if size > 1 else 256, "--trainer.accumulate_grad_batches": 64}
        flags |= {"--trainer.gradient_clip_val": "null"}
        return {"steps": 1, "flags": flags}
    if system == "trl":
        config = {"optim": "sgd", "learning_rate": 1.0, "lr_scheduler_type": "constant", "max_grad_norm": 0.0}
        config |= {"per_device_train_batch_size": size, "gradient_accumulation_steps": STEP_ROWS // size}
        return {"steps": 1, "config": config | {"gradient_checkpointing": False}}
    train = {"global_batch_size": STEP_ROWS, "micro_batch_size": size, "lr_warmup_steps": 1}
    return {"steps": 2, "train": train, "optimizer": _SGD}  # the rate of its first step is 0


def _resume_settings(system: str) -> dict[str, Any]:
    """Settings of a run that saves after every second step."""
    if system == "ours":
        flags = {"--data.tokens_per_batch": 256, "--trainer.accumulate_grad_batches": 2, "--trainer.logger": "false"}
        more = ["--trainer.callbacks+", "SafeCheckpoint", "--trainer.callbacks.every_n_train_steps", "2"]
        return {"flags": flags | {"--ckpt_path": "last"}, "more": more}
    if system == "trl":
        config = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "num_train_epochs": 5}
        return {"config": config | {"save_strategy": "steps", "save_steps": 2}}
    train = {"global_batch_size": 4, "micro_batch_size": 2, "save_interval": 2, "lr_warmup_steps": 1}
    return {"train": train, "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 2e-5}}}


def _weights(path: Path) -> dict[str, torch.Tensor]:
    found = torch.load(path, map_location="cpu", weights_only=True)
    return {key: value.double() for key, value in found.get("model", found).items()}


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Run the scoreboard, and return its results."""
    given = parsed(arguments)
    board = Scoreboard(given)
    systems = board.prepare()
    if "targets" in given.questions:
        board.targets(systems)
    board.save()
    if "litgpt" in systems and not Path(board.converted, "lit_model.pth").is_file():
        board.script("litgpt", "convert", task="convert")
    for system in systems:
        for name in (
            {"step", "resumed"} & set(given.questions) if system != "llamafactory" else ()
        ):  # its data path alone
            try:
                getattr(board, name)(system)
            except Exception as error:
                board.results[name][system] = {"error": str(error)[-300:]}
            board.save()
    text = markdown(board.results)
    (given.out / "correctness.md").write_text(text + "\n", encoding="utf-8")
    draw(board.results, given.out / "correctness.png")
    if given.publish:
        PAGE.write_text(rewritten(PAGE.read_text(encoding="utf-8"), board.results), encoding="utf-8")
        shutil.copy(given.out / "correctness.png", PAGE.with_suffix(".png"))
        shutil.copy(given.out / "correctness.json", PAGE.with_suffix(".json"))
    print(text)
    return board.results


if __name__ == "__main__":
    main()
