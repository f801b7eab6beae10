"""
A small world where only memory can be right.

A camera turns inside a round panorama of 256 columns and sees 64 of them. The sky's hue is the compass, the same in
every world; on the ground stand 8 landmarks, one in the middle of each sector of 32 columns, whose shape and colour
are random. The caption tells the ground and the motion, never the landmarks: what stands where can only be known from
having seen it. So "does this model remember?" has an exact answer, which judge.py reads from frames alone.

    python world.py            # draws out/world.png: the four grounds, the three motions, as strips of frames

Units: headings and columns in panorama columns (256 = 360 degrees, right is positive), time in frames (16 a second).
References: none, the world is this project's own.
Leaves out: camera pitch, depth, moving things.
"""
import re
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

COLUMNS, WIDTH, HEIGHT, FPS = 256, 64, 32, 16
SECTORS, SECTOR = 8, 32       # landmark s stands at column 32 s + 16
HALF = 9                      # a landmark is at most 18 columns wide, outline included
TOP, HORIZON, FOOT = 6, 20, 26  # rows: landmarks cover TOP..FOOT, the ground starts at HORIZON
SUB = 8                       # sub-columns a column: panoramas are drawn 8 times finer, then integrated exactly
HELD_OUT = 1_000_000_000      # seeds from here on are held out; training seeds lie below

GROUNDS = ("grass", "sand", "snow", "stone")
SHAPES = ("square", "triangle", "funnel", "cross")  # of eight tried, the four that differ most in pixels
COLOURS = ("red", "yellow", "green", "cyan", "blue", "magenta")
LANDMARKS = len(SHAPES) * len(COLOURS)  # landmark 6 * shape + colour
GROUND_RGB = np.array([(.33, .47, .25), (.76, .65, .42), (.90, .92, .95), (.36, .35, .37)], np.float32)
COLOUR_RGB = np.array([(.92, .10, .10), (.95, .85, .05), (.05, .70, .10), (.05, .80, .85), (.10, .15, .90),
                       (.85, .10, .80)], np.float32)
OUTLINE_RGB = np.array((.05, .05, .08), np.float32)


# ---- motion: heading as a function of time, in closed form -----------------------------------------------------------

LINGER_H = np.array([0, 8, 56, 64], np.float64)      # heading within a quarter turn ...
LINGER_U = np.array([0, 64, 112, 176], np.float64)   # ... and the time to get there: 8 times slower near the compass points


@dataclass(frozen=True)
class Motion:
    kind: str         # "turn", "linger" or "aside"
    direction: int    # +1 right, -1 left
    seconds: int      # one turn (turn, linger) or one look aside and back (aside)
    degrees: int = 0  # aside only: how far the camera looks aside

    def heading(self, start, frame):
        """Unwrapped heading (columns, float64) at the given frame numbers, for a camera that starts at `start`."""
        t = np.asarray(frame, np.float64) / FPS / self.seconds  # in periods
        if self.kind == "turn":
            return start + self.direction * COLUMNS * t
        if self.kind == "linger":  # speed is a fixed function of heading: integrate 1 / speed, move, invert
            quarter, rest = np.divmod(start, 64)
            u = 176 * quarter + np.interp(rest, LINGER_H, LINGER_U) + self.direction * 4 * 176 * t
            quarter, rest = np.divmod(u, 176)
            return 64 * quarter + np.interp(rest, LINGER_U, LINGER_H)
        there_and_back = 1 - np.abs(1 - 2 * (t % 1))
        return start + self.direction * self.degrees / 360 * COLUMNS * there_and_back


WORDS = {"turn": "The camera turns {side}, one turn in {seconds} seconds.",
         "linger": "The camera turns {side}, lingering at the compass points, one turn in {seconds} seconds.",
         "aside": "The camera looks {degrees} degrees to the {side} and back, every {seconds} seconds."}
GRAMMAR = "'Grass|Sand|Snow|Stone. ' and one of " + " | ".join(
    repr(WORDS[kind].format(side="left|right", seconds=seconds, degrees="90|135|180"))
    for kind, seconds in (("turn", "8..44"), ("linger", "18..44"), ("aside", "4..16")))


