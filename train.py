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
from model import save_weights
from vae import TAE, tiny_tae


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


DEFAULTS = {  # stage: updates, batch, lr, warm-up
    "vae": (2500, 8, 2e-3, 100),
}
SAVE_EVERY, STRIP_EVERY, BAD_IN_A_ROW = 250, 500, 10


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
    updates, batch, lr, warmup = DEFAULTS[cfg.stage]
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

        def loss_at(rng):
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

        def strip(path):
            video = torch.from_numpy(world.clip(world.HELD_OUT, 0, 129)[None]).to(device) * 2 - 1
            with torch.no_grad():
                again = tae.decode(tae.encode(video))[0]
            write_strip(path, [(v[0, ::13] * .5 + .5).cpu().numpy() for v in (video, again)])

    # ---- the loop: one for all stages ---------------------------------------------------------------------------------
    params = [p for p in nets.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=lr, betas=(.9, .95), weight_decay=.01)
    step, saved = 0, load_checkpoint(out, device)
    if saved:
        step = saved["step"]
        nets.load_state_dict(saved["nets"])
        optimizer.load_state_dict(saved["optimizer"])
    stop = []  # the signal that asks for an end; the update under way is finished first
    for s in (signal.SIGINT, signal.SIGTERM):
        signal.signal(s, lambda number, frame: stop.append(number))
    log, bad = open(out / "log.jsonl", "a"), 0
    bar = tqdm(total=updates, initial=step, desc=cfg.stage)
    while step < updates and not stop:
        started = time.time()
        rng = np.random.default_rng([cfg.seed, step])
        torch.manual_seed(int(rng.integers(2 ** 62)))
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1, (step + 1) / warmup) * (.55 + .45 * math.cos(math.pi * step / updates))
        loss, numbers = loss_at(rng)
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(params, 1.0)
        if torch.isfinite(norm) and torch.isfinite(loss):
            optimizer.step()
            bad = 0
        else:
            bad += 1  # weights unchanged
        step += 1
        numbers = {"step": step, "loss": loss.item(), "grad": norm.item(), "lr": optimizer.param_groups[0]["lr"],
                   "skipped": bad, "seconds": time.time() - started, **numbers}
        log.write(json.dumps({k: round(v, 6) for k, v in numbers.items()}) + "\n")
        bar.set_postfix({k: f"{numbers[k]:.3g}" for k in numbers if k not in ("step", "lr", "seconds", "skipped")})
        bar.update()
        if bad >= BAD_IN_A_ROW:
            raise SystemExit(f"stopped: {bad} updates in a row had a loss or gradient that is not finite; "
                             f"the last good checkpoint is in {out}")
        if step % SAVE_EVERY == 0 or step == updates or stop:
            log.flush()
            save_checkpoint(out, step, {"nets": nets.state_dict(), "optimizer": optimizer.state_dict()})
        if step % STRIP_EVERY == 0 or step == updates:
            strip(out / f"strip_{step:06d}.png")
    if stop:
        print(f"stopped at update {step}; run the same command to go on")
        sys.exit(130 if stop[0] == signal.SIGINT else 143)
    for name, net in nets.items():
        save_weights(out / f"{name}.safetensors", net.state_dict(), net.config, {"updates": step, **asdict(cfg)})
        print(f"wrote {out / name}.safetensors")


if __name__ == "__main__":
    run(main)
