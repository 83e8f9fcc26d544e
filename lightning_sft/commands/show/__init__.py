"""``show``: the training data token by token."""
