"""Arguments as plain values: Hydra passes its own list and dictionary types to the objects it instantiates."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def plain(value: Any) -> Any:
    """A list or dictionary of OmegaConf as one of Python, a path as its text; anything else as it is.

    A checkpoint holds plain values only, and rows are told by being dictionaries.

    Args:
        value: An argument as it was given.

    >>> plain([1, "a"]), plain(None), plain(Path("a", "b"))
    ([1, 'a'], None, 'a/b')
    """
    if isinstance(value, Path):
        return str(value)
    if type(value).__module__.partition(".")[0] != "omegaconf":
        return value
    from omegaconf import OmegaConf

    return OmegaConf.to_object(value)
