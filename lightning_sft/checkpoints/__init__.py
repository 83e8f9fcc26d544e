"""Where a run is, on disk: its position, its files, what it was told."""
