"""
A small world where only memory can be right.

A camera turns inside a round panorama of 256 columns and sees 64 of them. The sky's hue is the compass, the
same in every world; on the ground stand 8 landmarks, one in the middle of each sector of 32 columns, whose
shape and colour are random. The caption tells the ground and the motion, never the landmarks: what stands
where can only be known from having seen it. So "does this model remember?" has an exact answer, which
judge.py reads from frames alone.

    sector     0       1       2       3       4       5       6       7
           |...#...|...#...|...#...|...#...|...#...|...#...|...#...|...#...|    # a landmark
                         [------view------]                                   64 columns around the heading

    python world.py            # draws out/world.png: the three motions, as strips of frames

Units: headings and columns in panorama columns (256 = 360 degrees, right is positive), time in frames (16 a
second).
References: none, the world is this project's own.
Leaves out: camera pitch, depth, moving things.
"""
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from einops import rearrange, reduce

COLUMNS = 256             # of the panorama
WIDTH = 64                # of a frame
HEIGHT = 32
FPS = 16
SECTORS = 8
SECTOR = 32               # columns; landmark s stands at column 32 s + 16
HALF = 9                  # a landmark is at most 18 columns wide, outline included
TOP = 6                   # landmarks cover rows TOP..FOOT
HORIZON = 20              # the ground starts at this row
FOOT = 26
SUB = 8                   # sub-columns a column: panoramas are drawn 8 times finer, then integrated exactly
HELD_OUT = 1_000_000_000  # seeds from here on are held out; training seeds lie below

GROUNDS = ("Grass", "Sand", "Snow", "Stone")
SHAPES = ("square", "triangle", "funnel", "cross")  # of eight tried, the four that differ most in pixels
COLOURS = ("red", "yellow", "green", "cyan", "blue", "magenta")
LANDMARKS = 24  # landmark 6 * shape + colour

GROUND_RGB = np.array([
    (.33, .47, .25),
    (.76, .65, .42),
    (.90, .92, .95),
    (.36, .35, .37),
], np.float32)
COLOUR_RGB = np.array([
    (.92, .10, .10),
    (.95, .85, .05),
    (.05, .70, .10),
    (.05, .80, .85),
    (.10, .15, .90),
    (.85, .10, .80),
], np.float32)
OUTLINE_RGB = np.array((.05, .05, .08), np.float32)


# ---- motion: heading as a function of time, in closed form -------------------------------------------------

# A lingering turn within a quarter: headings, and the times to get there, 8 times slower near compass points.
LINGER_HEADING = [0, 8, 56, 64]
LINGER_TIME = [0, 64, 112, 176]


@dataclass(frozen=True)
class Motion:
    kind: str         # "turn", "linger" or "aside"
    direction: int    # +1 right, -1 left
    seconds: int      # one turn (turn, linger) or one look aside and back (aside)
    degrees: int = 0  # aside only: how far the camera looks aside

    def heading(self, start, frame):
        """Unwrapped heading (columns, float64) at frame numbers, of a camera that starts at `start`."""
        t = frame / FPS / self.seconds  # in periods
        if self.kind == "turn":
            return start + self.direction * COLUMNS * t
        if self.kind == "aside":
            there_and_back = 1 - np.abs(1 - 2 * (t % 1))  # 0 .. 1 .. 0
            return start + self.direction * self.degrees / 360 * COLUMNS * there_and_back
        # linger: speed is a fixed function of heading. From heading to time, let time pass, and back.
        quarter, rest = np.divmod(start, 64)
        time = 176 * quarter + np.interp(rest, LINGER_HEADING, LINGER_TIME)
        time = time + self.direction * 4 * 176 * t
        quarter, rest = np.divmod(time, 176)
        return 64 * quarter + np.interp(rest, LINGER_TIME, LINGER_HEADING)


