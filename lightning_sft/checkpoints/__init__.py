"""The state of a run on disk: checkpoints, exact resume, the files of its folder."""
