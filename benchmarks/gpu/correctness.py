"""One step of a fit over a pack, against plain transformers in float32, eager, document by document.

The reference is none of ours: the model's own logits and ``cross_entropy``. What a precision costs by itself is
measured by the same reference in that precision, so ours fails where it is further from float32 than rounding explains.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset
from transformers import AutoModelForCausalLM

from benchmarks.gpu.shapes import architecture, write_model
from benchmarks.gpu.throughput import quiet
from benchmarks.record import Record
from lightning_sft import SFTModule
from lightning_sft.data.batches.collate import collate
from lightning_sft.demos import tiny_tokenizer
from lightning_sft.types import Example

PRECISIONS = ("32-true", "bf16-mixed", "16-mixed", "bf16-true")
_LENGTHS = (37, 5, 300, 129, 64, 201, 16, 272)
_DTYPES = {"32-true": None, "bf16-mixed": torch.bfloat16, "16-mixed": torch.float16, "bf16-true": torch.bfloat16}
_EXACT = {"loss": 1e-5, "gradient": 1e-4}  # relative errors that float32 may have
_ROUNDED = {"loss": 5e-4, "gradient": 3e-2}  # and that 16 bits may have in any case
_TIMES_STOCK = 2.0  # or as many times the error of the reference in the same precision

Gradients = dict[str, Tensor]


class _Keep(Callback):
    """Keeps the gradients of a fit's only step, and leaves the weights as they are."""

    def __init__(self) -> None:
        self.gradients: Gradients = {}

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """They are unscaled by now."""
        named = pl_module.model.named_parameters()
        self.gradients = {n: p.grad.detach().float().cpu() for n, p in named if p.grad is not None}


def documents(quick: bool) -> list[Example]:
    """Some documents of random tokens, of which about 60 % are targets."""
    random, lengths = Random(0), [max(3, n // 8) for n in _LENGTHS] if quick else _LENGTHS
    return [
        Example(
            [random.randrange(3, 250) for _ in range(length)],
            [0.0] + [float(random.random() < 0.6) for _ in range(length - 1)],
            str(number),
        )
        for number, length in enumerate(lengths)
    ]


def ours(
    folder: str, examples: list[Example], device: str, precision: str, **settings: Any
) -> tuple[float, Gradients, str]:
    """The loss and the gradients of one step of a fit over all documents in one pack, and the attention it chose."""
    weight = float(sum(sum(example.target_weights) for example in examples))
    module = SFTModule(folder, optimizer=partial(torch.optim.SGD, lr=0.0), schedule="constant", **settings)
    keep = _Keep()
    trainer = Trainer(**quiet(device), precision=precision, max_steps=1, log_every_n_steps=1, callbacks=[keep])
    trainer.fit(module, DataLoader(Batches(collate(examples, weight)), batch_size=None))
    return float(trainer.callback_metrics["train/loss"]), keep.gradients, str(module.attention)


class Batches(IterableDataset[Any]):
    """Batches in order, which Lightning does not shuffle."""

    def __init__(self, *batches: Any) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)


def reference(folder: str, examples: list[Example], device: str, precision: str = "32-true") -> tuple[float, Gradients]:
    """The same by plain transformers with eager attention, one document at a time."""
    dtype = torch.bfloat16 if precision == "bf16-true" else torch.float32
    loader = partial(AutoModelForCausalLM.from_pretrained, dtype=dtype, attn_implementation="eager")
    model = loader(folder).to(device).train()
    half, is_mixed = _DTYPES[precision], precision.endswith("mixed")
    scale = 1024.0 if half == torch.float16 else 1.0  # of the loss, so that gradients do not vanish
    weight, total = float(sum(sum(example.target_weights) for example in examples)), 0.0
    for example in examples:
        ids = torch.tensor([list(example.input_ids)], device=device)
        weights = torch.tensor(list(example.target_weights[1:]), device=device)
        context: AbstractContextManager[Any] = torch.autocast(device, half) if is_mixed else nullcontext()
        with context:
            logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
        loss = (weights * F.cross_entropy(logits.float(), ids[0, 1:], reduction="none")).sum() / weight
        (loss * scale).backward()
        total += loss.item()
    named = model.named_parameters()
    return total, {n: p.grad.detach().float().cpu() / scale for n, p in named if p.grad is not None}


def relative_error(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> float:
    """``‖found − wanted‖ / ‖wanted‖`` over all parameters.

    Raises:
        ValueError: When they are not gradients of the same parameters.

    >>> relative_error({"w": torch.tensor([3.0, 5.0])}, {"w": torch.tensor([3.0, 4.0])})
    0.2
    """
    if found.keys() != wanted.keys():
        raise ValueError(f"Gradients of {sorted(found.keys() ^ wanted.keys())[:5]} are there only once.")
    difference = sum(float((found[n] - wanted[n]).double().square().sum()) for n in wanted)
    return (difference / sum(float(wanted[n].double().square().sum()) for n in wanted)) ** 0.5


def errors(found: tuple[float, Gradients], wanted: tuple[float, Gradients]) -> dict[str, float]:
    """Relative errors of the loss and of the gradients."""
    return {"loss": abs(found[0] - wanted[0]) / abs(wanted[0]), "gradient": relative_error(found[1], wanted[1])}


def check(given: SimpleNamespace) -> None:
    """Check an architecture and record a line for each precision.

    Args:
        given: ``architecture``, ``precisions``, ``kernels`` (``None`` for the default), and what all cases get.
    """
    folder = Path(given.folder).parent / "model"
    model = write_model(folder, architecture(given.architecture, given.quick), tiny_tokenizer(), "cpu", given.seed)
    examples = documents(given.quick)
    wanted = reference(model, examples, given.device)
    settings: dict[str, Any] = {} if given.kernels is None else {"kernels": given.kernels}
    for precision in given.precisions:
        line: dict[str, Any] = {"precision": precision}
        try:
            loss, gradients, attention = ours(model, examples, given.device, precision, **settings)
            found = errors((loss, gradients), wanted)
            stock = errors(reference(model, examples, given.device, precision), wanted)
            floors = _EXACT if precision == "32-true" else _ROUNDED
            bounds = {name: max(floor, _TIMES_STOCK * stock[name]) for name, floor in floors.items()}
            passed = all(found[name] <= bounds[name] for name in bounds)
            line |= {"found": found, "stock": stock, "bounds": bounds, "attention": attention, "passed": passed}
        except Exception as error:  # of one precision: the others are still to be checked
            line |= {"error": f"{type(error).__name__}: {error}"[:600], "passed": False}
        Record(given.out).write(**line)
