"""Writing only the adapters, to a folder that peft reads."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any, Literal

from transformers import PreTrainedModel

from lightning_sft.export.per_expert import per_expert
from lightning_sft.io.arguments import check_arguments
from lightning_sft.io.disk import share
from lightning_sft.model.tuning import new_tokens
from lightning_sft.model.tuning.adapters import ADAPTER_NAME, is_adapter
from lightning_sft.types import InputError

AdapterLayout = Literal["fused", "per_expert"]
"""How adapters on fused experts are written: as peft holds them, or one pair of matrices for each expert."""


def save_adapter(model: PreTrainedModel, folder: Path, base: str, layout: AdapterLayout = "fused") -> None:
    """Write only the adapters, for ``peft.PeftModel.from_pretrained(base_model, folder)``.

    With rows of new tokens, the base model's embeddings must first be resized to the size of the tokenizer.

    Args:
        model: Unsharded model with adapters.
        folder: Folder for ``adapter_model.safetensors`` and ``adapter_config.json``; created if needed.
        base: Name or path of the base model.
        layout: How adapters on fused experts are written, see docs/concepts/experts.md.

    Raises:
        InputError: When there are no adapters, other parameters were trained as well, or the layout is not that of any
            published checkpoint of the architecture.
    """
    check_arguments(save_adapter, {"layout": layout})
    if not hasattr(model, "peft_config"):
        raise InputError("The model has no adapters (model.lora), so there is nothing to write. Export the model.")
    rows = new_tokens.modules(model)
    others = [n for n, p in model.named_parameters() if p.requires_grad and not is_adapter(n) and "new_rows" not in n]
    if others:
        raise InputError(
            f"Besides adapters, {others[0]} and {len(others) - 1} more parameters were trained, which peft's format "
            "cannot hold. Export the merged model."
        )
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    config: Any = deepcopy(model.peft_config[ADAPTER_NAME])
    config.base_model_name_or_path, config.inference_mode = base, True
    found = get_peft_model_state_dict(model, adapter_name=ADAPTER_NAME, save_embedding_layers=False)
    if layout == "per_expert":
        found = per_expert(model, found, config)
    if rows:
        config.trainable_token_indices = {name.rpartition(".")[2]: m.new_ids.tolist() for name, m in rows.items()}
        found |= {f"{name}.token_adapter.trainable_tokens_delta": m.new_rows for name, m in rows.items()}
        if len({id(m.new_rows) for m in rows.values()}) < len(rows):  # tied: peft keeps them once, at the embeddings
            first, *tied = rows
            config.trainable_token_indices = rows[first].new_ids.tolist()
            found = {key: value for key, value in found.items() if not key.startswith(tuple(f"{n}." for n in tied))}
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {f"base_model.model.{key}": value.detach().cpu().contiguous() for key, value in found.items()}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(str(folder))
    share(folder / "adapter_model.safetensors")
