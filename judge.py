"""
Reads frames of the small world back: where the camera looks, which landmarks it sees, and what came back right.

    python judge.py            # prints what it reads from a world

References: none, the world is this project's own.
"""
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from world import (COLUMNS, FOOT, FPS, GONE, GROUND_RGB, HALF, HEIGHT, HORIZON, PANEL, SECTOR, SECTORS, SUB, TOP, WHOLE, WIDTH,
                   WorldSpec, clip, make_world, offsets, panorama, parse_caption, wrap)

# ---- the judge: what each frame shows --------------------------------------------------------------------------------
# What no landmark covers tells ground and heading; a landmark is then the nearest of its 24 drawings; a frame
# is as valid as it is close to the nearest one that render() draws (at headings in steps of 1 / SUB column).

READABLE = .5  # confidence from which a reading counts: the best drawing is at most half as far as any other.
               # Rendered clips, blurred and at 26 dB: > .65; morphs, halves, mixed colours, nothing: < .40
VALID = 17     # dB; plain grey, the most flattering level, reaches 16.3
PLAIN = .07    # standard deviation of a frame's pixels: rendered > .15, grey at 26 dB .05
STILL = 1      # columns within a second either way; the slowest caption moves 2


@dataclass
class Reading:
    heading: np.ndarray     # (f,) columns in [0, 256)
    ground: np.ndarray      # (f,) index into GROUNDS
    landmark: np.ndarray    # (f, 8) by sector: 6 * shape + colour, -1 where not wholly in view
    confidence: np.ndarray  # (f, 8) 1 - distance to that drawing / to the next best; 0 if not wholly in view
    psnr: np.ndarray        # (f,) dB, peak 1, against the nearest renderable frame
    box_psnr: np.ndarray    # (f,) the same over the boxes of landmarks wholly in view, nan if there is none
    kind: np.ndarray        # (f,) "ok", "frozen" (valid, but the camera stands); not valid: "grey", "noise"

    @property
    def sure(self):
        """(f, 8): landmark where it is readable, else -1."""
        return np.where(self.confidence >= READABLE, self.landmark, -1)


def read_video(frames):
    """frames (f, 3, 32, 64) float in [0, 1] or uint8 -> Reading, from the frames alone."""
    x = np.asarray(frames).transpose(0, 3, 2, 1)  # pixel columns first, as panoramas are
    x = (x / np.float32(255) if x.dtype == np.uint8 else x.astype(np.float32)).reshape(len(x), WIDTH, -1)
    floor = x.reshape(-1, WIDTH, HEIGHT, 3)[:, :, FOOT + 1:].mean((1, 2))
    ground = ((floor[:, None] - GROUND_RGB) ** 2).sum(-1).argmin(1)
    heading, psnr, box_psnr = np.zeros((3, len(x)))
    landmark, confidence = np.zeros((len(x), SECTORS), int), np.zeros((len(x), SECTORS))
    for g in np.unique(ground):
        same = np.flatnonzero(ground == g)
        for n in np.split(same, range(1024, len(same), 1024)):  # so that a long video needs little memory
            heading[n], landmark[n], confidence[n], psnr[n], box_psnr[n] = read_frames(x[n], g)
    moved = np.ptp(sliding_window_view(np.pad(track(heading), FPS, mode="edge"), 2 * FPS + 1), axis=-1)
    frozen = (moved < STILL) & (len(x) > FPS)
    bad = np.where(x.reshape(len(x), -1, 3).std(1).mean(1) < PLAIN, "grey", "noise")
    kind = np.where(psnr >= VALID, np.where(frozen, "frozen", "ok"), bad)
    return Reading(heading, ground, landmark, confidence, psnr, box_psnr, kind)


