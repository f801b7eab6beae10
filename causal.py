"""
The causal start model: stage init. Not in the paper, which takes a causal model that others have trained.

Distillation needs a student that is causal and remembers before it starts. It is made in two parts:

    ar     teacher forcing: a chunk is noised and predicted from the real latents that memory would hold then.
           A pass is a pack: one clean past, several noised copies of the target behind it, and an attention
           mask in which the copies see the past but not each other.
    ode    regression to the model's own ODE trajectories (CausVid): at each of the student's few noise levels
           it predicts the x0 that the rest of 16 Euler steps reaches from there.

    python causal.py           # draws who sees whom in a pack

References: CausVid, arXiv 2412.07772 (ODE trajectories); Self-Forcing, arXiv 2506.08009 (teacher forcing
mask).
Leaves out: diffusion forcing (a noise level for each latent of the past).
"""
import math
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange

import world
from config import BadInput
from data import encode_world, make_files, take_frames
from flow import (Rollout, add_noise, augment_context_noise, denoise, draw_noise, flow_matching_loss,
                  over_frames, schedule, shifted, v_from_x0)
from histories import CLIP_CHUNKS, FULL_MEMORY, LINGERS, Histories, held_frames
from memory import CHUNK, PRESETS
from rope import rope_cos_sin
from tensors import hash_content
from world import WorldSpec

COPIES = 4               # noised copies of a target share one clean past: most of the compute is supervised
ODE_CLIPS = 256          # videos of the causal model's own ...
ODE_CHUNKS = 20          # ... their length ...
ODE_STEPS = 16           # ... and the Euler steps of a chunk

# Which history a pass has, and how often.
HISTORIES = {
    # the first chunk, of far more worlds: only here the text alone tells how fast the camera moves
    "opening": .15,
    "prefix": .25,  # the first 7 chunks, each predicted from those before it: text to video
    "full": .30,    # all that a memory policy holds
    # the same, but without landmarks since one of those in view was last out of it: they must be looked up,
    # continuing the picture is not enough
    "lookup": .30,
}
FOLDER_HISTORIES = {"prefix": .15, "full": .85}  # the same for folders of videos


# ---- packs: teacher forcing in one pass --------------------------------------------------------------------

@dataclass
class Pack:
    """Latents of a clean past, and chunks to predict behind it: copies of one chunk, or different ones."""
    past: torch.Tensor          # (b, p, c, h, w) clean; anything where nothing is there
    past_frame: torch.Tensor    # (b, p) frame numbers, -1 = nothing there
    target: torch.Tensor        # (b, f, c, h, w) clean
    target_frame: torch.Tensor  # (b, f) frame numbers, three of a chunk after another


def stratified_noise(x0, shift):
    """
    x0 (b, f, ...) noised, each chunk at a level of its own: spread evenly over 0..1 in each sample, and
    shifted
    returns  x_t, t (b, f), v
    """
    copies = x0.shape[1] // CHUNK
    within = torch.rand(len(x0), copies)
    stratum = torch.rand(len(x0), copies).argsort(1)
    t = shifted((within + stratum) / copies, shift).repeat_interleave(CHUNK, dim=1).to(x0.device)
    noise = torch.randn(x0.shape, device=x0.device)
    return add_noise(x0, noise, t), t, noise - x0


def packed_attention_mask(pack):
    """
    Who sees whom: a latent of the past what is not newer, chunk mates included; a latent of the target every
    older chunk of the past, and its own chunk, in its own copy.
    returns  (b, p + f, p + f) bool, rows see columns
    """
    # older chunks of the past, where something is there
    past_chunk = pack.past_frame // CHUNK
    target_chunk = pack.target_frame // CHUNK
    chunk = torch.cat([past_chunk, target_chunk], dim=1)
    is_clean = F.pad(pack.past_frame >= 0, (0, target_chunk.shape[1]))
    older = (chunk[:, :, None] > chunk[:, None]) & is_clean[:, None]
    # latents of one clean chunk, or of one copy, see each other
    copy = torch.arange(target_chunk.shape[1]) // CHUNK
    group = torch.cat([past_chunk, 1_000_000 + copy.expand_as(target_chunk)], dim=1)
    return older | (group[:, :, None] == group[:, None])


def packed_forward(net, text, pack, xt, t, grid):
    """
    As in a Rollout a chunk sees what memory holds, but all in one pass.
    xt, t    (b, f, c, h, w), (b, f) the noised target
    returns  v (b, f, c, h, w) of the target
    """
    b, p = pack.past_frame.shape
    mask = packed_attention_mask(pack)
    tokens = mask.shape[1] * math.prod(grid)
    if tokens > 2 ** 16:
        raise BadInput(f"init has {tokens} tokens a clip, and attention under a mask is sure up to 65,536: "
                       "give a smaller --size")
    # bounded positions (b, p + f): the past from 0 on; a target chunk follows what it sees of the past
    target = mask[:, p:, :p].sum(2) + pack.target_frame % CHUNK
    positions = torch.cat([torch.arange(p).expand(b, -1), target], dim=1)
    rope = rope_cos_sin(positions.to(t.device), *grid, net.config.head_dim)
    # the past is clean, t = 0
    x = torch.cat([pack.past, xt], dim=1)
    levels = F.pad(t, (p, 0))
    v, _ = net(x, levels, text, rope, mask=mask.to(t.device), with_kv=False)
    return v[:, p:]


