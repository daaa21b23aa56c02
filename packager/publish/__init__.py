"""Publish folders as branches: the plan, the targets, published repositories, rollback."""
