"""
Reads a video of the small world back: where the camera looks, what it sees, and what came back right.

It is given nothing but frames. A landmark covers rows 6..25 and at most 18 of its sector's 32 columns, so
what it can never cover tells where the camera looks, and what stands in its box is then one of 24 drawings:

    rows  0..5   sky                 the hue is the compass: heading
    rows  6..25  sky [landmark] sky  between boxes: heading; in a box: which of 24 it is
    rows 27..31  ground              the colour: which of 4 it is; the pattern: heading, more sharply

A frame is as valid as it is close to the nearest one that world.render() draws, in steps of 1 / SUB column.
Recall is read from reappearances: a landmark was read, then no pixel of it was in view, then it is back. Its
last reading before the absence and the first one after it are compared: what changes while in view is not
blamed on memory.

    wholly in view    =======                      =========    due       first frame wholly in view again
    a pixel in view   ===========              =============    returned  first frame that shows a pixel again
    not in view                  --------------                 left      first frame without a pixel of it
                                 ^ left        ^ returned
                                                   ^ due

    python judge.py            # prints what it reads from a world, and from one whose past was exchanged

References: none, the world is this project's own.
Leaves out: scenes of anything but sky, ground and one landmark a sector.
"""
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from einops import rearrange
from numpy.lib.stride_tricks import sliding_window_view

from world import (COLOURS, COLUMNS, FOOT, FPS, GONE, GROUND_RGB, HALF, HORIZON, LANDMARKS, PANEL, SECTOR,
                   SECTORS, SHAPES, SUB, TOP, WHOLE, WIDTH, WorldSpec, clip, make_world, offsets, panorama,
                   parse_caption, wrap)

READABLE = .5  # confidence from which a reading counts: the best drawing is at most half as far as any other.
               # Rendered clips, blurred and at 26 dB: > .65; morphs, halves, mixed colours, nothing: < .40
