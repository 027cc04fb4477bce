"""`vjvcr-fast report RUN`: a run on one page of HTML, with everything inside the file.

The page shows what there is: of a run that has just begun, its configuration. What is missing or cannot be read is
left out, and the page says why.
"""

import base64
import functools
import html
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import torch

from vjvcr_fast import __version__, reference
from vjvcr_fast.config import PRESETS, Config, ConfigError, differences, shown
from vjvcr_fast.data.files import one_line, write_atomic
from vjvcr_fast.evaluation.evaluate import frozen_decoder, kept, kept_decoder
from vjvcr_fast.losses.attainable import attainable_std
from vjvcr_fast.models.energy import ROWS, EnergyModel
from vjvcr_fast.paper import figures
from vjvcr_fast.paper.figures import CURVES, Points
from vjvcr_fast.paper.sweep import evaluation_of
from vjvcr_fast.paper.table1 import TERMS
from vjvcr_fast.runs import load_run, weights_of
from vjvcr_fast.training.build import Data, VideoSource, build_data, build_videos
from vjvcr_fast.training.calibration import Latents
from vjvcr_fast.training.checkpoint import read_metrics
from vjvcr_fast.training.loop import examples
from vjvcr_fast.training.step import split_frames

PAGE = "report.html"
CLIPS, VALUES = 4, 10_000_000  # at most so many clips, of so many colour values together
SPECTRUM = 128  # videos whose spectrum is shown for a run that has not been evaluated
MILLISECONDS = {16: 300, 40: 150}  # how long a frame is shown, by the number of frames; longer clips: SHORTEST
SHORTEST = 80

# The panels of a section: title -> the names in metrics.jsonl that it shows, as a regular expression.
LOSSES = {"energy": "loss|validation_loss"}
LOSSES |= {CURVES[name]: name for name in ("hidden", "pixel", "variance", "covariance", "sigreg")}
COLLAPSE = {
    "standard deviation of h_x over a batch": "feature_std|feature_std_least",
    "correlation of its features": "feature_correlation",
    CURVES["rank_me"]: "rank_me",
}
LATENT = {
    "energy at z*": "latent_energy",
    CURVES["zeros"]: "zeros",
    CURVES["latent_weight"]: "latent_weight",
    "share of the videos that choose a head": r"head_\d+",
    "heads revived": "revived",
    "energy at the true and at other actions, training": "train_energy_.*",
    "the same, validation": "validation_energy_.*",
}
PROBES = {CURVES["speed_mse"]: "speed_mse.*"}
SPEED = {"videos a second": "videos_per_second", "share of the time spent waiting for data": "data_wait"}
# What an evaluation has besides measurements.
UNMEASURED = ("measures", "best", "step", "trained_steps", "seed", "data", "validation_data", "row", "latent")

STYLE = """
:root { color-scheme: light }
body { font: 16px/1.5 system-ui, sans-serif; color: #222; max-width: 1150px; margin: 0 auto; padding: 0 16px 32px }
h1 { font-size: 1.6rem; margin: 1.2rem 0 0; overflow-wrap: anywhere }
h2 { font-size: 1.2rem; margin: 2rem 0 .5rem; border-bottom: 1px solid #ddd }
p { max-width: 75ch; margin: .5rem 0 }
.panels { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(300px, 100%), 1fr)); gap: 8px }
.wide { overflow-x: auto }
img { max-width: 100%; height: auto }
.panels img { width: 100% }
.wide img { min-width: 560px }
.clips img { image-rendering: pixelated }
.missing { color: #8a4b00 }
table { border-collapse: collapse }
th, td { text-align: left; vertical-align: top; padding: 2px 16px 2px 0; overflow-wrap: anywhere }
th { font-weight: 500 }
pre { background: #f5f5f5; padding: 8px; overflow-x: auto; font-size: .85rem }
""".strip()


class Trained(NamedTuple):
    """A run's best model, in eval mode, its data (training, validation), and the validation videos."""

    config: Config  # with the calibrated weight of the latent
    model: EnergyModel
    data: tuple[Data, Data]
    videos: VideoSource


