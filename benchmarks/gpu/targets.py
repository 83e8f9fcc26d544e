"""What is aimed at on one H100, in bf16-mixed on GSM8K's lengths, and what a run has reached of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.gpu.parts import DEFAULT, TRL_LIGER

Result = dict[str, Any]


@dataclass(frozen=True)
class Target:
    """One aim.

    Args:
        shape: Of the model, as a slug.
        figure: ``tokens_per_second``, ``times_trl`` (of TRL with FlashAttention 2 and Liger) or ``allocated_gib``.
        value: At least so much; of memory, at most.
    """

    shape: str
    figure: str
    value: float

    def __str__(self) -> str:
        value = f"{self.value:,.0f}" if self.value >= 2 else f"{self.value:g}"
        texts = {
            "tokens_per_second": f"≥ {value} tokens/s",
            "times_trl": f"≥ {value} × TRL + FlashAttention 2 + Liger",
            "allocated_gib": f"≤ {value} GiB",
        }
        return texts[self.figure]

    def reached(self, results: Sequence[Result]) -> float | None:
        """The figure of our default, or ``None`` where it was not measured."""
        ours = _figures(results, self.shape, DEFAULT)
        if ours is None or self.figure != "times_trl":
            return None if ours is None else ours.get(self.figure)
        peer = _figures(results, f"trl-{self.shape}", TRL_LIGER)
        return None if peer is None else float(ours["tokens_per_second"] / peer["tokens_per_second"])

    def is_met(self, reached: float) -> bool:
        """Whether a figure is good enough."""
        return reached <= self.value if self.figure == "allocated_gib" else reached >= self.value


TARGETS = (
    Target("qwen2.5-0.5b", "tokens_per_second", 113_000),
    Target("qwen2.5-0.5b", "times_trl", 1.3),
    Target("qwen2.5-0.5b", "allocated_gib", 22),
    Target("llama-3.2-1b", "tokens_per_second", 65_000),
    Target("llama-3.2-1b", "times_trl", 1.2),
    Target("llama-3.2-1b", "allocated_gib", 36),
    Target("qwen3-0.6b", "tokens_per_second", 78_000),
    Target("qwen3-0.6b", "allocated_gib", 20),
    Target("llama-3.1-8b-lora", "tokens_per_second", 13_500),
    Target("llama-3.1-8b-lora", "allocated_gib", 50),
)


def _figures(results: Sequence[Result], part: str, case: str) -> Result | None:
    for result in results:
        if (result["part"], result["case"]) == (part, case) and not result["error"] and result["lines"]:
            return dict(result["lines"][-1])
    return None
