"""
Slow-Fast Memory: a KV cache bounded to 21 latents, after any length of video.

The first latents stay for ever (sink), the last ones stay a moment (fast), and in between a few keyframes
stay for long (slow). A chunk that looks unlike the chunk before it is surprising: its first latent becomes a
keyframe, and the oldest keyframe is dropped. The same class runs every policy of the paper's comparison
(sizes and a keep rule), and runs on indices alone to tell what a policy would hold.

    Context Forcing, eq. 7:  keep chunk i  if  sim(k_i, k_{i-1}) < tau
    k_i = chunk_descriptor(keys of chunk i), sim = similarity(), tau = Policy.tau; all of it:
    Policy.should_keep()

When is what decided? A chunk of 3 latents enters fast memory with its keys of the clean pass; whether it is
kept is decided then. It moves when it leaves fast memory, so no latent is ever held twice:

    chunk i is made:           push() with its decision, keep_i; it is the newest of fast memory
    chunk i + 2 is to be made: evict(): latent 0 of chunk i moves to slow memory if keep_i, the others go

Who sees how much? 3 sink + 12 slow + 6 fast = 21. The chunk that the student generates counts as the newest 3
of fast: it sees 18 held latents and itself, at the 21 positions of the 81 frames that Wan was trained on. The
teacher's context is taken before room is made for that chunk, so it has all 21.

    python memory.py           # draws what slow memory holds over a minute, and what each policy holds then

The released code differs: it tests every chunk, compares the keys of noisy passes averaged over the batch,
and moves a kept latent at once, so that a frame may lie in memory twice. Here each video decides for itself,
with the keys of clean passes, and until memory is full nothing is dropped: the first 7 chunks are plain
causal attention.

References: Context Forcing, arXiv 2602.06028, section 3.2, eq. 7, figure 3 (its caption's "> tau" contradicts
the text; the text is followed).
Leaves out: a decision per layer (one per video here: the teacher's context must be a set of frames).
"""
from dataclasses import dataclass, field, replace
from functools import partial

import torch
import torch.nn.functional as F
from einops import reduce

CHUNK = 3  # latents generated together; the chunk being generated counts as part of fast memory


@dataclass(frozen=True)
class Policy:
    sink: int              # latents that are never evicted
    slow: int              # keyframes
    fast: int              # latest latents, the chunk being generated included
    keep: str = "uniform"  # "surprisal": chunks unlike the one before; "uniform": every chunk that is tested
    interval: int = 2      # test every so many chunks
    tau: float = 0.95      # surprisal: keep below this similarity; as it is here, that of the weights counts

    def __post_init__(self):
        if self.fast < CHUNK:
            raise ValueError(f"fast = {self.fast} has no room for the {CHUNK} latents being generated")

    @property
    def size(self):
        """Latents that it holds, the chunk being generated included"""
        return self.sink + self.slow + self.fast

    def calibrated(self, tau):
        """The policy with the tau of a network's weights, unless it names one of its own -> Policy"""
        return self if self.tau != Policy.tau else replace(self, tau=tau)

    def should_keep(self, chunk, similarity):
        """similarity (b,) to the chunk before -> (b,) bool: does the first latent become a keyframe?"""
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


@dataclass
class Entries:
    """m latent frames in the KV cache, oldest first, with the keys and values of their n tokens each."""
    frame: torch.Tensor                         # (b, m) frame numbers
    latent: torch.Tensor = None                 # (b, m, c, h, w)
    # one tensor a layer, (b, m, n, heads, d); keys are not rotated yet, because positions change with age
    keys: list = field(default_factory=list)
    values: list = field(default_factory=list)

    def __len__(self):
        return self.frame.shape[1]

    def apply(self, function, *others):
        """
        Each tensor becomes function(it, the same one of each of `others`): in place and layer by layer, as a
        second copy of Wan's slow memory would be 3.5 GB.
        returns  self
        """
        entries = [self, *others]
        # frame numbers and latents
        self.frame = function(*[e.frame for e in entries])
        if self.latent is not None:
            self.latent = function(*[e.latent for e in entries])
        # keys and values
        for layer in range(len(self.keys)):
            self.keys[layer] = function(*[e.keys[layer] for e in entries])
            self.values[layer] = function(*[e.values[layer] for e in entries])
        return self

    def __getitem__(self, frames):
        """A slice of the frames, uncopied."""
        copy = replace(self, keys=list(self.keys), values=list(self.values))
        return copy.apply(lambda x: x[:, frames])


