"""``lightning-sft replay``: recompute the batch and the loss of an optimizer step, sample by sample."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from threading import Barrier
from typing import Any, cast

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from rich.box import SIMPLE_HEAD
from rich.table import Table

from lightning_sft.checkpoints.reading import Checkpoint
from lightning_sft.checkpoints.resume import seed_micro_batch
from lightning_sft.checkpoints.run_files import LEDGER_FILE, line_of
from lightning_sft.checkpoints.writing import folders_of
from lightning_sft.commands.base import ConfigCLI
from lightning_sft.data.batches.stream import StreamLoader
from lightning_sft.datamodule import SFTDataModule
from lightning_sft.evaluation.metrics import metrics_of, sums
from lightning_sft.io.arguments import Count, Index, check_arguments
from lightning_sft.machine.terminal import Console
from lightning_sft.module import SFTModule
from lightning_sft.training.checks import OF_USERS
from lightning_sft.types import Batch, InputError, LogLikelihood

_ROUNDING = 1e-3  # of a sum of float32 losses, and of a forward pass on samples one by one


@dataclass(frozen=True)
class Sample:
    """A sample's contribution to the loss of a step.

    Args:
        provenance: Source of the row, ``file:line``.
        rank: Data-parallel rank that processed the sample.
        micro_batch: Number of the micro-batch in the step, from 1.
        num_targets: Number of target tokens.
        loss: Weighted mean of the loss of the targets: −log Pr in nats, or the module's own loss.
        share: Share of the step's loss; ``None`` where the loss of a micro-batch is no sum over samples.
    """

    provenance: str
    rank: int
    micro_batch: int
    num_targets: int
    loss: float
    share: float | None


@dataclass(frozen=True)
class Replay:
    """A replayed step.

    Args:
        step: Number of the step, from 1.
        logged: Loss that the run logged, or ``None``.
        loss: Recomputed loss.
        weights: Source of the weights: a checkpoint, or the pretrained weights.
        is_exact: Whether these are the weights that the step started from.
        samples: Samples of the step, largest share of the loss first.
    """

    step: int
    logged: float | None
    loss: float
    weights: str
    is_exact: bool
    samples: Sequence[Sample]


def replay(
    data: LightningDataModule,
    module: LightningModule,
    trainer: Any,
    step: Count,
    ledger: str | Path | None = None,
    weights_of: str | Path | None = None,
    rows: Index = 20,
) -> Replay:
    """Rebuild the batch of an optimizer step from the ledger, and recompute its loss from a checkpoint.

    Args:
        data: Data module, configured as for ``fit``.
        module: Module, configured as for ``fit``.
        trainer: Settings of the trainer; ranks and accumulation are taken from the ledger.
        step: Number of the step, from 1, as in loggers and the ledger.
        ledger: Path of the run's ``samples.jsonl``; by default the newest below ``trainer.default_root_dir``.
        weights_of: Checkpoint with the weights; by default the last existing one before the step.
        rows: Number of samples to print, largest share of the loss first.

    Raises:
        InputError: When there is no ledger, the step is not in it, or the data have changed.
    """
    if not isinstance(data, SFTDataModule) or not isinstance(module, SFTModule):
        raise InputError("replay needs an SFTModule and an SFTDataModule, or subclasses of them.")
    check_arguments(replay, locals())
    root = Path(trainer.default_root_dir or ".")
    path = Path(ledger) if ledger else _newest_ledger(root)
    line = line_of(path, step)
    folders = [path.parent / "checkpoints", *folders_of(root)]
    found = Checkpoint(weights_of) if weights_of else _checkpoint_before(step, folders)
    _load(module, found)
    ranks = _batches(data, module, trainer, line, found)
    loss, samples = _losses(module, ranks, line, trainer)
    name, after = ("the pretrained weights", 0) if found is None else (str(found.path), found.step)
    result = Replay(step, line["loss"], loss, name, after == step - 1, samples)
    _show(result, line, after, rows, type(module))
    return result


class ReplayCLI(ConfigCLI):
    """The command line of ``fit`` with the arguments of :func:`replay`; its ``result`` is a :class:`Replay`."""

    verb = staticmethod(replay)


def _newest_ledger(root: Path) -> Path:
    found = [*root.glob(LEDGER_FILE), *root.glob(f"*/*/{LEDGER_FILE}")]
    if not found:
        raise InputError(f"There is no {LEDGER_FILE} below {root}. Give its path with --ledger.")
    return max(found, key=lambda path: path.stat().st_mtime_ns)


def _checkpoint_before(step: int, folders: Iterable[Path]) -> Checkpoint | None:
    """The last checkpoint before a step."""
    before: list[Checkpoint] = []
    for path in {path.resolve() for folder in folders for path in folder.glob("*.ckpt")}:
        checkpoint = Checkpoint(path)
        try:
            if "global_step" in checkpoint.metadata and checkpoint.step < step:
                before.append(checkpoint)
        except InputError:  # incomplete
            continue
    return max(before, key=lambda checkpoint: checkpoint.step, default=None)


def _load(module: SFTModule, found: Checkpoint | None) -> None:
    """Load the weights of a checkpoint, or the pretrained weights."""
    if found is None:
        module.configure_model()
        return
    module._settle(hf_config=found.hyper_parameters["hf_config"])
    module.configure_model()
    checkpoint = found.whole()
    module.on_load_checkpoint(checkpoint)
    module.load_state_dict(checkpoint["state_dict"], strict=module.strict_loading)


def _batches(
    data: SFTDataModule, module: SFTModule, trainer: Any, line: Mapping[str, Any], found: Checkpoint | None
) -> list[list[Batch]]:
    """The micro-batches of each rank, rebuilt from the current data.

    Raises:
        InputError: When the samples are not those of the ledger.
    """
    samples = line["samples"]
    data = data.preview(module, trainer, reads_stream=True)
    paper = cast(Any, data.trainer)
    paper.accumulate_grad_batches, paper.current_epoch = line["accumulate"], line["epoch"]
    paper.fit_loop.epoch_loop.batch_progress.current.ready = line["micro_batch"]
    data.num_workers, exchange = 0, _Exchange(len(samples))

    def loader(rank: int) -> Any:
        paper.distributed_sampler_kwargs = {"rank": rank, "num_replicas": len(samples)}
        made = data.train_dataloader()
        if isinstance(made, StreamLoader):
            made.gather = partial(exchange.gather, rank)
            states = [] if found is None else found.metadata["loops"]["fit_loop"]["state_dict"]["combined_loader"]
            made.load_state_dict(states[0]) if states else None
        return made

    loaders = [loader(rank) for rank in range(len(samples))]
    with ThreadPoolExecutor(len(loaders)) as pool:  # in parallel, since ranks of a stream wait for each other
        ranks = list(pool.map(exchange.guarded(lambda own: list(islice(own, len(samples[0])))), loaders))
    for rank, (batches, were) in enumerate(zip(ranks, samples, strict=True)):
        now = [[name for name in batch.provenance if name != "padding"] for batch in batches]
        if now != were:
            raise InputError(
                f"The data have changed since step {line['step']}: rank {rank} had {were}, now {now}. Replay with the "
                "config and the files of the run."
            )
    return ranks


class _Exchange:
    """An ``all_gather`` between threads."""

    def __init__(self, number: int) -> None:
        self.shares: list[Any] = [None] * number
        self.barrier = Barrier(number)

    def gather(self, rank: int, share: Any) -> list[Any]:
        """Gather the shares of all threads; each must call this."""
        self.shares[rank] = share
        self.barrier.wait()
        found = list(self.shares)
        self.barrier.wait()
        return found

    def guarded(self, work: Callable[[Any], list[Batch]]) -> Callable[[Any], list[Batch]]:
        """Wrap a function so that its failure releases the other threads."""

        def run(own: Any) -> list[Batch]:
            try:
                return work(own)
            except BaseException:
                self.barrier.abort()
                raise

        return run


def _losses(
    module: SFTModule, ranks: Sequence[Sequence[Batch]], line: Mapping[str, Any], trainer: Any
) -> tuple[float, list[Sample]]:
    """The loss of the step and of each sample, computed as in training, including dropout.

    A sample's own is the sum over its targets, or, where a ``forward`` of the user's own adds something to that, what
    it gives for the sample alone.
    """
    device = "cuda" if trainer.accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available() else "cpu"
    precision = str(trainer.precision or "32-true")
    dtype = torch.float16 if precision.startswith("16") and device == "cuda" else torch.bfloat16
    module.to(device, *([dtype] if precision in ("16-true", "bf16-true") else [])).train()
    totals, found, has_shares = [], [], True
    for rank, batches in enumerate(ranks):
        for number, batch in enumerate(batch.to(device) for batch in batches):

            def computed(own: Batch, at: int = line["micro_batch"] + number, rank: int = rank) -> LogLikelihood:
                if line["seed"] is not None:
                    seed_micro_batch(line["seed"], line["epoch"], at, rank)
                with torch.autocast(device, dtype, enabled=precision.endswith("-mixed")):
                    likelihood: LogLikelihood = module(own)
                return likelihood.detached()

            likelihood = computed(batch)
            totals.append(sums(likelihood).cpu())
            documents, w = (batch.at_targets(x).cpu() for x in (batch.documents(), batch.target_weights))
            count, w = len(batch.provenance), w.double()
            of_targets = -likelihood.log_probs if likelihood.losses is None else likelihood.losses
            own = torch.bincount(documents, w * of_targets.cpu().double(), count).double()  # of none, it is of integers
            weight, targets = torch.bincount(documents, w, count).tolist(), torch.bincount(documents, minlength=count)
            if not _adds_up(own, likelihood):
                alone = _alone(computed, batch, weight)
                has_shares = has_shares and alone is not None and _adds_up(alone, likelihood)
                own = alone if alone is not None and has_shares else own
            for document, name in enumerate(batch.provenance):
                if weight[document]:
                    of_sample = own[document].item()
                    mean = of_sample / weight[document]
                    found.append(Sample(name, rank, number + 1, int(targets[document]), mean, of_sample))
    total = torch.stack(totals).sum(0)
    whole = total[0].item()
    by_share = sorted(found, key=lambda sample: -cast(float, sample.share))
    samples = [replace(s, share=cast(float, s.share) / (whole or 1) if has_shares else None) for s in by_share]
    return metrics_of(total)["loss"].float().item(), samples


def _adds_up(of_documents: torch.Tensor, likelihood: LogLikelihood) -> bool:
    whole = -likelihood.total.cpu().double()
    return bool(torch.isclose(of_documents.sum(), whole, rtol=_ROUNDING, atol=_ROUNDING, equal_nan=True))


def _alone(computed: Callable[[Batch], LogLikelihood], batch: Batch, weight: Sequence[float]) -> torch.Tensor | None:
    """The loss of each document of a batch in a batch of its own; ``None`` where the module takes none alone."""
    try:
        with torch.no_grad():
            found = [-computed(batch.document(n)).total.item() if own else 0.0 for n, own in enumerate(weight)]
    except OF_USERS:
        return None
    return torch.tensor(found, dtype=torch.float64)


def _show(result: Replay, line: Mapping[str, Any], after: int, rows: int, kind: type[SFTModule]) -> None:
    console = Console(soft_wrap=True, highlight=False)
    console.width = max([console.width, *(80 + len(sample.provenance) for sample in result.samples[:rows])])
    if kind.training_step is not SFTModule.training_step:
        console.print(f"Recomputed by forward: what {kind.__name__}.training_step adds or logs by itself is not in it.")
    if any(sample.share is None for sample in result.samples):
        console.print(
            f"{kind.__name__}.forward gives a loss that is no sum over samples, so none has a share. The losses of "
            "samples are without what it adds to those of their targets."
        )
    table = Table("share of the loss", "loss", "targets", "rank", "micro-batch", "sample", box=SIMPLE_HEAD)
    for sample in result.samples[:rows]:
        where = str(sample.rank), str(sample.micro_batch), sample.provenance
        share = "" if sample.share is None else f"{sample.share:.1%}"
        table.add_row(share, f"{sample.loss:.4f}", f"{sample.num_targets:,}", *where)
    logged = "no loss" if result.logged is None else f"a loss of {result.logged:.6f}"
    console.print(f"Step {result.step}, in epoch {line['epoch']}: {logged} was logged, recomputed {result.loss:.6f}.")
    if result.is_exact:
        console.print(f"Weights: those the step started from, {result.weights}.")
    else:
        console.print(f"Weights: not those the step started from, but those after step {after}: {result.weights}.")
    console.print(table)
    if len(result.samples) > rows:
        console.print(f"{len(result.samples) - rows} more: --rows {len(result.samples)}")
