"""Random SIGKILLs of runs over 1, 2 and 4 ranks, and what differs afterwards.

python -m tests.kills FOLDER FIRST_SEED KILLS [PAGE]

draws runs until there were so many kills, and adds a line for each run to FOLDER/results.jsonl, from which it continues
when it is started again; with a page, it writes its table there, of all runs in the folder.

A run saves in the background or in line, as drawn for each attempt. At a random time of a random step, one of its
processes or all of them are killed, and it is started again, until it ends. A run either keeps its ranks, and is
compared to the bit with one that was never killed; or draws them again for each attempt, and is compared with a single
process, of whose sums it changes the order. Those have no dropout, which differs between ranks, and SGD, since Adam
makes much of the rounding of small gradients.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.optim import SGD

from lightning_sft.checkpoints.reading import Checkpoint
from lightning_sft.checkpoints.run_files import LEDGER_FILE, METRICS_FILE, lines_of, record_of
from lightning_sft.demos import tiny_pretrained
from lightning_sft.strategies import FSDP2Strategy
from tests.helpers.resuming import Run, forked, wait

MICRO_BATCHES = 4  # of a step, on all ranks
TOLERANCE = 1e-6
MOST_KILLS = 6  # of a run


@dataclass(frozen=True)
class Layout:
    """How a run is divided among processes."""

    title: str
    ranks: int = 1
    context: int = 0  # ranks that share a row, under fsdp2; 0 where checkpoints are files

    def run(self, changes: bool, in_background: bool = True) -> Run:
        """The run: 20 steps, a validation after every fourth, and a checkpoint after each.

        Args:
            changes: Whether it is one that changes its ranks.
            in_background: Whether it saves in the background.
        """
        strategy: Any = "ddp" if self.ranks > 1 else "auto"
        if self.context:
            strategy = FSDP2Strategy(context_parallel_size=self.context)
        accumulate = MICRO_BATCHES * max(self.context, 1) // self.ranks
        trainer = {"strategy": strategy, "accumulate_grad_batches": accumulate, "max_epochs": 5}
        model = {"optimizer": partial(SGD, lr=0.05, momentum=0.9)} if changes else {}
        return Run({}, trainer, self.ranks, 1, model, in_background)


LAYOUTS = {
    layout.title: layout
    for layout in (
        Layout("one process"),
        Layout("ddp on 2", 2),
        Layout("ddp on 4", 4),
        Layout("fsdp2 on 1", 1, 1),
        Layout("fsdp2 on 2", 2, 1),
        Layout("fsdp2 on 4", 4, 1),
        Layout("context parallel on 2", 2, 2),
        Layout("context parallel on 2 × 2", 4, 2),
    )
}

FAMILIES = {
    **{title: [title] for title in LAYOUTS},
    "files: ranks change": [title for title, layout in LAYOUTS.items() if not layout.context],
    "shards: ranks change": [title for title, layout in LAYOUTS.items() if layout.context],
}


def attempt(layout: Layout, changes: bool, pretrained: str, folder: Path, of: random.Random | None) -> bool | None:
    """Start a run, or resume it, and kill it at a random time.

    Args:
        layout: Its ranks.
        changes: Whether they change from attempt to attempt.
        pretrained: Folder of the model.
        folder: Folder of the run.
        of: What is drawn from; a run without it is not killed.

    Returns:
        Whether it was killed; ``None`` where it has ended before.
    """
    in_background = of is None or of.random() < 0.75
    run = layout.run(changes, in_background)

    def work(rank: int) -> None:
        run.fit(pretrained, folder)

    processes = forked(work, layout.ranks)
    if of is not None:
        wait_for_steps(folder, processes, of.randint(0, 6), of.random())
        chosen = processes if of.random() < 0.5 else [of.choice(processes)]
        for process in chosen:
            os.kill(process, signal.SIGKILL)  # one that has ended is a zombie still
    codes = wait(processes)
    if not any(codes):
        return None
    if -signal.SIGKILL not in codes:
        raise RuntimeError(f"exit codes {codes}")
    return True


def wait_for_steps(folder: Path, processes: list[int], number: int, part: float) -> None:
    """Wait until so many steps were taken, and a part of the time of a step; or a process has ended."""

    def count() -> int:
        with suppress(FileNotFoundError):
            return (folder / "losses").read_bytes().count(b"\n")
        return 0

    taken, end = count(), time.monotonic() + 120
    wanted, changed, pace = taken + number, time.monotonic(), 1.0
    while taken < wanted and time.monotonic() < end and not any(map(has_ended, processes)):
        time.sleep(0.005)
        if (now := count()) > taken:
            pace, taken, changed = time.monotonic() - changed, now, time.monotonic()
    time.sleep(part * min(pace, 3.0))


def has_ended(process: int) -> bool:
    """Whether a process has ended, without reaping it."""
    return os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def check_folder(folder: Path) -> None:
    """What must hold after each kill: all checkpoints are complete, and the files of the run reach up to the newest."""
    found = [Checkpoint(path) for path in (folder / "checkpoints").glob("*.ckpt")]
    assert all("callbacks" in one.metadata and one.weights() for one in found)
    newest_step = max((one.step for one in found), default=0)
    for name in (LEDGER_FILE, METRICS_FILE):
        steps = [line["step"] for line, _ in lines_of(folder / name)] if (folder / name).exists() else []
        assert max(steps, default=0) >= newest_step, f"{name} ends before the checkpoint of step {newest_step}"
    assert found or not record_of(folder).get("saved"), "run.json says that there is a checkpoint"


def differing_bits(a: torch.Tensor, b: torch.Tensor) -> int:
    """In how many bits two tensors differ."""
    one, other = (np.atleast_1d(tensor.numpy()).view(np.uint8) for tensor in (a, b))
    return int(np.unpackbits(one ^ other).sum())


def facts_of(folder: Path) -> dict[str, Any]:
    """What a run leaves, without what depends on the clock."""
    metrics = [line for line, _ in lines_of(folder / METRICS_FILE)]
    kept = ("step", "epoch", "train/loss", "val/loss", "train/grad_norm", "lr")
    losses = [line.split() for line in (folder / "losses").read_text().splitlines()]
    return {
        "losses": [(int(step), float.fromhex(loss)) for step, loss in losses],
        "weights": torch.load(folder / "weights", weights_only=True),
        "ledger": [line for line, _ in lines_of(folder / LEDGER_FILE)],
        "metrics": [{name: line[name] for name in kept if name in line} for line in metrics],
    }


def samples_of(line: dict[str, Any]) -> list[str]:
    """The samples of a step, whichever ranks had them."""
    return sorted(sample for rank in line["samples"] for micro_batch in rank for sample in micro_batch)


def compared(whole: Path, killed: Path, changes: bool) -> dict[str, Any]:
    """How a run that was killed differs from one that was not: in bits, or in the furthest loss, relative."""
    own, other = facts_of(whole), facts_of(killed)
    of_step = dict(own["losses"])
    samples = [[samples_of(line) for line in facts["ledger"]] for facts in (own, other)]
    found: dict[str, Any] = {"samples differ": samples[0] != samples[1]}
    found["steps differ"] = [line["step"] for line in own["ledger"]] != [line["step"] for line in other["ledger"]]
    if changes:
        found["furthest"] = max(abs(loss - of_step[step]) / of_step[step] for step, loss in other["losses"])
        weights = [(own["weights"][name], weight) for name, weight in other["weights"].items()]
        found["furthest weight"] = max(float((a - b).norm() / a.norm()) for a, b in weights)
    else:
        losses = torch.tensor([[of_step[step], loss] for step, loss in other["losses"]])
        bits = differing_bits(*losses.T.contiguous())
        bits += sum(differing_bits(own["weights"][name], weight) for name, weight in other["weights"].items())
        found["bits"] = bits
        found["ledger differs"] = own["ledger"] != other["ledger"]
        found["metrics differ"] = own["metrics"] != other["metrics"]
    return found


def killed(seed: int, family: str, pretrained: str, root: Path) -> dict[str, Any]:
    """Draw a run of a family, kill it at up to six times, and compare it when it has ended."""
    of, titles = random.Random(seed), FAMILIES[family]
    changes = len(titles) > 1
    whole, folder = root / f"whole {'changes' if changes else family}", root / f"seed {seed}"
    if not (whole / "weights").exists():
        shutil.rmtree(whole, ignore_errors=True)
        first = LAYOUTS["one process"] if changes else LAYOUTS[titles[0]]
        attempt(first, changes, pretrained, whole, None)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    kills, ranks, is_over = 0, [], False
    while not is_over:
        layout = LAYOUTS[of.choice(titles)]
        is_over = attempt(layout, changes, pretrained, folder, of if kills < MOST_KILLS else None) is None
        kills += not is_over
        ranks.append(layout.ranks)
        check_folder(folder)
    steps = [start["step"] for start in record_of(folder)["starts"]]
    result = {"seed": seed, "family": family, "kills": kills, "ranks": ranks, "steps of starts": steps}
    result |= compared(whole, folder, changes)
    shutil.rmtree(folder)
    return result


def is_bad(result: dict[str, Any]) -> bool:
    """Whether a run differs in what it must not."""
    named = any(value for name, value in result.items() if "differ" in name)
    return named or bool(result.get("bits")) or result.get("furthest", 0.0) > TOLERANCE or "error" in result


def kill(root: Path, first: int, wanted: int) -> list[dict[str, Any]]:
    """Draw runs until there were so many kills, families in turn; results stand in a file, which is read again."""
    root.mkdir(parents=True, exist_ok=True)
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    pretrained = tiny_pretrained(root / "model", **heads)
    dropping = tiny_pretrained(root / "dropping", attention_dropout=0.3, **heads)
    path = root / "results.jsonl"
    results = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    seed = first + len(results)
    while sum(result["kills"] for result in results) < wanted:
        family = list(FAMILIES)[seed % len(FAMILIES)]
        has_dropout = not (len(FAMILIES[family]) > 1 or family.startswith("context"))
        try:
            result = killed(seed, family, dropping if has_dropout else pretrained, root)
        except (RuntimeError, AssertionError, OSError) as error:
            result = {"seed": seed, "family": family, "kills": 0, "ranks": []}
            result["error"] = f"{type(error).__name__}: {error}"
        results.append(result)
        with path.open("a") as file:
            file.write(json.dumps(result) + "\n")
        seed += 1
    return results


def table(results: list[dict[str, Any]]) -> str:
    """The results of all runs, a line for each family."""
    lines = [
        "| ranks | runs | kills | differing bits | furthest loss | other samples, steps or files |",
        "|---|---|---|---|---|---|",
    ]
    for family in FAMILIES:
        own = [result for result in results if result["family"] == family]
        bits = sum(result["bits"] for result in own if "bits" in result) if len(FAMILIES[family]) == 1 else "–"
        furthest = [result["furthest"] for result in own if "furthest" in result]
        named = sum(any(value for name, value in result.items() if "differ" in name) for result in own)
        far = f"{max(furthest):.1e}" if furthest else "–"
        kills = sum(result["kills"] for result in own)
        lines.append(f"| {family} | {len(own)} | {kills} | {bits} | {far} | {named} |")
    failed = [result for result in results if "error" in result]
    total = sum(result["kills"] for result in results)
    return "\n".join(
        [*lines, "", f"In all {total} kills of {len(results)} runs; {len(failed)} runs ended with an error."]
    )


if __name__ == "__main__":
    where, first_seed, number, *page = sys.argv[1:]
    found_ = kill(Path(where), int(first_seed), int(number))
    print(json.dumps({"kills": sum(result["kills"] for result in found_), "bad": [r for r in found_ if is_bad(r)]}))
    for name_ in page:
        text = Path(name_).read_text(encoding="utf-8")
        between = r"(?<=<!-- table -->\n).*?(?=<!-- end -->)"
        new = re.sub(between, lambda _: f"\n{table(found_)}\n\n", text, flags=re.DOTALL)
        Path(name_).write_text(new, encoding="utf-8")
