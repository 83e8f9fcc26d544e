"""Devices, memory allocators, compilers and the terminal.

In: a device or a process.
Out: copies without waiting, dtypes and modes, peak rates, text that is safe to print.
May import: nothing of ours.
"""
