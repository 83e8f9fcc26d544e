"""Tiny models and tokenizers that need no download, and the model and data of the quickstart."""

from lightning_sft.demos.tiny import CHATML, tiny_model, tiny_pretrained, tiny_tokenizer

__all__ = ["CHATML", "tiny_model", "tiny_pretrained", "tiny_tokenizer"]
