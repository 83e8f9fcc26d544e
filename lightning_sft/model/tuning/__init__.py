"""What of a model is trained: adapters, frozen parameters, new tokens."""
