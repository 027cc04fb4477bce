"""What `vjvcr-fast scan` shows: the videos of a data set, what would be used of them, and what not and why."""

import json
import math
import re
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

from vjvcr_fast.config import Config, resolve_device
from vjvcr_fast.data.folder import files_below
from vjvcr_fast.data.video.dali import CODECS
from vjvcr_fast.data.video.decode import resolve
from vjvcr_fast.data.video.scan import DataError, Split
from vjvcr_fast.settings import need
from vjvcr_fast.training.build import SPLITS, cache_folder, data_root, open_pool, open_split

NAMED = 5  # so many files with the same fault are named, the others counted
KINDS = 20  # so many kinds of video are listed


def show(config: Config, every_frame: bool, as_json: bool) -> int:
    """Prints the report. Returns the exit code: 1 if a file cannot be read or a split has no window, else 0."""
    found = report(config, every_frame)
    print(json.dumps(found, indent=1) if as_json else table(found))
    return int(any(split["bad"] or "problem" in split for split in found["splits"].values()))


def report(config: Config, every_frame: bool = False) -> dict[str, Any]:
    """What is in the data set, in plain values for JSON. every_frame: decode all frames, which finds damage inside.

    splits: for each its files, usable videos, frames, seconds, windows; bad: {name: reason}; short: names of videos
    without a window; notes. kinds: container, codec, width, height, fps and decoder, with the number of videos, frames
    and seconds; "decord or torchcodec": some were read by one, some by the other, which makes no difference. others:
    {suffix: number} of a folder's files that belong to no split. cache: the folder, bytes of a full cache and free
    bytes on its disk, or None if it is off.

    Raises ConfigError for videos that are not files; DataError if there are none.
    """
    data = config.data
    need(data.dataset != "moving-mnist", "data.dataset", data.dataset, "folder, clevrer or cater, which have files")
    splits: dict[str, dict[str, Any]] = {}
    kinds: dict[str, list[dict[str, Any]]] = {}
    cached, errors, looked_at = 0, list[DataError](), set[str]()
    with open_pool(config) as pool:
        for name in SPLITS:
            try:
                split, problem = open_split(config, name, pool, every_frame=every_frame), ""
            except DataError as error:
                errors.append(error)
                nothing = Split("", data_root(config), name, pool)
                split, problem = nothing if error.split is None else error.split, str(error)
            splits[name] = _split(split) | ({"problem": problem} if problem else {})
            kinds[name] = [*split.found.values()]
            looked_at |= {*split.found, *split.bad}
            cached += sum(source.frames for source in split.sources)
    if len(errors) == len(SPLITS) and all(error.split is None for error in errors):
        raise errors[0]
    return {
        "root": str(data_root(config)),
        "data": data.dataset,
        "frames_in": data.frames_in,
        "frames_out": data.frames_out,
        "stride": data.stride,
        "every_frame": every_frame,
        "splits": splits,
        "kinds": _kinds([found for of_split in kinds.values() for found in of_split], config),
        "others": _others(data_root(config), looked_at) if data.dataset == "folder" else {},
        "cache": _cache(config, cached),
    }


def table(found: dict[str, Any]) -> str:
    """The report as text for a terminal."""
    splits, length = found["splits"], found["frames_in"] + found["frames_out"]
    heads = ("files", "usable", "bad", "short", "frames", "seconds", "windows")
    counts = [[name, *(_number(_count(split[head])) for head in heads)] for name, split in splits.items()]
    kinds = [
        [k["container"], k["codec"], f"{k['width']}x{k['height']}", f"{k['fps']:g}", k["decoder"]]
        + [_number(k[head]) for head in ("videos", "frames", "seconds")]
        for k in found["kinds"][:KINDS]
    ]
    more = len(found["kinds"]) - KINDS
    lines = [
        f"{found['root']}: windows of {found['frames_in']} + {found['frames_out']} frames, stride {found['stride']}",
        "",
        *_columns([["split", *heads], *counts], 1),
        *(
            [
                "",
                *_columns([["container", "codec", "size", "fps", "decoder", "videos", "frames", "seconds"], *kinds], 5),
            ]
            if kinds
            else []
        ),
        *([f"and {more} more kinds"] if more > 0 else []),
    ]
    for name, split in splits.items():
        if "problem" in split:
            lines += ["", f"{name}: {split['problem']}"]
        if split["short"]:
            lines += ["", f"{name}, no window of {length} frames in: {_names(split['short'])}"]
        for reason, names in _grouped(split["bad"]).items():
            lines += ["", f"{name}, bad: {_names(names)}", f"  {reason}"]
        lines += ["", *split["notes"]] if split["notes"] else []
    if found["others"]:
        counts_of = ", ".join(f"{count:,} {suffix}" for suffix, count in found["others"].items())
        lines += ["", f"Files not looked at: {counts_of}"]
    cache = found["cache"]
    if cache:
        room = f"{_bytes(cache['bytes'])}, {_bytes(cache['free'])} free on its disk"
        lines += ["", f"vjvcr-fast cache would hold {room}: {cache['folder']}"]
    if not found["every_frame"]:
        lines += ["", "Damage inside of files is only found with --every-frame, which decodes everything."]
    return "\n".join(lines)


