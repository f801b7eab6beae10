"""
Trains every network of the project, one stage at a time, top to bottom.

    python train.py --stage vae        # the tiny autoencoder of the small world
    python train.py --stage init       # the causal model with memory, and the text encoder beside it

Run the same command again to go on after a stop: everything random in update n is drawn from (seed, n), so a resumed run
is the uninterrupted run. Each stage writes out/<stage>/: log.jsonl (one JSON object an update), strip_*.png (look at them),
two checkpoints, and at the end <stage>.safetensors, which goes to weights/ when it is better than what is there.

References: Context Forcing, arXiv 2602.06028; Self-Forcing, arXiv 2506.08009; TAEHV.
Leaves out so far: the stages base, teacher, 1 and 2, and more than one process.
"""
import copy
import json
import math
import os
import shutil
import signal
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import world
from config import BadInput, one_of, parse, pick_device, run
from data import (CHUNKS, LESSON_CHUNKS, LINGERS, Histories, encode_world, frames_of, latent_cache, lesson_worlds,
                  training_worlds)
from evaluate import GIVEN, continuations, returns
from flow import Rollout, Sampler, add_noise, generate, shifted
from memory import CHUNK, PRESETS
from model import DiT, load, save_weights, tiny_dit
from rope import table
from text import TextEncoder, bytes_to_ids, tiny_text
from vae import TAE, TAEConfig, tiny_tae


@dataclass
class Config:
    stage: str = ""       # vae | init
    out: str = "out"      # folder for logs, strips, checkpoints and weights
    updates: int = 0      # number of updates (0: the stage's own default)
    batch: int = 0        # clips an update (0: the stage's own default)
    lr: float = 0.0       # peak learning rate (0: the stage's own default)
    seed: int = 0         # of the training run
    device: str = ""      # cuda | mps | cpu (default: the best there is)
    dtype: str = "bf16"   # bf16 | fp32: autocast of the forward pass; weights and optimizer are float32


DEFAULTS = {  # stage: updates, batch, lr, warm-up, EMA decay
    "vae": (2500, 8, 2e-3, 100, 0.99),
    "init": (8000, 16, 1.5e-3, 100, 0.995),
}
WEIGHTS = Path(__file__).parent / "weights"
SAVE_EVERY, STRIP_EVERY, PROBE_EVERY, BAD_IN_A_ROW = 250, 500, 250, 10
CLIPS = 2048           # training clips in the latent cache
COPIES = 4             # noised copies of a target chunk that share one clean past: most of the compute is supervised
LESSON_CLIPS = 1600    # and of the lessons, other worlds: a network of 2 M learns a few hundred worlds by heart
LESSON = 0.36          # up to this share of the updates lessons show one latent of slow memory, the one that shows what
                       # comes back; then 1, 4 or all 12: finding one among 12 from the start is not learned in an hour
SEQUENTIAL = 0.90      # from this share of the updates on pasts go through the real memory, chunk by chunk
SHIFT = 3.0            # training noise levels: uniform, shifted by this
CONTEXT_NOISE = 0.3    # most noise on a clean past, drawn per sample and latent: a past of one's own making is not clean
SAMPLER = Sampler(steps=4, shift=SHIFT)


def pack_mask(src, target, own):
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


def write_strip(path, rows):
    """rows: list of (f, 3, h, w) arrays in [0, 1] -> one PNG, frames side by side."""
    picture = np.concatenate([np.concatenate(list(r.transpose(0, 2, 3, 1)), axis=1) for r in rows])
    iio.imwrite(path, (picture.clip(0, 1) * 255).round().astype(np.uint8))


def save_checkpoint(folder, step, state):
    """A folder per checkpoint, written under another name and renamed: it is whole or absent. The last two are kept."""
    part, whole = folder / f"part_{step:06d}", folder / f"step_{step:06d}"
    shutil.rmtree(part, ignore_errors=True)
    shutil.rmtree(whole, ignore_errors=True)
    part.mkdir(parents=True)
    torch.save({"step": step, **state}, part / "state.pt")
    os.replace(part, whole)
    for old in sorted(folder.glob("step_*"))[:-2]:
        shutil.rmtree(old)


