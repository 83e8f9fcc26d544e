"""What `show`, `verify` and the record read from rows, tokens and batches."""
