"""Build a run, or resume the one that is there."""
