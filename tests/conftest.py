"""Settings of every test: host devices for meshes, strict promotion, and each program compiled once
for all workers.
"""

import atexit
import os
import shutil
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)

# XLA's CPU client has as many threads, and no more than its devices by default. A collective holds
# one on each device while it waits for the others; where a program has several at once, they then
# wait for threads that they hold themselves.
os.environ.setdefault("NPROC", "32")

if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # in the first process; workers inherit it
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="fp8jax-programs-")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)

import jax

jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.05)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
