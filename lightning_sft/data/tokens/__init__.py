"""2. Conversations become examples: token ids and target weights."""