def report(run: Path, config: Config, out: Path | None = None, decode: bool = False) -> Path:
    """Writes the page of a run, or of a folder of a saved model. Returns its path, by default RUN/report.html.

    config: the run's, of which `train.device` and `data.root` may differ. decode: for clips of a model that has no
    decoder, train one on its frozen predictions (`frozen_decoder`); else nothing is trained. What could not be read is
    also named on stderr.

    Raises ConfigError if `out` is a folder; CheckpointError if metrics.jsonl cannot be read; ImportError without
    matplotlib.
    """
    out = out or run / PAGE
    if out.is_dir():
        raise ConfigError(f"--out={out}: a folder; the name of a file is needed")
    rows = read_metrics(run / "metrics.jsonl")
    trained = _attempt("The model or its videos cannot be used", _trained, run, config)
    sections = [
        *_curves(config, rows),
        _section("Evaluation and spectrum", *_spectrum(run, config, trained)),
        _section("Clips", *_clips(run, trained, decode)),
        _section("Configuration", *_configuration(config)),
    ]
    title, state = run.resolve().name, _state(run, config, rows)
    write_atomic(out, _page(title, [f"<h1>{_text(title)}</h1>", _paragraph(state), *sections]))
    return out


def _state(run: Path, config: Config, rows: Sequence[Mapping[str, Any]]) -> str:
    """What the run is and how far it has come."""
    sigreg = config.model.regulariser == "sigreg"
    title = TERMS["sigreg" if sigreg and config.model.row == "vj-vcr" else config.model.row].title
    more = " with SIGReg" if sigreg and config.model.row != "vj-vcr" else ""
    latent = {"none": "no latent"}.get(config.latent.kind, f"latent: {config.latent.kind}")
    what = f"{title}{more} ({config.model.row}), {latent}, seed {config.train.seed}; preset {config.preset}."
    steps, step = config.train.steps, max((row["step"] for row in rows), default=0)
    if not rows and weights_of(run).name != "best.pt":
        return f"{what} A saved model, without the history of its training."
    end = "finished" if step >= steps else "not finished" if step else "no step is logged yet"
    losses = [(row["validation_loss"], row["step"]) for row in rows if _number(row.get("validation_loss"))]
    best = "; lowest validation loss {:.4g} at step {:,}".format(*min(losses)) if losses else ""
    return f"{what} Step {step:,} of {steps:,}, {end}{best}."


# -- Curves ---------------------------------------------------------------------------------------------------------


