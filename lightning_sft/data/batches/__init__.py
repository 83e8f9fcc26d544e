"""3. Examples become micro-batches, each with the Z of its step."""
