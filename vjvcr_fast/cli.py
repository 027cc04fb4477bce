"""The command line: train, evaluate, reproduce, cache, embed, simulate, info. Every field is an option."""

import argparse
import difflib
import importlib
import importlib.util
import os
import platform
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, get_args

import torch

from vjvcr_fast import __version__, native
from vjvcr_fast.config import (
    LATENTS,
    PRESETS,
    Config,
    ConfigError,
    default_preset,
    fields,
    help_text,
    latent,
    override,
    parse,
    preset,
    resolve_device,
)
from vjvcr_fast.data.digits import DigitsError, load_digits
from vjvcr_fast.data.video import decode
from vjvcr_fast.data.video.cache import CacheError
from vjvcr_fast.data.video.decode import VideoError
from vjvcr_fast.data.video.scan import DataError
from vjvcr_fast.losses import backends
from vjvcr_fast.paper import ReproduceError, SweepError
from vjvcr_fast.paper.side_by_side import processes_for
from vjvcr_fast.settings import Dataset
from vjvcr_fast.training import processes
from vjvcr_fast.training.build import cache_folder, fill_cache
from vjvcr_fast.training.checkpoint import CheckpointError
from vjvcr_fast.training.loop import DivergedError, Resume, StopRequestedError, train
from vjvcr_fast.training.processes import LostProcessError

INTERRUPTED = 130  # as a shell reports Ctrl-C: at once, with nothing written
REQUEUE = 75  # EX_TEMPFAIL: a checkpoint was written, the same command goes on from it
EXTRAS = {
    "train": ("matplotlib", "mlxtend", "tensorboard", "tqdm", "yaml"),
    "video": ("av", "decord", "pebble"),
    "simulate": ("av", "mujoco"),
    "torchcodec": ("torchcodec",),
    "dali": ("nvidia.dali",),
}
ERRORS = (
    *(DigitsError, DataError, VideoError, CacheError, CheckpointError, DivergedError, LostProcessError),
    *(SweepError, ReproduceError, ImportError, OSError),
)


class _Parser(argparse.ArgumentParser):
    """argparse, with one line for an error."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})

    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: {message}", file=sys.stderr)
        sys.exit(2)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line; returns the exit code: 0, 1 (failed), 2 (wrong option or value), 75 (stopped by a signal
    after a checkpoint: run it again), 130 (interrupted at once)."""
    if argv is None:
        # This process is ours. Weights that decay end below 1e-38, where some CPUs compute many times as slowly.
        torch.set_flush_denormal(True)
    parser = _parser()
    arguments, unknown = parser.parse_known_args(argv)
    if unknown:
        _reject(unknown, arguments.parser)
    arguments.own_process = argv is None
    code = _run(arguments)
    if processes.launched() > 1:
        # gloo's threads may wait for processes that are gone, or abort where the interpreter ends before them.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def _run(arguments: argparse.Namespace) -> int:
    try:
        alone = arguments.name != "train" and vars(arguments).get("entry") is None
        if processes.launched() > 1 and alone:
            raise ConfigError(f"{arguments.name} is for one process: {processes.launched()} were started, as for train")
        arguments.command(arguments)
    except ConfigError as error:
        _say(str(error))
        return 2
    except ERRORS as error:
        _say(str(error), to_all=not isinstance(error, DivergedError))
        return 1
    except StopRequestedError as error:
        _say(str(error), to_all=False, start="\n")
        return REQUEUE
    except KeyboardInterrupt:
        print("\nvjvcr-fast: stopped; the same command goes on from what is there", file=sys.stderr)
        return INTERRUPTED
    return 0


def _say(text: str, to_all: bool = True, start: str = "") -> None:
    """A line on stderr; of several processes one says what is known to all of them, others of what befell them."""
    if processes.speaks() or to_all:
        which = "" if processes.speaks() else f" (rank {os.environ['RANK']})"
        print(f"{start}vjvcr-fast{which}: {text}", file=sys.stderr)