def read_frames(x, ground):
    """(f, 64, 32 * 3) over one ground -> heading, landmark, confidence, psnr, box_psnr of a Reading."""
    templates, norms = compass(ground)
    i = (uncovered(x) @ templates.T - norms).argmax(1)  # heading, sub-columns
    drawings = sheets(ground)
    distance = compare(x, i, drawings)  # (f, 8, 24)
    best = distance.argmin(-1)
    nearest, second = np.partition(distance, 1, -1)[..., :2].transpose(2, 0, 1)
    for step in (SUB, SUB // 2):  # known landmarks have the sharpest edges: go down a parabola
        before, here, after = (errors(x, i + k, best, drawings).mean((1, 2)) for k in (-step, 0, step))
        shift = step / 2 * (before - after) / np.maximum(before - 2 * here + after, 1e-9)
        i = i + np.rint(shift.clip(-step, step)).astype(int)
    error = errors(x, i, best, drawings)
    offset = offsets(i / SUB)
    whole = np.abs(offset) <= WHOLE
    in_box = np.abs(np.arange(WIDTH)[:, None] + .5 - WIDTH // 2 - offset[:, None]) < HALF + 1  # (f, 64, 8)
    in_box = (in_box & whole[:, None]).any(-1)
    with np.errstate(divide="ignore", invalid="ignore"):  # no landmark in view: nan, as promised
        box_error = (error[:, :, TOP:FOOT].mean(-1) * in_box).sum(1) / in_box.sum(1)
    psnr, box_psnr = (-10 * np.log10(np.maximum(e, 1e-10)) for e in (error.mean((1, 2)), box_error))
    return i / SUB % COLUMNS, np.where(whole, best, -1), np.where(whole, 1 - nearest / second, 0), psnr, box_psnr


def errors(x, i, best, drawings):
    """(f, 64, 32): each pixel's squared distance to the frame at sub-columns i with landmarks best (f, 8)."""
    column = (i[:, None] + (np.arange(WIDTH) - WIDTH // 2) * SUB) % (COLUMNS * SUB)  # (f, 64)
    sheet = np.take_along_axis(best, column // (SECTOR * SUB), 1)
    return ((drawings[sheet, column] - x) ** 2).reshape(-1, WIDTH, HEIGHT, 3).mean(-1)


@lru_cache(maxsize=None)
def sheets(ground):
    """(24, 256 * SUB, 32 * 3): the panoramas in which every sector has the same landmark."""
    return np.stack([panorama(ground, [a] * SECTORS) for a in range(24)]).reshape(24, COLUMNS * SUB, -1)


@lru_cache(maxsize=None)
def compass(ground):
    """
    Finds the nearest heading by one product: over what no landmark covers, |x - b|^2 = x^2 - 2 x b + b^2, x^2 and b left
    out in the boxes. A view is two periods of boxes wide: every heading counts as many columns.
    returns  (256 * SUB, 64 * 22), (256 * SUB,)
    """
    column = np.arange(COLUMNS * SUB)[:, None] + (np.arange(WIDTH) - WIDTH // 2) * SUB
    seen = panorama(ground, ()).reshape(COLUMNS * SUB, -1)[column % (COLUMNS * SUB)]
    b = uncovered(seen).reshape(-1, WIDTH, 22)
    gap = np.abs(column / SUB % SECTOR + .5 - SECTOR // 2) >= HALF + 1
    b[..., 18:21] *= gap[..., None]
    b[..., 21] = gap / -2
    return b.reshape(len(b), -1), (b[..., :21] ** 2).sum((1, 2)) / 2


def uncovered(x):
    """
    (f, 64, 32 * 3) -> (f, 64 * 22): per column the mean of the sky's top, the ground's rows, the mean of the sky between
    landmarks, and its square. A mean weighs as much as its rows.
    """
    x = x.reshape(len(x), WIDTH, HEIGHT, 3)
    top, between = x[:, :, :TOP].mean(2), x[:, :, TOP:HORIZON].mean(2)
    tint = .6 * top.mean(1, keepdims=True)  # generated frames get tinted; how the sky's hue runs tells more
    top, between = (top - tint) * TOP ** .5, (between - tint) * (HORIZON - TOP) ** .5
    floor = x[:, :, FOOT + 1:].reshape(len(x), WIDTH, -1)
    square = (between ** 2).sum(-1, keepdims=True)
    return np.concatenate([top, floor, between, square], -1).reshape(len(x), -1)


def compare(x, i, drawings):
    """
    Squared distance between what stands in each sector's box and the 24 drawings, over the columns in view.
    x (f, 64, 32 * 3) frames, i (f,) their headings in sub-columns, drawings from sheets() -> (f, 8, 24); 1 out of view
    """
    distance, in_view = np.ones((len(x), SECTORS, 24), np.float32), np.abs(offsets(i / SUB)) < WIDTH // 2 + PANEL
    for s, phase in np.ndindex(SECTORS, SUB):  # frames at the same sub-column phase share their drawings
        n = np.flatnonzero(in_view[:, s] & (i % SUB == phase))
        start = s * SECTOR + SECTOR // 2 - PANEL
        drawn = drawings[:, start * SUB + phase:(start + 2 * PANEL) * SUB:SUB, 3 * TOP:3 * FOOT]
        column = wrap(start - i[n] // SUB + WIDTH // 2)[:, None] + np.arange(2 * PANEL)  # (n, 22), in frames
        inside = ((column >= 0) & (column < WIDTH)).astype(np.float32)
        seen = x[n[:, None], column.clip(0, WIDTH - 1), 3 * TOP:3 * FOOT] * inside[..., None]
        distance[n, s] = ((seen ** 2).sum((1, 2))[:, None] + inside @ (drawn ** 2).sum(-1).T
                          - 2 * np.tensordot(seen, drawn, ((1, 2), (1, 2))))
    return distance.clip(1e-3)  # float32 leaves about 1e-4 of an exact match


# ---- events: what came back ------------------------------------------------------------------------------------------
# A landmark was read, then no pixel of it was in view, then it is due back. The last reading before the
# absence and the first one after it are compared: what changes while in view is not blamed on the absence.

@dataclass
class Event:
    sector: int
    left: int       # first frame without a pixel of it
    due: int        # first frame in which it is wholly in view again; of a miss: in which it should have been
    seconds: float  # for how long no pixel of it was in view; of a miss: would have been
    first: int      # first readable landmark of this sector in the video
    before: int     # last readable one before it left
    read: int       # first readable one of the visit in which it came back, -1 if there is none
    sink: bool      # wholly in view in the first 9 frames, which a sink never forgets: counted apart
    miss: bool      # the caption's motion made it due, and it did not come

    @property
    def back(self):
        """First frame that shows a pixel of it again: where memory is asked."""
        return self.left + round(self.seconds * FPS)

    @property
    def recall(self):
        return self.read == self.before

    @property
    def drift(self):
        return self.read == self.first


def track(heading):
    """(f,) columns -> (f,) unwrapped, up to 4 misread frames in a row replaced, turning points kept."""
    near = sliding_window_view(np.pad(heading, 4, mode="edge"), 9)  # (f, 9)
    apart = np.abs(wrap(near[:, :, None] - near[:, None])).sum(-1)  # the median on a circle is nearest to all
    median = near[np.arange(len(near)), apart.argmin(-1)]
    return np.unwrap(np.where(np.abs(wrap(heading - median)) < 6, heading, median), period=COLUMNS)


def events(reading, caption):
    """What left and came back, or should have, in the order in which it was due: list of Event."""
    heading, sure, found = track(reading.heading), reading.sure, []
    parsed = parse_caption(caption)
    for s, far in enumerate(np.abs(offsets(heading)).T):
        whole, gone = np.flatnonzero(far <= WHOLE), np.cumsum(far > GONE)
        visits = np.split(whole, np.flatnonzero(np.diff(gone[whole])) + 1)
        first = before = -1
        for visit, back in zip(visits, visits[1:] + [np.zeros(0, int)]):
            seen = sure[visit, s][sure[visit, s] >= 0]
            if len(seen):
                first, before = int(seen[0]) if first < 0 else first, int(seen[-1])
            if first < 0 or gone[-1] == gone[visit[-1]]:
                continue  # not readable so far, or in view to the end
            left = int(np.searchsorted(gone, gone[visit[-1]] + 1))
            wait, away = due_back(parsed[1], heading, left, s) if parsed else (np.inf, np.inf)
            miss = left + 1.25 * wait + FPS < (back[0] if len(back) else len(far))
            if not miss and not len(back):
                continue  # the video ends before it could be due
            due, away = (left + wait, away) if miss else (back[0], gone[back[0]] - gone[visit[-1]])
            answer = [] if miss else sure[back, s][sure[back, s] >= 0]
            answer = int(answer[0]) if len(answer) else -1
            sink = bool(far[:9].min() <= WHOLE)
            found.append(Event(s, left, int(due), float(away / FPS), first, before, answer, sink, bool(miss)))
    return sorted(found, key=lambda e: e.due)


def due_back(motion, heading, left, sector):
    """
    A landmark left at frame `left`: frames until it is wholly in view again, and those without a pixel of it,
    if the camera goes on as the motion does from that heading and direction; inf if it never has those.
    """
    t = np.linspace(0, 2 * motion.seconds * FPS, 4097)
    path = motion.heading(heading[0], t)
    direction = np.sign(heading[left] - heading[max(0, left - FPS // 2)])
    phase = np.flatnonzero(np.sign(np.diff(path[:2049])) == direction)
    if len(phase) == 0:
        return np.inf, np.inf
    phase = phase[np.abs(wrap(path[phase] - heading[left])).argmin()]
    far = np.abs(offsets(path[phase:phase + 2049])[:, sector])
    due = np.flatnonzero(far <= WHOLE - 4)  # a landmark at the edge of a look aside is not owed to the column
    return (t[due[0]], t[(far[:due[0]] > GONE).sum()]) if len(due) else (np.inf, np.inf)


def turning_rate(reading, caption):
    """Columns travelled, in steps of a second, over those of the caption's motion; negative the wrong way."""
    parsed = parse_caption(caption)
    if parsed is None:
        return np.nan
    real = track(reading.heading)
    asked = parsed[1].heading(real[0], np.arange(len(real)))
    ours, theirs = (np.abs(path[FPS:] - path[:-FPS]).sum() for path in (real, asked))
    return float(np.sign((real - real[0]).mean() * (asked - asked[0]).mean()) * ours / theirs)


def chance(readings):
    """How often two videos of a model agree on a sector, by what each shows most: what recall is by luck."""
    votes = [[np.bincount(sector[sector >= 0], minlength=24) for sector in r.sure.T] for r in readings]
    shown = np.eye(24)[np.argmax(votes, -1)] * np.any(votes, -1, keepdims=True)  # (v, 8, 24)
    n = shown.sum(0)  # (8, 24) videos that show this landmark there
    pairs = (n.sum(1) * (n.sum(1) - 1)).sum()
    return float((n * (n - 1)).sum() / pairs) if pairs else np.nan


def chunk_of(frame):
    """The chunk that draws a frame: latent 0 is frame 0, latent j frames 4j - 3 .. 4j, a chunk 3 latents."""
    return (frame + 3) // 4 // 3


def held(event, reading, context):
    """The ceiling: does a latent of `context`, the numbers of those held at event.back, show the landmark wholly in view?"""
    whole = np.abs(offsets(track(reading.heading))[:, event.sector]) <= WHOLE
    return any(whole[max(0, 4 * j - 3):4 * j + 1].any() for j in context)


if __name__ == "__main__":
    reading = read_video(clip(WorldSpec(3), 0, 160))
    print(make_world(WorldSpec(3)))
    for event in events(reading, make_world(WorldSpec(3)).caption):
        print(event)
