"""Prefill and decoding beside transformers' generate: the same random weights, prompt and threads.

    python -m tests.tools.versus_transformers

Makes a random float32 LLaVA with a decoder of about 300M parameters and 576 visual tokens in a
temporary folder, loads it here and in transformers, checks that both answer one prompt with the
same tokens, and prints medians of interleaved calls at batch 1. Prefill is a call for one token;
decoding what each further token adds to it. Beside them stand the decoder's matrix products with
one vector, and nothing else: what XLA leaves to gain by better attention, norms and bookkeeping.
"""

import os
import statistics
import tempfile
import time
import warnings

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from launch.output import aligned, write_json
from twig_jax.checkpoints.llava import read_llava, write_llava
from twig_jax.config import LlavaConfig, TextConfig, VisionConfig
from twig_jax.decoding.generate import Generator
from twig_jax.decoding.settings import Request, Settings
from twig_jax.models.llava import init_base
from twig_jax.runtime import bandwidth, environment, use_compilation_cache

_NEW = flags.DEFINE_integer("max_new_tokens", 64, "tokens of an answer", lower_bound=2)
_TEXT = flags.DEFINE_integer("text_tokens", 32, "text tokens of the prompt", lower_bound=2)
_LAYERS = flags.DEFINE_integer("layers", 18, "decoder layers", lower_bound=1)
_REPEATS = flags.DEFINE_integer("repeats", 7, "interleaved measurements of each", lower_bound=1)
_THREADS = flags.DEFINE_integer("threads", os.cpu_count(), "torch's; XLA takes all cores")
_JSON = flags.DEFINE_string("json", None, "write results here; - is standard output")


def config() -> LlavaConfig:
    """LLaVA-1.5's vocabulary, image size and visual tokens, with a small tower and decoder."""
    return LlavaConfig(
        vision=VisionConfig(hidden_size=256, intermediate_size=1024, num_layers=4, num_heads=4),
        text=TextConfig(
            hidden_size=1024,
            intermediate_size=2816,
            num_layers=_LAYERS.value,
            num_heads=16,
            num_kv_heads=16,
            head_dim=64,
        ),
    )


def ours(folder: str, ids: np.ndarray, pixels: np.ndarray):
    """new tokens -> the answer int32 [new], by this package."""
    shape, base = read_llava(folder, "float32")
    generator = Generator(shape, base)
    request = Request(ids, ids == shape.image_token_id, pixels=pixels)

    def answer(new: int) -> np.ndarray:
        forced = Settings(mode="plain", max_new_tokens=new, min_new_tokens=new)
        return generator.generate([request], forced)[0].tokens

    return answer


def theirs(folder: str, ids: np.ndarray, pixels: np.ndarray):
    """new tokens -> the answer int32 [new], by transformers."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import torch
        import transformers
    torch.set_num_threads(_THREADS.value)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    model = transformers.LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    model.eval()
    prompt = {
        "input_ids": torch.from_numpy(ids[None].astype(np.int64)),
        "pixel_values": torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy()),
    }
    prompt["attention_mask"] = torch.ones_like(prompt["input_ids"])

    @torch.inference_mode()
    def answer(new: int) -> np.ndarray:
        out = model.generate(**prompt, do_sample=False, max_new_tokens=new, min_new_tokens=new)
        return out[0, len(ids) :].numpy().astype(np.int32)

    return answer


def random_prompt(shape: LlavaConfig) -> tuple[np.ndarray, np.ndarray]:
    """(ids int32 [S] around one image, its pixels [1, H, W, 3])."""
    rng = np.random.default_rng(0)
    words = rng.integers(4, 32000, _TEXT.value).astype(np.int32)
    image = np.full(shape.vision.num_tokens, shape.image_token_id, np.int32)
    size = shape.vision.image_size
    pixels = rng.normal(size=(1, size, size, 3)).astype(np.float32)
    return np.concatenate([words[:2], image, words[2:]]), pixels


def products(kernels: list[jax.Array], x: jax.Array) -> jax.Array:
    """Every kernel [in, out] times one vector, each waiting for the one before; float32 []."""
    for kernel in kernels:
        x = (jnp.full((1, kernel.shape[0]), x) @ kernel).max() * 1e-3
    return x


def products_seconds(text: dict, steps: int = 16, repeats: int = 9) -> float:
    """Median seconds of the decoder's products for one token, in a loop as decoding is."""
    read = [x for name in text if name != "embed_tokens" for x in jax.tree.leaves(text[name])]
    kernels = [x for x in read if x.ndim == 2]

    @jax.jit
    def run(kernels, x):
        return jax.lax.fori_loop(0, steps, lambda _, x: products(kernels, x), x)

    seconds = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        run(kernels, jnp.float32(1)).block_until_ready()
        seconds.append((time.perf_counter() - began) / steps)
    return statistics.median(seconds[1:])


