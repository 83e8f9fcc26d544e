"""``report``: a run as one HTML page.

In: run.json, metrics.jsonl and samples of a run.
Out: a page that loads nothing.
May import: callbacks, checkpoints and io.
"""
