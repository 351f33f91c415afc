"""The token budget (paper, Eq. 6)."""

import math

from twig_jax.config import TwigConfig


def retained(
    average: float, twig: TwigConfig, num_layers: int, num_tokens: int, images: int = 1
) -> int:
    """R, the visual tokens kept in layers K .. K_f-1, for an average of R̄ a layer and image.

    R̄ = [M·K + R·(K_f - K)] / L, so R = ceil(I·(L·R̄ - K·M) / (K_f - K)); `num_tokens` is M and
    `images` I, whose tokens are ranked jointly. A prompt without images keeps none. Raises
    ValueError where no 1 <= R <= I·M reaches the average.
    """
    if images == 0:
        return 0
    K, K_f, L, M = twig.K, twig.K_f, num_layers, num_tokens
    # The subtraction can be a rounding error off a whole number, which ceil would double.
    R = round(images * (L * average - K * M) / (K_f - K), 6)
    if not 0 < R <= images * M:
        low, high = K * M / L, M * K_f / L
        raise ValueError(
            f"no number of kept tokens gives {average:g} visual tokens a layer on average: with "
            f"K={K}, K_f={K_f}, L={L}, M={M} it can be more than {low:g} and at most {high:g}"
        )
    return math.ceil(R)
