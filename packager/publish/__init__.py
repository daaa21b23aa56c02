"""Folders to branches and back: the plan, the targets, published repositories, rollback."""
