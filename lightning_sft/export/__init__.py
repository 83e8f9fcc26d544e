"""Checkpoints become Hugging Face folders, compared with what was trained before they get their name.

In: a checkpoint, or a model in training.
Out: a folder with safetensors, tokenizer and model card; a GGUF file.
May import: module and what is to its left.
"""
