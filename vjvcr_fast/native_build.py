"""Compiles the operators of csrc/, for setup.py and for `vjvcr-fast build`, and knows where they are then.

All operators are in one library. It uses torch's stable ABI and no Python, so one build serves CPU and CUDA builds of
torch from 2.11 on, and every Python. It needs a C++20 compiler and torch's headers, no Python headers and no ninja.

The environment: CXX (the compiler, default c++), CXXFLAGS and LDFLAGS (added to ours), MAX_JOBS (compilers at the same
time, default one a core), and VJVCR_CUDA: whether there are operators for CUDA, "auto" if there is a fitting nvcc, "0"
never, "1" always (without them the build fails).
"""

import contextlib
import hashlib
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

HERE = Path(__file__).parent
INSTALLED = "_operators.abi3.so"  # the library that setup.py builds
COMMAND = "`vjvcr-fast build` compiles them, in one or two minutes"
TORCH_TARGET = "0x020b000000000000ULL"  # 2.11, the oldest supported version
# What nvcc makes of the CUDA kernels: machine code for 8.x (sm_80) and for 9.0 alone (sm_90a, for fista_mlp), and PTX,
# which the driver compiles for newer GPUs.
ARCHITECTURES = ("sm_80", "sm_90a", "compute_80")
# Without fused multiply-adds, so that host and device round alike.
CXX_FLAGS = ["-O3", "-std=c++20", "-DNDEBUG", "-fPIC", "-fwrapv", "-Wall"]
CXX_FLAGS += ["-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
NVCC_FLAGS = ["-O3", "-std=c++20", "-DNDEBUG", "-Xcompiler=-fPIC", "-fmad=false", "-Xptxas=-v"]
GENCODE = [f"-gencode=arch=compute_{a.partition('_')[2]},code={a}" for a in ARCHITECTURES]
# libtorch.so leads the loader to libtorch_cuda.so, if the torch at run time has it. No symbol of libtorch.so itself is
# used, so the linker would leave it out.
LINK = ["-lc10", "-ltorch_cpu", "-Wl,--no-as-needed", "-ltorch"]
LINK_CUDA = ["-lcudart_static", "-ldl", "-lrt", "-lpthread"]

TRY = "import sys, torch; torch.ops.load_library(sys.argv[1]); print(torch.ops.vjvcr.architectures())"

Say = Callable[[str], object]


class BuildError(RuntimeError):
    """The operators cannot be compiled here; the message says why and what would help."""


# -- Where things are -----------------------------------------------------------------------------------------------


def sources() -> Path:
    """The folder csrc: of an installed package inside it, of a checkout beside it. Raises BuildError without it."""
    for folder in (HERE / "csrc", HERE.parent / "csrc"):
        if (folder / "library.cpp").is_file():
            return folder
    raise BuildError(f"{HERE}: no csrc, the sources of the operators, in this package or beside it: install it again")


def cache_folder() -> Path:
    """Where `vjvcr-fast build` puts the library if the package's folder cannot be written."""
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "vjvcr_fast"


def destination() -> Path:
    """The library that `vjvcr-fast build` makes here: in the package if that can be written, else in the cache.

    Its name has the sources' fingerprint, since an upgrade of the package leaves it behind. In a checkout it is the one
    that setup.py makes. Raises BuildError if there are no sources.
    """
    if not os.access(HERE, os.W_OK):
        return cache_folder() / _name()
    return HERE / (_name() if sources().parent == HERE else INSTALLED)


def libraries() -> list[Path]:
    """The libraries that are there for this version of the package, the one to take first."""
    found = []
    if any(_built(folder) for folder in (HERE, cache_folder())):
        with contextlib.suppress(BuildError):
            found = [HERE / _name(), cache_folder() / _name()]
    return [path for path in (*found, HERE / INSTALLED) if path.exists()]


def _name() -> str:
    content = hashlib.sha256(platform.machine().encode())
    for path in (Path(__file__), *sorted(path for path in sources().iterdir() if path.is_file())):
        content.update(path.name.encode() + path.read_bytes())
    return f"_operators-{content.hexdigest()[:12]}.so"


def _built(folder: Path) -> list[Path]:
    return sorted(folder.glob("_operators-*.so"))


# -- What compiles --------------------------------------------------------------------------------------------------


def compiler() -> list[str]:
    """The C++ compiler's command. Raises BuildError if there is none, or this is not Linux."""
    if sys.platform != "linux":
        raise BuildError(f"the operators are for Linux, and this is {sys.platform}: plain torch operations serve here")
    command = shlex.split(os.environ.get("CXX") or "c++")
    if shutil.which(command[0]) is None:
        hint = "install one (Debian, Ubuntu: apt install g++), or name yours in the variable CXX"
        raise BuildError(f"no C++ compiler: {command[0]} is not on PATH; {hint}")
    return command


def toolkit(say: Say) -> Path | None:
    """The folder of the CUDA toolkit, or None if there are to be no operators for CUDA; `say` is told why.

    Raises BuildError if VJVCR_CUDA has an unknown value, or is 1 and there is no fitting nvcc.
    """
    wanted = os.environ.get("VJVCR_CUDA", "auto")
    if wanted not in ("auto", "0", "1"):
        raise BuildError(f"VJVCR_CUDA={wanted!r}: choose auto, 0 or 1")
    if wanted == "0":
        return None
    nvcc = shutil.which("nvcc")
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or (nvcc and _home_of(nvcc))
    if home and (Path(home) / "bin" / "nvcc").exists():
        obstacle = _against(Path(home) / "bin" / "nvcc")
        if obstacle is None:
            return Path(home)
    else:
        obstacle = f"there is no {home}/bin/nvcc" if home else "there is no nvcc: put it on PATH or set CUDA_HOME"
    if wanted == "1":
        raise BuildError(f"VJVCR_CUDA=1, but {obstacle}")
    say(f"no operators for CUDA: {obstacle}")
    return None


def _home_of(nvcc: str) -> str:
    """The toolkit's folder as nvcc itself tells it. The nvcc on PATH may be a script, or a link into the toolkit."""
    shown = _output([nvcc, "--dryrun", "-x", "cu", os.devnull])
    top = re.search(r"^#\$ TOP=(.*)$", shown, re.MULTILINE)
    return os.path.normpath(top[1].strip()) if top else str(Path(nvcc).resolve().parents[1])


def _against(nvcc: Path) -> str | None:
    """Why this nvcc does not fit torch, or None. A CPU build of torch has no CUDA version to compare."""
    import torch

    release = re.search(r"release (\d+)\.(\d+)", _output([str(nvcc), "--version"]))
    if release is None:
        return f"{nvcc} does not say its version"
    if torch.version.cuda is None or torch.version.cuda.split(".")[0] == release[1]:
        return None
    return (
        f"{nvcc} is of CUDA {release[1]}.{release[2]}, torch {torch.__version__} of CUDA {torch.version.cuda}: set "
        f"CUDA_HOME to a toolkit of CUDA {torch.version.cuda.split('.')[0]}"
    )


def _output(command: Sequence[str]) -> str:
    try:
        return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False).stdout
    except OSError as error:
        return str(error)


