"""Two commits against one another: `make bench-compare REF=<commit>`, or

    python benchmarks/compare.py REF [--rounds 7] [--build]

Each is checked out into a folder of its own; the same cases run alternately in a process of each, a fresh one every
round, so that what else the machine does meets both. A case is flagged, and the exit code is then 1, where both the
least and the median of its rounds are slower by more than SLOWER, since noise moves the one or the other. A case that a
commit does not have is left out. --build compiles the operators of both first; without, latents run in plain torch.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[1]
SLOWER, SECONDS = 1.10, 0.6


# -- What is timed, in a process of either commit -------------------------------------------------------------------


def cases() -> dict[str, Callable[[], Callable[[], object]]]:
    """name -> what makes one pass, forward and backward or a whole step. A commit may lack what is imported inside."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"

    def loss(n: int, steps: int, d: int) -> Callable[[], object]:
        from vjvcr_fast.losses import vcr_loss

        h = torch.randn(n, steps, d, generator=torch.Generator().manual_seed(0)).to(device).requires_grad_()
        return lambda: torch.autograd.grad(vcr_loss(h, alpha=0.5, beta=0.1).loss, h)

    def latents(method: str) -> Callable[[], object]:
        from vjvcr_fast.latents import SparseLatent
        from vjvcr_fast.models.convnet import MLPPredictor

        torch.manual_seed(0)
        predictor = MLPPredictor(d=256, frames_in=3, frames_out=3, hidden=512, latent_dim=20).to(device)
        h_x, h_y = torch.randn(256, 3, 256, device=device), torch.randn(256, 3, 256, device=device)
        energy = predictor.closed_form(h_x, h_y)
        latent = SparseLatent(20, 1e-4, 50, tolerance=0.0, method=method)
        return lambda: latent.infer(energy, 256, device=device, dtype=torch.float32)

    def videos() -> Callable[[], object]:
        from vjvcr_fast.data import Digits, MovingMNIST

        digits = Digits(torch.randint(0, 256, (64, 28, 28), dtype=torch.uint8), torch.arange(64) % 10, "noise")
        made = MovingMNIST(digits, frames=15, speed=(2.0, 6.0), seed=0, stream="train", device=device)
        return lambda: made.batch(0, 64)

    def model(preset_name: str) -> Callable[[], object]:
        from vjvcr_fast.config import preset
        from vjvcr_fast.training.build import build_model

        config = preset(preset_name)
        made = build_model(config, torch.device(device))
        optimizer = torch.optim.Adam(made.parameters(), fused=True)
        shape = (config.train.batch, config.data.frames_in + config.data.frames_out, config.data.channels)
        frames = torch.rand(*shape, config.data.canvas, config.data.canvas, device=device)

        def step() -> None:
            made(frames[:, : config.data.frames_in], frames[:, config.data.frames_in :]).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        return step

    return {
        "loss (256, 15, 512)": lambda: loss(256, 15, 512),
        "loss (128, 9, 256)": lambda: loss(128, 9, 256),
        "loss (64, 8, 128)": lambda: loss(64, 8, 128),
        "loss (4096, 1, 64)": lambda: loss(4096, 1, 64),
        "sparse latent": lambda: latents("fista"),
        "sparse latent, newton": lambda: latents("newton"),
        "MovingMNIST": videos,
        "step, moving-mnist-mini": lambda: model("moving-mnist-mini"),
        "step, clevrer-mini": lambda: model("clevrer-mini"),
    }


def measure() -> dict[str, float]:
    """Milliseconds of a pass, the median of those that fit into SECONDS."""
    import torch

    wait = torch.cuda.synchronize if torch.cuda.is_available() else (lambda: None)
    found = {}
    for name, make in cases().items():
        try:
            run = make()
            run()
        except (ImportError, AttributeError, TypeError, ValueError, KeyError):
            continue  # of another time
        run()
        times, end = [], time.perf_counter() + SECONDS
        while time.perf_counter() < end or len(times) < 3:
            wait()
            start = time.perf_counter()
            run()
            wait()
            times.append(1e3 * (time.perf_counter() - start))
        found[name] = statistics.median(times)
    return found


# -- Both commits ---------------------------------------------------------------------------------------------------


def checked_out(commit: str, folder: Path, build: bool) -> Path:
    """A tree of the commit, or of the working tree's tracked files as they are ("."). Raises SystemExit, with what git
    says, for no such commit."""
    folder.mkdir()
    if commit == ".":
        files = _git("ls-files", "-z").split("\0")
        subprocess.run(["cp", "--parents", "-t", str(folder), *filter(None, files)], cwd=ROOT, check=True)
    else:
        archive = subprocess.run(["git", "archive", commit], cwd=ROOT, capture_output=True, check=False)
        if archive.returncode:
            sys.exit(f"compare: {archive.stderr.decode().strip()}")
        subprocess.run(["tar", "-x", "-C", str(folder)], input=archive.stdout, check=True)
    # The kernels are a part of the package where it is installed.
    if not (folder / "vjvcr_fast" / "kernels").exists() and (folder / "kernels").exists():
        (folder / "vjvcr_fast" / "kernels").symlink_to(folder / "kernels", target_is_directory=True)
    if build:
        command = [sys.executable, "setup.py", "build_ext", "--inplace"]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(f"compare: building {commit} failed:\n{done.stderr[-2000:]}")
    return folder


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout


def one_round(tree: Path) -> dict[str, float]:
    environment = {**os.environ, "PYTHONPATH": str(tree), "PYTHONSAFEPATH": "1"}
    command = [sys.executable, __file__, "--measure"]
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"compare: measuring {tree.name} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def compare(trees: dict[str, Path], rounds: int) -> list[tuple[str, float, float, float]]:
    """(case, the second tree's least time over the first's, the same of the medians, the largest spread of a side)."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in trees}
    for number in range(rounds):
        order = list(trees) if number % 2 == 0 else list(reversed(trees))
        for name in order:
            found[name].append(one_round(trees[name]))
        print(f"round {number + 1} of {rounds}", file=sys.stderr, flush=True)
    first, second = found.values()
    rows = []
    for case in first[0]:
        if all(case in made for made in (*first, *second)):
            before, after = ([made[case] for made in side] for side in (first, second))
            noise = max(max(side) / min(side) for side in (before, after))
            rows.append((case, min(after) / min(before), statistics.median(after) / statistics.median(before), noise))
    return rows


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Two commits' speed, run alternately.")
    parser.add_argument("ref", nargs="?", help="the commit to compare with")
    parser.add_argument("--head", default=".", help="the other (default: the working tree)")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--build", action="store_true", help="compile the operators of both first")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args(arguments)
    if asked.measure:
        print(json.dumps(measure()))
        return 0
    if not asked.ref or asked.rounds < 1:
        parser.error("which commit? make bench-compare REF=<commit>; --rounds at least 1")
    with tempfile.TemporaryDirectory() as top:
        trees = {
            name: checked_out(commit, Path(top) / name, asked.build)
            for name, commit in (("before", asked.ref), ("after", asked.head))
        }
        rows = compare(trees, asked.rounds)
    slow = [case for case, least, median, _ in rows if min(least, median) > SLOWER]
    print(f"{'time, after / before':28} least    median    spread of a side")
    for case, least, median, noise in rows:
        print(f"{case:28} {least:5.3f}    {median:6.3f}    {noise:5.2f}{'    SLOWER' if case in slow else ''}")
    print(f"slower by more than {SLOWER - 1:.0%}: {', '.join(slow) or 'none'}")
    return 1 if slow else 0


if __name__ == "__main__":
    sys.exit(main())
