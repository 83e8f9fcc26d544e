"""Likelihoods and gradients of tiny models whose rows are split over ranks; run under torchrun by test_context."""

from __future__ import annotations

import json
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightning_sft.checkpoints.resume import seed_micro_batch
from lightning_sft.data.batches.collate import collate
from lightning_sft.demos import tiny_model
from lightning_sft.machine.contexts import blocks
from lightning_sft.model.attention.choice import probed
from lightning_sft.model.backbone import backbone_and_head
from lightning_sft.model.likelihood import LikelihoodModel
from lightning_sft.model.parallel.context import Context
from lightning_sft.model.probes import check_split
from lightning_sft.model.recompute import checkpoint_layers
from lightning_sft.model.tuning.adapters import Lora, inject
from lightning_sft.types import Example, InputError, LogLikelihood

ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "a key for each head": ("llama", {"num_key_value_heads": 4}),
    "two keys": ("qwen3", {"num_key_value_heads": 2}),
    "gpt2": ("gpt2", {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}),
    "a window": ("mistral", {"sliding_window": 4}),
    "a soft-cap": ("gemma2", {"sliding_window": 5, "attn_logit_softcapping": 0.5}),
    "windows in some layers": ("gemma3_text", {"sliding_window": 4}),
    "sinks": ("gpt_oss", {"sliding_window": 4, "num_local_experts": 2, "num_experts_per_tok": 1}),
    "chunks": ("llama4_text", {"attention_chunk_size": 8, "intermediate_size_mlp": 32, "num_local_experts": 2}),
    "experts": ("qwen3_moe", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}),
}
LENGTHS = 5, 1, 12, 7  # an odd number of tokens in all


def batches() -> list[Any]:
    """Documents that share a row, and documents with a row each."""
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randint(256, (n,), generator=generator).tolist() for n in LENGTHS]
    examples = [Example(ids, [0.0] + [1.0 + n] * (len(ids) - 1)) for n, ids in enumerate(drawn)]
    return [collate(examples), collate(examples, packed=False)]


def computed(scorer: LikelihoodModel, batch: Any) -> tuple[LogLikelihood, list[Tensor]]:
    found = LogLikelihood(*scorer(batch))
    trained = [parameter for parameter in scorer.parameters() if parameter.requires_grad]
    gradients = torch.autograd.grad(found.total, trained, allow_unused=True)
    return found, [torch.zeros_like(p) if g is None else g for p, g in zip(trained, gradients, strict=True)]


def error(of: Tensor, wanted: Tensor) -> float:
    return float((of - wanted).abs().max() / wanted.abs().max().clamp(min=1e-30))


def made(name: str) -> PreTrainedModel:
    kind, config = ARCHITECTURES[name]
    model = tiny_model(kind, **{"num_attention_heads": 4, **config})
    return model if "num_local_experts" in config or "num_experts" in config else model.double()


def compare(name: str, context: Context, how: str = "") -> float:
    """The largest relative error of values and gradients, beside a rank that has whole rows."""
    model = made(name)
    backbone, head = backbone_and_head(model)
    _, findings = probed(model, backbone, head)
    check_split(model, backbone, findings, context)
    errors = []
    for batch in batches():
        whole, wanted = computed(LikelihoodModel(model, findings), batch)
        if how == "checkpointed":
            checkpoint_layers(model, True, "cpu")
        if how == "compiled":
            for layer in blocks(model):
                layer.compile(backend="aot_eager", fullgraph=True)
        own, gradients = computed(LikelihoodModel(model, findings, context=context), batch)
        for gradient in gradients:
            dist.all_reduce(gradient)
        pairs = zip([*own, own.log_probs, own.entropy], [*whole, whole.log_probs, whole.entropy], strict=True)
        errors += [error(a, b) for a, b in pairs]
        errors += [error(a, b) for a, b in zip(gradients, wanted, strict=True) if b.any()]
        assert torch.equal(own.correct, whole.correct)
    return max(errors)


