"""Reading and writing models and training states."""
