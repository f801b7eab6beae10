"""
A small world where only memory can be right.

A camera turns inside a round panorama of 256 columns and sees 64 of them. Sky and hills run through all
hues, the same in every world; before them stand 8 landmarks, one in the middle of each sector of 32 columns:
houses, whose roof and wall have two random colours. The caption tells ground, start and motion, never the
landmarks: what stands where can only be known from having seen it. So "does this model remember?" has an
exact answer, which judge.py reads from frames alone.

    row  0      sky        sky        sky        one rainbow round the panorama
         4      hills      hills      hills      three rainbows
         8      hills    .-------.    hills      roof, in one of six colours
        16      hills    |       |    hills      wall, in another: 30 kinds of house
        20      ground   |   #   |    ground     stripes
        26      ground     ground     ground

    sector     0       1       2       3       4       5       6       7
           |..[ ]..|..[ ]..|..[ ]..|..[ ]..|..[ ]..|..[ ]..|..[ ]..|..[ ]..|    # a house
               [------view------]                                             64 columns around the heading

Why this world? No landmark covers the rainbows, an unmistakable compass: a network always knows where it
looks. Landmarks fill most of the view, so memory explains most of what the caption leaves open, and looking
things up lowers the loss early. All have one silhouette, so recall tests memory and not drawing.

    python world.py            # draws out/world.png: the three motions, as strips of frames

Units: headings and columns in panorama columns (256 = 360 degrees, right is positive), time in frames (16 a
second).
References: none, the world is this project's own.
Leaves out: camera pitch, depth, moving things.
"""
from dataclasses import dataclass
from functools import cache
from itertools import permutations

import numpy as np
from einops import rearrange, reduce

COLUMNS = 256             # of the panorama
WIDTH = 64                # of a frame
HEIGHT = 32
FPS = 16
SECTORS = 8
SECTOR = 32               # columns; landmark s stands at column 32 s + 16
HALF = 14                 # a house reaches so many columns to each side, outline included
# rows at which the parts begin
SKY = 4                   # rows 0..SKY, then the hills
TOP = 8                   # the roof
EAVES = 16                # the wall
HORIZON = 20              # the ground
FOOT = 26                 # rows from here on show nothing but ground
SUB = 8                   # sub-columns a column: panoramas are drawn 8 times finer, then integrated exactly
HELD_OUT = 1_000_000_000  # seeds from here on are held out; training seeds lie below

GROUNDS = ("Grass", "Sand", "Snow", "Stone")
POINTS = ("north", "east", "south", "west")  # at columns 0, 64, 128, 192
COLOURS = ("red", "yellow", "green", "cyan", "blue", "magenta")
PAIRS = list(permutations(range(len(COLOURS)), 2))  # roof and wall of a house
LANDMARKS = len(PAIRS)  # kinds of them

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
PERIODS = {"turn": (8, 44), "linger": (18, 44), "aside": (4, 12)}  # seconds: the shortest, the longest


@dataclass(frozen=True)
class Motion:
    kind: str         # "turn", "linger" or "aside"
    direction: int    # +1 right, -1 left
    seconds: int      # one turn (turn, linger) or one look aside and back (aside)

    def heading(self, start, frame):
        """Unwrapped heading (columns, float64) at frame numbers, of a camera that starts at `start`."""
        t = frame / FPS / self.seconds  # in periods
        if self.kind == "turn":
            return start + self.direction * COLUMNS * t
        if self.kind == "aside":
            there_and_back = 1 - np.abs(1 - 2 * (t % 1))  # 0 .. 1 .. 0
            return start + self.direction * COLUMNS / 4 * there_and_back
        # linger: speed is a fixed function of heading. From heading to time, let time pass, and back.
        quarter, rest = np.divmod(start, 64)
        time = 176 * quarter + np.interp(rest, LINGER_HEADING, LINGER_TIME)
        time = time + self.direction * 4 * 176 * t
        quarter, rest = np.divmod(time, 176)
        return 64 * quarter + np.interp(rest, LINGER_TIME, LINGER_HEADING)


CAPTIONS = {
    "turn": "{ground}. The camera turns {side} from {point}, one turn in {motion.seconds} seconds.",
    "linger": "{ground}. The camera turns {side} from {point}, lingering at compass points, "
              "one turn in {motion.seconds} seconds.",
    "aside": "{ground}. The camera looks from {point} 90 degrees to the {side} and back, "
             "every {motion.seconds} seconds.",
}
# A regular expression, readable enough to show. Seconds: see PERIODS.
GRAMMAR = (
    r"(Grass|Sand|Snow|Stone)\. The camera "
    r"(turns (left|right) from (north|east|south|west)(, lingering at compass points)?, one turn in"
    r"|looks from (north|east|south|west) 90 degrees to the (left|right) and back, every) \d+ seconds\."
)


# ---- one world from one seed -------------------------------------------------------------------------------

@dataclass(frozen=True)
class WorldSpec:
    """Which world it is: whatever is not fixed here is drawn from the seed."""
    seed: int
    kind: str = None              # of motion; None: any, each as often
    seconds: int = None           # its period
    counterfactual: bool = False  # the same place and motion with other landmarks
    empty: bool = False           # ... and with none


