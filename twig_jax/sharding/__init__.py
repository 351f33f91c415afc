"""Meshes, sharding rules and placement."""
