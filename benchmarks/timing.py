"""Fair ratios: the sides take turns in one process, and medians of their rounds are compared."""

import gc
import json
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch

RESULTS = Path(__file__).parent / "results"
# For processes whose memory is measured: freed memory goes back to the system.
HONEST_MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds(work: Callable[[], object], repeats: int = 5) -> float:
    """Mean duration of `repeats` calls, waiting for the GPU at both ends only."""
    synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        work()
    synchronize()
    return (time.perf_counter() - start) / repeats


def alternate(sides: dict[str, Callable[[], float]], rounds: int = 5) -> dict[str, list[float]]:
    """Durations of every side, one per round; each call of a side returns one. A first round warms up."""
    durations = {name: [] for name in sides}
    for number in range(rounds + 1):
        # A machine that slows down must not always hit the same side.
        for name in list(sides) if number % 2 else list(sides)[::-1]:
            duration = sides[name]()
            if number:
                durations[name].append(duration)
    return durations


def medians(durations: dict[str, list[float]]) -> dict[str, float]:
    return {name: median(values) for name, values in durations.items()}


def ratio(durations: dict[str, list[float]], slower: str, faster: str) -> float:
    """Median over the rounds of one side's duration over the other's: both saw the same machine."""
    return median(a / b for a, b in zip(durations[slower], durations[faster], strict=True))


def added_memory(work: Callable[[], object]) -> int:
    """Bytes that `work` holds at its peak beyond what is held before it: of the process on Linux, of torch on
    a GPU.

    On a CPU run it in a process with `HONEST_MALLOC` in its environment, which gives freed memory back.
    """
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return torch.cuda.max_memory_allocated() - before
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak of the resident set begins anew
    before = _resident("VmRSS")
    work()
    return _resident("VmHWM") - before


def peak_memory() -> int:
    """The most bytes that this process has held at once, on Linux, or that torch has held on a GPU."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else _resident("VmHWM")


def _resident(name: str) -> int:
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(name))
    return int(line.split()[1]) * 1024


def machine() -> str:
    """What the figures were measured on."""
    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    name = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line]
        name = lines[0].split(":")[1].strip() if lines else name
    return (f"{name} ({torch.backends.cpu.get_cpu_capability()}), {torch.get_num_threads()} threads of "
            f"{os.cpu_count()}, torch {torch.__version__}")


def report(name: str, content: dict) -> None:
    """Print a result and keep it in `results/<name>.json`."""
    content = {"machine": machine(), "date": time.strftime("%Y-%m-%d"), **content}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n")
    print(json.dumps(content, indent=2))