def chunk_frames(chunk):
    """Chunk numbers (b,) -> the frame numbers of their latents (b, 3)"""
    return CHUNK * chunk[:, None] + torch.arange(CHUNK)


# ---- ar: teacher forcing -----------------------------------------------------------------------------------

def draw_kind(histories, rng, done):
    """-> which of HISTORIES, the same in all processes; done, the share of the updates, changes nothing"""
    return str(rng.choice(list(histories), p=list(histories.values())))


def draw_pack(clips, kind, rng, batch):
    """
    clips    data.WorldClips or ClipFolder
    kind     of HISTORIES
    returns  (b,) numbers of the clips, and a Pack of them
    """
    if kind == "opening":
        return opening_pack(clips, rng, batch)
    history = clips.draw_history(rng, batch, lookup=kind == "lookup")
    pack = prefix_pack(clips, history) if kind == "prefix" else history_pack(clips, history, kind)
    return history.clip, pack


def teacher_forcing_loss(net, text, pack, grid, shift, context_noise):
    """
    Flow matching on the target of a Pack.
    shift          of the noise levels
    context_noise  most noise on a latent of the clean past
    returns        scalar loss
    """
    xt, t, v_star = stratified_noise(pack.target, shift)
    pack = replace(pack, past=augment_context_noise(pack.past, context_noise))
    v = packed_forward(net, text, pack, xt, t, grid)
    return flow_matching_loss(v, v_star).mean()


def opening_pack(clips, rng, batch):
    """-> (b,) numbers of the clips, and noised copies of their first chunk, behind nothing"""
    opening = torch.from_numpy(rng.integers(len(clips.openings), size=batch))
    frame = torch.arange(CHUNK).repeat(COPIES).expand(batch, -1)
    target = take_frames(clips.openings, opening, frame, clips.device)
    return len(clips.latents) + opening, Pack(target[:, :0], frame[:, :0], target, frame)


def prefix_pack(clips, history):
    """Plain block-causal training on the first 7 chunks: each sees those before it."""
    frame = torch.arange(CHUNK * FULL_MEMORY).expand(len(history.clip), -1)
    latents = clips.frames(history.clip, frame)
    return Pack(latents, frame, latents, frame)


def history_pack(clips, history, kind):
    """A long past at once, as a policy holds it, and noised copies of the next chunk."""
    past = clips.frames(history.clip, history.frame)
    if kind == "lookup":
        hidden = history.frame > clips.apart[history.clip, history.chunk][:, None]
        empty = take_frames(clips.empty, history.clip, history.frame, past.device)
        past = torch.where(over_frames(hidden).to(past.device), empty, past)
    target_frame = chunk_frames(history.chunk).repeat(1, COPIES)
    return Pack(past, history.frame, clips.frames(history.clip, target_frame), target_frame)


# ---- ode: regression to ODE trajectories -------------------------------------------------------------------

@dataclass
class Trajectories:
    """Videos that the causal model has made."""
    x: torch.Tensor           # (n, 3 chunks, levels + 1, c, h, w) bf16: latents on their way, the last is x0
    past_frame: torch.Tensor  # (n, chunks, 18) frame numbers of what each chunk saw, -1 = nothing


def ode_captions(prompts, seed):
    """Captions for the videos, of `prompts` or of the small world."""
    drawn = np.random.default_rng([seed, 0x0DE]).integers(len(prompts) or world.HELD_OUT, size=ODE_CLIPS)
    if prompts:
        return [prompts[i] for i in drawn]
    return [world.make_world(WorldSpec(int(i))).caption for i in drawn]


@torch.no_grad()
def ode_trajectories(folder, networks, captions, chunks, batch):
    """
    Kept on disk, made `batch` at a time.
    networks  weights.Networks of the causal model
    returns   Trajectories
    """
    sampler, latent = networks.sampler, networks.latent

    def record(first):
        rollout = networks.rollout(networks.text(*captions[first:first + batch]))
        seeds = range(first, min(first + batch, len(captions)))
        return vars(record_trajectories(rollout, seeds, chunks, sampler, latent))

    if ODE_STEPS % sampler.steps:
        raise BadInput(f"init_ode needs a start whose sampler has {ODE_STEPS} steps or a fraction of them, "
                       f"not {sampler.steps}: give another --init")
    mark = hash_content(networks.dit.state_dict(), repr([captions, chunks, sampler, latent]))[:8]
    starts = range(0, len(captions), batch)
    files = {Path(folder, f"trajectories_{mark}_{first:05d}.safetensors"): first for first in starts}
    made = make_files(files, record, "ODE trajectories")
    x = torch.cat([some["x"] for some in made])
    return Trajectories(x, torch.cat([some["past_frame"] for some in made]))


