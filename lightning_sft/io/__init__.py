"""Between the user and us: arguments checked, errors in one line, files written whole.

In: arguments, exceptions, text and bytes.
Out: plain values, :class:`~lightning_sft.types.InputError`, files on disk.
May import: types and machine.
"""
