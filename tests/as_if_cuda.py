"""Runs a Python program as if there were a GPU: for dry runs of the `make gpu-...` targets.

    python tests/as_if_cuda.py FILE ARGUMENT ...
    python tests/as_if_cuda.py -m MODULE ARGUMENT ...
    python tests/as_if_cuda.py -c CODE

torch says that it sees a GPU. What the benchmarks call a device is the host, in all precisions, with shapes too small
to mean anything; kernels run in Triton's interpreter, and nothing is compiled. AS_IF_CUDA in the environment breaks
something:

    hangs    what a benchmark compiles never returns
    wrong    of smoke.py's checks one is off, one raises, one dies, one hangs, and one is right
"""

import os
import runpy
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

os.environ["TRITON_INTERPRET"] = "1"
ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT)]

BROKEN = os.environ.get("AS_IF_CUDA", "").split()
GPU = SimpleNamespace(
    name="no GPU: a dry run",
    major=9,
    minor=0,
    multi_processor_count=132,
    L2_cache_size=60 << 20,
    total_memory=80 << 30,
    shared_memory_per_block_optin=232448,
)


def forever(*_: Any) -> Any:
    time.sleep(3600)


def pretend() -> None:
    torch.cuda.is_available = lambda: True
    torch.cuda.get_device_properties = lambda device=None: GPU  # type: ignore[assignment]
    torch.cuda.get_device_name = lambda device=None: GPU.name
    torch.cuda.get_device_capability = lambda device=None: (GPU.major, GPU.minor)
    torch.cuda.current_device = lambda: 0
    torch.cuda.is_current_stream_capturing = lambda: False
    torch.compile = lambda model, **options: model  # type: ignore[assignment]
    torch.version.cuda = "13.0"

    import providers

    from vjvcr_fast import native
    from vjvcr_fast.bench import timing

    native.plan = lambda *_, **__: {"refusal": "a dry run"}

    class Device(timing.Host):
        precisions = timing.PRECISIONS
        copied, side = 1 << 10, 8

        def __init__(self) -> None:
            super().__init__()
            self.cache_bytes = 1 << 12

    timing.current = Device  # type: ignore[assignment]
    if "hangs" in BROKEN:
        providers.compiled = lambda function: forever


class Small:
    """A plugin of pytest."""

    @pytest.hookimpl(tryfirst=True)
    def pytest_generate_tests(self, metafunc: Any) -> None:
        module = metafunc.module
        if module.__name__ == "bench_losses_cuda":
            module.TARGETED, module.OTHERS = [module.Case(6, (2,), 20), module.Case(20, (3,), 6)], []
            module.SECONDS, module.LAUNCHED_ROUNDS, module.LAUNCHED_PASSES = 0.0, 1, 1
        elif module.__name__ == "bench_sigreg_cuda":
            module.CASES, module.DIRECTIONS, module.SECONDS = [module.Case(6, (2,), 20)], 40, 0.0
        elif module.__name__ == "bench_latents":
            module.CASES, module.STEPS, module.SECONDS = [module.Case(16, 2, 8)], 5, 0.0
        elif module.__name__ == "bench_training":
            tiny = runpy.run_path(str(ROOT / "tests" / "conftest.py"))["TINY"]
            module.BEGUN, module.SECONDS = 2, 0.0
            module.config_of = lambda case, device: module.override(module.preset("moving-mnist-mini"), tiny)


def smoke(arguments: list[str]) -> int:
    import smoke

    smoke.SHAPES, smoke.HIDDEN, smoke.SIDE_BY_SIDE = [(6, 2, 20), (20, 2, 6)], (16,), 2
    smoke.SIGREG = [(6, 2, 20, 40)]
    if "wrong" in BROKEN:
        smoke.SECONDS = 3.0
        broken = {
            "wrong": lambda: [smoke.Result("loss", float("nan"), 0.1)],
            "raises": lambda: 1 // 0,
            "dies": lambda: os.kill(os.getpid(), signal.SIGSEGV),
            "hangs": forever,
            "right": lambda: [smoke.Result("loss", 0.01, 0.1)],
        }
        smoke.checks = lambda: {(name, ""): check for name, check in broken.items()}
    return smoke.main(Path(arguments[0]))


def main(program: str, *arguments: str) -> int:
    pretend()
    if program == "-m" and arguments[0] == "pytest":
        return int(pytest.main([*arguments[1:]], plugins=[] if "--collect-only" in arguments else [Small()]))
    if program.endswith("smoke.py"):
        return smoke([*arguments])
    if program == "-c":
        exec(arguments[0])
    elif program == "-m":
        sys.argv = [*arguments]
        runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = [program, *arguments]
        runpy.run_path(program, run_name="__main__")
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
