"""Measuring what acceleration costs and gains."""
