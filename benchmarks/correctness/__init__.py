"""A scoreboard of correctness, system by system: the targets of rows, a step that is split, a run that is resumed."""
