"""TwigVLM in JAX: visual token pruning and self-speculative decoding for LLaVA."""
