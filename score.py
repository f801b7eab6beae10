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

FRAMES = 12         # of a chunk
WINDOW = 180 * FPS  # frames in which returns are counted


def world_of(caption):
    """The World, houses unknown, that a caption of the small world tells of; None for any other text"""
    if not re.fullmatch(world.GRAMMAR, caption):
        return None
    # Snow. The camera looks from east 90 degrees to the left and back, every 8 seconds.
    ground, point = re.match(r"(\w+).* from (\w+)", caption).groups()
    kind = "linger" if "lingering" in caption else "aside" if "looks" in caption else "turn"
    *degrees, seconds = map(int, re.findall(r"\d+", caption))
    motion = world.Motion(kind, 1 if " right" in caption else -1, seconds, *degrees)
    return world.World(world.GROUNDS.index(ground), (), 64 * world.POINTS.index(point), motion)


class Score:
    """Of one video, from its first chunk on. Keeps 16 bytes a frame."""
    def __init__(self):
        self.frames = np.zeros((0, 3, world.HEIGHT, world.WIDTH), np.uint8)  # of the last chunk
        self.path = np.zeros(0)                          # as in judge.Reading, of all frames
        self.landmark = np.zeros((0, SECTORS), np.int8)
        self.ground = 0
        self.motion = None
        self.since = 0    # first frame under this motion
        self.held = []    # of each chunk: the latents that it was made beside
        self.events = {}  # (sector, frame in which it left) -> came back right?, did memory hold it?
        self.first = np.full(SECTORS, -1)  # what stood in each sector at first ...
        self.now = np.full(SECTORS, -1)    # ... and what stands there now

    def read(self, frames, held, motion):
        """
        frames  (f, h, w, 3) uint8 of the next chunk
        held    numbers of the latents that it was made beside
        motion  the caption's Motion, None: not known, nothing is due
        """
        if motion != self.motion:
            self.motion, self.since = motion, len(self.path)
        # 1. with the chunk before, which is read better now that it has neighbours on both sides
        before = len(self.path) - len(self.frames)
        frames = rearrange(frames, "f h w c -> f c h w")
        reading = judge.read_video(np.concatenate([self.frames, frames]))
        path = np.concatenate([self.path[:before], reading.path])
        self.path = np.unwrap(path, period=COLUMNS)
        self.landmark = np.concatenate([self.landmark[:before], reading.landmark.astype(np.int8)])
        self.frames = frames
        self.ground = int(reading.ground[-1])
        # 2. what stands where
        for seen in reading.landmark:
            self.first = np.where(self.first < 0, seen, self.first)
            self.now = np.where(seen < 0, self.now, seen)
        # 3. what came back in the last minutes
        self.held.append(held)
        start = max(0, len(path) - WINDOW)
        self.events = {event: found for event, found in self.events.items() if event[1] >= start}
        if motion:
            self.find_returns(replace(reading, path=self.path[start:], landmark=self.landmark[start:]), start)

    def find_returns(self, window, start):
        """window: judge.Reading from frame `start` on"""
        for event in judge.reappearances(window, self.motion):
            left = start + event.left
            # what left under another motion is not missed, but counts where it is seen again
            if left >= self.since or event.shown >= 0:
                chunk = min(judge.chunk_of(start + event.returned), len(self.held) - 1)
                held = judge.is_in_memory(event, self, self.held[chunk])
                self.events[event.sector, left] = event.right, held

    def count(self):
        """-> dict: returns in the last minutes, and how each ended"""
        wrong = [held for right, held in self.events.values() if not right]
        return {
            "returns": len(self.events),
            "right": len(self.events) - len(wrong),
            "not kept": wrong.count(False),
            "kept but not used": wrong.count(True),
        }


if __name__ == "__main__":
    spec = world.WorldSpec(0, "turn", 8)
    score = Score()
    for chunk in range(28):
        # out of view, every landmark becomes another after 10 s; memory holds the last 21 latents
        shown = replace(spec, counterfactual=chunk > 13)
        frames = world.clip(shown, max(0, FRAMES * chunk - 3), FRAMES if chunk else 9)
        frames = (rearrange(frames, "f c h w -> f h w c") * 255).astype(np.uint8)
        score.read(frames, range(3 * chunk - 18, 3 * chunk), world.make_world(spec).motion)
        if chunk in (13, 27):
            print(f"after {len(score.path) / FPS:.1f} s:", score.count())
