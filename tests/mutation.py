"""How many deliberate faults the tests catch: python tests/mutation.py. Run by hand; takes an hour or two.

Every fault is made in a copy of the checkout, where its tests then run. A fault is caught where one of them fails that
passes in another copy, without it. The checkout itself is never written to.
"""

import argparse
import contextlib
import json
import os
import queue
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple

AREAS = ("losses", "analytic", "distributed", "latents", "csrc", "data", "training", "evaluation")
LIMIT, WHOLE_LIMIT = 600.0, 3600.0  # seconds for a fault's own tests, and for all tests

# Area, file and tests, the most likely first; then pairs of what is there once and what takes its place.
TEXT = """
losses vjvcr_fast/losses/vicreg.py test_vicreg test_fuzz_losses
- hinges * variance, 2.0 * covariance
+ hinges * variance, covariance
- a, b = (z.to(analytic.compute_dtype(z)) for z in (z_a, z_b))
+ a, b = z_a, z_b
losses vjvcr_fast/losses/vicreg.py test_distributed test_vicreg
- count = z_a.numel() // len(z_a) * found.total
+ count = z_a.numel() * found.world
losses vjvcr_fast/losses/vcr.py test_over test_drop_in
- factor = 1 / max(hs[0].shape[-1] - 1, 1)
+ factor = 1 / (hs[0].shape[-1] - 1)
- terms.covariance * factor
+ terms.covariance
- found = [t.transpose(0, 1) for t in _as_slices(tensors)]
+ found = _as_slices(tensors)
- key=t.stride, reverse=True
+ key=t.stride
losses vjvcr_fast/losses/vcr.py test_losses test_losses_interfaces test_fuzz_losses
- t.flatten(1, -2) for t in tensors
+ t.flatten(0, -3) for t in tensors
losses vjvcr_fast/losses/vcr.py test_losses_interfaces test_fuzz_losses
- (0 * h * h).sum(
+ (h * h * 0).sum(
- def as_slices(h: Representations, least: int = 2)
+ def as_slices(h: Representations, least: int = 1)
analytic vjvcr_fast/losses/analytic.py test_losses test_fuzz_losses test_losses_interfaces
- return (squares / (n - 1) + settings.eps).sqrt()
+ return (squares / n + settings.eps).sqrt()
- diagonal = (sigma < settings.threshold) / sigma * -a
+ diagonal = 1 / sigma * -a
- z = x - x[:, :1].to(compute_dtype(x))
+ z = x - torch.zeros_like(x[:, :1], dtype=compute_dtype(x))
- diagonal = diagonal - b * squares
+ diagonal = diagonal + b * squares
- if not followed(incoming):
+ if True:
- to.copy_(of(x, moments))
+ to.copy_(of(x, kept[i][0]))
losses vjvcr_fast/losses/cpu.py test_losses test_losses_interfaces test_uses
- ctx.__dict__.pop("gradients", None)
+ ctx.__dict__.get("gradients", None)
- if g_loss is not None and g_variance is None and g_covariance is None:
+ if g_loss is not None:
- if found is not None and (torch._C._len_torch_dispatch_stack() or g_loss.item() != 1):
+ if found is not None and torch._C._len_torch_dispatch_stack():
- and h.dtype == analytic.compute_dtype(h) and not hooked
+ and not hooked
losses vjvcr_fast/losses/cpu.py test_uses
- and not hooked
+ and True
- ctx.settings, ctx.needed = Settings(*settings), [h.requires_grad for h in hs]
+ ctx.settings, ctx.needed = Settings(*settings), [False for h in hs]
distributed vjvcr_fast/losses/distributed.py test_distributed
- norms = product.square().sum(dim=(1, 2)) / (found.world if settings.gram else 1)
+ norms = product.square().sum(dim=(1, 2))
- *(term * (count / steps) for term in terms)
+ *(term / found.world for term in terms)
- mean = summed(z.sum(dim=1), found.group) / found.total
+ mean = summed(z.sum(dim=1), found.group) / (x.shape[1] * found.world)
- _Exchange.apply(gradient.contiguous(), received, sent, group)
+ _Exchange.apply(gradient.contiguous(), sent, received, group)
- first = x[:, 0].detach().to(
+ first = x[:, 0].to(
distributed vjvcr_fast/losses/distributed.py test_over
- share = h.shape[1] / found.total
+ share = 1 / found.world
latents vjvcr_fast/latents/descent.py test_latents test_fuzz_latents test_operators
- t=torch.where(accepted, t, 1.0),
+ t=t,
- taken = accepted & active
+ taken = accepted
- torch.where(v * x > 0, v, 0)
+ torch.where(v * x >= 0, v, 0)
latents vjvcr_fast/latents/energies.py test_latents test_fuzz_latents test_operators
- torch.linalg.vecdot(gradient - self.r, change)
+ torch.linalg.vecdot(gradient, change)
latents vjvcr_fast/latents/kinds.py test_latents test_fuzz_latents test_operators
- least, index = torch.where(finite, each, torch.inf).min(dim=1)
+ least, index = each.min(dim=1)
latents vjvcr_fast/latents/kinds.py test_latents test_calibration
- module.training = training
+ module.training = True
csrc csrc/latent_math.h test_operators test_fuzz_latents test_latents
- return x < lower ? lower : (x > upper ? upper : x);
+ return x >= lower ? (x > upper ? upper : x) : lower;
- !(v * x > T(0))
+ !(v * x >= T(0))
csrc csrc/mlp_block_cpu.h test_operators test_newton
- for (T* array : {p_, u0_, r_}) move(array
+ for (T* array : {p_, u0_}) move(array
csrc csrc/newton_cpu_kernels.h test_newton test_latents
- sample.step < T(0.5) ? T(2) * sample.step : T(1);
+ T(2) * sample.step;
csrc csrc/vcr_cpu.cpp test_losses test_losses_interfaces
- sums.hinge += left < 0 ? 0 : left;
+ sums.hinge += left > 0 ? left : 0;
- diagonal += wish_.b * double(square);
+ diagonal -= wish_.b * double(square);
- if (!(last_is_there && i == 0 && (within || threads == 1))) {
+ if (!(last_is_there && (within || threads == 1))) {
- gram, variance && (g_loss || g_variance),
+ gram, variance && g_variance,
- to[j] = group == 0 ? part[j] : to[j] + part[j];
+ to[j] = part[j];
csrc csrc/vcr_cpu_kernels.h test_losses test_losses_interfaces
- if (zero) row[i] *= 0;
+ if (zero) row[i] = 0;
- adds ? load(to + v * kLanes<T>) + sum[r][v] : sum[r][v]
+ sum[r][v]
- for (int64_t k = 0; k < width; ++k) sums[k] += part[k];
+ for (int64_t k = 0; k < width; ++k) sums[k] = part[k];
data vjvcr_fast/data/moving_mnist.py test_moving_mnist
- self.switch = x_frames - 1 if
+ self.switch = x_frames if
data vjvcr_fast/data/video/clips.py test_clips test_processes
- for k in count(step))
+ for k in count(step * world))
data vjvcr_fast/data/cater.py test_cater
- active[CLASSES.index(name), start:end] = True
+ active[CLASSES.index(name), start : end + 1] = True
data vjvcr_fast/data/clevrer.py test_clevrer test_video_training
- facts["visible"][::stride], facts["fastest"][::stride]
+ facts["visible"][::stride], facts["fastest"]
data vjvcr_fast/data/folder.py test_folder
- count = -(-facts["frames"] // stride)
+ count = facts["frames"] // stride
data vjvcr_fast/data/video/cache.py test_clips test_fuzz_files
- first = old.first if old is not None and old.frames == video.frames else self._next
+ first = old.first if old is not None else self._next
training vjvcr_fast/training/loop.py test_training test_safety
- self.history = [row.to(self.processes.device) for row in state["history"] if len(row) == columns]
+ self.history = []
training vjvcr_fast/training/loop.py test_calibration test_training
- self.update.latents.weight = state.get("latent_weight", self.update.latents.weight)
+ self.update.latents.weight = self.config.latent.weight
- range(0, config.train.validation_videos - batch + 1, batch)
+ range(0, config.train.validation_videos - batch, batch)
training vjvcr_fast/training/step.py test_training
- if step <= settings.warmup:
+ if step < settings.warmup:
training vjvcr_fast/training/nonfinite.py test_safety
- torch.where(bad.bool(), old, buffer).view_as(buffer)
+ buffer
training vjvcr_fast/training/chunked.py test_chunked test_video_training
- len(x[part]) / len(x)
+ 1 / len(parts)
training vjvcr_fast/training/checkpoint.py test_training test_checkpoint
- if up_to is None or row["step"] <= up_to:
+ if up_to is None or row["step"] < up_to:
evaluation vjvcr_fast/evaluation/metrics.py test_actions
- precision = precision.flip(0).cummax(dim=0).values.flip(0)
+ precision = precision.cummax(dim=0).values
evaluation vjvcr_fast/evaluation/probes.py test_evaluation test_training
- speed=f.speed - speed)
+ speed=f.speed - f.speed.mean())
- max(2, count // 4), config, start=count)
+ max(2, count // 4), config)
evaluation vjvcr_fast/evaluation/evaluate.py test_evaluation
- videos.batches(done + 1, batch)
+ videos.batches(1, batch)
- split_frames(videos.batch(start, min(size, count - start)), config)
+ split_frames(videos.batch(start, size), config)
evaluation vjvcr_fast/evaluation/embed.py test_embed
- start = torch.cat([source.starts for source in sources]) * data.stride
+ start = torch.cat([source.starts for source in sources])
"""


