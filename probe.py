"""
Videos of the small world, made and measured: what a network remembers, and how its pictures hold.

A student goes on from nothing or from real video, a teacher 21 latents at a time; the judge reads what they
made. train.py asks it of a few worlds every so many updates, evaluate.py of many.

References: Context Forcing, arXiv 2602.06028, figures 1 and 7.
Leaves out: DINO and CLIP on the small world.
"""
from dataclasses import replace

import numpy as np
import torch

import judge
from config import BadInput, fast_autocast
from data import encode_world, frames_of
from erft import extend
from flow import Rollout, generate
from memory import CHUNK, PRESETS, frames_in_memory
from video import chunks_of, to_uint8
from world import COLUMNS, FPS, HELD_OUT, WorldSpec, apart, make_world

GIVEN = 14          # chunks of real history: 42 latents, 165 frames, 10.3 s
PROBE_CHUNKS = 5    # 4 s, in which worlds that turn once in 8 or 9 s bring back what they showed
PROBE_POLICY = PRESETS["uniform2"]
SPAN = 5 * FPS      # frames
MINUTE = 60 * FPS   # frames
MINUTE_CHUNKS = 80  # 960 frames, of a video's first minute 957
MINUTES = (1, 5, 15, 60)  # of an hour, which are looked at
# what is read in them
HOUR_NUMBERS = ("validity, dB", "entropy of landmarks, bits", "landmarks as in minute 1, %")
JUMP = 15 / 360 * COLUMNS  # between two frames; captions move the camera by 3 columns at most


# ---- videos of the small world: real first chunks, then the model's own ------------------------------------

def conditions(networks, specs, given):
    """
    networks  weights.Networks of the small world
    specs     WorldSpecs, one a video
    given     chunks of real video
    returns   net.text of the captions, real latents (b, 3 given, c, h, w)
    """
    text = networks.text(*[make_world(spec).caption for spec in specs])
    device = text[0][0].device
    if not given:
        return text, torch.zeros(len(specs), 0, *networks.latent, device=device)
    return text, torch.cat([encode_world(networks.vae, spec, given * CHUNK, device) for spec in specs])


def decode_frames(vae, latents):
    """
    Latents (b, n, 16, 4, 8) -> frames (b, f, 3, 32, 64) uint8, a chunk at a time; in bf16 where that is fast,
    which moves the validity by 0.02 dB. The models themselves run in float32, as in sample.py.
    """
    if not latents.isfinite().all():
        raise BadInput("a network made latents that are not finite (NaN or infinity): is its file damaged?")
    frames, past = [], None
    for chunk in latents.split(CHUNK, dim=1):
        with fast_autocast(latents.device):
            video, past = vae.decode(chunk, past)
        frames.append(to_uint8(video).movedim(-1, -3).cpu().numpy())
    return np.concatenate(frames, axis=1)


def decode_minutes(vae, latents):
    """Of an hour: the frames (b, 4 x 960, 3, 32, 64) of each of MINUTES, decoded from two chunks before on"""
    frames = []
    # the decoder needs a moment to know what came before
    for minute in MINUTES:
        start = max(0, MINUTE_CHUNKS * (minute - 1) - 2)
        part = latents[:, CHUNK * start:CHUNK * (MINUTE_CHUNKS * minute + 1)]
        frames.append(decode_frames(vae, part)[:, -MINUTE:])
    return np.concatenate(frames, axis=1)


@torch.no_grad()
def continue_student(networks, specs, given, chunks, policy, positions="bounded", swap=False):
    """
    given    chunks of each world's real video; then `chunks` of the student's own
    swap     each two neighbours of the batch exchange their slow memories before going on
    returns  latents (b, n, 16, 4, 8), the real ones included; keep (b, given + chunks) bool
    """
    sampler = networks.sampler
    seeds = [spec.seed for spec in specs]
    text, history = conditions(networks, specs, given)
    rollout = Rollout(networks.dit, text, policy, networks.grid, positions, sampler.pool)
    # the real part enters the memory, and nothing is made yet
    if given:
        list(generate(rollout, seeds, 0, sampler, networks.latent, history=history))
    if swap:
        rollout.memory.evict(CHUNK)
        neighbours = torch.arange(len(specs)) ^ 1
        rollout.memory.slow = rollout.memory.slow.apply(lambda x: x[neighbours])
    # the student's own part
    own = generate(rollout, seeds, chunks, sampler, networks.latent)
    return torch.cat([history, *own], dim=1), torch.stack(rollout.kept, dim=1).cpu()


