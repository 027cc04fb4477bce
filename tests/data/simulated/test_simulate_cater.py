"""Simulated videos in CATER's format: what moves, what is written, and that a stopped run is completed."""

import contextlib
import itertools
import json
import math
import multiprocessing
import os
import signal
import time
from pathlib import Path
from random import Random

import pytest
import torch
from videos import drawing, needs, quick_workers

from vjvcr_fast.data.cater import CLASSES, load_split, read_list, read_scene, sampled
from vjvcr_fast.data.simulated import make
from vjvcr_fast.data.simulated.cater import ENCODING, FORMAT, draw_scene, scene_path, simulate_cater, video_path
from vjvcr_fast.data.simulated.scenes import film
from vjvcr_fast.data.simulated.scenes_cater import ACTIONS, HEIGHT, NAMES, Body, Movement, Stage, State, _choose, poses
from vjvcr_fast.data.video.decode import open_video

pytest.importorskip("av", reason="the extra simulate is not installed")
SMALL = {"size": (64, 48), "frames": 24}


@pytest.fixture(scope="module")
def drawable() -> None:
    pytest.importorskip("mujoco", reason="the extra simulate is not installed")
    if drawing()[1]:
        pytest.skip(drawing()[1])


@pytest.fixture(scope="module")
def made(drawable: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four videos, made by one spawned process without interruption."""
    out = tmp_path_factory.mktemp("cater")
    simulate_cater(out, 4, seed=3, processes=1, **SMALL)
    return out


def content(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}


# -- Scenes, without a picture --------------------------------------------------------------------------------------

SCENES = [draw_scene(0, number, 301) for number in range(40)]


def test_scenes_are_functions_of_seed_and_number() -> None:
    assert draw_scene(0, 7, 301) == SCENES[7]
    assert draw_scene(1, 7, 301) != SCENES[7]


def test_every_scene_has_the_snitch_and_a_cone() -> None:
    for bodies, _ in SCENES:
        shapes = [body.shape for body in bodies]
        assert shapes.count("spl") == 1
        assert "cone" in shapes
        assert len({body.instance for body in bodies}) == len(bodies)


def test_at_most_two_act_at_a_time_and_each_does_what_it_can() -> None:
    together = []
    for bodies, movements in SCENES:
        shapes = {body.instance: body.shape for body in bodies}
        spans = [(m.start, m.end) for of_one in movements.values() for m in of_one]
        assert all(0 <= start < end <= 301 for start, end in spans)
        together.append(max(sum(start <= t < end for start, end in spans) for t in range(301)))
        for name, of_one in movements.items():
            assert all(m.action in ACTIONS[shapes[name]] for m in of_one)
            assert all(a.end <= b.start for a, b in itertools.pairwise(of_one))
    assert max(together) == 2


def test_what_acts_moves_and_nothing_else_does() -> None:
    for bodies, movements in SCENES[:12]:
        frames = poses(bodies, movements, 301)
        moving: dict[str, list[range]] = {body.instance: [] for body in bodies}
        for name, of_one in movements.items():
            for m in of_one:
                moving[name].append(range(m.start, m.end))
                if m.carried:
                    moving[m.carried].append(range(m.start, m.end))
                path = [frames[min(t, 300)][name] for t in range(m.start, m.end + 1)]
                assert path[0] != path[len(path) // 2]
                top = max(pose.place[2] for pose in path) - path[0].place[2]
                assert (top > 0.9 * HEIGHT) == (m.action in ("_pick_place", "_contain"))
                if m.action == "_slide":
                    assert top < 1e-9
                if m.end <= 300:
                    assert path[-1].place[:2] == pytest.approx(m.goal)
        for t in range(300):
            for name, spans in moving.items():
                if not any(t in span for span in spans):
                    assert frames[t][name] == frames[t + 1][name], (name, t)


def test_objects_at_rest_do_not_overlap_and_contained_ones_are_inside() -> None:
    contained = 0
    for bodies, movements in SCENES:
        of = {body.instance: body for body in bodies}
        frames = poses(bodies, movements, 301)
        ends = sorted({m.end for of_one in movements.values() for m in of_one if m.end <= 300})
        for t in ends:
            at_rest = [n for n in of if not any(m.start <= t < m.end for m in movements[n])]
            carried = {m.carried for of_one in movements.values() for m in of_one if m.start <= t < m.end}
            for one, other in itertools.combinations([n for n in at_rest if n not in carried], 2):
                gap = math.dist(frames[t][one].place[:2], frames[t][other].place[:2])
                if gap < of[one].radius + of[other].radius:
                    cone, inner = sorted((one, other), key=lambda n: of[n].shape != "cone")
                    contained += 1
                    assert gap < 1e-9, (one, other, t)
                    assert of[cone].shape == "cone"
                    # As wide as the object, the cone is at least as high as it.
                    assert of[cone].half - of[inner].half >= of[inner].radius
    assert contained > 20


@pytest.mark.parametrize("seed", range(8))
def test_what_a_cone_uncovers_does_not_act_in_the_same_stretch(seed: int) -> None:
    cone = Body("Cone_0", "cone", "large", "red", "rubber", (0.0, 0.0), 0.0)
    state = State([cone, Body("Spl_0", "spl", "small", "gold", "metal", (0.0, 0.0), 0.0)])
    state.inside = {"Spl_0": "Cone_0"}
    state.begin()
    movement = _choose(state, "Cone_0", 0, 20, Random(seed))
    assert movement is not None
    assert "Spl_0" in state.moving
    if movement.action == "_slide":
        assert movement.carried == "Spl_0"
        assert state.places["Spl_0"] == movement.goal
    else:
        assert movement.action == "_pick_place"
        assert state.inside == {}
        assert state.places["Spl_0"] == (0.0, 0.0)


def test_what_is_lifted_at_the_same_time_does_not_meet() -> None:
    lifted = ("_pick_place", "_contain")
    together = 0
    for bodies, movements in SCENES:
        of = {body.instance: body for body in bodies}
        frames = poses(bodies, movements, 301)
        flights = [(name, m) for name, of_one in movements.items() for m in of_one if m.action in lifted]
        for (one, a), (other, b) in itertools.combinations(flights, 2):
            for t in range(max(a.start, b.start), min(a.end, b.end)):
                together += 1
                gap = math.dist(frames[t][one].place[:2], frames[t][other].place[:2])
                assert gap >= of[one].radius + of[other].radius, (one, other, t)
    assert together > 100


def test_every_class_is_neither_rare_nor_common() -> None:
    counts = dict.fromkeys(CLASSES, 0)
    for number in range(200):
        bodies, movements = draw_scene(0, number, 301)
        shapes = {body.instance: body.shape for body in bodies}
        found = {f"{shapes[n]} {m.action.lstrip('_')}" for n, of_one in movements.items() for m in of_one}
        for name in found:
            counts[name] += 1
    assert all(30 <= count <= 120 for count in counts.values()), counts  # 15 to 60%


# -- Files ----------------------------------------------------------------------------------------------------------


def test_files_are_cater_s(made: Path) -> None:
    assert "not CATER" in json.loads((made / "simulated.json").read_text())["note"]
    for number in range(4):
        scene = json.loads(scene_path(made, number).read_text())
        assert scene["image_filename"] == video_path(made, number).name == f"CLEVR_new_{number:06d}.avi"
        for item in scene["objects"]:
            assert len(item["locations"]) == 24
            assert item["instance"].rpartition("_")[0] == ("Spl" if item["shape"] == "spl" else NAMES[item["shape"]])
            assert {"instance", "shape", "size", "color", "material", "3d_coords", "rotation"} <= item.keys()
        assert scene["movements"].keys() == {item["instance"] for item in scene["objects"]}


def test_lists_and_scenes_agree_and_each_video_is_in_one_list(made: Path) -> None:
    for split, numbers in (("train", [0, 1, 3]), ("validation", [2])):
        loaded = load_split(made, split, 2, 3)
        assert [int(source.name[-10:-4]) for source in loaded.sources] == numbers
        assert loaded.notes == []
        assert loaded.source.startswith("simulated scenes in CATER's format")
    lists = made / "lists" / "actions_present"
    assert len(read_list(lists / "train.txt")) + len(read_list(lists / "val.txt")) == 4


def test_every_decoder_reads_the_videos(made: Path) -> None:
    frames = {}
    for backend in ("decord", "torchcodec", "dali"):
        needs(backend)
        video = open_video(video_path(made, 0), backend)
        assert (video.frame_count, video.fps, video.height, video.width) == (24, 24.0, 48, 64)
        frames[backend] = video.frames(range(24))
    assert frames["decord"].equal(frames["torchcodec"])
    assert (frames["decord"].float() - frames["dali"].float()).abs().mean() < 4  # DALI interpolates colour
    assert frames["decord"].float().std() > 10  # there is something to see


def test_every_frame_is_a_keyframe(made: Path) -> None:
    import av

    with av.open(str(video_path(made, 1))) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("mjpeg", "yuvj420p")
        keys = [packet.is_keyframe for packet in container.demux(stream) if packet.size]
    assert keys == [True] * 24


def test_rotations_are_seen(drawable: None) -> None:
    """In a process of its own: mujoco may be imported here already, and then takes no other MUJOCO_GL."""
    shapes = [shape for shape, actions in ACTIONS.items() if "_rotate" in actions]
    assert list(make.in_parallel(watch_rotation, shapes, 1, {"MUJOCO_GL": drawing()[0]})) == shapes


def watch_rotation(shape: str) -> None:
    """Every step changes pixels, and for all but a cylinder, which ends as it began, so does the whole."""
    body = Body("it", shape, "medium", "red", "rubber", (0.0, 0.0), 0.3)
    stage = Stage([body], (96, 72))
    pictures = []
    with film(stage, (96, 72)) as draw:
        for frame in poses([body], {"it": [Movement("_rotate", None, 0, 8, (0.0, 0.0))]}, 9):
            stage.show(frame)
            pictures.append(torch.from_numpy(draw().copy()).float())
    steps = torch.stack(pictures).diff(dim=0).abs().amax(dim=(1, 2, 3))
    assert (steps > 20).all(), steps
    assert shape == "cylinder" or (pictures[-1] - pictures[0]).abs().max() > 20


def test_pictures_change_where_something_acts(made: Path) -> None:
    number = next(n for n in range(4) if any(json.loads(scene_path(made, n).read_text())["movements"].values()))
    movements = json.loads(scene_path(made, number).read_text())["movements"]
    frames = open_video(video_path(made, number)).frames(range(24)).float()
    busy = torch.zeros(24, dtype=torch.bool)
    for of_one in movements.values():
        for _, _, start, end in of_one:
            busy[start + 1 : end + 1] = True
    steps = frames.diff(dim=0).abs().mean(dim=(1, 2, 3))
    assert steps[busy[1:]].mean() > 5 * steps[~busy[1:]].mean().clamp_min(0.01)


def test_processes_and_order_change_nothing(made: Path, tmp_path: Path) -> None:
    with quick_workers():
        simulate_cater(tmp_path, 2, seed=3, processes=1, **SMALL)
        simulate_cater(tmp_path, 4, seed=3, processes=2, **SMALL)
    assert content(tmp_path) == content(made)


def simulation(out: Path, workers: str) -> None:
    """A program in a process group of its own. workers: how it starts its own processes."""
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell has what runs behind it ignore Ctrl-C
    multiprocessing.set_forkserver_preload(["vjvcr_fast.data.simulated.cater"])
    with quick_workers(workers):
        simulate_cater(out, 4, seed=3, processes=1, **SMALL)


# A forked worker also holds its parent's end of the pipes, so that it would not notice its parent's end.
@pytest.mark.parametrize(
    ("how", "workers"), [pytest.param(signal.SIGKILL, "forkserver", marks=pytest.mark.slow), (signal.SIGINT, "fork")]
)
def test_a_stopped_run_is_completed(made: Path, tmp_path: Path, how: signal.Signals, workers: str) -> None:
    out = tmp_path / "out"
    with quick_workers():
        process = multiprocessing.get_context("forkserver").Process(target=simulation, args=(out, workers))
        process.start()
        deadline = time.monotonic() + 60
        while not scene_path(out, 0).exists() and time.monotonic() < deadline:
            time.sleep(0.005)
        assert process.pid is not None
        os.kill(process.pid, how)
        process.join(60)
        if how == signal.SIGINT:
            assert read_list(out / "lists" / "actions_present" / "train.txt")
        with contextlib.suppress(ProcessLookupError):  # a worker finishes its video and ends by itself
            while time.monotonic() < deadline:
                os.killpg(process.pid, 0)
                time.sleep(0.02)
        simulate_cater(out, 4, seed=3, processes=1, **SMALL)
    assert content(out) == content(made)


def test_a_stride_draws_what_a_reader_with_that_stride_takes(made: Path, tmp_path: Path) -> None:
    """The same pictures and labels, but from a first frame that is the video's own."""
    with quick_workers():
        simulate_cater(tmp_path, 4, seed=3, processes=1, stride=3, **SMALL)
    for number in range(4):
        drawn = make.Settings(3, (64, 48), 24, True, 3).drawn("cater", number)
        video, whole = (open_video(video_path(out, number)) for out in (tmp_path, made))
        assert (video.frame_count, video.fps) == (8, 8.0)
        assert video.frames(range(8)).equal(whole.frames(drawn))
        active = read_scene(scene_path(made, number), 24)[:, drawn.start :]
        assert read_scene(scene_path(tmp_path, number), 8).equal(sampled(active, 3))
    loaded = load_split(tmp_path, "train", 3, 5, stride=1)
    assert (len(loaded.sources), loaded.notes) == (3, [])


def test_every_phase_of_a_stride_is_drawn() -> None:
    settings = make.Settings(0, (64, 48), 301, True, 15)
    drawn = [settings.drawn("cater", number) for number in range(200)]
    assert {frames.start for frames in drawn} == set(range(15))
    assert {len(frames) for frames in drawn} == {20}
    assert max(frames[-1] for frames in drawn) < 301
    assert settings._replace(stride=1).drawn("cater", 7) == range(301)


def test_other_settings_are_refused(made: Path) -> None:
    with pytest.raises(ValueError, match="seed 3, not 4"):
        simulate_cater(made, 4, seed=4, **SMALL)
    with pytest.raises(ValueError, match="stride 1, not 3"):
        simulate_cater(made, 4, seed=3, stride=3, **SMALL)


def test_videos_of_earlier_versions_have_no_stride(made: Path, tmp_path: Path) -> None:
    about = json.loads((made / make.SIMULATED).read_text())
    del about["stride"]
    (tmp_path / make.SIMULATED).write_text(json.dumps(about))
    make.prepare(FORMAT, tmp_path, make.Settings(3, (64, 48), 24, True), [], lambda _: True)


def test_other_data_is_refused(drawable: None, tmp_path: Path) -> None:
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "CLEVR_new_000000.avi").touch()
    with pytest.raises(ValueError, match=r"holds CLEVR_new_000000\.avi but no simulated\.json"):
        simulate_cater(tmp_path, 2, **SMALL)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"videos": 0}, "videos"),
        ({"size": (63, 48)}, "size"),
        ({"processes": -1}, "processes"),
        ({"frames": 7}, "frames"),
        ({"stride": 0}, "stride"),
        ({"stride": 25}, "stride must be between 1 and the 24 frames of a scene, got 25"),
    ],
)
def test_wrong_arguments(tmp_path: Path, options: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        simulate_cater(tmp_path, **({"videos": 2} | SMALL | options))


def test_a_file_appears_when_it_is_whole(tmp_path: Path) -> None:
    def pictures():
        yield torch.zeros(48, 64, 3, dtype=torch.uint8).numpy()
        raise OSError("No space left on device")

    with pytest.raises(OSError, match="No space"):
        make.write_video(tmp_path / "a.avi", pictures(), (64, 48), ENCODING)
    assert os.listdir(tmp_path) == []
