"""Helpers of tests/drop_in: the code of the pages on existing projects, run as a user would."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tests.helpers import pages

PAGE = "".join(pages.page(f"howto/{name}.md") for name in ("drop_in", "subclass", "integrations"))


def blocks(heading: str, language: str = "python") -> list[str]:
    """The blocks of code of a section."""
    return pages.blocks(pages.section(PAGE, f"## {heading}"), language)


def run_code(heading: str, number: int = 0, **scope: Any) -> dict[str, Any]:
    """What a block of code leaves behind."""
    exec(blocks(heading)[number], scope := {"__name__": "page", **scope})
    return scope


def flat_gradient(model: nn.Module) -> Tensor:
    """In the order of the module's parameter groups, as tests.helpers.gradients.Recorder has it."""
    in_order = sorted(model.parameters(), key=lambda p: p.ndim <= 1)
    return torch.cat([p.grad.flatten().double() for p in in_order if p.grad is not None])
