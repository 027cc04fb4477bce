"""Settings: the presets, text to values, files, and one line for everything that is not allowed."""

import dataclasses
import json
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
import torch

from vjvcr_fast import settings
from vjvcr_fast.config import (
    LATENTS,
    PRESETS,
    SCALES,
    Config,
    ConfigError,
    Data,
    Evaluate,
    Latent,
    Model,
    Train,
    default_preset,
    describe,
    fields,
    help_text,
    latent,
    override,
    parse,
    preset,
    resolve_device,
    shown,
)
from vjvcr_fast.losses import attainable_std
from vjvcr_fast.models.energy import ROWS
from vjvcr_fast.training.build import build_decoder, build_model

# -- Presets --------------------------------------------------------------------------------------------------------


def test_moving_mnist_has_the_papers_numbers() -> None:
    config = preset("moving-mnist")
    assert (config.model.alpha, config.model.beta, config.model.threshold) == (0.5, 0.1, 1.0)
    assert (config.train.batch, config.train.lr, config.train.weight_decay_generative) == (256, 1e-3, 1e-6)
    assert (config.data.frames_in, config.data.frames_out) == (3, 12)
    assert (config.data.canvas, config.data.digit, config.data.stochastic) == (64, 28, False)
    assert config.evaluate.probe_lr == 1e-3
    assert config.train.steps == pytest.approx(100 * 55_000 / 256, rel=1e-3)  # 100 epochs of the paper's digits


def test_mini_differs_in_sizes_only() -> None:
    mini, full = preset("moving-mnist-mini"), preset("moving-mnist")
    for name in ("alpha", "beta", "gamma", "threshold", "eps"):
        assert getattr(mini.model, name) == getattr(full.model, name)
    assert mini.data.canvas < full.data.canvas
    assert mini.train.steps < full.train.steps


def test_stochastic_moving_mnist_has_the_papers_numbers() -> None:
    config = preset("moving-mnist-stochastic")
    assert (config.data.frames_in, config.data.frames_out, config.data.stochastic) == (3, 3, True)
    assert (config.data.canvas, config.data.digit) == (64, 28)
    assert (config.latent.heads, config.latent.dim) == (5, 20)
    deterministic = preset("moving-mnist")
    assert config.model == deterministic.model
    for name in ("batch", "lr", "steps"):
        assert getattr(config.train, name) == getattr(deterministic.train, name)
    assert (config.evaluate.probe_lr, config.evaluate.probe_batch) == (1e-3, 256)


def test_stochastic_mini_differs_in_sizes_only() -> None:
    mini, full = preset("moving-mnist-stochastic-mini"), preset("moving-mnist-stochastic")
    assert mini.latent == full.latent
    assert (mini.data.canvas, mini.data.frames_in, mini.data.frames_out, mini.data.stochastic) == (32, 3, 3, True)
    assert mini.model.channels[-1] * mini.model.pool**2 == 128
    assert mini.train.steps < full.train.steps


def test_the_latents_of_table_2() -> None:
    base = preset("moving-mnist-stochastic")
    kinds = {name: latent(base, name).latent for name in LATENTS}
    assert {name: of.kind for name, of in kinds.items()} == {
        "none": "none",
        "discrete": "discrete",
        "sparse-high": "sparse",
        "sparse-low": "sparse",
    }
    assert (kinds["sparse-high"].zeros, kinds["sparse-low"].zeros) == (0.8, 0.2)
    assert latent(base, "none") == base
    with pytest.raises(ConfigError, match="latent='dense': must be one of none, discrete, sparse-high"):
        latent(base, "dense")


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_infers_z_by_the_papers_method(name: str) -> None:
    found = preset(name).latent
    several = 10 if found.kind == "actions" else 50  # the paper's "several iterations" of gradient descent on actions
    assert (found.method, found.iterations, found.tolerance) == ("fista", several, 1e-4)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_know_their_name_and_survive_a_file(name: str) -> None:
    assert preset(name).preset == name
    assert Config.from_dict(json.loads(preset(name).to_json())) == preset(name)


def test_unknown_preset_names_the_known() -> None:
    with pytest.raises(ConfigError, match="preset='mini': must be one of moving-mnist, moving-mnist-mini"):
        preset("mini")


