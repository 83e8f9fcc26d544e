"""One verb, one file or folder of that name."""
