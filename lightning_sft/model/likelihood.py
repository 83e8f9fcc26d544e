"""The model as one module whose forward pass is the likelihood of a batch; strategies wrap and shard it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from lightning_sft.model.backbone import backbone_and_head, hidden_states
from lightning_sft.model.experts import Routers
from lightning_sft.model.parallel.context import Context
from lightning_sft.model.parallel.sharding import gathered_head
from lightning_sft.model.pretrained import names_kept_in_float32
from lightning_sft.model.probes import ProbeResult
from lightning_sft.objective import TargetLoss, log_likelihood, transformed
from lightning_sft.types import IGNORE, Batch, InputError


class LikelihoodModel(nn.Module):
    """Likelihood of a batch: the backbone, then the objective on its hidden states and the head.

    Backbone and head live in one module because the model's own forward does not run the head here: FSDP2 and DeepSpeed
    gather the parameters of the module they wrap when its forward begins, and tied embeddings belong to both.

    Args:
        model: The causal language model.
        findings: Result of probing the model.
        chunk_size: Number of targets whose logits are in memory at a time; ``None`` chooses it for the device.
        context: Ranks that share the tokens of a batch, or ``None``. They all get the same batch and the same result,
            but the gradient of the total is that of a rank's own targets.
        routers: Routers of a mixture of experts, whose balance is computed in training mode; ``None`` without.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        findings: ProbeResult,
        chunk_size: int | None = None,
        context: Context | None = None,
        routers: Routers | None = None,
    ) -> None:
        super().__init__()
        self.model, self.findings, self.chunk_size = model, findings, chunk_size
        self.context, self.routers = context, routers

    def hidden(self, batch: Batch) -> Tensor:
        """Last hidden states of the backbone, ``[B, N, H]``, or ``[B, ⌈N / C⌉, H]`` of this rank's part of C.

        Raises:
            InputError: When documents share a row but attend to each other in this architecture.
        """
        if not self.findings.isolates_documents and batch.is_packed:
            where = f" (in {self.findings.leaks_in})" if self.findings.leaks_in else ""
            raise InputError(
                f"The batch has several documents per row, but in {type(self.model).__name__} they attend to each "
                f"other{where}. Use one document per row (data.packing=padded)."
            )
        given = batch.input_ids, batch.position_ids, batch.spans
        return hidden_states(backbone_and_head(self.model)[0], *given, self.context, batch.lengths)

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits of hidden states, ``[..., H]`` to ``[..., V]``, for a few of them; all of a batch are large."""
        head = gathered_head(backbone_and_head(self.model)[1])
        raw = F.linear(hidden, head) if isinstance(head, Tensor) else head(hidden)
        return transformed(raw, self.findings.scale, self.findings.softcap)

    def forward(
        self,
        batch: Any,
        compute: Callable[[PreTrainedModel, Any], Any] | None = None,
        loss: TargetLoss | None = None,
        loss_inputs: Sequence[Tensor] = (),
    ) -> Any:
        """The fields of a :class:`~lightning_sft.types.LogLikelihood`, as a tuple: FSDP2 looks for tensors in it.

        Args:
            batch: A :class:`~lightning_sft.types.Batch`, or the input of ``compute``.
            compute: Function of the model and ``batch`` to run instead, while the strategy has the parameters gathered.
            loss: Loss of each target instead of −log Pr, see :func:`log_likelihood`.
            loss_inputs: Further inputs of ``loss``, ``[B, N, *]`` each.

        Raises:
            InputError: When documents share a row but attend to each other in this architecture.
        """
        if compute is not None:
            return compute(self.model, batch)
        batch = Batch.of(batch)
        head, context = backbone_and_head(self.model)[1], self.context
        routers = self.routers if self.training else None
        with nullcontext() if routers is None else routers.recording():
            hidden = self.hidden(batch)
        labels, weights, indices = batch.labels, batch.target_weights, None
        if context is None:
            indices = batch.targets
        else:
            labels, weights = context.part(labels, IGNORE), context.part(weights)
            loss_inputs = [context.part(values) for values in loss_inputs]
        likelihood = log_likelihood(
            hidden,
            gathered_head(head),
            labels,
            weights,
            scale=self.findings.scale,
            softcap=self.findings.softcap,
            chunk_size=self.chunk_size,
            indices=indices,
            loss=loss,
            loss_inputs=loss_inputs,
        )
        total, weight = likelihood
        of_targets = [likelihood.log_probs, likelihood.correct, likelihood.entropy]
        of_targets += [] if likelihood.losses is None else [likelihood.losses]
        if context is not None:
            of_targets = context.joined(batch, *of_targets)
            of_all = batch.at_targets(batch.target_weights).to(of_targets[0].dtype)
            value = (of_all * of_targets[0]).sum() if loss is None else context.summed(total)
            total, weight = total - total.detach() + value, of_all.sum()
        more: tuple[Tensor | None, ...] = () if routers is None else routers.balance(batch)
        if loss is not None:
            more = (*(more or (None, None)), of_targets.pop())
        return total, weight, *of_targets, *more

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move or cast the model without rounding the buffers that transformers keeps in float32 in half precision.

        These are non-persistent buffers such as RoPE frequencies, and router biases. Under ``bf16-true`` and
        ``16-true`` Lightning casts every floating-point tensor.
        """
        kept = names_kept_in_float32(self.model)
        before = [
            (module, name, buffer)
            for prefix, module in self.named_modules()
            for name, buffer in module._buffers.items()
            if buffer is not None
            and (name in module._non_persistent_buffers_set or (kept and kept.search(f"{prefix}.{name}")))
        ]
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # untyped in torch
        for module, name, buffer in before:
            after = module._buffers[name]
            if after is not None and torch.promote_types(after.dtype, buffer.dtype) != after.dtype:
                module._buffers[name] = buffer.to(after.device)
        return self
