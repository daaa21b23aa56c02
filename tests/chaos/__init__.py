"""Builds, publishes and hostile inputs at random moments, from a seed and within a budget: `nox -s chaos`."""
