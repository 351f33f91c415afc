"""Named model shapes."""

from twig_jax.config import LlavaConfig, TextConfig, TwigConfig, VisionConfig

PRESETS: dict[str, tuple[LlavaConfig, TwigConfig]] = {
    "llava-1.5-7b": (LlavaConfig(), TwigConfig()),
    "llava-1.5-13b": (
        LlavaConfig(
            text=TextConfig(
                hidden_size=5120,
                intermediate_size=13824,
                num_layers=40,
                num_heads=40,
                num_kv_heads=40,
            )
        ),
        TwigConfig(K=2, T=3, K_f=30),
    ),
    # LLaVA-1.5's vocabulary, image size and visual tokens, with a tower and a decoder for a CPU.
    "cpu-300m": (
        LlavaConfig(
            vision=VisionConfig(hidden_size=256, intermediate_size=1024, num_layers=4, num_heads=4),
            text=TextConfig(
                hidden_size=1024,
                intermediate_size=2816,
                num_layers=18,
                num_heads=16,
                num_kv_heads=16,
                head_dim=64,
            ),
        ),
        TwigConfig(K=1, T=2, K_f=16),
    ),
    "digits": (
        LlavaConfig(
            vision=VisionConfig(
                image_size=96,
                patch_size=8,
                hidden_size=128,
                intermediate_size=512,
                num_layers=4,
                num_heads=4,
            ),
            text=TextConfig(
                vocab_size=512,
                hidden_size=128,
                intermediate_size=384,
                num_layers=16,
                num_heads=4,
                num_kv_heads=4,
                head_dim=32,
                max_positions=512,
            ),
            image_token_id=3,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
        ),
        TwigConfig(K=1, T=2, K_f=12),
    ),
    # As small as it goes, to try what takes long.
    "toy": (
        LlavaConfig(
            vision=VisionConfig(
                image_size=12,
                patch_size=4,
                hidden_size=16,
                intermediate_size=32,
                num_layers=2,
                num_heads=2,
            ),
            text=TextConfig(
                vocab_size=512,
                hidden_size=64,
                intermediate_size=96,
                num_layers=5,
                num_heads=4,
                num_kv_heads=2,
                head_dim=16,
                max_positions=512,
            ),
            image_token_id=3,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
        ),
        TwigConfig(K=1, T=2, K_f=4),
    ),
}


def preset(name: str) -> tuple[LlavaConfig, TwigConfig]:
    """The base and twig configuration of that name; ValueError lists the known names."""
    if name not in PRESETS:
        raise ValueError(f"no preset {name!r}; there are: {', '.join(PRESETS)}")
    return PRESETS[name]
