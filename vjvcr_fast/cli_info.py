"""What `vjvcr-fast info` and `vjvcr-fast presets` show.

info: versions, devices, extras, data, and what would be chosen on this machine. presets: their values, side by side.
"""

import importlib.util
import itertools
import os
import platform
import textwrap
from collections.abc import Iterable, Iterator
from operator import attrgetter

import torch

from vjvcr_fast import __version__, native
from vjvcr_fast.config import PRESETS, default_preset, fields, preset, shown
from vjvcr_fast.data.digits import DigitsError, load_digits
from vjvcr_fast.data.video import decode
from vjvcr_fast.losses import backends

# The modules that each extra installs.
EXTRAS = {
    "train": ("matplotlib", "mlxtend", "tensorboard", "tqdm", "yaml"),
    "wandb": ("wandb",),
    "video": ("av", "decord", "pebble", "safetensors"),
    "hub": ("huggingface_hub", "safetensors"),
    "simulate": ("av", "mujoco", "pebble"),
    "torchcodec": ("torchcodec",),
    "dali": ("nvidia.dali",),
}


def report(root: str) -> Iterator[tuple[str, str]]:
    """(name, text) of each line. root: the folder of the digits, as `data.root`."""
    yield "vjvcr_fast", __version__
    yield "torch", f"{torch.__version__}, Python {platform.python_version()}, {torch.get_num_threads()} threads"
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    yield "CUDA", ", ".join(gpus) or "no device"
    for device, chosen in backends.explain().items():
        yield f"loss, {device}", chosen
    yield "operators", native.explain()
    if native.MISSING is None and torch.version.cuda:
        yield "fista_mlp on", native.explain_plan()
    yield "presets", f"{', '.join(PRESETS)}; default here: {default_preset()}"
    for backend, about in decode.explain().items():
        yield f"video, {backend}", about
    for extra, modules in EXTRAS.items():
        missing = [module for module in modules if not _is_installed(module)]
        lacking = f"lacks {', '.join(missing)}: pip install 'vjvcr_fast[{extra}]'"
        yield f"extra {extra}", lacking if missing else "installed"
    yield "VJVCR_DATA", os.environ.get("VJVCR_DATA") or "not set"
    try:
        yield "digits", load_digits(root).source
    except (DigitsError, ImportError) as error:
        yield "digits", f"none: {error}"


def presets(names: Iterable[str]) -> str:
    """A table with a column for each of these presets and a row for every field that is not the same in all; of one
    preset alone, for every field.

    Raises ConfigError for a name that is not a preset's."""
    chosen = {name: preset(name) for name in names}
    heads = [textwrap.wrap(name, 12) for name in chosen]
    lines = [["", *row] for row in itertools.zip_longest(*heads, fillvalue="")]
    for name in fields():
        values = [shown(attrgetter(name)(config)) for config in chosen.values()]
        if len(set(values)) > 1 or len(chosen) == 1:
            lines.append([name, *values])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the package around it is missing
        return False
