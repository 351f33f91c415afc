"""Weights from and to the formats people have: LLaVA-1.5 bases and their twigs.

python -m launch.convert --source llava-hf/llava-1.5-7b-hf --to orbax --out models/7b
python -m launch.convert --source twig-checkpoint --to orbax --out models/twig --K 2 --K_f 24 \\
    --base models/7b

what:  --source --to --out; --vision_source for original LLaVA, --K --K_f --base for a twig
how:   --dtype --mesh
check: --dry_run before, --verify after
"""

import sys
from pathlib import Path

from absl import app, flags, logging

from launch import run
from twig_jax.config import DTYPES

_SOURCE = flags.DEFINE_string("source", None, "folder or hub id of a base or a twig")
_TO = flags.DEFINE_enum("to", None, ["orbax", "hf", "twig-official"], "the format to write")
_OUT = flags.DEFINE_string("out", None, "local folder to write, which must not be there yet")
_VISION = flags.DEFINE_string(
    "vision_source", None, "folder or hub id of the CLIP tower of an original LLaVA checkpoint"
)
_DTYPE = flags.DEFINE_enum("dtype", None, DTYPES, "type to store; as the source has it if none")
_K = flags.DEFINE_integer("K", None, "trunk layers under a twig that does not say")
_K_F = flags.DEFINE_integer("K_f", None, "first layer without visual tokens, for such a twig")
_BASE = flags.DEFINE_string("base", None, "the base a twig grew on, to mark it with")
_MESH = flags.DEFINE_list("mesh", None, "data,fsdp,tensor: write an orbax tree in these shardings")
_VERIFY = flags.DEFINE_bool("verify", False, "read everything again and compare checksums")
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "list every tensor and where it goes, and stop")


def main(argv: list[str]) -> None:
    if len(argv) > 1 or not (_SOURCE.value and _TO.value and (_OUT.value or _DRY_RUN.value)):
        raise app.UsageError("give --source, --to and --out")
    logging.set_verbosity(logging.FATAL)  # what libraries log of an error is told once, below
    try:
        convert()
    except (ImportError, OSError, ValueError) as error:
        sys.exit(f"convert: {error}")


def convert() -> None:
    """Plans, writes and verifies as the flags say."""
    import jax
    from tqdm import tqdm

    from twig_jax.checkpoints import convert as c
    from twig_jax.checkpoints.llava import local_folder
    from twig_jax.checkpoints.processor_files import has_tokenizer
    from twig_jax.data.tokens import conventions, load_tokenizer
    from twig_jax.sharding.mesh import make_mesh

    def folder(name: str | None) -> Path | None:
        return None if name is None else local_folder(name)

    to, out = _TO.value or "", Path(_OUT.value or "")
    if "://" in (_OUT.value or ""):
        raise ValueError(f"--out {_OUT.value} is no local folder; write one and copy it there")
    sizes = _MESH.value or []
    if sizes and (to != "orbax" or len(sizes) > 3 or not all(map(str.isdecimal, sizes))):
        raise ValueError("--mesh takes numbers data,fsdp,tensor, and goes with --to orbax alone")
    source = local_folder(_SOURCE.value or "")
    mesh = None
    if _MESH.value is not None:
        mesh = make_mesh(*map(int, _MESH.value))
    else:  # accelerators have no part in it, and may be busy
        jax.config.update("jax_platforms", "cpu")
    with c.plan(
        source,
        to,
        vision_source=folder(_VISION.value),
        dtype=_DTYPE.value,
        K=_K.value,
        K_f=_K_F.value,
        base=folder(_BASE.value),
    ) as plan:
        if plan.source.ignored:
            print(f"{len(plan.source.ignored)} tensors mean nothing here and are left out:")
            print("\n".join(f"  {name}" for name in plan.source.ignored))
        if _DRY_RUN.value:
            for tensor, (name, shape, dtype) in zip(
                plan.source.tensors, plan.destinations(), strict=True
            ):
                print(f"{tensor.name} {list(tensor.shape)} -> {name} {list(shape)} {dtype}")
            print(f"{len(plan.source.tensors)} tensors, {plan.nbytes / 2**30:.2f} GiB")
            return
        extra = {}
        if plan.config is not None and c.notes(source):
            extra["conversation_template"] = conventions(source).template
        tokenizer = None
        if plan.add_tokens and has_tokenizer(source):
            tokenizer = load_tokenizer(source)
        if plan.config is not None and not has_tokenizer(source):
            print(f"{source} has no tokenizer: copy one into {_OUT.value} before asking questions")
        rounds = 1 + _VERIFY.value
        with tqdm(total=rounds * plan.nbytes, unit="B", unit_scale=True, disable=None) as bar:
            c.convert(plan, out, mesh=mesh, extra=extra, tokenizer=tokenizer, seen=bar.update)
            different = c.verify(plan, out, seen=bar.update) if _VERIFY.value else []
    if different:
        raise ValueError(f"{out} differs from {source} in {', '.join(different)}")
    verified = ", every checksum equal" if _VERIFY.value else ""
    print(f"{len(plan.source.tensors)} tensors, {plan.nbytes / 2**30:.2f} GiB in {out}{verified}")


if __name__ == "__main__":
    run(main)
