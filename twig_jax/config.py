"""Configurations: frozen, hashable dataclasses that every part of the package shares.

Symbols K, T, K_f, M, L, R follow the TwigVLM paper (arXiv 2503.14075).
"""

from dataclasses import dataclass

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
DTYPES = ("float32", "bfloat16", "float16")  # of weights and computation
MODES = ("plain", "ttp", "ssd", "ttp_ssd")
INT8 = ("twig", "all")  # what may be in int8: the twig as it drafts, the base's decoder too


@dataclass(frozen=True)
class VisionConfig:
    """A CLIP vision tower.

    `feature_layer` indexes its hidden states (0 is the embeddings); `class_token` says whether the
    class token's feature is kept as one more visual token (LLaVA-1.5 drops it).
    """

    image_size: int = 336
    patch_size: int = 14
    hidden_size: int = 1024
    intermediate_size: int = 4096
    num_layers: int = 24
    num_heads: int = 16
    layer_norm_eps: float = 1e-5
    feature_layer: int = -2
    class_token: bool = False
    image_mean: tuple[float, float, float] = CLIP_MEAN
    image_std: tuple[float, float, float] = CLIP_STD

    @property
    def num_patches(self) -> int:
        """The patches of one image."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def num_tokens(self) -> int:
        """M, the visual tokens of one image."""
        return self.num_patches + self.class_token

    @property
    def layers_used(self) -> int:
        """Encoder layers that the chosen feature depends on."""
        return self.feature_layer % (self.num_layers + 1)


@dataclass(frozen=True)
class TextConfig:
    """A Llama decoder: grouped-query attention, rotary positions, RMSNorm, SwiGLU.

    With `tied_head` the word embeddings are the head too.
    """

    vocab_size: int = 32064
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_layers: int = 32
    num_heads: int = 32
    num_kv_heads: int = 32
    head_dim: int = 128
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-5
    max_positions: int = 4096
    tied_head: bool = False


@dataclass(frozen=True)
class LlavaConfig:
    """Vision tower, two-layer projector and decoder, with the special token ids."""

    vision: VisionConfig = VisionConfig()
    text: TextConfig = TextConfig()
    image_token_id: int = 32000
    bos_token_id: int = 1
    eos_token_id: int = 2
    pad_token_id: int = 32001


GATES = ("2 * sigmoid", "relu * sigmoid")


@dataclass(frozen=True)
class TwigConfig:
    """A twig of `T` layers grown on the output of base layer K - 1.

    Base layers with 0-based index >= `K_f` see no visual tokens when pruning (FinalWipe). `T` is 0
    where there is no twig, and something else says which tokens to keep after layer K - 1.
    `p_head` gives it a head of its own for that (TwigVLM++), whose gates are one of `GATES`: ours,
    or those of the published checkpoints (see models/twig.py).
    """

    K: int = 2
    T: int = 3
    K_f: int = 24
    p_head: bool = False
    gate: str = GATES[0]

    def check_schedule(self, num_layers: int) -> None:
        """Raises ValueError unless 0 <= K < K_f <= L, for a base of L layers."""
        if not 0 <= self.K < self.K_f <= num_layers:
            raise ValueError(
                f"a twig needs 0 <= K < K_f <= L, not K={self.K}, K_f={self.K_f}, L={num_layers}"
            )

    def check(self, num_layers: int) -> None:
        """`check_schedule`, and ValueError unless T >= 1."""
        self.check_schedule(num_layers)
        if self.T < 1:
            raise ValueError(f"a twig needs T >= 1 layers, not T={self.T}")
