"""
Which past each chunk of a training clip is trained with: what a memory policy would hold when it is made.

Headings of the small world are closed form: where the camera lingers, and what comes back, is known without
a frame. So is what memory holds (memory.frames_in_memory), and targets can be drawn more often where
something comes back that has left the view and is still held.

Does a chunk bring something back? The camera turns left, once in 12 chunks; every second one is kept:

    chunk   in view   one of them was out until   held when it is made                back?
        8   5, 6      latent 18                   0..2 | 4..14, 18 | 21..23           no, both are new
       11   3, 4      latent 27                   0..2 | 5..14, 18, 24 | 30..32       yes: 0 shows both
       18   7, 0      latent 45                   0..2 | 9..14, 18, .., 48 | 51..53   yes: 18 does

    python histories.py        # what memory would hold of a clip, and where something comes back

References: Context Forcing, arXiv 2602.06028, section 3.3 (histories of 5-20 s, selected by the memory's own
policy).
Leaves out: surprisal as a network would have it; a chunk in which the camera moves stands for it.
"""
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange

import world
from memory import CHUNK, PRESETS, frames_in_memory
from video import FRAMES
from world import WorldSpec

FULL_MEMORY = 7    # chunks, 21 latents: the shortest past that a target is drawn behind
CLIP_CHUNKS = 41   # of a clip: pasts of up to 40 chunks (30 s) and a target
EMPTY_CLIPS = 384  # clips that are also encoded without landmarks
LINGERS = 3.5      # columns: a chunk that moves less lingers; the slowest turn moves 4
BACK = .5          # share of the targets whose view is one that comes back

KEEP_RULES = ("uniform2", "uniform1", "moving")  # of slow memory: a third of the samples each
OTHER_POLICIES = ("longlive", "longlive21", "infinity", "window")  # those of the comparison ...
OTHER = .15  # ... and their share of the samples


@dataclass
class History:
    """What a batch of samples has seen when it predicts a chunk."""
    clip: torch.Tensor   # (b,) numbers of the clips
    chunk: torch.Tensor  # (b,) numbers of the chunks to predict
    frame: torch.Tensor  # (b, m) frame numbers of the latents in memory then, -1 = empty


def held_frames(policy, keep, evict_first=True):
    """
    memory.frames_in_memory as one tensor.
    keep     (b, chunks) bool: which chunks become keyframes
    returns  (b, chunks, 18, or 21 before room is made) frame numbers, -1 = empty
    """
    places = 18 if evict_first else 21
    held = frames_in_memory(policy, keep[:, :-1], evict_first)
    padded = [F.pad(frame, (0, places - frame.shape[1]), value=-1) for frame in held]
    return torch.stack(padded, dim=1)


class Histories:
    """What memory would hold at each chunk of each clip, and how often that chunk is drawn as a target."""
    def __init__(self, specs, chunks=CLIP_CHUNKS, evict_first=True):
        """
        specs        list of WorldSpec
        evict_first  as in memory.frames_in_memory: what a student sees, or (False) a teacher's context
        """
        # where the camera looks, in columns, unwrapped: 12 frames a chunk; the first latent of a video is one
        # frame, which counts four times
        frames = np.maximum(0, np.arange(FRAMES * chunks) - 3)
        worlds = [world.make_world(spec) for spec in specs]
        heading = np.stack([w.motion.heading(w.start, frames) for w in worlds])
        self.captions = [w.caption for w in worlds]

        # which landmarks are half in view or more, at each latent's last frame: (b, latents, 8) bool
        distance = torch.from_numpy(world.offsets(heading[:, 3::4]))
        self.in_view = distance < world.WIDTH / 2
        # when each landmark was last out of view, before each chunk: (b, chunks, 8), -1 = never
        frame = torch.arange(CHUNK * chunks)[:, None]
        gone = torch.where(distance > world.GONE, frame, -1)
        gone = gone.cummax(1).values[:, CHUNK - 1:-1:CHUNK]
        gone = F.pad(gone, (0, 0, 1, 0), value=-1)
        # When the first of the landmarks in view at each chunk's end was last out of view: to be remembered,
        # all of them must have been seen by then; -1 = none was out (b, chunks)
        was_gone = (gone >= 0) & self.in_view[:, CHUNK - 1::CHUNK]
        apart = torch.where(was_gone, gone, CHUNK * chunks)
        self.apart = apart.amin(2)
        self.apart[~was_gone.any(2)] = -1

        # how far the camera moves within each chunk, and so which chunks become keyframes, by each rule
        heading = rearrange(heading, "b (c f) -> b c f", f=FRAMES)
        self.moved = torch.from_numpy(np.abs(heading[:, :, -1] - heading[:, :, 0]))  # (b, chunks)
        every = torch.ones_like(self.moved, dtype=torch.bool)
        even = every & (torch.arange(chunks) % 2 == 0)
        self.keep = {"uniform2": even, "uniform1": every, "moving": even & (self.moved > LINGERS)}

        # and so what memory holds at each chunk: (b, chunks, 18 or 21) frame numbers, -1 = empty
        self.held = {}
        for name in KEEP_RULES + OTHER_POLICIES:
            policy = PRESETS["slowfast" if name in KEEP_RULES else name]
            self.held[name] = held_frames(policy, self.keep.get(name, every), evict_first)

        # where all landmarks in view were seen before one of them was gone, and are held: (b, chunks) bool
        self.back = {name: self.comes_back(held) for name, held in self.held.items()}

    def comes_back(self, held):
        """held (b, chunks, m) -> (b, chunks) bool"""
        clip = torch.arange(len(held))[:, None, None]
        is_before = (held >= 0) & (held <= self.apart[..., None])
        remembered = (self.in_view[clip, held] & is_before[..., None]).any(2)
        return (remembered | ~self.in_view[:, CHUNK - 1::CHUNK]).all(2)

    def draw_history(self, rng, batch, ahead=1, lookup=False):
        """
        ahead    so many chunks follow the past
        lookup   only what comes back, and in clips that are also encoded without landmarks
        returns  History
        """
        drawn = []
        for _ in range(batch):
            # a policy or keep rule
            other = rng.random() < OTHER and ahead == 1 and not lookup
            name = str(rng.choice(OTHER_POLICIES if other else KEEP_RULES))
            # the chunks whose view comes back, or all others
            clips = EMPTY_CLIPS if lookup else None
            last = self.moved.shape[1] - ahead
            options = self.back[name][:clips, FULL_MEMORY:last + 1]
            if not lookup and rng.random() > BACK:
                options = ~options
            if not options.any():
                options = torch.ones_like(options)
            # a clip first: among all chunks the first turns of fast clips would hardly ever be met
            clip = rng.choice(options.any(1).nonzero().flatten())
            chunk = FULL_MEMORY + rng.choice(options[clip].nonzero().flatten())
            drawn.append((clip, chunk, self.held[name][clip, chunk]))
        clip, chunk, frame = zip(*drawn)
        return History(torch.tensor(clip), torch.tensor(chunk), torch.stack(frame))


if __name__ == "__main__":
    # what memory would hold at chunk 30 of a clip, and which chunks are targets more often
    histories = Histories([WorldSpec(0, "aside")])
    print(histories.captions[0])
    print("memory at chunk 30:", histories.held["moving"][0, 30].tolist())
    print("something comes back:", "".join("#" if back else "." for back in histories.back["moving"][0]))
