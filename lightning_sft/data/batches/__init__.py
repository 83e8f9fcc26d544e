"""Stage 3: examples become micro-batches.

In: examples, and how a step is split over ranks and accumulation.
Out: :class:`~lightning_sft.types.Batch` objects ``[B, N]``, each with the Z of its step.
May import: data.rows and data.tokens.
"""
