"""Attention within documents that share a row."""
