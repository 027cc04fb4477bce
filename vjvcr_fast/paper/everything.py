"""`vjvcr-fast reproduce all`: every table and figure of the paper, one part after the other, and a page of all.

Each part is a command of its own, in a process of its own: one that fails is named on the page and does not keep the
others from being made, and what it took at most of memory is its own. On a CPU the parts take the mini presets; those
of video files are cut short (SHORT), so that all of it fits in half an hour on two cores; their own commands make them
in full. On a GPU the presets are the full ones, and parts of video files are made where their data are given.
"""

import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from vjvcr_fast.config import default_preset
from vjvcr_fast.data.files import cores, one_line, write_atomic
from vjvcr_fast.paper import ReproduceError
from vjvcr_fast.paper.table1 import checkout, processor
from vjvcr_fast.training.loop import StopRequestedError, asked_to_stop

PAGE = "summary.md"
COST = "cost.json"
# What a mini preset of video files is shortened to, and how many videos are simulated for it [ours].
SHORT: dict[str, dict[str, Any]] = {
    "clevrer": {
        "train.steps": 300,
        "train.validate_every": 100,
        "evaluate.probe_videos": 4_096,
        "evaluate.validation_videos": 1_024,
    },
    "cater": {"train.steps": 250, "train.validate_every": 50},
}
SIMULATED = {
    "clevrer": ["--videos", "300", "--size", "120,80", "--no-shadows"],
    "cater": ["--videos", "400", "--size", "120,80", "--no-shadows"],
}


class Part(NamedTuple):
    """title: on the page. target: of `reproduce`. preset: without -mini. folder: of its runs and files in `out`.
    table: its Markdown. images: its figures. files: the data set it needs, "" for none but digits."""

    title: str
    target: str
    preset: str
    folder: str
    table: str
    images: Sequence[str]
    files: str = ""


PARTS = (
    Part(
        "Table 1, MovingMNIST, and figure 5",
        "table1",
        "moving-mnist",
        "mnist",
        "table1.md",
        ("figure5.png", "curves.png"),
    ),
    Part("Table 2", "table2", "moving-mnist-stochastic", "stochastic", "table2.md", ("latent-curves.png",)),
    Part("Figure 3", "fig3", "moving-mnist-stochastic", "stochastic", "figure3.md", ("figure3.png",)),
    Part("Table 1, CLEVRER", "table1", "clevrer", "clevrer", "table1.md", ("spectrum.png",), "clevrer"),
    Part("Figure 2", "fig2", "cater", "cater", "figure2.md", ("figure2.png",), "cater"),
    Part("Figure 4", "fig4", "cater", "cater", "figure4.md", ("figure4.png",), "cater"),
)


class Made(NamedTuple):
    """seconds: of all calls that worked on a part. memory: the most it held, MB. failed: what of it, "" for nothing."""

    seconds: float
    memory: float
    failed: str


def everything(
    out: Path, seeds: Sequence[int], options: Mapping[str, str], roots: Mapping[str, str], processes: str = "auto"
) -> str:
    """Makes all parts in `out`, goes on with what is there, and returns the page, summary.md, as Markdown.

    seeds: of every part. options: fields of the configuration, by their dotted names, for every part; data.root and
    data.download are the digits'. roots: the folders of "clevrer" and "cater"; without one of them its videos are
    simulated where the presets are mini ones and MuJoCo is there, and the part is left out elsewhere. processes: runs
    side by side, as `side_by_side.processes_for` takes them.

    Raises ReproduceError, after the page was written, where parts failed.
    """
    out.mkdir(parents=True, exist_ok=True)
    found: dict[Part, Made | str] = {}
    data: dict[str, str] = {}
    simulated: dict[str, Made] = {}
    for part in PARTS:
        if part.files and part.files not in data:
            data[part.files] = _data(part.files, out, roots, simulated)
        lacking = part.files and not Path(data[part.files]).is_dir()
        root = data.get(part.files, "")
        found[part] = root if lacking else _make(part, out, seeds, options, root, processes)
        write_atomic(out / PAGE, page(out, seeds, found, simulated))
    made = {
        **{f"videos for {name}": made for name, made in simulated.items()},
        **{p.title: m for p, m in found.items()},
    }
    failed = [title for title, of in made.items() if isinstance(of, Made) and of.failed]
    if failed:
        raise ReproduceError(f"{len(failed)} of {len(made)} parts failed ({', '.join(failed)}): see {out / PAGE}")
    return page(out, seeds, found, simulated)