@pytest.mark.parametrize(("there", "name"), [(True, "moving-mnist"), (False, "moving-mnist-mini")])
def test_default_preset(monkeypatch: pytest.MonkeyPatch, there: bool, name: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    assert default_preset() == name
    stochastic = default_preset("moving-mnist-stochastic")
    assert stochastic == name.replace("moving-mnist", "moving-mnist-stochastic")
    assert [default_preset("cater", scale) for scale in SCALES] == ["cater-mini", "cater-small", "cater"]
    with pytest.raises(ConfigError, match="scale='big': must be one of mini, small, full"):
        default_preset("cater", "big")


@pytest.mark.parametrize("row", ROWS)
def test_pixels_have_another_weight_in_generative_rows(row: str) -> None:
    changes = {"model.row": row, "model.gamma": 0.3, "model.gamma_generative": 10.5}
    model = build_model(override(preset("moving-mnist-mini"), changes), torch.device("cpu"))
    assert model.gamma == (0.3 if ROWS[row].hidden else 10.5)


@pytest.mark.parametrize(("name", "kernel"), [("moving-mnist-small", 7), ("moving-mnist-mini", 5)])
def test_the_networks_are_those_of_the_preset(name: str, kernel: int) -> None:
    """Files of earlier versions, which lack the fields, had 3x3 kernels and a decoder that copied."""
    model = build_model(preset(name), torch.device("cpu"))
    sides = {conv.kernel_size for conv in model.encoder.spatial.modules() if isinstance(conv, torch.nn.Conv2d)}
    assert sides == {(kernel, kernel)}
    assert isinstance(build_decoder(preset(name)).unpool, torch.nn.Sequential), "learned"
    values = preset(name).to_dict()
    del values["model"]["kernel"], values["model"]["unpool"]
    before = Config.from_dict(values)
    assert before.model.kernel == 3
    assert isinstance(build_decoder(before).unpool, torch.nn.Upsample), "nearest"
    some = Config.from_dict({"preset": name, "model": {"eps": 1e-4}})
    assert some == preset(name), "a file with a few fields is no earlier run's"


@pytest.mark.parametrize("name", ["moving-mnist", "moving-mnist-stochastic", "clevrer", "cater"])
def test_small_presets_are_in_the_regime_of_the_full_ones(name: str) -> None:
    """VCR lifts features as far, and its weights and the latents are the same."""
    full, small = preset(name), preset(f"{name}-small")
    for field in ("alpha", "beta", "gamma", "threshold", "eps", "row", "kernel", "unpool"):
        assert getattr(small.model, field) == getattr(full.model, field)
    assert (small.latent, small.data.dataset) == (full.latent, full.data.dataset)
    reached = [attainable_std(c.model.alpha, c.model.beta, c.train.batch, c.d) for c in (full, small)]
    assert reached[1] == pytest.approx(reached[0], abs=0.02)


def test_nothing_can_be_changed_in_place() -> None:
    config = preset("moving-mnist")
    for owner, name in [(config, "preset"), (config.train, "lr"), (config.model, "channels")]:
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(owner, name, None)
    override(config, {"train.lr": "5"})
    assert preset("moving-mnist").train.lr == 1e-3


# -- Fields ---------------------------------------------------------------------------------------------------------

# What the types' own samples below cannot be.
SAMPLES = {
    "data.canvas": "128",
    "data.digit": "7",
    "data.speed": "0.25,1.5",
    "model.channels": "1,2,3",
    "model.row": "generative",
    "model.pool": "4",
    "model.padding": "zeros",
    "train.device": "cpu",
    "train.precision": "bf16",
    "train.compile": "off",
    "train.on_nonfinite": "rollback",
    "train.log": "wandb",
    "data.start": "center",
    "latent.kind": "sparse",
    "latent.method": "ista",
    "latent.step_rule": "fixed",
    "data.dataset": "clevrer",
    "data.decoder": "decord",
    "data.on_bad_video": "skip",
    "model.kind": "simvp",
    "data.split": "development",
    "model.distance": "sum",
    "model.kernel": "5",
    "model.unpool": "nearest",
    "model.regulariser": "sigreg",
}


def sample(name: str) -> str:
    hint, default = fields()[name], value_of(preset("moving-mnist"), name)
    texts = {bool: str(not default).lower(), int: "7", float: "0.25", str: "some text"}
    return SAMPLES.get(name) or texts[hint]


def value_of(config: Config, name: str) -> Any:
    group, leaf = name.split(".")
    return getattr(getattr(config, group), leaf)


def test_fields_are_those_of_the_five_groups() -> None:
    groups = {"data": Data, "model": Model, "latent": Latent, "train": Train, "evaluate": Evaluate}
    expected = [f"{group}.{f.name}" for group, of in groups.items() for f in dataclasses.fields(of)]
    assert list(fields()) == expected


@pytest.mark.parametrize("name", fields())
def test_every_field_is_set_by_text_and_survives_a_file(name: str) -> None:
    before = preset("clevrer" if name == "data.mirror" else "moving-mnist")
    after = override(before, {name: sample(name)})
    value, hint = value_of(after, name), fields()[name]
    text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
    assert text.lower() == sample(name).lower()
    assert isinstance(value, str if get_origin(hint) is Literal else get_origin(hint) or hint)
    assert value != value_of(before, name)
    assert {n for n in fields() if value_of(after, n) != value_of(before, n)} == {name}
    assert Config.from_dict(json.loads(after.to_json())) == after


@pytest.mark.parametrize("name", fields())
def test_every_field_is_explained(name: str) -> None:
    text = help_text(name, preset("clevrer-mini"))
    assert describe(fields()[name]) in text
    assert text.endswith(f"(default: {shown(value_of(preset('clevrer-mini'), name)) or 'empty'})")
    assert len(text) > 20


def test_several_fields_that_only_fit_together() -> None:
    config = override(preset("moving-mnist"), {"data.canvas": "16", "data.digit": "8", "model.pool": "1"})
    assert (config.data.canvas, config.data.digit, config.model.pool) == (16, 8, 1)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        *((name, "fields are data.dataset, ") for name in ("train.nothing", "lr", "preset", "train", "")),
        *((name, "did you mean train.lr?") for name in ("train.lrr", "train.lr.x", "Train.lr")),
    ],
)
def test_unknown_field(name: str, says: str) -> None:
    with pytest.raises(ConfigError, match=f"^{name}: no such field; {says}") as error:
        override(preset("moving-mnist"), {name: "1"})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("data.stochastic", "yes", "'yes': must be true or false"),
        ("data.stochastic", "", "'': must be true or false"),
        ("data.stochastic", 1, "1: must be true or false"),
        ("train.steps", "2.5", "'2.5': must be a whole number"),
        ("train.steps", 2.5, "2.5: must be a whole number"),
        ("train.steps", "", "'': must be a whole number"),
        ("train.steps", "many", "'many': must be a whole number"),
        ("train.steps", "nan", "'nan': must be a whole number"),
        ("train.steps", True, "True: must be a whole number"),
        ("train.steps", None, "None: must be a whole number"),
        ("train.steps", [3], "[3]: must be a whole number"),
        ("train.steps", {"a": 1}, "{'a': 1}: must be a whole number"),
        ("train.lr", "nan", "'nan': must be a number"),
        ("train.lr", "inf", "'inf': must be a number"),
        ("train.lr", "-inf", "'-inf': must be a number"),
        ("train.lr", float("nan"), "nan: must be a number"),
        ("train.lr", "1e999", "'1e999': must be a number"),
        pytest.param("train.lr", 10**400, f"{10**400}: must be a number", id="huge"),
        ("train.lr", "1,2", "'1,2': must be a number"),
        ("train.lr", True, "True: must be a number"),
        ("train.precision", "fp16", "'fp16': must be one of auto, fp32, bf16; did you mean bf16?"),
        ("train.precision", ["auto"], "['auto']: must be one of auto, fp32, bf16"),
        ("train.compile", True, "True: must be one of auto, on, off"),
        ("model.row", "jepa", "'jepa': must be one of vj-vcr, vj-vcr-decoder, generative-vcr, generative"),
        ("data.start", "top", "'top': must be one of switch, center"),
        ("latent.kind", "dense", "'dense': must be one of none, discrete, sparse, actions"),
        ("latent.revive", "no", "'no': must be true or false"),
        ("data.speed", "1", "'1': must be 2 numbers joined by commas"),
        ("data.speed", "1,2,3", "'1,2,3': must be 2 numbers joined by commas"),
        ("data.speed", [1.0], "[1.0]: must be 2 numbers joined by commas"),
        ("data.speed", 1.0, "1.0: must be 2 numbers joined by commas"),
        ("data.speed", "1,x", "'x': must be a number"),
        ("data.speed", "1,inf", "'inf': must be a number"),
        ("model.channels", "1,2.5,3", "'2.5': must be a whole number"),
        ("model.channels", "", "'': must be a whole number"),
        ("data.root", 3, "3: must be text"),
    ],
)
def test_values_of_the_wrong_type(name: str, value: Any, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        override(preset("moving-mnist"), {name: value})
    assert str(error.value) == f"{name}={message}"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"data.canvas": 0}, "data.canvas=0: must be at least 1"),
        ({"data.digit": 65}, "data.digit=65: must be at most data.canvas=64"),
        ({"data.frames_in": 0}, "data.frames_in=0: must be at least 1"),
        ({"data.frames_out": -1}, "data.frames_out=-1: must be at least 1"),
        ({"data.speed": "3,2"}, "data.speed=(3.0, 2.0): must be LOW,HIGH with 0 <= LOW <= HIGH"),
        ({"data.speed": "-1,2"}, "data.speed=(-1.0, 2.0): must be LOW,HIGH with 0 <= LOW <= HIGH"),
        ({"model.alpha": -0.1}, "model.alpha=-0.1: must be at least 0"),
        ({"model.eps": -1}, "model.eps=-1.0: must be at least 0"),
        ({"model.gamma_generative": 0}, "model.gamma_generative=0.0: must be above 0"),
        ({"model.norm_scale": 0}, "model.norm_scale=0.0: must be above 0"),
        ({"model.kernel": 4}, "model.kernel=4: must be odd and above 0"),
        ({"train.warmup": -1}, "train.warmup=-1: must be 0 (none) or more"),
        (
            {"model.distance": "sum", "latent.kind": "sparse"},
            "model.distance=sum: must be mean where latent.kind=sparse",
        ),
        (
            {"data.dataset": "clevrer", "data.split": "development"},
            "data.split=development: must be validation where data.dataset=clevrer",
        ),
        ({"data.mirror": True}, "data.mirror=True: must be false where data.dataset=moving-mnist"),
        ({"model.hidden": 0}, "model.hidden=0: must be at least 1"),
        ({"latent.heads": 1}, "latent.heads=1: must be at least 2"),
        ({"latent.dim": 0}, "latent.dim=0: must be at least 1"),
        ({"latent.iterations": 0}, "latent.iterations=0: must be at least 1"),
        ({"latent.weight": 0}, "latent.weight=0.0: must be above 0"),
        ({"latent.step_size": 0}, "latent.step_size=0.0: must be above 0"),
        ({"latent.decay": -1}, "latent.decay=-1.0: must be at least 0"),
        ({"latent.tolerance": -1}, "latent.tolerance=-1.0: must be at least 0"),
        ({"latent.zeros": 1}, "latent.zeros=1.0: must be between 0 and 1"),
        ({"latent.zeros": 0}, "latent.zeros=0.0: must be between 0 and 1"),
        ({"train.steps": 0}, "train.steps=0: must be at least 1"),
        ({"train.batch": 1}, "train.batch=1: must be at least 2, for a variance"),
        ({"train.validation_videos": 1}, "train.validation_videos=1: must be at least 2"),
        ({"train.lr": 0}, "train.lr=0.0: must be above 0"),
        ({"train.weight_decay": -1}, "train.weight_decay=-1.0: must be at least 0"),
        ({"train.weight_decay_generative": -1}, "train.weight_decay_generative=-1.0: must be at least 0"),
        ({"train.seed": -1}, "train.seed=-1: must be between 0 and 2^32 - 1"),
        ({"train.seed": 10**17}, f"train.seed={10**17}: must be between 0 and 2^32 - 1"),
        ({"train.probe_every": -1}, "train.probe_every=-1: must be 0 (never) or more"),
        ({"train.device": "gpu"}, "train.device='gpu': must be auto, cpu, cuda or cuda:N"),
        ({"train.device": "meta"}, "train.device='meta': must be auto, cpu, cuda or cuda:N"),
        ({"evaluate.probe_epochs": 0}, "evaluate.probe_epochs=0: must be above 0"),
        ({"evaluate.probe_videos": 1}, "evaluate.probe_videos=1: must be at least 2"),
        ({"model.pool": 3}, "model and data do not fit: pool=3"),
        ({"data.canvas": 60}, "model and data do not fit: size=60"),
        ({"model.channels": "8,8"}, "model and data do not fit: channels=(8, 8)"),
        ({"model.channels": "8,0,8"}, "model and data do not fit: channels=(8, 0, 8)"),
    ],
)
def test_values_out_of_range(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        override(preset("moving-mnist"), values)
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("hint", "value", "expected"),
    [
        (bool, "TRUE", True),
        (int, " 12 ", 12),
        (int, 3.0, 3),
        (float, "1e-3", 1e-3),
        (float, 2, 2.0),
        (tuple[int, ...], "7", (7,)),
        (tuple[float, float], [1, "2"], (1.0, 2.0)),
        (Literal["a", "b"], "b", "b"),
    ],
)
def test_parse(hint: Any, value: Any, expected: Any) -> None:
    parsed = parse("name", hint, value)
    assert parsed == expected
    assert type(parsed) is type(expected)


