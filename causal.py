"""
The causal start model: stage init, which the paper does not have. Teacher forcing on packed histories, then regression to the
model's own ODE trajectories at the four noise levels that the student will use.
"""
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tqdm import tqdm

import world
from data import CHUNKS, LESSON_CHUNKS, LINGERS, Histories, fingerprint, latent_cache, lesson_worlds, training_worlds
from flow import (Rollout, Sampler, add_noise, augment_context_noise, denoise, draw_noise, flow_matching_loss, schedule, shifted,
                  v_from_x0)
from memory import CHUNK, PRESETS, frames_in_memory
from rope import rope_cos_sin
from weights import write_safetensors
from world import WorldSpec

HEADED = 32            # clips from which the latents' compass is read
CLIPS = 1024           # training clips in the latent cache
COPIES = 4             # noised copies of a target chunk that share one clean past: most of the compute is supervised
LESSON_CLIPS = 1600    # and of steady turns of 8 to 16 s, whose keyframes hold all that comes back
TWINS = 640            # clips of each set that have a twin: the same motion past other landmarks
MIX = {                # init_ar: until which share of the updates, how often a pack is of which kind, and from a lesson
    # first 7 chunks, whole past, a chunk left out before the target, no sink and fast memory, fast memory from a twin
    .2: (.15, .255, .2975, .2975, 0, .7), .65: (.10, .30, 0, .10, .50, .7), 1: (.10, .60, 0, .05, .25, .2)}
# With the last second at hand a network draws on from that and does not learn in an hour to choose among keyframes. Where
# that second is missing, or shows other landmarks, every column must be looked up by what tells the heading: the sky.
SEQUENTIAL = 0.975     # from this share of the updates on pasts go through the real memory, chunk by chunk
ODE_CLIPS, ODE_CHUNKS = 256, 20         # init_ode: videos of the causal model's own, and their length


# ---- clips and their latents --------------------------------------------------------------------------------

def encoded(s, worlds, latents):
    return latent_cache(Path(s.cfg.out) / "cache", s.tae, worlds, latents, s.device, s.rank)


def clips(s, lessons, room=CHUNK):
    """
    Clips of all motions, or of the lessons; or those of --data. room: as for Histories
    returns  latents, with latents[which (b, 1), frames (b, f)] -> (b, f, c, h, w); which (b,) -> text features; Histories;
             worlds or None
    """
    if s.film:
        return s.film, lambda which: s.film.text(which).to(s.device), s.film, None
    worlds, chunks = ((lesson_worlds(LESSON_CLIPS, s.cfg.seed), LESSON_CHUNKS) if lessons else
                      (training_worlds(CLIPS, s.cfg.seed), CHUNKS))
    captions = [world.make_world(w).caption for w in worlds]
    return (encoded(s, worlds, chunks * CHUNK), lambda which: s.features([captions[i] for i in which]),
            Histories(worlds, chunks, room), worlds)


def directions(s, wanted):
    """Of the small world: (2, c h w), in which latents show the heading, for flow.flow_matching_loss"""
    if s.film or s.cfg.wan or not wanted:
        return None
    worlds = [WorldSpec(i, "turn") for i in range(HEADED)]
    return compass(encoded(s, worlds, CHUNKS * CHUNK).flatten(0, 1), Histories(worlds).heading.flatten()).to(s.device)


def taken(s, latents, which, frames):
    """Frames (b, f) of the clips which (b,); -1, nothing there, gives any -> (b, f, c, h, w)"""
    return latents[which[:, None], frames.clamp(min=0)].to(s.device).float()


def frames_from(chunk, frames=CHUNK):
    return chunk[:, None] * CHUNK + torch.arange(frames)  # (b,) -> (b, frames)


# ---- packed histories: what a Rollout would see, in one pass --------------------------------------------------

