"""Generation of answers to prompts, greedy or sampled."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from lightning_sft.data.batches.loader import PAD_ID, PromptBatch, PromptLoader
from lightning_sft.io.arguments import AboveZero, Index, NonNegative, check_arguments, made
from lightning_sft.io.named import our_names
from lightning_sft.machine.contexts import evaluating
from lightning_sft.model.backbone import language_model
from lightning_sft.model.limits import num_positions
from lightning_sft.training.checks import check_prompts
from lightning_sft.training.trainer import data_parallel, gather
from lightning_sft.types import InputError, Prompt, widest

if TYPE_CHECKING:
    from lightning_sft.module import SFTModule


@our_names
@dataclass(frozen=True)
class Sampling:
    """How the tokens of an answer are chosen.

    Args:
        temperature: Divisor of the logits; 0 for greedy decoding.
        top_p: Cumulative probability of the most likely tokens to sample from.
        top_k: Number of most likely tokens to sample from; 0 for all.
        seed: What is drawn is a function of the seed, of the number of the row, and of the number of the token: neither
            the batch that a row is in nor the number of devices has a say.
    """

    temperature: NonNegative = 0.0
    top_p: AboveZero = 1.0
    top_k: Index = 0
    seed: Index = 0

    def __post_init__(self) -> None:
        check_arguments(Sampling, vars(self))

    @classmethod
    def of(cls, given: Sampling | Mapping[str, Any] | None) -> Sampling:
        """The same from the plain dictionary that a checkpoint has of it."""
        found: Sampling = made(cls, {} if given is None else given)
        return found


def draw(logits: Tensor, uniform: Tensor, sampling: Sampling) -> Tensor:
    """The token of each row that a number between 0 and 1 stands for, ``[B]``.

    The intervals of the tokens, as long as their probabilities, lie side by side in the order of the vocabulary.

    Args:
        logits: ``[B, V]``.
        uniform: ``[B]``, float64, or float32 where the device has no other.
        sampling: Sampling settings with a positive temperature.

    >>> logits = torch.tensor([[0.0, 2.0, 1.0]])
    >>> [draw(logits, torch.tensor([u]).double(), Sampling(1.0)).item() for u in (0.05, 0.2, 0.99)]
    [0, 1, 2]
    >>> draw(logits, torch.tensor([0.99]).double(), Sampling(1.0, top_p=0.5)).item()
    1
    """
    scaled = logits.to(widest(logits.device)) / sampling.temperature
    if sampling.top_k:
        kept = scaled.topk(min(sampling.top_k, scaled.shape[1])).values[:, -1:]
        scaled = scaled.masked_fill(scaled < kept, -torch.inf)
    probabilities = scaled.softmax(-1)
    if sampling.top_p < 1:
        ordered, places = probabilities.sort(descending=True)
        ordered[ordered.cumsum(-1) - ordered >= sampling.top_p] = 0  # before them are tokens enough
        probabilities = torch.zeros_like(ordered).scatter(1, places, ordered)
    ends = probabilities.cumsum(-1)
    token = torch.searchsorted(ends, uniform[:, None] * ends[:, -1:], right=True).squeeze(1)
    last = (probabilities > 0).long().cumsum(-1).argmax(-1)  # rounding must not lead beyond it
    return torch.minimum(token, last)


class _Drawing:
    """A logits processor of transformers that leaves one token to choose from."""

    def __init__(self, numbers: Sequence[int], begin: int, most: int, sampling: Sampling) -> None:
        uniform = [np.random.default_rng([sampling.seed, number]).random(most) for number in numbers]
        self.uniform, self.begin, self.sampling = torch.from_numpy(np.stack(uniform)), begin, sampling

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        uniform = self.uniform[:, input_ids.shape[1] - self.begin].to(scores.device, widest(scores.device))
        chosen = draw(scores, uniform, self.sampling)
        return torch.full_like(scores, -torch.inf).scatter(1, chosen[:, None], 0.0)


def answers(
    model: PreTrainedModel,
    batch: PromptBatch,
    max_new_tokens: int,
    sampling: Sampling | None = None,
    in_step: bool = False,
    streamer: Any = None,
    skip_special_tokens: bool = True,
) -> list[dict[str, Any]]:
    """Answers of a transformers model: one row a prompt.

    An answer ends with the stop token that training teaches, or with one of the model's generation config, of which
    nothing else is used; or where the model has no position left.

    Args:
        model: Model in evaluation mode.
        batch: Prompts to answer.
        max_new_tokens: Maximum number of tokens of an answer.
        sampling: Sampling settings; greedy by default.
        in_step: Whether all ranks have to take equally many steps, since they share the model.
        streamer: Transformers streamer that gets the tokens of a single prompt as they are generated.
        skip_special_tokens: Whether predictions are without control tokens.

    Returns:
        Rows of ``source`` (``file:line``), ``prediction`` and ``reference`` (``None`` where the data has none).

    Raises:
        InputError: When the batch is of another kind, or a prompt leaves the model no position for an answer.
    """
    if not isinstance(batch, PromptBatch):
        raise InputError(
            f"predict answers prompts of SFTDataModule (data.predict), got a batch of {type(batch).__name__}. "
            "Use it, or give your subclass a predict_step."
        )
    check_prompts(batch.prompts, num_positions(model))
    left = room(model, batch.prompts)
    if left < max_new_tokens and len(batch.prompts) > 1 and not in_step:  # of each row as many as it has by itself
        alone = (PromptBatch([prompt], batch.tokenizer).to(batch.input_ids.device) for prompt in batch.prompts)
        return [row for one in alone for row in answers(model, one, max_new_tokens, sampling)]
    most, begin = int(min(max_new_tokens, left)), batch.input_ids.shape[1]
    model, sampling = language_model(model), sampling or Sampling()
    numbers = [prompt.number for prompt in batch.prompts]
    of_model = model.generation_config.eos_token_id
    stops = {*(of_model if isinstance(of_model, list) else [of_model]), *batch.stop_ids} - {None}
    settings = GenerationConfig(max_new_tokens=most, pad_token_id=PAD_ID, eos_token_id=sorted(stops) or None)
    with _generating_as(model, settings):
        generated: Any = cast(Any, model).generate(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            logits_processor=[_Drawing(numbers, begin, most, sampling)] if sampling.temperature else [],
            synced_gpus=in_step,
            streamer=streamer,
        )
    found = [_until(stops, row) for row in generated[:, begin:].tolist()]
    texts = batch.tokenizer.batch_decode(found, skip_special_tokens=skip_special_tokens)
    return [
        {"source": prompt.provenance, "prediction": text, "reference": prompt.reference}
        for prompt, text in zip(batch.prompts, texts, strict=True)
    ]


def room(model: PreTrainedModel, prompts: Sequence[Prompt]) -> float:
    """The number of tokens that an answer to the longest prompt may have; infinite where positions are computed."""
    positions = num_positions(model)
    return math.inf if positions is None else positions - max(len(prompt.input_ids) for prompt in prompts)


@contextmanager
def _generating_as(model: PreTrainedModel, settings: GenerationConfig) -> Iterator[None]:
    """With these settings alone: transformers would complete what it is given with those of the model."""
    before, model.generation_config = model.generation_config, settings
    try:
        yield
    finally:
        model.generation_config = before


def _until(stops: Collection[int | None], ids: list[int]) -> list[int]:
    """The ids up to a stop token; a row that has ended before others is filled up behind it."""
    return ids[: next((number for number, token in enumerate(ids, 1) if token in stops), len(ids))]


def answer_all(
    module: SFTModule,
    prompts: Sequence[Prompt],
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int = 16,
    max_new_tokens: int | None = None,
    sampling: Sampling | None = None,
) -> list[dict[str, Any]]:
    """The rows of :func:`answers` to prompts, in their order, in the middle of a training too: every rank calls it.

    Ranks share the prompts out. Those that share a model get equally many, some twice, so that they keep in step; where
    its positions are a table, the longest prompt then says how long any answer may be.

    Args:
        module: An ``SFTModule`` with a trainer.
        prompts: Prompts, the same on all ranks; at least one.
        tokenizer: Tokenizer of the model.
        batch_size: Prompts that are answered at a time.
        max_new_tokens: Maximum number of tokens of an answer; as the module says by default.
        sampling: Sampling settings; by default those of the module.

    Raises:
        InputError: When a prompt is beyond the model's positions.
    """
    assert module.model is not None
    assert module.scorer is not None
    rank, num_ranks = data_parallel(module.trainer)
    strategy = module.trainer.strategy
    in_step = strategy.restore_checkpoint_after_setup  # as those have it that shard the model
    places = list(range(rank, len(prompts), num_ranks))
    if in_step and len(places) < -(-len(prompts) // num_ranks):
        places.append(0)
    most, how = max_new_tokens or module.max_new_tokens, sampling or module.sampling
    check_prompts(prompts, num_positions(module.model))
    if in_step:
        most = int(min(most, room(module.model, prompts)))  # the same on all ranks
    rows: list[dict[str, Any]] = []
    with evaluating(module):
        for batch in PromptLoader([prompts[i] for i in places], tokenizer, batch_size):
            rows += module.scorer(batch.to(module.device), lambda model, own: answers(model, own, most, how, in_step))
    found = dict(pair for share in gather(module.trainer, list(zip(places, rows, strict=True))) for pair in share)
    return [found[i] for i in range(len(prompts))]