def _parser() -> _Parser:
    parser = _Parser(
        prog="vjvcr-fast",
        description="VJ-VCR (arXiv 2412.10925): video JEPA with variance-covariance regularisation.",
        epilog="`vjvcr-fast COMMAND --help` lists a command's options, every field of the configuration among them.",
    )
    parser.add_argument("--version", action="version", version=f"vjvcr_fast {__version__}")
    commands = parser.add_subparsers(dest="name", required=True, metavar="COMMAND")

    def add(name: str, summary: str, command: Any, description: str = "") -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=summary, description=f"{summary}. {description}".strip())
        sub.usage = f"{sub.prog} [OPTIONS]"
        sub.set_defaults(command=command, parser=sub)
        return sub

    again = "Starting the same run again goes on from its last checkpoint."
    exits = f"SIGTERM and Ctrl-C write one and end with exit code {REQUEUE}. torchrun starts it in several processes."
    sub = add("train", "pre-train one model", _train, f"{again} {exits}")
    _add_preset(sub)
    names = ", ".join(LATENTS)
    sub.add_argument("--latent", metavar="NAME", help=f"the latent of stochastic videos, one of {names} (Table 2)")
    folder = "runs/PRESET-ROW-seedN; with a latent runs/PRESET-ROW-LATENT-seedN"
    sub.add_argument("--out", type=Path, metavar="DIR", help=f"the run's folder (default: {folder})")
    resume = "auto: go on where there is a run; must: refuse to begin one; never: refuse to go on (default: auto)"
    sub.add_argument("--resume", choices=get_args(Resume), default="auto", help=resume)
    sub.add_argument("--evaluate", action="store_true", help="probe and decode the run when it is trained")
    _add_fields(sub)

    written = "Writes evaluation.json into its folder, latents.json for a run with a latent."
    sub = add("evaluate", "probe and decode a trained run", _evaluate, written)
    sub.usage = f"{sub.prog} RUN [OPTIONS]"
    sub.add_argument("run", type=Path, metavar="RUN", help="folder of a run")
    _add_fields(sub, only=("evaluate.", "data.root", "data.download", "train.device"))

    summary = "make a table or figure of the paper, ours beside the paper's"
    sub = add("reproduce", summary, _reproduce, "Resumes what it finds; table2 and fig3 share their runs.")
    sub.usage = f"{sub.prog} {{{','.join(TARGETS)},all}} [OPTIONS]"
    about = "; ".join(f"{k}: {t.about}" for k, t in TARGETS.items())
    sub.add_argument("target", choices=[*TARGETS, "all"], help=f"{about}; all: everything, and a page of it")
    _add_preset(sub, "; table2 and fig3: moving-mnist-stochastic, fig2 and fig4: cater, or their -mini")
    several = "several give mean and standard deviation; fig3 shows the first"
    sub.add_argument("--seeds", default="0", metavar="N,N,...", help=several)
    _add_processes(sub)
    folders = "runs/table1-PRESET, runs/table2-PRESET, ..., runs/all"
    sub.add_argument("--out", type=Path, metavar="DIR", help=f"results and runs (default: {folders})")
    for name in ("clevrer", "cater"):
        text = f"all: the folder of {name.upper()}'s videos (default: on a CPU simulated, on a GPU left out)"
        sub.add_argument(f"--{name}", metavar="DIR", help=text)
    _add_fields(sub, without=("train.seed", "model.row", "latent.kind", "latent.zeros"))

    about = "A grid or a list of changes to a preset, several seeds, one table; goes on where it was stopped."
    sub = add("sweep", "train and evaluate the settings of a YAML file", _sweep, about)
    sub.usage = f"{sub.prog} FILE [OPTIONS]"
    sub.add_argument("file", type=Path, metavar="FILE", help="what to change: docs/guides/sweeps.md")
    sub.add_argument("--out", type=Path, metavar="DIR", help="results and runs (default: runs/sweep-FILE)")
    _add_processes(sub)
    sub.add_argument("--entry", metavar="K", help="run this one alone, from 0; torchrun may start it")
    sub.add_argument("--list", action="store_true", help="show the entries and run none")

    about = "Every frame at training size, in a file that training maps into memory. Goes on where it was stopped."
    sub = add("cache", "decode a data set's videos once", _cache, about)
    _add_preset(sub, "; here clevrer or clevrer-mini")
    sub.add_argument("--verify", action="store_true", help="check what is there, decode anew what is damaged")
    _add_fields(sub, only=("data.",))

    about = "Writes h_x, h_y and predictions of windows of their frames, a batch at a time, to a safetensors file."
    sub = add("embed", "representations of video files by a trained run", _embed, about)
    sub.usage = f"{sub.prog} RUN VIDEO ... --out FILE [OPTIONS]"
    sub.add_argument("run", type=Path, metavar="RUN", help="folder of a run")
    sub.add_argument("videos", type=Path, nargs="+", metavar="VIDEO", help="files, or folders of them")
    sub.add_argument("--out", type=Path, required=True, metavar="FILE", help="the safetensors file to write")
    sub.add_argument("--batch", default="32", metavar="N", help="windows at a time (default: 32)")
    every = "frames from one window to the next, counted with the run's stride (default: 0, one after another)"
    sub.add_argument("--every", default="0", metavar="K", help=every)
    _add_fields(sub, only=("data.decoder", "data.workers", "data.decode_timeout", "data.on_bad_video", "train.device"))

    about = "3D scenes from a physics engine in a data set's own format. Goes on where it was stopped."
    sub = add("simulate", "make videos to train on", _simulate, about)
    sub.usage = f"{sub.prog} {{clevrer,cater}} [OPTIONS]"
    sub.add_argument("target", choices=[*SIMULATED], help="whose format: videos, annotations, folders")
    third = "how many, about a third of them for validation (default: 300)"
    sub.add_argument("--videos", default="300", metavar="N", help=third)
    sub.add_argument("--out", type=Path, required=True, metavar="DIR", help="where to, for --data.root")
    sub.add_argument("--seed", default="0", metavar="N", help="of all scenes (default: 0)")
    sub.add_argument("--size", metavar="W,H", help="of the frames, even numbers (default: the data set's)")
    sub.add_argument("--no-shadows", action="store_true", help="about three times as fast")
    sub.add_argument("--processes", default="0", metavar="N", help="at work beside each other (default: 0, one a core)")

    sub = add("info", "show versions, devices, backends, extras and digits, and what would be chosen", _info)
    sub.add_argument("--data.root", dest="root", default="", metavar="DIR", help="folder of MNIST IDX files")
    return parser


