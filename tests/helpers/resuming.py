"""Runs that are killed and run again, for test_resume: each in a process forked from one that has imported everything.

python -m tests.helpers.resuming PRETRAINED FOLDER '{"packed": [["writing", 2]], "ddp": 7}'

kills a run at places in turn, or at so many that are drawn, and prints what came of it.
"""

from __future__ import annotations

import json
import os
import random
import re
import signal
import socket
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar
from unittest.mock import patch

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import EarlyStopping
from torch.distributed.tensor import DTensor
from torch.optim import AdamW

from lightning_sft import Mixture, Part, SFTDataModule, SFTModule
from lightning_sft.callbacks import saving
from lightning_sft.callbacks.checkpoint import SafeCheckpoint
from lightning_sft.callbacks.ledger import SampleLedger
from lightning_sft.callbacks.preempt import EX_TEMPFAIL, Preempt
from lightning_sft.callbacks.record import RunRecord
from lightning_sft.checkpoints.run_files import METRICS_FILE, lines_of
from lightning_sft.checkpoints.writing import newest
from lightning_sft.demos import tiny_pretrained
from tests.helpers.gradients import QUIET, ROWS

TRAIN = [{**row, "prompt": f"{i} {row['prompt']}"} for i in range(3) for row in ROWS]


@dataclass(frozen=True)
class Run:
    """A training run: its data, how it is divided, and what it saves."""

    data: dict[str, Any] = field(default_factory=dict)
    trainer: dict[str, Any] = field(default_factory=dict)
    ranks: int = 1
    every_n_train_steps: int = 2
    model: dict[str, Any] = field(default_factory=dict)
    in_background: bool = False
    protocol: str = ""  # of the address that checkpoints are saved at
    patience: int = 0  # of an EarlyStopping, where there is one

    def fit(self, pretrained: str, folder: Path, *callbacks: Callback, **settings: Any) -> Trainer:
        """The same command, whether the run begins or goes on."""
        folder.mkdir(parents=True, exist_ok=True)
        own = [Losses(folder / "losses"), SampleLedger(str(folder)), RunRecord(str(folder)), Preempt()]
        if self.patience:
            own.append(EarlyStopping("val/loss", patience=self.patience, verbose=False))
        every, where = self.every_n_train_steps, f"{self.protocol}{folder / 'checkpoints'}"
        saver = SafeCheckpoint(where, every, None, in_background=self.in_background)
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
        module = SFTModule(pretrained, **{"optimizer": partial(AdamW, lr=1e-2), "warmup": 0.1, **self.model})
        data = SFTDataModule(**{"train": TRAIN, "val": ROWS[:6], "tokens_per_batch": 150, "cache": None, **self.data})
        with patch.object(saving, "_KNOWN", (*saving._KNOWN, "tests", "__main__")):  # which change no weights
            trainer.fit(module, data, ckpt_path=newest([where]))
        weights = {n: w.full_tensor() if isinstance(w, DTensor) else w for n, w in module.state_dict().items()}
        if trainer.is_global_zero:
            torch.save(weights, folder / "weights")
        return trainer


_MEASURED = re.compile(r"seconds|per_second|memory|mfu|flops")  # names of metrics that may differ
MIXTURE = Mixture({"a": Part(TRAIN[:20], share=2), "b": Part(TRAIN[20:], share=1)})
STREAM = {"streaming": True, "buffer_rows": 12}
RUNS = {
    "packed": Run(),
    "padded": Run({"packing": "padded", "num_workers": 2}, {"accumulate_grad_batches": 3}),
    "mixture": Run({"train": MIXTURE}, {"val_check_interval": 4}, every_n_train_steps=1),
    "stream": Run({**STREAM, "num_workers": 0}, {"max_steps": 30}, every_n_train_steps=3),
    "stream_workers": Run({**STREAM, "num_workers": 2}, {"max_steps": 20}),
    "ddp": Run({}, {}, ranks=2),
    "fsdp2": Run({}, {"strategy": "fsdp2"}, ranks=2),  # checkpoints are folders
    "background": Run({}, {}, in_background=True, every_n_train_steps=1),
    "ddp_background": Run({}, {}, ranks=2, in_background=True, every_n_train_steps=1),
    "fsdp2_background": Run({}, {"strategy": "fsdp2"}, ranks=2, in_background=True, every_n_train_steps=1),
    "address": Run({}, {}, protocol="local://", in_background=True),
    "fsdp2_address": Run({}, {"strategy": "fsdp2"}, ranks=2, protocol="local://"),
    "fsdp2_address_background": Run({}, {"strategy": "fsdp2"}, 2, 1, protocol="local://", in_background=True),
    "ddp_four": Run({}, {"accumulate_grad_batches": 1}, ranks=4),  # whose sums are not those of two in another order
    "ddp_stream": Run({**STREAM, "num_workers": 0}, {"max_steps": 20}, ranks=2),
}


class Losses(Callback):
    """Appends the loss of each optimizer step to a file, to the bit."""

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
    """Kills this process the n-th time that it is at a place; a signal tells it to end, in a forward pass."""

    SIGNALS: ClassVar = {"told": signal.SIGTERM, "interrupted": signal.SIGINT}
    PLACES = ("forward", "step", "validation", "writing", "saved", "epoch", *SIGNALS)

    def __init__(self, place: str, number: int, is_last_rank: bool = True) -> None:
        self.place, self.number, self.seen, self.signal = place, number, 0, signal.SIGKILL
        if place in self.SIGNALS:  # one of the ranks alone
            self.place, self.signal = "forward" if is_last_rank else "nowhere", self.SIGNALS[place]

    def at(self, place: str) -> None:
        self.seen += place == self.place
        if self.seen == self.number and place == self.place:
            os.kill(os.getpid(), self.signal)

    def setup(self, trainer: Any, module: Any, stage: str) -> None:
        write, publish = torch.save, os.fsync

        def save(checkpoint: Any, file: Any, *args: Any) -> None:
            write(checkpoint, file, *args)
            if isinstance(file, Path):  # no checkpoint
                return
            if self.place == "writing" and self.seen + 1 == self.number:  # half of it has reached the disk
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


def metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without what depends on the clock or the machine."""
    lines = [line for line, _ in lines_of(folder / METRICS_FILE)]
    return [{name: value for name, value in line.items() if not _MEASURED.search(name)} for line in lines]


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
        if -signal.SIGKILL in codes.values() or time.monotonic() > end:
            time.sleep(0.5)
            for process in set(processes) - codes.keys():
                os.kill(process, signal.SIGKILL)
                os.waitpid(process, 0)
                codes[process] = -9
        time.sleep(0.005)
    return [codes[process] for process in processes]


def attempt(run: Run, pretrained: str, folder: Path, place: str = "never", number: float = 0) -> bool:
    """Run it in processes of its own, killed at a place, or ``after`` so many seconds. Whether it came to its end."""

    def work(rank: int) -> None:
        no_kill = place in ("never", "after")
        run.fit(pretrained, folder, *([] if no_kill else [KillAt(place, int(number), rank == run.ranks - 1)]))

    processes = forked(work, run.ranks)
    if place == "after":
        time.sleep(number)
        for process in processes[int(number * 1000) % len(processes) :]:  # one or all of the ranks
            os.kill(process, signal.SIGKILL)
    codes = wait(processes)
    is_told = place in KillAt.SIGNALS
    expected = {0}, {EX_TEMPFAIL} if is_told else {-signal.SIGKILL}
    if set(codes) not in expected and not (not is_told and -signal.SIGKILL in codes):
        raise RuntimeError(f"{place} {number} in {folder}: exit codes {codes}")
    return not any(codes)


def compare(whole: Path, killed: Path) -> list[str]:
    """In what a run that was killed differs from one that was not."""
    weights = [torch.load(folder / "weights", weights_only=True).values() for folder in (whole, killed)]
    same = {
        "losses": losses(whole) == losses(killed),
        "weights": all(torch.equal(a, b) for a, b in zip(*weights, strict=True)),
        "ledger": (whole / "samples.jsonl").read_bytes() == (killed / "samples.jsonl").read_bytes(),
        "metrics": metrics(whole) == metrics(killed),
    }
    return [name for name, equal in same.items() if not equal]


def drawn(random_: random.Random, number: int, seconds: float) -> list[tuple[str, float]]:
    """Kills at random places, and at random times."""
    places = random_.choices(("after", *KillAt.PLACES), k=number)
    return [(p, random_.uniform(0.1, seconds) if p == "after" else random_.randint(1, 6)) for p in places]


def killed(
    name: str, pretrained: str, root: Path, plan: int | list[tuple[str, float]], run: Run | None = None
) -> dict[str, Any]:
    """A run as it is, and others that are killed until all kills have been; says where they differ."""
    run, whole, begin = run or RUNS[name], root / name / "whole", time.monotonic()
    assert attempt(run, pretrained, whole)
    seconds = time.monotonic() - begin
    left = plan if isinstance(plan, list) else drawn(random.Random(name), plan, seconds)
    differ: dict[str, list[str]] = {}
    count, total = 0, len(left)
    while left:
        folder, own = root / name / f"killed{len(left)}", list(left)
        while not attempt(run, pretrained, folder, *(left[0] if left else ())):
            count, left = count + 1, left[1:]
        if found := compare(whole, folder):
            differ[str(own[: len(own) - len(left)])] = found
        left = left[1:] if len(left) == len(own) else left  # a kill that no run lives to see
    return {"run": name, "steps": len(losses(whole)), "kills": count, "of": total, "differ": differ}


def elastic(root: Path) -> dict[str, Any]:
    """A run of one rank, killed, goes on with two ranks and half the micro-batches of each, and with one again."""
    pretrained = tiny_pretrained(root / "without_dropout")
    one, two = (Run(trainer={"accumulate_grad_batches": 4 // n}, ranks=n, every_n_train_steps=1) for n in (1, 2))
    whole, folder = root / "elastic" / "whole", root / "elastic" / "killed"
    assert attempt(one, pretrained, whole)
    assert not attempt(one, pretrained, folder, "forward", 6)  # inside the second step
    assert not attempt(two, pretrained, folder, "step", 5)
    assert attempt(one, pretrained, folder)
    ledgers = [[line for line, _ in lines_of(path / "samples.jsonl")] for path in (whole, folder)]
    samples = [[sorted(s for rank in x["samples"] for micro in rank for s in micro) for x in own] for own in ledgers]
    pairs = zip(*([line["loss"] for line in own] for own in ledgers), strict=True)
    return {
        "run": "elastic",
        "ranks": [len(line["samples"]) for line in ledgers[1]],
        "same_samples": samples[0] == samples[1],
        "furthest": max(abs(a - b) / a for a, b in pairs),
    }


if __name__ == "__main__":
    given, where, plans = sys.argv[1:]
    for name_, plan_ in json.loads(plans).items():
        result = elastic(Path(where)) if name_ == "elastic" else killed(name_, given, Path(where), plan_)
        print(json.dumps(result), flush=True)
