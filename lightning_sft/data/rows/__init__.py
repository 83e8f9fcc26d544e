"""Stage 1: a file becomes conversations.

In: JSONL, JSON, CSV, Parquet, Arrow, folders, hub names, lists.
Out: :class:`~lightning_sft.types.Conversation` objects, each with its ``file:line``.
May import: types and io.
"""
