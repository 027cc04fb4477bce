"""`vjvcr-fast reproduce all`: makes every table and figure of the paper, one after the other, and a page with all.

Each part is a command of its own, in its own process. If one fails, the page says so and the others are still made;
and we can measure the memory of each. `--scale` says which presets are used; else mini on a CPU and full on a GPU. With
mini, those of CLEVRER and CATER are shortened (see SHORT), so that everything fits in half an hour on two cores;
`reproduce table1`, `fig2` and `fig4` make them in full. With full, the parts of CLEVRER and CATER are made only if
their videos are given. With mini and small these are simulated.
"""

import contextlib
import importlib.util
import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from vjvcr_fast.config import default_preset
from vjvcr_fast.data.files import cores, one_line, write_atomic
from vjvcr_fast.paper import ReproduceError
from vjvcr_fast.paper.jobs import spawn
from vjvcr_fast.paper.machine import checkout, processor
from vjvcr_fast.training.loop import StopRequestedError, asked_to_stop

PAGE = "summary.md"
COST = "cost.json"
# Our choice: changes to the mini presets of video files, and how the videos for a preset are simulated.
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
    "clevrer-mini": ["--videos", "300", "--size", "120,80", "--no-shadows"],
    "clevrer-small": ["--videos", "2000", "--size", "120,80", "--no-shadows"],
    "cater-mini": ["--videos", "400", "--size", "120,80", "--no-shadows"],
    "cater-small": ["--videos", "4000", "--size", "160,120", "--stride", "15"],
}


class Part(NamedTuple):
    """A table or figure.

    title: its heading. target: what `reproduce` calls it. preset: the full one. folder: of its runs and files in
    `out`. images: files that the page shows. files: the data set of video files that it needs, if any.
    """

    title: str
    target: str
    preset: str
    folder: str
    images: Sequence[str]
    files: str = ""


PARTS = (
    Part("Table 1, MovingMNIST, and figure 5", "table1", "moving-mnist", "mnist", ("figure5.png", "curves.png")),
    Part("Table 2", "table2", "moving-mnist-stochastic", "stochastic", ("latent-curves.png",)),
    Part("Figure 3", "fig3", "moving-mnist-stochastic", "stochastic", ("figure3.png",)),
    Part("Table 1, CLEVRER", "table1", "clevrer", "clevrer", ("spectrum.png",), "clevrer"),
    Part("Figure 2", "fig2", "cater", "cater", ("figure2.png",), "cater"),
    Part("Figure 4", "fig4", "cater", "cater", ("figure4.png",), "cater"),
)


class Made(NamedTuple):
    """What a command took. seconds: of all calls that worked on it. memory: its peak, MB. failed: why, or ""."""

    seconds: float
    memory: float
    failed: str


Done = dict[str, Made | str]  # title -> what it took, or why it was left out


def reproduce_all(
    out: Path,
    seeds: Sequence[int],
    options: Mapping[str, str],
    roots: Mapping[str, str],
    processes: str = "auto",
    scale: str | None = None,
    store: str | None = None,
) -> str:
    """Makes all parts in the folder `out`, or what is missing of them. Returns the page, summary.md, as Markdown.

    seeds: for every part. options: {dotted field: value}, for every part; data.root and data.download are those of the
    digits. roots: the folders of "clevrer" and "cater". If one is missing, the videos of a mini or small preset are
    simulated, if MuJoCo is installed; else its parts are left out. processes: runs side by side, see
    `jobs.processes_for`. scale: of the presets, see `default_preset`. store: as for `open_store`.

    Raises ReproduceError if parts failed, after the page is written.
    """
    out.mkdir(parents=True, exist_ok=True)
    simulated, done, roots = Done(), Done(), dict(roots)
    always = ["--seeds", ",".join(map(str, seeds)), "--processes", processes]
    always += ["--results", store] if store else []
    for part in PARTS:
        name, root = default_preset(part.preset, scale), ""
        if part.files:
            root = roots[part.files] = _data(part.files, name, out, roots, simulated)
        lacking = root and not Path(root).is_dir()
        done[part.title] = root if lacking else _make(part, name, out, options, root, always)
        text = page(out, seeds, simulated | done)
        write_atomic(out / PAGE, text)
    done = simulated | done
    failed = [title for title, made in done.items() if isinstance(made, Made) and made.failed]
    if failed:
        raise ReproduceError(f"{len(failed)} of {len(done)} parts failed ({', '.join(failed)}): see {out / PAGE}")
    return text


