"""Scenes of simple objects that slide, collide and are filmed: CLEVRER's world in MuJoCo's physics and rendering.

What CLEVRER's annotations and videos reveal is taken from them:
- spheres, cubes and cylinders, 0.4 wide and of equal mass, on a plane z = 0;
- a camera 5 units from the origin, 30 degrees above the plane; +y is to its right; its focal length is 525 pixels for a
  picture 480 pixels wide;
- a frame every 0.028 s of the objects' own time. At 25 frames a second, a video therefore plays at 0.7 of its speed,
  and a velocity is 1 / 0.028 = 35.7 times the step from one frame to the next, not 25 times.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from itertools import combinations, product
from random import Random
from typing import Any, NamedTuple

from vjvcr_fast.data.files import load

SHAPES = ("cube", "sphere", "cylinder")
MATERIALS = ("rubber", "metal")
# Red, green, blue in 0..255, before lighting.
COLORS = {
    "gray": (87, 87, 87),
    "red": (173, 35, 35),
    "blue": (42, 75, 215),
    "green": (29, 105, 20),
    "brown": (129, 74, 25),
    "cyan": (41, 208, 208),
    "purple": (129, 38, 192),
    "yellow": (255, 238, 51),
}

HALF = 0.2  # half an edge, a radius, half a height, in scene units
FRAME_SECONDS = 0.028
SUBSTEPS = 28  # physics steps in a frame, a millisecond each; contacts last a few
DISTANCE, ELEVATION, FOCAL = 5.0, math.radians(30), 525 / 480  # of the camera; FOCAL in widths of the picture

# A free object in CLEVRER decelerates by DRAG[0] v + DRAG[1] v^2 units per second squared. Cubes and cylinders
# decelerate by 0.28 more (friction 0.0285); spheres neither roll nor rub there. SPIN, a length, slows rotation.
DRAG = (0.03, 0.044)
FRICTION, SPIN = 0.0315, 0.02  # a little above 0.0285, because MuJoCo's contacts are soft
BOUNCE = (-160_000.0, -220.0)  # stiffness and damping of contacts between objects: restitution 0.3 to 0.6
APART = 5  # after so many frames without contact, the next contact is a new collision

SPEED = (2.7, 3.0)  # at frame 0, of an object that enters later
OBJECTS = (3, 6)


class Thing(NamedTuple):
    """An object at frame 0: what it is, the (x, y) of its centre, its yaw in radians, its velocity in units/s."""

    shape: str
    color: str
    material: str
    position: tuple[float, float]
    yaw: float = 0.0
    velocity: tuple[float, float] = (0.0, 0.0)


# -- The camera -----------------------------------------------------------------------------------------------------


def to_camera(point: Sequence[float]) -> tuple[float, float, float]:
    """A point (x, y, z) of the scene as the camera sees it: (right, up, depth), in units. Behind it depth is < 0."""
    x, y, z = point
    cos, sin = math.cos(ELEVATION), math.sin(ELEVATION)
    return y, z * cos - x * sin, DISTANCE - x * cos - z * sin


def in_view(shape: str, location: Sequence[float], rotation: Sequence[float], aspect: float = 1.5) -> bool:
    """Whether any part of an object is inside the picture, even if hidden: CLEVRER's `inside_camera_view`.

    It is judged by the box around the object's outline. location: its centre (x, y, z). rotation: a 3x3 matrix as nine
    numbers, row by row. aspect: width / height of the picture.
    """
    if shape == "sphere":
        right, up, depth = to_camera(location)
        if depth < HALF:
            return False
        spans = [_sphere_span(right, depth), _sphere_span(up, depth)]
    else:
        points = [
            [location[i] + HALF * sum(rotation[3 * i + j] * p[j] for j in range(3)) for i in range(3)]
            for p in OUTLINES[shape]
        ]
        seen = [(right / depth, up / depth) for right, up, depth in map(to_camera, points) if depth > 0.01]
        if not seen:
            return False
        spans = [(min(line), max(line)) for line in zip(*seen, strict=True)]
    edge = 0.5 / FOCAL
    return all(low < limit and high > -limit for (low, high), limit in zip(spans, (edge, edge / aspect), strict=True))


def _sphere_span(offset: float, depth: float) -> tuple[float, float]:
    """Where a sphere's outline begins and ends along one axis of the picture, as offset / depth."""
    angle, half = math.atan2(offset, depth), math.asin(HALF / math.hypot(offset, depth))
    return math.tan(angle - half), math.tan(angle + half)


