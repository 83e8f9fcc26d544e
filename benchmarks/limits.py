"""What the machine could do at most, and how much of it a step needs.

As a script it measures matrix products, in a process of its own with the threads of the benchmark.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from benchmarks.record import Record, settings


@dataclass(frozen=True)
class Work:
    """Floating-point operations of a training step that no implementation can leave out.

    A product of [m, k] and [k, n] takes 2·m·k·n of them, and the backward pass twice what the forward pass takes:

        tokens   · 6 · (parameters of the matrices between embedding and head)
      + targets  · 6 · H · V                                the head, where there is a target and nowhere else
      + pairs    · 12 · L · heads · head size               attention: each token with those before it in its document

    Padding, logits of context, attention across documents, recomputation under gradient checkpointing, and everything
    that is not a matrix product count for nothing: whoever does them has a smaller share of the machine's limit.

    Args:
        per_token: Operations for each real token.
        per_target: For each token with a loss on it.
        per_pair: For each pair of a token and itself, or an earlier token of its document.
    """

    per_token: float
    per_target: float
    per_pair: float

    @classmethod
    def of(cls, pretrained: str, lora: int | None = None) -> Work:
        """That of a Hugging Face folder; no weight is read.

        Args:
            pretrained: The folder.
            lora: Rank of adapters on all matrices but the head: these alone are trained, so the model's own matrices,
                the head too, take 4 operations a parameter, and the adapters' 6.
        """
        from transformers import AutoConfig, AutoModelForCausalLM

        config = AutoConfig.from_pretrained(pretrained)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        head = model.get_output_embeddings()
        inner = [m for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not head]
        head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        each = 6 if lora is None else 4
        adapters = 0 if lora is None else 6 * lora * sum(m.in_features + m.out_features for m in inner)
        return cls(
            each * sum(linear.weight.numel() for linear in inner) + adapters,
            each * head.weight.numel(),
            12 * config.num_hidden_layers * config.num_attention_heads * head_size,
        )

    def of_step(self, tokens: float, targets: float, pairs_per_token: float) -> float:
        """Operations of a step.

        >>> Work(per_token=600, per_target=60, per_pair=12).of_step(tokens=10, targets=5, pairs_per_token=2)
        6540
        """
        return tokens * (self.per_token + pairs_per_token * self.per_pair) + targets * self.per_target


def product_rate(size: int, dtype: torch.dtype, seconds: float = 1.0) -> float:
    """Operations a second of the best of some products of two square matrices."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    best, until, result = 0.0, time.perf_counter() + seconds, a @ b
    while best == 0 or time.perf_counter() < until:
        if device == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        torch.mm(a, b, out=result)
        if device == "cuda":
            torch.cuda.synchronize()
        best = max(best, 2 * size**3 / (time.perf_counter() - began))
    return best


def best_rate(dtype: torch.dtype) -> float:
    """That of the size which suits the machine best; large ones are not tried where small ones are slow already."""
    rate = 0.0
    for size in (256, 1024, 2048, 4096):
        if rate and 2 * size**3 / rate > 2:
            break
        rate = max(rate, product_rate(size, dtype))
    return rate


if __name__ == "__main__":
    chosen = settings()
    rates = {name: best_rate(getattr(torch, name)) for name in ("float32", "bfloat16")}
    device_name = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    Record(chosen.out).write(device=device_name, torch=torch.__version__, **rates)
