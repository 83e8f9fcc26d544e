"""What the data module asks of the Lightning module, ours or a user's own, in one place."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.utilities import rank_zero_warn

from lightning_sft.types import InputError


def check_ids(module: Any, name: str, largest: int, tokenizer: Any) -> None:
    """Refuse token ids that the model has no embeddings for.

    Args:
        module: The Lightning module, or ``None``; it may say ``num_embeddings``.
        name: Of the split.
        largest: Token id in it.
        tokenizer: Name of the tokenizer.

    Raises:
        InputError: When there are some.
    """
    size = getattr(module, "num_embeddings", None)
    if size is not None and largest >= size:
        raise InputError(
            f"data.{name} has the token id {largest:,}, but the model has embeddings for {size:,}: the tokenizer "
            f"{tokenizer!r} is not its own. Leave data.tokenizer out, or take the model it goes with."
        )


def check_lengths(module: Any, name: str, longest: int) -> None:
    """Refuse sequences that are longer than the table of positions of the model.

    Args:
        module: The Lightning module, or ``None``; it may say ``num_positions``.
        name: Of the split.
        longest: Tokens of the longest sequence, or that one may have.

    Raises:
        InputError: When one is longer.
    """
    positions = getattr(module, "num_positions", None)
    if positions is not None and longest > positions:
        raise InputError(
            f"data.{name} has sequences of {longest:,} tokens, but the model has {positions:,} positions. Set "
            f"data.max_length={positions}, and data.overflow to what becomes of longer ones."
        )


def keeps_documents_apart(module: Any) -> bool:
    """Whether documents may be packed into a row, as ``module.isolates_documents`` says; warns where not, or unsaid.

    Args:
        module: The Lightning module, or ``None``.
    """
    if module is None:
        return True
    said = getattr(module, "isolates_documents", None)
    if said is None:
        rank_zero_warn(
            f"data.packing=packed puts several documents into a row, and {type(module).__name__} does not say whether "
            "its model keeps them apart by batch.position_ids. If it does, set isolates_documents = True on the class; "
            "if not, use data.packing=padded."
        )
        return True
    if not said:
        rank_zero_warn(
            "In this model, documents packed into one row see each other (measured on it just now). Each gets a "
            "row of its own instead, as with data.packing=padded: exact, but slower."
        )
    return bool(said)
