"""Metrics, generation and scores."""