def measure() -> dict:
    """Both ways in turn, after a call of each length that compiles and is compared."""
    shape, new = config(), _NEW.value
    prompt = random_prompt(shape)
    with tempfile.TemporaryDirectory() as folder:
        base = jax.jit(init_base, static_argnums=0)(shape, jax.random.key(0))
        write_llava(folder, jax.tree.map(np.asarray, base), shape, "float32")
        text = base["text"]
        read = sum(
            x.nbytes for name in text if name != "embed_tokens" for x in jax.tree.leaves(text[name])
        )
        alone = products_seconds(text)
        del base, text
        answers = {"ours": ours(folder, *prompt), "transformers": theirs(folder, *prompt)}
    for size in (1, new):
        found = {name: answer(size).tolist() for name, answer in answers.items()}
        if found["ours"] != found["transformers"] or len(found["ours"]) != size:
            raise ValueError(f"the answers differ: {found}")
    times: dict[tuple[str, int], list[float]] = {(n, s): [] for n in answers for s in (1, new)}
    for _ in range(_REPEATS.value):
        for size in (1, new):
            for name, answer in answers.items():
                began = time.perf_counter()
                answer(size)
                times[name, size].append(time.perf_counter() - began)
    rate = bandwidth()
    results = []
    for name in answers:
        first = statistics.median(times[name, 1])
        token = (statistics.median(times[name, new]) - first) / (new - 1)
        results.append(
            {
                "engine": name,
                "prefill_ms": 1e3 * first,
                "token_ms": 1e3 * token,
                "floor_ms": 1e3 * read / rate,
                "floor_share": read / rate / token,
            }
        )
    mine, other = results
    return {
        "schema": 1,
        **environment(),
        "settings": {
            "decoder_mb": read / 1e6,
            "visual_tokens": shape.vision.num_tokens,
            "text_tokens": _TEXT.value,
            "max_new_tokens": new,
            "repeats": _REPEATS.value,
            "threads": _THREADS.value,
        },
        "bandwidth_gb_per_s": rate / 1e9,
        "products_ms": 1e3 * alone,
        "prefill_ratio": other["prefill_ms"] / mine["prefill_ms"],
        "token_ratio": other["token_ms"] / mine["token_ms"],
        "results": results,
    }


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
    use_compilation_cache()
    found = measure()
    write_json(_JSON.value, found)
    if _JSON.value == "-":
        return
    lines = [
        [
            r["engine"],
            f"{r['prefill_ms']:.0f}",
            f"{r['token_ms']:.2f}",
            f"{r['floor_ms']:.2f}",
            f"{r['floor_share']:.0%}",
        ]
        for r in found["results"]
    ]
    print(aligned(["engine", "prefill ms", "token ms", "floor ms", "of floor"], lines))
    print(
        f"transformers' time over ours: prefill {found['prefill_ratio']:.2f}, "
        f"token {found['token_ratio']:.2f}; {found['bandwidth_gb_per_s']:.1f} GB/s read, "
        f"the matrix products alone take {found['products_ms']:.1f} ms"
    )


if __name__ == "__main__":
    app.run(main)
