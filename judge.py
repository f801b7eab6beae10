"""
Reads a video of the small world back: where the camera looks, what it sees, and what came back right.

It is given nothing but frames. A landmark covers rows 8..25, so what it can never cover tells where the
camera looks, and what stands in each sector is then the nearest of 30 drawings:

    rows  0..3   sky                       one rainbow:    heading
    rows  4..7   hills                     three of them:  heading, more sharply
    rows  8..25  hills [ landmark ] hills  which of 30 it is
    rows 26..31  ground                    the colour: which of 4 it is; the stripes: heading

A frame is as valid as it is close to the nearest one that world.render() draws, in steps of 1 / SUB column.
Recall is read from reappearances: a landmark was read, then no pixel of it was in view, then it is back. Its
last reading before the absence and the first one after it are compared: what changes while in view is not
blamed on memory. One that the caption's motion brings back, and that does not come, counts as wrong.

    wholly in view    =======                      =========    here it is read
    a pixel in view   ===========              =============    returned  first frame that shows a pixel again
    not in view                  --------------                 left      first frame without a pixel of it
                                 ^ left        ^ returned

    python judge.py            # prints what it reads from a world whose landmarks are exchanged

References: none, the world is this project's own.
Leaves out: scenes of anything but sky, hills, ground and one landmark a sector.
"""
from dataclasses import dataclass, replace
from functools import cache
from itertools import combinations

import numpy as np
from einops import rearrange

from world import (COLUMNS, FOOT, FPS, GONE, GROUND_RGB, LANDMARKS, SECTOR, SECTORS, SKY, SUB, TOP, WHOLE,
                   WIDTH, WorldSpec, apart, clip, make_world, offsets, panorama)

# The best drawing is at most half as far as any other. Measured, with margins tested: clips, blurred and at
# 26 dB, < .48 as far; halves, morphs, mixed colours, nothing, > .62.
READABLE = .5


# ---- what each frame shows ---------------------------------------------------------------------------------

@dataclass
class Reading:
    path: np.ndarray      # (f,) heading in columns, unwrapped; misread frames are mended
    ground: np.ndarray    # (f,) index into GROUNDS
    landmark: np.ndarray  # (f, 8) by sector: which of PAIRS; -1 where not wholly in view or not readable
    psnr: np.ndarray      # (f,) dB, peak 1, against the nearest frame that can be rendered


def read_video(frames):
    """frames (f, 3, 32, 64) float in [0, 1] or uint8 -> Reading, from the frames alone."""
    x = rearrange(frames, "f c h w -> f w h c")  # pixel columns first, as panoramas are
    if x.dtype == np.uint8:
        x = x / np.float32(255)
    # The ground, by its mean colour.
    colour = x[:, :, FOOT:].mean((1, 2))
    ground = ((colour[:, None] - GROUND_RGB) ** 2).sum(-1).argmin(1)
    # The rest, of all frames over one ground together.
    heading, psnr = np.zeros((2, len(x)))
    landmark = np.zeros((len(x), SECTORS), int)
    for g in np.unique(ground):
        same = ground == g
        some = np.ascontiguousarray(x[same], np.float32)
        heading[same], landmark[same], psnr[same] = read_frames(some, g)
    return Reading(track(heading), ground, landmark, psnr)


def read_frames(x, ground):
    """x (f, 64, 32, 3), all over one ground -> heading (f,) in [0, 256), Reading's landmark and psnr"""
    # 1. The heading i, in sub-columns: the most alike of all views without landmarks.
    templates, norms = heading_templates(ground)
    i = (uncovered(x) @ templates.T - norms).argmax(1)
    # 2. The landmark of each sector: the nearest of 30 drawings.
    drawings = landmark_drawings(ground)
    distance = landmark_distances(x, i, drawings)
    landmark = distance.argmin(-1)
    # 3. The heading once more, as known landmarks have the sharpest edges.
    for step in (4, 2, 1):
        near = i, i - step, i + step
        error = np.stack([frame_error(x, there, landmark, drawings) for there in near])
        i = np.choose(error.argmin(0), near)
    # 4. What counts: landmarks wholly in view. How far is the frame from the nearest that can be rendered?
    nearest, second = np.sort(rearrange(distance, "f s l -> l f s"), 0)[:2]
    readable = (offsets(i / SUB) <= WHOLE) & (nearest <= READABLE * second)
    psnr = -10 * np.log10(error.min(0).clip(1e-10))
    return i / SUB % COLUMNS, np.where(readable, landmark, -1), psnr


