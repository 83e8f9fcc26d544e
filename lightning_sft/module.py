"""SFTModule: a pretrained causal language model whose targets' log-likelihood is maximized."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from contextlib import AbstractContextManager
from copy import deepcopy
from dataclasses import asdict, replace
from inspect import signature
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.types import STEP_OUTPUT, OptimizerLRScheduler
from torch import Tensor
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel

from lightning_sft.checkpoints.resume import (
    OPTIMIZER_KEY,
    POSITION_KEY,
    AskedSettings,
    note,
    restore,
    retune,
    seed_micro_batch,
    seed_of,
)
from lightning_sft.checkpoints.run_info import RUN_INFO_KEY, run_info
from lightning_sft.checkpoints.writing import write_whole
from lightning_sft.evaluation.corpus import EvaluationMetrics
from lightning_sft.evaluation.generation import Sampling, answers
from lightning_sft.evaluation.metrics import NUM_SUMS, metrics_by_part, sums_by_part
from lightning_sft.io.arguments import Count, Fraction, NonNegative, check_arguments
from lightning_sft.io.plain import plain
from lightning_sft.machine.contexts import in_default_dtype
from lightning_sft.machine.host_copy import HostCopy, without_waiting
from lightning_sft.model import pretrained as loading
from lightning_sft.model.attention.choice import Attention, check_asked, probed
from lightning_sft.model.kernels import KERNELS_KEY, KernelName, Kernels
from lightning_sft.model.likelihood import LikelihoodModel
from lightning_sft.model.parallel.sharding import Sharding
from lightning_sft.model.parallel.zero3 import gathered, loading_config
from lightning_sft.model.precision import follow_autocast
from lightning_sft.model.recompute import Checkpointing, checkpoint_layers
from lightning_sft.model.tuning.adapters import Lora
from lightning_sft.model.tuning.neftune import add_noise
from lightning_sft.model.tuning.quantization import Bits, keep_out_of_broadcasts
from lightning_sft.model.tuning.tuning import TuningConfig
from lightning_sft.strategies import layout
from lightning_sft.training.checks import check_epoch, check_trainer, not_finite, warn_if_bfloat16_is_slow
from lightning_sft.training.optimizer_modes import TRAINED_KEY, Modes, check_strategy
from lightning_sft.training.optimizers import OptimizerPart, clip_gradients, described, make_optimizer
from lightning_sft.training.schedules import Schedule, learning_rate_factor
from lightning_sft.training.throughput import NUM_COUNTS, SEEN_KEY, StepMetrics
from lightning_sft.training.trainer import (
    autocast_dtype,
    data_parallel,
    divisors,
    is_between_steps,
    root_device,
    sum_over_ranks,
    total_steps,
)
from lightning_sft.types import Batch, InputError, LogLikelihood, Normalize


class SFTModule(LightningModule):
    """Fine-tunes a pretrained causal language model on target tokens.

    Args:
        pretrained: A hub name, a folder, or a GGUF file.
        normalize: What an optimizer step divides its weighted sum by, see :mod:`lightning_sft.objective`.
        optimizer: Makes the optimizer from parameter groups; norms and biases are not decayed.
        optimizers: Several instead, each for the parameters that its patterns name, as Muon for matrices and AdamW for
            the rest, see :class:`~lightning_sft.training.optimizers.OptimizerPart`.
        schedule: How the learning rate goes down after the warm-up.
        warmup: Steps of linear warm-up, as a share of all.
        gradient_checkpointing: Recompute activations in the backward pass, to save memory: of each layer (``true``), of
            every n-th (a number), or of each with its input kept in host memory (``offload``).
        kernels: Of the layers: ``compiled``, ``liger``, ``none``, or ``auto`` (by device and length of the run).
        attn_implementation: Attention of transformers, as ``sdpa``; by default ours where exact, see docs/attention.
        chunk_size: Targets whose logits are in memory at a time; by default 512 on CPUs, and what fits on GPUs.
        max_new_tokens: Most tokens that are generated for a prompt.
        sampling: How they are chosen; the likeliest by default, see
            :class:`~lightning_sft.evaluation.generation.Sampling`.
        lora: Adapters to train instead of the model, see :class:`~lightning_sft.model.tuning.adapters.Lora`.
        quantize: Bits of the pretrained weights under adapters: ``4bit`` or ``8bit``.
        new_tokens: Special tokens to add to the tokenizer and the model.
        frozen: Patterns of parameters' names that are not trained, as ``*.layers.0.*``.
        trained: Patterns of those that are trained all the same, also beside adapters.
        neftune_alpha: Noise on embeddings in training, see :mod:`lightning_sft.model.tuning.neftune`.
        hf_config: Architecture of a model whose weights a checkpoint brings: the pretrained ones are then not read.
        compile_layers: Deprecated: ``kernels`` is ``compiled`` for ``true``, and ``none`` for ``false``.

    >>> import tempfile
    >>> from lightning_sft.demos import tiny_pretrained
    >>> module = SFTModule(tiny_pretrained(tempfile.mkdtemp()))
    >>> module.configure_model()
    >>> batch = Batch.of({"input_ids": torch.tensor([[5, 6, 7]]), "labels": torch.tensor([[-100, 6, 7]])})
    >>> total, weight = module(batch)
    >>> bool(total < 0), weight.item()
    (True, 2.0)
    """

    def __init__(
        self,
        pretrained: str | Path,
        normalize: Normalize = "token",
        optimizer: OptimizerCallable = lambda groups: AdamW(groups, lr=2e-5, weight_decay=0.01, fused=True),
        optimizers: list[OptimizerPart] | None = None,
        schedule: Schedule = "cosine",
        warmup: Fraction = 0.03,
        gradient_checkpointing: Checkpointing = False,
        kernels: KernelName = "auto",
        attn_implementation: str | None = None,
        chunk_size: Count | None = None,
        max_new_tokens: Count = 256,
        sampling: Sampling | None = None,
        lora: Lora | None = None,
        quantize: Bits | None = None,
        new_tokens: list[str] | None = None,
        frozen: list[str] | None = None,
        trained: list[str] | None = None,
        neftune_alpha: NonNegative | None = None,
        hf_config: dict[str, Any] | None = None,
        compile_layers: bool | None = None,
    ) -> None:
        super().__init__()
        check_arguments(SFTModule, locals(), "model")
        pretrained = str(pretrained)
        if compile_layers is not None:
            kernels = "compiled" if compile_layers else "none"
            warnings.warn(f"model.compile_layers has been replaced: set model.kernels to {kernels}.", stacklevel=2)
        self.save_hyperparameters(ignore=["optimizer", "optimizers", "hf_config", "compile_layers"])
        lora, sampling, new_tokens, frozen, trained = map(plain, (lora, sampling, new_tokens, frozen, trained))
        self.pretrained, self.normalize, self.optimizer = pretrained, normalize, optimizers or optimizer
        self.schedule, self.warmup, self.chunk_size, self.max_new_tokens = schedule, warmup, chunk_size, max_new_tokens
        self.gradient_checkpointing, self.attn_implementation = gradient_checkpointing, attn_implementation
        self.kernels, self.hf_config = Kernels(kernels), hf_config
        self.new_tokens, self.neftune_alpha = new_tokens or [], neftune_alpha
        self.tuning = TuningConfig(Lora.of(lora), quantize, self.new_tokens, frozen or [], trained or [])
        self.sampling = Sampling.of(sampling)
        given = {name: plain(value) for name, value in self.hparams.items()}
        self.hparams.update(given | self.tuning.hyper_parameters() | {"sampling": asdict(self.sampling)})
        self.strict_loading = lora is None  # a checkpoint has adapters without their base; on_load_checkpoint checks it
        self.learning_rate: float | None = None  # that Lightning's tuner has found; it wins over the optimizer's own
        self.scorer: LikelihoodModel | None = None
        self.attention: Attention | None = None  # which one it is and why, once the model is loaded
        self._evaluation, self._step_metrics = EvaluationMetrics(), StepMetrics()
        self._seed: int | None = None  # of dropout; that of the checkpoint, where there is one
        self._asked: AskedSettings | None = None  # of the optimizer now, and of that of the checkpoint
        self._saved: AskedSettings | None = None
        self._own_schedule: LambdaLR | None = None
        self._modes = Modes(self)
        self._restored: Mapping[str, Tensor] | None = None  # weights to train of a checkpoint, if they differ
        self._window: list[tuple[Batch, LogLikelihood]] = []  # the micro-batches of the optimizer step under way
        self._sums: HostCopy | None = None  # theirs, over all ranks, once the last of them is there

    def __getstate__(self) -> dict[str, Any]:
        """Without the default optimizer, a lambda for jsonargparse, which is not pickled: ``ddp_spawn`` pickles all."""
        state = super().__getstate__()
        return {name: value for name, value in state.items() if value is not _default_optimizer()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        cast(Any, super()).__setstate__({"optimizer": _default_optimizer()} | state)

    def setup(self, stage: str) -> None:
        """Refuse trainers under which the objective would not be exact."""
        check_trainer(self.trainer, stage)
        write_whole(self.trainer)
        self._seed, self._asked, self._saved, self._restored = None, None, None, None
        self._modes = Modes(self)

    def configure_model(self) -> None:
        """Load the model once, and measure on it what differs between architectures."""
        if self.scorer is not None:
            return
        trainer = self._trainer  # None where a checkpoint is loaded without one
        self._zero3 = loading_config(None if trainer is None else trainer.strategy)
        device, autocast = root_device(trainer), autocast_dtype(trainer)
        check_asked(self.attn_implementation, device, autocast or torch.get_default_dtype())
        model = self.tuning.load(self.pretrained, self.hf_config, self.attn_implementation, trainer)
        if trainer is not None and model.device.type == "cpu" and "bf16" in str(trainer.precision):
            warn_if_bfloat16_is_slow()
        self.hparams["hf_config"] = loading.config_dict(model)
        backbone, head = loading.backbone_and_head(model)
        with gathered(model.parameters()), in_default_dtype(model):
            self.attention, findings = probed(model, backbone, head, self.attn_implementation, device, autocast)
        checkpoint_layers(model, self.gradient_checkpointing, device.type)
        self.scorer = LikelihoodModel(model, findings, self.chunk_size)
        keep_out_of_broadcasts(self)
        if self.neftune_alpha:
            add_noise(self.scorer, model, self.neftune_alpha)
        if (reason := follow_autocast(model)) and trainer is not None and trainer.precision == "bf16-mixed":
            rank_zero_info(f"The residual stream stays in float32 under bf16-mixed: {reason}.")
        if self.device_mesh is not None:
            Sharding(self.device_mesh, *layout(self.trainer.strategy)).apply(self.scorer, model)

    def on_train_start(self) -> None:
        """Refuse epochs that the strategy would not end; settings given now win over those of a checkpoint."""
        check_epoch(self.trainer)
        self._window, self._sums = [], None  # an earlier fit may have been interrupted inside a step
        self.kernels.begin(self)
        self._step_metrics.begin(self.trainer, self.model)
        if self._asked is not None:
            retune(self.trainer, self._asked, self._saved, self._own_schedule)
        self._modes.begin(self._restored)
        self._own_schedule, self._restored = None, None  # else copies of the module would have an optimizer

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Make what the micro-batch draws, as dropout does, a function of its place: a resumed run draws the same."""
        self._step_metrics.go_on()
        if self._seed is None:
            self._seed = seed_of(self.trainer)
        seed_micro_batch(self._seed, self.trainer.current_epoch, batch_idx, data_parallel(self.trainer)[0])

    @property
    def model(self) -> PreTrainedModel | None:
        """The model of transformers; ``None`` before it is loaded."""
        return None if self.scorer is None else self.scorer.model

    @property
    def isolates_documents(self) -> bool:
        """Whether documents may share a row; the data module asks before it packs."""
        return self.scorer is None or self.scorer.findings.isolates_documents

    @property
    def num_embeddings(self) -> int | None:
        """How many token ids the model knows; ``None`` before it is loaded."""
        return None if self.model is None else cast(Any, self.model.get_input_embeddings()).num_embeddings

    @property
    def num_positions(self) -> int | None:
        """Size of the model's table of positions; ``None`` where there is none, or before the model is loaded."""
        return None if self.model is None else loading.num_positions(self.model)

    def forward(self, batch: Batch) -> LogLikelihood:
        """Weighted log-likelihood of the targets of a batch under the model."""
        assert self.scorer is not None, "configure_model has not been called"
        return LogLikelihood(*self.scorer(batch))

    def training_step(self, batch: Batch | Mapping[str, Any], batch_idx: int) -> STEP_OUTPUT:
        """``− Σ_t w_t · log Pr(t) / Z``, times what Lightning and the strategy are going to divide by."""
        batch = Batch.of(batch)
        likelihood: LogLikelihood = self(batch)
        self._window.append((batch, replace(likelihood, total=likelihood.total.detach())))
        if is_between_steps(self.trainer):  # when this micro-batch is done
            self._sums = self._summed()
        accumulate, num_ranks = divisors(self.trainer)
        if batch.normalizer is None:  # known only when the step is complete: on_before_optimizer_step divides
            if self.normalize != "token":
                raise InputError(f"model.normalize={self.normalize} needs batches of SFTDataModule, which plans ahead.")
            if self.trainer.strategy.handles_gradient_accumulation:
                raise InputError("DeepSpeed needs batches of SFTDataModule: its gradients cannot be normalized late.")
            return -likelihood.total * accumulate
        return -likelihood.total * (accumulate * num_ranks / batch.normalizer)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Close the step: stop at a non-finite loss, normalize late if need be, log the figures.

        The host waits for the sums of the forward pass alone; the device meanwhile works on the backward pass.
        """
        accumulates_by_itself = self.trainer.strategy.handles_gradient_accumulation  # it is called every micro-batch
        if accumulates_by_itself and len(self._window) < self.trainer.accumulate_grad_batches:
            return
        window, self._window = self._window, []
        if not window:  # the training_step of a subclass, which normalizes and logs by itself
            return
        assert self._sums is not None, "the step's last micro-batch has not been seen"
        summed, self._sums = self._sums.wait(), None
        counts, totals = summed[:NUM_COUNTS], summed[NUM_COUNTS:].view(-1, NUM_SUMS)
        if not torch.isfinite(totals[0, 0]):
            raise not_finite(window, self)
        weight = totals[0, 1].item()
        if weight == 0:  # a step without a target: a gradient of 0, and no figure
            return
        if window[0][0].normalizer is None:
            _, num_ranks = divisors(self.trainer)
            for parameter in self.parameters():
                if parameter.grad is not None:
                    parameter.grad.mul_(num_ranks / weight)
        figures = metrics_by_part(totals, window[0][0].part_names)
        self._log_metrics("train", figures | self._step_metrics.close(self.trainer, counts, totals[0, 3]))
        self.log("lr", torch.tensor(float(optimizer.param_groups[0]["lr"]), device="cpu"), batch_size=1)

    def _summed(self) -> HostCopy:
        """Counts and sums of the step's micro-batches over all ranks, on their way to the host: one reduction."""
        local = torch.stack([sums_by_part(likelihood, batch) for batch, likelihood in self._window]).sum(0)
        counts = self._step_metrics.counts([batch for batch, _ in self._window])
        both = torch.cat([without_waiting(counts.to(local.dtype), local.device), local.flatten()])
        return HostCopy(sum_over_ranks(self.trainer, both))

    def clip_gradients(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip as the trainer says, also where gradients lie on different meshes, and log their norm before."""
        if self.trainer.strategy.handles_gradient_accumulation:  # DeepSpeed, whose gradients are out of reach
            super().clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
        else:
            norm = clip_gradients(self.parameters(), gradient_clip_val, gradient_clip_algorithm)
            self._log_metrics("train", {} if norm is None else {"gradient_norm": norm.to(self.device)})

    def on_validation_start(self) -> None:
        """Begin the validation figures."""
        self._step_metrics.pause()
        self._evaluation.begin(self, len(self.trainer.num_val_batches))

    def validation_step(self, batch: Batch | Mapping[str, Any], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Add a batch to the validation figures, of its loader where a user has several."""
        self._evaluation.add(self, batch, dataloader_idx)

    def on_validation_epoch_end(self) -> None:
        """Log the figures of the whole validation set."""
        self._log_metrics("val", self._evaluation.close(self), sync_dist=True)

    def on_test_start(self) -> None:
        """Begin the test figures."""
        self._evaluation.begin(self, len(self.trainer.num_test_batches))

    def test_step(self, batch: Batch | Mapping[str, Any], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Add a batch to the test figures, of its loader where a user has several."""
        self._evaluation.add(self, batch, dataloader_idx)

    def on_test_epoch_end(self) -> None:
        """Log the figures of the whole test set."""
        self._log_metrics("test", self._evaluation.close(self), sync_dist=True)

    def predict_step(self, batch: Any, batch_idx: int) -> list[dict[str, Any]]:
        """Answers to a :class:`~lightning_sft.data.batches.loader.PromptBatch`, see
        :mod:`lightning_sft.evaluation.generation`.
        """
        assert self.model is not None, "configure_model has not been called"
        return answers(self.model, batch, self.max_new_tokens, self.sampling)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Note where the run is, and what a model card says of it; of a model with adapters, keep these alone."""
        self.tuning.shrink(checkpoint, self)
        self._modes.save(checkpoint)
        if self._asked is not None:
            checkpoint[OPTIMIZER_KEY] = asdict(self._asked)
        checkpoint[RUN_INFO_KEY] = run_info(self.trainer)
        checkpoint[SEEN_KEY], checkpoint[KERNELS_KEY] = self._step_metrics.state(), self.kernels.name
        checkpoint[POSITION_KEY] = note(self.trainer, seed_of(self.trainer) if self._seed is None else self._seed)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on between two steps, wherever the run was when it was saved; refuse what is of another model."""
        self.tuning.complete(checkpoint, self)
        if self._trainer is not None and self.trainer.training:
            self._seed = restore(self.trainer, checkpoint)
            self._saved = AskedSettings(**checkpoint[OPTIMIZER_KEY]) if OPTIMIZER_KEY in checkpoint else None
            self._restored = checkpoint.get(TRAINED_KEY)
            if self._asked is not None:  # strategies differ in whether they make the optimizer before they load
                self._asked.check(self._saved)
            self._step_metrics.restored, self.kernels.restored = checkpoint.get(SEEN_KEY), checkpoint.get(KERNELS_KEY)

    def on_validation_model_eval(self) -> None:
        """Evaluate the weights that the optimizer says, if it has a mode for it."""
        super().on_validation_model_eval()
        if self.trainer.state.fn == "fit":
            self._modes.evaluate()

    def on_validation_model_train(self) -> None:
        """Train on."""
        super().on_validation_model_train()
        if self.trainer.state.fn == "fit":
            self._modes.train()

    def on_train_end(self) -> None:
        """Leave the weights that are to be evaluated."""
        self._modes.evaluate()

    def evaluated(self) -> AbstractContextManager[None]:
        """The weights to evaluate, as long as the context lasts: with schedule-free optimizers they are others."""
        return self._modes.evaluated()

    def make_optimizer(self) -> Optimizer:
        """The optimizer without a schedule, norms and biases undecayed: for ``configure_optimizers`` of a subclass."""
        named = ((name.removeprefix("scorer.model."), parameter) for name, parameter in self.named_parameters())
        optimizer = make_optimizer(self.optimizer, named, self.learning_rate)
        check_strategy(optimizer, self.trainer.strategy)
        if type(optimizer) is not AdamW:
            rank_zero_info(f"Optimizer: {described(optimizer)}.")
        # Lightning refuses to clip where a fused optimizer would undo the loss scaling by itself; let the scaler do it
        cast(Any, optimizer)._step_supports_amp_scaling = False
        if not self.trainer.strategy.handles_gradient_accumulation:  # else DeepSpeed lets go of them
            optimizer.register_step_post_hook(lambda *_: optimizer.zero_grad())  # not only after the next forward pass
        self._asked = AskedSettings.of(optimizer)
        self._asked.check(self._saved)
        return optimizer

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """The optimizer, and the schedule over all planned steps, whose first factor is set when training starts."""
        optimizer = self.make_optimizer()
        total = total_steps(self.trainer, may_be_endless=self.schedule == "constant")
        scheduler = LambdaLR(optimizer, lambda step: learning_rate_factor(step, total, self.schedule, self.warmup))
        for group in optimizer.param_groups:  # another schedule would take the first factor for a part of it
            group["lr"] = deepcopy(group["initial_lr"])
        self._own_schedule = scheduler
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _log_metrics(self, name: str, values: Mapping[str, Tensor], sync_dist: bool = False) -> None:
        # with sync_dist, they are the same on all ranks: else Lightning would warn
        for key, value in values.items():
            settings: dict[str, Any] = {"batch_size": 1, "sync_dist": sync_dist, "add_dataloader_idx": False}
            self.log(f"{name}/{key}", value.float(), prog_bar=key == "loss", **settings)


def _default_optimizer() -> OptimizerCallable:
    return cast(OptimizerCallable, signature(SFTModule).parameters["optimizer"].default)
