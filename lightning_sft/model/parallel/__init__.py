"""Models distributed over several devices."""