CIRCLE = [(math.cos(k * math.tau / 24), math.sin(k * math.tau / 24)) for k in range(24)]
# Points of the surface, in units of HALF. The box around them in the picture is that of the whole shape.
OUTLINES = {
    "cube": [(x, y, z) for x in (-1.0, 1.0) for y in (-1.0, 1.0) for z in (-1.0, 1.0)],
    "cylinder": [(x, y, z) for x, y in CIRCLE for z in (-1.0, 1.0)],
}


# -- A random scene -------------------------------------------------------------------------------------------------


def sample_clevrer(random: Random, *, aspect: float = 1.5, seconds: float = 128 * FRAME_SECONDS) -> list[Thing]:
    """Draws 3 to 6 different objects that do not overlap: at least one rests in view, at least one enters later.

    The first to enter comes into view within a fifth of `seconds`, the others within three fifths. aspect: width /
    height of the picture.
    """
    count = random.randint(*OBJECTS)
    entering = random.randint(max(1, count - 3), min(3, count - 1))
    kinds = random.sample(list(product(SHAPES, COLORS, MATERIALS)), count)
    things: list[Thing] = []
    while len(things) < count - entering:
        position = random.uniform(-2.2, 1.2), random.uniform(-1.7, 1.7)
        thing = Thing(*kinds[len(things)], position, random.uniform(0, math.pi / 2))
        if _stands_whole(thing, aspect) and _is_free(thing, things, 0.9):
            things.append(thing)
    resting = list(things)
    while len(things) < count:
        delay = random.uniform(0, (0.2 if len(things) == len(resting) else 0.6) * seconds)
        aim = random.choice(resting).position if random.random() < 0.75 else (-0.4, 0.0)
        aim = aim[0] + random.uniform(-0.25, 0.25), aim[1] + random.uniform(-0.25, 0.25)
        entrant = _entrant(kinds[len(things)], aim, delay, random, aspect)
        if entrant and _is_free(entrant, things, 0.7):
            things.append(entrant)
    random.shuffle(things)
    # In CLEVRER only cubes start turned.
    return [thing if thing.shape == "cube" else thing._replace(yaw=0.0) for thing in things]


def _entrant(
    kind: tuple[str, str, str], aim: tuple[float, float], delay: float, random: Random, aspect: float
) -> Thing | None:
    """An object that moves to `aim` and comes into view after about `delay` seconds; None if it would start too far."""
    angle, speed, yaw = random.uniform(0, math.tau), random.uniform(*SPEED), random.uniform(0, math.pi / 2)
    back = math.cos(angle), math.sin(angle)

    def at(distance: float) -> Thing:
        position = aim[0] + distance * back[0], aim[1] + distance * back[1]
        return Thing(*kind, position, yaw, (-speed * back[0], -speed * back[1]))

    # An object from farther than 4.5 behind the scene would arrive slowly and late.
    outside = next((d / 20 for d in range(20, 90) if not _is_seen(at(d / 20), aspect)), None)
    return at(outside + 0.9 * speed * delay) if outside else None


def _is_seen(thing: Thing, aspect: float) -> bool:
    cos, sin = math.cos(thing.yaw), math.sin(thing.yaw)
    return in_view(thing.shape, (*thing.position, HALF), (cos, -sin, 0, sin, cos, 0, 0, 0, 1), aspect)


def _stands_whole(thing: Thing, aspect: float) -> bool:
    """Whether the object is inside the picture, with a margin of about its own radius."""
    right, up, depth = to_camera((*thing.position, HALF))
    room = 0.5 * depth / FOCAL
    return abs(right) < room - 2 * HALF and abs(up) < room / aspect - 2 * HALF


def _is_free(thing: Thing, others: Sequence[Thing], distance: float) -> bool:
    return all(math.dist(thing.position, other.position) > distance for other in others)


# -- Physics --------------------------------------------------------------------------------------------------------


