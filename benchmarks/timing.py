"""Fair comparisons: the sides alternate in one process; ratios are medians over the rounds."""

import gc
import json
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch

RESULTS = Path(__file__).parent.parent / "results" / "benchmarks"
# Environment of a process whose memory is measured: freed memory returns to the system at once.
HONEST_MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def synchronize() -> None:
    """Wait for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds(work: Callable[[], object], repeats: int = 5) -> float:
    """Mean duration of `repeats` calls; waits for the GPU before and after them."""
    synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        work()
    synchronize()
    return (time.perf_counter() - start) / repeats


def alternate(sides: dict[str, Callable[[], float]], rounds: int = 5) -> dict[str, list[float]]:
    """Durations that the sides return, one per round, by side. A first round, which is not kept, warms up."""
    durations = {name: [] for name in sides}
    for number in range(rounds + 1):
        # The order alternates, so that a machine that slows down does not always slow the same side.
        for name in list(sides) if number % 2 else list(sides)[::-1]:
            duration = sides[name]()
            if number:
                durations[name].append(duration)
    return durations


def medians(durations: dict[str, list[float]]) -> dict[str, float]:
    """Median duration of every side."""
    return {name: median(values) for name, values in durations.items()}


def ratio(durations: dict[str, list[float]], slower: str, faster: str) -> float:
    """Median over the rounds of one side's duration divided by the other's in the same round."""
    return median(a / b for a, b in zip(durations[slower], durations[faster], strict=True))


def added_memory(work: Callable[[], object]) -> int:
    """Peak memory of `work` beyond what is held before it, in bytes: torch's on a GPU, else the process's.

    Without a GPU it needs Linux and a process with `HONEST_MALLOC` in its environment.
    """
    reset_peak()
    before = torch.cuda.memory_allocated() if torch.cuda.is_available() else _resident("VmRSS")
    work()
    return peak_memory() - before


def reset_peak() -> None:
    """Let `peak_memory` begin anew."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory() -> int:
    """Peak memory since `reset_peak` in bytes: torch's on a GPU, else the process's (Linux)."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else _resident("VmHWM")


def _resident(name: str) -> int:
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(name))
    return int(line.split()[1]) * 1024


def machine() -> str:
    """Name of the GPU or CPU, number of threads and version of torch."""
    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    name = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line]
        name = lines[0].split(":")[1].strip() if lines else name
    return (f"{name} ({torch.backends.cpu.get_cpu_capability()}), {torch.get_num_threads()} threads of "
            f"{os.cpu_count()}, torch {torch.__version__}")


def report(name: str, content: dict) -> None:
    """Print a result and write it to `results/benchmarks/<name>.json`."""
    content = {"machine": machine(), "date": time.strftime("%Y-%m-%d"), **content}
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n")
    print(json.dumps(content, indent=2))
