"""The head's logits, a chunk of targets at a time."""
