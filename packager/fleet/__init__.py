"""Many recipes on many machines: which stage of which recipe runs where, and the store that holds what they made."""
