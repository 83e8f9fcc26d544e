"""Checkpoints to Hugging Face folders, compared with what was trained."""
