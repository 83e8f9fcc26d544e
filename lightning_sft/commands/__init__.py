"""The command line, one verb a file or folder of its name.

In: a verb's arguments, checked.
Out: what it prints, and an exit code.
May import: everything but main.
"""
