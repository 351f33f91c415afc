"""What launchers print and write."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from unicodedata import combining


def aligned(headers: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table for a terminal: columns aligned to the right."""
    rows = [headers, *lines]
    widths = [max(_width(row[i]) for row in rows) for i in range(len(headers))]
    return "\n".join(
        "  ".join(
            " " * (width - _width(cell)) + cell for cell, width in zip(row, widths, strict=True)
        )
        for row in rows
    )


def _width(text: str) -> int:
    """How wide a terminal shows a text: the bar of R̄ stands above its letter."""
    return sum(not combining(character) for character in text)


def speeds(results: Mapping[str, Any]) -> str:
    """What launch.benchmark measured, for a terminal."""
    s, rows = results["settings"], results["results"]
    about = [
        f"{s['model']} ({s['weights']} weights, {s['dtype']}), {s['visual_tokens']} visual + up to "
        f"{s['text_tokens']} text tokens, {results['device']}, "
        f"{results['bandwidth_gb_per_s']:.1f} GB/s read, "
        f"{results['copy_gb_per_s']:.1f} GB/s copied, "
        f"{results['product_tflops']:.2f} TFLOP/s in products"
    ]
    about += _calibrated(results["calibration"])
    columns = (
        ("batch", "batch", "{}"),
        ("tokens", "max_new_tokens", "{}"),
        ("way", "way", "{}"),
        ("prefill ms", "prefill_ms", "{:.1f}"),
        ("of floor", "prefill_share", "{:.0%}"),
        ("text ms", "text_ms", "{:.1f}"),
        ("first ms", "first_token_ms", "{:.1f}"),
        ("token ms", "token_ms", "{:.2f}"),
        ("tokens/s", "tokens_per_s", "{:.0f}"),
        ("RelSpd", "relspd", "{:.2f}"),
        ("predicted", "predicted_relspd", "{:.2f}"),
        ("step ms", "step_ms", "{:.2f}"),
        ("of floor", "floor_share", "{:.0%}"),
        ("TokAR", "tokar", "{:.2f}"),
        ("drafted", "mean_drafted", "{:.2f}"),
        ("accepted", "mean_accepted", "{:.2f}"),
        ("agree", "agreement", "{:.1%}"),
        ("GB", "peak_gb", "{:.2f}"),
        ("compile s", "first_call_s", "{:.1f}"),
        ("cached s", "cached_call_s", "{:.1f}"),
    )
    shown = [
        {**r, "peak_gb": r["peak_bytes"] / 1e9, "text_ms": r["prefill_ms"] - r["vision_ms"]}
        for r in rows
    ]
    lines: list[list[str]] = []
    for before, r in zip([None, *shown], shown, strict=False):
        if before and (before["batch"], before["max_new_tokens"]) != (
            r["batch"],
            r["max_new_tokens"],
        ):
            lines.append([""] * len(columns))
        lines.append(["" if r[k] is None else f.format(r[k]) for _, k, f in columns])
    towers = {r["batch"]: f"{r['vision_ms']:.1f} ms ({r['vision_share']:.0%})" for r in rows}
    towers_of = ", ".join(f"batch {batch} {told}" for batch, told in towers.items())
    recompiled = {(r["batch"], r["max_new_tokens"]): r["recompiled"] for r in rows}
    loads = "" if s["compiled_cold"] else ", which may load what earlier runs left on disk"
    return "\n".join(
        [
            *about,
            aligned([head for head, _, _ in columns], lines),
            f"Vision tower alone, and of its floor: {towers_of}.",
            f"Programs compiled while timing: {sum(recompiled.values())}.",
            "Medians of interleaved calls. prefill: images, prompt, first drafts; text: without\n"
            "the vision tower; first: until first tokens can be read; token: what each after\n"
            "those adds; step: accepted + 1 tokens. Floors: weights and caches of each pass read\n"
            "once at the bandwidth of reading, or its arithmetic at the rate of products,\n"
            "whichever takes longer, both measured.\n"
            "predicted: RelSpd of the floors; agree: tokens equal to those without drafts; GB:\n"
            f"arrays of the larger program; compile: the first call{loads};\n"
            "cached: the same with programs from disk.",
        ]
    )


