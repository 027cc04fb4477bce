"""CATER's scenes: objects on a plane. In each stretch of a video at most two of them act: they slide, rotate, are
picked up and placed, or (cones) are put over a smaller object. Motion follows curves, not physics; MuJoCo only draws.

Camera, sizes and speeds are ours, chosen after pictures of CATER. What is exact is the bookkeeping: which object does
what, from which frame to which.
"""

import math
from collections.abc import Sequence
from itertools import product
from random import Random
from typing import NamedTuple

from vjvcr_fast.data.files import load
from vjvcr_fast.data.simulated.scenes import COLORS

# What each shape can do, as CATER's movements call it.
ACTIONS = {
    "sphere": ("_slide", "_pick_place"),
    "spl": ("_slide", "_pick_place", "_rotate"),
    "cylinder": ("_slide", "_pick_place", "_rotate"),
    "cube": ("_slide", "_pick_place", "_rotate"),
    "cone": ("_contain", "_pick_place", "_slide"),
}
# CATER's names of instances. _0, _1, ... is added.
NAMES = {"sphere": "Sphere", "cylinder": "SmoothCylinder-Short", "cube": "SmoothCube_v2", "cone": "Cone"}
# Half the width of a shape. A cone's base is CONE times as wide, and a cone is as high as it is wide.
SIZES = {"small": 0.28, "medium": 0.42, "large": 0.6}
SNITCH, CONE = 0.2, 1.3
GOLD = (255, 200, 40)
MATERIALS = ("rubber", "metal")
OBJECTS = (5, 9)  # beside the snitch
WEIGHTS = (4, 5, 5, 1)  # how likely spheres, cubes, cylinders and further cones are
REACH, GAP = 2.9, 0.15  # places have |x|, |y| <= REACH; objects at rest are at least GAP apart
SLOT = 30  # frames of a stretch
BUSY = (0.25, 0.5)  # the chances that no object or one object moves in a stretch; else two do
HEIGHT = 2.2  # that objects are lifted by, above all that stand
TRIES = 40  # to find a free place
CAMERA = (7.2, -6.8, 5.1)  # looks at the origin
FOCAL = 35 / 32  # in widths of the picture


class Body(NamedTuple):
    """An object: what it is, its position on the plane at frame 0, and its yaw in radians."""

    instance: str
    shape: str
    size: str
    color: str
    material: str
    position: tuple[float, float]
    yaw: float

    @property
    def half(self) -> float:
        """Half its height."""
        return SNITCH if self.shape == "spl" else SIZES[self.size] * (CONE if self.shape == "cone" else 1)

    @property
    def rest(self) -> float:
        """The height of its centre of mass while it stands."""
        return self.half * (0.5 if self.shape == "cone" else 1)

    @property
    def radius(self) -> float:
        """The radius of the circle around its outline on the plane, also while a cylinder rotates end over end."""
        return self.half * (math.sqrt(2) if self.shape in ("cube", "cylinder") else 1)


class Movement(NamedTuple):
    """What an object does from frame `start` up to, but not including, `end`. goal: where it goes. other: what a cone
    is put over. carried: what is inside a cone that slides."""

    action: str
    other: str | None
    start: int
    end: int
    goal: tuple[float, float]
    carried: str | None = None


class Pose(NamedTuple):
    """The centre of an object, and its rotation in radians about the vertical (yaw) and a horizontal axis (pitch)."""

    place: tuple[float, float, float]
    yaw: float
    pitch: float


# -- A random scene -------------------------------------------------------------------------------------------------


def sample_bodies(random: Random) -> list[Body]:
    """Draws the snitch, at least one cone large enough for it, and 4 to 8 more objects. None overlap."""
    count = random.randint(*OBJECTS)
    shapes = ["cone", *random.choices(("sphere", "cube", "cylinder", "cone"), WEIGHTS, k=count - 1)]
    kinds = random.sample(list(product(COLORS, MATERIALS)), count)
    bodies = [Body("Spl_0", "spl", "small", "gold", "metal", _anywhere(random), random.uniform(0, math.tau))]
    for i, (shape, (color, material)) in enumerate(zip(shapes, kinds, strict=True)):
        size = random.choice(("medium", "large") if i == 0 else tuple(SIZES))
        number = sum(body.shape == shape for body in bodies)
        name = f"{NAMES[shape]}_{number}"
        for _ in range(TRIES):
            body = Body(name, shape, size, color, material, _anywhere(random), random.uniform(0, math.tau))
            if all(_apart(body, body.position, other, other.position) for other in bodies):
                bodies.append(body)
                break
    return bodies


