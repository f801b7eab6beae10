"""
A small world where only memory can be right, and a judge that reads frames.

A camera turns inside a round panorama of 256 columns and sees 64 of them. The sky's hue is the compass, the same in
every world; on the ground stand 8 landmarks, one in the middle of each sector of 32 columns, whose shape and colour
are random. The caption tells the ground and the motion, never the landmarks: what stands where can only be known from
having seen it. So "does this model remember?" has an exact answer, read from frames alone.

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

    def words(self):
        side = "right" if self.direction > 0 else "left"
        return {"turn": f"The camera turns {side}, one turn in {self.seconds} seconds.",
                "linger": f"The camera turns {side}, lingering at the compass points, one turn in {self.seconds} seconds.",
                "aside": f"The camera looks {self.degrees} degrees to the {side} and back, every {self.seconds} seconds.",
                }[self.kind]


GRAMMAR = ("'Grass|Sand|Snow|Stone. The camera turns left|right, one turn in 8..44 seconds.' | '... turns left|right, "
           "lingering at the compass points, one turn in 18..44 seconds.' | '... looks 90|135|180 degrees to the "
           "left|right and back, every 4..16 seconds.'")


def parse_caption(caption):
    """Caption -> (ground index, Motion), or None when it is not of the world's grammar."""
    m = re.fullmatch(r"(Grass|Sand|Snow|Stone)\. The camera (?:turns (left|right),( lingering at the compass points,)? one turn in "
                     r"(\d+) seconds|looks (\d+) degrees to the (left|right) and back, every (\d+) seconds)\.", caption.strip())
    if m is None:
        return None
    ground = GROUNDS.index(m[1].lower())
    if m[2]:
        return ground, Motion("linger" if m[3] else "turn", 1 if m[2] == "right" else -1, max(1, int(m[4])))
    return ground, Motion("aside", 1 if m[6] == "right" else -1, max(1, int(m[7])), int(m[5]))


# ---- one world from one seed -----------------------------------------------------------------------------------------

@dataclass(frozen=True)
class World:
    ground: int       # index into GROUNDS
    landmarks: tuple  # 8 numbers 0..23 = 6 * shape + colour, by sector
    start: float      # heading of the first frame, columns
    motion: Motion

    @property
    def caption(self):
        return f"{GROUNDS[self.ground].capitalize()}. {self.motion.words()}"


