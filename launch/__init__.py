"""Launchers: thin command lines over the package."""
