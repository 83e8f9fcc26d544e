"""The memory of a step, before it is taken."""