def parse_caption(caption):
    """Caption -> (ground index, Motion), or None when it is not of the world's grammar."""
    ground, _, words = caption.strip().partition(". ")
    for kind, template in WORDS.items():
        m = re.fullmatch(template.replace(".", r"\.").format(side="(?P<side>left|right)", seconds=r"(?P<seconds>\d+)",
                                                             degrees=r"(?P<degrees>\d+)"), words)
        if m and ground.lower() in GROUNDS and ground.istitle():
            side, seconds, degrees = (m.groupdict().get(name, 0) for name in ("side", "seconds", "degrees"))
            return GROUNDS.index(ground.lower()), Motion(kind, 1 if side == "right" else -1, max(1, int(seconds)), int(degrees))


# ---- one world from one seed -----------------------------------------------------------------------------------------

@dataclass(frozen=True)
class World:
    ground: int       # index into GROUNDS
    landmarks: tuple  # 8 numbers 0..23 = 6 * shape + colour, by sector
    start: float      # heading of the first frame, columns
    motion: Motion

    @property
    def caption(self):
        m, side = self.motion, "right" if self.motion.direction > 0 else "left"
        words = WORDS[m.kind].format(side=side, seconds=m.seconds, degrees=m.degrees)
        return f"{GROUNDS[self.ground].capitalize()}. {words}"


@dataclass(frozen=True)
class WorldSpec:
    """Which world it is: whatever is not fixed here is drawn from the seed."""
    seed: int
    kind: str = None              # of motion; None: steady turns 50 %, lingering ones 30 %, looks aside 20 %
    seconds: int = None           # its period
    counterfactual: bool = False  # the same place and motion with other landmarks


def make_world(spec):
    """WorldSpec -> World"""
    # in this order whatever is fixed, so that fixing one thing changes no other
    rng = np.random.default_rng([spec.seed, 0x3C0])
    ground = int(rng.integers(len(GROUNDS)))
    landmarks = rng.integers(LANDMARKS, size=SECTORS)
    start = float(rng.uniform(0, COLUMNS))
    kind = str(rng.choice(["turn", "linger", "aside"], p=[.5, .3, .2]))
    direction = int(rng.choice([-1, 1]))
    kind = spec.kind or kind
    degrees = int(rng.choice([90, 135, 180])) if kind == "aside" else 0
    # the period: 32 columns a second at most
    fastest = degrees * 2 // 45
    shortest, longest = {"turn": (8, 44), "linger": (18, 44), "aside": (fastest, fastest + 8)}[kind]
    seconds = spec.seconds or int(rng.integers(shortest, longest + 1))
    if spec.counterfactual:
        landmarks = np.random.default_rng([spec.seed, 0x3C0, 1]).integers(LANDMARKS, size=SECTORS)
    return World(ground, tuple(landmarks.tolist()), start, Motion(kind, direction, seconds, degrees))


def clip(spec, start, frames):
    """Frames [start, start + frames) of a WorldSpec's world -> (f, 3, 32, 64) float32 in [0, 1]"""
    world = make_world(spec)
    heading = world.motion.heading(world.start, np.arange(start, start + frames))
    return render(panorama(world.ground, world.landmarks), heading)


# ---- drawing ---------------------------------------------------------------------------------------------------------
# A frame is an exact integral: panoramas are drawn on sub-columns, softened by one column (so that an edge looks equally
# sharp at every sub-pixel phase), and integrated over each pixel. Between sub-columns that integral is linear.

def shape_mask(shape, radius, x, y):
    """Inside test of a shape of the given half-width (columns) around (0, 0), y downwards."""
    ax, ay = np.abs(x), np.abs(y)
    return {"square": np.maximum(ax, ay) < radius - .5,
            "triangle": (y < radius) & (ax < (y + radius + .5) * .5),
            "funnel": (y > -radius) & (ax < (radius - y + .5) * .5),
            "cross": (np.maximum(ax, ay) < radius) & (np.minimum(ax, ay) < radius - 5.5)}[SHAPES[shape]]