def parts(spent: Sequence[Any], most: int = 25) -> str:
    """Where the time of a call went, `twig_jax.evaluation.profile.Part`s, for a terminal."""
    total = sum(part.seconds for part in spent)
    lines = [
        [
            part.program,
            f"{1e3 * part.seconds:.2f}",
            f"{part.seconds / total:.1%}",
            f"{part.count}",
            part.name,
        ]
        for part in spent[:most]
    ]
    lines.append(["all", f"{1e3 * total:.2f}", "100.0%", f"{sum(p.count for p in spent)}", ""])
    return aligned(["program", "ms", "share", "times", "part"], lines)


def comparison(results: Mapping[str, Any]) -> str:
    """What launch.compare measured, for a terminal."""
    s, versions, devices = results["settings"], results["versions"], results["devices"]
    about = [
        f"{s['model']} ({s['weights']} weights, {s['dtype']}), {s['visual_tokens']} visual + "
        f"{s['text_tokens']} text tokens, answers of {s['max_new_tokens']}",
        f"twig_jax: jax {versions['jax']} on {devices['twig_jax']}",
        f"transformers {versions['transformers']}: torch {versions['torch']} on "
        f"{devices['transformers']}, {s['threads']} threads",
        *_calibrated(results["calibration"]),
    ]
    columns = (
        ("engine", "engine", "{}"),
        ("way", "way", "{}"),
        ("first ms", "first_token_ms", "{:.1f}"),
        ("token ms", "token_ms", "{:.2f}"),
        ("tokens/s", "tokens_per_s", "{:.1f}"),
        ("RelSpd", "relspd", "{:.2f}"),
        ("of floor", "floor_share", "{:.0%}"),
        ("tokens a step", "tokens_per_step", "{:.2f}"),
        ("agree", "agreement", "{:.1%}"),
    )
    lines = [
        ["" if r[k] is None else f.format(r[k]) for _, k, f in columns] for r in results["results"]
    ]
    failed = [f"{f['engine']} {f['way']} does not work: {f['reason']}" for f in results["failed"]]
    return "\n".join(
        [
            *about,
            aligned([head for head, _, _ in columns], lines),
            *failed,
            "Medians of interleaved calls. first: from the call until first tokens can be read;\n"
            "token: what each after those adds; RelSpd: over transformers' plain, whole calls;\n"
            f"floor: {results['floor_ms']:.2f} ms, weights and caches of a plain step read once at "
            f"{results['bandwidth_gb_per_s']:.1f} GB/s;\n"
            "agree: leading tokens equal to transformers' plain, of ttp_ssd to ttp.",
        ]
    )


def _calibrated(c: Mapping[str, Any] | None) -> list[str]:
    """What a calibration reached, where there was one."""
    if c is None:
        return []
    return [
        f"calibrated: of random weights, for TokAR {c['asked_tokar']:.3f} and "
        f"{c['asked_drafted']:.2f} drafts an iteration; reached {c['tokar']:.3f} and "
        f"{c['mean_drafted']:.2f} over {c['drafts']} drafts"
    ]


def check_writable(*paths: str | None) -> None:
    """Raises OSError, before a long work, for results' files that cannot be written."""
    for path in filter(None, paths):
        if path != "-":
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            new = not Path(path).exists()
            with open(path, "a"):
                pass
            if new:
                Path(path).unlink(missing_ok=True)  # another process may try it, too


def write_json(path: str | None, content: Any) -> None:
    """Writes a result file, into a new folder if need be; "-" is standard output, None nothing."""
    text = json.dumps(content, indent=1, allow_nan=False)
    if path == "-":
        print(text)
    elif path:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(text + "\n")