def load_checkpoint(folder, device):
    """The newest checkpoint that can be read, or None. An unreadable one is named and passed over, never used."""
    for whole in sorted(folder.glob("step_*"), reverse=True):
        try:
            return torch.load(whole / "state.pt", map_location=device, weights_only=True)
        except Exception as error:
            print(f"cannot read {whole} ({str(error).splitlines()[0]}): using the one before it", file=sys.stderr)
    return None


def main():
    cfg = parse(Config)
    one_of("--stage", cfg.stage, DEFAULTS)
    one_of("--dtype", cfg.dtype, ("bf16", "fp32"))
    updates, batch, lr, warmup, decay = DEFAULTS[cfg.stage]
    updates, batch, lr = cfg.updates or updates, cfg.batch or batch, cfg.lr or lr
    if updates < 1 or batch < 1 or not lr > 0:
        raise BadInput("--updates, --batch and --lr must be above 0")
    device = pick_device(cfg.device)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=cfg.dtype == "bf16")
    out = Path(cfg.out) / cfg.stage
    out.mkdir(parents=True, exist_ok=True)

    # ---- what is trained: `nets`, and loss_at(rng) -> loss, dict of numbers to log --------------------------------------
    if cfg.stage == "vae":
        torch.manual_seed(cfg.seed)
        tae = TAE(tiny_tae).to(device, memory_format=torch.channels_last)
        nets = torch.nn.ModuleDict({"vae": tae})

        def loss_at(rng, done):
            clips = [world.clip(int(rng.integers(world.HELD_OUT)), int(rng.integers(480)), 17) for _ in range(batch)]
            video = torch.from_numpy(np.stack(clips)).to(device) * 2 - 1
            with autocast:
                z = tae.encode(video)
                # noise on the latents: neighbouring latents must decode alike, which makes them easy to generate
                again = tae.run(tae.decoder, z + 0.1 * torch.randn_like(z), None)[0][:, 3:]
            z = z.float()
            mse = F.mse_loss(again.float(), video * .5 + .5)
            unit = (z.mean((0, 1, 3, 4)) ** 2 + (z.std((0, 1, 3, 4)) - 1) ** 2).mean()
            return mse + 0.02 * unit, {"psnr": -10 * math.log10(mse.item()), "unit": unit.item()}

        def strip(nets, path):
            tae = nets["vae"]
            video = torch.from_numpy(world.clip(world.HELD_OUT, 0, 129)[None]).to(device) * 2 - 1
            with torch.no_grad():
                again = tae.decode(tae.encode(video))[0]
            write_strip(path, [(v[0, ::13] * .5 + .5).cpu().numpy() for v in (video, again)])

    elif cfg.stage == "init":  # part ar: flow matching on real pasts; what the 4-step student will be distilled from
        tae, _ = load(WEIGHTS / "vae.safetensors", TAE, TAEConfig)
        tae = tae.to(device, memory_format=torch.channels_last)
        grid = world.HEIGHT // 8 // tiny_dit.patch[0], world.WIDTH // 8 // tiny_dit.patch[1]
        sources = []  # all motions, and the lessons: latents, ids, token mask, histories of each
        for worlds, chunks in ((training_worlds(CLIPS, cfg.seed), CHUNKS),
                               (lesson_worlds(LESSON_CLIPS, cfg.seed), LESSON_CHUNKS)):
            latents = latent_cache(Path(cfg.out) / "cache", tae, worlds, chunks * CHUNK, device)
            captions = [world.world(*w).caption for w in worlds]
            sources.append((latents, *bytes_to_ids(captions, tiny_dit.text_len), Histories(worlds, chunks)))
        torch.manual_seed(cfg.seed)
        dit, encoder = DiT(tiny_dit).initialise().to(device), TextEncoder(tiny_text).to(device)
        nets = torch.nn.ModuleDict({"init_ar": dit, "text": encoder})

        def noised(x0, copies, shape):
            """Targets at `copies` noise levels each, spread evenly over 0..1 -> x_t, t, v, all with f * copies frames."""
            u = (torch.rand(len(x0), copies) + torch.rand(len(x0), copies).argsort(1)) / copies
            t = shifted(u, SHIFT).repeat_interleave(shape, 1).to(device)
            noise = torch.randn(len(x0), shape * copies, *x0.shape[2:], device=device)
            return add_noise(x0, noise, t), t, noise - x0

        def clean(x0):
            """A past as the model will meet it: with a little noise, still called t = 0."""
            level = torch.rand(len(x0), 1) * CONTEXT_NOISE * torch.rand(x0.shape[:2])
            return add_noise(x0, torch.randn_like(x0), level.to(device))

        def packed_loss(latents, clips, text, src, target, positions, own, copies):
            """src (b, p) past frames; target (b, f) frame numbers of all copies; positions (b, p + f)"""
            past = latents[clips[:, None], src.clamp(min=0)].to(device).float()
            x0 = latents[clips[:, None], target].to(device).float()
            xt, t, v = noised(x0, copies, target.shape[1] // copies)
            x, at = torch.cat([clean(past), xt], 1), torch.cat([torch.zeros(src.shape, device=device), t], 1)
            rope = table(positions.to(device), *grid, tiny_dit.dim // tiny_dit.heads)
            mask = pack_mask(src, target // CHUNK, own).to(device)
            return F.mse_loss(dit(x, at, text, rope, mask=mask)[0][:, src.shape[1]:], v)

        def loss_at(rng, done):
            kind, same = rng.random(), torch.arange(COPIES).repeat_interleave(CHUNK)
            lesson = 0.2 <= kind < 0.84 and done < SEQUENTIAL
            slots = None if not lesson else 1 if done < LESSON else int(rng.choice([1, 4, 12, 12]))
            latents, ids, token_mask, histories = sources[lesson]
            clips, chunk, src = map(torch.from_numpy, histories.draw(rng, batch, slots))
            with autocast:
                text = dit.text(encoder(ids[clips].to(device), token_mask[clips].to(device)))
                if kind < 0.2:     # the first 7 chunks: plain block-causal training, clean half and noised half
                    src = target = torch.arange(7 * CHUNK).expand(batch, -1)
                    positions = torch.cat([src, target], 1)
                    loss = packed_loss(latents, clips, text, src, target, positions, target[0] // CHUNK, 7)
                elif done < SEQUENTIAL:  # a long past at once: the latents a policy holds, packed
                    target = (chunk[:, None] * CHUNK + torch.arange(CHUNK)).repeat(1, COPIES)
                    new = (src >= 0).sum(1, keepdim=True) + torch.arange(CHUNK).repeat(COPIES)
                    positions = torch.cat([torch.arange(src.shape[1]).expand(batch, -1), new], 1)
                    loss = packed_loss(latents, clips, text, src, target, positions, same, COPIES)
                else:              # the real memory, chunk after chunk; some chunks are supervised on the way
                    other = rng.random() < histories.OTHER
                    policy = PRESETS[str(rng.choice(histories.LAYOUTS)) if other else "slowfast"]
                    rules = [str(rng.choice(histories.RULES)) for _ in range(batch)]
                    keep = torch.from_numpy(np.stack([histories.keep[r][c] for r, c in zip(rules, clips)]))
                    roll = Rollout(dit, [(k.detach(), v.detach()) for k, v in text], policy, grid)
                    length, loss = int(rng.integers(12, CHUNKS)), 0
                    supervised = set(rng.choice(np.arange(7, length + 1), 3, replace=False).tolist())
                    for i in range(length + 1):
                        x0 = latents[clips, i * CHUNK:(i + 1) * CHUNK].to(device).float()
                        memory, rope = roll.look()
                        if i in supervised:
                            xt, t, v = noised(x0.repeat(1, COPIES, 1, 1, 1), COPIES, CHUNK)
                            many = [z.repeat(COPIES, 1, 1) for z in rope]
                            own = (same[:, None] == same[None])[None].to(device)
                            loss = loss + F.mse_loss(dit(xt, t, text, many, memory, own)[0], v) / len(supervised)
                        if i < length:
                            roll.commit(clean(x0), keep[:, i].to(device))
            return loss, {"kind": 0 if kind < 0.2 else 1 if done < SEQUENTIAL else 2}

        soon = [(world.HELD_OUT + i, "turn", 8 + i % 2) for i in range(16)]

        def probe(nets):
            """16 held-out worlds that turn once in 8 or 9 s: 10 s of each are given, returns are due after 5.4 or 6.1 s."""
            policy = PRESETS["uniform2"]  # tau is calibrated at the end
            frames, keeps = continuations(nets["init_ar"], nets["text"], tae, soon, GIVEN, 5, policy, SAMPLER, device)
            readings, found, psnr = [world.judge(f) for f in frames], [], []
            for w, r, keep in zip(soon, readings, keeps):
                found += returns(r, world.world(*w).caption, keep, policy, GIVEN)
                psnr.append(r.psnr[frames_of(GIVEN * CHUNK):].mean())
            return {"recall": float(np.mean([e.recall for e, _ in found] or [0])),
                    "ceiling": float(np.mean([h for _, h in found] or [0])), "chance": world.chance(readings),
                    "returns": len(found), "validity": float(np.mean(psnr))}

        @torch.no_grad()
        def calibrate(nets):
            """
            tau: the smallest that keeps 95 % of the tested chunks of the slowest turns (one in 40 s or more), on real
            video; keys are compared as a whole ("mean", Wan's way) or place by place ("token"), whichever keeps fewer
            lingering chunks.
            """
            worlds = [(s, "turn", 40 + s % 5) for s in range(8)] + [(s, "linger", None) for s in range(8)]
            x0, paths = torch.cat([encode_world(tae, w, CHUNKS * CHUNK, device) for w in worlds]), Histories(worlds)
            ids, mask = bytes_to_ids([world.world(*w).caption for w in worlds], tiny_dit.text_len)
            text = nets["init_ar"].text(nets["text"](ids.to(device), mask.to(device)))
            at = torch.arange(CHUNKS)[None] % 2 == 0
            at = at & (torch.arange(CHUNKS) > 1)                    # tested chunks that have one before them
            turns, lingers = torch.arange(16)[:, None] < 8, torch.from_numpy(paths.moved) < LINGERS
            choices = []
            for pool in ("mean", "token"):
                roll = Rollout(nets["init_ar"], text, PRESETS["slowfast"], grid, pool=pool)
                for i in range(CHUNKS):
                    roll.look()
                    roll.commit(x0[:, i * CHUNK:(i + 1) * CHUNK], torch.from_numpy(paths.keep["moving"][:, i]).to(device))
                sims = torch.stack(roll.sims, 1).cpu()
                tau = sims[at & turns].quantile(.95).item()
                kept = {name: (sims < tau)[at & which].float().mean().item() for name, which in
                        (("slow turns", turns), ("lingering", ~turns & lingers), ("between", ~turns & ~lingers))}
                choices.append((kept["lingering"], {"tau": tau, "pool": pool, "kept": kept}))
            return min(choices, key=lambda c: c[0])[1]

        @torch.no_grad()
        def strip(nets, path):
            """Four held-out captions, 20 chunks each, from text alone."""
            worlds = [world.world(world.HELD_OUT + i) for i in range(4)]
            i, m = (z.to(device) for z in bytes_to_ids([w.caption for w in worlds], tiny_dit.text_len))
            roll = Rollout(nets["init_ar"], nets["init_ar"].text(nets["text"](i, m)), PRESETS["slowfast"], grid)
            z = torch.cat(list(generate(roll, range(4), 20, SAMPLER, sources[0][0].shape[2:])), 1)
            write_strip(path, list((tae.decode(z)[0][:, ::12] * .5 + .5).cpu().numpy()))

    # ---- the loop: one for all stages ---------------------------------------------------------------------------------
    ema = copy.deepcopy(nets).requires_grad_(False)
    params = [p for p in nets.parameters() if p.requires_grad]
    matrices = [p for n, p in nets.named_parameters() if "blocks" in n and p.ndim == 2 and "embedding" not in n]
    others = [p for p in params if not any(p is m for m in matrices)]
    optimizers = [torch.optim.AdamW(others, lr=lr, betas=(.9, .95), weight_decay=.01)]
    if matrices:  # Muon for the transformers' matrices: the same lr means the same size of step
        optimizers.append(torch.optim.Muon(matrices, lr=lr, weight_decay=.01, adjust_lr_fn="match_rms_adamw"))
    step, saved = 0, load_checkpoint(out, device)
    if saved:
        step = saved["step"]
        nets.load_state_dict(saved["nets"])
        ema.load_state_dict(saved["ema"])
        for optimizer, state in zip(optimizers, saved["optimizers"]):
            optimizer.load_state_dict(state)
    stop = []  # the signal that asks for an end; the update under way is finished first
    for s in (signal.SIGINT, signal.SIGTERM):
        signal.signal(s, lambda number, frame: stop.append(number))
    log, bad = open(out / "log.jsonl", "a"), 0
    bar = tqdm(total=updates, initial=step, desc=cfg.stage)
    while step < updates and not stop:
        started = time.time()
        rng = np.random.default_rng([cfg.seed, step])
        torch.manual_seed(int(rng.integers(2 ** 62)))
        for group in [g for o in optimizers for g in o.param_groups]:
            group["lr"] = lr * min(1, (step + 1) / warmup) * (.55 + .45 * math.cos(math.pi * step / updates))
        loss, numbers = loss_at(rng, step / updates)
        nets.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(params, 1.0)
        if torch.isfinite(norm) and torch.isfinite(loss):
            for optimizer in optimizers:
                optimizer.step()
            bad = 0
            with torch.no_grad():  # a short average at first, or the start would linger
                toward = 1 - min(decay, (step + 1) / (step + 10))
                torch._foreach_lerp_(list(ema.parameters()), list(nets.parameters()), toward)
        else:
            bad += 1  # weights unchanged
        step += 1
        if cfg.stage != "vae" and (step % PROBE_EVERY == 0 or step == updates):
            numbers |= probe(ema)
        numbers = {"step": step, "loss": loss.item(), "grad": norm.item(), "lr": optimizers[0].param_groups[0]["lr"],
                   "skipped": bad, "seconds": time.time() - started, **numbers}
        log.write(json.dumps({k: round(v, 6) for k, v in numbers.items()}) + "\n")
        bar.set_postfix({k: f"{numbers[k]:.3g}" for k in numbers if k not in ("step", "lr", "seconds", "skipped")})
        bar.update()
        if bad >= BAD_IN_A_ROW:
            raise SystemExit(f"stopped: {bad} updates in a row had a loss or gradient that is not finite; "
                             f"the last good checkpoint is in {out}")
        if step % SAVE_EVERY == 0 or step == updates or stop:
            log.flush()
            save_checkpoint(out, step, {"nets": nets.state_dict(), "ema": ema.state_dict(),
                                        "optimizers": [o.state_dict() for o in optimizers]})
        if step % STRIP_EVERY == 0 or step == updates:
            strip(ema, out / f"strip_{step:06d}.png")
    if stop:
        print(f"stopped at update {step}; run the same command to go on")
        sys.exit(130 if stop[0] == signal.SIGINT else 143)
    sampler, kept = asdict(SAMPLER), {}
    if cfg.stage == "init":
        found = calibrate(ema)
        kept = found.pop("kept")
        sampler |= found
        print(f"tau {found['tau']:.4f} ({found['pool']}), tested chunks kept:",
              ", ".join(f"{k} {v:.0%}" for k, v in kept.items()))
    facts = {"stage": cfg.stage, "seed": cfg.seed, "updates": updates, "batch": batch, "lr": lr, "sampler": sampler,
             "kept": kept}
    for name, net in ema.items():
        save_weights(out / f"{name}.safetensors", net.state_dict(), net.config, facts)
        print(f"wrote {out / name}.safetensors")


if __name__ == "__main__":
    run(main)