def concatenate(segments):
    """Entries after one another in time, None = nothing -> Entries, a copy"""
    first, *others = [segment for segment in segments if segment is not None]
    return first[:].apply(lambda *parts: torch.cat(parts, dim=1), *others)


def replace_oldest(keep, held, newest):
    """
    One tensor of slow memory: held (b, m, ...) without its oldest frame, newest (b, 1, ...) behind, in the
    videos where keep (b,) says so; without asking the device for its values.
    """
    keep = keep.view(-1, *[1] * (held.ndim - 1))
    return torch.where(keep, torch.cat([held[:, 1:], newest], dim=1), held)


@dataclass
class LayerCache:
    """What a chunk attends to in one layer: rotated keys, and values, with room for its own behind them."""
    keys: torch.Tensor    # (b, s + room, heads, d)
    values: torch.Tensor  # (b, s + room, heads, d)
    held: int             # s

    def extend(self, keys, values):
        """
        The chunk's own (b, n, heads, d), rotated, behind what is held -> all keys, all values, (b, s + n,
        heads, d) each. Each pass over the chunk overwrites the one before it; where gradients are wanted, or
        the room is not that of the chunk, copies are made.
        """
        fits = self.held + keys.shape[1] == self.keys.shape[1]
        if torch.is_grad_enabled() or not fits:
            keys = torch.cat([self.keys[:, :self.held], keys], dim=1)
            return keys, torch.cat([self.values[:, :self.held], values], dim=1)
        self.keys[:, self.held:] = keys
        self.values[:, self.held:] = values
        return self.keys, self.values


class Memory:
    """What one rollout holds: three segments of Entries, None as long as nothing has come there."""
    def __init__(self, policy):
        self.policy = policy
        self.sink, self.slow, self.fast = None, None, None
        # for each latent in fast: its chunk's decision (b,) if it is the chunk's first, None if not
        self.pending = []

    def evict(self, new=CHUNK):
        """Moves the oldest of fast on until `new` latents fit: to the sink, then to slow memory."""
        p = self.policy
        while len(self.pending) > p.fast - new:
            oldest, self.fast = self.fast[:1], self.fast[1:]
            keep = self.pending.pop(0)
            if size(self.sink) < p.sink:
                self.sink = concatenate([self.sink, oldest])
            elif size(self.slow) < p.slow:
                # until all places are taken nothing is forgotten: decisions do not count yet
                self.slow = concatenate([self.slow, oldest])
            elif p.slow and keep is not None:
                self.slow.apply(partial(replace_oldest, keep), oldest)

    def change_policy(self, policy):
        """
        Another policy from here on, between two chunks. All that is held counts as fast memory once more and
        moves on as evict() has it: what the new sizes have room for stays, in the order of time.
        """
        held = self.read()
        self.policy = policy
        if held is None:
            return
        # what has left fast memory was kept
        kept = torch.ones(len(held.frame), dtype=torch.bool, device=held.frame.device)
        older = len(held) - len(self.pending)
        self.pending = [kept] * older + self.pending
        self.sink, self.slow, self.fast = None, None, held
        self.evict(0)

    def push(self, chunk, keep):
        """chunk: Entries of a finished chunk, from the clean pass, detached; keep (b,) from should_keep()."""
        self.fast = concatenate([self.fast, chunk])
        self.pending += [keep] + [None] * (len(chunk) - 1)

    def segments(self):
        """What is held, as sink | slow | fast; segments that hold nothing are left out."""
        return [segment for segment in (self.sink, self.slow, self.fast) if size(segment)]

    def frames(self):
        """Frame numbers of all that is held (b, m), or None before the first push."""
        frames = [segment.frame for segment in self.segments()]
        return torch.cat(frames, dim=1) if frames else None

    def read(self):
        """All that is held, sink | slow | fast, as one Entries (a copy), or None before the first push."""
        segments = self.segments()
        return concatenate(segments) if segments else None

    def drop_keys(self):
        """Frees all keys and values: set_layer() puts others in their place."""
        for segment in self.segments():
            segment.keys, segment.values = [], []

    def set_layer(self, keys, values):
        """Keys and values (b, m, n, heads, d) of the next layer, of all that is held, in read()'s order."""
        sizes = [len(segment) for segment in self.segments()]
        pieces = zip(self.segments(), keys.split(sizes, dim=1), values.split(sizes, dim=1))
        for segment, some_keys, some_values in pieces:
            segment.keys.append(some_keys)
            segment.values.append(some_values)


