"""What ``show``, ``verify`` and the run record read from the stages before.

In: rows, examples and micro-batches.
Out: documents with their place in the epoch, printable tokens, an audit, tables.
May import: all of data.
"""
