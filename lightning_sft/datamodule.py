"""SFTDataModule: instruction data as planned, packed micro-batches."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_warn
from transformers import PreTrainedTokenizerBase

from lightning_sft.data.batches.loader import EpochLoader, PromptLoader, pad_token_id
from lightning_sft.data.batches.packing import Packing
from lightning_sft.data.batches.plan import Division
from lightning_sft.data.batches.split_plan import SplitPlan
from lightning_sft.data.batches.stream import StreamLoader, check_stream
from lightning_sft.data.batches.stream_blocks import StreamLayout
from lightning_sft.data.inspect.summary import show_report, show_stream_report
from lightning_sft.data.rows.formats import FormatName
from lightning_sft.data.rows.messages import Reading, TrainOn
from lightning_sft.data.rows.mixture import Mixture, as_mixture
from lightning_sft.data.rows.sources import Source, as_rows
from lightning_sft.data.tokens.control_tokens import Treatment
from lightning_sft.data.tokens.dataset import Split, load_prompts, load_split
from lightning_sft.data.tokens.encode_rows import EncodingConfig
from lightning_sft.data.tokens.held_out import share_of, side_of
from lightning_sft.data.tokens.overflow import Overflow
from lightning_sft.data.tokens.template_config import TemplateConfig, Thoughts, configure_anew
from lightning_sft.data.tokens.workers import num_cores
from lightning_sft.io.arguments import Count, Index, Tokens, check_arguments, plain
from lightning_sft.io.named import OurNames
from lightning_sft.io.settled import SettledArguments
from lightning_sft.model.parallel.rank_zero import FirstRank
from lightning_sft.model.pretrained import context_length, load_tokenizer, stop_ids
from lightning_sft.objective import NORMALIZATIONS
from lightning_sft.training.checks import (
    check_ids,
    check_lengths,
    check_prompts,
    keeps_documents_apart,
    say_if_cached_apart,
)
from lightning_sft.training.lightning_callbacks import tries_sizes
from lightning_sft.training.trained_data import TrainedData
from lightning_sft.training.trainer import data_parallel, division_of, gather, on_cuda, position, trainer_on_paper
from lightning_sft.types import InputError, Prompt

_STAGES = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",), "predict": ()}


class SFTDataModule(TrainedData, SettledArguments, OurNames):
    """Reads instruction data, encodes it with the model's chat template, and plans its micro-batches.

    Arguments are attributes. ``tokens_per_batch``, ``seed``, ``buffer_rows``, ``num_workers`` and
    ``predict_batch_size`` can be set again, for the next fit; others are refused.

    Args:
        train: Training data: files, a folder, a glob, ``hf:owner/name:split`` or rows, see
            :func:`lightning_sft.data.rows.sources.read`; or several data sets, see
            :class:`lightning_sft.data.rows.mixture.Mixture`.
        val: Validation data; takes the same forms as ``train``, or is a share of it: ``5%`` of its rows, chosen by
            their content, are then left out of the training.
        test: Test data; takes the same forms as ``train``.
        predict: Prompts for ``predict``; takes the same forms as ``train``, and answers may be missing.
        format: Format of all rows; detected from the keys of each row by default.
        columns: Column of the data for each key of the format: ``{prompt: question, completion: answer}``.
        system: System prompt of conversations that have none; by default that of an exported folder, if it has one.
        train_on: Target turns of a conversation: ``all`` answers, the ``last`` one alone, or with ``prompts`` every
            other turn too.
        roles: Role (system, user, assistant or tool) for each name that the data have for one.
        message_keys: Key of a message for each name that the data have for one; ``ignored`` where it says nothing.
        tokenizer: Hub name, folder or GGUF file of the tokenizer; the model's own by default.
        chat_template: Jinja file to use instead of the tokenizer's template.
        chat_template_kwargs: Variables of the chat template, as ``{enable_thinking: false}``, over those of an exported
            folder; ``today`` is the date that it is told, by default 2024-07-26. A row's own come first.
        control_tokens: Treatment of control tokens in the texts of a conversation: tokenized as plain ``text``, a
            reason to ``refuse`` the row, or ``as_is``, as the tokens that they are. By default as for an exported
            folder, or else ``text``.
        thoughts: Treatment of reasoning: ``keep`` it as it stands, ``split`` it off an answer that has it in
            ``<think>`` tags, or split it off and ``mask`` it, so that it is context. By default as for an exported
            folder, or else ``keep``.
        max_length: Maximum number of tokens per sequence; the model's context length by default.
        overflow: Treatment of longer sequences: an ``error``, left out (``drop``), cut at the end (``truncate``) or at
            the beginning (``truncate_prompt``), or, for plain text, split; all are counted.
        tokens_per_batch: Maximum number of positions per micro-batch; by default 2,048, or 16,384 on a GPU, or the
            longest sequence if that is longer.
        packing: ``packed`` lays documents end to end without padding, ``padded`` gives each a row.
        invalid_rows: Whether a row that cannot be used is an ``error``, or is left out and counted (``skip``).
        predict_batch_size: Number of prompts answered at a time.
        num_workers: Number of worker processes that encode, and collate ahead; 0 does both in the training process. By
            default all cores encode large files and streams, and the training process collates.
        streaming: Read the training data while training, in bounded memory: for data larger than memory or disk. A
            schedule then needs ``trainer.max_steps``.
        buffer_rows: Number of rows of a stream that each rank shuffles and packs at a time.
        cache: Folder of encoded files, so that the next start does not encode them again; null for none.
        seed: Seed of the order of the training data.
    """

    _section = "data"
    _may_change = frozenset(("tokens_per_batch", "seed", "buffer_rows", "num_workers", "predict_batch_size"))

    def __init__(
        self,
        train: Mixture | Source | None = None,
        val: Mixture | Source | None = None,
        test: Mixture | Source | None = None,
        predict: Source | None = None,
        format: FormatName | None = None,
        columns: dict[str, str] | None = None,
        tokenizer: str | Path | None = None,
        chat_template: str | Path | None = None,
        max_length: Tokens | None = None,
        overflow: Overflow = "drop",
        tokens_per_batch: Tokens | None = None,
        packing: Packing = "packed",
        invalid_rows: Literal["error", "skip"] = "error",
        predict_batch_size: Count = 16,
        num_workers: Index | None = None,
        streaming: bool = False,
        buffer_rows: Count = 4096,
        cache: str | Path | None = "~/.cache/lightning-sft/data",
        seed: Index = 0,
        system: str | None = None,
        train_on: TrainOn = "all",
        roles: dict[str, str] | None = None,
        message_keys: dict[str, str] | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
        control_tokens: Treatment | None = None,
        thoughts: Thoughts | None = None,
    ) -> None:
        super().__init__()
        self.held_out = share_of(val, train)
        given = dict(zip(("train", "val", "test", "predict"), map(as_rows, (train, val, test, predict)), strict=True))
        check_arguments(SFTDataModule, locals() | given, "data")
        self.train, self.val, self.test, self.predict = map(plain, given.values())
        self.sources: dict[str, Mixture | Source | None] = {name: getattr(self, name) for name in given}
        if self.held_out is not None:
            self.sources["val"] = self.train
        self.format, self.columns, self.system, self.train_on = format, plain(columns), system, train_on
        self.roles, self.message_keys, variables = map(plain, (roles, message_keys, chat_template_kwargs))
        self.reading = Reading(format, self.columns, system, train_on, self.roles, self.message_keys)
        self.chat_template_kwargs, self.control_tokens, self.thoughts = variables, control_tokens, thoughts
        self._rendering: dict[str, Any] = {"variables": variables or {}, "system": system}
        self._rendering |= {"control_tokens": control_tokens, "thoughts": thoughts}
        self.template = TemplateConfig().overridden(**self._rendering)
        self.tokenizer_name: str | None = plain(tokenizer)
        self.chat_template: str | None = plain(chat_template)
        self.max_length, self.tokens_per_batch, self.packing = max_length, tokens_per_batch, packing
        self.seed, self.overflow = seed, overflow
        self.invalid_rows, self.predict_batch_size = invalid_rows, predict_batch_size
        self.num_workers, self.cache, self.streaming, self.buffer_rows = num_workers, cache, streaming, buffer_rows
        self.sample_rows = 100  # of a stream: they are read before the training begins, since most mistakes show there
        self._asked: dict[str, Any] = {"tokenizer": plain(tokenizer), "packing": packing, "max_length": max_length}
        self._encoded_for: tuple[Any, ...] | None = None  # tokenizer, model and normalization of what has been read
        self.tokenizer: PreTrainedTokenizerBase | None = None
        self.splits: dict[str, Split] = {}
        self._planned: dict[tuple[str, int | None, int], SplitPlan] = {}
        self._tries_sizes = False  # of micro-batches, as Lightning's tuner does
        self._streamed: StreamLoader | None = None
        self._to_predict: list[Prompt] | None = None  # where not all of data.predict is
        if val is None:  # so Lightning sees that there is no validation, and does not warn of an empty loader
            self.val_dataloader = None  # type: ignore[assignment,method-assign]
        self._is_made = True

    def setup(self, stage: str) -> None:
        """Read and encode what the stage needs, once."""
        if stage == "fit" and self.sources["train"] is None:
            raise InputError("There is no training data: set data.train to a JSONL or JSON file.")
        if stage == "validate" and self.sources["val"] is None:
            raise InputError("There is no validation data: set data.val to a JSONL or JSON file, or to a share as 5%.")
        self._begin_anew()
        self._to_predict = None
        self._tries_sizes = tries_sizes(self.trainer, self.streaming)
        if self._tries_sizes:
            self.tokens_per_batch = self.tokens_per_batch or self._default_tokens  # it wants a number
        if self.sources["val"] is None:  # and a loader, while it tries
            tried = partial(self._loader, "train") if self._tries_sizes else None
            self.val_dataloader = tried  # type: ignore[assignment,method-assign]  # as in __init__
        if stage == "fit" and self.streaming:
            check_stream(self._mixture("train"), self._normalize, self.held_out)
        for name in _STAGES[stage]:
            if self.sources[name] is not None and name not in self.splits:
                first = self.sample_rows if name == "train" and self.streaming else None
                self.splits[name] = self._load(name, first)
                say_if_cached_apart(self.trainer, name, self.splits[name].built)

    def preview(
        self,
        module: LightningModule | None,
        settings: Any,
        *,
        num_ranks: int | None = None,
        reads_stream: bool = False,
        progress: bool = False,
    ) -> SFTDataModule:
        """A copy that is set up for ``fit`` with the settings of a trainer, without a trainer or its devices.

        Args:
            module: The Lightning module that would be trained, or ``None``.
            settings: Arguments of a trainer, as attributes.
            num_ranks: Data-parallel size; by default all devices of the settings.
            reads_stream: Whether a stream is read as by ``fit``; else its first ``buffer_rows`` rows stand for all.
            progress: Whether the progress of reading is shown; the report of the data never is.

        Raises:
            InputError: As :meth:`setup`.
        """
        made: SFTDataModule = copy(self)
        made.splits = dict(self.splits)
        paper = trainer_on_paper(module, settings)
        if num_ranks is not None:
            paper.distributed_sampler_kwargs["num_replicas"] = num_ranks
        paper.is_global_zero = progress
        cast(Any, made).trainer = paper
        if not reads_stream:
            made.sample_rows = made.buffer_rows
        made.setup("fit")
        made._settle(streaming=made.streaming and reads_stream)
        paper.is_global_zero = False
        return made

    @property
    def steps_per_epoch(self) -> float:
        """Optimizer steps in an epoch of training data, over all ranks together; infinite for a stream."""
        return math.inf if self.streaming else self.planned("train").plan.num_steps

    @property
    def positions_per_batch(self) -> int:
        """Most positions in a micro-batch of training data."""
        if self.streaming:
            return self.tokens_per_batch or self._default_tokens
        return self.planned("train").capacity

    @property
    def pad_id(self) -> int:
        """Token id of padding."""
        return pad_token_id(self._read(), getattr(self._module, "num_embeddings", None))

    def planned(self, name: str) -> SplitPlan:
        """A split with its plan, made when first asked for: by then the model has been probed."""
        key = name, self.tokens_per_batch, self.seed
        if key not in self._planned:
            self._ask_model(name)
            work, seed = division_of(self.trainer), self.seed if name == "train" else None
            if name != "train":
                work = Division(work.rank, work.num_ranks)
            settings: dict[str, Any] = {"constant": NORMALIZATIONS[self._normalize].is_constant, "seed": seed}
            settings |= {"at_least_longest": self._tries_sizes, "default": self._default_tokens}
            split = self.splits[name]
            self._planned[key] = SplitPlan.of(split, work, self.packing, self.tokens_per_batch, **settings)
            if name == "train" and self._is_shown and not self._tries_sizes:
                show_report(self.splits, self._planned[key], bool(getattr(self.trainer, "fast_dev_run", False)))
        return self._planned[key]

    def train_dataloader(self) -> EpochLoader | StreamLoader:
        """The micro-batches of this rank, each epoch in an order of its own: planned, or of a stream."""
        if not self.streaming:
            return self._loader("train", partial(position, self.trainer))
        self._streamed = self._stream()
        return self._streamed

    def teardown(self, stage: str) -> None:
        """Say what a stream has left out, where the training has ended before its epoch."""
        if self._streamed is not None:
            self._streamed.report()

    def val_dataloader(self) -> EpochLoader:
        """Validation micro-batches: every example once over all ranks."""
        return self._loader("val")

    def test_dataloader(self) -> EpochLoader:
        """Test micro-batches: every example once over all ranks."""
        if self.sources["test"] is None:
            raise InputError("There is no test data: set data.test to a JSONL or JSON file.")
        return self._loader("test")

    def predict_dataloader(self) -> PromptLoader:
        """Prompts for generation, each rank's own; those of :meth:`predict_only`, where it was called."""
        tokenizer, (rank, num_ranks) = self._read(), data_parallel(self.trainer)
        prompts = self.prompts_of("predict") if self._to_predict is None else self._to_predict
        self._check_prompts("predict", prompts)  # the model is known by now
        return PromptLoader(prompts[rank::num_ranks], tokenizer, self.predict_batch_size)

    def predict_only(self, prompts: Sequence[Prompt]) -> None:
        """Predict these prompts in this order, and not all of ``data.predict``, until the next :meth:`setup`."""
        self._to_predict = list(prompts)

    def prompts_of(self, name: str, first: int | None = None) -> list[Prompt]:
        """The prompts of a split, or the first of each of its data sets, for generation.

        Raises:
            InputError: When there are none, a row cannot be used, or the model has no room for its answer.
        """
        source = self.sources.get(name)
        if source is None:
            raise InputError(f"There are no prompts: set data.{name} to a JSONL or JSON file.")
        tokenizer, title = self._read(), "predict" if name == "predict" else None
        settings: dict[str, Any] = {"invalid_rows": self.invalid_rows, "first": first, "title": title}
        prompts = load_prompts(source, tokenizer, self.reading, **settings, side=side_of(name, self.held_out))
        self._check_prompts(name, prompts)
        return prompts

    def _check_prompts(self, name: str, prompts: Sequence[Prompt]) -> None:
        largest = max((max(prompt.input_ids) for prompt in prompts), default=0)
        check_ids(self._module, name, largest, self.tokenizer_name)
        check_prompts(prompts, getattr(self._module, "num_positions", None))

    def state_dict(self) -> dict[str, Any]:
        """What an export needs to give the model its tokenizer back: plain strings."""
        template = None if self.tokenizer is None else self.tokenizer.chat_template
        return {"tokenizer": self.tokenizer_name, "chat_template": template, "template": asdict(self.template)}

    @property
    def _recipe(self) -> EncodingConfig:
        max_length = self.max_length
        if self.streaming and self.tokens_per_batch:  # of a stream, nobody knows the longest sequence beforehand
            max_length = min(self.tokens_per_batch, max_length or self.tokens_per_batch)
        return EncodingConfig(self._read(), self.reading, self._normalize, max_length, self.overflow)

    def _mixture(self, name: str) -> Mixture:
        return as_mixture(cast(Mixture | Source, self.sources[name]))

    def _load(self, name: str, first: int | None = None) -> Split:
        mixture = self._mixture(name)
        if name != "train" and mixture.has_shares and self.held_out is None:
            rank_zero_warn(f"Shares and temperatures have no effect in data.{name}: there, every row is used once.")
        return load_split(
            name,
            mixture,
            replace(self._recipe, side=side_of(name, self.held_out)),
            invalid_rows=self.invalid_rows,
            cache=Path(self.cache).expanduser() if self.cache else None,
            num_workers=self.num_workers,
            progress=self._is_shown,
            first=first,
            **({"once": FirstRank()} if getattr(self.trainer, "world_size", 1) > 1 else {}),
        )

    def _begin_anew(self) -> None:
        """Forget what was planned for another trainer, and what was encoded for another model."""
        pretrained = getattr(self._module, "pretrained", None)
        name = self._asked["tokenizer"] or pretrained
        if name is None:
            raise InputError("The tokenizer is not known: set data.tokenizer to a hub name or folder.")
        new_tokens = tuple(getattr(self._module, "new_tokens", ()))
        if new_tokens and name != pretrained:
            raise InputError(
                f"model.new_tokens are added to the tokenizer of the model, but data.tokenizer={name!r} is another. "
                "Leave data.tokenizer out; data.chat_template may give the template."
            )
        self._planned = {}
        self._settle(packing=self._asked["packing"])
        if self._encoded_for != (name, pretrained, self._normalize, new_tokens):
            self._encoded_for, self.splits = (name, pretrained, self._normalize, new_tokens), {}
            self.tokenizer_name, tokenizer = name, load_tokenizer(name, self.chat_template, new_tokens)
            self.template = configure_anew(tokenizer, stop_ids(pretrained or name), **self._rendering)
            self.reading = replace(self.reading, system=self.template.system or None)
            length = self._asked["max_length"] or context_length(pretrained or name)
            self._settle(tokenizer=tokenizer, max_length=length)

    def _loader(self, name: str, place: Callable[[], tuple[int, int]] = lambda: (0, 0)) -> EpochLoader:
        self._read(name)
        rank, _ = data_parallel(self.trainer)
        full = on_cuda(self.trainer)  # kernels are compiled for one shape, and memory is used again as it was
        return self.planned(name).loader(rank, self.pad_id, self.num_workers or 0, place, full=full)

    def _stream(self) -> StreamLoader:
        self._read("train")
        self._ask_model("train")
        work, capacity = division_of(self.trainer), self.positions_per_batch
        return StreamLoader(
            self._mixture("train"),
            self._recipe,
            StreamLayout(work.num_ranks, work.accumulate, capacity, self.packing, self.buffer_rows, self.seed),
            work.rank,
            gather=partial(gather, self.trainer),
            limit=work.limit,
            is_strict=self.invalid_rows == "error",
            pad_id=self.pad_id,
            full=on_cuda(self.trainer),
            num_workers=num_cores(work.num_local) if self.num_workers is None else self.num_workers,
            place=partial(position, self.trainer),
            finished=show_stream_report if self._is_shown else lambda account, targets: None,
        )

    def _ask_model(self, name: str) -> None:
        """What only the model knows: whether it has an embedding for each token, and keeps packed documents apart."""
        check_ids(self._module, name, self.splits[name].examples.largest_id, self.tokenizer_name)
        longest = self._recipe.max_length if self.streaming and name == "train" else self.splits[name].lengths.max()
        check_lengths(self._module, name, int(longest or 0))
        if self.packing == "packed" and not keeps_documents_apart(self._module):
            self._settle(packing="padded")
