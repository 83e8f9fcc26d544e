"""Runs that are killed and run again, for test_resume: each in a process forked from one that has imported everything.

python -m tests.resuming PRETRAINED FOLDER SEED KILLS [NAME ...]    prints what came of each run
"""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from torch.optim import AdamW

from lightning_sft import Mixture, Part, SFTDataModule, SFTModule
from lightning_sft.callbacks.checkpoint import SafeCheckpoint
from lightning_sft.callbacks.ledger import SampleLedger
from lightning_sft.callbacks.preempt import Preempt
from lightning_sft.run_folder import newest
from tests.gradients import QUIET, ROWS

TRAIN = [{**row, "prompt": f"{i} {row['prompt']}"} for i in range(3) for row in ROWS]


@dataclass(frozen=True)
class Run:
    """A training run: its data, how it is divided, and what it saves."""

    data: dict[str, Any] = field(default_factory=dict)
    trainer: dict[str, Any] = field(default_factory=dict)
    ranks: int = 1
    every_n_train_steps: int = 2

    def fit(self, pretrained: str, folder: Path, *callbacks: Callback, **settings: Any) -> Trainer:
        """The same command, whether the run begins or goes on."""
        folder.mkdir(parents=True, exist_ok=True)
        own = [Losses(folder / "losses"), SampleLedger(str(folder)), Preempt()]
        saver = SafeCheckpoint(str(folder / "checkpoints"), self.every_n_train_steps, None)
        trainer = Trainer(
            accelerator="cpu",
            callbacks=[*own, *callbacks, saver],
            default_root_dir=folder,
            **{
                **QUIET,
                "enable_checkpointing": True,
                "max_epochs": 3,
                "accumulate_grad_batches": 2,
                "devices": self.ranks,
                "strategy": "ddp" if self.ranks > 1 else "auto",
                **self.trainer,
                **settings,
            },
        )
        module = SFTModule(pretrained, optimizer=partial(AdamW, lr=1e-2), warmup=0.1)
        data = SFTDataModule(**{"train": TRAIN, "val": ROWS[:6], "tokens_per_batch": 150, "cache": None, **self.data})
        trainer.fit(module, data, ckpt_path=newest([folder / "checkpoints"]))
        if trainer.is_global_zero:
            torch.save(module.state_dict(), folder / "weights")
        return trainer


MIXTURE = Mixture({"a": Part(TRAIN[:20], share=2), "b": Part(TRAIN[20:], share=1)})
STREAM = {"streaming": True, "buffer_rows": 12}
RUNS = {
    "packed": Run(),
    "padded": Run({"packing": "padded", "num_workers": 2}, {"accumulate_grad_batches": 3}),
    "mixture": Run({"train": MIXTURE}, {"val_check_interval": 4}, every_n_train_steps=1),
    "stream": Run({**STREAM, "num_workers": 0}, {"max_steps": 30}, every_n_train_steps=3),
    "stream_workers": Run({**STREAM, "num_workers": 2}, {"max_steps": 20}),
    "ddp": Run({}, {}, ranks=2),
    "ddp_stream": Run({**STREAM, "num_workers": 0}, {"max_steps": 20}, ranks=2),
}


class Losses(Callback):
    """Appends the loss of each optimiser step to a file, to the bit."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.step = 0

    def on_train_start(self, trainer: Any, module: Any) -> None:
        self.step = trainer.global_step

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step > self.step and trainer.is_global_zero:
            self.step = trainer.global_step
            with self.path.open("a") as file:
                file.write(f"{self.step} {trainer.callback_metrics['train/loss'].item().hex()}\n")


class KillAt(Callback):
    """Kills this process at the n-th time that it is at a place, all places counted from its start."""

    PLACES = ("forward", "step", "validation", "writing", "saved", "epoch")

    def __init__(self, place: str, number: int) -> None:
        self.place, self.number, self.seen = place, number, 0

    def at(self, place: str) -> None:
        self.seen += place == self.place
        if self.seen == self.number:
            os.kill(os.getpid(), signal.SIGKILL)

    def setup(self, trainer: Any, module: Any, stage: str) -> None:
        write, publish = torch.save, os.fsync

        def save(checkpoint: Any, file: Any, *args: Any) -> None:
            write(checkpoint, file, *args)
            if self.place == "writing" and self.seen + 1 == self.number:
                file.flush()
                file.truncate(file.tell() // 2)
            self.at("writing")

        def fsync(descriptor: int) -> None:
            publish(descriptor)
            self.at("saved")

        torch.save, os.fsync = save, fsync

    def on_train_batch_start(self, *args: Any) -> None:
        self.at("forward")

    def on_before_zero_grad(self, *args: Any) -> None:
        self.at("step")

    def on_validation_batch_end(self, trainer: Any, *args: Any) -> None:
        if not trainer.sanity_checking:
            self.at("validation")

    def on_train_epoch_end(self, *args: Any) -> None:
        self.at("epoch")


def losses(folder: Path) -> dict[int, set[str]]:
    """All losses that any process has seen at each step."""
    found: dict[int, set[str]] = {}
    for line in (folder / "losses").read_text().splitlines():
        step, loss = line.split()
        found.setdefault(int(step), set()).add(loss)
    return found


def forked(run: Callable[[int], Any], ranks: int) -> list[int]:
    """Processes that run it, each with its rank; alone in their environment."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for rank in range(ranks):
        if process := os.fork():
            processes.append(process)
            continue
        code = 1
        try:
            os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), LOCAL_RANK=str(rank), NODE_RANK="0")
            torch.set_num_threads(1)
            warnings.simplefilter("ignore")
            run(rank)
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
        except BaseException as error:
            print(f"rank {rank}: {type(error).__name__}: {error}", file=sys.stderr)
        finally:
            os._exit(code)
    return processes


