"""``verify``: our proofs, run on a user's model and data.

In: a configuration and its data.
Out: for each check, what was measured, what is allowed and the verdict.
May import: everything but main and other verbs.
"""
