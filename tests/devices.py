"""The environments of programs that tests start with quick compilation."""

import os

# Optimising a small program takes longer than running it, and most of all one that is partitioned. MLIR's emitters and
# several LLVM modules per program take a quarter of the compiler's time.
QUICK_CODEGEN = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
QUICK_COMPILES = f"--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true {QUICK_CODEGEN}"


def quick_compilation() -> dict[str, str]:
    """Returns this process's environment with the compiler's options of the tests, so that programs are shared."""
    options = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "JAX_DEFAULT_MATMUL_PRECISION": "highest"}
    return {**os.environ, **options, "XLA_FLAGS": QUICK_CODEGEN}


def simulated_devices(n: int) -> dict[str, str]:
    """Returns this process's environment with `n` devices on the CPU and quick compilation."""
    flags = f"--xla_force_host_platform_device_count={n} {QUICK_COMPILES}"
    return {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
