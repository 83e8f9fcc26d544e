"""What to train in a pretrained model: adapters, frozen parameters, new tokens."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import Any, cast

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy
from lightning.pytorch.utilities import rank_zero_info
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from transformers import PreTrainedModel

from lightning_sft.io.words import counted
from lightning_sft.model.parallel import loading
from lightning_sft.model.parallel.sharding import Sharding
from lightning_sft.model.pretrained import load_model, model_from_config, new_token_ids, stored_quantization
from lightning_sft.model.tuning import adapter_checkpoints, new_tokens
from lightning_sft.model.tuning.adapters import Lora, check_peft, inject, widen, without_adapters
from lightning_sft.model.tuning.base_dtype import base_dtype, is_stored_in_bfloat16
from lightning_sft.model.tuning.freezing import choose
from lightning_sft.model.tuning.packed import unpack
from lightning_sft.model.tuning.quantization import Bits, check_package, is_quantized, prepare, quantization
from lightning_sft.types import InputError


@dataclass
class TuningConfig:
    """What is trained, and what checkpoints store of it.

    Args:
        lora: Settings of the adapters; only they and ``trained`` are trained then.
        quantize: Bits of the quantized base under the adapters, ``4bit`` or ``8bit``.
        new_tokens: Special tokens to add to tokenizer and model; with adapters, only their rows of the embeddings are
            trained.
        frozen: Patterns of the names of parameters to freeze, such as ``*.layers.0.*``.
        trained: Patterns of parameters to train even if ``frozen`` matches them, or in addition to adapters.
    """

    lora: Lora | None = None
    quantize: Bits | None = None
    new_tokens: Sequence[str] = ()
    frozen: Sequence[str] = ()
    trained: Sequence[str] = ()
    _base: torch.Tensor | None = field(default=None, init=False)  # fingerprint of the weights under the adapters

    def hyper_parameters(self) -> dict[str, Any]:
        """The settings of the adapters as plain values, since a checkpoint holds no objects."""
        return {"lora": None if self.lora is None else asdict(self.lora)}

    def check_packages(self, pretrained: str) -> None:
        """Refuse settings whose packages are not installed.

        Args:
            pretrained: Hub name or path of the base, whose weights may be quantized.

        Raises:
            InputError: When one is missing.
        """
        if self.lora is not None:
            check_peft()
            prequantized = None
            with suppress(InputError):  # loading says what is wrong with the folder
                prequantized = stored_quantization(pretrained)
            if prequantized is not None:
                prequantized.check_package(pretrained)
        if self.quantize is not None:
            check_package(self.quantize)

    def _check(self, trainer: Trainer | None) -> None:
        """Refuse settings that would not work, or not be exact, before anything is loaded.

        Raises:
            InputError: When settings exclude each other, or the strategy does not support them.
        """
        if self.quantize is not None and self.lora is None:
            raise InputError(
                f"model.quantize={self.quantize} needs adapters, since rounded weights cannot be trained. "
                "Set model.lora.r=16, or leave model.quantize out."
            )
        strategy = None if trainer is None else trainer.strategy
        asked = None if self.lora is None else self.lora.base_dtype
        if self.quantize is not None:
            self._check_quantized(f"model.quantize={self.quantize}", trainer)
        if asked == "float32" and trainer is not None and str(trainer.precision) in ("bf16-true", "16-true"):
            raise InputError(
                f"trainer.precision={trainer.precision} casts the whole model, so model.lora.base_dtype=float32 has no "
                "effect. Use trainer.precision=bf16-mixed, or leave base_dtype out."
            )
        if (self.lora or self.new_tokens) and getattr(strategy, "zero_stage_3", False):
            raise InputError(
                "Under ZeRO-3 neither adapters (model.lora) nor model.new_tokens can be added to a model whose "
                "parameters are partitioned. Use trainer.strategy=deepspeed_stage_2, fsdp2 or ddp."
            )
        mesh = _mesh(strategy)
        if self.lora and mesh is not None and mesh["tensor_parallel"].size() > 1:
            raise InputError(
                "Adapters (model.lora) do not support tensor parallelism. Set "
                "trainer.strategy.tensor_parallel_size=1, or leave model.lora out."
            )

    def _check_quantized(self, what: str, trainer: Trainer | None) -> None:
        """Refuse settings that quantized weights cannot be combined with.

        Raises:
            InputError: With ``base_dtype``, or DeepSpeed.
        """
        asked = None if self.lora is None else self.lora.base_dtype
        if asked is not None:
            raise InputError(
                f"Both {what} and model.lora.base_dtype={asked} determine how the base is stored. Remove one of them."
            )
        strategy = None if trainer is None else trainer.strategy
        if getattr(strategy, "config", None):
            raise InputError(
                f"Quantized weights cannot be sharded by {type(strategy).__name__}, so {what} cannot be used with "
                "it. Use a single device, trainer.strategy=fsdp2 or ddp, or weights that are not quantized."
            )

    def load(
        self, pretrained: str, hf_config: dict[str, Any] | None, attention: str | None, trainer: Trainer | None
    ) -> PreTrainedModel:
        """Load or build the model, with adapters and new tokens added and parameters frozen.

        For a strategy that shards it, its weights are left empty if :meth:`shard` can read them later.

        Args:
            pretrained: Hub name or path of the base. It is read with adapters, or if ``hf_config`` is ``None``.
            hf_config: Architecture of a model whose weights are loaded from a checkpoint later.
            attention: Attention implementation of transformers; ``None`` lets transformers choose.
            trainer: Lightning trainer, or ``None``.

        Raises:
            InputError: When settings exclude each other, or the model cannot be loaded.
        """
        self._check(trainer)
        if hf_config is not None and self.lora is None:
            model = model_from_config(hf_config, attention)
        else:
            prequantized = stored_quantization(pretrained)
            if prequantized is not None and self.quantize is not None:
                raise InputError(
                    f"The weights of {pretrained!r} are already quantized, so model.quantize={self.quantize} has no "
                    "effect. Leave it out."
                )
            if prequantized is not None:
                prequantized.check(pretrained, self.lora is not None)
            fits = prequantized is None or prequantized.fits_bfloat16
            in_bfloat16 = trainer is not None and "bf16" in str(trainer.precision)
            dtype = torch.bfloat16 if in_bfloat16 else torch.get_default_dtype()
            autocast = torch.bfloat16 if in_bfloat16 else None
            own = self.base_dtype(autocast, lambda: fits and is_stored_in_bfloat16(pretrained))
            is_sharded = trainer is not None and _mesh(trainer.strategy) is not None
            quantized = self.quantize and quantization(self.quantize, dtype)
            is_plain = prequantized is None
            empty = self._empty(pretrained, attention, own, is_plain, autocast, quantized) if is_sharded else None
            model = empty or load_model(pretrained, attention, quantized, own)
            if is_quantized(model):
                self._check_quantized("the quantized weights of model.pretrained", trainer)
            prepare(model, dtype)
            self._base = None if self.lora is None or empty else adapter_checkpoints.samples(model)
            if autocast is None and own is torch.bfloat16:
                widen(model.parameters())  # the values are rounded; without autocast, matmuls do not mix dtypes
            is_unasked = self.lora is not None and self.lora.base_dtype is None and not is_quantized(model)
            if is_unasked and in_bfloat16 and own is torch.float32:
                rank_zero_info(_HINT)
            self._prepare(model, pretrained)
        if untrained := choose(model, self.frozen, self.trained):
            rank_zero_info(
                f"{counted(len(untrained), 'parameter', 'are')} not trained, such as {untrained[0]}: the architecture "
                "freezes them, or text does not use them."
            )
        if self.lora is not None:
            widen(parameter for parameter in model.parameters() if parameter.requires_grad)
        return model

    def shard(
        self, scorer: nn.Module, model: PreTrainedModel, sharding: Sharding, pretrained: str, device: torch.device
    ) -> None:
        """Shard a model, in place; then each rank reads its shards if :meth:`load` has left the model empty.

        Args:
            scorer: Module that is called and contains the model.
            model: Model of :meth:`load`.
            sharding: Layout of the shards.
            pretrained: Hub name or path of the model.
            device: Device of the rank.

        Raises:
            InputError: When the model cannot be sharded, or the files do not fit it.
        """
        is_empty, packer = loading.is_empty(model), None
        if is_empty and is_quantized(model):
            with without_adapters(model):
                packer = loading.Packer(model, pretrained, device)

        def prepare(part: nn.Module) -> None:
            """Only the packed weights of one layer are whole at a time."""
            if packer is not None:
                with without_adapters(model):
                    packer.read(part)
            unpack(part, sharding.gathered_dtype, device)

        sharding.apply(scorer, model, prepare)
        if is_empty:
            with without_adapters(model):
                done = () if packer is None else packer.sources.values()
                loading.fill(model, pretrained, device, sharding.cpu_offload, set(done))
                self._base = None if self.lora is None else adapter_checkpoints.samples(model)

    def _empty(
        self,
        pretrained: str,
        attention: str | None,
        dtype: torch.dtype,
        is_plain: bool,
        autocast: torch.dtype | None,
        quantized: Any = None,
    ) -> PreTrainedModel | None:
        """The model without memory, for each rank to read its shards later; ``None`` if it has to be loaded whole."""
        reasons = {
            "its weights are stored quantized": not is_plain,
            "model.new_tokens changes its embeddings": bool(self.new_tokens),
            "model.lora.dora computes magnitudes of its matrices": self.lora is not None and self.lora.dora,
            "model.lora.base_dtype rounds its weights": autocast is None and dtype is torch.bfloat16,
        }
        why = next((reason for reason, holds in reasons.items() if holds), None)
        try:
            if why is None:
                return loading.empty_model(pretrained, attention, dtype, quantized)
        except InputError as error:
            why = str(error)
        rank_zero_info(f"Each rank loads the whole of {pretrained!r} before it is sharded: {why}.")
        return None

    def base_dtype(self, autocast: torch.dtype | None, is_stored_in_bfloat16: Callable[[], bool]) -> torch.dtype:
        """Dtype to load the pretrained weights in; see :func:`~lightning_sft.model.tuning.base_dtype.base_dtype`."""
        if self.lora is None or self.quantize is not None:
            return torch.get_default_dtype()
        return base_dtype(self.lora.base_dtype, autocast, is_stored_in_bfloat16)

    def shrink(self, checkpoint: dict[str, Any], module: LightningModule) -> None:
        """With adapters, reduce a checkpoint to the trained tensors if the strategy can load such a checkpoint."""
        if self._base is not None and _keeps_only_adapters(module.trainer.strategy):
            adapter_checkpoints.shrink(checkpoint, module, self._base)

    def complete(self, checkpoint: dict[str, Any], module: LightningModule) -> None:
        """Refuse a checkpoint of other adapters or another base; add the base to a checkpoint without it.

        Raises:
            InputError: When it does not match the module, or training resumes with other ``frozen`` or ``trained``.
        """
        adapter_checkpoints.check(checkpoint, module, self._base)
        saved = checkpoint.get("hyper_parameters", {})
        given = {name: (saved.get(name) or [], getattr(self, name)) for name in ("frozen", "trained")}
        changes = [f"model.{name}={then}, now {now}" for name, (then, now) in given.items() if list(then) != list(now)]
        if changes and module._trainer is not None and module.trainer.training:
            raise InputError(
                f"The checkpoint is from a run with {'; '.join(changes)}, so its optimizer state belongs to other "
                "parameters. Use the same settings to resume; to change them, export the checkpoint and use it as "
                "model.pretrained."
            )
        adapter_checkpoints.complete(checkpoint, module)

    def _prepare(self, model: PreTrainedModel, pretrained: str) -> None:
        ids: list[int] = []
        with torch.random.fork_rng():  # initial values of the adapters have to be equal on all ranks
            torch.manual_seed(int(os.environ.get("PL_GLOBAL_SEED", "0")))
            if self.new_tokens:
                ids, num_known = new_token_ids(pretrained, self.new_tokens)
                new_tokens.resize(model, ids, num_known)
            if self.lora is not None:
                with loading.on_host(model):
                    inject(model, self.lora)
                if ids:
                    new_tokens.train_rows(model, ids)


_HINT = (
    "The base under the adapters is not stored in bfloat16, so it is kept in float32 without rounding. "
    "model.lora.base_dtype=bfloat16 rounds it and halves its memory."
)


def _keeps_only_adapters(strategy: Strategy) -> bool:
    """Whether the strategy can load a checkpoint without the base; DeepSpeed and distributed checkpoints cannot."""
    if getattr(strategy, "config", None) is not None:  # DeepSpeed
        return False
    return _mesh(strategy) is None or not cast(ModelParallelStrategy, strategy)._save_distributed_checkpoint


def _mesh(strategy: Strategy | None) -> DeviceMesh | None:
    return getattr(strategy, "device_mesh", None)