class Fault(NamedTuple):
    """`old`, which is once in `file`, becomes `new`; `tests` should notice."""

    area: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


def parsed(text: str) -> list[Fault]:
    found = []
    for head, pairs in re.findall(r"^(\w.*)\n((?:[-+] .*\n)+)", text, re.MULTILINE):
        area, file, *tests = head.split()
        for old, new in re.findall(r"((?:- .*\n)+)((?:\+ .*\n)+)", pairs):
            replaced, by = ("\n".join(line[2:] for line in part.splitlines()) for part in (old, new))
            found.append(Fault(area, file, replaced, by, tuple(tests)))
    return found


FAULTS = parsed(TEXT)


def located(root: Path, names: tuple[str, ...]) -> list[str]:
    """Files of tests by their names, relative to root; those that are there."""
    return [str(path.relative_to(root)) for name in names for path in sorted((root / "tests").rglob(f"{name}.py"))]


class Result(NamedTuple):
    """outcome: "caught", "whole" (caught by the whole suite alone), "survived" or "error". by: which test, or why."""

    fault: Fault
    outcome: str
    by: str
    seconds: float


class TroubleError(Exception):
    """There is no verdict about a fault, and not for want of a test."""


class StoppedError(Exception):
    """The script is to end."""


def changed(fault: Fault, root: Path) -> str:
    """The file's text with the fault. Raises TroubleError where it does not fit."""
    text = (root / fault.file).read_text() if (root / fault.file).is_file() else ""
    if text.count(fault.old) != 1 or fault.old == fault.new:
        raise TroubleError(f"what is to be replaced is there {text.count(fault.old)} times")
    text = text.replace(fault.old, fault.new)
    if fault.file.endswith(".py"):
        try:
            compile(text, fault.file, "exec")
        except SyntaxError as error:
            raise TroubleError(f"no longer Python: {error}") from None
    return text