def wait(processes: list[int], limit: float = 120.0) -> list[int]:
    """Their exit codes; when one has failed, the others are killed, as torchrun and SLURM do."""
    codes: dict[int, int] = {}
    end = time.monotonic() + limit
    while len(codes) < len(processes):
        for process in processes:
            if process not in codes:
                done, status = os.waitpid(process, os.WNOHANG)
                if done:
                    codes[process] = os.waitstatus_to_exitcode(status)
        if any(codes.values()) or time.monotonic() > end:
            time.sleep(0.5)
            for process in set(processes) - codes.keys():
                os.kill(process, signal.SIGKILL)
                os.waitpid(process, 0)
                codes[process] = -9
        time.sleep(0.005)
    return [codes[process] for process in processes]


def attempt(run: Run, pretrained: str, folder: Path, place: str = "never", number: float = 0) -> bool:
    """Run it in processes of its own, killed at a place, or ``after`` so many seconds. Whether it came to its end."""
    callbacks = [] if place in ("never", "after") else [KillAt(place, int(number))]
    processes = forked(lambda rank: run.fit(pretrained, folder, *callbacks), run.ranks)
    if place == "after":
        time.sleep(number)
        for process in processes[int(number * 1000) % len(processes) :]:  # one or all of the ranks
            os.kill(process, signal.SIGKILL)
    codes = wait(processes)
    if any(code > 0 for code in codes) and -signal.SIGKILL not in codes:
        raise RuntimeError(f"{place} {number} in {folder}: exit codes {codes}")
    return not any(codes)


def compare(whole: Path, killed: Path) -> list[str]:
    """In what a run that was killed differs from one that was not."""
    weights = [torch.load(folder / "weights", weights_only=True).values() for folder in (whole, killed)]
    same = {
        "losses": losses(whole) == losses(killed),
        "weights": all(torch.equal(a, b) for a, b in zip(*weights, strict=True)),
        "ledger": (whole / "samples.jsonl").read_bytes() == (killed / "samples.jsonl").read_bytes(),
    }
    return [name for name, equal in same.items() if not equal]


def main(pretrained: str, root: Path, seed: int, number: int, names: list[str]) -> None:
    """Each run as it is, and others that are killed until they have been so often; says where they differ."""
    for name in names:
        run, whole, begin = RUNS[name], root / name / "whole", time.monotonic()
        assert attempt(run, pretrained, whole)
        seconds, random_ = time.monotonic() - begin, random.Random(f"{name} {seed}")
        kills: list[tuple[str, float]] = []
        differ: dict[str, list[str]] = {}
        while len(kills) < number:
            folder, own = root / name / f"killed{len(kills)}", len(kills)
            is_over = False
            while not is_over:
                place = random_.choice(("after", *KillAt.PLACES))
                kill = place, random_.uniform(0.1, seconds) if place == "after" else random_.randint(1, 6)
                is_over = attempt(run, pretrained, folder, *(kill if len(kills) < number else ()))
                kills += [] if is_over else [kill]
            if found := compare(whole, folder):
                differ[f"{kills[own:]}"] = found
        figures = {"run": name, "steps": len(losses(whole)), "kills": len(kills), "differ": differ}
        print(json.dumps({**figures, "seconds": round(time.monotonic() - begin, 1)}), flush=True)


if __name__ == "__main__":
    given, where, seed_, number_, *chosen = sys.argv[1:]
    main(given, Path(where), int(seed_), int(number_), chosen or list(RUNS))
