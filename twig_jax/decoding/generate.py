"""From requests to results: buckets, compiled programs, timings."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from twig_jax.config import MODES, LlavaConfig, TwigConfig
from twig_jax.decoding.cache import Limits, Trace
from twig_jax.decoding.loop import decode
from twig_jax.decoding.network import Program, Weights
from twig_jax.decoding.prefill import SELECTORS, Inputs, prefill
from twig_jax.models.llava import Llava, Params
from twig_jax.pruning.budget import retained

_UNBOUNDED = 2**30
_CHUNK = 1  # iterations between two looks at what came, where somebody watches


@dataclass(frozen=True)
class Request:
    """One prompt.

    ids int32 [S] with image slots, is_visual bool [S]; pixels float32 [I, H, W, 3], normalised, or
    visual [I·M, d], already embedded; neither for text. `avg_retained` and `max_new_tokens`
    override the call's; `scores` float32 [S] is what selector "given" ranks.
    """

    ids: np.ndarray
    is_visual: np.ndarray
    pixels: np.ndarray | None = None
    visual: np.ndarray | None = None
    avg_retained: float | None = None
    max_new_tokens: int | None = None
    scores: np.ndarray | None = None


@dataclass(frozen=True)
class Settings:
    """How to decode. `gamma` is the most drafts an iteration, `theta` where drafting stops."""

    mode: str = "ttp_ssd"
    avg_retained: float | None = None
    selector: str = "twig"
    max_new_tokens: int = 128
    gamma: int = 5
    theta: float = 0.6
    text_multiple: int = 32  # prompts are padded to a multiple of this many text tokens

    @property
    def prune(self) -> bool:
        """Whether the mode prunes visual tokens."""
        return self.mode in ("ttp", "ttp_ssd")

    @property
    def draft(self) -> bool:
        """Whether the mode speculates."""
        return self.mode in ("ssd", "ttp_ssd")


@dataclass(frozen=True)
class Result:
    """One answer, and how it came about."""

    tokens: np.ndarray  # int32 [n], EOS left out
    stopped_by: str  # "eos" or "length"
    accepted: np.ndarray  # bool [n], True where the token was an accepted draft
    drafts: list[np.ndarray]  # tokens drafted in each iteration
    probs: list[np.ndarray]  # their probabilities under the twig
    matched: np.ndarray  # int32 [iterations], accepted drafts
    kept: np.ndarray  # int32, prompt slots of the visual tokens kept
    scores: np.ndarray  # float32 [S], what they were ranked by
    logits: np.ndarray  # float32 [V], the base's at the last prompt token
    prefill_s: float  # seconds of the whole batch: images, prompt and first drafts
    decode_s: float  # seconds of the whole batch: the loop
    batch: int


class Generator:
    """A base with its twig, ready to answer; compiled programs are kept per bucket."""

    def __init__(
        self,
        config: LlavaConfig,
        base: Params,
        twig_config: TwigConfig | None = None,
        twig: Params | None = None,
    ) -> None:
        self.config = config
        self.twig_config = twig_config
        if twig_config is not None:
            twig_config.check(config.text.num_layers)
        self.weights = Weights(base, twig)

    def generate(
        self,
        requests: Sequence[Request],
        settings: Settings,
        watch: Callable[[list[np.ndarray]], None] | None = None,
    ) -> list[Result]:
        """Answers one batch, in order.

        watch: is given the tokens of every row so far after every iteration; the tokens do not
        depend on it.
        Raises ValueError for bad settings or requests, before anything runs: an unknown mode or
        selector, a budget without solution, a mode that needs a twig without one, image slots that
        do not match the images.
        """
        program, inputs, limits = self.prepare(requests, settings)
        began = time.perf_counter()
        inputs = inputs._replace(visual=self._embed(requests, program))
        state, signals, logits = _prefill(program, self.weights, inputs, limits)
        jax.block_until_ready(state.n)
        middle = time.perf_counter()
        chunk = _UNBOUNDED if watch is None else _CHUNK
        finished = False
        while not finished:
            state = _decode(program, self.weights, state, limits, chunk)
            if watch is None:
                jax.block_until_ready(state.n)
                break
            tokens, n, done = jax.device_get((state.tokens, state.n, state.done))
            watch([_emitted(row, length, limits) for row, length in zip(tokens, n, strict=True)])
            finished = bool(done.all())
        times = (middle - began, time.perf_counter() - middle)
        keep = (state.tokens, state.n, state.iterations, state.trace, signals, logits)
        tokens, n, iterations, trace, signals, logits = jax.device_get(keep)
        results = []
        for b, request in enumerate(requests):
            emitted = _emitted(tokens[b], n[b], limits)
            size = len(emitted)
            rounds = int(iterations[b])
            kept = signals.kept[b][signals.kept[b] < len(request.ids)]
            results.append(
                Result(
                    tokens=emitted,
                    stopped_by="eos" if size < n[b] else "length",
                    accepted=trace.accepted[b, :size],
                    drafts=_ragged(trace, trace.drafts, b, rounds),
                    probs=_ragged(trace, trace.probs, b, rounds),
                    matched=trace.matched[b, :rounds],
                    kept=kept[request.is_visual[kept]],
                    scores=signals.scores[b, : len(request.ids)],
                    logits=logits[b],
                    prefill_s=times[0],
                    decode_s=times[1],
                    batch=len(requests),
                )
            )
        return results

    def prepare(
        self, requests: Sequence[Request], settings: Settings
    ) -> tuple[Program, Inputs, Limits]:
        """The program and padded inputs of a batch; visual embeddings are still missing."""
        if settings.mode not in MODES:
            raise ValueError(f"no mode {settings.mode!r}; there are: {', '.join(MODES)}")
        if settings.selector not in SELECTORS:
            raise ValueError(
                f"no selector {settings.selector!r}; there are: {', '.join(SELECTORS)}"
            )
        if not requests:
            raise ValueError("a batch needs at least one request")
        if (settings.prune or settings.draft) and self.twig_config is None:
            raise ValueError(f"mode {settings.mode} needs a twig; load one, or use mode plain")
        M = self.config.vision.num_tokens
        images, budgets, texts, news = [], [], [], []
        for i, request in enumerate(requests):
            slots = int(request.is_visual.sum())
            given = sum(
                0 if x is None else f * len(x)
                for x, f in ((request.pixels, M), (request.visual, 1))
            )
            if len(request.ids) == 0 or len(request.ids) != len(request.is_visual):
                raise ValueError(f"request {i}: ids and is_visual must have one length above 0")
            if request.is_visual[-1]:
                raise ValueError(f"request {i}: the prompt's last token must be text")
            if slots != given:
                raise ValueError(
                    f"request {i}: the prompt has {slots} image slots but its images give {given} "
                    "visual tokens"
                )
            if settings.prune and slots % M:
                raise ValueError(f"request {i}: {slots} visual tokens are no whole images of {M}")
            images.append(-(-slots // M))
            texts.append(len(request.ids) - slots)
            budgets.append(self._budget(request, settings, images[-1]))
            new = request.max_new_tokens
            news.append(settings.max_new_tokens if new is None else new)
        if min(news) < 0 or max(news) < 1:
            raise ValueError(f"max_new_tokens must be at least 1, not {min(news)}")
        step = settings.text_multiple
        program = Program(
            base=self.config,
            twig=self.twig_config or TwigConfig(K=1, T=1, K_f=self.config.text.num_layers),
            prune=settings.prune,
            draft=settings.draft and settings.gamma > 0,
            text_slots=-(-max(texts) // step) * step,
            images=max(images),
            retained_slots=max(budgets),
            width=settings.gamma + 1 if settings.draft else 1,
            max_new=max(news),
        )
        B, P = len(requests), program.prompt_slots
        tokens = np.zeros((B, P), np.int32)
        is_visual = np.zeros((B, P), bool)
        scores = np.zeros((B, P), np.float32)
        for b, request in enumerate(requests):
            tokens[b, : len(request.ids)] = request.ids
            is_visual[b, : len(request.ids)] = request.is_visual
            if request.scores is not None:
                scores[b, : len(request.ids)] = request.scores
            elif settings.prune and settings.selector == "given":
                raise ValueError(f'request {b}: selector "given" needs scores')
        inputs = Inputs(
            tokens=jnp.asarray(tokens),
            is_visual=jnp.asarray(is_visual),
            lengths=jnp.asarray([len(r.ids) for r in requests], jnp.int32),
            visual=jnp.zeros((B, 0, self.config.text.hidden_size)),
            retained=jnp.asarray(budgets, jnp.int32),
            scores=jnp.asarray(scores),
            selector=jnp.int32(SELECTORS.index(settings.selector)),
        )
        limits = Limits(
            max_new=jnp.asarray(news, jnp.int32),
            gamma=jnp.int32(settings.gamma),
            theta=jnp.float32(settings.theta),
            eos=jnp.int32(self.config.eos_token_id),
        )
        return program, inputs, limits

    def _budget(self, request: Request, settings: Settings, images: int) -> int:
        if not settings.prune:
            return images * self.config.vision.num_tokens
        average = request.avg_retained
        average = settings.avg_retained if average is None else average
        if average is None:
            raise ValueError(f"mode {settings.mode} needs avg_retained")
        assert self.twig_config is not None
        return retained(
            average,
            self.twig_config,
            self.config.text.num_layers,
            self.config.vision.num_tokens,
            images,
        )

    def _embed(self, requests: Sequence[Request], program: Program) -> jax.Array:
        """Visual embeddings [B, I·M, d]; a row with fewer images is padded at its end."""
        d = self.config.text.hidden_size
        M = self.config.vision.num_tokens
        width = program.images * M
        dtype = self.weights.base["text"]["embed_tokens"]["embedding"].dtype
        if not width:
            return jnp.zeros((len(requests), 0, d), dtype)
        if any(r.visual is not None for r in requests):
            given = np.zeros((len(requests), width, d), np.float32)
            for b, request in enumerate(requests):
                if request.visual is not None:
                    given[b, : len(request.visual)] = request.visual
                elif request.pixels is not None:
                    raise ValueError("a batch takes pixels or visual embeddings, not both")
            return jnp.asarray(given, dtype)
        size = self.config.vision.image_size
        pixels = np.zeros((len(requests), program.images, size, size, 3), np.float32)
        for b, request in enumerate(requests):
            if request.pixels is not None:
                pixels[b, : len(request.pixels)] = request.pixels
        return _encode(self.config, self.weights.base, jnp.asarray(pixels, dtype))


def _emitted(tokens: np.ndarray, n: int, limits: Limits) -> np.ndarray:
    """A row's tokens so far, without its EOS."""
    return tokens[: n - 1] if n > 0 and tokens[n - 1] == limits.eos else tokens[:n]


def _ragged(trace: Trace, values: np.ndarray, row: int, rounds: int) -> list[np.ndarray]:
    counts = (trace.drafts[row, :rounds] >= 0).sum(1)
    return [values[row, i, :count] for i, count in enumerate(counts)]


def encode(config: LlavaConfig, base: Params, pixels: jax.Array) -> jax.Array:
    """Normalised pixels [B, I, H, W, 3] -> visual embeddings [B, I·M, d]."""
    return Llava(config).apply({"params": base}, pixels, method="encode")


_encode = jax.jit(encode, static_argnums=0)
_prefill = jax.jit(prefill, static_argnums=0)
_decode = jax.jit(decode, static_argnums=0, donate_argnums=2)