def view(i):
    """(f,) headings in sub-columns -> (f, 64): where in the panorama the pixels have their left edges"""
    return (i[:, None] + (np.arange(WIDTH) - WIDTH // 2) * SUB) % (COLUMNS * SUB)


def uncovered(x):
    """
    What no landmark covers.
    x        (f, 64, 32, 3)
    returns  (f, 64 * 9): for each column the mean of the sky, of the hills and of the ground. A mean weighs
             as much as its rows.
    """
    sky, hills, _, floor = np.split(x, [SKY, TOP, FOOT], axis=2)
    means = [part.mean(2) * part.shape[2] ** .5 for part in (sky, hills, floor)]
    return rearrange(np.concatenate(means, -1), "f w d -> f (w d)")


@cache
def heading_templates(ground):
    """
    Finds the nearest heading by one product: |x - b|^2 = x^2 - 2 x b + b^2, b all views without landmarks.
    returns  templates (256 * SUB, 64 * 9) and norms (256 * SUB,): the nearest has the largest
             x @ template - norm
    """
    b = uncovered(panorama(ground, ())[view(np.arange(COLUMNS * SUB))])
    return b, (b ** 2).sum(1) / 2


@cache
def landmark_drawings(ground):
    """(30, 256 * SUB, 32, 3): the panoramas in which every sector has the same landmark."""
    return np.stack([panorama(ground, [landmark] * SECTORS) for landmark in range(LANDMARKS)])


def landmark_distances(x, i, drawings):
    """
    Squared distance between what stands in each sector and the 30 drawings, over the columns in view.
    x         (f, 64, 32, 3) frames
    i         (f,) their headings in sub-columns
    drawings  from landmark_drawings()
    returns   (f, 8, 30)
    """
    column = view(i)
    seen = x[:, :, TOP:FOOT]
    # Column by column, then the sum over those of each sector.
    error = np.zeros((len(x), WIDTH, LANDMARKS), np.float32)
    for landmark, drawn in enumerate(drawings):
        error[..., landmark] = ((drawn[column, TOP:FOOT] - seen) ** 2).sum((2, 3))
    sectors = (column // (SECTOR * SUB))[..., None] == np.arange(SECTORS)
    return np.einsum("fwl,fws->fsl", error, sectors).clip(1e-3)


def frame_error(x, i, landmark, drawings):
    """(f,) mean squared distance to the frames at sub-columns i (f,) with landmarks (f, 8)."""
    column = view(i)
    stands = np.take_along_axis(landmark, column // (SECTOR * SUB), 1)
    return ((drawings[stands, column] - x) ** 2).mean((1, 2, 3))


# ---- the camera's path -------------------------------------------------------------------------------------

def track(heading):
    """(f,) columns -> (f,) unwrapped, up to 4 misread frames in a row replaced, turning points kept."""
    near = np.lib.stride_tricks.sliding_window_view(np.pad(heading, 4, mode="edge"), 9)  # (f, 9)
    # The median on a circle is the one that is nearest to all.
    far = apart(near[:, :, None] - near[:, None]).sum(-1)
    median = np.choose(far.argmin(-1), near.T)
    return np.unwrap(np.where(apart(heading - median) < 6, heading, median), period=COLUMNS)


def turning_rate(path, motion):
    """
    Columns travelled over those that the caption's motion asks for; negative: the wrong way. Or from end to
    end, if that is further off: a camera that goes on where it should turn back travels as much.
    """
    asked = motion.heading(path[0], np.arange(len(path)))

    def lengths(x):
        # in steps of a second; from end to end
        steps = np.abs(x[FPS:] - x[:-FPS])
        return steps.sum(), np.ptp(x)
    rates = np.divide(lengths(path), lengths(asked))
    same_way = np.sign((path - path[0]).mean() * (asked - asked[0]).mean())
    return float(same_way * rates[np.abs(rates - 1).argmax()])


# ---- reappearances: what came back -------------------------------------------------------------------------

@dataclass
class Reappearance:
    """A landmark that left and came back, or that should have."""
    sector: int
    left: int       # first frame without a pixel of it
    absence: float  # seconds without a pixel of it; if it did not come, as the caption's motion has it
    before: int     # last readable landmark before it left
    shown: int      # first readable one of the visit in which it came back, -1 if there is none
    in_sink: bool   # wholly in view in the first 9 frames, which a sink never forgets: counted apart

    @property
    def returned(self):
        """First frame that shows a pixel of it again: where memory is asked."""
        return self.left + round(self.absence * FPS)

    @property
    def right(self):
        return self.shown == self.before


def reappearances(reading, motion):
    """All of a video, sector by sector, given the caption's motion: list of Reappearance."""
    found = []
    path = reading.path
    for sector, far in enumerate(offsets(path).T):
        landmark = reading.landmark[:, sector]
        gone = np.cumsum(far > GONE)  # how many frames so far showed no pixel of it
        whole = np.flatnonzero(far <= WHOLE)
        for last, back in zip(whole, [*whole[1:], len(path) - 1]):
            # What was it, before it left?
            before = first_readable(landmark[last::-1])
            if before < 0 or gone[back] == gone[last]:
                continue  # not readable so far, or not out of view
            left = int(np.searchsorted(gone, gone[last], "right"))
            # When does the motion bring it back? A quarter and a second later it is missed.
            wait, away = due_back(motion, path, left, sector)
            shown = -1
            if left + 1.25 * wait + FPS > back:
                if last == whole[-1]:
                    continue  # the video ends before that
                away = gone[back] - gone[last]
                shown = first_readable(landmark[gone == gone[back]])
            in_sink = bool(far[:9].min() <= WHOLE)
            found.append(Reappearance(sector, left, float(away / FPS), before, shown, in_sink))
    return found


def first_readable(landmark):
    return next((int(x) for x in landmark if x >= 0), -1)


def due_back(motion, path, left, sector):
    """
    A landmark left at frame `left` of the camera's path: frames until it is wholly in view again, and how
    many of them show no pixel of it, if the camera goes on as the motion does from there; inf if it never
    comes.
    """
    period = motion.seconds * FPS
    ideal = motion.heading(path[0], np.arange(2 * period))
    # Where in the first period is the camera now? Nearest to this heading, going this way.
    direction = np.sign(path[left] - path[max(0, left - FPS // 2)])
    same_way = np.sign(np.diff(ideal))[:period] == direction
    far = apart(ideal[:period] - path[left])
    now = np.where(same_way, far, np.inf).argmin()
    # From there on, for a period. A landmark at the edge of the view may be missed by a few columns.
    far = offsets(ideal[now:now + period])[:, sector]
    due = np.flatnonzero(far <= WHOLE - 4)
    if not same_way.any() or not len(due):
        return np.inf, np.inf
    return due[0], (far[:due[0]] > GONE).sum()


def is_in_memory(event, reading, latents):
    """
    The ceiling of recall: does one of `latents`, the numbers of those held at event.returned, show it wholly
    in view? Latent 0 is video frame 0, latent j frames 4j - 3 .. 4j.
    """
    whole = np.flatnonzero(offsets(reading.path)[:, event.sector] <= WHOLE)
    return bool(np.isin((whole + 3) // 4, latents).any())


# ---- chance: what recall is by luck ------------------------------------------------------------------------

def landmark_map(landmark):
    """Reading.landmark (f, 8) -> 8 numbers: what each sector shows most, -1 for nothing."""
    count = (landmark[..., None] == np.arange(LANDMARKS)).sum(0)
    return np.where(count.any(1), count.argmax(1), -1).tolist()


def chance(maps):
    """How often two videos of a model, (v, 8) landmark maps, agree on a sector."""
    agree = []
    for one, other in combinations(maps, 2):
        agree += [a == b for a, b in zip(one, other) if min(a, b) >= 0]
    return float(np.mean(agree)) if agree else np.nan


if __name__ == "__main__":
    spec = WorldSpec(0, "turn", 8)
    video = clip(spec, 0, 14 * FPS)
    # After 6 s every landmark is another: what was out of view then comes back wrong.
    video[6 * FPS:] = clip(replace(spec, counterfactual=True), 6 * FPS, 8 * FPS)
    for event in reappearances(read_video(video), make_world(spec).motion):
        verdict = "right" if event.right else "WRONG"
        print(f"kind {event.before:2}, {event.absence:.1f} s away, comes back as {event.shown:2}: {verdict}")
