"""What of a pretrained model is trained: all of it, adapters, or some of its parameters."""
