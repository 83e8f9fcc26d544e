"""Our proofs, on a user's model and data."""
