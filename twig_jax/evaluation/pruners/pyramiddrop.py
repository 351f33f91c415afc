"""PyramidDrop: at several layers, the tokens that the prompt's last one attends to least go."""

from twig_jax.config import TwigConfig
from twig_jax.evaluation.pruners.stages import staged
from twig_jax.pruning.schedule import Ranked, Schedule, View


def pyramid(num_layers: int, twig: TwigConfig) -> Schedule:
    """Two of 32 layers, or the same share of others, see all M tokens.

    The rest are three equal stages that see M·λ, M·λ² and M·λ³, rounded up, with the least λ that
    reaches R̄. The paper halves the tokens at layers 8, 16 and 24 of 32: its first eight layers
    alone are above an average of M/9, so that here the ratio depends on the budget, and the stages
    begin as early as FastV's.
    """
    K = max(1, round(num_layers / 16))
    layers = tuple(K + round(i * (num_layers - K) / 3) for i in range(3))
    return staged(layers, lambda ratio: (ratio, ratio**2, ratio**3), last_token)


def last_token(view: View) -> Ranked:
    """Attention of the prompt's last token in the layer before.

    The paper's code asks the query and the keys of the layer after, which are computed for this
    alone; ours are at hand.
    """
    return Ranked(view.attention(view.last[:, None])[:, 0])