def size(segment):
    return 0 if segment is None else len(segment)


def chunk_descriptor(keys, pool="mean"):
    """
    What a chunk's keys say about how it looks (k_i of eq. 7).
    keys     one (b, n, heads, d) a layer, clean pass, before rotation
    pool     "mean" averages over the chunk's tokens (p = 1, Wan); "token" keeps one mean per place of the
             frame (p = n / 3), which sees a small turn that the mean over the frame hides
    returns  (layers, b, p, k d) float32
    """
    # over all tokens of the chunk, or over those at the same place of its latents
    pattern = "b (f n) k d -> b 1 (k d)" if pool == "mean" else "b (f n) k d -> b n (k d)"
    # layer by layer: all of them at once in float32 would be 0.9 GB of Wan
    layers = [reduce(k.float(), pattern, "mean", f=CHUNK) for k in keys]
    return torch.stack(layers)


def similarity(now, before):
    """Two descriptors -> (b,): cosine, mean over places and layers (eq. 7; over layers: our reading)"""
    return F.cosine_similarity(now, before, dim=-1).mean(dim=(0, 2))


def frames_in_memory(policy, keep, evict_first=True):
    """
    The same policy on indices alone.
    keep         (b, chunks) bool: the decision for each chunk (a keep rule, or what a run logged)
    evict_first  True: what a student sees beside its new chunk; False: before room is made, the context a
                 teacher gets
    returns      for each chunk 0..chunks a tensor (b, m): the frame numbers held when that chunk is generated
    """
    memory = Memory(policy)
    held = []
    b, chunks = keep.shape
    for i in range(chunks + 1):
        # what the chunk that is to be made would see
        if evict_first:
            memory.evict(CHUNK)
        frames = memory.frames()
        held.append(torch.zeros(b, 0, dtype=torch.long) if frames is None else frames)
        # the chunk is made: room for it, and in
        if i < chunks:
            memory.evict(CHUNK)
            frame = torch.arange(CHUNK * i, CHUNK * (i + 1)).expand(b, -1)
            memory.push(Entries(frame), keep[:, i])
    return held


if __name__ == "__main__":
    # A camera that turns for 15 s, rests for 15 s, and so on: what moves surprises, what rests does not.
    moving = torch.arange(81) // 20 % 2 == 0
    similar = torch.where(moving, 0.90, 0.99)[None]
    for name, policy in PRESETS.items():
        keep = torch.stack([policy.should_keep(i, similar[:, i]) for i in range(81)], dim=1)
        held = frames_in_memory(policy, keep)
        if name == "slowfast":
            print("a row every 3 s: . a second of the past, s sink, K keyframe, f fast; "
                  "the camera rests at 15-30 and 45-60 s")
            letters = "s" * policy.sink + "K" * policy.slow + "f" * policy.fast
            for i in range(4, 81, 4):
                row = ["."] * (3 * i // 4 + 1)
                # newest first, so that where two latents share a second the older one is drawn
                for frame, letter in reversed(list(zip(held[i][0].tolist(), letters))):
                    row[frame // 4] = letter
                print(f"{i * .75:4.0f} s {''.join(row)}")
        past = held[80][0].tolist()
        print(f"{name:10} at 60 s sees {len(past) + CHUNK:2d} latents, of the past {past}")