class Processes:
    """What runs now, each in a session of its own, so that it ends with all that it started."""

    def __init__(self) -> None:
        self.stopped, self.lock, self.sessions = False, threading.Lock(), set[int]()

    def run(self, command: list[str], cwd: Path, env: dict[str, str], limit: float) -> tuple[int | None, str]:
        """Exit code, None past the limit, and what was said."""
        nothing = subprocess.DEVNULL
        with tempfile.TemporaryFile("w+", errors="replace") as said:
            with self.lock:
                if self.stopped:
                    raise StoppedError
                process = subprocess.Popen(
                    command, cwd=cwd, env=env, stdin=nothing, stdout=said, stderr=said, start_new_session=True
                )
                self.sessions.add(process.pid)
            code = None
            with contextlib.suppress(subprocess.TimeoutExpired):
                code = process.wait(max(limit, 1))
            with self.lock:
                self.sessions.discard(process.pid)
                _kill(process.pid)
            process.wait()
            if self.stopped:
                raise StoppedError
            said.seek(0)
            return code, said.read()

    def stop(self) -> None:
        with self.lock:
            self.stopped = True
            for session in self.sessions:
                _kill(session)


def _kill(session: int) -> None:
    """Ends all its processes, those too that have a group of their own."""
    left = True
    while left:
        left = False
        for stat in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                state, _, _, of = stat.read_text().rpartition(")")[2].split()[:4]
                if int(of) == session and state not in "ZX":
                    os.kill(int(stat.parent.name), signal.SIGKILL)
                    left = True


