"""``verify``: the checks of the test suite on a user's model and data."""
