"""Where a run is, on disk: exact resume, and files that are whole or not there.

In: a trainer between two steps, or the folder of a run.
Out: its position, a :class:`~lightning_sft.checkpoints.reading.Checkpoint`, and the files beside it.
May import: data and training.
"""
