from __future__ import annotations

from typing import Any

import pytest

from lightning_sft import SFTModule
from lightning_sft.types import InputError


class Logs(SFTModule):
    """As Lightning's own page has it, where the base class does nothing in this hook."""

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.log("norm", 1.0)


class Mixin:
    """A class that does not know of the module."""

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["mine"] = 1


class Mixed(Mixin, SFTModule):
    """The mixin comes first."""


class Derived(Logs):
    """Calls what does not call ours."""

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        super().on_before_optimizer_step(optimizer)


class Setup(SFTModule):
    """Takes what it is given."""

    def setup(self, *args: Any) -> None:
        self.mine = args


class Calls(SFTModule):
    """Calls ours, in each of the ways that there are, and overrides hooks in which ours does nothing."""

    def on_train_start(self) -> None:
        super().on_train_start()

    def on_validation_epoch_end(self) -> None:
        SFTModule.on_validation_epoch_end(self)

    def on_train_end(self) -> None:
        def later() -> None:
            super(Calls, self).on_train_end()

        later()

    def on_after_backward(self) -> None:
        self.mine = 1

    def configure_optimizers(self) -> Any:
        return None


@pytest.mark.parametrize(
    ("kind", "hook"),
    [
        (Logs, r"^Logs.on_before_optimizer_step .* Call super\(\).on_before_optimizer_step\(optimizer\) in it"),
        (Mixed, r"^Mixin.on_save_checkpoint overrides a hook in which SFTModule .*on_save_checkpoint\(checkpoint\)"),
        (Derived, r"^Logs.on_before_optimizer_step"),
        (Setup, r"^Setup.setup .* super\(\).setup\(\*args\)"),
    ],
)
def test_a_hook_that_does_not_call_ours_is_refused_by_name(kind: Any, hook: str) -> None:
    with pytest.raises(InputError, match=hook):
        kind("nowhere")


def test_hooks_that_call_ours_are_taken() -> None:
    Calls("nowhere")