VALID = 17     # dB; plain grey, the most flattering level, reaches 16.3
STILL = 1      # columns within a second either way; the slowest caption moves 2
VIEW = (np.arange(WIDTH) - WIDTH // 2) * SUB  # sub-columns of a frame's pixels, counted from the heading


# ---- what each frame shows ---------------------------------------------------------------------------------

@dataclass
class Reading:
    heading: np.ndarray     # (f,) columns in [0, 256)
    ground: np.ndarray      # (f,) index into GROUNDS
    landmark: np.ndarray    # (f, 8) by sector: 6 * shape + colour, -1 where not wholly in view
    confidence: np.ndarray  # (f, 8) 1 - distance to that drawing / to the next best; 0 if not wholly in view
    psnr: np.ndarray        # (f,) dB, peak 1, against the nearest frame that can be rendered
    box_psnr: np.ndarray    # (f,) the same over the boxes of landmarks wholly in view: always one or two
    frozen: np.ndarray      # (f,) bool: valid, but the camera stands

    @property
    def sure(self):
        """(f, 8): landmark where it is readable, else -1."""
        return np.where(self.confidence >= READABLE, self.landmark, -1)


def read_video(frames):
    """frames (f, 3, 32, 64) float in [0, 1] or uint8 -> Reading, from the frames alone."""
    x = rearrange(np.asarray(frames), "f c h w -> f w h c")  # pixel columns first, as panoramas are
    x = x / np.float32(255) if x.dtype == np.uint8 else x.astype(np.float32)
    x = np.ascontiguousarray(x)
    # The ground, by its mean colour.
    colour = x[:, :, FOOT + 1:].mean((1, 2))
    ground = ((colour[:, None] - GROUND_RGB) ** 2).sum(-1).argmin(1)
    # Frames of one ground are read together, 1,024 at a time, so that a long video needs little memory.
    order, parts = [], []
    for g in np.unique(ground):
        same = np.flatnonzero(ground == g)
        for n in np.split(same, range(1024, len(same), 1024)):
            order.append(n)
            parts.append(read_frames(x[n], g))
    in_time = np.argsort(np.concatenate(order))
    fields = zip(*(vars(part).values() for part in parts))
    reading = Reading(*(np.concatenate(field)[in_time] for field in fields))
    # Frozen: the camera moves nowhere within a second either way.
    path = np.pad(track(reading.heading), FPS, mode="edge")
    moved = np.ptp(sliding_window_view(path, 2 * FPS + 1), axis=-1)
    reading.frozen = (reading.psnr >= VALID) & (moved < STILL) & (len(x) > FPS)
    return reading


def read_frames(x, ground):
    """x (f, 64, 32, 3), all over one ground -> Reading; whether the camera stands is not known here"""
    # 1. The heading i, in sub-columns: the most alike of all views without landmarks.
    templates, norms = heading_templates(ground)
    i = (rearrange(uncovered(x), "f w d -> f (w d)") @ templates.T - norms).argmax(1)
    # 2. The landmark of each sector: the nearest of 24 drawings.
    drawings = landmark_drawings(ground)
    distance = landmark_distances(x, i, drawings)
    landmark = distance.argmin(-1)
    nearest, second = rearrange(np.partition(distance, 1, -1)[..., :2], "f s two -> two f s")
    # 3. The heading once more: known landmarks have the sharpest edges. Down a parabola, twice.
    for step in (SUB, SUB // 2):
        before = frame_errors(x, i - step, landmark, drawings).mean((1, 2))
        here = frame_errors(x, i, landmark, drawings).mean((1, 2))
        after = frame_errors(x, i + step, landmark, drawings).mean((1, 2))
        shift = step / 2 * (before - after) / np.maximum(before - 2 * here + after, 1e-9)
        i = i + np.rint(shift.clip(-step, step)).astype(int)
    # 4. How far is the frame from the nearest that can be rendered, and how far are the landmarks in it?
    error = frame_errors(x, i, landmark, drawings)
    whole = np.abs(offsets(i / SUB)) <= WHOLE
    in_box = (box_columns(i, HALF + 1) & whole[:, None]).any(-1)  # (f, 64)
    box_rows = error[:, :, TOP:FOOT].mean(-1)
    box_error = (box_rows * in_box).sum(1) / in_box.sum(1)
    return Reading(heading=i / SUB % COLUMNS,
                   ground=np.full(len(x), ground),
                   landmark=np.where(whole, landmark, -1),
                   confidence=np.where(whole, 1 - nearest / second, 0),
                   psnr=decibel(error.mean((1, 2))),
                   box_psnr=decibel(box_error),
                   frozen=np.zeros(len(x), bool))


def decibel(error):
    return (-10 * np.log10(np.maximum(error, 1e-10))).astype(np.float64)


def uncovered(x):
    """
    What no landmark covers.
    x        (f, 64, 32, 3)
    returns  (f, 64, 22): for each column the mean of the sky's top (3), the ground's 5 rows (15), the mean of
             the sky between landmarks (3), and its square (1). A mean weighs as much as its rows.
    """
    top = x[:, :, :TOP].mean(2)
    between = x[:, :, TOP:HORIZON].mean(2)
    # Generated frames get tinted: how the sky's hue runs tells more than the hue itself.
    tint = .6 * top.mean(1, keepdims=True)
    top = (top - tint) * TOP ** .5
    between = (between - tint) * (HORIZON - TOP) ** .5
    floor = rearrange(x[:, :, FOOT + 1:], "f w h c -> f w (h c)")
    square = (between ** 2).sum(-1, keepdims=True)
    return np.concatenate([top, floor, between, square], -1)


@lru_cache(maxsize=None)
def heading_templates(ground):
    """
    Finds the nearest heading by one product: |x - b|^2 = x^2 - 2 x b + b^2, for all views b without
    landmarks. In a landmark's box the sky between landmarks is left out, x^2 and b alike. A view is two
    sectors wide, so that for every heading as many columns count.
    returns  templates (256 * SUB, 64 * 22), norms (256 * SUB,): the nearest has the largest x @ template -
             norm
    """
    column = np.arange(COLUMNS * SUB)[:, None] + VIEW  # (256 * SUB, 64)
    b = uncovered(panorama(ground, ())[column % (COLUMNS * SUB)])
    off_middle = np.abs(column / SUB % SECTOR + .5 - SECTOR // 2)
    between = off_middle >= HALF + 1  # in no box
    b[..., -4:-1] *= between[..., None]
    b[..., -1] = between / -2  # times uncovered()'s square: - x^2 / 2 of the sky that counts
    norms = (b[..., :-1] ** 2).sum((1, 2)) / 2
    return rearrange(b, "i w d -> i (w d)"), norms


@lru_cache(maxsize=None)
def landmark_drawings(ground):
    """(24, 256 * SUB, 32, 3): the panoramas in which every sector has the same landmark."""
    return np.stack([panorama(ground, [landmark] * SECTORS) for landmark in range(LANDMARKS)])


def landmark_distances(x, i, drawings):
    """
    Squared distance between what stands in each sector's box and the 24 drawings, over the columns in view.
    x         (f, 64, 32, 3) frames
    i         (f,) their headings in sub-columns
    drawings  from landmark_drawings()
    returns   (f, 8, 24); 1 out of view
    """
    distance = np.ones((len(x), SECTORS, LANDMARKS), np.float32)
    in_view = np.abs(offsets(i / SUB)) < WIDTH // 2 + PANEL
    for s, phase in np.ndindex(SECTORS, SUB):  # frames at the same sub-column phase share their drawings
        n = np.flatnonzero(in_view[:, s] & (i % SUB == phase))
        # The drawings, on the 22 columns of the box.
        start = s * SECTOR + SECTOR // 2 - PANEL
        box = slice(start * SUB + phase, (start + 2 * PANEL) * SUB, SUB)
        drawn = rearrange(drawings[:, box, TOP:FOOT], "a x h c -> a x (h c)")
        # The frames, on the same columns; those out of view are black, and not compared.
        first = wrap(start - i[n] // SUB + WIDTH // 2)
        column = first[:, None] + np.arange(2 * PANEL)
        inside = ((column >= 0) & (column < WIDTH)).astype(np.float32)  # (n, 22)
        seen = x[n[:, None], column.clip(0, WIDTH - 1), TOP:FOOT]
        seen = rearrange(seen, "n x h c -> n x (h c)") * inside[..., None]
        # |seen - drawn|^2 = seen^2 + drawn^2 - 2 seen drawn
        seen_square = (seen ** 2).sum((1, 2))[:, None]
        drawn_square = inside @ (drawn ** 2).sum(-1).T
        product = np.tensordot(seen, drawn, ((1, 2), (1, 2)))
        distance[n, s] = seen_square + drawn_square - 2 * product
    return distance.clip(1e-3)  # float32 leaves about 1e-4 of an exact match


def box_columns(i, half):
    """(f, 64, 8) bool: which columns, are within `half` columns of which landmark's middle."""
    column = VIEW[:, None] / SUB + .5
    return np.abs(column - offsets(i / SUB)[:, None]) < half


def frame_errors(x, i, landmark, drawings):
    """(f, 64, 32): each pixel's squared distance to the frame at sub-columns i (f,) with landmarks (f, 8)."""
    column = (i[:, None] + VIEW) % (COLUMNS * SUB)  # (f, 64)
    stands = np.take_along_axis(landmark, column // (SECTOR * SUB), 1)
    return ((drawings[stands, column] - x) ** 2).mean(-1)


# ---- the camera's path -------------------------------------------------------------------------------------

def track(heading):
    """(f,) columns -> (f,) unwrapped, up to 4 misread frames in a row replaced, turning points kept."""
    near = sliding_window_view(np.pad(heading, 4, mode="edge"), 9)  # (f, 9)
    # The median on a circle is the one that is nearest to all.
    apart = np.abs(wrap(near[:, :, None] - near[:, None])).sum(-1)
    median = near[np.arange(len(near)), apart.argmin(-1)]
    is_close = np.abs(wrap(heading - median)) < 6
    return np.unwrap(np.where(is_close, heading, median), period=COLUMNS)


def travelled(path):
    """Columns, in steps of a second."""
    return np.abs(path[FPS:] - path[:-FPS]).sum()


def turning_rate(heading, caption):
    """Columns travelled over those of the caption's motion; negative: the wrong way; nan: foreign caption."""
    parsed = parse_caption(caption)
    if parsed is None:
        return np.nan
    _, motion = parsed
    path = track(heading)
    asked = motion.heading(path[0], np.arange(len(path)))
    same_way = np.sign((path - path[0]).mean() * (asked - asked[0]).mean())
    return float(same_way * travelled(path) / travelled(asked))


# ---- reappearances: what came back -------------------------------------------------------------------------

@dataclass
class Reappearance:
    """A landmark that left and came back, or that should have (a miss)."""
    sector: int
    left: int       # first frame without a pixel of it
    due: int        # first frame in which it is wholly in view again; of a miss: in which it should have been
    absence: float  # seconds without a pixel of it; of a miss: as the caption's motion has it
    first: int      # first readable landmark of this sector in the video
    before: int     # last readable one before it left
    shown: int      # first readable one of the visit in which it came back, -1 if there is none
    in_sink: bool   # wholly in view in the first 9 frames, which a sink never forgets: counted apart
    missed: bool    # the caption's motion made it due, and it did not come

    @property
    def returned(self):
        """First frame that shows a pixel of it again: where memory is asked."""
        return self.left + round(self.absence * FPS)

    @property
    def right(self):
        return self.shown == self.before

    @property
    def as_first(self):
        return self.shown == self.first


def reappearances(reading, caption):
    """All of a video, in the order in which they were due: list of Reappearance."""
    parsed = parse_caption(caption)
    motion = parsed[1] if parsed else None
    path = track(reading.heading)
    found = []
    for sector in range(SECTORS):
        found += sector_reappearances(sector, path, reading.sure[:, sector], motion)
    return sorted(found, key=lambda event: event.due)


def sector_reappearances(sector, path, sure, motion):
    """path (f,) from track(), sure (f,) its readable landmarks, motion None: a foreign caption."""
    far = np.abs(offsets(path)[:, sector])
    gone = np.cumsum(far > GONE)  # how many frames so far showed no pixel of it
    # A visit: frames in which it is wholly in view, none between them in which it is gone.
    whole = np.flatnonzero(far <= WHOLE)
    visits = np.split(whole, np.flatnonzero(np.diff(gone[whole])) + 1)
    never = np.zeros(0, int)
    found = []
    for visit, back in zip(visits, [*visits[1:], never]):
        # What was it, before it left?
        before = first_readable(sure[whole[whole <= visit.max(initial=-1)]][::-1])
        if before < 0 or gone[-1] == gone[visit[-1]]:
            continue  # not readable so far, or in view to the end
        # When does the caption's motion bring it back? A quarter and a second later it is a miss.
        left = int(np.searchsorted(gone, gone[visit[-1]] + 1))
        wait, away = due_back(motion, path, left, sector)
        next_seen = back[0] if len(back) else len(far)
        missed = bool(left + 1.25 * wait + FPS < next_seen)
        if missed:
            due = left + wait
            back = never
        elif len(back):
            due = back[0]
            away = gone[due] - gone[visit[-1]]
        else:
            continue  # the video ends before it could be due
        found.append(Reappearance(
            sector=sector, left=left, due=int(due), absence=float(away / FPS),
            first=first_readable(sure[whole]), before=before, shown=first_readable(sure[back]),
            in_sink=bool(far[:9].min() <= WHOLE), missed=missed))
    return found


def first_readable(sure):
    readable = sure[sure >= 0]
    return int(readable[0]) if len(readable) else -1


def due_back(motion, path, left, sector):
    """
    A landmark left at frame `left` of the camera's path: frames until it is wholly in view again, and how
    many of them show no pixel of it, if the camera goes on as the motion does from there; inf if it never
    comes.
    """
    if motion is None:
        return np.inf, np.inf
    # Two periods of the motion, 2,048 steps each.
    t = np.linspace(0, 2 * motion.seconds * FPS, 4097)
    ideal = motion.heading(path[0], t)
    # Where in the first period is the camera now? At this heading, going this way.
    direction = np.sign(path[left] - path[max(0, left - FPS // 2)])
    same_way = np.flatnonzero(np.sign(np.diff(ideal[:2049])) == direction)
    if len(same_way) == 0:
        return np.inf, np.inf
    now = same_way[np.abs(wrap(ideal[same_way] - path[left])).argmin()]
    # From there on, for a period. A landmark at the edge of the view may be missed by a few columns.
    far = np.abs(offsets(ideal[now:now + 2049])[:, sector])
    due = np.flatnonzero(far <= WHOLE - 4)
    if len(due) == 0:
        return np.inf, np.inf
    return t[due[0]], t[(far[:due[0]] > GONE).sum()]


def is_in_memory(event, reading, latents):
    """
    The ceiling of recall: does one of `latents`, the numbers of those held at event.returned, show it wholly
    in view? Latent 0 is video frame 0, latent j frames 4j - 3 .. 4j.
    """
    whole = np.abs(offsets(track(reading.heading))[:, event.sector]) <= WHOLE
    return any(whole[max(0, 4 * j - 3):4 * j + 1].any() for j in latents)


def chunk_of(frame):
    """The chunk that draws a video frame: three latents of four frames, but the first latent is one frame."""
    return (frame + 3) // 4 // 3


# ---- chance: what recall is by luck ------------------------------------------------------------------------

def landmark_map(sure):
    """Reading.sure (f, 8) -> 8 numbers: what each sector shows most, -1 for nothing."""
    votes = [np.bincount(sector[sector >= 0], minlength=LANDMARKS) for sector in sure.T]
    return [int(vote.argmax()) if vote.any() else -1 for vote in votes]


def chance(maps):
    """How often two videos of a model, (v, 8) landmark maps, agree on a sector."""
    # How many videos show each landmark there, (8, 24); pairs of them agree.
    count = (np.array(maps)[..., None] == np.arange(LANDMARKS)).sum(0)
    agree = (count * (count - 1)).sum()
    pairs = (count.sum(1) * (count.sum(1) - 1)).sum()
    return float(agree / pairs) if pairs else np.nan


if __name__ == "__main__":
    names = [f"{colour} {shape}" for shape in SHAPES for colour in COLOURS] + ["nothing"]
    spec = WorldSpec(0, "turn", 8)
    caption = make_world(spec).caption
    video = clip(spec, 0, 14 * FPS)
    damaged = video.copy()
    damaged[6 * FPS:] = clip(replace(spec, counterfactual=True), 6 * FPS, 8 * FPS)
    for title, frames in ((caption, video), ("The same, with other landmarks from second 6 on:", damaged)):
        print(title)
        for event in reappearances(read_video(frames), caption):
            print(f"  {names[event.before]:16} away for {event.absence} s, now {names[event.shown]:16}",
                  "right" if event.right else "WRONG")