class World:
    """Objects that MuJoCo moves frame by frame, with their annotation in CLEVRER's format.

    collisions: so far, as in an annotation. model, data: MuJoCo's. Raises ImportError if mujoco is missing.
    """

    def __init__(self, things: Sequence[Thing], *, size: tuple[int, int] = (480, 320)) -> None:
        self._mujoco = load("mujoco", "simulate")
        self.things, self.frame = list(things), 0
        self.collisions: list[dict[str, Any]] = []
        self._aspect = size[0] / size[1]
        self.model = self._mujoco.MjModel.from_xml_string(scene_xml(things, size))
        self.data = self._mujoco.MjData(self.model)
        for position, velocity, thing in zip(
            self.data.qpos.reshape(-1, 7), self.data.qvel.reshape(-1, 6), things, strict=True
        ):
            position[:] = *thing.position, HALF, math.cos(thing.yaw / 2), 0, 0, math.sin(thing.yaw / 2)
            velocity[:2] = thing.velocity
        self._mujoco.mj_forward(self.model, self.data)
        self._last_touch: dict[tuple[int, int], int] = {}

    def advance(self) -> None:
        """Moves to the next frame. As in CLEVRER, a collision belongs to the last frame before the contact."""
        speeds, forces = self.data.qvel.reshape(-1, 6)[:, :3], self.data.qfrc_applied.reshape(-1, 6)[:, :3]
        for _ in range(SUBSTEPS):
            size = (speeds * speeds).sum(axis=1, keepdims=True) ** 0.5
            forces[:] = -(DRAG[0] + DRAG[1] * size) * speeds
            self._mujoco.mj_step(self.model, self.data)
            self._note_collisions()
        self._mujoco.mj_forward(self.model, self.data)
        self.frame += 1

    def _note_collisions(self) -> None:
        contact = self.data.contact
        geoms = contact.geom
        between = geoms.min(axis=1) > 0  # geom 0 is the ground, geom i + 1 object i
        for i, j in {(int(pair.min()) - 1, int(pair.max()) - 1) for pair in geoms[between]}:
            pair = i, j
            if self.frame - self._last_touch.get(pair, -APART - 1) > APART:
                place = _rounded(contact.pos[(geoms.min(axis=1) == i + 1) & (geoms.max(axis=1) == j + 1)].mean(axis=0))
                self.collisions.append({"object_ids": list(pair), "frame_id": self.frame, "location": place})
            self._last_touch[pair] = self.frame

    def objects(self) -> list[dict[str, Any]]:
        """This frame's `objects` of `motion_trajectory`: units, units per second, radians (Euler angles x, y, z)."""
        entries = []
        for i, thing in enumerate(self.things):
            location, rotation = self.data.xpos[i + 1], self.data.xmat[i + 1]
            velocity = self.data.qvel[6 * i : 6 * i + 6]
            entries.append(
                {
                    "object_id": i,
                    "location": _rounded(location),
                    "orientation": _rounded(euler(rotation, upright=thing.shape != "cylinder")),
                    "velocity": _rounded(velocity[:3]),
                    # In MuJoCo about the body's own axes, in CLEVRER about the scene's.
                    "angular_velocity": _rounded(rotation.reshape(3, 3) @ velocity[3:]),
                    "inside_camera_view": in_view(thing.shape, location, rotation, self._aspect),
                }
            )
        return entries

    def properties(self) -> list[dict[str, Any]]:
        """The annotation's `object_property`: what each object is."""
        return [
            {"object_id": i, "color": thing.color, "material": thing.material, "shape": thing.shape}
            for i, thing in enumerate(self.things)
        ]


def euler(rotation: Sequence[float], upright: bool = True) -> tuple[float, float, float]:
    """The angles of a rotation (nine numbers, row by row) about the fixed axes x, then y, then z.

    upright=False is for a shape whose own axis is y, like CLEVRER's cylinders: a standing one has (pi / 2, 0, yaw).
    """
    r21, r22 = (rotation[7], rotation[8]) if upright else (rotation[8], -rotation[7])
    y = -math.asin(max(-1.0, min(1.0, rotation[6])))
    return math.atan2(r21, r22), y, math.atan2(rotation[3], rotation[0])


def _rounded(values: Sequence[float]) -> list[float]:
    return [round(float(value), 4) + 0.0 for value in values]  # + 0.0: no negative zeros


# -- MuJoCo ---------------------------------------------------------------------------------------------------------


