"""Attention over packed documents that costs what the documents cost."""
