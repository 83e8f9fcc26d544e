"""Greedy answers of a model to prompts."""

from __future__ import annotations

from typing import Any

from lightning_sft.data.loader import PromptBatch


def answers(model: Any, batch: PromptBatch, max_new_tokens: int) -> list[dict[str, Any]]:
    """Greedy answers of a transformers model: one row a prompt.

    An answer ends with the stop token that training teaches, or with one of the model's generation config.

    Returns:
        Rows of ``source`` (``file:line``), ``prediction`` and ``reference`` (``None`` where the data has none).
    """
    of_model = model.generation_config.eos_token_id
    stops = {*(of_model if isinstance(of_model, list) else [of_model]), batch.stop_id} - {None}
    generated = model.generate(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        use_cache=True,
        pad_token_id=batch.pad_id,
        eos_token_id=sorted(stops) or None,
    )
    texts = batch.tokenizer.batch_decode(generated[:, batch.input_ids.shape[1] :], skip_special_tokens=True)
    return [
        {"source": prompt.provenance, "prediction": text, "reference": prompt.reference}
        for prompt, text in zip(batch.prompts, texts, strict=True)
    ]
