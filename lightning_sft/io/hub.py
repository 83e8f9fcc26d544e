"""The Hugging Face hub: whether it answers, before anything waits for it."""

from __future__ import annotations

import socket
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies

from lightning_sft.types import InputError

_SECONDS = 5.0


def check_reachable(name: str, expected: str) -> None:
    """Refuse a name that is neither here nor on the hub, before libraries try the hub again and again for a minute.

    Args:
        name: A folder or a file, or the name of a repository of the hub.
        expected: What is expected, for the message.

    Raises:
        InputError: When the name is no path and not in the cache, and the hub does not answer.
    """
    from huggingface_hub import constants, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    if Path(name).exists() or constants.HF_HUB_OFFLINE or getproxies():  # libraries then fail at once, or use a proxy
        return
    try:
        if isinstance(try_to_load_from_cache(name, "config.json"), str):
            return
    except HFValidationError:  # no name of a repository
        raise InputError(f"There is no folder or file {name!r} here; expected {expected}.") from None
    hub = urlsplit(constants.ENDPOINT)
    try:
        socket.create_connection((hub.hostname or "", hub.port or 443), timeout=_SECONDS).close()
    except OSError as error:
        raise InputError(
            f"There is no folder or file {name!r} here; expected {expected}. It is not in the cache of the hub either, "
            f"and {constants.ENDPOINT} cannot be reached: {error}."
        ) from None
