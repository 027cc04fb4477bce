"""The command line. Each command is a function here; its docstring is what `vjvcr-fast COMMAND --help` says first.

Every field of the configuration is an option: `--train.lr 0.01`, or `--lr 0.01` where no other group has a field `lr`.
"""

import argparse
import contextlib
import ctypes
import functools
import importlib
import inspect
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import get_args

import torch

from vjvcr_fast import __version__
from vjvcr_fast.bench.loss import DTYPES
from vjvcr_fast.cli_options import (
    add_fields,
    add_preset,
    base_of,
    base_of_run,
    config_of,
    config_of_run,
    overrides,
    use_one_thread,
)
from vjvcr_fast.cli_parser import Parser, help_last
from vjvcr_fast.cli_reproduce import SIMULATED, TARGETS, base_of_target, reproduce
from vjvcr_fast.config import INFERENCE, LATENTS, PRESETS, Config, ConfigError, latent, override, parse
from vjvcr_fast.data.digits import ENVIRONMENT
from vjvcr_fast.training import processes
from vjvcr_fast.training.build import cache_folder, fill_cache
from vjvcr_fast.training.log import reach
from vjvcr_fast.training.loop import DivergedError, Resume, StopRequestedError, train

ANEW = ("build", "bench", "info", "presets", "report")  # commands that keep nothing when they are stopped
INTERRUPTED = 130  # what a shell reports after Ctrl-C: the command stopped at once
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h
REQUEUE = 75  # EX_TEMPFAIL: a checkpoint was written; the same command continues from it


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line, by default that of this process. Returns the exit code: 0; 1 if the command failed; 2 for a
    wrong option or value; 75 if a signal stopped it after a checkpoint; 130 if Ctrl-C stopped it at once."""
    if argv is None:
        # This process is ours. Weights that decay end below 1e-38, where some CPUs compute many times as slowly.
        torch.set_flush_denormal(True)
    parser = _parser()
    arguments, unknown = parser.parse_known_args(help_last(sys.argv[1:] if argv is None else [*argv]))
    if unknown:
        vars(arguments).get("parser", parser).reject(unknown)
    if arguments.name is None:
        parser.error(f"a COMMAND is needed; `{parser.prog} --help` lists all")
    arguments.own_process = argv is None
    if arguments.own_process and arguments.name != "bench":  # which measures what a user's own process gains
        keep_freed_memory()
    code = _run(arguments)
    if processes.launched() > 1:
        # gloo's threads may wait for processes that are gone, or abort if the interpreter ends before them.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def keep_freed_memory() -> None:
    """Lets this process keep blocks below 1 GiB that it frees, unless the user has set glibc's allocator up.

    By default glibc gives every block of 32 MiB and more back at once. On a CPU the next step then waits until the
    system has cleared each page of it anew (docs/benchmarks.md). Does nothing with another C library, or with a glibc
    before 2.35, which refuses such a threshold.
    """
    if any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ):
        return
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        if mallopt(M_MMAP_THRESHOLD, 2**30):  # if it is refused, the second alone would do harm
            mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def _run(arguments: argparse.Namespace) -> int:
    """Runs the command. Returns its exit code. Errors that this package raises become one line; others keep their
    traceback, since they are faults in the code."""
    try:
        alone = arguments.name != "train" and vars(arguments).get("entry") is None
        if processes.launched() > 1 and alone:
            raise ConfigError(f"{arguments.name} runs in one process, but torchrun started {processes.launched()}")
        return arguments.command(arguments) or 0
    except ConfigError as error:
        _say(str(error))
        return 2
    except StopRequestedError as error:
        _say(str(error), to_all=False, start="\n")
        return REQUEUE
    except BrokenPipeError:  # whoever reads what we print wants no more, as head does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (RuntimeError, ImportError, OSError) as error:
        if isinstance(error, RuntimeError) and not type(error).__module__.startswith("vjvcr_fast."):
            raise
        _say(_with_option(str(error), arguments), to_all=not isinstance(error, DivergedError))
        return 1
    except KeyboardInterrupt:
        again = "" if arguments.name in ANEW else "; run the same command again to continue"
        print(f"\nvjvcr-fast: stopped{again}", file=sys.stderr)
        return INTERRUPTED


def _with_option(message: str, arguments: argparse.Namespace) -> str:
    """The message, with the option or variable that its folder is from if it starts with the folder of the data."""
    given = {f"--{name}": vars(arguments).get(name) for name in ("data.root", *SIMULATED)}
    for name, folder in (given | {ENVIRONMENT: os.environ.get(ENVIRONMENT)}).items():
        if folder and message.startswith(f"{Path(folder).expanduser()}:"):
            return f"{name}: {message}"
    return message


def _say(text: str, to_all: bool = True, start: str = "") -> None:
    """Prints a line on stderr. to_all: every one of several processes prints it, with its rank, not only the first."""
    if processes.speaks() or to_all:
        which = "" if processes.speaks() else f" (rank {os.environ['RANK']})"
        print(f"{start}vjvcr-fast{which}: {text}", file=sys.stderr)


def _parser() -> Parser:
    parser = Parser(
        prog="vjvcr-fast",
        description="VJ-VCR (arXiv 2412.10925): video JEPA with variance-covariance regularisation.",
        epilog="`vjvcr-fast COMMAND --help` lists the options of a command, with every field of the configuration.",
    )
    parser.add_argument("--version", action="version", version=f"vjvcr_fast {__version__}")
    commands = parser.add_subparsers(dest="name", metavar="COMMAND")

    def add(command: Callable[[argparse.Namespace], int | None], usage: str = "[OPTIONS]") -> Parser:
        name, about = command.__name__.strip("_"), inspect.getdoc(command) or ""
        summary, usage = about.partition("\n")[0], f"{parser.prog} {name} {usage}"
        sub = commands.add_parser(name, help=summary, description=about, usage=usage.rstrip())
        sub.set_defaults(command=command, parser=sub)
        return sub

    _add_experiments(add)
    _add_files(add)
    return parser


def _add_experiments(add: Callable[..., Parser]) -> None:
    """The commands that train or evaluate."""
    sub = add(_train)
    add_preset(sub)
    sub.add_argument("--latent", metavar="NAME", help=f"latent of stochastic videos: {', '.join(LATENTS)} (Table 2)")
    folder = "folder of the run (default: runs/PRESET-ROW-seedN, with sigreg or a latent runs/PRESET-ROW-LATENT-seedN)"
    sub.add_argument("--out", type=Path, metavar="DIR", help=folder)
    resume = "auto: go on if the run exists; must: fail if it does not; never: fail if it does (default: auto)"
    sub.add_argument("--resume", choices=get_args(Resume), default="auto", help=resume)
    sub.add_argument("--evaluate", action="store_true", help="evaluate the run when it is trained")
    add_fields(sub, base_of)

    sub = add(_evaluate, "RUN [OPTIONS]")
    sub.add_argument("run", type=Path, metavar="RUN", help="folder of a run")
    inference = tuple(f"latent.{name}" for name in INFERENCE)
    add_fields(sub, base_of_run, only=("evaluate.", "data.root", "data.download", "train.device", *inference))

    sub = add(_report, "RUN [OPTIONS]")
    sub.add_argument("run", type=Path, metavar="RUN", help="folder of a run, finished or not, or of an exported model")
    sub.add_argument("--out", type=Path, metavar="FILE", help="the page to write (default: RUN/report.html)")
    text = "if the model has no decoder, train one for the clips, as `evaluate` does (evaluate.decoder_steps)"
    sub.add_argument("--decode", action="store_true", help=text)
    add_fields(sub, base_of_run, only=("data.root", "train.device"))

    sub = add(reproduce, f"{{{','.join(TARGETS)},all}} [OPTIONS]")
    about = "; ".join(f"{k}: {t.about}" for k, t in TARGETS.items())
    sub.add_argument("target", choices=[*TARGETS, "all"], help=f"{about}; all: everything, on one page")
    add_preset(sub, "; table2 and fig3: moving-mnist-stochastic, fig2, fig4 and ceiling: cater, or their -mini")
    seeds = "several give mean and standard deviation, but fig3 shows the first one (default: 0)"
    sub.add_argument("--seeds", default="0", metavar="N,N,...", help=seeds)
    _add_processes(sub)
    folder = "folder of results and runs (default: runs/table1-PRESET, runs/table2-PRESET, ..., runs/all, "
    folder += "runs/all-SCALE)"
    sub.add_argument("--out", type=Path, metavar="DIR", help=folder)
    for name in SIMULATED:
        text = f"all: folder of {name.upper()}'s videos (default: mini, small: simulate them; full: leave them out)"
        sub.add_argument(f"--{name}", metavar="DIR", help=text)
    text = "folder of small files with results of finished runs, taken instead of training and added to; off: none "
    text += "(default: docs/results/runs of a checkout, only taken from)"
    sub.add_argument("--results", metavar="DIR", help=text)
    add_fields(sub, base_of_target, without=("train.seed", "model.row", "latent.kind", "latent.zeros"))

    sub = add(_sweep, "FILE [OPTIONS]")
    sub.add_argument("file", type=Path, metavar="FILE", help="the settings; docs/guides/sweeps.md has the format")
    sub.add_argument("--out", type=Path, metavar="DIR", help="folder of results and runs (default: runs/sweep-FILE)")
    _add_processes(sub)
    sub.add_argument("--entry", metavar="K", help="run only entry K, counted from 0; torchrun may start it")
    sub.add_argument("--list", action="store_true", help="list the entries without running them")


def _add_files(add: Callable[..., Parser]) -> None:
    """The commands that read or write files, and those that show what there is."""

    def of_files(given: argparse.Namespace) -> Config:
        return base_of(given, "clevrer")

    sub = add(_scan, "DIR [OPTIONS]")
    sub.add_argument(
        "root", type=Path, metavar="DIR", help="folder of videos, or of the data set of --data, --preset or --config"
    )
    add_preset(sub, "; for a folder clevrer or clevrer-mini, or give --data folder, too")
    sub.add_argument("--every-frame", action="store_true", help="decode all frames, to find damage inside of files")
    sub.add_argument("--json", action="store_true", help="print JSON, which names every file that is left out")
    add_fields(sub, of_files, only=("data.", "train.device"), without=("data.root", "data.on_bad_video"))

    sub = add(_cache)
    add_preset(sub, "; here clevrer or clevrer-mini")
    sub.add_argument("--verify", action="store_true", help="check cached videos and decode damaged ones again")
    add_fields(sub, of_files, only=("data.",))

    sub = add(_embed, "RUN VIDEO ... --out FILE [OPTIONS]")
    sub.add_argument("run", type=Path, metavar="RUN", help="folder of a run, or of an exported model")
    sub.add_argument("videos", type=Path, nargs="+", metavar="VIDEO", help="video files, or folders of them")
    sub.add_argument("--out", type=Path, required=True, metavar="FILE", help="the safetensors file to write")
    sub.add_argument("--batch", default="32", metavar="N", help="windows per batch (default: 32)")
    every = "frames (counted with the run's stride) from one window to the next; 0: no overlap (default: 0)"
    sub.add_argument("--every", default="0", metavar="K", help=every)
    add_fields(
        sub,
        base_of_run,
        only=("data.decoder", "data.workers", "data.decode_timeout", "data.on_bad_video", "train.device"),
    )

    sub = add(_export, "RUN DIR [OPTIONS]")
    sub.add_argument("run", type=Path, metavar="RUN", help="folder of a run")
    sub.add_argument("folder", type=Path, metavar="DIR", help="folder to write; a README.md that is there is kept")
    encoder = "also write the encoder as a program of torch.export, which needs torch alone"
    sub.add_argument("--encoder", type=Path, metavar="FILE.pt2", help=encoder)

    sub = add(_simulate, f"{{{','.join(SIMULATED)}}} [OPTIONS]")
    sub.add_argument("target", choices=[*SIMULATED], help="the data set whose format to write")
    sub.add_argument("--videos", default="300", metavar="N", help="how many, some 30%% for validation (default: 300)")
    sub.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write, for --data.root later")
    sub.add_argument("--seed", default="0", metavar="N", help="seed of all scenes (default: 0)")
    sub.add_argument("--size", metavar="W,H", help="width and height of frames, even (default: the data set's)")
    stride = "draw every N-th frame only, each video from one of its own; train with --data.stride 1 (default: 1)"
    sub.add_argument("--stride", default="1", metavar="N", help=stride)
    sub.add_argument("--no-shadows", action="store_true", help="draw no shadows, about three times as fast")
    sub.add_argument("--processes", default="0", metavar="N", help="number of processes; 0: one per core (default: 0)")

    sub = add(_presets, "[PRESET ...]")
    sub.add_argument("presets", nargs="*", metavar="PRESET", help="only these (default: all)")

    sub = add(_bench, "--shape N,T,d [OPTIONS]")
    shape = "of the features: N videos, T time steps, d features; for (N, d) take T = 1"
    sub.add_argument("--shape", required=True, metavar="N,T,d", help=shape)
    sub.add_argument("--dtype", choices=DTYPES, default="float32", help="of the features (default: float32)")
    sub.add_argument("--device", default="auto", metavar="DEVICE", help="auto, cpu, cuda or cuda:N (default: auto)")

    add(_build, "")

    sub = add(_info)
    sub.add_argument("--data.root", dest="root", default="", metavar="DIR", help="folder of MNIST IDX files")


def _add_processes(parser: argparse.ArgumentParser) -> None:
    text = "runs at the same time, which share the cores; auto: one per core, one on a GPU (default: auto)"
    parser.add_argument("--processes", default="auto", metavar="N", help=text)


def _train(arguments: argparse.Namespace) -> None:
    """Pre-train one model.

    If the run exists, training goes on from its last checkpoint. SIGTERM and Ctrl-C write a checkpoint and end with
    exit code 75. torchrun can start it in several processes.
    """
    from vjvcr_fast.evaluation.probes import training_probe

    config = config_of(arguments)
    if arguments.latent:
        config = override(latent(config, arguments.latent), overrides(arguments))
    kind = arguments.latent or config.latent.kind
    own = ["folder"] if config.data.dataset == "folder" else []
    changed = [part for part in (config.model.regulariser, kind) if part not in ("vcr", "none")]
    parts = [config.preset, *own, config.model.row, *changed, f"seed{config.train.seed}"]
    out = arguments.out or Path("runs") / "-".join(parts)
    cache = cache_folder(config, "train") if config.data.dataset != "moving-mnist" else None
    if cache and not (cache / "meta.json").exists() and processes.speaks():
        hint = f"`vjvcr-fast cache --preset {config.preset}` with the same --data options decodes all videos once"
        print(f"no cache of decoded frames, so every window is decoded from its file; {hint}", file=sys.stderr)
    use_one_thread(arguments, config)
    if processes.speaks() and (text := reach(config)):
        print(text, flush=True)
    train(config, out, probe=training_probe if config.data.has_speed else None, resume=arguments.resume)
    if processes.speaks():
        print(f"trained: {out} (metrics.jsonl, best.pt); next: vjvcr-fast evaluate {out}", flush=True)
        if arguments.evaluate:
            _show_evaluation(out, config)


def _evaluate(arguments: argparse.Namespace) -> None:
    """Probe and decode a trained run.

    Writes evaluation.json into the folder of the run; for latents of stochastic digits latents.json, for actions
    actions.json.
    """
    config = config_of_run(arguments)
    use_one_thread(arguments, config)
    _show_evaluation(arguments.run, config)


def _show_evaluation(run: Path, config: Config) -> None:
    from vjvcr_fast.paper.sweep import evaluation_of

    evaluate, file = evaluation_of(config)
    for key, value in evaluate(run, config).items():
        if value is not None and not isinstance(value, list | dict):
            print(f"{key:26} {value:.4f}" if isinstance(value, float) else f"{key:26} {value}")
    print(f"these and more are in {run / file}")


def _report(arguments: argparse.Namespace) -> None:
    """Show a run on one page of HTML, which needs no other file.

    It has the curves, how far the encoder has collapsed, the spectrum, decoded clips and the configuration. The run may
    be unfinished: what is missing is left out, and the page says so.
    """
    from vjvcr_fast.paper.report import report

    config = config_of_run(arguments)
    use_one_thread(arguments, config)
    page = report(arguments.run, config, arguments.out, arguments.decode)
    print(f"{page} ({page.stat().st_size / 1e3:,.0f} kB)")


def _sweep(arguments: argparse.Namespace) -> None:
    """Train and evaluate the settings of a YAML file.

    It has a grid or a list of changes to a preset, and seeds. The result is one table. Run it again to go on after a
    stop.
    """
    from vjvcr_fast.paper import sweep

    out = arguments.out or Path("runs") / f"sweep-{arguments.file.stem}"
    if arguments.list:
        for number, entry in enumerate(sweep.read(arguments.file).entries):
            print(f"{number:4} {out / entry.folder}")
    elif arguments.entry is not None:
        sweep.run_entry(sweep.read(arguments.file), parse("--entry", int, arguments.entry), out)
    else:
        text = sweep.run_all(arguments.file, out, arguments.processes)
        print(f"\n{text}\nwrote {', '.join(str(out / name) for name in sweep.SWEEP_FILES)}")


def _scan(arguments: argparse.Namespace) -> int:
    """Look at every video before training: what would be used, and what not and why.

    Give it the frame options of the training. What it finds is kept for the training in vjvcr-cache/ in the folder of
    the data, so that each file is looked at once. Exit code 0: no file is bad; 1: some are, or no window is left. A
    video that is too short for a window is listed but is not bad.
    """
    from vjvcr_fast.cli_scan import show

    if not (arguments.preset or arguments.config):
        vars(arguments).setdefault("data.dataset", "folder")
    config = override(config_of(arguments, "clevrer"), {"data.root": str(arguments.root), "data.on_bad_video": "skip"})
    return show(config, arguments.every_frame, arguments.json)


def _cache(arguments: argparse.Namespace) -> None:
    """Decode the videos of a data set once.

    Frames are stored at training size, and training reads them instead of decoding. Run it again to go on after a stop.
    """
    config = config_of(arguments, "clevrer")
    for split, done in fill_cache(config, arguments.verify).items():
        bad = f", {len(done.bad)} unreadable left out" if done.bad else ""
        print(f"{cache_folder(config, split)}: {done.written} videos written, {done.kept} were there{bad}")
        for reason in done.bad.values():
            print(f"  {reason}", file=sys.stderr)


def _embed(arguments: argparse.Namespace) -> None:
    """Compute representations of video files with a trained run.

    Writes h_x, h_y and the predictions for windows of their frames to a safetensors file, a batch at a time.
    """
    from vjvcr_fast.evaluation.embed import embed

    config = config_of_run(arguments)
    batch, every = (parse(f"--{k}", int, getattr(arguments, k)) for k in ("batch", "every"))
    done = embed(arguments.run, arguments.videos, arguments.out, config, batch, every)
    for reason in done.bad.values():
        print(f"left out: {reason}", file=sys.stderr)
    print(f"{arguments.out}: {done.windows} windows of {len(done.videos)} videos")


def _export(arguments: argparse.Namespace) -> None:
    """Write a trained model as a folder to share: config.json, model.safetensors and a model card, README.md.

    `vjvcr_fast.load` loads it from the folder, or from the Hugging Face Hub once it is uploaded.
    """
    from vjvcr_fast.export import export

    written = export(arguments.run, arguments.folder, arguments.encoder)
    print(f"wrote {', '.join(map(str, written))}")


def _simulate(arguments: argparse.Namespace) -> None:
    """Make videos to train on.

    A physics engine moves 3D scenes; the files have a data set's own format. Run it again to go on after a stop.
    """
    name, out = arguments.target, arguments.out
    simulate = getattr(importlib.import_module(f"vjvcr_fast.data.simulated.{name}"), f"simulate_{name}")
    numbers = {k: parse(f"--{k}", int, getattr(arguments, k)) for k in ("videos", "seed", "stride", "processes")}
    size = {"size": parse("--size", tuple[int, int], arguments.size)} if arguments.size else {}
    try:
        simulate(out, **numbers, **size, shadows=not arguments.no_shadows)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    drawn = " --data.stride 1" if numbers["stride"] > 1 else ""
    print(f"simulated: {out}; next: vjvcr-fast reproduce {SIMULATED[name]} --data.root {out}{drawn}")


def _presets(arguments: argparse.Namespace) -> None:
    """Show the presets side by side, only where they differ; of one alone, every field."""
    from vjvcr_fast.cli_info import presets

    print(presets(arguments.presets or PRESETS))


def _bench(arguments: argparse.Namespace) -> None:
    """Time the VCR loss for your own shape, against plain PyTorch, eager and compiled.

    Forward and backward, on random features. Losses and gradients are compared with the reference in float64 before
    anything is timed. It takes half a minute, most of it to compile plain PyTorch.
    """
    from vjvcr_fast.cli_bench import show

    show(arguments.shape, arguments.dtype, arguments.device)


def _build(arguments: argparse.Namespace) -> None:
    """Compile the operators, in one or two minutes.

    pip builds where there is no torch, so most installs have none, and plain torch operations serve instead. This needs
    a C++ compiler; the variable CXX names another than c++. With an nvcc of torch's CUDA version there are operators
    for CUDA, too; the variable VJVCR_CUDA is auto, 0 (never) or 1 (fail without). The library goes into the package, or
    into the user's cache if that cannot be written, and serves every torch from 2.11 on.
    """
    from vjvcr_fast import native_build

    path = native_build.destination()
    native_build.build(path, functools.partial(print, file=sys.stderr, flush=True))
    print(f"built: {path}; `vjvcr-fast info` shows what for")


def _info(arguments: argparse.Namespace) -> None:
    """Show versions, devices, extras and digits, and what would be chosen: backends, decoder, preset."""
    from vjvcr_fast.cli_info import report

    for name, text in report(arguments.root):
        print(f"{name:17} {text}")
