"""Inspection of rows, tokens and batches for `show`, `verify` and the record."""
