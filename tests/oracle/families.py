"""Which tokens a model's tokenizer and generation config stop at, by what its template writes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache


@dataclass(frozen=True)
class Family:
    """What the files of a model say that its template does not.

    Args:
        mark: Text of a template that tells the family.
        eos: EOS of the tokenizer.
        stops: Further tokens that generation stops at, by the generation config.
        bos: BOS of the tokenizer.
    """

    mark: str
    eos: str
    stops: tuple[str, ...] = ()
    bos: str = "<s>"


FAMILIES = (
    Family("<|END_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", bos="<BOS_TOKEN>"),
    Family("<|return|>", "<|return|>", ("<|call|>", "<|endoftext|>"), bos="<|startoftext|>"),
    Family("<|observation|>", "<|endoftext|>", ("<|user|>", "<|observation|>")),
    Family("<|eot_id|>", "<|eot_id|>", ("<|end_of_text|>", "<|eom_id|>"), bos="<|begin_of_text|>"),
    Family("<|eot|>", "<|eot|>", ("<|end_of_text|>", "<|eom|>"), bos="<|begin_of_text|>"),
    Family("<end_of_turn>", "<eos>", ("<end_of_turn>",), bos="<bos>"),
    Family("<turn|>", "<eos>", ("<turn|>", "<|tool_response>"), bos="<bos>"),
    Family("<｜end▁of▁sentence｜>", "<｜end▁of▁sentence｜>", bos="<｜begin▁of▁sentence｜>"),
    Family("<｜User｜>", "<｜end▁of▁sentence｜>", bos="<｜begin▁of▁sentence｜>"),
    Family("<|im_end|>", "<|im_end|>", ("<|endoftext|>",)),
    Family("<|end_of_role|>", "<|end_of_text|>", bos="<|end_of_text|>"),
    Family("<|start_of_role|>", "<|end_of_text|>", bos="<|end_of_text|>"),
    Family("<|assistant_end|>", "<|assistant_end|>"),
    Family("<SPECIAL_12>", "<SPECIAL_12>", ("<SPECIAL_11>",)),
    Family("[e~[", "[e~["),
    Family("<|tool_call:begin|>", "<|endoftext|>", ("<|end|>", "<|flush|>", "<|calls|>")),
    Family("<|end_of_msg|>", "<|end_of_msg|>"),
    Family("<seed:eos>", "<seed:eos>"),
    Family("<|end_of_sentence|>", "<|end_of_sentence|>"),
    Family("<|role_end|>", "<|role_end|>", ("<|endoftext|>",)),
    Family("<|end_of_turn|>", "<|end_of_turn|>"),
    Family("<|end|>", "<|endoftext|>", ("<|end|>",)),
    Family("<end_of_utterance>", "<end_of_utterance>", bos="<|im_start|>"),
    Family("</assistant>", "</assistant>"),
)


@lru_cache(maxsize=1024)
def family_of(template: str) -> Family:
    """The family of a template; one that none tells ends answers with ``</s>``."""
    return next((family for family in FAMILIES if family.mark in template), Family("", "</s>"))
