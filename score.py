"""
What came back right, read while the video is made: the judge on one chunk after another.

A landmark that leaves the view and comes back is asked of memory. Where it comes back as another one, either
memory no longer held a latent that shows it ("not kept"), or it did and the model did not follow ("not
used"). evaluate.py counts the same over finished videos.

    python score.py            # the score of a drawn world, and after its landmarks have been exchanged

References: none, the world is this project's own.
Leaves out: the first 9 frames' landmarks, which a sink never forgets, are not counted apart.
"""
import re
from dataclasses import replace

import numpy as np
from einops import rearrange

import judge
import world
from world import COLUMNS, FPS, SECTORS

WINDOW = 180 * FPS  # frames in which returns are counted


def motion_of(caption):
    """The Motion that a caption of the small world tells of; None for any other text"""
    if not re.fullmatch(world.GRAMMAR, caption):
        return None
    # Snow. The camera looks from east 90 degrees to the left and back, every 8 seconds.
    kind = "linger" if "lingering" in caption else "aside" if "looks" in caption else "turn"
    seconds = int(re.findall(r"\d+", caption)[-1])
    return world.Motion(kind, 1 if " right" in caption else -1, seconds)


class Score:
    """Of one video, from its first chunk on. What it keeps does not grow: it ends at WINDOW frames."""
    def __init__(self):
        self.frames = np.zeros((0, 3, world.HEIGHT, world.WIDTH), np.uint8)  # of the last chunk
        self.end = 0       # how many came so far
        # of the window, frame by frame; path and landmark as in judge.Reading
        self.path = np.zeros(0)
        self.landmark = np.zeros((0, SECTORS), int)
        self.held = np.zeros((0, SECTORS), bool)  # did memory hold a latent that shows this sector?
        self.views = {}    # latent -> (8,) bool: which sectors it shows; of those held, and of the newest
        self.motion = None
        self.since = 0     # first frame under this motion
        self.events = {}   # (sector, frame in which it left) -> came back right?, did memory hold it?
        self.first = np.full(SECTORS, -1)  # what stood in each sector at first ...
        self.now = np.full(SECTORS, -1)    # ... and what stands there now

    def read(self, frames, beside, caption):
        """
        frames   (f, h, w, 3) uint8 of the next chunk
        beside   numbers of the latents that it was made beside
        caption  it was made under; where that is not the small world's, nothing is due
        """
        motion = motion_of(caption)
        if motion != self.motion:
            self.motion, self.since = motion, self.end
        # 1. with the chunk before, which is read better now that it has neighbours on both sides
        older = len(self.path) - len(self.frames)
        frames = rearrange(frames, "f h w c -> f c h w")
        reading = judge.read_video(np.concatenate([self.frames, frames]))
        path = np.unwrap(np.concatenate([self.path[:older], reading.path]), period=COLUMNS)
        self.path = path[-WINDOW:]
        self.landmark = np.concatenate([self.landmark[:older], reading.landmark])[-WINDOW:]
        self.frames = frames
        self.end += len(frames)
        # 2. what a latent shows wholly: that of 4 frames, but the first latent is one frame
        whole = world.offsets(reading.path) <= world.WHOLE
        latents = (np.arange(self.end - len(whole), self.end) + 3) // 4
        views = {latent: whole[latents == latent].any(0) for latent in latents.tolist()}
        self.views = {latent: self.views[latent] for latent in beside} | views
        held = np.any([self.views[latent] for latent in beside], axis=0)
        # 3. what stands where
        for seen in reading.landmark:
            self.first = np.where(self.first < 0, seen, self.first)
            self.now = np.where(seen < 0, self.now, seen)
        # 4. what came back in the last minutes; of a Reading, reappearances() asks path and landmark alone
        self.held = np.concatenate([self.held, np.full((len(frames), SECTORS), held)])[-WINDOW:]
        self.ground = reading.ground[-1]
        start = self.end - len(self.path)
        self.events = {event: found for event, found in self.events.items() if event[1] >= start}
        for event in judge.reappearances(self, self.motion) if self.motion else []:
            left = start + event.left
            # what left under another motion is not missed, but counts where it is seen again
            if left >= self.since or event.shown >= 0:
                returned = min(event.returned, len(self.held) - 1)
                self.events[event.sector, left] = event.right, self.held[returned, event.sector]

    def count(self):
        """-> dict: returns in the last minutes, and how each ended"""
        wrong = [held for right, held in self.events.values() if not right]
        return {
            "returns": len(self.events),
            "right": len(self.events) - len(wrong),
            "not kept": wrong.count(False),
            "kept but not used": wrong.count(True),
        }

    def told(self):
        """-> dict of what a page shows; heading from 0 to 1, once round; colours of landmarks, by sector"""
        colours = [[world.COLOURS[colour] for colour in pair] for pair in world.PAIRS] + [None]
        return {
            "count": self.count(),
            "heading": self.path[-1] / COLUMNS % 1,
            "ground": world.GROUNDS[self.ground],
            "motion": self.motion and self.motion.kind,
            "first": [colours[landmark] for landmark in self.first],
            "now": [colours[landmark] for landmark in self.now],
        }


if __name__ == "__main__":
    spec = world.WorldSpec(0, "turn", 8)
    score = Score()
    for chunk in range(28):
        # out of view, every landmark becomes another after 10 s; memory holds the last 18 latents
        shown = replace(spec, counterfactual=chunk > 13)
        frames = world.clip(shown, max(0, 12 * chunk - 3), 12 if chunk else 9)
        frames = (rearrange(frames, "f c h w -> f h w c") * 255).astype(np.uint8)
        score.read(frames, range(3 * chunk)[-18:], world.make_world(spec).caption)
        if chunk in (13, 27):
            print(f"after {score.end / FPS:.1f} s:", score.count())
