"""SFTModule: a pretrained causal language model, trained to maximize the log-likelihood of its targets.

One optimizer step follows the gradient of ``− Σ_t w_t · log Pr(t) / Z`` over the targets t of A micro-batches on each
of R ranks; Z comes with the batches, see :mod:`lightning_sft.objective`. Lightning divides the loss of a micro-batch by
A, and the strategy averages gradients over the ranks, so micro-batch a of rank r returns

    loss(a, r) = − (A · R / Z) · Σ_{t in (a, r)} w_t · log Pr(t)

    (1 / R) · Σ_r Σ_a ∇ loss(a, r) / A  =  − Σ_t w_t · ∇ log Pr(t) / Z      for any A, R and split of the targets

Batches of a user's own loader have no Z. Where a step is one of them, the device divides by its Σ_t w_t at once; where
it is several, their loss is without R / Z, and the gradient is multiplied by it at the end of the step. The auxiliary
loss of routers (:mod:`lightning_sft.model.experts`) is a weighted sum over documents, and is added to the sum over
targets.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import asdict
from inspect import signature
from pathlib import Path
from typing import Annotated, Any, cast

import torch
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.types import STEP_OUTPUT, OptimizerLRScheduler
from torch.optim import AdamW, Optimizer
from transformers import PreTrainedModel

from lightning_sft.checkpoints.resume import RunState
from lightning_sft.checkpoints.run_info import LoggedSettings, save_run_info
from lightning_sft.checkpoints.writing import write_whole
from lightning_sft.evaluation.generation import Sampling, answers
from lightning_sft.evaluation.metrics import metrics_by_part
from lightning_sft.evaluation.module import EvaluatedModule
from lightning_sft.evaluation.window import Window
from lightning_sft.io.arguments import Count, Filled, Fraction, Name, NonNegative, check_arguments, plain
from lightning_sft.io.named import OurNames
from lightning_sft.io.settled import SettledArguments
from lightning_sft.model import pretrained as loading
from lightning_sft.model.assembly import assemble
from lightning_sft.model.attention.choice import Attention, check_asked
from lightning_sft.model.experts import RouterLoss, Routers
from lightning_sft.model.first_checks import FirstChecks
from lightning_sft.model.kernels import KERNELS_KEY, KernelName, Kernels
from lightning_sft.model.likelihood import LikelihoodModel
from lightning_sft.model.limits import LimitedModule
from lightning_sft.model.parallel.buckets import settle_buckets
from lightning_sft.model.parallel.sharding import Sharding, check_sharded, loading_config
from lightning_sft.model.parallel.unused import check_gradients
from lightning_sft.model.precision import follow_autocast
from lightning_sft.model.recompute import Checkpointing, checkpoint_layers
from lightning_sft.model.tuning.adapters import Lora
from lightning_sft.model.tuning.neftune import add_noise
from lightning_sft.model.tuning.quantization import Bits, keep_out_of_broadcasts
from lightning_sft.model.tuning.tuning import TuningConfig
from lightning_sft.strategies import layout
from lightning_sft.training.checks import check_epoch, check_trainer, not_finite, warn_if_bfloat16_is_slow
from lightning_sft.training.losses import TargetLosses
from lightning_sft.training.optimizer_modes import Modes, check_closures, check_strategy
from lightning_sft.training.optimizers import OptimizerPart, clip_gradients, described, instead_of, make_optimizer
from lightning_sft.training.own_steps import OwnSteps
from lightning_sft.training.schedules import WARMUP, Schedule, named_scheduler, step_plateau, with_scheduler
from lightning_sft.training.throughput import SEEN_KEY, StepMetrics
from lightning_sft.training.trainer import (
    announce,
    autocast_dtype,
    check_step,
    divisors,
    is_between_steps,
    root_device,
    total_steps,
)
from lightning_sft.types import Batch, LogLikelihood, Normalize


class SFTModule(TargetLosses, FirstChecks, LimitedModule, OwnSteps, EvaluatedModule, SettledArguments, OurNames):
    """Fine-tunes a pretrained causal language model on target tokens.

    Arguments are attributes. ``optimizer`` and ``max_new_tokens`` can be set again, for the next fit or prediction;
    others are refused.

    Args:
        pretrained: A hub name, a folder, or a GGUF file.
        normalize: Divisor of an optimizer step's weighted sum, see :mod:`lightning_sft.objective`.
        optimizer: Factory of the optimizer from parameter groups; norms and biases are not decayed.
        optimizers: Several optimizers instead of ``optimizer``, each for the parameters that match its patterns, such
            as Muon for matrices and AdamW for the rest: :class:`~lightning_sft.training.optimizers.OptimizerPart`.
        schedule: Learning-rate schedule after the warm-up; or a scheduler of torch, which has no warm-up but its own.
        warmup: Fraction of the steps used for linear warm-up.
        gradient_checkpointing: Recompute activations in the backward pass to save memory: of each layer (``true``), of
            every n-th layer (a number), or of each layer with its input kept in host memory (``offload``).
        kernels: Kernels of the layers: ``compiled``, ``liger``, ``none``, or ``auto``, by device and length of the run.
        attn_implementation: Attention of transformers, such as ``sdpa``; by default ours where it is exact.
        chunk_size: Number of targets whose logits are in memory at a time; by default 512, or what fits a GPU.
        max_new_tokens: Maximum number of tokens generated for a prompt.
        sampling: Choice of the generated tokens; the most likely ones by default, see
            :class:`~lightning_sft.evaluation.generation.Sampling`.
        lora: Adapters to train instead of the model, see :class:`~lightning_sft.model.tuning.adapters.Lora`.
        quantize: Bits of the pretrained weights under adapters: ``4bit`` or ``8bit``.
        new_tokens: Special tokens to add to the tokenizer and the model.
        frozen: Patterns of the names of parameters that are not trained, such as ``*.layers.0.*``.
        trained: Patterns of parameters to train even if ``frozen`` matches them, or in addition to adapters.
        neftune_alpha: Scale of the noise on embeddings in training, see :mod:`lightning_sft.model.tuning.neftune`.
        hf_config: Architecture of a model whose weights come from a checkpoint; pretrained weights are not read then.
        compile_layers: Deprecated alias of ``kernels``: ``true`` means ``compiled``, ``false`` means ``none``.
        router_loss: Coefficient of the loss that balances experts, or ``config`` for that of the model's configuration;
            see :mod:`lightning_sft.model.experts`. 0 logs the loss without training on it.
        mlp_tile_size: Number of tokens whose MLP activations are in memory at a time; all tokens by default.

    >>> import tempfile
    >>> from lightning_sft.demos import tiny_pretrained
    >>> module = SFTModule(tiny_pretrained(tempfile.mkdtemp()))
    >>> module.configure_model()
    >>> batch = Batch.of({"input_ids": torch.tensor([[5, 6, 7]]), "labels": torch.tensor([[-100, 6, 7]])})
    >>> total, weight = module(batch)
    >>> bool(total < 0), weight.item()
    (True, 2.0)
    """

    _section = "model"
    _may_change = frozenset(("optimizer", "max_new_tokens"))

    def __init__(
        self,
        pretrained: Name | Path,
        normalize: Normalize = "token",
        optimizer: OptimizerCallable = lambda groups: AdamW(groups, lr=2e-5, weight_decay=0.01, fused=True),
        optimizers: Annotated[list[OptimizerPart], Filled()] | None = None,
        schedule: Schedule = "cosine",
        warmup: Fraction = WARMUP,
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
        router_loss: RouterLoss | None = None,
        mlp_tile_size: Count | None = None,
    ) -> None:
        super().__init__()
        check_arguments(SFTModule, locals(), "model")
        if compile_layers is not None:
            kernels = "compiled" if compile_layers else "none"
            warnings.warn(f"model.compile_layers has been replaced: set model.kernels to {kernels}.", stacklevel=2)
        code = ["optimizer", "optimizers", *(["schedule"] if callable(schedule) else [])]  # in no checkpoint
        self.save_hyperparameters(ignore=[*code, "hf_config", "compile_layers"])
        lora, sampling, new_tokens, frozen, trained = map(plain, (lora, sampling, new_tokens, frozen, trained))
        self.pretrained, self.normalize = str(pretrained), normalize
        self.optimizer = instead_of(optimizer, _default_optimizer(), optimizers)
        self.schedule, self.warmup, self.chunk_size, self.max_new_tokens = schedule, warmup, chunk_size, max_new_tokens
        self.gradient_checkpointing, self.attn_implementation = gradient_checkpointing, attn_implementation
        self.kernels, self.hf_config, self.mlp_tile_size = Kernels(kernels), hf_config, mlp_tile_size
        self.new_tokens, self.neftune_alpha, self.router_loss = new_tokens or [], neftune_alpha, router_loss
        self.lora, self.quantize, self.frozen, self.trained = Lora.of(lora), quantize, frozen or [], trained or []
        self.tuning = TuningConfig(self.lora, quantize, self.new_tokens, self.frozen, self.trained)
        self.sampling = Sampling.of(sampling)
        given = {name: plain(value) for name, value in self.hparams.items()}
        self.hparams.update(given | self.tuning.hyper_parameters() | {"sampling": asdict(self.sampling)})
        self.strict_loading = lora is None  # checkpoints of adapters omit their base; on_load_checkpoint checks them
        self.learning_rate: float | None = None  # found by Lightning's tuner; overrides the optimizer's own
        self.scorer: LikelihoodModel | None = None  # keys of checkpoints begin with this name
        self.attention: Attention | None = None  # the one in use and why, once the model is loaded
        self._step_metrics = StepMetrics()
        self._run, self._window, self._logged = RunState(), Window(), LoggedSettings()
        self._is_made = True

    def setup(self, stage: str) -> None:
        """Refuse trainers under which the objective would not be exact."""
        check_trainer(self.trainer, stage)
        write_whole(self.trainer)
        self._logged.defer(self.trainer)
        self._run, self._modes = RunState(), Modes(self)

    def configure_model(self) -> None:
        """Load the model once, and probe it for what differs between architectures."""
        if self.scorer is not None:
            check_sharded(self.scorer, self.device_mesh)
            return
        trainer = self._trainer  # None where a checkpoint is loaded without one
        strategy = None if trainer is None else trainer.strategy
        self._zero3 = loading_config(strategy)
        device, autocast = root_device(trainer), autocast_dtype(trainer)
        check_asked(self.attn_implementation, device, autocast or torch.get_default_dtype())
        model = self.tuning.load(self.pretrained, self.hf_config, self.attn_implementation, trainer)
        if trainer is not None and model.device.type in ("cpu", "meta") and "bf16" in str(trainer.precision):
            warn_if_bfloat16_is_slow()
        self.hparams["hf_config"] = loading.config_dict(model)
        self.scorer, self.attention = assemble(
            model,
            strategy,
            device,
            autocast,
            attn_implementation=self.attn_implementation,
            chunk_size=self.chunk_size,
            router_loss=self.router_loss,
        )
        announce(trainer, f"Attention {self.attention}.")
        checkpoint_layers(model, self.gradient_checkpointing, device.type, self.mlp_tile_size)
        keep_out_of_broadcasts(self)
        if self.neftune_alpha:
            add_noise(self.scorer, model, self.neftune_alpha)
        if (reason := follow_autocast(model)) and trainer is not None and trainer.precision == "bf16-mixed":
            rank_zero_info(f"The residual stream stays in float32 under bf16-mixed: {reason}.")
        if self.device_mesh is not None:
            sharding = Sharding(self.device_mesh, *layout(self.trainer.strategy))
            self.tuning.shard(self.scorer, model, sharding, self.pretrained, device)

    def forward(self, batch: Batch) -> LogLikelihood:
        """Weighted log-likelihood of the targets of a batch under the model; in training, of a subclass's own loss."""
        assert self.scorer is not None, "configure_model has not been called"
        return LogLikelihood(*self.scorer(batch, **(self.own_loss(batch) if self.training else {})))

    def training_step(self, batch: Batch | Mapping[str, Any], batch_idx: int) -> STEP_OUTPUT:
        """``− Σ_t w_t · log Pr(t) / Z``, with the routers' loss, times what will be divided by."""
        batch = self._received(batch)
        check_step(self, self.normalize, batch.normalizer is not None)
        likelihood: LogLikelihood = self(batch)
        objective = -likelihood.total if self._routers is None else self._routers.objective(likelihood)
        self._window.add(batch, likelihood, begins=batch_idx % self.trainer.accumulate_grad_batches == 0)
        weight = None
        if is_between_steps(self.trainer):  # this is the last micro-batch of its step
            weight = self._window.sum(self.trainer, self._step_metrics, self._routers)
        accumulate, num_ranks = divisors(self.trainer)
        if batch.normalizer is None:
            return self._to_divide(objective, weight, self._window.weight, num_ranks)
        return objective * (accumulate * num_ranks / batch.normalizer)

    def on_before_backward(self, loss: torch.Tensor) -> None:
        """Make random draws from here on, such as noise on gradients, the same on all ranks."""
        super().on_before_backward(loss)
        self._window.differentiated()
        self._run.seed_after_loss()

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Close the step: stop on a non-finite loss, log the metrics.

        The host waits for the sums of the forward pass only, while the device works on the backward pass.
        """
        accumulates_by_itself = self.trainer.strategy.handles_gradient_accumulation  # then called every micro-batch
        if accumulates_by_itself and len(self._window.micro_batches) < self.trainer.accumulate_grad_batches:
            return
        check_gradients(self.trainer, self)
        step = self._window.close(self.trainer)
        if step is None:  # of a subclass, which normalizes and logs by itself; or the same step, evaluated again
            return
        if not torch.isfinite(step.totals[0, 0]):
            raise not_finite(step.micro_batches, self)
        first, weight = step.micro_batches[0][0], step.totals[0, 1].item()
        self._count_step(weight)
        if weight == 0:  # a step without targets: the gradient is 0, and there are no metrics
            self._forget_metrics(())
            return
        if first.normalizer is not None:
            step.check_planned()
        metrics = metrics_by_part(step.totals, first.part_names)
        metrics |= self._step_metrics.close(self.trainer, step.counts, step.totals[0, 3])
        if self._routers is not None:
            metrics |= self._routers.metrics(step.of_routers, weight)
        self._forget_metrics(metrics)
        self._log_metrics("train", metrics)
        self.log("lr", torch.tensor(float(optimizer.param_groups[0]["lr"]), device="cpu"), batch_size=1)

    def clip_gradients(
        self, optimizer: Optimizer, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """Clip as the trainer asks, across device meshes too, and log the norm before clipping."""
        if self.trainer.strategy.handles_gradient_accumulation:  # DeepSpeed keeps its gradients to itself
            super().clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
        else:
            norm = clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
            self._window.gradient.see(self.trainer, norm)
            logged = None if self._window.is_repeated else norm
            self._log_metrics("train", {} if logged is None else {"gradient_norm": logged.to(self.device)})

    def make_optimizer(self) -> Optimizer:
        """The optimizer without a schedule, norms and biases undecayed: for ``configure_optimizers`` of a subclass."""
        named = ((name.removeprefix("scorer.model."), parameter) for name, parameter in self.named_parameters())
        optimizer = make_optimizer(self.optimizer, named, self.learning_rate)
        if self.optimizer is _default_optimizer() and self.learning_rate is None:
            self._trained_with.warn_of_default_optimizer(optimizer)
        check_strategy(optimizer, self.trainer.strategy)
        announce(self.trainer, f"Optimizer: {described(optimizer)}.")
        # Lightning refuses to clip where a fused optimizer would undo the loss scaling by itself; let the scaler do it
        cast(Any, optimizer)._step_supports_amp_scaling = False
        if not self.trainer.strategy.handles_gradient_accumulation:  # DeepSpeed frees them itself
            optimizer.register_step_post_hook(lambda *_: optimizer.zero_grad())  # before the next forward pass
        self._run.made(optimizer)
        return optimizer

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """The optimizer and its schedule over all planned steps."""
        optimizer = self.make_optimizer()
        if callable(self.schedule):
            return with_scheduler(optimizer, self.schedule, self.trainer, self.warmup)
        self._trained_with.warn_of_default_schedule(self.schedule, self.warmup)
        total = total_steps(self.trainer, may_be_endless=self.schedule == "constant")
        scheduler = named_scheduler(optimizer, self.schedule, self.warmup, total)
        self._run.scheduled(scheduler)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_train_start(self) -> None:
        """Refuse epochs that the strategy cannot end; apply settings that differ from the checkpoint's."""
        super().on_train_start()
        check_epoch(self.trainer)
        self._window = Window()  # an earlier fit may have been interrupted within a step
        check_closures(self)
        self.kernels.begin(self)
        self._step_metrics.begin(self.trainer, self.model)
        self._run.begin(self.trainer)
        self._modes.begin()
        self._logged.log(self.trainer)
        settle_buckets(self.trainer.strategy.model)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Make random draws, such as dropout, a function of the micro-batch's position, so that a run can resume."""
        self._step_metrics.resume()
        self._run.seed_micro_batch(self.trainer, batch_idx)

    def on_validation_start(self) -> None:
        """Stop the clock of training, and reset the validation metrics."""
        self._step_metrics.pause()
        super().on_validation_start()

    def on_validation_end(self) -> None:
        """Step a schedule that looks for a plateau."""
        super().on_validation_end()
        if self.trainer.state.fn == "fit" and not self.trainer.sanity_checking:
            step_plateau(self.trainer)

    def predict_step(self, batch: Any, batch_idx: int) -> list[dict[str, Any]]:
        """Answers to a batch of prompts, see :func:`lightning_sft.evaluation.generation.answers`."""
        assert self.model is not None, "configure_model has not been called"
        return answers(self.model, batch, self.max_new_tokens, self.sampling)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what a resumed run and a model card need; of a model with adapters, keep the adapters only."""
        super().on_save_checkpoint(checkpoint)
        self._window.gradient.check(self._trainer)
        self.tuning.shrink(checkpoint, self)
        self._modes.save(checkpoint)
        self._run.save(self.trainer, checkpoint)
        save_run_info(self.trainer, checkpoint)
        checkpoint[SEEN_KEY], checkpoint[KERNELS_KEY] = self._step_metrics.state(), self.kernels.name

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Resume between two steps, wherever the run was saved; refuse the checkpoint of another model."""
        super().on_load_checkpoint(checkpoint)
        self.tuning.complete(checkpoint, self)
        if self._trainer is not None and self.trainer.training:
            self._run.load(self.trainer, checkpoint)
            self._modes.load(checkpoint)
            self._step_metrics.restored, self.kernels.restored = checkpoint.get(SEEN_KEY), checkpoint.get(KERNELS_KEY)

    @property
    def run_seed(self) -> int | None:
        """Seed of the random draws of this run, a resumed run's original one; ``None`` before the first micro-batch."""
        return self._run.seed

    @property
    def changed_settings(self) -> list[str]:
        """Settings of the optimizer that are not those of the checkpoint that was resumed, as ``lr=0.001``."""
        return self._run.changes()

    @property
    def model(self) -> PreTrainedModel | None:
        """The model of transformers; ``None`` before it is loaded."""
        return None if self.scorer is None else self.scorer.model

    @property
    def _routers(self) -> Routers | None:
        return None if self.scorer is None else self.scorer.routers

    @property
    def isolates_documents(self) -> bool:
        """Whether documents may share a row; asked by the data module before it packs."""
        return self.scorer is None or self.scorer.findings.isolates_documents

    def __getstate__(self) -> dict[str, Any]:
        """Without the default optimizer: it is a lambda, for jsonargparse, and ``ddp_spawn`` pickles the module."""
        state = super().__getstate__()
        return {name: value for name, value in state.items() if value is not _default_optimizer()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        cast(Any, super()).__setstate__({"optimizer": _default_optimizer()} | state)


def _default_optimizer() -> OptimizerCallable:
    return cast(OptimizerCallable, signature(SFTModule).parameters["optimizer"].default)
