"""Measure memory bandwidth: `python -m bench.runtime.bandwidth THREADS`.

Prints one line of JSON: `read KERNEL` → bytes per second, the best pass of each kernel that is installed. All threads
read at once, each from its own memory, which exceeds the caches.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from bench.runtime.figures import READ

MIB = 512  # read by a thread in a pass
PASSES = 8
SOURCE = r"""
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
typedef uint64_t wide __attribute__((vector_size(64)));
static size_t bytes; static int threads, passes; static double best; static pthread_barrier_t gate;
static double now(void) { struct timespec t; clock_gettime(CLOCK_MONOTONIC, &t); return t.tv_sec + t.tv_nsec * 1e-9; }
static void *reader(void *first) {
  wide *data = mmap(0, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0), sum[8];
  if (data == MAP_FAILED) exit(1);
  madvise(data, bytes, MADV_HUGEPAGE);
  memset(data, 1, bytes);
  memset(sum, 0, sizeof sum);
  double begin = 0;
  for (int pass = 0; pass <= passes; pass++) {
    pthread_barrier_wait(&gate);
    if (first) {
      double rate = threads * (double)bytes / (now() - begin);
      if (pass && rate > best) best = rate;
      begin = now();
    }
    if (pass < passes)
      for (size_t i = 0; i < bytes / sizeof(wide); i += 8)
        for (int k = 0; k < 8; k++) sum[k] ^= data[i + k];
  }
  for (int k = 1; k < 8; k++) sum[0] ^= sum[k];
  return (void *)(uintptr_t)(sum[0][0] ^ sum[0][7]);
}
int main(int count, char **argument) {
  threads = atoi(argument[1]); bytes = (size_t)atoi(argument[2]) << 20; passes = atoi(argument[3]);
  pthread_t each[256];
  pthread_barrier_init(&gate, 0, threads);
  for (int k = 0; k < threads; k++) pthread_create(&each[k], 0, reader, (void *)(uintptr_t)(k == 0));
  void *kept;
  for (int k = 0; k < threads; k++) pthread_join(each[k], &kept);
  printf("%.6g\n", best);
}
"""


def measure(threads: int) -> dict[str, float]:
    """Return `read KERNEL` → bytes per second."""
    kernels = {"C, 64-byte loads": _compiled, "numpy or": _numpy_or, "numpy dot": _numpy_dot, "torch mv": _torch_mv}
    rates = {READ + name: kernel(threads) for name, kernel in kernels.items()}
    return {name: rate for name, rate in rates.items() if rate is not None}


def _compiled(threads: int) -> float | None:
    """Measure a loop that only loads; None without a C compiler."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        return None
    with TemporaryDirectory() as folder:
        source, program = Path(folder) / "read.c", Path(folder) / "read"
        source.write_text(SOURCE)
        compiled = subprocess.run([compiler, "-O3", "-march=native", "-pthread", source, "-o", program], check=False)
        if compiled.returncode:
            return None
        command = [str(part) for part in (program, threads, MIB, PASSES)]
        return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def _numpy_or(threads: int) -> float:
    return _in_threads(threads, np.uint64, lambda part: np.bitwise_or.reduce(part))


def _numpy_dot(threads: int) -> float:
    return _in_threads(threads, np.float32, lambda part: np.dot(part, part))


def _in_threads(threads: int, dtype: type, kernel: Callable[[np.ndarray], object]) -> float:
    """Run `kernel` in each thread on its own array; numpy releases the GIL."""
    parts: list[np.ndarray] = [np.ones((MIB << 20) // np.dtype(dtype).itemsize, dtype) for _ in range(threads)]
    with ThreadPoolExecutor(threads) as pool:
        return _best(lambda: list(pool.map(kernel, parts)), threads * (MIB << 20))


def _torch_mv(threads: int) -> float | None:
    try:
        import torch
    except ModuleNotFoundError:
        return None
    torch.set_num_threads(threads)
    matrix = torch.ones(threads * (MIB << 8) // 16, 16 << 10)
    vector = torch.ones(16 << 10)
    return _best(lambda: torch.mv(matrix, vector), matrix.nbytes)


def _best(kernel: Callable[[], object], nbytes: int) -> float:
    fastest = float("inf")
    for _ in range(PASSES):
        begin = time.perf_counter()
        kernel()
        fastest = min(fastest, time.perf_counter() - begin)
    return nbytes / fastest


if __name__ == "__main__":
    print(json.dumps(measure(int(sys.argv[1]))))
