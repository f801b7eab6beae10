"""
Slow-Fast Memory: which latents a video model still holds, in 21 places, after any length of time.

The first latents stay for ever (sink), the last ones stay a moment (fast), and in between a few keyframes stay for long
(slow). A chunk that looks unlike the chunk before it, by the cosine of their keys, is surprising: when it leaves fast
memory its first latent goes to slow memory, and the oldest keyframe is dropped. The same class runs every policy of the
paper's comparison (sizes and a keep rule), and runs on indices alone to tell what a policy would hold.

    python memory.py           # what each policy holds after 20 s and after 60 s

References: Context Forcing, arXiv 2602.06028, section 3.2, eq. 7, figure 3 (its caption's "> tau" contradicts the text;
the text is followed). Decided when a chunk enters, moved when it leaves, so no latent is ever held twice.
Leaves out: a decision per layer (one per sample here: the teacher's context must be a set of frames).
"""
from dataclasses import dataclass

import torch
import torch.nn.functional as F

CHUNK = 3  # latents generated together; the chunk being generated counts as part of fast memory


@dataclass(frozen=True)
class Policy:
    sink: int                # latents that are never evicted
    slow: int                # keyframes
    fast: int                # latest latents, the chunk being generated included
    keep: str = "uniform"    # "surprisal": chunks unlike the one before; "uniform": every chunk that is tested
    interval: int = 2        # test every so many chunks
    tau: float = 0.95        # surprisal: keep below this similarity

    def decide(self, chunk, similarity):
        """similarity (b,) of this chunk's keys to the chunk before -> (b,) bool: will its first latent be kept?"""
        tested = chunk % self.interval == 0
        if self.keep == "surprisal":
            return (similarity < self.tau) & tested
        return torch.full_like(similarity, tested, dtype=torch.bool)


PRESETS = {  # --memory: sizes and keep rules of the paper's comparison; positions are a separate switch
    "slowfast": Policy(3, 12, 6, "surprisal"),
    "uniform1": Policy(3, 12, 6, "uniform", interval=1),
    "uniform2": Policy(3, 12, 6, "uniform", interval=2),
    "window": Policy(0, 0, 21),       # Self-Forcing, sliding
    "longlive": Policy(3, 0, 9),      # LongLive: 12 latents, 3 s
    "longlive21": Policy(3, 0, 18),   # the same, enlarged to 21
    "infinity": Policy(1, 0, 5),      # Infinity-RoPE: 6 latents, 1.5 s
}


class Memory:
    """
    What one rollout holds. An entry is one latent frame; a cell is a tensor (b, f, ...) of anything that belongs to
    frames: frame numbers, latents, keys, values. All cells move together; entries are in the order of time.
    """
    def __init__(self, policy):
        self.policy, self.sink, self.slow, self.fast = policy, None, None, None
        self.marks = []   # one (is it its chunk's first latent, keep decision (b,)) for each latent in fast
        self.full = policy.slow == 0

    def make_room(self, new=CHUNK):
        """Evict the oldest of fast until `new` latents fit: into the sink, then densely into slow, then by decision."""
        p = self.policy
        while len(self.marks) > p.fast - new:
            oldest, self.fast = [c[:, :1] for c in self.fast], [c[:, 1:] for c in self.fast]
            first, keep = self.marks.pop(0)
            if size(self.sink) < p.sink:
                self.sink = join(self.sink, oldest)
            elif not self.full:  # warm-up: until all places are taken nothing is forgotten, so no test either
                self.slow = join(self.slow, oldest)
                self.full = size(self.slow) == p.slow
            elif p.slow and first:
                for i, (c, o) in enumerate(zip(self.slow, oldest)):  # cell by cell: a second slow memory is 3.5 GB of Wan
                    shifted = torch.cat([c[:, 1:], o], dim=1)
                    self.slow[i] = torch.where(keep.view(-1, *[1] * (c.ndim - 1)), shifted, c)  # without asking the device

    def push(self, cells, keep):
        """cells: list of (b, 3, ...) of one finished chunk, from the clean pass, detached; keep (b,) from decide()."""
        self.fast = join(self.fast, cells)
        self.marks += [(i == 0, keep) for i in range(cells[0].shape[1])]

    def parts(self):
        """What is held, as sink | slow | fast, each a list of cells; parts that hold nothing are left out."""
        return [part for part in (self.sink, self.slow, self.fast) if size(part)]

    def read(self):
        """All that is held, as cells (b, f, ...), sink | slow | fast; an empty list before the first push."""
        return [torch.cat(c, dim=1) for c in zip(*self.parts())]

    def rewrite(self, i, cell):
        """Puts another cell number i in place, for all that is held, in the order of read()."""
        for part, piece in zip(self.parts(), cell.split([size(part) for part in self.parts()], dim=1)):
            part[i:i + 1] = [piece]


def size(cells):
    return cells[0].shape[1] if cells else 0


def join(old, new):
    return [torch.cat(c, dim=1) for c in zip(old, new)] if old else list(new)


def summary(keys, pool="mean"):
    """
    What a chunk's keys say about how it looks: keys, one (b, n, k, d) a layer, clean pass, before rotation.
    returns  (layers, b, p, k d) float32: pool "mean" averages over the chunk's tokens (p = 1, Wan); "token" keeps one
             mean per place of the frame (p = n / 3), which sees a small turn that the mean over the frame hides
    """
    def pooled(x):  # layer by layer: all of them at once in float32 would be 0.9 GB of Wan
        return x.mean(1, keepdim=True) if pool == "mean" else x.unflatten(1, (CHUNK, -1)).mean(1)
    return torch.stack([pooled(k.flatten(-2).float()) for k in keys])


def similarity(now, before):
    """Two summaries -> (b,): cosine, averaged over places and layers (eq. 7; the mean over layers is our reading)."""
    return F.cosine_similarity(now, before, dim=-1).mean(dim=(0, 2))


def plan(policy, keep, new=CHUNK):
    """
    The same policy on indices alone.
    keep     (b, chunks) bool: the decision for each chunk (a keep rule, or what a run logged)
    new      room made before each chunk (3; 0 = what is held before room is made, the context a teacher gets)
    returns  for each chunk 0..chunks a tensor (b, f): the frame numbers held when that chunk is generated
    """
    memory, contexts = Memory(policy), []
    for i in range(keep.shape[1] + 1):
        memory.make_room(new)
        held = memory.read()
        contexts.append(held[0] if held else torch.zeros(len(keep), 0, dtype=torch.long))
        if i < keep.shape[1]:
            memory.make_room(CHUNK)
            memory.push([torch.arange(CHUNK * i, CHUNK * (i + 1)).expand(len(keep), -1)], keep[:, i])
    return contexts


if __name__ == "__main__":
    for name, policy in PRESETS.items():
        surprising = torch.rand(1, 81, generator=torch.Generator().manual_seed(0)) < 0.6  # pretend 6 chunks in 10 surprise
        keep = torch.stack([policy.decide(i, torch.where(surprising[:, i], 0.9, 1.0)) for i in range(81)], dim=1)
        for chunk in (27, 80):
            held = plan(policy, keep)[chunk][0].tolist()
            print(f"{name:10} at {chunk * .75:4.1f} s: {len(held) + CHUNK:2d} latents, past {held}")