def record_trajectories(rollout, seeds, chunks, sampler, latent):
    """Videos in Euler steps -> Trajectories: x_t at the sampler's levels, x0, and what was held"""
    # the sampler's levels are every fourth of these
    levels = schedule(ODE_STEPS, sampler.shift)
    every = ODE_STEPS // sampler.steps

    def predict(x, t, level):
        states.append(x)
        return rollout.predict(x, t)[0]
    videos = []
    for chunk in range(chunks):
        states = []
        rollout.read_context()
        noise = draw_noise(seeds, chunk, 0, (CHUNK, *latent), rollout.device)
        x0, _ = denoise(predict, noise, levels, None, renoise=False)
        rollout.append(x0)
        videos.append(torch.stack([*states[::every], x0], dim=2).bfloat16().cpu())
    kept = torch.stack(rollout.kept, dim=1).cpu()
    return Trajectories(torch.cat(videos, dim=1), held_frames(rollout.memory.policy, kept))


def trajectory_loss(net, text, trajectories, clip, chunk, levels, grid):
    """
    Regression to x0 from all of the student's noise levels at once, with the past that each chunk really had.
    clip, chunk  (b,) numbers of trajectories and of their chunks
    levels       (n,) the student's noise levels, those of the trajectories
    returns      scalar loss
    """
    device = text[0][0].device
    copies = len(levels)
    # what the chunk saw, and what it was on the way
    past_frame = trajectories.past_frame[clip, chunk]
    past = take_frames(trajectories.x[:, :, -1], clip, past_frame, device)
    x = take_frames(trajectories.x, clip, chunk_frames(chunk), device)
    xt = rearrange(x[:, :, :-1], "b f n c h w -> b (n f) c h w")
    x0 = x[:, :, -1].repeat(1, copies, 1, 1, 1)
    t = levels.repeat_interleave(CHUNK).expand(len(clip), -1).to(device)
    pack = Pack(past, past_frame, x0, chunk_frames(chunk).repeat(1, copies))
    v = packed_forward(net, text, pack, xt, t, grid)
    # the error of x0 is t times that of v; small, so in float32
    v_star = v_from_x0(xt, x0, t)
    with torch.autocast(device.type, enabled=False):
        return (over_frames(t) * (v - v_star)).square().mean()


# ---- what is read off real clips ---------------------------------------------------------------------------

@torch.no_grad()
def calibrate(networks):
    """Surprisal threshold and pooling for the causal model, from real videos -> what choose_tau() returns"""
    worlds = [WorldSpec(i, "turn", 40 + i % 5) for i in range(8)]
    worlds += [WorldSpec(i, "linger") for i in range(8)]
    histories = Histories(worlds)
    text = networks.text(*histories.captions)
    device = text[0][0].device
    x0 = torch.cat([encode_world(networks.vae, spec, CLIP_CHUNKS * CHUNK, device) for spec in worlds])
    # how like the chunk before it is each chunk? Keys are compared as a whole (Wan's way) or place by place
    similarities = {}
    for pool in ("mean", "token"):
        rollout = Rollout(networks.dit, text, PRESETS["slowfast"], networks.grid, pool=pool)
        for i, chunk in enumerate(x0.split(CHUNK, dim=1)):
            rollout.read_context()
            rollout.append(chunk, histories.keep["moving"][:, i].to(device))
        similarities[pool] = torch.stack(rollout.similarities, dim=1).cpu()
    is_turn = torch.arange(len(worlds)) < 8
    return choose_tau(similarities, histories.moved, is_turn)


def choose_tau(similarities, moved, is_turn):
    """
    The smallest tau that keeps 95 % of the tested chunks of the slowest turns (one in 40 s or more), and the
    pooling that then keeps fewer chunks in which the camera lingers.
    similarities  pool -> (b, chunks), of each chunk to the one before it
    moved         (b, chunks) columns that the camera moves
    is_turn       (b,) bool: a slow turn, or a lingering motion
    returns       dict: tau, pool, kept (share of the tested chunks that are kept, by motion)
    """
    # of the chunks that are tested and have one before them, those of each motion
    moved = moved[:, 2::2]
    turns = is_turn[:, None].expand_as(moved)
    lingers = ~turns & (moved < LINGERS)
    motions = {"slow turns": turns, "lingering": lingers, "between": ~turns & ~lingers}
    choices = []
    for pool, similarity in similarities.items():
        tested = similarity[:, 2::2]
        tau = tested[turns].quantile(.95).item()
        is_kept = (tested < tau).float()
        kept = {name: is_kept[chunks].mean().item() for name, chunks in motions.items()}
        choices.append({"tau": tau, "pool": pool, "kept": kept})
    return min(choices, key=lambda choice: choice["kept"]["lingering"])


if __name__ == "__main__":
    past_frame = torch.tensor([[0, 1, 2, 6, 7, 8]])
    pack = Pack(None, past_frame, None, torch.tensor([[9, 10, 11] * 2]))
    print("past latents 0-2 and 6-8, then two copies of 9-11; each row sees the columns with a #")
    for row in packed_attention_mask(pack)[0].tolist():
        print("".join("#" if seen else "." for seen in row))