def sample_movements(bodies: Sequence[Body], frames: int, random: Random) -> dict[str, list[Movement]]:
    """Draws what every object does, in stretches of SLOT frames (fewer in a short video): {instance: movements}."""
    movements: dict[str, list[Movement]] = {body.instance: [] for body in bodies}
    state = State(bodies)
    slot = min(SLOT, max(4, frames // 4))
    for first in range(0, frames - slot + 1, slot):
        draw = random.random()
        wanted = 0 if draw < BUSY[0] else 1 if draw < sum(BUSY) else 2
        state.begin()
        acting = 0
        for name in random.sample(list(movements), len(movements)):
            if acting == wanted:
                break
            if name in state.inside or name in state.moving:
                continue
            start = first + random.randint(0, slot // 6)
            end = first + slot - random.randint(0, slot // 6)
            movement = _choose(state, name, start, end, random)
            if movement is not None:
                movements[name].append(movement)
                acting += 1
    return movements


class State:
    """Where the objects are before a stretch, and what moves in it."""

    def __init__(self, bodies: Sequence[Body]) -> None:
        self.bodies = {body.instance: body for body in bodies}
        self.places = {body.instance: body.position for body in bodies}
        self.inside: dict[str, str] = {}  # each hidden object, and the cone it is in
        self.moving: set[str] = set()
        self.taken: dict[str, list[tuple[float, float]]] = {}  # where each object stands at any time in this stretch
        self.flights: list[tuple[Body, list[tuple[float, float]]]] = []  # each object lifted in it, and its path

    def begin(self) -> None:
        """Begins a stretch: nothing moves, and each object takes the place where it stands."""
        self.moving, self.flights = set(), []
        self.taken = {name: [place] for name, place in self.places.items()}

    def content(self, cone: str) -> str | None:
        """The object that a cone hides, or None."""
        return next((name for name, around in self.inside.items() if around == cone), None)

    def is_free(self, name: str, place: tuple[float, float], without: Sequence[str | None] = ()) -> bool:
        """Whether an object may stand at a place, away from all that any other object takes in this stretch."""
        others = [n for n in self.bodies if n != name and n not in self.inside and n not in without]
        body = self.bodies[name]
        return all(_apart(body, place, self.bodies[n], where) for n in others for where in self.taken[n])

    def is_free_above(self, name: str, goal: tuple[float, float]) -> bool:
        """Whether an object may be lifted to its goal, away from all that are lifted in this stretch."""
        body, way = self.bodies[name], _way(self.places[name], goal)
        return all(_apart(body, a, other, b) for other, others in self.flights for a in way for b in others)

    def move(self, name: str, movement: Movement) -> Movement:
        """Makes a movement of an object, with what it carries, and returns it."""
        self.moving |= {name, *filter(None, (movement.other, movement.carried))}
        if movement.action in ("_pick_place", "_contain"):
            self.flights.append((self.bodies[name], _way(self.places[name], movement.goal)))
        for moved in filter(None, (name, movement.carried)):
            self.places[moved] = movement.goal
            self.taken[moved].append(movement.goal)
        if movement.other:
            self.inside[movement.other] = name
        return movement


def _choose(state: State, name: str, start: int, end: int, random: Random) -> Movement | None:
    """Draws a movement that this object can make now, and makes it; None if there is none."""
    actions = ACTIONS[state.bodies[name].shape]
    for action in random.sample(actions, len(actions)):
        other = _containable(state, name, random) if action == "_contain" else None
        if action in ("_slide", "_pick_place"):
            goal = _goal(state, name, action, random)
        elif action == "_rotate":
            goal = state.places[name]
        else:
            goal = state.places[other] if other else None
        if goal is None:
            continue
        content = state.content(name)
        if action == "_slide":
            state.taken[name] += _way(state.places[name], goal)  # other objects keep off its path
            return state.move(name, Movement(action, None, start, end, goal, carried=content))
        if content is not None:  # it may act from the next stretch on, when the cone is gone
            del state.inside[content]
            state.moving.add(content)
        return state.move(name, Movement(action, other, start, end, goal))
    return None


def _containable(state: State, cone: str, random: Random) -> str | None:
    """Draws an object that the cone can be put over now; None if there is none."""
    if state.content(cone) is not None:
        return None
    for other in random.sample(list(state.bodies), len(state.bodies)):
        body, place = state.bodies[other], state.places[other]
        free = other not in state.inside and other not in state.moving and other != cone
        # Objects are as high as they are wide.
        fits = body.shape != "cone" and state.bodies[cone].half - body.half >= body.radius
        if free and fits and state.is_free(cone, place, (other,)) and state.is_free_above(cone, place):
            return other
    return None


def _goal(state: State, name: str, action: str, random: Random) -> tuple[float, float] | None:
    """Draws a place to slide to or to be put at, well away from where the object is; None if none is found."""
    body, place, content = state.bodies[name], state.places[name], state.content(name)
    if action == "_pick_place" and content in state.moving:
        return None
    for _ in range(TRIES):
        goal = _anywhere(random)
        if math.dist(goal, place) <= 0.8:
            continue
        if action == "_slide":
            possible = all(state.is_free(name, step) for step in _way(place, goal))
        else:
            uncovers = content is None or _apart(body, goal, state.bodies[content], place)
            possible = uncovers and state.is_free(name, goal) and state.is_free_above(name, goal)
        if possible:
            return goal
    return None


def _apart(one: Body, place: tuple[float, float], other: Body, there: tuple[float, float]) -> bool:
    return math.dist(place, there) >= one.radius + other.radius + GAP


def _anywhere(random: Random) -> tuple[float, float]:
    return random.uniform(-REACH, REACH), random.uniform(-REACH, REACH)


def _way(a: tuple[float, float], b: tuple[float, float]) -> list[tuple[float, float]]:
    """21 places along a straight path, both ends included."""
    return [_between(a, b, k / 20) for k in range(21)]


def _between(a: tuple[float, float], b: tuple[float, float], part: float) -> tuple[float, float]:
    return a[0] + part * (b[0] - a[0]), a[1] + part * (b[1] - a[1])


# -- Motion ---------------------------------------------------------------------------------------------------------


def poses(bodies: Sequence[Body], movements: dict[str, list[Movement]], frames: int) -> list[dict[str, Pose]]:
    """Where every object is in every frame, {instance: Pose}: at rest up to `start`, at its goal from `end` on."""
    of = {body.instance: body for body in bodies}
    tracks = {name: [Pose((*body.position, body.rest), body.yaw, 0.0)] * frames for name, body in of.items()}
    acting = [(name, movement) for name, of_one in movements.items() for movement in of_one]
    for name, movement in sorted(acting, key=lambda pair: pair[1].start):
        for moved in filter(None, (name, movement.carried)):
            before = tracks[moved][movement.start]
            for frame in range(movement.start + 1, frames):
                part = min(1.0, (frame - movement.start) / (movement.end - movement.start))
                tracks[moved][frame] = _moved(of[moved], movement, before, part)
    return [dict(zip(tracks, frame, strict=True)) for frame in zip(*tracks.values(), strict=True)]


def _moved(body: Body, movement: Movement, before: Pose, part: float) -> Pose:
    eased = part * part * (3 - 2 * part)
    x, y, z = before.place
    if movement.action == "_rotate":
        if body.shape != "cylinder":  # a cylinder that turns about its axis would look the same
            return before._replace(yaw=before.yaw + eased * math.pi * 0.75)
        # End over end, with its lowest point on the ground.
        angle = eased * math.pi
        lowest = body.half * (abs(math.cos(angle)) + abs(math.sin(angle)))
        return before._replace(place=(x, y, lowest), pitch=before.pitch + angle)
    if movement.action == "_slide":
        return before._replace(place=(*_between((x, y), movement.goal, eased), z))
    # A third of the time each: up, over, down. The path is rounded.
    over = min(max(3 * part - 1, 0.0), 1.0)
    up = min(3 * part, 1.0, 3 - 3 * part)
    smooth = up * up * (3 - 2 * up)
    return before._replace(place=(*_between((x, y), movement.goal, over * over * (3 - 2 * over)), z + HEIGHT * smooth))


# -- Drawing --------------------------------------------------------------------------------------------------------


class Stage:
    """The objects in MuJoCo, placed where a frame has them, for `scenes.film` to draw."""

    def __init__(self, bodies: Sequence[Body], size: tuple[int, int]) -> None:
        self._mujoco = load("mujoco", "simulate")
        self.model = self._mujoco.MjModel.from_xml_string(stage_xml(bodies, size))
        self.data = self._mujoco.MjData(self.model)
        self._names = [body.instance for body in bodies]

    def show(self, frame: dict[str, Pose]) -> None:
        """Moves each object to its pose in the frame, {instance: Pose}."""
        for i, name in enumerate(self._names):
            place, yaw, pitch = frame[name]
            self.data.mocap_pos[i] = place
            a, b = (math.cos(yaw / 2), math.sin(yaw / 2)), (math.cos(pitch / 2), math.sin(pitch / 2))
            self.data.mocap_quat[i] = (a[0] * b[0], a[0] * b[1], a[1] * b[1], a[1] * b[0])  # yaw, then about x
        self._mujoco.mj_forward(self.model, self.data)


def stage_xml(bodies: Sequence[Body], size: tuple[int, int]) -> str:
    """MuJoCo's description of ground, lights, camera and objects."""
    width, height = size
    field = math.degrees(2 * math.atan(height / (2 * FOCAL * width)))
    x, y, z = CAMERA
    flat, far = math.hypot(x, y), math.hypot(x, y, z)
    axes = f"{-y / flat} {x / flat} 0 {-x * z / (flat * far)} {-y * z / (flat * far)} {flat / far}"
    drawn = "".join(f'<body mocap="true" name="{b.instance}">{_geoms(b)}</body>' for b in bodies)
    meshes = "".join(
        f'<mesh name="{b.instance}" vertex="{_cone_vertices(b.half)}"/>' for b in bodies if b.shape == "cone"
    )
    return f"""<mujoco>
  <default><geom contype="0" conaffinity="0"/></default>
  <statistic center="0 0 0" extent="5"/>
  <visual>
    <global offwidth="{width}" offheight="{height}"/>
    <quality shadowsize="1024" offsamples="0" numslices="40" numstacks="24"/>
    <map znear="0.1" zfar="12" shadowclip="1.4"/>
    <headlight ambient="0.5 0.5 0.5" diffuse="0.2 0.2 0.2" specular="0.4 0.4 0.4"/>
  </visual>
  <asset>
    <material name="ground" specular="0" rgba="0.6 0.6 0.6 1"/>
    <material name="rubber" specular="0.05" shininess="0.1"/>
    <material name="metal" specular="1" shininess="0.7"/>
    {meshes}
  </asset>
  <worldbody>
    <light directional="true" pos="-3 -5 8" dir="0.4 0.6 -1" diffuse="0.4 0.4 0.4" specular="0.6 0.6 0.6"/>
    <camera pos="{x} {y} {z}" xyaxes="{axes}" fovy="{field}"/>
    <geom type="plane" size="30 30 1" material="ground"/>
    {drawn}
  </worldbody>
</mujoco>"""


def _geoms(body: Body) -> str:
    red, green, blue = (0.15 + 0.6 * c / 255 for c in (GOLD if body.shape == "spl" else COLORS[body.color]))
    look = f'material="{body.material}" rgba="{red} {green} {blue} 1"'
    half = body.half
    if body.shape == "spl":  # the snitch: a ball with two crossed rims
        rims = "".join(
            f'<geom type="cylinder" size="{half} {0.2 * half}" euler="{turn}" {look}/>' for turn in ("90 0 0", "0 60 0")
        )
        return f'<geom type="sphere" size="{0.7 * half}" {look}/>{rims}'
    if body.shape == "cone":
        return f'<geom type="mesh" mesh="{body.instance}" {look}/>'
    kind = {"cube": "box", "sphere": "sphere", "cylinder": "cylinder"}[body.shape]
    return f'<geom type="{kind}" size="{half} {half} {half}" {look}/>'


def _cone_vertices(half: float) -> str:
    """The base and the tip. MuJoCo moves a mesh's centre of mass, which is a quarter of a cone's height above its base,
    to the centre of its body."""
    low, high = -0.5 * half, 1.5 * half
    circle = (f"{half * math.cos(k * math.tau / 32)} {half * math.sin(k * math.tau / 32)} {low}" for k in range(32))
    return f"0 0 {high} {' '.join(circle)}"
