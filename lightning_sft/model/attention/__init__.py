"""Attention within documents that share a row, in exact time and memory of each document.

In: queries, keys and values ``[B, heads, N, D]``, and the lengths of documents.
Out: outputs of the same shape.
May import: machine, types, and model's probes and recurrence.
"""
