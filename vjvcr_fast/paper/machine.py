"""Where numbers were made: device, processor, commit and versions."""

import contextlib
import functools
import platform
import re
import subprocess
from pathlib import Path

import torch

import vjvcr_fast
from vjvcr_fast import __version__
from vjvcr_fast.config import Config, resolve_device
from vjvcr_fast.data.files import cores


def machine(config: Config) -> dict[str, str]:
    """The device and processor that config's runs use, and the versions of this package, torch and Python."""
    device = resolve_device(config.train.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{cores()} CPU cores"
    return {
        "device": device.type,
        "name": f"{name}, {processor()}",
        "commit": checkout(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "vjvcr_fast": __version__,
    }


def processor() -> str:
    """The CPU's name, as Linux gives it; elsewhere its architecture."""
    with contextlib.suppress(OSError):
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        if found:
            return found[1]
    return platform.machine()


@functools.cache
def checkout() -> str:
    """The commit of the git checkout that this package runs from, with "-dirty" if tracked files were changed.

    Outside a checkout: "of version X".
    """
    root = package_parent()
    git = ["git", "--no-optional-locks", f"--git-dir={root / '.git'}", f"--work-tree={root}"]
    describe = [*git, "describe", "--always", "--dirty", "--abbrev=10", "--exclude=*"]
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        return subprocess.run(describe, capture_output=True, text=True, check=True).stdout.strip()
    return f"of version {__version__}"


def package_parent() -> Path:
    """The folder that this package lies in: the root of a checkout, if it runs from one."""
    return Path(vjvcr_fast.__file__).parents[1]