# -- The build ------------------------------------------------------------------------------------------------------


def build(target: Path, say: Say, for_setup: bool = False) -> None:
    """Compiles the operators into the file `target`, which is written at once when all is done.

    say: is told the progress, a line at a time. for_setup: it is also told what the compilers print, and the library is
    not tried with this torch.

    Raises BuildError: there is no compiler or no torch with the headers, something does not compile, or this torch does
    not load the library. If only CUDA's part fails, `say` is told, and the library has the operators for the CPU.
    """
    from vjvcr_fast.data.files import write_atomic  # here, since native.py imports this module

    compiler()  # fails now, not for CUDA first
    home = toolkit(say)
    with tempfile.TemporaryDirectory(prefix="vjvcr-fast-build-") as work:
        try:
            library = _compile(Path(work), home, say, for_setup)
        except BuildError as error:
            if home is None or os.environ.get("VJVCR_CUDA") == "1":
                raise
            say(f"no operators for CUDA: {error}; going on without")
            library = _compile(Path(work), None, say, for_setup)
        if not for_setup:
            tried = subprocess.run([sys.executable, "-c", TRY, library], capture_output=True, text=True, check=False)
            if tried.returncode:
                raise BuildError(f"compiled, but torch does not load it: {_error(tried.stderr.splitlines()[::-1])}")
        write_atomic(target, library.read_bytes())
    for old in _built(HERE) if target.parent.resolve() == HERE.resolve() else ():
        if old.name != target.name:
            old.unlink()


