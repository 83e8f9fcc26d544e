"""``show``: what will be trained on, token by token.

In: a configuration and its data.
Out: sequences, tables and an audit, in the terminal or as a page.
May import: everything but main and other verbs.
"""
