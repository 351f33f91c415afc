"""The arithmetic of a forward pass, from shapes: multiplications and additions of its matrices."""

from twig_jax.config import TextConfig, VisionConfig


def layer_weights(c: TextConfig) -> int:
    """Parameters of a decoder layer's matrices."""
    queries, keys = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    return c.hidden_size * (2 * queries + 2 * keys + 3 * c.intermediate_size)


def decoder_layer(c: TextConfig, tokens: float, context: float) -> float:
    """A decoder layer on so many tokens, of which each sees `context` tokens on average."""
    # Scores and sums of values.
    attention = 2 * 2 * c.num_heads * c.head_dim * tokens * context
    return 2 * tokens * layer_weights(c) + attention


def head(c: TextConfig, tokens: float) -> float:
    """Logits of so many tokens."""
    return tokens * 2 * c.hidden_size * c.vocab_size


def vision(c: VisionConfig, width: int) -> float:
    """Vision tower, and projector to `width`, on an image."""
    tokens, d = c.num_patches + 1, c.hidden_size
    patches = c.num_patches * 2 * 3 * c.patch_size**2 * d
    weights = 4 * d * d + 2 * d * c.intermediate_size
    layer = 2 * tokens * weights + 2 * 2 * d * tokens * tokens
    return patches + c.layers_used * layer + c.num_tokens * 2 * (d * width + width * width)