def _add_processes(parser: argparse.ArgumentParser) -> None:
    text = "runs side by side, each with its share of the cores; auto: one a core, on a GPU one (default: auto)"
    parser.add_argument("--processes", default="auto", metavar="N", help=text)


def _add_preset(parser: argparse.ArgumentParser, more: str = "") -> None:
    names = ", ".join(PRESETS)
    text = f"one of {names} (default: moving-mnist on a CUDA GPU, moving-mnist-mini elsewhere{more})"
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--preset", metavar="NAME", help=text)
    group.add_argument("--config", type=Path, metavar="FILE", help="the config.json of a run, instead of a preset")


def _add_fields(parser: argparse.ArgumentParser, only: tuple[str, ...] = ("",), without: Sequence[str] = ()) -> None:
    """An option for every field: --train.lr, and --lr where no other group has a field of that name."""
    wanted = [k for k in fields() if k.startswith(only) and k not in without]
    leaves = Counter(name.split(".")[1] for name in wanted)
    about = "defaults are those of the preset moving-mnist; another preset, a config file or a run brings its own"
    options = parser.add_argument_group("configuration", about)
    for name in wanted:
        leaf = name.split(".")[1]
        spellings = [name, *([leaf] if leaves[leaf] == 1 else [])]
        flags = dict.fromkeys(f"--{text}" for s in spellings for text in (s, s.replace("_", "-")))
        if name == "data.dataset":
            flags["--data"] = None
        text = help_text(name).replace("%", "%%")
        options.add_argument(*flags, dest=name, default=argparse.SUPPRESS, metavar="X", help=text)


def _overrides(arguments: argparse.Namespace) -> dict[str, str]:
    return {name: value for name, value in vars(arguments).items() if name in fields()}


def _config(arguments: argparse.Namespace, name: str = "moving-mnist") -> Config:
    """The config asked for; without a preset or a file that of the preset `name`, or of the data set that is asked for,
    as far as this machine can do it."""
    dataset = vars(arguments).get("data.dataset", name)
    if name in get_args(Dataset) and dataset in get_args(Dataset):
        name = "clevrer" if dataset == "folder" else dataset
    base = Config.load(arguments.config) if arguments.config else preset(arguments.preset or default_preset(name))
    return override(base, _overrides(arguments))


