"""What tests and the processes they start have in common."""

from importlib.metadata import version

# Tests compile far longer than they run: this makes it a quarter.
QUICK_COMPILING = (
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    " --xla_cpu_parallel_codegen_split_count=1"
    " --xla_disable_hlo_passes=while-loop-invariant-code-motion,simplify-while-loops"
)
# Later ones end the process at a flag that they do not know.
if version("jaxlib").startswith("0.10."):
    QUICK_COMPILING += " --xla_cpu_use_fusion_emitters=false"
