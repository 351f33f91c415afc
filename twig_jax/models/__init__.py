"""Flax Linen modules, used through their pure `apply`."""