def _curves(config: Config, rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """The sections with all that is logged. Numbers that no section names are in the last one."""
    series: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        for name, value in row.items():
            if name != "step" and _number(value):
                series.setdefault(name, []).append((row["step"], float(value)))
    series = {name: points for name, points in series.items() if any(value for _, value in points)}
    if not series:
        yield _section("Curves", _missing("Nothing is logged yet (metrics.jsonl)."))
        return
    known = [name for of in (LOSSES, COLLAPSE, LATENT, PROBES, SPEED) for name in of.values()]
    other = {name: re.escape(name) for name in series if not any(re.fullmatch(k, name) for k in known)}
    about = "Means over the steps since the point before. The energy is what training minimises."
    yield from _panels("Losses", LOSSES, series, {}, about)
    yield from _panels("Is the encoder collapsing?", COLLAPSE, series, *_collapse(config)) or [_no_telemetry(config)]
    yield from _panels("Latent variable", LATENT, series, {}, "")
    yield from _panels("Probe of the speed during training", PROBES, series, {}, "")
    yield from _panels("Speed of the training", SPEED | other, series, {}, "")


def _panels(
    title: str, panels: Mapping[str, str], series: Mapping[str, Points], levels: Mapping[str, Any], about: str
) -> list[str]:
    """A section with a picture for each panel that has something to show, or nothing if none has."""
    pictures = []
    for panel, pattern in panels.items():
        lines = {name: points for name, points in series.items() if re.fullmatch(pattern, name)}
        if lines:
            of = levels.get(panel, {})
            pictures.append(_picture(functools.partial(figures.lines, title=panel, series=lines, levels=of), panel))
    if not pictures:
        return []
    return [_section(title, *([_paragraph(about)] if about else []), _div("panels", pictures))]


def _no_telemetry(config: Config) -> str:
    every = config.train.telemetry_every
    why = f"Telemetry comes every {every} steps, and none is logged yet." if every else "train.telemetry_every is 0."
    return _section("Is the encoder collapsing?", _missing(why))


def _collapse(config: Config) -> tuple[dict[str, dict[str, float]], str]:
    """Heights to compare the telemetry with, by panel, and what they are."""
    n, model = config.train.batch, config.model
    std, correlation, _ = COLLAPSE
    levels = {correlation: {"by chance": (n - 1) ** -0.5}} if n > 1 else {}
    about = "Near zero, the standard deviation says that features have become equal for all videos."
    if model.regulariser == "vcr" and ROWS[model.row].vcr and model.alpha > 0 and model.threshold > 0 and n > 1:
        reach = min(attainable_std(model.alpha, model.beta, n, config.d, model.threshold), model.threshold)
        levels[std] = {"threshold": model.threshold, "what VCR can reach": reach}
    return levels, about


# -- Spectrum and clips ---------------------------------------------------------------------------------------------


def _trained(run: Path, config: Config) -> Trained | str:
    if not weights_of(run).exists():
        return f"There are no weights ({weights_of(run).name}): training writes them at every validation."
    config, model = load_run(run, config)
    data = build_data(config)
    return Trained(config, model, data, build_videos(config, data[1], "validation", next(model.parameters()).device))


def _spectrum(run: Path, config: Config, trained: Trained | str) -> Iterator[str]:
    """The evaluation's numbers and spectrum; else the spectrum of a few videos."""
    file = evaluation_of(config).file
    found = _attempt(f"{file} is left out", kept, run, config, file)
    spectra = {}
    if isinstance(found, dict):
        named = {"singular_values": "best checkpoint", "singular_values_start": "before training"}
        named["singular_values_end"] = "after training"
        spectra = {title: found[name] for name, title in named.items() if name in found}
        measured = {k: v for k, v in found.items() if not isinstance(v, dict | list | None) and k not in UNMEASURED}
        yield _paragraph(f"`vjvcr-fast evaluate` measured this of the checkpoint of step {found['step']:,} ({file}).")
        yield _table({name: _value(value) for name, value in measured.items()})
    else:
        yield _missing(found or f"Not evaluated with these weights and settings: there is no {file} of them.")
    if not spectra:
        ours = trained if isinstance(trained, str) else _attempt("Videos cannot be used", _singular_values, trained)
        if isinstance(ours, str):
            yield _missing(f"No spectrum. {ours}")
            return
        spectra = {"best checkpoint": ours}
        yield _paragraph(f"Encoder outputs of the target frames of up to {SPECTRUM} validation videos.")
    yield _div("wide", [_picture(lambda target: figures.spectrum(target, spectra), "singular values", 975)])


@torch.no_grad()
def _singular_values(trained: Trained) -> list[float] | str:
    config, batch = trained.config, min(trained.config.evaluate.probe_batch, SPECTRUM)
    parts = [trained.videos.batch(at, batch) for at in range(0, SPECTRUM - batch + 1, batch)]
    encoded = [trained.model.encode_targets(split_frames(part, config)[1]).flatten(0, 1) for part in parts]
    rows = torch.cat(encoded)
    if not rows.isfinite().all():
        return "The encoder's outputs are not finite: they have no spectrum."
    return reference.singular_values(rows).tolist()


def _clips(run: Path, trained: Trained | str, decode: bool) -> Iterator[str]:
    failed = "Decoder or videos cannot be used"
    lines = trained if isinstance(trained, str) else _attempt(failed, _films, run, trained, decode)
    if isinstance(trained, str) or isinstance(lines, str):
        yield _missing(f"No clips. {lines}")
        return
    data, (count, frames) = trained.config.data, lines[0].shape[:2]
    z = " z is inferred from the target frames that the prediction is compared with."
    z = {"none": "", "actions": " z is the true actions."}.get(trained.config.latent.kind, z)
    afterwards = "" if trained.model.decoder is not None else " by a decoder that was trained afterwards"
    yield _paragraph(
        f"Above: validation videos ({trained.data[1].source}). Below: the future that the best checkpoint predicts, "
        f"decoded{afterwards}; black while the {data.frames_in} input frames are shown.{z}"
    )
    pause = next((pause for most, pause in MILLISECONDS.items() if frames <= most), SHORTEST)
    width = count * (data.canvas + 1) - 1
    draw = functools.partial(figures.film, videos=lines, milliseconds=pause)
    yield _div("clips", [_picture(draw, "clips", width * max(1000 // width, 1))])


def _films(run: Path, trained: Trained, decode: bool) -> list[torch.Tensor] | str:
    """Videos and decoded futures, both (clips, T, C, S, S), or why there are none."""
    config, model, (training_data, _), videos = trained
    decoder = frozen_decoder(run, config, model, training_data) if decode else kept_decoder(run, config, model)
    if decoder is None:
        return f"The model has no decoder. `vjvcr-fast report {run} --decode` trains one for it."
    values = 2 * 3 * (config.data.frames_in + config.data.frames_out) * config.data.canvas**2
    count = min(max(VALUES // values, 1), CLIPS)
    lines = examples(model, videos, config, Latents(config, model), decoder, count)
    return lines if all(bool(line.isfinite().all()) for line in lines) else "The decoded frames are not finite."


# -- Configuration --------------------------------------------------------------------------------------------------


def _configuration(config: Config) -> Iterator[str]:
    changed = differences(config, PRESETS.get(config.preset, Config(config.preset)))
    if changed:
        yield _paragraph(f"Changed from the preset `{config.preset}`:")
        yield _table({name: f"{shown(ours)} (preset: {shown(theirs)})" for name, (ours, theirs) in changed.items()})
    else:
        yield _paragraph(f"The preset `{config.preset}` as it is.")
    yield f"<details><summary>config.json</summary><pre>{_text(config.to_json())}</pre></details>"


# -- HTML -----------------------------------------------------------------------------------------------------------


def _attempt(otherwise: str, part: Callable[..., Any], *arguments: Any) -> Any:
    """part(*arguments); or text that says what the error was, if it is one that the command line would show as a line.

    Such text is printed on stderr, too.
    """
    try:
        return part(*arguments)
    except (ConfigError, ImportError, OSError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not type(error).__module__.startswith("vjvcr_fast."):
            raise
        text = f"{otherwise}: {error}"
        print(text, file=sys.stderr)
        return text


def _page(title: str, content: Sequence[str]) -> str:
    """The icon is empty so that a browser asks for none."""
    head = f'<meta charset="utf-8">\n<meta name="viewport" content="width=device-width">\n<title>{_text(title)}</title>'
    head += f'\n<link rel="icon" href="data:,">\n<style>\n{STYLE}\n</style>'
    foot = f"<p><small>vjvcr_fast {__version__}</small></p>"
    body = "\n".join([*content, foot])
    return f'<!doctype html>\n<html lang="en">\n<head>\n{head}\n</head>\n<body>\n{body}\n</body>\n</html>\n'


def _section(title: str, *content: str) -> str:
    return "\n".join([f"<section>\n<h2>{_text(title)}</h2>", *content, "</section>"])


def _div(name: str, content: Sequence[str]) -> str:
    return "\n".join([f'<div class="{name}">', *content, "</div>"])


def _paragraph(text: str, attributes: str = "") -> str:
    """text: plain, but what stands between two backquotes becomes code."""
    coded = re.sub("`([^`]*)`", r"<code>\1</code>", _text(text))
    return f"<p{attributes}>{coded}</p>"


def _missing(why: str) -> str:
    return _paragraph(why, ' class="missing"')


def _picture(draw: Callable[[BytesIO], None], title: str, width: int | None = None) -> str:
    """What `draw` writes, as an image inside the page. width: in pixels, where the window is wide enough."""
    buffer = BytesIO()
    draw(buffer)
    content, size = base64.b64encode(buffer.getvalue()).decode(), f' width="{width}"' if width else ""
    return f'<img alt="{_text(title)}"{size} src="data:image/webp;base64,{content}">'


def _table(rows: Mapping[str, str]) -> str:
    cells = "\n".join(f"<tr><th>{_text(name)}</th><td>{_text(value)}</td></tr>" for name, value in rows.items())
    return f"<table>\n{cells}\n</table>"


def _text(value: str) -> str:
    return html.escape(value)


def _value(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else one_line(value)


def _number(value: Any) -> bool:
    return isinstance(value, float | int) and not isinstance(value, bool) and abs(value) < float("inf")
