"""The data path: a file becomes rows, rows become tokens, tokens become micro-batches.

In: files, folders, hub names, lists.
Out: micro-batches ``[B, N]`` with the Z of their step.
May import: types, io, objective; inside: rows, tokens, batches, inspect, in this order.
"""
