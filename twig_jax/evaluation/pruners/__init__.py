"""Rivals of the twig: other ways to choose visual tokens, on the same engine and budget."""

from twig_jax.evaluation.pruners import (
    attention,
    baselines,
    diversity,
    pyramiddrop,
    sparsevlm,
    visionzip,
)
from twig_jax.evaluation.pruners.probe import (
    Pruner,
    after_two_layers,
    as_the_twig,
    before_decoder,
)

PRUNERS: dict[str, Pruner] = {
    "twig": Pruner("TwigVLM, arXiv 2503.14075", as_the_twig, selector="twig"),
    "random": Pruner("a baseline", as_the_twig, baselines.random),
    "uniform": Pruner("a baseline", as_the_twig, baselines.uniform),
    # The twig's ablation of what guides: attention in the trunk, and as deep as the twig's own.
    "base_K": Pruner("TwigVLM, arXiv 2503.14075", as_the_twig, selector="fastv"),
    "base_K+T": Pruner("TwigVLM, arXiv 2503.14075", as_the_twig, attention.deeper),
    # Of a twig with a P-Head, what it would do without.
    "twig_attention": Pruner("TwigVLM, arXiv 2503.14075", as_the_twig, selector="attention"),
    "fastv": Pruner("FastV, arXiv 2403.06764", after_two_layers, selector="fastv"),
    "fastv_all_text": Pruner("FastV, arXiv 2403.06764", after_two_layers, attention.fastv_all_text),
    "fastervlm": Pruner("FasterVLM, arXiv 2412.01818", before_decoder, attention.class_token),
    "visionzip": Pruner("VisionZip, arXiv 2412.04467", before_decoder, visionzip.visionzip),
    "divprune": Pruner("DivPrune, arXiv 2503.02175", before_decoder, diversity.divprune),
    "dart": Pruner("DART, arXiv 2502.11494", after_two_layers, diversity.dart),
    "pyramiddrop": Pruner("PyramidDrop, arXiv 2410.17247", pyramiddrop.pyramid),
    "sparsevlm": Pruner("SparseVLM, arXiv 2410.04417", sparsevlm.sparse),
}