def _compile(work: Path, home: Path | None, say: Say, verbose: bool) -> Path:
    """The library in the folder `work`, with operators for CUDA if there is a toolkit."""
    cxx, torch, csrc = compiler(), _torch(), sources()
    added = {name: shlex.split(os.environ.get(name, "")) for name in ("CXXFLAGS", "LDFLAGS")}
    macros = [f"-DTORCH_TARGET_VERSION={TORCH_TARGET}"]
    macros += [f'-DVJVCR_ARCHITECTURES="{" ".join(ARCHITECTURES if home else ())}"', *(["-DUSE_CUDA"] if home else [])]
    macros += [f"-I{torch / 'include'}", f"-I{torch / 'include/torch/csrc/api/include'}"]
    compile_cpp, commands = [*cxx, *CXX_FLAGS, *added["CXXFLAGS"]], dict[str, list[str]]()
    link = [f"-L{torch / 'lib'}", *LINK]
    if home is not None:  # first, since they take longest, or fail
        for source in sorted(csrc.glob("*.cu")):
            commands[source.name] = [str(home / "bin/nvcc"), *NVCC_FLAGS, *GENCODE, *macros, "-c", str(source)]
        folders = [home / name for name in ("lib64", "lib", f"targets/{platform.machine()}-linux/lib")]
        link += [f"-L{folder}" for folder in folders if folder.is_dir()] + LINK_CUDA
    for source in sorted(csrc.glob("*.cpp")):
        if source.name != "native.cpp":  # which is another library
            commands[source.name] = [*compile_cpp, *macros, "-c", str(source)]
    tools = f"{cxx[0]} and {home / 'bin/nvcc'}" if home else cxx[0]
    say(f"compiling {len(commands)} files with {tools}, {_jobs()} at a time ...")
    objects = {name: str(work / f"{name}.o") for name in commands}
    _run({name: [*command, "-o", objects[name]] for name, command in commands.items()}, say, verbose)
    library = work / INSTALLED
    linked = [*cxx, "-shared", *objects.values(), "-o", str(library), *added["LDFLAGS"], *link]
    _run({library.name: linked}, say, verbose)
    return library


def _torch() -> Path:
    """The folder of torch, with headers and libraries."""
    import torch

    folder = Path(torch.__file__).parent
    if not (folder / "include/torch/csrc/stable/library.h").exists():
        raise BuildError(f"torch {torch.__version__} has no headers of the stable ABI: 2.11 or newer is needed")
    return folder


def _run(commands: Mapping[str, Sequence[str]], say: Say, verbose: bool) -> None:
    """Runs the commands, several at a time, in this order. The first one that fails ends the others.

    verbose: `say` is told what each one prints, else only what one prints that fails. Raises BuildError with the first
    error.
    """
    waiting, running, done = [*commands], dict[str, tuple[subprocess.Popen[str], float]](), 0
    at_once = _jobs()
    with contextlib.ExitStack() as stack:
        logs = {name: stack.enter_context(tempfile.TemporaryFile("w+")) for name in commands}
        try:
            while waiting or running:
                while waiting and len(running) < at_once:
                    name = waiting.pop(0)
                    streams = {"stdin": subprocess.DEVNULL, "stdout": logs[name], "stderr": subprocess.STDOUT}
                    running[name] = subprocess.Popen(commands[name], **streams), time.monotonic()  # type: ignore[call-overload]
                time.sleep(0.02)
                for name in [name for name, (process, _) in running.items() if process.poll() is not None]:
                    process, started = running.pop(name)
                    logs[name].seek(0)
                    printed = logs[name].read().splitlines()
                    if printed and (verbose or process.returncode):
                        say("\n".join(printed if verbose else printed[:30]))
                    if process.returncode:
                        raise BuildError(f"{name}: {commands[name][0]} fails: {_error(printed)}")
                    done += 1
                    say(f"[{done}/{len(commands)}] {name}, {time.monotonic() - started:.0f} s")
        finally:
            for process, _ in running.values():
                process.kill()
                process.wait()


def _jobs() -> int:
    from vjvcr_fast.data.files import cores

    given = os.environ.get("MAX_JOBS") or str(cores())
    if not given.isdecimal() or int(given) < 1:
        raise BuildError(f"MAX_JOBS={given!r}: a whole number from 1 on is needed")
    return int(given)


def _error(lines: Sequence[str]) -> str:
    """The first line that tells of an error, else the last one."""
    lines = [line.strip() for line in lines if line.strip()] or ["it prints nothing"]
    wrong = [line for line in lines if re.search(r"\berror\b|cannot find|Error:", line, re.IGNORECASE)]
    return (wrong or lines[-1:])[0]
