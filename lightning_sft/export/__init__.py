"""Export of checkpoints to Hugging Face folders, compared with the trained model."""