class Joined(nn.Module):
    """Dropout of whole rows whose mask is that of the ranks' parts, side by side; a generator stands for each rank."""

    def __init__(self, probability: float, states: list[Tensor]) -> None:
        super().__init__()
        self.probability, self.states = probability, states

    def forward(self, x: Tensor) -> Tensor:
        """Drop entries of ``[B, N, H]`` as the ranks do, of which each draws for ``⌈N / C⌉`` tokens."""
        width, masks = -(-x.shape[1] // len(self.states)), []
        for rank, state in enumerate(self.states):
            torch.set_rng_state(state)
            masks.append(nn.functional.dropout(x.new_ones(x.shape[0], width, x.shape[2]), self.probability))
            self.states[rank] = torch.get_rng_state()
        return x * torch.cat(masks, 1)[:, : x.shape[1]]


def with_dropout(context: Context, checkpointed: bool) -> float:
    """The largest relative error of adapters with dropout, beside a rank that has whole rows and the same masks."""
    model, errors = tiny_model("qwen3", num_attention_heads=4, num_key_value_heads=2), []
    torch.manual_seed(0)
    inject(model, Lora(r=4, dropout=0.5))
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.3)  # the second matrix of an adapter begins at zero
    model.double().train()
    findings = probed(model, *backbone_and_head(model))[1]
    dropouts = [part["default"] for name, part in model.named_modules() if name.endswith("lora_dropout")]
    assert dropouts
    assert all(type(part) is nn.Dropout for part in dropouts)
    states = []
    for rank in range(context.size):
        seed_micro_batch(0, 0, 0, rank)
        states.append(torch.get_rng_state())
    wanted = []
    for batch in batches():
        with ExitStack() as replaced:
            joined = Joined(0.5, list(states))
            for part in dropouts:
                replaced.enter_context(patch.object(part, "forward", joined.forward))
            wanted.append(computed(LikelihoodModel(model, findings), batch))
    if checkpointed:
        checkpoint_layers(model, True, "cpu")
    for batch, (whole, of_whole) in zip(batches(), wanted, strict=True):
        torch.set_rng_state(states[context.rank])
        own, gradients = computed(LikelihoodModel(model, findings, context=context), batch)
        for gradient in gradients:
            dist.all_reduce(gradient)
        errors += [error(own.total, whole.total)]
        errors += [error(a, b) for a, b in zip(gradients, of_whole, strict=True)]
    return max(errors)


def sent(context: Context) -> list[int]:
    """Bytes that this rank sends to others in a forward pass of the packed batch, beside what the page says."""
    model = made("two keys")
    backbone, head = backbone_and_head(model)
    _, findings = probed(model, backbone, head)
    exchange, num_bytes = Context._exchanged, []

    def counted(own: Context, chunks: Tensor) -> Tensor:
        num_bytes.append(chunks.nbytes * (own.size - 1) // own.size)
        return exchange(own, chunks)

    [batch, _] = batches()
    with patch.object(Context, "_exchanged", counted), torch.no_grad():
        LikelihoodModel(model, findings, context=context)(batch)
    config = model.config
    tokens, groups = -(-sum(LENGTHS) // context.size), max(config.num_key_value_heads, context.size)
    values = 2 * (config.num_attention_heads + groups) * config.head_dim * tokens * config.num_hidden_layers
    return [sum(num_bytes), values * 8 * (context.size - 1) // context.size]


def refused(context: Context, kind: str, **config: Any) -> str:
    """Why a model is refused, on every rank."""
    model = tiny_model(kind, **config)
    backbone, head = backbone_and_head(model)
    _, findings = probed(model, backbone, head)
    try:
        check_split(model, backbone, findings, context)
    except InputError as said:
        return str(said)
    return "not refused"


def main(out: Path) -> None:
    dist.init_process_group("gloo")
    context = Context(dist.get_rank(), dist.get_world_size(), dist.group.WORLD)
    found: dict[str, Any] = {name: compare(name, context) for name in ARCHITECTURES}
    found |= {how: compare("two keys", context, how) for how in ("checkpointed", "compiled")}
    found |= {f"dropout{', checkpointed' * again}": with_dropout(context, again) for again in (False, True)}
    found["sent"] = sent(context)
    mamba = {"num_attention_heads": 4, "num_heads": 4, "head_dim": 8, "state_size": 8, "n_groups": 1}
    found["recurrent"] = refused(context, "mamba2", **mamba)
    found["three heads"] = refused(context, "llama", hidden_size=24, num_attention_heads=3, num_key_value_heads=3)
    if context.rank == 0:
        out.write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