CAPTIONS = {
    "turn": "{ground}. The camera turns {side}, one turn in {motion.seconds} seconds.",
    "linger": "{ground}. The camera turns {side}, lingering at the compass points, "
              "one turn in {motion.seconds} seconds.",
    "aside": "{ground}. The camera looks {motion.degrees} degrees to the {side} and back, "
             "every {motion.seconds} seconds.",
}
# A regular expression, readable enough to show. Seconds: 8..44, lingering 18..44, looking aside 4..16.
GRAMMAR = (
    r"(Grass|Sand|Snow|Stone)\. The camera "
    r"(turns (left|right)(, lingering at the compass points)?, one turn in"
    r"|looks \d+ degrees to the (left|right) and back, every) \d+ seconds\."
)


# ---- one world from one seed -------------------------------------------------------------------------------

@dataclass(frozen=True)
class WorldSpec:
    """Which world it is: whatever is not fixed here is drawn from the seed."""
    seed: int
    kind: str = None              # of motion; None: steady turns 50 %, lingering ones 30 %, looks aside 20 %
    seconds: int = None           # its period
    counterfactual: bool = False  # the same place and motion with other landmarks


@dataclass(frozen=True)
class World:
    ground: int       # index into GROUNDS
    landmarks: tuple  # 8 numbers 0..23 = 6 * shape + colour, by sector
    start: float      # heading of the first frame, columns
    motion: Motion

    @property
    def caption(self):
        template = CAPTIONS[self.motion.kind]
        side = "right" if self.motion.direction > 0 else "left"
        return template.format(ground=GROUNDS[self.ground], side=side, motion=self.motion)