@dataclass(frozen=True)
class World:
    ground: int       # index into GROUNDS
    landmarks: tuple  # 8 numbers, by sector, of PAIRS: which landmark stands there
    start: int        # heading of the first frame, columns: a compass point
    motion: Motion

    @property
    def caption(self):
        side = "right" if self.motion.direction > 0 else "left"
        point = POINTS[int(self.start) // 64]
        return CAPTIONS[self.motion.kind].format(ground=GROUNDS[self.ground], side=side, point=point,
                                                 motion=self.motion)


def make_world(spec):
    """WorldSpec -> World"""
    # Always drawn in this order, so that fixing the motion changes neither the place nor the direction.
    rng = np.random.default_rng([spec.seed, 0x3C0])
    ground = rng.integers(len(GROUNDS))
    landmarks = rng.integers(LANDMARKS, size=SECTORS)
    start = 64 * rng.integers(len(POINTS))
    kind = rng.choice(list(PERIODS))
    direction = rng.choice([-1, 1])
    kind = spec.kind or kind
    # The period: 32 columns a second at most (39 where a lingering turn is fast).
    seconds = spec.seconds or rng.integers(*PERIODS[kind], endpoint=True)
    if spec.counterfactual:
        landmarks = np.random.default_rng([spec.seed, 0x3C0, 1]).integers(LANDMARKS, size=SECTORS)
    if spec.empty:
        landmarks = ()
    return World(ground, tuple(landmarks), start, Motion(kind, direction, seconds))


def clip(spec, start, frames):
    """Frames [start, start + frames) of a WorldSpec's world -> (f, 3, 32, 64) float32 in [0, 1]"""
    world = make_world(spec)
    heading = world.motion.heading(world.start, np.arange(start, start + frames))
    return render(panorama(world.ground, world.landmarks), heading)


# ---- drawing -----------------------------------------------------------------------------------------------
# A frame is an exact integral: panoramas are drawn on sub-columns, softened by two columns (so that an edge
# looks equally sharp at every sub-pixel phase), and integrated over each pixel. Between sub-columns that
# integral is linear.

def rainbow(x, value, rounds):
    """Columns x (n, 1, 1) -> (n, 1, 3): a hue that runs round the panorama so many times."""
    hue = ([5, 3, 1] + x / COLUMNS * 6 * rounds) % 6  # of red, green, blue
    return value * (1 - .60 * np.minimum(hue, 4 - hue).clip(0, 1))


@cache
def background(ground):
    """(256 * SUB, 32, 3): sky, hills and ground before integration."""
    x = (np.arange(COLUMNS * SUB)[:, None, None] + .5) / SUB
    y = np.arange(HEIGHT)[:, None]
    sky = rainbow(x, .95, rounds=1)
    hills = rainbow(x, .60, rounds=3)
    stripes = np.sign(np.sin(2 * np.pi * x / 16))
    floor = GROUND_RGB[ground] * (1 + .10 * stripes)
    return np.where(y < SKY, sky, np.where(y < HORIZON, hills, floor)).clip(0, 1)


@cache
def house():
    """-> outline, roof, wall (SECTOR * SUB, 32, 1): what share of each sub-column and row they cover"""
    x = np.abs((np.arange(SECTOR * SUB)[:, None] + .5) / SUB - SECTOR / 2)  # from the middle
    y = (np.arange(HEIGHT * 8) + .5) / 8  # in 8 sub-rows a row

    def inside(border):
        slope = 7 + 7 * (y - TOP) / (EAVES - TOP)
        roof = (y >= TOP + border) & (y < EAVES) & (x < slope - border)
        wall = (y >= EAVES) & (y < FOOT - border) & (x < 12 - border)
        return roof, wall

    roof, wall = inside(1)
    wall &= (x >= 2.5) | (y < EAVES + 3)  # but for the door
    outer = np.logical_or(*inside(0))
    parts = np.array([outer & ~roof & ~wall, roof, wall], float)
    return reduce(parts, "part x (y sub) -> part x y 1", "mean", sub=8)


def integrate(strip):
    """(256 * SUB, 32, 3) -> the same in float32, entry i the pixel whose left edge is at sub-column i."""
    around = np.concatenate([strip[-2 * SUB:], strip, strip[:2 * SUB]])
    # Two running means: the softening over two columns, and the pixel.
    total = np.cumsum(around, 0)
    soft = np.cumsum(total[2 * SUB:] - total[:-2 * SUB], 0)[SUB - 2:]  # one column to the left: it is centred
    pixels = (soft[SUB:] - soft[:-SUB])[:len(strip)]
    return (pixels / SUB / (2 * SUB)).astype(np.float32)


def panorama(ground, landmarks):
    """(256 * SUB, 32, 3) float32: sky, hills, ground and, where there are any, a landmark in each sector."""
    pano = background(ground).copy()
    outline, roof, wall = house()
    for sector, landmark in zip(np.split(pano, SECTORS), landmarks):
        above, below = COLOUR_RGB[list(PAIRS[landmark])]
        sector *= 1 - outline - roof - wall
        sector += OUTLINE_RGB * outline + above * roof + below * wall
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

WHOLE = WIDTH // 2 - HALF - 1  # |middle - heading| up to here: wholly in view, softened edges included
GONE = WIDTH // 2 + HALF       # ... and beyond this: no pixel of it in view


def offsets(heading):
    """(...) -> (..., 8): how many columns each landmark's middle is off the heading, 128 at most"""
    middle = np.arange(SECTORS) * SECTOR + SECTOR // 2
    return apart(middle - heading[..., None])


def apart(columns):
    """The same number of columns by the shorter way round, without a sign"""
    return np.abs((columns + COLUMNS // 2) % COLUMNS - COLUMNS // 2)


if __name__ == "__main__":
    import imageio.v3 as iio
    from pathlib import Path
    specs = list(map(WorldSpec, (5, 4, 8, 7)))
    frames = [clip(spec, 0, 10 * FPS)[::FPS] for spec in specs]
    picture = rearrange(frames, "world f c h w -> (world h) (f w) c")
    Path("out").mkdir(exist_ok=True)
    iio.imwrite("out/world.png", (picture * 255).astype(np.uint8))
    print("drawn in out/world.png: ten seconds of each of")
    for spec in specs:
        print(make_world(spec).caption)
