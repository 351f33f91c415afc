"""The arithmetic a training step needs, from shapes."""

from twig_jax.config import TextConfig
from twig_jax.models.flops import decoder_layer, head, vision
from twig_jax.pruning.budget import retained
from twig_jax.training.config import TrainConfig

# A backward pass takes twice what its forward pass takes.
_TRAINED = 3


def step_flops(config: TrainConfig) -> float:
    """Model FLOPs of one step over all devices: multiplications and additions of its matrices.

    Of whole rows, padding included, attention being causal over a row; what is computed twice to
    save memory counts once, as in model FLOP utilisation (Chowdhery et al. 2022, appendix B).
    """
    base, twig = config.model()
    rows, tokens = config.data.batch_size, config.data.row_tokens
    images = rows * config.data.row_images
    encoding = images * vision(base.vision, base.text.hidden_size)
    layer = rows * _layer(base.text, tokens)
    words = head(base.text, rows * tokens)
    naming = head(base.text, images * base.vision.num_tokens)
    match config.stage:
        case "vision":
            return _TRAINED * (encoding + naming)
        case "base":
            return _TRAINED * (encoding + naming + base.text.num_layers * layer + words)
        case _ if config.reinforce.actions:
            return encoding + (twig.K + twig.T) * layer + _tried(config)
        case _:
            teaching = 0.0
            learns = config.distill.prediction or config.distill.attention
            if learns and not config.distill.targets:
                # To the base's end where it teaches words, else to the layer that is learned.
                L = base.text.num_layers
                last = L if config.distill.prediction else config.distill.layer_of(L) + 1
                teaching = (last - twig.K) * layer + words * bool(config.distill.prediction)
            return encoding + twig.K * layer + teaching + _TRAINED * (twig.T * layer + words)


def _tried(config: TrainConfig) -> float:
    """The deep layers on all prunings of a step, at the largest budget."""
    base, twig = config.model()
    part, c = config.reinforce, base.text
    M, L, N = base.vision.num_tokens, c.num_layers, part.text_tokens
    R = retained(max(part.budgets), twig, L, M, part.images)
    deep = (twig.K_f - twig.K) * _layer(c, N + R) + (L - twig.K_f) * _layer(c, N)
    return config.data.batch_size * part.questions * part.actions * (deep + head(c, N))


def _layer(c: TextConfig, tokens: int) -> float:
    """A decoder layer's forward pass on a row, of which each token sees half on average."""
    return decoder_layer(c, tokens, tokens / 2)