def _train(arguments: argparse.Namespace) -> None:
    from vjvcr_fast.evaluation.probes import training_probe

    config = _config(arguments)
    if arguments.latent:
        config = override(latent(config, arguments.latent), _overrides(arguments))
    kind = arguments.latent or config.latent.kind
    own = ["folder"] if config.data.dataset == "folder" else []
    parts = [config.preset, *own, config.model.row, *([kind] if kind != "none" else []), f"seed{config.train.seed}"]
    out = arguments.out or Path("runs") / "-".join(parts)
    cache = cache_folder(config, "train") if config.data.dataset != "moving-mnist" else None
    if cache and not (cache / "meta.json").exists() and processes.speaks():
        hint = f"`vjvcr-fast cache --preset {config.preset}` with the same --data options decodes it once"
        print(f"no cache of decoded frames: each window is decoded from its file; {hint}", file=sys.stderr)
    _use_one_thread(arguments, config)
    train(config, out, probe=training_probe if config.data.has_speed else None, resume=arguments.resume)
    if processes.speaks():
        print(f"trained: {out} (metrics.jsonl, best.pt); next: vjvcr-fast evaluate {out}", flush=True)
        if arguments.evaluate:
            _show_evaluation(out, config)


def _use_one_thread(arguments: argparse.Namespace, config: Config) -> None:
    """If the network is so small that a second thread hardly helps, and the user has not chosen a number."""
    small = config.model.kind == "conv" and max(config.model.channels) <= 32
    free = arguments.own_process and "OMP_NUM_THREADS" not in os.environ
    if small and free and resolve_device(config.train.device).type == "cpu":
        torch.set_num_threads(1)


def _evaluate(arguments: argparse.Namespace) -> None:
    config = _config_of_run(arguments)
    _use_one_thread(arguments, config)
    _show_evaluation(arguments.run, config)


def _show_evaluation(run: Path, config: Config) -> None:
    from vjvcr_fast.paper.sweep import evaluation_of

    evaluate, file = evaluation_of(config)
    result = evaluate(run, config)
    for key, value in result.items():
        if not isinstance(value, list | dict):
            print(f"{key:26} {value:.4f}" if isinstance(value, float) else f"{key:26} {value}")
    print(f"these and more are in {run / file}")


def _sweep(arguments: argparse.Namespace) -> None:
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


def _cache(arguments: argparse.Namespace) -> None:
    config = _config(arguments, "clevrer")
    for split, done in fill_cache(config, arguments.verify).items():
        bad = f", {len(done.bad)} unreadable left out" if done.bad else ""
        print(f"{cache_folder(config, split)}: {done.written} videos written, {done.kept} were there{bad}")
        for reason in done.bad.values():
            print(f"  {reason}", file=sys.stderr)


def _embed(arguments: argparse.Namespace) -> None:
    from vjvcr_fast.evaluation.embed import embed

    config = _config_of_run(arguments)
    batch, every = (parse(f"--{k}", int, getattr(arguments, k)) for k in ("batch", "every"))
    done = embed(arguments.run, arguments.videos, arguments.out, config, batch, every)
    for reason in done.bad.values():
        print(f"left out: {reason}", file=sys.stderr)
    print(f"{arguments.out}: {done.windows} windows of {len(done.videos)} videos")


def _config_of_run(arguments: argparse.Namespace) -> Config:
    """The config of the run in the folder `run`, with what the command line changes of it."""
    if not (arguments.run / "config.json").exists():
        raise ConfigError(f"{arguments.run}: not the folder of a run: it has no config.json")
    return override(Config.load(arguments.run / "config.json"), _overrides(arguments))


def _simulate(arguments: argparse.Namespace) -> None:
    size, following = SIMULATED[arguments.target]
    module = importlib.import_module(f"vjvcr_fast.data.simulated.{arguments.target}")
    simulate = getattr(module, f"simulate_{arguments.target}")
    videos, seed, processes = (parse(f"--{k}", int, getattr(arguments, k)) for k in ("videos", "seed", "processes"))
    width, height = parse("--size", tuple[int, int], arguments.size or size)
    options = {"seed": seed, "processes": processes, "size": (width, height), "shadows": not arguments.no_shadows}
    try:
        simulate(arguments.out, videos, **options)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    except RuntimeError as error:  # nothing can draw here
        raise OSError(str(error)) from None
    print(f"simulated: {arguments.out}; next: vjvcr-fast reproduce {following} --data.root {arguments.out}")


# Whose format, a module of vjvcr_fast.data.simulated: the size of frames, and what to do with the videos.
SIMULATED = {
    "clevrer": ("480,320", "table1 --dataset clevrer"),
    "cater": ("320,240", "fig2"),
}


class _Target(NamedTuple):
    """What `reproduce` can make: by a function of a module of vjvcr_fast.paper, which names its files too."""

    about: str
    preset: str
    folder: str
    module: str
    function: str
    files: str