def world(seed, kind=None):
    """The world of an integer seed. kind fixes the motion programme (None: steady 50 %, linger 30 %, look aside 20 %)."""
    rng = np.random.default_rng([int(seed), 0x3C0])
    ground, landmarks, start = rng.integers(4), rng.integers(24, size=SECTORS), rng.uniform(0, COLUMNS)
    drawn = rng.choice(["turn", "linger", "aside"], p=[.5, .3, .2])
    kind, direction = kind or str(drawn), int(rng.choice([-1, 1]))
    if kind == "turn":
        motion = Motion(kind, direction, int(rng.integers(8, 45)))
    elif kind == "linger":
        motion = Motion(kind, direction, int(rng.integers(18, 45)))
    else:
        degrees = int(rng.choice([90, 135, 180]))
        motion = Motion(kind, direction, degrees * 2 // 45 + int(rng.integers(9)), degrees)  # 32 columns a second at most
    return World(int(ground), tuple(int(a) for a in landmarks), float(start), motion)


def clip(seed, start, frames, kind=None):
    """
    Frames [start, start + frames) of the world of a seed, without rendering the rest.
    returns  (f, 3, 32, 64) float32 in [0, 1]
    """
    w = world(seed, kind)
    return render(panorama(w.ground, w.landmarks), w.motion.heading(w.start, np.arange(start, start + frames)))


# ---- drawing ---------------------------------------------------------------------------------------------------------
# A frame is an exact integral: panoramas are drawn on sub-columns, softened by one column (so that an edge looks equally
# sharp at every sub-pixel phase), and integrated over each pixel. Between sub-columns that integral is linear.

def hsv_to_rgb(h, s, v):
    k = (np.asarray([5., 3., 1.]) + np.asarray(h)[..., None] * 6) % 6
    return (v - v * s * np.clip(np.minimum(k, 4 - k), 0, 1)).astype(np.float32)


def shape_mask(shape, radius, x, y):
    """Inside test of a shape of the given half-width (columns) around (0, 0), y downwards."""
    ax, ay = np.abs(x), np.abs(y)
    return {"square": np.maximum(ax, ay) < radius - .5,
            "triangle": (y < radius) & (ax < (y + radius + .5) * .5),
            "funnel": (y > -radius) & (ax < (radius - y + .5) * .5),
            "cross": (np.maximum(ax, ay) < radius) & (np.minimum(ax, ay) < radius - 5.5)}[SHAPES[shape]]


def integrate(strip, wrap):
    """(x, rows, 3) on sub-columns -> same shape; entry i is the pixel whose left edge stands at sub-column i."""
    pad = 2 * SUB
    strip = np.pad(strip, ((pad, pad), (0, 0), (0, 0)), mode="wrap" if wrap else "edge").astype(np.float64)
    total = np.concatenate([np.zeros_like(strip[:1]), np.cumsum(strip, 0)])
    soft = (total[SUB:] - total[:-SUB]) / SUB  # entry i: mean over [i, i + SUB)
    soft = np.concatenate([np.zeros_like(soft[:1]), np.cumsum(soft, 0)])
    pixel = (soft[SUB:] - soft[:-SUB]) / SUB   # entry i, of the padded strip, is centred half a column late ...
    shift = pad - SUB // 2                     # ... which this offset takes back
    return pixel[shift:shift + len(strip) - 2 * pad].astype(np.float32)


@lru_cache(maxsize=None)
def drawn_background(ground):
    """(256 * SUB, 32, 3): sky and ground before integration."""
    x, y = (np.arange(COLUMNS * SUB) + .5) / SUB, np.arange(HEIGHT) + .5
    sky = hsv_to_rgb(x / COLUMNS, .30, .60)[:, None]
    wave = {0: np.sin(2 * np.pi * x / 8)[:, None] * np.ones(HEIGHT), 1: np.sin(2 * np.pi * (x[:, None] / 16 + y / 6)),
            2: np.sin(2 * np.pi * x / 32)[:, None] * np.ones(HEIGHT),
            3: np.sign(np.sin(2 * np.pi * x / 16)[:, None] * np.sin(2 * np.pi * (y - HORIZON) / 8))}[ground]
    floor = GROUND_RGB[ground] * (1 + .10 * wave[..., None])
    return np.where((y < HORIZON)[None, :, None], sky, floor).clip(0, 1)


@lru_cache(maxsize=None)
def background(ground):
    """(256 * SUB, 32, 3): row i is the pixel column whose left edge stands at sub-column i; sky and ground only."""
    return integrate(drawn_background(ground), wrap=True)


PANEL = HALF + 2  # a landmark's drawing, integrated, reaches less than this many columns from its middle


@lru_cache(maxsize=None)
def panel(ground, sector, landmark):
    """
    (2 * PANEL * SUB, 32, 3): the same as background() for the columns around a sector's middle, with that landmark
    (6 * shape + colour) standing there.
    """
    shape, colour = divmod(landmark, len(COLOURS))
    middle = (sector * SECTOR + SECTOR // 2) * SUB
    ids = np.arange(middle - (PANEL + 2) * SUB, middle + (PANEL + 2) * SUB) % (COLUMNS * SUB)
    x = (np.arange(len(ids)) + .5) / SUB - PANEL - 2
    y = (np.arange(HEIGHT * 8) + .5) / 8 - (TOP + FOOT) / 2
    grid = np.meshgrid(x, y, indexing="ij")
    outer = shape_mask(shape, HALF, *grid).reshape(len(ids), HEIGHT, 8).mean(2)[..., None]
    inner = shape_mask(shape, HALF - 1.25, *grid).reshape(len(ids), HEIGHT, 8).mean(2)[..., None]
    drawn = drawn_background(ground)[ids] * (1 - outer) + OUTLINE_RGB * (outer - inner) + COLOUR_RGB[colour] * inner
    return integrate(drawn, wrap=False)[2 * SUB:-2 * SUB]


def panorama(ground, landmarks):
    """(256 * SUB, 32, 3) float32: background() with the 8 landmarks of a world standing in it."""
    pano = background(ground).copy()
    for s, landmark in enumerate(landmarks):
        middle = (s * SECTOR + SECTOR // 2) * SUB
        pano[middle - PANEL * SUB:middle + PANEL * SUB] = panel(ground, s, int(landmark))
    return pano


def render(pano, headings):
    """
    pano      (256 * SUB, 32, 3)  from panorama()
    headings  (f,)  columns; the view is the 64 columns around the heading
    returns   (f, 3, 32, 64) float32 in [0, 1]
    """
    left = (np.asarray(headings, np.float64) - WIDTH // 2) * SUB
    whole = np.floor(left)
    part = (left - whole).astype(np.float32)[:, None, None]
    ids = (whole.astype(np.int64)[:, None] + np.arange(WIDTH) * SUB) % len(pano)
    flat = pano.reshape(len(pano), -1)
    frames = flat[ids]  # (f, 64, 32 * 3)
    frames += part * (flat[(ids + 1) % len(pano)] - frames)
    return np.ascontiguousarray(frames.reshape(-1, WIDTH, HEIGHT, 3).transpose(0, 3, 2, 1))


if __name__ == "__main__":
    import imageio.v3 as iio
    from pathlib import Path
    rows = [np.concatenate(list(clip(seed, 0, 160, kind)[::16].transpose(0, 2, 3, 1)), axis=1)
            for seed, kind in [(3, "turn"), (1, "turn"), (2, "linger"), (8, "aside"), (5, "aside")]]
    Path("out").mkdir(exist_ok=True)
    iio.imwrite("out/world.png", (np.concatenate(rows) * 255).round().astype(np.uint8))
    for seed in range(6):
        print(seed, world(seed).caption)
    print("out/world.png: ten frames a row, one a second")