def test_a_group_converts_and_checks_what_python_gives() -> None:
    assert (Train(steps="7", lr=1).steps, Train(lr=1).lr, Data(speed=[1, 2]).speed) == (7, 1.0, (1.0, 2.0))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"^train\.steps=0: must be at least 1$"):
        Train(steps=0)
    with pytest.raises(ConfigError, match=r"^model\.row='jepa': must be one of vj-vcr, "):
        Model(row="jepa")  # type: ignore[arg-type]


def test_row_choices_are_the_energys() -> None:
    assert get_args(settings.Row) == tuple(ROWS)


# -- Files ----------------------------------------------------------------------------------------------------------


def test_a_file_gives_the_config_back(tmp_path: Path, tiny: Config) -> None:
    file = tmp_path / "config.json"
    file.write_text(tiny.to_json())
    assert Config.load(file) == Config.load(str(file)) == tiny


@pytest.mark.parametrize(("then", "now"), [(True, "tensorboard"), (False, "none"), ("false", "none")])
def test_a_file_may_have_a_field_of_an_earlier_version(tmp_path: Path, then: Any, now: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"train": {"tensorboard": then}}))
    assert Config.load(tmp_path / "config.json").train.log == now


def test_a_field_of_an_earlier_version_is_checked() -> None:
    with pytest.raises(ConfigError, match=r"^train.tensorboard='maybe': must be true or false$"):
        override(Config(), {"train.tensorboard": "maybe"})


