"""LLaVA's instruction data as a data set of TFDS, images included."""
