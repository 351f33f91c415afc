"""Conversations, tokens, images and the embedded digits data."""