def test_a_file_may_leave_fields_out(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text('{"train": {"lr": 0.5}}')
    assert Config.load(file) == override(preset("moving-mnist"), {"train.lr": 0.5})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a readable config file"),
        (b"{", "not a readable config file"),
        (b"\xff\xfe\x00", "not a readable config file"),
        (b"[1, 2]", "a JSON object is expected, not list"),
        (b"null", "a JSON object is expected, not NoneType"),
        (b'{"train": {"speed": 1}}', "train.speed: no such field"),
        (b'{"speed": 1}', "speed: no such field"),
        (b'{"train": 5}', "train: no such field"),
        (b'{"preset": 5}', "preset=5: must be text"),
        (b'{"preset": {"a": 1}}', "preset={'a': 1}: must be text"),
        (b'{"train": {"lr": "fast"}}', "train.lr='fast': must be a number"),
        (b'{"train": {"lr": NaN}}', "train.lr=nan: must be a number"),
        (b'{"train": {"lr": null}}', "train.lr=None: must be a number"),
        (b'{"train": {"lr": -1}}', "train.lr=-1.0: must be above 0"),
        (b'{"data": {"canvas": 30, "digit": 8}}', "model and data do not fit: size=30"),
    ],
)
def test_a_bad_file_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    file = tmp_path / "some.json"
    file.write_bytes(content)
    with pytest.raises(ConfigError) as error:
        Config.load(file)
    assert str(error.value).startswith(f"{file}: ")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    for path in (tmp_path / "none.json", tmp_path):
        with pytest.raises(ConfigError, match="not a readable config file"):
            Config.load(path)


# -- Devices --------------------------------------------------------------------------------------------------------


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert resolve_device("auto") == resolve_device("cpu") == torch.device("cpu")
    with pytest.raises(ConfigError, match=r"train\.device='cuda': this machine has 0 CUDA devices"):
        resolve_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert resolve_device("auto") == torch.device("cuda")
    assert resolve_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(ConfigError, match=r"train\.device='cuda:2': this machine has 2 CUDA devices"):
        resolve_device("cuda:2")


def test_a_file_that_says_little_is_its_preset(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"preset": "moving-mnist-mini", "train": {"lr": 0.5}}')
    assert Config.load(tmp_path / "config.json") == override(preset("moving-mnist-mini"), {"train.lr": 0.5})