TARGETS = {
    "table1": _Target("models", "moving-mnist", "table1", "table1", "table1", "TABLE1_FILES"),
    "table2": _Target("latents", "moving-mnist-stochastic", "table2", "table2", "table2", "TABLE2_FILES"),
    "fig2": _Target("actions from latents", "cater", "cater", "actions", "figure2", "FIGURE2_FILES"),
    "fig4": _Target("spectra", "cater", "cater", "actions", "figure4", "FIGURE4_FILES"),
    "fig3": _Target("futures with latents", "moving-mnist-stochastic", "table2", "table2", "figure3", "FIGURE3_FILES"),
}


def _reproduce(arguments: argparse.Namespace) -> None:
    seeds = parse("--seeds", tuple[int, ...], arguments.seeds)
    if len(set(seeds)) != len(seeds):
        raise ConfigError(f"--seeds={arguments.seeds}: must be different numbers")
    if arguments.target == "all":
        _reproduce_all(arguments, seeds)
        return
    _only_for_all(arguments)
    target = TARGETS[arguments.target]
    module = importlib.import_module(f"vjvcr_fast.paper.{target.module}")
    config = _config(arguments, target.preset)
    out = arguments.out or Path("runs") / f"{target.folder}-{config.preset}"
    where = f"preset {config.preset} on {resolve_device(config.train.device).type}, into {out}"
    at_once = processes_for(arguments.processes, config)
    print(f"reproduce {arguments.target}: {where}; runs that are there already go on or are kept", flush=True)
    _use_one_thread(arguments, config)
    text = getattr(module, target.function)(config, out, seeds, at_once)
    print(f"\n{text}\nwrote {', '.join(str(out / name) for name in getattr(module, target.files))}")


def _only_for_all(arguments: argparse.Namespace) -> None:
    for name in ("clevrer", "cater"):
        if getattr(arguments, name):
            raise ConfigError(f"--{name} is for reproduce all; {arguments.target} takes --data.root")


def _reproduce_all(arguments: argparse.Namespace, seeds: tuple[int, ...]) -> None:
    from vjvcr_fast.paper.everything import PAGE, everything

    if arguments.preset or arguments.config:
        raise ConfigError("reproduce all has presets of its own: leave out --preset and --config")
    out = arguments.out or Path("runs") / "all"
    roots = {name: given for name in ("clevrer", "cater") if (given := getattr(arguments, name))}
    for name, given in roots.items():
        if not Path(given).is_dir():
            raise ConfigError(f"--{name}={given}: no such folder")
    processes_for(arguments.processes, override(Config(), _overrides(arguments)))  # a wrong value is said now
    text = everything(out, seeds, _overrides(arguments), roots, arguments.processes)
    print(f"\n{text}\nwrote {out / PAGE}")


def _info(arguments: argparse.Namespace) -> None:
    row = "{:17} {}".format
    print(row("vjvcr_fast", __version__))
    print(row("torch", f"{torch.__version__}, Python {platform.python_version()}, {torch.get_num_threads()} threads"))
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    print(row("CUDA", ", ".join(gpus) or "no device"))
    for device, chosen in backends.explain().items():
        print(row(f"loss, {device}", chosen))
    print(row("operators", native.explain()))
    if native.MISSING is None:
        print(row("fista_mlp on", native.explain_plan()))
    print(row("presets", f"{', '.join(PRESETS)}; default here: {default_preset()}"))
    for backend, about in decode.explain().items():
        print(row(f"video, {backend}", about))
    for extra, modules in EXTRAS.items():
        missing = [m for m in modules if not _is_installed(m)]
        lacking = f"lacks {', '.join(missing)}: pip install 'vjvcr_fast[{extra}]'"
        print(row(f"extra {extra}", lacking if missing else "installed"))
    print(row("VJVCR_DATA", os.environ.get("VJVCR_DATA") or "not set"))
    try:
        print(row("digits", load_digits(arguments.root).source))
    except (DigitsError, ImportError) as error:
        print(row("digits", f"none: {error}"))


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of a package around it
        return False


def _reject(unknown: list[str], parser: argparse.ArgumentParser) -> NoReturn:
    """One line that names the option, the nearest that exist, and where all are listed."""
    name = next((u for u in unknown if u.startswith("-")), unknown[0]).split("=")[0]
    near = difflib.get_close_matches(name, parser._option_string_actions, n=3, cutoff=0.6)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    what = "no such option" if name.startswith("-") else "unexpected argument"
    parser.error(f"{name}: {what}; {hint}`{parser.prog} --help` lists all")