def make_world(spec):
    """WorldSpec -> World"""
    # Always drawn in this order, so that fixing the motion changes neither the place nor the direction.
    rng = np.random.default_rng([spec.seed, 0x3C0])
    ground = rng.integers(len(GROUNDS))
    landmarks = rng.integers(LANDMARKS, size=SECTORS)
    start = rng.uniform(0, COLUMNS)
    kind = rng.choice(["turn", "linger", "aside"], p=[.5, .3, .2])
    direction = rng.choice([-1, 1])
    kind = spec.kind or kind
    degrees = rng.choice([90, 135, 180]) if kind == "aside" else 0
    # The period: 32 columns a second at most.
    fastest = {"turn": 8, "linger": 18, "aside": degrees * 2 // 45}[kind]
    slowest = fastest + 8 if kind == "aside" else 44
    seconds = spec.seconds or rng.integers(fastest, slowest + 1)
    if spec.counterfactual:
        landmarks = np.random.default_rng([spec.seed, 0x3C0, 1]).integers(LANDMARKS, size=SECTORS)
    return World(ground, tuple(landmarks), start, Motion(kind, direction, seconds, degrees))


def clip(spec, start, frames):
    """Frames [start, start + frames) of a WorldSpec's world -> (f, 3, 32, 64) float32 in [0, 1]"""
    world = make_world(spec)
    heading = world.motion.heading(world.start, np.arange(start, start + frames))
    return render(panorama(world.ground, world.landmarks), heading)


# ---- drawing -----------------------------------------------------------------------------------------------
# A frame is an exact integral: panoramas are drawn on sub-columns, softened by one column (so that an edge
# looks equally sharp at every sub-pixel phase), and integrated over each pixel. Between sub-columns that
# integral is linear.

@lru_cache(maxsize=None)
def coverage(shape, radius):
    """(SECTOR * SUB, 32, 1): what share of each sub-column a shape of this half-width (columns) covers."""
    # Around its middle, y downwards, in 8 sub-rows a row.
    x = (np.arange(SECTOR * SUB)[:, None] + .5) / SUB - SECTOR / 2
    y = (np.arange(HEIGHT * 8) + .5) / 8 - (TOP + FOOT) / 2
    far = np.maximum(np.abs(x), np.abs(y))
    near = np.minimum(np.abs(x), np.abs(y))
    if SHAPES[shape] == "square":
        inside = far < radius - .5
    elif SHAPES[shape] == "cross":
        inside = (far < radius) & (near < radius - 5.5)
    else:
        down = y if SHAPES[shape] == "triangle" else -y  # a funnel is a triangle upside down
        inside = (down < radius) & (np.abs(x) < (down + radius + .5) * .5)
    return reduce(inside.astype(float), "x (y sub) -> x y 1", "mean", sub=8)


def wave(periods):
    return np.sin(2 * np.pi * periods)


def ground_pattern(ground, x, y):
    """At columns x (n, 1) and rows y (32,): how much lighter the ground is there, from -1 to 1."""
    if GROUNDS[ground] == "Stone":
        return np.sign(wave(x / 16) * wave((y - HORIZON) / 8))  # slabs
    # Stripes, slanting ones, wide ones.
    return wave({"Grass": x / 8, "Sand": x / 16 + y / 6, "Snow": x / 32}[GROUNDS[ground]])


@lru_cache(maxsize=None)
def background(ground):
    """(256 * SUB, 32, 3): sky and ground before integration."""
    x = (np.arange(COLUMNS * SUB)[:, None] + .5) / SUB
    y = np.arange(HEIGHT) + .5
    hue = ([5, 3, 1] + x / COLUMNS * 6) % 6  # of red, green, blue; runs round once
    sky = .60 - .18 * np.minimum(hue, 4 - hue).clip(0, 1)
    floor = GROUND_RGB[ground] * (1 + .10 * ground_pattern(ground, x, y)[..., None])
    sky = sky.astype(np.float32)[:, None]
    return np.where((y < HORIZON)[:, None], sky, floor).clip(0, 1)


def integrate(strip):
    """(256 * SUB, 32, 3) -> the same in float32, entry i the pixel whose left edge is at sub-column i."""
    around = np.concatenate([strip[-SUB:], strip, strip[:2 * SUB]])
    # Two running means over one column each: the softening, and the pixel.
    total = np.cumsum(around, 0)
    soft = np.cumsum(total[SUB:] - total[:-SUB], 0)[SUB // 2 - 2:]  # half a column to the left: it is centred
    pixels = (soft[SUB:] - soft[:-SUB])[:len(strip)]
    return (pixels / SUB ** 2).astype(np.float32)


def panorama(ground, landmarks):
    """(256 * SUB, 32, 3) float32: sky, ground and, where there are any, a landmark in each sector."""
    pano = background(ground).copy()
    for sector, landmark in zip(np.split(pano, SECTORS), landmarks):
        shape, colour = divmod(landmark, len(COLOURS))
        outer = coverage(shape, HALF)
        inner = coverage(shape, HALF - 1.25)
        sector[:] = sector * (1 - outer) + OUTLINE_RGB * (outer - inner) + COLOUR_RGB[colour] * inner
    return integrate(pano)


def render(pano, headings):
    """pano from panorama(), headings (f,) of the middle of the view -> (f, 3, 32, 64) float32 in [0, 1]"""
    # The view's left edge, as a whole sub-column and the part that is left over.
    whole, part = np.divmod((headings - WIDTH // 2) * SUB, 1)
    # Each pixel lies between two sub-columns.
    here = (whole.astype(int)[:, None] + np.arange(WIDTH) * SUB) % len(pano)
    frames = pano[here]
    frames += rearrange(part.astype(np.float32), "f -> f 1 1 1") * (pano[(here + 1) % len(pano)] - frames)
    return rearrange(frames, "f w h c -> f c h w").copy()


# ---- what a camera sees ------------------------------------------------------------------------------------

WHOLE = WIDTH // 2 - HALF - 2  # |middle - heading| up to here: wholly in view with 2 columns to spare
GONE = WIDTH // 2 + HALF       # ... and beyond this: no pixel of it in view


def offsets(heading):
    """(...) -> (..., 8): columns from the heading to each landmark's middle, in [-128, 128)."""
    middle = np.arange(SECTORS) * SECTOR + SECTOR // 2
    return wrap(middle - heading[..., None])


def wrap(columns):
    return (columns + COLUMNS // 2) % COLUMNS - COLUMNS // 2


if __name__ == "__main__":
    import imageio.v3 as iio
    from pathlib import Path
    frames = [clip(WorldSpec(seed), 0, 10 * FPS)[::FPS] for seed in (0, 2, 8, 7)]
    picture = rearrange(np.stack(frames), "world f c h w -> (world h) (f w) c")
    Path("out").mkdir(exist_ok=True)
    iio.imwrite("out/world.png", (picture * 255).astype(np.uint8))
    print("drawn in out/world.png: a row a world, ten frames, one a second")
