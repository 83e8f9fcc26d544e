"""The proofs of our tests, run by a user on their own model, data and device: `lightning-sft verify`."""
