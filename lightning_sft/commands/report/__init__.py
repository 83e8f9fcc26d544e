"""``report``: a run as an HTML page."""