@torch.no_grad()
def continue_teacher(networks, specs, given, blocks, shuffle=False):
    """
    given    chunks of each world's real video; then `blocks` times 21 latents of the teacher
    shuffle  each goes on from the next world's past, and shows it if the teacher looks there
    returns  as continue_student()
    """
    text, latents = conditions(networks, specs, given)
    seeds = [spec.seed for spec in specs]
    # from all that is there so far
    for _ in range(blocks):
        past = latents.roll(-1, 0) if shuffle else latents
        more = extend(networks.dit, past, text, networks.grid, networks.sampler, seeds)
        latents = torch.cat([latents, more], dim=1)
    keep = torch.arange(latents.shape[1] // CHUNK) % PROBE_POLICY.interval == 0
    return latents, keep.expand(len(specs), -1)


# ---- what a video tells, as numbers that report.py counts --------------------------------------------------

def measure(frames, spec, keep, policy, given):
    """
    One video, of which `given` chunks are real.
    frames   (f, 3, 32, 64) uint8
    keep     (chunks,) bool of the rollout
    returns  dict: validity, last, drift (dB to the nearest frame that the world can draw: of the model's own
             part, of its last 5 s, of its last 10 s less its first 10 s), jumps (a minute), steady (100 if it
             moves within a tenth of the caption's rate and angle, else 0), starts (100 if it begins within 8
             columns of where the caption says), landmarks (by sector), returns: of what was due back in the
             own part and is not in the sink, dicts: the fields of judge.Reappearance, right, held (by the
             memory, in a latent), follows (does it show the counterfactual world's landmark?)
    """
    reading = judge.read_video(frames)
    asked = make_world(spec)
    start = frames_of(given * CHUNK)
    psnr = reading.psnr[start:]
    drift = psnr[-2 * SPAN:].mean() - psnr[:2 * SPAN].mean()
    # what came back, what memory held at each chunk, and what stands in the other world
    contexts = frames_in_memory(policy, keep[None])
    others = make_world(replace(spec, counterfactual=not spec.counterfactual)).landmarks
    returns = []
    for event in judge.reappearances(reading, asked.motion):
        if event.returned >= start and not event.in_sink:
            # at the chunk that draws this frame, or the last
            latents = contexts[:chunks_of(event.returned + 1)][-1][0]
            held = judge.is_in_memory(event, reading, latents)
            follows = event.shown == int(others[event.sector])
            returns.append(vars(event) | {"right": event.right, "held": held, "follows": follows})
    return {
        "validity": float(psnr.mean()),
        "last": float(psnr[-SPAN:].mean()),
        "drift": float(drift) if len(psnr) >= 3 * SPAN else np.nan,
        "jumps": float((np.abs(np.diff(reading.path)) > JUMP).mean() * MINUTE),
        "steady": 100 * (abs(judge.turning_rate(reading.path, asked.motion) - 1) < .1),
        "starts": 100 * bool(apart(reading.path[0] - asked.start) < 8),
        "landmarks": judge.landmark_map(reading.landmark),
        "returns": returns,
    }


def measure_minutes(frames):
    """frames (4 x 960, 3, 32, 64) uint8, of decode_minutes() -> {"1 min: ..", of HOUR_NUMBERS: number}"""
    readings = [judge.read_video(part) for part in np.split(frames, len(MINUTES))]
    maps = np.array([judge.landmark_map(reading.landmark) for reading in readings])
    found = {}
    # what is seen in a minute, how mixed, and how much of the first
    for minute, reading, landmarks in zip(MINUTES, readings, maps):
        there = landmarks >= 0
        _, count = np.unique(landmarks[there], return_counts=True)
        share = count / count.sum()
        numbers = [reading.psnr.mean(), -(share * np.log2(share)).sum(),
                   100 * (there & (landmarks == maps[0])).mean()]
        found |= {f"{minute} min: {name}": float(x) for name, x in zip(HOUR_NUMBERS, numbers)}
    return found


# ---- probes while a network is trained: does it remember, does its teacher look at the past? ---------------

def held_out(n, seed=0):
    """n worlds that turn once in 8 or 9 s: what was away for 5.1 or 5.8 s is due back after 10 s."""
    return [WorldSpec(HELD_OUT + seed + i, "turn", 8 + i % 2) for i in range(n)]


def probe_student(networks, specs):
    """10 s of every world are given to a causal network, then it goes on -> numbers of read_probe()"""
    latents, keep = continue_student(networks, specs, GIVEN, PROBE_CHUNKS, PROBE_POLICY)
    return read_probe(specs, decode_frames(networks.vae, latents), keep)


def probe_teacher(networks, specs, shuffle=False):
    """The same of a teacher; shuffle: from another world's 10 s."""
    latents, keep = continue_teacher(networks, specs, GIVEN, 1, shuffle)
    return read_probe(specs, decode_frames(networks.vae, latents), keep)


def read_probe(specs, frames, keeps):
    """
    dict: recall (share of what was due back that is right), ceiling (share that memory still held), chance,
    returns (how many were due), validity (dB to the nearest frame that the world can draw)
    """
    # each video by itself, then all that was due back in any
    videos = [measure(*video, PROBE_POLICY, GIVEN) for video in zip(frames, specs, keeps)]
    events = [event for video in videos for event in video["returns"]]
    right, held = (sum(event[what] for event in events) / max(1, len(events))
                   for what in ("right", "held"))
    return {
        "recall": right,
        "ceiling": held,
        "chance": judge.chance([video["landmarks"] for video in videos]),
        "returns": len(events),
        "validity": float(np.mean([video["validity"] for video in videos])),
    }


def check_teacher_uses_context(networks, specs):
    """Recall from each world's own past and from another's: numbers for the log."""
    own = probe_teacher(networks, specs)
    return {
        "teacher_recall": own["recall"],
        "teacher_shuffled_recall": probe_teacher(networks, specs, shuffle=True)["recall"],
        "teacher_chance": own["chance"],
    }