def _data(name: str, preset: str, out: Path, roots: Mapping[str, str], simulated: Done) -> str:
    """The folder of a data set's videos, or why there is none. If they are simulated, `simulated` gets the cost."""
    if name in roots:
        return roots[name]
    if preset not in SIMULATED:
        return f"left out: give the folder of its videos, --{name} DIR"
    missing = [module for module in ("mujoco", "av", "pebble") if importlib.util.find_spec(module) is None]
    if missing:
        return f"left out: no {', '.join(missing)} to simulate videos: pip install 'vjvcr_fast[simulate,video]'"
    folder = out / f"{name}-videos"
    made = _run(["simulate", name, *SIMULATED[preset], "--out", str(folder)], out / f"{name}-videos.log")
    simulated[f"videos in the format of {name}"] = made
    return f"left out: its videos were not simulated, see {name}-videos.log" if made.failed else str(folder)


def _make(part: Part, name: str, out: Path, options: Mapping[str, str], root: str, always: Sequence[str]) -> Made:
    fields = dict(SHORT.get(part.files, {})) if name.endswith("-mini") else {}
    of_digits = ("data.root", "data.download") if part.files else ()
    fields |= {field: value for field, value in options.items() if field not in of_digits}
    fields |= {"data.root": root} if root else {}
    if root == str(out / f"{part.files}-videos") and "--stride" in SIMULATED[name]:
        fields["data.stride"] = 1  # only the frames that are sampled were drawn
    folder = out / part.folder
    command = ["reproduce", part.target, "--preset", name, "--out", str(folder), *always]
    command += [f"--{field}={value}" for field, value in fields.items()]
    print(f"{part.title}: vjvcr-fast {' '.join(command)}", flush=True)
    return _run(command, folder / f"{part.target}.log")


def _run(command: Sequence[str], log: Path) -> Made:
    """Runs a command of this package. Its output goes to `log`, its progress to stderr. Raises StopRequestedError."""
    log.parent.mkdir(parents=True, exist_ok=True)
    started, ended = time.perf_counter(), 0
    with log.open("wb") as file, asked_to_stop() as stop:
        process = spawn(command, stdout=file)
        while not ended:
            time.sleep(0.05)
            if stop():
                process.terminate()  # it writes a checkpoint
                process.wait()
                _spent(log, time.perf_counter() - started, memory=0.0)
                raise StopRequestedError("stopped; run the same command again to continue")
            ended, status, usage = os.wait4(process.pid, os.WNOHANG)  # unlike poll(), it tells the peak memory
    code = os.waitstatus_to_exitcode(status)
    failed = f"exit code {code}; run the same command again" if code else ""
    return _spent(log, time.perf_counter() - started, usage.ru_maxrss / 1024, failed)


def _spent(log: Path, seconds: float, memory: float, failed: str = "") -> Made:
    """Adds a call of the command with this log to cost.json; returns what all its calls took."""
    file, costs = log.parent / COST, {}
    with contextlib.suppress(OSError, ValueError):  # there is none yet, or it is not ours
        costs = json.loads(file.read_text())
    before = costs.get(log.stem, {"seconds": 0.0, "memory": 0.0})
    seconds, memory = before["seconds"] + seconds, max(before["memory"], memory)
    write_atomic(file, json.dumps({**costs, log.stem: {"seconds": seconds, "memory": memory}}) + "\n")
    return Made(seconds, memory, failed)


def page(out: Path, seeds: Sequence[int], done: Done) -> str:
    """Every table and figure made so far, ours beside the paper's, with what it cost, as Markdown."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{cores()} CPU cores"
    lines = ["# The paper's tables and figures: ours beside the paper's", ""]
    lines += [f"Seeds {', '.join(map(str, seeds))}; {device}, {processor()}; commit {checkout()}.", ""]
    lines += ["| part | wall time | peak memory | |", "| --- | --- | --- | --- |"]
    total = 0.0
    for title, made in done.items():
        if isinstance(made, str):
            lines.append(f"| {title} | | | {one_line(made)} |")
        else:
            total += made.seconds
            lines.append(f"| {title} | {made.seconds / 60:.1f} min | {made.memory / 1024:.1f} GiB | {made.failed} |")
    lines += [f"| all | {total / 60:.1f} min | | |", ""]
    lines += ["Wall time is of all calls that worked on a part; memory is the peak of their processes.", ""]
    for part in PARTS:
        made = done.get(part.title, "")
        if isinstance(made, Made) and not made.failed:
            table = out / part.folder / f"{part.target.replace('fig', 'figure')}.md"
            lines += [f"## {part.title}", "", table.read_text().split("\n", 1)[1].strip(), ""]
            for name in (name for name in part.images if (out / part.folder / name).exists()):
                lines += [f"![{part.title}]({part.folder}/{name})", ""]
    return "\n".join(lines).rstrip() + "\n"