def integrate(strip):
    """(256 * SUB, 32, 3) -> the same shape, entry i the pixel column whose left edge stands at sub-column i; float32"""
    total = np.cumsum(np.pad(strip, ((SUB, 2 * SUB), (0, 0), (0, 0)), mode="wrap").astype(np.float64), 0)
    soft = np.cumsum(total[SUB:] - total[:-SUB], 0)[SUB // 2 - 2:]  # half a column to the left: softening is centred
    return ((soft[SUB:] - soft[:-SUB])[:len(strip)] / SUB ** 2).astype(np.float32)


@lru_cache(maxsize=None)
def drawn_background(ground):
    """(256 * SUB, 32, 3): sky and ground before integration."""
    x, y = (np.arange(COLUMNS * SUB) + .5) / SUB, np.arange(HEIGHT) + .5
    k = (np.array([5., 3., 1.]) + (x / COLUMNS)[:, None] * 6) % 6  # red, green, blue of the hue that runs round once
    sky = (.60 - .60 * .30 * np.clip(np.minimum(k, 4 - k), 0, 1)).astype(np.float32)[:, None]
    wave = (np.sin(2 * np.pi * x / 8)[:, None] * np.ones(HEIGHT), np.sin(2 * np.pi * (x[:, None] / 16 + y / 6)),
            np.sin(2 * np.pi * x / 32)[:, None] * np.ones(HEIGHT),
            np.sign(np.sin(2 * np.pi * x / 16)[:, None] * np.sin(2 * np.pi * (y - HORIZON) / 8)))[ground]
    floor = GROUND_RGB[ground] * (1 + .10 * wave[..., None])
    return np.where((y < HORIZON)[None, :, None], sky, floor).clip(0, 1)


PANEL = HALF + 2  # a landmark's drawing, integrated, reaches less than this many columns from its middle


@lru_cache(maxsize=None)
def stencil(shape):
    """Shares (2 * PANEL * SUB, 32, 1) of a landmark with its outline, and without it, in the sub-columns around its middle."""
    x = (np.arange(2 * PANEL * SUB) + .5) / SUB - PANEL
    y = (np.arange(HEIGHT * 8) + .5) / 8 - (TOP + FOOT) / 2
    masks = (shape_mask(shape, radius, *np.meshgrid(x, y, indexing="ij")) for radius in (HALF, HALF - 1.25))
    return [mask.reshape(len(x), HEIGHT, 8).mean(2)[..., None] for mask in masks]


def panorama(ground, landmarks):
    """(256 * SUB, 32, 3) float32: sky, ground and, where there are any, a landmark (6 * shape + colour) in each sector."""
    pano = drawn_background(ground).copy()
    for s, landmark in enumerate(landmarks):
        shape, colour = divmod(int(landmark), len(COLOURS))
        outer, inner = stencil(shape)
        middle = (s * SECTOR + SECTOR // 2) * SUB
        part = pano[middle - PANEL * SUB:middle + PANEL * SUB]
        part[:] = part * (1 - outer) + OUTLINE_RGB * (outer - inner) + COLOUR_RGB[colour] * inner
    return integrate(pano)


def render(pano, headings):
    """
    pano from panorama(); headings (f,) in columns, each in the middle of its view of 64 -> (f, 3, 32, 64) float32 in [0, 1]
    """
    left = (np.asarray(headings, np.float64) - WIDTH // 2) * SUB
    whole = np.floor(left)
    part = (left - whole).astype(np.float32)[:, None, None]
    ids = (whole.astype(np.int64)[:, None] + np.arange(WIDTH) * SUB) % len(pano)
    flat = pano.reshape(len(pano), -1)
    frames = flat[ids]  # (f, 64, 32 * 3)
    frames += part * (flat[(ids + 1) % len(pano)] - frames)
    return np.ascontiguousarray(frames.reshape(-1, WIDTH, HEIGHT, 3).transpose(0, 3, 2, 1))


# ---- what a camera sees ------------------------------------------------------------------------------------------------

WHOLE = WIDTH // 2 - HALF - 2  # |middle - heading| up to here: wholly in view with 2 columns to spare
GONE = WIDTH // 2 + HALF       # ... and beyond this: no pixel of it in view


def offsets(heading):
    """(...) -> (..., 8): columns from the heading to each landmark's middle, in [-128, 128)."""
    return wrap(np.arange(SECTORS) * SECTOR + SECTOR // 2 - heading[..., None])


def wrap(columns):
    return (columns + COLUMNS // 2) % COLUMNS - COLUMNS // 2


if __name__ == "__main__":
    import imageio.v3 as iio
    from pathlib import Path
    rows = []
    for spec in (WorldSpec(3, "turn"), WorldSpec(1, "turn"), WorldSpec(2, "linger"), WorldSpec(8, "aside"), WorldSpec(5, "aside")):
        rows.append(np.concatenate(list(clip(spec, 0, 160)[::16].transpose(0, 2, 3, 1)), axis=1))
        print(make_world(spec).caption)
    Path("out").mkdir(exist_ok=True)
    iio.imwrite("out/world.png", (np.concatenate(rows) * 255).round().astype(np.uint8))
    print("out/world.png: a row each, ten frames, one a second")