def _split(split: Split) -> dict[str, Any]:
    usable = {source.name for source in split.sources}
    facts = [split.found[name] for name in usable]
    return {
        "files": len(split.found) + len(split.bad),
        "usable": len(usable),
        "frames": sum(of["frames"] for of in facts),
        "seconds": math.fsum(map(_seconds, facts)),
        "windows": sum(len(source.starts) for source in split.sources),
        "bad": split.bad,
        "short": [name for name in split.found if name not in usable],
        "notes": [] if split.title == "folder of videos" else split.notes,  # a folder's says again what is short
    }


def _kinds(found: list[dict[str, Any]], config: Config) -> list[dict[str, Any]]:
    """One entry for each kind of video that can be read, the most frequent first."""
    on_gpu = resolve(config.data.decoder, resolve_device(config.train.device)) == "dali"
    keys = ("container", "codec", "width", "height", "fps")
    totals: dict[tuple[Any, ...], Counter[str]] = {}
    decoders: dict[tuple[Any, ...], set[str]] = {}
    for of in found:
        decoder = "dali" if on_gpu and of["codec"] in CODECS["cuda"] else of["decoder"]
        key = tuple((of | {"fps": round(of["fps"], 2)})[name] for name in keys)
        decoders.setdefault(key, set()).add(decoder)  # several: it depends on what a worker has read before
        totals.setdefault(key, Counter()).update({"videos": 1, "frames": of["frames"], "seconds": _seconds(of)})
    most = sorted(totals.items(), key=lambda item: -item[1]["videos"])
    return [
        dict(zip(keys, key, strict=True)) | {"decoder": " or ".join(sorted(decoders[key]))} | dict(total)
        for key, total in most
    ]


def _others(root: Path, looked_at: set[str]) -> dict[str, int]:
    """{suffix, or the name if there is none: number} of the files of a folder that belong to no split."""
    left = [path for path in files_below(root) if path.relative_to(root).as_posix() not in looked_at]
    return dict(Counter(path.suffix.lower() or path.name for path in left).most_common())


def _cache(config: Config, frames: int) -> dict[str, Any] | None:
    folder = cache_folder(config, SPLITS[0])
    if folder is None:
        return None
    there = next(path for path in (folder, *folder.parents) if path.exists())
    size = frames * 3 * config.data.canvas**2
    return {"folder": str(folder.parent), "bytes": size, "free": shutil.disk_usage(there).free}


def _seconds(found: dict[str, Any]) -> float:
    return found["frames"] / found["fps"] if found["fps"] else 0.0


def _grouped(bad: dict[str, str]) -> dict[str, list[str]]:
    """{reason: names}: reasons that differ in numbers only are one, and the first of them is shown."""
    groups: dict[str, tuple[str, list[str]]] = {}
    for name, reason in bad.items():
        shown = re.sub(rf"^\S.*?{re.escape(Path(name).name)}: ", "", reason)
        groups.setdefault(re.sub(r"[\d,.]+", "0", shown), (shown, []))[1].append(name)
    return dict(groups.values())


def _names(names: list[str]) -> str:
    return ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED:,} more" if len(names) > NAMED else "")


def _columns(rows: list[list[str]], left: int) -> list[str]:
    """The rows as lines. The first `left` columns are flush left, the others flush right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _count(value: Any) -> float:
    return value if isinstance(value, int | float) else len(value)


def _number(value: float) -> str:
    return f"{value:,.1f}" if isinstance(value, float) else f"{value:,}"


def _bytes(count: int) -> str:
    power = min(int(math.log10(max(count, 1))) // 3, 4)
    return f"{count / 1000**power:.3g} {('B', 'kB', 'MB', 'GB', 'TB')[power]}"
