"""Choosing by attention: in the decoder's first layers, or in the vision tower."""

from twig_jax.evaluation.pruners.probe import Probe
from twig_jax.pruning.schedule import Ranked


def fastv_all_text(probe: Probe, retained: int) -> Ranked:
    """Attention in layer K-1, the mean over all text tokens (those before an image give 0)."""
    asks = ~probe.is_visual & probe.real
    rows = probe.attention(probe.K - 1).mean(1, where=asks[..., None])
    return Ranked(probe.of_visual(rows))


def deeper(probe: Probe, retained: int) -> Ranked:
    """The last token's attention in the base's layer K+T-1 (0-based): as deep as the twig's."""
    layer = min(probe.twig.K + probe.twig.T, probe.config.text.num_layers) - 1
    return Ranked(probe.of_visual(probe.last(probe.attention(layer))))


def class_token(probe: Probe, retained: int) -> Ranked:
    """Attention of the vision tower's class token: the question is not asked."""
    return Ranked(probe.class_attention)