class Copy:
    """A copy of the checkout in `folder`, with what was built there; tests run in it. clean: one without faults."""

    def __init__(self, checkout: Path, folder: Path, python: str, processes: Processes, clean: "Copy | None") -> None:
        self.root, self.python, self.processes, self.clean = folder / "main", python, processes, clean
        self.unfit: set[str] = set()  # tests that fail without a fault as well
        command = ["git", "-C", str(checkout), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        names = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\0")
        names += [str(path.relative_to(checkout)) for path in (checkout / "vjvcr_fast").glob("*.so")]
        for name in names:
            if (checkout / name).is_file():
                (self.root / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(checkout / name, self.root / name, follow_symlinks=False)
        # Without it an editable install answers for this name, with the checkout's own.
        (self.root / "vjvcr_fast" / "kernels").symlink_to("../kernels")
        self.built = {path: path.read_bytes() for path in (self.root / "vjvcr_fast").glob("*.so")}
        (folder / "tmp").mkdir()
        self.env = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
        self.env |= {"PYTHONPATH": str(self.root), "PYTHONDONTWRITEBYTECODE": "1", "TMPDIR": str(folder / "tmp")}
        self.env |= {"OMP_NUM_THREADS": "1", "GOMP_SPINCOUNT": "2000", "VJVCR_CUDA": "0"}
        if (shared := checkout.parent / "shared").exists():  # tests look for it there, too
            (folder / "shared").symlink_to(shared.resolve())
            if (shared / "data").exists():
                self.env["VJVCR_DATA"] = str((shared / "data").resolve())

    def run(self, *command: str, limit: float = LIMIT) -> tuple[int | None, str]:
        return self.processes.run([self.python, *command], self.root, self.env, limit)

    def check(self) -> None:
        """Raises TroubleError unless Python takes the package from here."""
        code, said = self.run("-c", "import vjvcr_fast as a, vjvcr_fast.kernels as b; print(a.__file__, b.__file__)")
        if code or not all(Path(file).resolve().is_relative_to(self.root.resolve()) for file in said.split()[-2:]):
            raise TroubleError(f"the copy is not what Python imports: {said}")

    def pytest(self, *arguments: str, limit: float = LIMIT) -> tuple[int | None, str]:
        return self.run("-m", "pytest", "-q", "-x", "-m", "not slow", "-p", "no:cacheprovider", *arguments, limit=limit)

    def failing(self, fault: Fault, arguments: list[str], limit: float) -> str:
        """The first test that fails here and passes without the fault, "" where there is none."""
        end = time.monotonic() + limit
        while True:
            left_out = [f"--deselect={name}" for name in sorted(self.unfit)]
            code, said = self.pytest(*arguments, *left_out, limit=end - time.monotonic())
            if code == 0 or (code == 5 and self.unfit):
                return ""
            if code is None:
                raise TroubleError("the tests do not end in time")
            if code != 1:
                module = fault.file.removesuffix(".py").replace("/", ".")
                if fault.file.endswith(".py") and self.run("-c", f"import vjvcr_fast, {module}")[0]:
                    return "the import"
                raise TroubleError(f"pytest exits {code}: {_last(said)}")
            names = re.findall(r"^(?:FAILED|ERROR) (tests/.*?)(?: - .*)?$", said, re.MULTILINE)
            if not names or self.clean is None:
                raise TroubleError(f"pytest names no test that fails: {_last(said)}")
            code, said = self.clean.pytest(names[0])
            if code == 0:
                return str(names[0])
            if code != 1:
                raise TroubleError(f"{names[0]}: pytest exits {code} without the fault: {_last(said)}")
            self.unfit.add(names[0])

    def measure(self, fault: Fault, whole: list[str] | None) -> Result:
        """whole: options for a run of all tests, of faults that survive their own; None: no such run."""
        started, file = time.monotonic(), self.root / fault.file
        before = file.read_text() if file.is_file() else None
        try:
            outcome, by = self._tested(fault, changed(fault, self.root), whole)
        except TroubleError as error:
            outcome, by = "error", str(error)
        if before is not None:
            file.write_text(before)
        if fault.area == "csrc":
            for path in {*self.built, *(self.root / "vjvcr_fast").glob("*.so")}:
                path.unlink(missing_ok=True)
            for path, content in self.built.items():
                path.write_bytes(content)
        return Result(fault, outcome, by, round(time.monotonic() - started, 1))

    def _tested(self, fault: Fault, text: str, whole: list[str] | None) -> tuple[str, str]:
        (self.root / fault.file).write_text(text)
        if fault.area == "csrc":
            code, said = self.run("setup.py", "build_ext", "--inplace", "--force", limit=WHOLE_LIMIT)
            if code != 0:
                raise TroubleError(f"does not build: {_last(said)}")
        end = time.monotonic() + LIMIT
        for name in located(self.root, fault.tests):
            if by := self.failing(fault, [name], end - time.monotonic()):
                return "caught", by
        if whole is not None and (by := self.failing(fault, whole, WHOLE_LIMIT)):
            return "whole", by
        return "survived", ""


def _last(said: str) -> str:
    return ([line.strip() for line in said.splitlines() if line.strip()] or ["nothing said"])[-1]


def measured(faults: list[Fault], checkout: Path, python: str, jobs: int, whole: bool) -> list[Result]:
    """In the order of `faults`; a line for each as it is done."""
    processes, found = Processes(), dict[Fault, Result]()
    temporary = tempfile.TemporaryDirectory(prefix="mutation-", ignore_cleanup_errors=True)
    with temporary as folder, ThreadPoolExecutor(jobs) as pool:
        try:
            clean = Copy(checkout, Path(folder, "clean"), python, processes, None)
            clean.check()
            copies: queue.Queue[Copy] = queue.Queue()
            for i in range(jobs):
                copies.put(Copy(checkout, Path(folder, str(i)), python, processes, clean))
            options = (["-n", "2"] if clean.run("-c", "import xdist")[0] == 0 else []) if whole else None

            def one(fault: Fault) -> Result:
                copy = copies.get()
                try:
                    return copy.measure(fault, options)
                finally:
                    copies.put(copy)

            for future in as_completed([pool.submit(one, fault) for fault in faults]):
                done = future.result()
                found[done.fault] = done
                verdict = f"caught by {done.by}" if done.outcome in ("caught", "whole") else f"{done.outcome} {done.by}"
                print(f"{done.fault.area:12}{done.fault.file}  {verdict}  {done.seconds:.0f} s", flush=True)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            processes.stop()
            raise
    return [found[fault] for fault in faults]


def table(results: list[Result]) -> str:
    lines = ["| area | faults | caught | by the whole suite alone | no verdict |", "| --- | --- | --- | --- | --- |"]
    for area in (*AREAS, "all"):
        outcomes = [r.outcome for r in results if area in ("all", r.fault.area)]
        whole, errors = outcomes.count("whole"), outcomes.count("error")
        if outcomes:
            lines.append(f"| {area} | {len(outcomes)} | {outcomes.count('caught') + whole} | {whole} | {errors} |")
    return "\n".join(lines)


def shown(fault: Fault) -> str:
    return "\n".join(f"  {sign} {line}" for sign, of in (("-", fault.old), ("+", fault.new)) for line in of.split("\n"))


def listed(faults: list[Fault], checkout: Path) -> int:
    wrong = 0
    for fault in faults:
        said = " ".join(located(checkout, fault.tests))
        try:
            changed(fault, checkout)
        except TroubleError as error:
            wrong, said = wrong + 1, f"DOES NOT FIT: {error}"
        print(f"{fault.area:12}{fault.file}  {said}\n{shown(fault)}")
    print(f"{len(faults)} faults, {wrong} do not fit")
    return int(wrong > 0)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--checkout", type=Path, default=Path(__file__).parents[1], help="default: that of this file")
    parser.add_argument("--areas", default=",".join(AREAS), help=f"some of {','.join(AREAS)}")
    parser.add_argument("--python", default=sys.executable, help="one with torch and pytest; default: this one")
    parser.add_argument("--json", type=Path, help="a file for the results")
    parser.add_argument("--whole", action="store_true", help="all tests for faults that survive their own")
    parser.add_argument("--list", action="store_true", help="show the faults and whether they fit; run nothing")
    parser.add_argument("--jobs", type=int, default=1, help="copies that work side by side")
    given = parser.parse_args()
    areas, checkout = given.areas.split(","), given.checkout.resolve()
    if not set(areas) <= set(AREAS) or given.jobs < 1:
        parser.error(f"--areas: some of {','.join(AREAS)}; --jobs: at least 1")
    faults = [fault for fault in FAULTS if fault.area in areas]
    if given.list:
        return listed(faults, checkout)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    started, python = time.time(), os.path.abspath(shutil.which(given.python) or given.python)
    try:
        results = measured(faults, checkout, python, given.jobs, given.whole)
    except KeyboardInterrupt:
        return 130
    except TroubleError as error:
        sys.exit(str(error))
    print(f"\n{table(results)}\n")
    for done in results:
        if done.outcome in ("survived", "error"):
            print(f"{done.outcome}: {done.fault.file}  {done.by}\n{shown(done.fault)}")
    if given.json:
        command = ["git", "-C", str(checkout), "describe", "--always", "--dirty"]
        commit = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
        rows = [r.fault._asdict() | {"outcome": r.outcome, "by": r.by, "seconds": r.seconds} for r in results]
        about = {"commit": commit, "seconds": round(time.time() - started), "whole": given.whole}
        given.json.write_text(json.dumps({**about, "table": table(results), "results": rows}, indent=1) + "\n")
    return int(any(done.outcome == "error" for done in results))


if __name__ == "__main__":
    sys.exit(main())