def scene_xml(things: Sequence[Thing], size: tuple[int, int]) -> str:
    """MuJoCo's description of ground, lights, camera and objects. Only the pairs it lists can touch."""
    width, height = size
    cos, sin = math.cos(ELEVATION), math.sin(ELEVATION)
    field = math.degrees(2 * math.atan(height / (2 * FOCAL * width)))
    geom = {"cube": "box", "sphere": "sphere", "cylinder": "cylinder"}
    bodies, pairs = [], []
    for i, thing in enumerate(things):
        red, green, blue = (0.17 + 0.55 * c / 255 for c in COLORS[thing.color])  # CLEVRER's soft light
        material = f"metal {thing.shape}" if thing.material == "metal" else "rubber"
        bodies.append(
            f'<body><freejoint/><geom name="{i}" type="{geom[thing.shape]}" size="{HALF} {HALF} {HALF}" mass="1"'
            f' material="{material}" rgba="{red} {green} {blue} 1"/></body>'
        )
        rubs = 'condim="1"' if thing.shape == "sphere" else f'condim="4" friction="{FRICTION} {FRICTION} {SPIN} 0 0"'
        pairs.append(f'<pair geom1="ground" geom2="{i}" {rubs}/>')
    for i, j in combinations(range(len(things)), 2):
        bounce = f'solref="{BOUNCE[0]} {BOUNCE[1]}" condim="3" friction="{FRICTION} {FRICTION} 0 0 0"'
        pairs.append(f'<pair geom1="{i}" geom2="{j}" {bounce}/>')
    # With "nativeccd", MuJoCo 4.0 may shoot away a cube that meets a cylinder, because both are equally high.
    return f"""<mujoco>
  <option timestep="{FRAME_SECONDS / SUBSTEPS}" cone="elliptic"><flag nativeccd="disable"/></option>
  <default><geom contype="0" conaffinity="0"/></default>
  <statistic center="-1 0 0" extent="5"/>
  <visual>
    <global offwidth="{width}" offheight="{height}"/>
    <quality shadowsize="1024" offsamples="0" numslices="40" numstacks="24"/>
    <map znear="0.02" zfar="8" shadowclip="1.2"/>
    <headlight ambient="0.55 0.55 0.55" diffuse="0.15 0.15 0.15" specular="0.6 0.6 0.6"/>
  </visual>
  <asset>
    <texture name="ground" type="2d" builtin="gradient" rgb1="0.58 0.58 0.58" rgb2="0.24 0.24 0.25" width="64"
             height="64"/>
    <texture name="edges" type="cube" builtin="flat" rgb1="0.7 0.7 0.7" rgb2="0.7 0.7 0.7" mark="edge" markrgb="1 1 1"
             width="24" height="24"/>
    <material name="ground" specular="0" texture="ground"/>
    <material name="rubber" specular="0.05" shininess="0.1"/>
    <material name="metal sphere" specular="1" shininess="0.7"/>
    <material name="metal cylinder" specular="1" shininess="0.1"/>
    <material name="metal cube" specular="1" shininess="0.7" texture="edges"/>
  </asset>
  <worldbody>
    <light directional="true" pos="2.7 -5.5 7" dir="-0.5 0.75 -1" diffuse="0.3 0.3 0.3" specular="0.7 0.7 0.7"/>
    <light directional="true" pos="3 3 5" dir="-0.6 -0.6 -1" diffuse="0.15 0.15 0.15" specular="0.3 0.3 0.3"
           castshadow="false"/>
    <camera pos="{DISTANCE * cos} 0 {DISTANCE * sin}" xyaxes="0 1 0 {-sin} 0 {cos}" fovy="{field}"/>
    <geom name="ground" type="plane" size="18 18 1" material="ground"/>
    {"".join(bodies)}
  </worldbody>
  <contact>{"".join(pairs)}</contact>
</mujoco>"""


@contextlib.contextmanager
def film(scene: Any, size: tuple[int, int], *, shadows: bool = True) -> Iterator[Callable[[], Any]]:
    """Draws a World or Stage as its camera sees it, without a screen. In the context, the function draws a picture of
    the scene as it is then: a numpy array (H, W, 3) uint8 RGB.

    MUJOCO_GL must be set before mujoco is first imported: "egl" (needs a GPU) or "osmesa" (any machine).
    """
    mujoco = load("mujoco", "simulate")
    with mujoco.Renderer(scene.model, height=size[1], width=size[0], max_geom=100) as renderer:
        renderer.scene.flags[mujoco.mjtRndFlag.mjRND_SHADOW] = shadows
        renderer.scene.flags[mujoco.mjtRndFlag.mjRND_REFLECTION] = False

        def draw() -> Any:
            renderer.update_scene(scene.data, camera=0)
            return renderer.render()

        yield draw


def annotate(world: World, frames: int) -> Iterator[dict[str, Any]]:
    """Moves the world through `frames` frames. Yields the entry of `motion_trajectory` of each while it shows it."""
    for frame in range(frames):
        if frame:
            world.advance()
        yield {"frame_id": frame, "objects": world.objects()}
