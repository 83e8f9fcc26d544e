"""``plan``: the memory and the steps of a fit, before it runs.

In: a configuration; no weights.
Out: bytes by kind and moment, and what to change if they do not fit.
May import: everything but main and other verbs.
"""
