"""Arguments of the classes that users make in Python as attributes, which can be set only where that has an effect."""

from __future__ import annotations

from difflib import get_close_matches
from functools import cache
from inspect import signature
from typing import Any, ClassVar

from lightning.pytorch.utilities import rank_zero_warn

from lightning_sft.io.arguments import check_arguments
from lightning_sft.io.closest import ELSEWHERE
from lightning_sft.types import InputError

_LIKE = 0.88  # similarity above which the name of an attribute is taken for a misspelt argument


class SettledArguments:
    """Base of classes whose arguments are settled by their constructor, which says at its end that it is made."""

    _section: ClassVar[str]  # of a config
    _may_change: ClassVar[frozenset[str]]  # arguments that are read each time they are used
    _is_made = False

    def __setattr__(self, name: str, value: Any) -> None:
        """Refuse a new value for an argument that has been used already, and warn of a misspelt one."""
        if self._is_made:
            self._check(name, value)
        super().__setattr__(name, value)

    def _settle(self, **found: Any) -> None:
        """Set arguments to what they have turned out to be, as ``max_length`` to the model's context length."""
        vars(self).update(found)

    def _check(self, name: str, value: Any) -> None:
        owner = next(kind for kind in type(self).__mro__ if SettledArguments in kind.__bases__)
        known = _arguments(owner)
        if name in self._may_change:
            check_arguments(owner, {name: value}, self._section)
            saved = getattr(self, "hparams", {})  # in checkpoints
            saved.update({name: value} if name in saved else {})
        elif name in known:
            raise InputError(
                f"{owner.__name__}.{name} cannot be set afterwards, only {', '.join(sorted(self._may_change))}. Make a "
                f"new object: {owner.__name__}(..., {name}=...)."
            )
        elif type(self) is owner and not (hasattr(owner, name) or name in vars(self)):  # a subclass may read its own
            section, _, key = ELSEWHERE.get(name, "").partition(".")
            is_ours = section == self._section and not key.startswith("lora.")  # others have a rank
            meant = [key] if is_ours else get_close_matches(name, known, n=1, cutoff=_LIKE)
            if meant:
                rank_zero_warn(f"{owner.__name__} reads no {name!r}. Did you mean {self._section}.{meant[0]}?")


@cache
def _arguments(owner: type[Any]) -> tuple[str, ...]:
    return tuple(signature(owner).parameters)