def stratified_noise(x0, copies, shift):
    """
    x0 (b, f, ...), f a multiple of copies, noised at `copies` levels a sample, spread evenly over 0..1 and shifted
    returns  x_t, t (b, f), v
    """
    u = (torch.rand(len(x0), copies) + torch.rand(len(x0), copies).argsort(1)) / copies
    t = shifted(u, shift).repeat_interleave(x0.shape[1] // copies, 1).to(x0.device)
    noise = torch.randn(x0.shape, device=x0.device)
    return add_noise(x0, noise, t), t, noise - x0


def packed_attention_mask(src, target, own):
    """
    Who sees whom in a pack of clean past latents and noised target latents.
    src     (b, p)  frame numbers of the past, -1 = nothing there
    target  (b, f)  chunk number of each target latent; own (f,) which noised copy it belongs to
    returns (b, p + f, p + f) bool: the past sees what is not newer (chunk mates included); a target latent sees every
            older chunk of the past and its own copy
    """
    past, there = src.div(CHUNK, rounding_mode="floor"), src >= 0
    among = (past[:, :, None] >= past[:, None]) & there[:, None] | torch.eye(src.shape[1], dtype=torch.bool)
    ahead = torch.zeros(len(src), src.shape[1], len(own), dtype=torch.bool)
    to_past = (past[:, None] < target[:, :, None]) & there[:, None]
    to_own = (own[:, None] == own[None]).expand(len(src), -1, -1)
    return torch.cat([torch.cat([among, ahead], 2), torch.cat([to_past, to_own], 2)], 1)


def drop_frames(src, gone):
    """Takes latents out of a padded past src (b, p) where gone (b, p) bool says so; what is left closes up, -1 behind it."""
    src = src.masked_fill(gone, -1)
    return src.gather(1, (src < 0).long().argsort(stable=True, dim=1))


def packed_positions(src, copies, gap=0):
    """Bounded positions of a padded past (b, p) and of `copies` of the chunk `gap` chunks on: (b, p + 3 copies)"""
    new = (src >= 0).sum(1, keepdim=True) + CHUNK * gap + torch.arange(CHUNK).repeat(copies)
    return torch.cat([torch.arange(src.shape[1]).expand(len(src), -1), new], 1)


def packed_forward(net, text, past, src, target, positions, own, xt, t, grid):
    """
    Several noised copies of target latents share one clean past: what a Rollout would see, chunk by chunk, in one pass.
    past       (b, p, c, h, w) clean latents of the frame numbers src (b, p), -1 = nothing there
    target     (b, f) frame numbers of all copies; own (f,) which copy a latent belongs to; positions (b, p + f)
    xt, t      (b, f, c, h, w) noised, (b, f)
    returns    v (b, f, c, h, w) of the target
    """
    x, at = torch.cat([past, xt], 1), torch.cat([torch.zeros(src.shape, device=t.device), t], 1)
    rope = rope_cos_sin(positions.to(t.device), *grid, net.config.dim // net.config.heads)
    mask = packed_attention_mask(src, target.div(CHUNK, rounding_mode="floor"), own).to(t.device)
    return net(x, at, text, rope, mask=mask)[0][:, src.shape[1]:]


@torch.no_grad()
def path_cache(folder, net, start, captions, chunks, sampler, latent, together, rank=0, processes=1):
    """
    Videos of net, a causal model, in 16 Euler steps, with what each chunk was at the sampler's few noise levels on the way;
    kept on disk like clips, made `together` at a time, each process its share.
    start    captions -> a fresh flow.Rollout under them
    returns  (n, 3 chunks, levels + 1, c, h, w) bfloat16 on the CPU, the last is x0; (n, chunks, 18) frame numbers of each
             chunk's past, -1 = nothing there
    """
    mark, files = fingerprint(net).hexdigest()[:8], []
    for at in tqdm(range(0, len(captions), together), desc="paths of the causal model", disable=rank > 0):
        files.append(Path(folder) / f"paths_{mark}_{at:05d}.safetensors")
        if files[-1].exists() or at // together % processes != rank:
            continue
        some = captions[at:at + together]
        roll, xs, device = start(some), [], next(net.parameters()).device
        for i in range(chunks):
            roll.read_context()
            seen = []

            def predict(x, level):
                seen.append(x)
                return roll.predict(x, torch.full(x.shape[:2], level, device=device))[0]
            noise = draw_noise(range(at, at + len(some)), i, 0, (CHUNK, *latent), device)
            x0, _ = denoise(predict, noise, schedule(16, sampler.shift), None, renoise=False)
            roll.append(x0)
            xs.append(torch.stack([*seen[::16 // sampler.steps], x0], 2).bfloat16().cpu())
        held = frames_in_memory(roll.memory.policy, torch.stack(roll.kept, 1).cpu())[:chunks]
        held = torch.stack([F.pad(h, (0, 18 - h.shape[1]), value=-1) for h in held], 1)
        write_safetensors(files[-1], {"x": torch.cat(xs, 1), "held": held})
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
    made = [load_file(f) for f in files]
    return torch.cat([m["x"] for m in made]), torch.cat([m["held"] for m in made])


def compass(latents, heading):
    """
    Where latents show the heading: ridge regression of its cosine and sine on latents.
    latents (n, c, h, w) of about unit variance; heading (n,) columns -> (2, c h w). On held-out worlds it reads to 1.3 columns.
    """
    x, angle = latents.flatten(1).float(), heading.float() * (2 * torch.pi / world.COLUMNS)
    gram = x.T @ x / len(x) + .1 * torch.eye(x.shape[1])
    return torch.linalg.solve(gram, x.T @ torch.stack([angle.cos(), angle.sin()], 1) / len(x)).T.contiguous()


def stage_init_ar(s, heading_weight, default_sampler):
    """Flow matching on real pasts: the causal model that the student will be distilled from, and the text encoder."""
    dit, film, same = s.start.requires_grad_(), s.film, torch.arange(COPIES).repeat_interleave(CHUNK)
    sources, watched, slow = [clips(s, False), clips(s, True)], directions(s, True), PRESETS["slowfast"].slow
    twins = [film or encoded(s, [replace(w, counterfactual=True) for w in worlds[:TWINS]], z.shape[1]) for z, _, _, worlds in sources]

    def choose(shared, done):
        mix = (.15, .85, 0, 0, 0, 0) if film else next(mix for until, mix in MIX.items() if done < until)
        sequential = not film and done >= SEQUENTIAL and shared.random() < .8
        kind = "sequential" if sequential else str(shared.choice(["first", "packed", "gap", "lost", "twin"], p=mix[:-1]))
        length = int(shared.integers(12, CHUNKS))
        other = shared.random() < Histories.OTHER
        lesson = kind != "sequential" and shared.random() < mix[-1]
        gap = int(shared.integers(1, 3)) if kind == "gap" else 0
        return {"kind": kind, "lesson": lesson, "gap": gap, "length": length,
                "policy": str(shared.choice(Histories.LAYOUTS)) if other else "slowfast",
                "supervised": set(shared.choice(np.arange(7, length + 1), 3, replace=False).tolist())}

    def error(v, v_star, t):
        return flow_matching_loss(v, v_star, t, watched, heading_weight).mean()

    def first(rng, chosen, which, chunk, src, text):
        """The first 7 chunks: plain block-causal training, clean half and noised half"""
        src = torch.arange(7 * CHUNK).expand(s.batch, -1)
        x0 = taken(s, sources[chosen["lesson"]][0], which, src)
        xt, t, v = stratified_noise(x0, 7, s.shift)
        past, positions, own = augment_context_noise(x0, s.context_noise), torch.cat([src, src], 1), src[0] // CHUNK
        begun = t * (src >= CHUNK).to(s.device)  # nothing tells where the first chunk looks
        return error(packed_forward(dit, text, past, src, src, positions, own, xt, t, s.grid), v, begun)

    def pack(rng, chosen, which, chunk, src, text):
        """A long past at once: the latents a policy holds, packed, or what the kind of pack leaves of them"""
        kind, lesson, gap = chosen["kind"], chosen["lesson"], chosen["gap"]
        latents, _, paths, _ = sources[lesson]
        if kind == "lost":
            src = src[:, CHUNK:CHUNK + slow].contiguous()
        gone = torch.zeros(src.shape, dtype=torch.bool)
        for row in (src[:, -1] >= 0).nonzero()[:, 0] if gap else ():  # where slow memory is full, any keyframes
            gone[row, CHUNK + rng.choice(slow, CHUNK * gap, replace=False)] = True
        if kind == "twin" and lesson:  # keyframes of the last half turn show the view, a known way off
            off = paths.heading[which[:, None], src] - paths.heading[which, CHUNK * chunk - 1, None]
            gone = off.abs() < world.COLUMNS / 2 + rng.uniform(0, world.WIDTH)
            gone[:, :CHUNK] = gone[:, -CHUNK:] = False
        src, target = drop_frames(src, gone), frames_from(chunk + gap).repeat(1, COPIES)
        past, x0 = taken(s, latents, which, src), taken(s, latents, which, target)
        if kind == "twin":
            last = (src >= CHUNK * (chunk - 1)[:, None])[..., None, None, None].to(s.device)
            past = torch.where(last, taken(s, twins[lesson], which, src), past)
        xt, t, v = stratified_noise(x0, COPIES, s.shift)
        past = augment_context_noise(past, s.context_noise)
        return error(packed_forward(dit, text, past, src, target, packed_positions(src, COPIES, gap), same, xt, t, s.grid), v, t)

    def sequential(rng, chosen, which, chunk, src, text):
        """The real memory, chunk after chunk; some chunks are supervised on the way"""
        latents, _, paths, _ = sources[chosen["lesson"]]
        keep = torch.from_numpy(np.stack([paths.keep[str(rng.choice(paths.RULES))][c] for c in which])).to(s.device)
        roll, loss = Rollout(dit, [(k.detach(), v.detach()) for k, v in text], PRESETS[chosen["policy"]], s.grid), 0
        for i in range(chosen["length"] + 1):
            x0 = latents[which, i * CHUNK:(i + 1) * CHUNK].to(s.device).float()
            memory, rope = roll.read_context()
            if i in chosen["supervised"]:
                xt, t, v = stratified_noise(x0.repeat(1, COPIES, 1, 1, 1), COPIES, s.shift)
                own = (same[:, None] == same[None])[None].to(s.device)
                made = dit(xt, t, text, [z.repeat(1, COPIES, 1, 1) for z in rope], memory, own)[0]
                loss = loss + error(made, v, t) / len(chosen["supervised"])
            if i < chosen["length"]:
                roll.append(augment_context_noise(x0, s.context_noise), keep[:, i])
        return loss

    def loss_of(rng, chosen):
        _, told, paths, _ = sources[chosen["lesson"]]
        kind, only = chosen["kind"], [TWINS] * (chosen["kind"] == "twin")
        which, chunk, src = map(torch.from_numpy, paths.draw(rng, s.batch, 1 + chosen["gap"], *only))
        some = {"first": first, "sequential": sequential}.get(kind, pack)
        with s.autocast:
            loss = some(rng, chosen, which, chunk, src, dit.text(told(which)))
        return loss, {f"loss_{kind}": loss.item()}

    nets = {"init_ar": dit} | ({} if s.cfg.wan else {"text": s.encoder})
    return nets, choose, [("init_ar", loss_of)], Sampler() if s.cfg.wan else default_sampler


def stage_init_ode(s, heading_weight, wan_chunks):
    """Regression to the causal model's own paths at the four levels that the student will use."""
    sampler, chunks = replace(Sampler(**s.facts["sampler"]), renoise=True), wan_chunks if s.cfg.wan else ODE_CHUNKS
    dit, watched, levels = s.start, directions(s, True), torch.tensor(schedule(sampler.steps, sampler.shift))
    seeds = np.random.default_rng([s.cfg.seed, 0x0DE]).integers(len(s.prompts) or world.HELD_OUT, size=ODE_CLIPS)
    captions = [s.prompts[i] if s.prompts else world.make_world(WorldSpec(int(i))).caption for i in seeds]
    policy, together = replace(PRESETS["slowfast"], tau=sampler.tau), 1 if s.cfg.wan else 32

    def start(some):
        return Rollout(dit, dit.text(s.features(some)), policy, s.grid, pool=sampler.pool)
    with torch.autocast(s.device.type, torch.bfloat16, enabled=bool(s.cfg.wan)):
        paths, held = path_cache(Path(s.cfg.out, "cache"), dit, start, captions, chunks, sampler, s.latent, together, s.rank,
                                 s.processes)

    def loss_of(rng, chosen):
        which, chunk = (torch.from_numpy(rng.integers(n, size=s.batch)) for n in (len(paths), chunks))
        src, target = held[which, chunk], frames_from(chunk)
        past, x = taken(s, paths[:, :, -1], which, src), taken(s, paths, which, target)  # x (b, 3, levels + 1, ...)
        xt, x0 = x[:, :, :-1].transpose(1, 2).flatten(1, 2), x[:, :, -1].repeat(1, len(levels), 1, 1, 1)
        t = levels.repeat_interleave(CHUNK).expand(s.batch, -1).to(s.device)
        with s.autocast:
            text = dit.text(s.features([captions[i] for i in which]))
            v = packed_forward(dit, text, past, src, target.repeat(1, len(levels)), packed_positions(src, len(levels)),
                       torch.arange(len(levels)).repeat_interleave(CHUNK), xt, t, s.grid)
        by_x0 = t[..., None, None, None]  # the error of x0
        return flow_matching_loss(v * by_x0, v_from_x0(xt, x0, t) * by_x0, torch.ones_like(t), watched, heading_weight).mean(), {}

    return {"init_ode": dit.requires_grad_()}, lambda shared, done: None, [("init_ode", loss_of)], sampler


@torch.no_grad()
def calibrate(net, conditions, device):
    """
    tau: the smallest that keeps 95 % of the tested chunks of the slowest turns (one in 40 s or more), on real video;
    keys are compared as a whole ("mean", Wan's way) or place by place ("token"), whichever keeps fewer lingering chunks.
    returns  dict: tau, pool, kept (share of the tested chunks that are kept, by motion)
    """
    worlds = [WorldSpec(i, "turn", 40 + i % 5) for i in range(8)] + [WorldSpec(i, "linger") for i in range(8)]
    (text, x0, grid), paths = conditions(worlds, CHUNKS), Histories(worlds)
    at = torch.arange(CHUNKS)[None] % 2 == 0
    at = at & (torch.arange(CHUNKS) > 1)                    # tested chunks that have one before them
    turns, lingers = torch.arange(16)[:, None] < 8, torch.from_numpy(paths.moved) < LINGERS
    choices = []
    for pool in ("mean", "token"):
        roll = Rollout(net, text, PRESETS["slowfast"], grid, pool=pool)
        for i in range(CHUNKS):
            roll.read_context()
            roll.append(x0[:, i * CHUNK:(i + 1) * CHUNK], torch.from_numpy(paths.keep["moving"][:, i]).to(device))
        sims = torch.stack(roll.similarities, 1).cpu()
        tau = sims[at & turns].quantile(.95).item()
        kept = {name: (sims < tau)[at & which].float().mean().item() for name, which in
                (("slow turns", turns), ("lingering", ~turns & lingers), ("between", ~turns & ~lingers))}
        choices.append((kept["lingering"], {"tau": tau, "pool": pool, "kept": kept}))
    return min(choices, key=lambda c: c[0])[1]