def _data(name: str, out: Path, roots: Mapping[str, str], simulated: dict[str, Made]) -> str:
    """The folder of a data set's videos, simulated where there is none; or why there is none. What simulating took goes
    to `simulated`."""
    if name in roots:
        return roots[name]
    if not default_preset(name).endswith("-mini"):
        return f"left out: --{name} DIR says where its videos are"
    missing = [module for module in ("mujoco", "av") if importlib.util.find_spec(module) is None]
    if missing:
        return f"left out: no {', '.join(missing)} to simulate videos: pip install 'vjvcr_fast[simulate,video]'"
    folder = out / f"{name}-videos"
    made = _run(["simulate", name, *SIMULATED[name], "--out", str(folder)], out / f"{name}-videos.log")
    simulated[name] = made
    return f"left out: its videos were not simulated, see {name}-videos.log" if made.failed else str(folder)


def _make(part: Part, out: Path, seeds: Sequence[int], options: Mapping[str, str], root: str, processes: str) -> Made:
    mini = default_preset(part.preset).endswith("-mini")
    digits = ("data.root", "data.download")
    given = {k: v for k, v in options.items() if not (part.files and k in digits)}
    fields = (SHORT.get(part.files, {}) if mini else {}) | given | ({"data.root": root} if root else {})
    folder = out / part.folder
    command = ["reproduce", part.target, "--preset", default_preset(part.preset), "--out", str(folder)]
    command += ["--seeds", ",".join(map(str, seeds)), "--processes", processes]
    command += [f"--{name}={value}" for name, value in fields.items()]
    print(f"{part.title}: vjvcr-fast {' '.join(command)}", flush=True)
    return _run(command, folder / f"{part.target}.log")


def _spent(log: Path, seconds: float, memory: float) -> tuple[float, float]:
    """Seconds and memory of a log's command, its earlier calls included."""
    file, name = log.parent / COST, log.stem
    costs = _costs(log.parent)
    before = costs.get(name, {"seconds": 0.0, "memory": 0.0})
    costs[name] = {"seconds": before["seconds"] + seconds, "memory": max(before["memory"], memory)}
    write_atomic(file, json.dumps(costs) + "\n")
    return costs[name]["seconds"], costs[name]["memory"]


def _costs(folder: Path) -> dict[str, dict[str, float]]:
    try:
        return json.loads((folder / COST).read_text())
    except (OSError, ValueError):
        return {}


def _run(command: Sequence[str], log: Path) -> Made:
    """A command of this package, its output to `log` and its progress to stderr; what it took, its earlier calls
    included. Raises StopRequestedError."""
    log.parent.mkdir(parents=True, exist_ok=True)
    started, ended = time.perf_counter(), 0
    with log.open("wb") as file, asked_to_stop() as stop:
        # In a session of its own: Ctrl-C reaches it from here alone, and a second signal would end it at once.
        command = [sys.executable, "-m", "vjvcr_fast", *command]
        process = subprocess.Popen(command, stdout=file, start_new_session=True)
        while not ended:
            time.sleep(0.05)
            if stop():
                process.terminate()  # it writes a checkpoint
                process.wait()
                _spent(log, time.perf_counter() - started, 0.0)
                raise StopRequestedError("stopped; the same command goes on from there")
            ended, status, usage = os.wait4(process.pid, os.WNOHANG)
    code = os.waitstatus_to_exitcode(status)
    failed = f"exit code {code}; the same command goes on" if code else ""
    return Made(*_spent(log, time.perf_counter() - started, usage.ru_maxrss / 1024), failed)


def page(
    out: Path, seeds: Sequence[int], found: Mapping[Part, Made | str], simulated: Mapping[str, Made] | None = None
) -> str:
    """Every table and figure made so far, ours beside the paper's, with what it cost."""
    lines = ["# The paper's tables and figures: ours beside the paper's", ""]
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{cores()} CPU cores"
    lines += [f"Seeds {', '.join(map(str, seeds))}; {device}, {processor()}; commit {checkout()}.", ""]
    lines += ["| part | wall time | peak memory | |", "| --- | --- | --- | --- |"]
    rows: dict[str, Made | str] = {f"videos in the format of {k}": made for k, made in (simulated or {}).items()}
    rows |= {part.title: made for part, made in found.items()}
    for title, made in rows.items():
        if isinstance(made, str):
            lines.append(f"| {title} | | | {one_line(made)} |")
        else:
            cost = f"{made.seconds / 60:.1f} min | {made.memory / 1024:.1f} GiB"
            lines.append(f"| {title} | {cost} | {made.failed} |")
    total = sum(made.seconds for made in rows.values() if isinstance(made, Made))
    lines += [f"| all | {total / 60:.1f} min | | |", ""]
    lines += ["Wall time is of all calls that worked on a part; memory is the host's, of the process.", ""]
    for part, made in found.items():
        if isinstance(made, str) or made.failed:
            continue
        text = (out / part.folder / part.table).read_text().split("\n", 1)[1].strip()
        images = [f"![{part.title}]({part.folder}/{name})" for name in part.images]
        lines += [f"## {part.title}", "", text, "", *(line for image in images for line in (image, ""))]
    return "\n".join(lines).rstrip() + "\n"
