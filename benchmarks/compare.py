"""The speed of a commit against that of the working tree: `make bench-compare REF=<commit>`, or

    python benchmarks/compare.py REF [--head COMMIT] [--rounds 7] [--build]

Each tree is checked out into a folder of its own. Both run the same cases, alternately and in a fresh process every
round, so that whatever else the machine does meets both. The exit code is 1 if a case is slower by more than SLOWER
both in its fastest round and in the median of its rounds; noise alone moves the one or the other. Cases that a tree
does not have are left out. --build compiles the operators of both trees first; without them latents run in plain torch.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[1]
SLOWER, SECONDS = 1.10, 0.6


# -- What is timed, in a process of either tree ---------------------------------------------------------------------


def loss(device: str, *shape: int) -> Callable[[], object]:
    import torch

    from vjvcr_fast.losses import vcr_loss

    h = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device).requires_grad_()
    return lambda: torch.autograd.grad(vcr_loss(h, alpha=0.5, beta=0.1).loss, h)


def latents(device: str, method: str) -> Callable[[], object]:
    import torch

    from vjvcr_fast.latents import SparseLatent
    from vjvcr_fast.models.convnet import MLPPredictor

    torch.manual_seed(0)
    predictor = MLPPredictor(d=256, frames_in=3, frames_out=3, hidden=512, latent_dim=20).to(device)
    energy = predictor.closed_form(*torch.randn(2, 256, 3, 256, device=device))
    latent = SparseLatent(20, 1e-4, 50, tolerance=0.0, method=method)
    return lambda: latent.infer(energy, 256, device=device, dtype=torch.float32)


def videos(device: str) -> Callable[[], object]:
    import torch

    from vjvcr_fast.data import Digits, MovingMNIST

    digits = Digits(torch.randint(0, 256, (64, 28, 28), dtype=torch.uint8), torch.arange(64) % 10, "noise")
    made = MovingMNIST(digits, frames=15, speed=(2.0, 6.0), seed=0, stream="train", device=device)
    return lambda: made.batch(0, 64)


def step(device: str, name: str) -> Callable[[], object]:
    """A training step of that preset, without its data."""
    import torch

    from vjvcr_fast.config import preset
    from vjvcr_fast.training.build import build_model

    config = preset(name)
    model, data = build_model(config, torch.device(device)), config.data
    optimizer = torch.optim.Adam(model.parameters(), fused=True)
    shape = (config.train.batch, data.frames_in + data.frames_out, data.channels, data.canvas, data.canvas)
    x, y = torch.rand(shape, device=device).split([data.frames_in, data.frames_out], dim=1)

    def run() -> None:
        model(x, y).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return run


CASES: dict[str, tuple] = {
    "loss (256, 15, 512)": (loss, 256, 15, 512),
    "loss (128, 9, 256)": (loss, 128, 9, 256),
    "loss (64, 8, 128)": (loss, 64, 8, 128),
    "loss (4096, 1, 64)": (loss, 4096, 1, 64),
    "sparse latent": (latents, "fista"),
    "sparse latent, newton": (latents, "newton"),
    "MovingMNIST": (videos,),
    "step, moving-mnist-mini": (step, "moving-mnist-mini"),
    "step, clevrer-mini": (step, "clevrer-mini"),
}


def measure() -> dict[str, float]:
    """The median milliseconds of each case."""
    import torch
    from torch.utils.benchmark import Timer

    device = "cuda" if torch.cuda.is_available() else "cpu"
    found = {}
    for name, (make, *arguments) in CASES.items():
        try:
            run = make(device, *arguments)
            run()
        except (ImportError, AttributeError, TypeError, ValueError, KeyError):
            continue  # this tree has no such thing
        timer = Timer("run()", globals={"run": run}, num_threads=torch.get_num_threads())
        found[name] = 1e3 * timer.blocked_autorange(min_run_time=SECONDS).median
    return found


# -- Both trees -----------------------------------------------------------------------------------------------------


def said(command: list[str], folder: Path, **options: object) -> bytes:
    """What the command prints. Ends this program with the command's error if it fails."""
    done = subprocess.run(command, cwd=folder, capture_output=True, check=False, **options)
    if done.returncode:
        sys.exit(f"compare: {' '.join(command[:3])} failed:\n{done.stderr.decode()[-2000:].strip()}")
    return done.stdout


def checked_out(commit: str, folder: Path, build: bool) -> Path:
    """The commit's tree; "." is the working tree with its changes to tracked files."""
    folder.mkdir()
    if commit == ".":
        changes = said(["git", "-c", "user.name=compare", "-c", "user.email=", "stash", "create"], ROOT)
        commit = changes.decode().strip() or "HEAD"
    said(["tar", "-x"], folder, input=said(["git", "archive", commit], ROOT))
    # Installing the package puts the kernels into it; here a link does.
    if not (folder / "vjvcr_fast" / "kernels").exists() and (folder / "kernels").exists():
        (folder / "vjvcr_fast" / "kernels").symlink_to(folder / "kernels", target_is_directory=True)
    if build:
        said([sys.executable, "setup.py", "build_ext", "--inplace"], folder)
    return folder


def compare(trees: list[Path], rounds: int) -> list[tuple[str, float, float, float]]:
    """(case, the second tree's least time over the first's, the same of the medians, the larger spread of a side)."""
    found: dict[Path, list[dict[str, float]]] = {tree: [] for tree in trees}
    for number in range(rounds):
        for tree in trees if number % 2 == 0 else reversed(trees):
            environment = {**os.environ, "PYTHONPATH": str(tree), "PYTHONSAFEPATH": "1"}
            printed = said([sys.executable, __file__, "--measure"], tree, env=environment)
            found[tree].append(json.loads(printed.splitlines()[-1]))
        print(f"round {number + 1} of {rounds}", file=sys.stderr, flush=True)
    rows = []
    for case in CASES:
        before, after = ([times[case] for times in found[tree] if case in times] for tree in trees)
        if before and after:
            noise = max(max(side) / min(side) for side in (before, after))
            rows.append((case, min(after) / min(before), statistics.median(after) / statistics.median(before), noise))
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description="The speed of two commits, run alternately.")
    parser.add_argument("ref", nargs="?", help="the commit to compare with")
    parser.add_argument("--head", default=".", help="the other commit (default: the working tree)")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--build", action="store_true", help="compile the operators of both first")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.measure:
        print(json.dumps(measure()))
        return 0
    if not asked.ref or asked.rounds < 1:
        parser.error("which commit? make bench-compare REF=<commit>; --rounds must be at least 1")
    with tempfile.TemporaryDirectory() as top:
        commits = {"before": asked.ref, "after": asked.head}
        trees = [checked_out(commit, Path(top) / name, asked.build) for name, commit in commits.items()]
        rows = compare(trees, asked.rounds)
    slow = [case for case, least, median, _ in rows if min(least, median) > SLOWER]
    print(f"{'time, after / before':28} least    median    spread of a side")
    for case, least, median, noise in rows:
        print(f"{case:28} {least:5.3f}    {median:6.3f}    {noise:5.2f}{'    SLOWER' if case in slow else ''}")
    print(f"slower by more than {SLOWER - 1:.0%}: {', '.join(slow) or 'none'}")
    return 1 if slow else 0


if __name__ == "__main__":
    sys.exit(main())
