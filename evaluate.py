"""
Measures what a trained model remembers and how its picture holds, by the small world's judge.

    python evaluate.py             # 64 held-out worlds: 10 s of each are given, 50 s are the model's own
    python evaluate.py --quick     # 16 worlds, 20 s of the model's own

Each world's first 10 s are rendered and encoded, so there is a truth: what stood where. The model goes on with memory
slowfast, and again with longlive (no slow memory). Recall, chance, ceiling and validity are the judge's (world.py). Writes
out/evaluate.csv, one line a video, and prints the tables from it.

References: Context Forcing, arXiv 2602.06028, figure 1. Leaves out so far: the paper's other tables.
"""
import csv
import json
import re
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import world
from config import BadInput, one_of, parse, pick_device, run
from data import encode_world, frames_of
from erft import extend
from flow import Rollout, Sampler, generate
from memory import CHUNK, PRESETS, plan
from model import DiT, DiTConfig, load
from text import TextConfig, TextEncoder, bytes_to_ids
from vae import TAE, TAEConfig

WEIGHTS = Path(__file__).parent / "weights"
GIVEN = 14                            # chunks of real history: 42 latents, 165 frames, 10.3 s
ABSENCES = (0, 2, 4, 6, 9, 12, 16, 21, 31)  # seconds: edges of the forgetting curve


@dataclass
class Config:
    quick: bool = False  # 16 worlds and 20 s, instead of 64 and 50 s
    ckpt: str = ""       # weights to measure
    out: str = "out"     # folder for the CSV
    seed: int = 0        # first held-out world, and noise
    device: str = ""     # cuda | mps | cpu (default: the best there is)
    videos: str = ""     # instead of all that: a folder of real videos (mp4, gif) to score
    dino: str = ""       # for them: a folder with DINOv2 (its score), or DINO ViT-B/16 (VBench's subject consistency)
    clip: str = ""       # for them: a folder with CLIP (frame to frame, frame to text; ViT-B/32: VBench's background consistency)
    prompts: str = ""    # for them: a .json, name -> prompt, or the file of lines that sample.py took (default: the file names)
    vbench: str = ""     # for them: a new folder to lay them out in for VBench's own code


@torch.no_grad()
def continuations(dit, encoder, tae, which, given, chunks, policy, sampler, device, noise=0, positions="bounded", test=""):
    """
    Real first chunks of the worlds of `which`, a list of what world() takes, then the model's own.
    test     "swap": the first half and the second exchange their slow memories before going on; "pack": what memory holds is
             encoded anew before every chunk, as in packed training
    returns  frames (b, f, 3, 32, 64) uint8, the real part decoded too; keep (b, given + chunks) bool
    """
    worlds = [world.world(*w) for w in which]
    history = torch.cat([encode_world(tae, w, given * CHUNK, device) for w in which]) if given else None
    ids, mask = (z.to(device) for z in bytes_to_ids([w.caption for w in worlds], dit.config.text_len))
    latent = (dit.config.channels, world.HEIGHT // 8, world.WIDTH // 8)
    grid = latent[1] // dit.config.patch[0], latent[2] // dit.config.patch[1]
    roll = Rollout(dit, dit.text(encoder(ids, mask)), policy, grid, positions, sampler.pool)
    video, past = tae.decode(history) if given else (None, None)
    frames = [video] if given else []
    seeds = [noise + w[0] for w in which]
    list(generate(roll, seeds, 0, sampler, latent, history=history))
    if test == "swap":
        roll.memory.make_room(CHUNK)
        roll.memory.slow = [torch.cat(c.chunk(2)[::-1]) for c in roll.memory.slow]
    again = {n: roll.text for n in range(given, given + chunks)} if test == "pack" else None
    for z in generate(roll, seeds, chunks, sampler, latent, texts=again):
        video, past = tae.decode(z, past)
        frames.append(video)
    frames = (torch.cat(frames, 1) * 127.5 + 127.5).round().clamp(0, 255).byte().cpu().numpy()
    return frames, torch.stack(roll.keeps, 1).cpu()


@torch.no_grad()
def teacher_continuations(dit, encoder, tae, which, given, blocks, sampler, device, shuffle=False):
    """
    Real first chunks of the worlds of `which`, then 21 latents at a time from the teacher, as continuations().
    shuffle: each world goes on from the next one's past, which the teacher should show
    """
    worlds = [world.world(*w) for w in which]
    z = torch.cat([encode_world(tae, w, given * CHUNK, device) for w in which])
    ids, mask = (x.to(device) for x in bytes_to_ids([w.caption for w in worlds], dit.config.text_len))
    grid, text = (z.shape[3] // dit.config.patch[0], z.shape[4] // dit.config.patch[1]), dit.text(encoder(ids, mask))
    for _ in range(blocks):
        past = torch.cat([z[1:], z[:1]]) if shuffle else z
        z = torch.cat([z, extend(dit, past, text, grid, sampler, [w[0] for w in which])], 1)
    frames = (tae.decode(z)[0] * 127.5 + 127.5).round().clamp(0, 255).byte().cpu().numpy()
    return frames, torch.arange(z.shape[1] // CHUNK).expand(len(z), -1) % 2 == 0


def returns(reading, caption, keep, policy, given):
    """Events that fall due in the model's own part, outside the sink -> list of (event, was it held)."""
    contexts = plan(policy, keep[None])
    own = [e for e in world.events(reading, caption) if e.back >= frames_of(given * CHUNK) and not e.sink]
    return [(e, world.held(e, reading, contexts[min(world.chunk_of(e.back), len(contexts) - 1)][0].tolist())) for e in own]


def gates(dit, encoder, tae, sampler, device, pairs=24):
    """
    Held-out worlds that turn once in 8 or 9 s, and their twins with other landmarks: 10 s are given, 4 s are the model's own.
    returns  dict: recall as it is, and with what memory holds encoded in one pack; share of returns that follow the other
             world's memory when slow memories were exchanged, and that stay with their own; chance; number of returns
    """
    which = [(world.HELD_OUT + i, "turn", 8 + i % 2, twin) for twin in (0, 1) for i in range(pairs)]
    found = {}
    for test in ("", "pack", "swap"):
        frames, keeps = continuations(dit, encoder, tae, which, GIVEN, 5, PRESETS["uniform2"], sampler, device, test=test)
        readings = [world.judge(f) for f in frames]
        found[test] = [(e, w) for w, r, k in zip(which, readings, keeps)
                       for e, _ in returns(r, world.world(*w).caption, k, PRESETS["uniform2"], GIVEN)]
        found.setdefault("chance", world.chance(readings))

    def follows(other):
        return [e.read == world.world(*w[:3], 1 - w[3] if other else w[3]).landmarks[e.sector] for e, w in found["swap"]
                if world.world(*w[:3], 0).landmarks[e.sector] != world.world(*w[:3], 1).landmarks[e.sector]]
    return {"recall": np.mean([e.recall for e, _ in found[""]]), "packed": np.mean([e.recall for e, _ in found["pack"]]),
            "follows": np.mean(follows(True)), "stays": np.mean(follows(False)), "chance": found["chance"], "n": len(found[""])}


# ---- real metrics on real videos ---------------------------------------------------------------------------------------

SECONDS = (10, 20, 30, 40, 50, 60)  # where the paper reads its scores, from 0.5 s before to 0.5 s after
NETWORKS = {  # where to get one; its kinds; resizing, mean and deviation of red, green, blue as in VBench
    "--dino": ("facebook/dinov2-base", ("vit", "dinov2"), "bilinear", (.485, .456, .406), (.229, .224, .225)),
    "--clip": ("openai/clip-vit-large-patch14", ("clip",), "bicubic",
               (.48145466, .4578275, .40821073), (.26862954, .26130258, .27577711))}


def read_batches(path):
    """Yields (frames a second, (b, 3, h, w) uint8), 16 frames at a time. Raises OSError that says why it cannot."""
    import imageio_ffmpeg
    try:
        facts = next(source := imageio_ffmpeg.read_frames(str(path.resolve())))
        while batch := [np.frombuffer(f, np.uint8).reshape(*facts["size"][::-1], 3) for _, f in zip(range(16), source)]:
            yield facts["fps"], torch.from_numpy(np.stack(batch)).movedim(-1, 1)  # (b, 3, h, w)
    except (OSError, RuntimeError, ValueError, StopIteration) as error:
        raise OSError((str(error).strip() or "no video").splitlines()[-1][:100]) from None


def encoders(option, folder, device):
    """
    A network of transformers, from a local folder -> two functions to features of norm 1, a name. Raises BadInput
    images  (b, 3, h, w) uint8 -> (b, d), the CLS token at 224 pixels' shorter side or CLIP of the middle square; text -> (d,)
    """
    get, kinds, mode, *colours = NETWORKS[option]
    try:
        import transformers
        path, clip = Path(folder).resolve(strict=True), option == "--clip"
        model, facts = transformers.AutoModel.from_pretrained(path, local_files_only=True, output_loading_info=True)
        one_of("network", model.config.model_type, kinds)
        words = transformers.AutoTokenizer.from_pretrained(path, local_files_only=True) if clip else None
        if lost := [k for k in facts["missing_keys"] if not k.startswith("pooler.")]:  # DINO's has none, none is used
            raise OSError(f"{len(lost)} weights are missing, as {lost[0]}")  # transformers would go on with random ones
    except Exception as error:  # whatever the damage makes it meet
        raise BadInput(f"cannot use {option} {folder} ({(str(error).strip() or repr(error)).splitlines()[0][:150]}): "
                       f"pip install -r requirements-eval.txt, hf download {get} --local-dir {folder}") from None
    model, c = model.to(device).eval(), model.config.vision_config if clip else model.config
    mean, std = (torch.tensor(z, device=device)[:, None, None] for z in colours)
    side, more = c.image_size if clip else 224, {"interpolate_pos_encoding": True} if c.model_type == "vit" else {}

    def images(frames):
        size = [int(side * n / min(frames.shape[-2:])) for n in frames.shape[-2:]]
        x = (F.interpolate(frames.to(device).float(), size, mode=mode) / 255 - mean) / std  # not antialiased, as VBench's
        if not clip:
            return F.normalize(model(x, **more).last_hidden_state[:, 0]).cpu()
        top, left = (round((n - side) / 2) for n in size)
        x = model.vision_model(x[..., top:top + side, left:left + side]).pooler_output
        return F.normalize(model.visual_projection(x)).cpu()

    def text(string):
        ids = words(string, truncation=True, max_length=model.config.text_config.max_position_embeddings, return_tensors="pt")
        return F.normalize(model.text_projection(model.text_model(**ids.to(device)).pooler_output))[0].cpu()
    return images, text, f"{c.model_type}, width {c.hidden_size}, {c.num_hidden_layers} layers, patch {c.patch_size}"


def consistency(features):
    """(n, d) of norm 1 -> mean over i >= 1 of [max(0, cos(f_i, f_i-1)) + max(0, cos(f_i, f_0))] / 2: VBench, arXiv 2311.17982"""
    near, first = (features[1:] * features[:-1]).sum(1), features[1:] @ features[0]
    return ((near.clip(0) + first.clip(0)) / 2).mean().item()  # one frame has no pair: nan


def windows(name, cosines, fps):
    """(n,), of every frame -> {name_t: mean from t - 0.5 s to t + 0.5 s or the end; nan after it}: arXiv 2602.06028, table 1"""
    return {f"{name}_{t}": cosines[(torch.arange(len(cosines)) / fps - t).abs() <= .5 + 1e-5].mean().item() for t in SECONDS}


def dynamic(small, fps):
    """
    Dynamic degree, APPROXIMATE: VBench's rule with block matching at 64 pixels for its network RAFT -> bool. A pair 1/8 s apart
    moves if its fastest 5 % do more than 6/256 of the shorter side; a video, if pairs as many as a quarter of its samples do.
    small: (n, 64, w) grey, 0..255. A pixel moves by the shift of up to 4 at which its 7 x 7 fits best
    """
    lengths, small, moving = torch.cartesian_prod(*[torch.arange(-4., 5)] * 2).norm(dim=1), small[::max(1, round(fps / 8))], 0
    for a, b in zip(small.float(), small[1:].float()):
        shifted = F.pad(b[None], (4, 4, 4, 4), mode="replicate")[0].unfold(0, len(b), 1).unfold(1, b.shape[1], 1)
        costs = F.avg_pool2d((shifted - a).abs().flatten(0, 1), 7, 4, 3)  # (81, h/4, w/4)
        costs[40] -= 2  # for staying: noise stands still
        moving += int(lengths[costs.argmin(0)].flatten().topk(costs[0].numel() // 20 + 1).values.mean() > 1.5 * max(1, 8 / fps))
    return moving >= max(1, round(len(small) / 4))


def measure(path, images, text):
    """A row of the CSV, with plain cosines. images: dino, clip -> encoder, either may be absent; text (d,). Raises OSError"""
    images = {"grey": lambda z: F.interpolate(z.float(), scale_factor=64 / min(z.shape[2:]), mode="area").mean(1).byte()} | images
    parts = [(fps, {name: f(frames) for name, f in images.items()}) for fps, frames in read_batches(path)]
    fps, got = parts[0][0], {name: torch.cat([part[name] for _, part in parts]) for name in images}  # some kB a frame
    row = {"video": path.name, "frames": len(got["grey"]), "fps": fps, "dynamic_approx": int(dynamic(got["grey"], fps))}
    if "dino" in got:
        row |= {"subject": consistency(f := got["dino"])} | windows("dino", f @ f[0], fps)
    if "clip" in got:
        row |= {"background": consistency(f := got["clip"])} | windows("clip_f", f @ f[0], fps) | windows("clip_t", f @ text, fps)
    return row


def bootstrap(values, weights):
    """values, weights (n,), one a video -> weighted mean, and the ends of its 95 % interval over 2000 draws of n videos"""
    draws = np.random.default_rng(0).integers(len(values), size=(2000, len(values)))
    return values @ weights / weights.sum(), *np.percentile((values * weights)[draws].sum(1) / weights[draws].sum(1), [2.5, 97.5])


def lay_out(prompts, to):
    """Links videos, path -> text, as to/videos/TEXT-0.mp4, .. and writes to/prompts.json -> VBench's command"""
    names = {}
    (to / "videos").mkdir(parents=True)
    for path, text in prompts.items():
        stem = re.sub(r"[/\s]+", " ", text).encode()[:200].decode(errors="ignore")  # file systems take 255 bytes
        names[name := next(z for i in range(len(prompts)) if (z := f"{stem}-{i}{path.suffix}") not in names)] = text
        (to / "videos" / name).symlink_to(path.resolve())
    (to / "prompts.json").write_text(json.dumps(names, indent=1))
    return (f"python evaluate.py --mode custom_input --videos_path '{to}/videos' --prompt_file '{to}/prompts.json' --dimension"
            " subject_consistency background_consistency motion_smoothness dynamic_degree aesthetic_quality imaging_quality")


@torch.no_grad()
def real_videos(cfg):
    """python evaluate.py --videos DIR: every mp4 and gif there -> out/videos.csv, a table, VBench's layout"""
    paths = sorted(p for p in Path(cfg.videos or ".none").glob("*") if p.suffix in (".mp4", ".gif") and p.name[0] != ".")
    if not paths:
        raise BadInput(f"no mp4 or gif in --videos {cfg.videos or 'DIR'}: python sample.py --prompts FILE --seeds 5 makes some")
    if not cfg.dino + cfg.clip + cfg.vbench:
        raise BadInput(f"give --dino DIR, --clip DIR: pip install -r requirements-eval.txt; hf download {NETWORKS['--dino'][0]}")
    if cfg.vbench and Path(cfg.vbench, "videos").exists():
        raise BadInput(f"--vbench {cfg.vbench} holds videos already: give a new folder")
    try:  # a JSON, name with or without -N.mp4 -> text; or the lines that sample.py took, which names its files so
        told = Path(cfg.prompts).read_text(encoding="utf-8") if cfg.prompts else ""
        given = json.loads(told) if cfg.prompts.endswith(".json") else {
            re.sub(r"[^a-z0-9]+", "-", line.lower()).strip("-")[:120]: line.strip() for line in told.splitlines()}
        stems = {p: re.sub(r"-\d+$", "", p.stem) for p in paths}
        prompts = {p: str(given[p.name if p.name in given else s]) for p, s in stems.items()} if cfg.prompts else stems
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise BadInput(f"--prompts {cfg.prompts} must hold a text for every video: {error!r}") from None
    images, texts, rows = {}, {}, []
    for option, folder in [z for z in (("--dino", cfg.dino), ("--clip", cfg.clip)) if z[1]]:
        images[option[2:]], text, name = encoders(option, folder, pick_device(cfg.device))
        texts = {t: text(t) for t in set(prompts.values())} if option == "--clip" else {}
        print(f"{option} {folder}: {name}")
    for path in tqdm(paths, desc="videos"):
        try:
            rows.append(measure(path, images, texts.get(prompts[path])) | {"prompt": prompts[path]})
        except OSError as error:
            tqdm.write(f"skipped {path.name}: {error}")
            del prompts[path]
    if not rows:
        raise BadInput(f"none of the {len(paths)} files in {cfg.videos} can be read")
    Path(cfg.out).mkdir(parents=True, exist_ok=True)
    with open(Path(cfg.out) / "videos.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([rows[0], *(r.values() for r in rows)])
    print(f"\n{len(rows)} of {len(paths)} videos: mean times 100 [95 % bootstrap interval over videos] (videos so long)")
    for name in list(rows[0])[3:-1]:  # without video, frames, fps; prompt
        weights = [r["frames"] - 1 if name in ("subject", "background") else 1 for r in rows]  # as in VBench's totals
        there = np.array([(r[name], w) for r, w in zip(rows, weights) if r[name] == r[name]], float)
        mean, low, high = 100 * np.array(bootstrap(*there.T)) if len(there) else [np.nan] * 3
        print(f"  {name:14} {mean:6.2f} [{low:.2f}, {high:.2f}] ({len(there)})")
    if cfg.vbench:
        print(f"\nin VBench's repository (github.com/Vchitect/VBench):\n{lay_out(prompts, Path(cfg.vbench).resolve())}")


def main():
    cfg = parse(Config)
    if cfg.videos or cfg.dino or cfg.clip or cfg.prompts or cfg.vbench:
        return real_videos(cfg)
    device = pick_device(cfg.device)
    dit, facts = load(cfg.ckpt or WEIGHTS / "init_ar.safetensors", DiT, DiTConfig)
    encoder, _ = load(WEIGHTS / "text.safetensors", TextEncoder, TextConfig)
    tae, _ = load(WEIGHTS / "vae.safetensors", TAE, TAEConfig)
    dit, encoder, tae = dit.to(device), encoder.to(device), tae.to(device, memory_format=torch.channels_last)
    sampler = Sampler(**facts["sampler"])
    videos, chunks = (16, 27) if cfg.quick else (64, 67)
    seeds = [world.HELD_OUT + cfg.seed + i for i in range(videos)]
    started, rows, events, readings = time.time(), [], {}, {}

    g = gates(dit, encoder, tae, sampler, device)
    print(f"48 worlds that turn once in 8 or 9 s, {g['n']} returns: recall {g['recall']:.0%}, chance {g['chance']:.0%}; memory "
          f"encoded as one pack {g['packed']:.0%}; slow memories exchanged: {g['follows']:.0%} follow the memory, {g['stays']:.0%} do not")

    best = {}  # the autoencoder's own picture of the true worlds: the ceiling of validity
    for s in tqdm(seeds, desc="autoencoder"):
        with torch.no_grad():
            frames = tae.decode(encode_world(tae, (s, None, None), 2 * GIVEN * CHUNK, device))[0][0]
        r = world.judge((frames * .5 + .5).clamp(0, 1).cpu().numpy())
        best[s] = r.psnr.mean(), np.nanmean(r.box_psnr)
    for name in ("slowfast", "longlive"):
        policy, events[name], readings[name] = replace(PRESETS[name], tau=sampler.tau), [], []
        for at in tqdm(range(0, videos, 16), desc=name):
            part = seeds[at:at + 16]
            which = [(s, None, None) for s in part]
            frames, keeps = continuations(dit, encoder, tae, which, GIVEN, chunks, policy, sampler, device)
            for s, video, keep in zip(part, frames, keeps):
                caption, r = world.world(s).caption, world.judge(video)
                found = returns(r, caption, keep, policy, GIVEN)
                events[name] += [(e, h, (e.back - frames_of(GIVEN * CHUNK)) / world.FPS) for e, h in found]
                readings[name].append(r)
                start = frames_of(GIVEN * CHUNK)
                psnr = [r.psnr[start + 160 * i:start + 160 * (i + 1)].mean() for i in range((len(video) - start) // 160)]
                box = [np.nanmean(r.box_psnr[start + 160 * i:start + 160 * (i + 1)]) for i in range(len(psnr))]
                rows.append({"policy": name, "seed": s, "caption": caption, "events": len(found),
                             "recalled": sum(e.recall for e, _ in found), "held": sum(h for _, h in found),
                             "turning": world.turning_rate(r, caption), "ceiling": best[s][0], "box_ceiling": best[s][1],
                             **{f"psnr_{10 * i}": p for i, p in enumerate(psnr)},
                             **{f"box_{10 * i}": p for i, p in enumerate(box)}})
    Path(cfg.out).mkdir(parents=True, exist_ok=True)
    with open(Path(cfg.out) / "evaluate.csv", "w", newline="") as f:
        writer = csv.DictWriter(f, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)

    own = list(range(len([k for k in rows[0] if k.startswith("psnr")])))
    print(f"\n{videos} held-out worlds, {frames_of(GIVEN * CHUNK) / world.FPS:.1f} s real, then {chunks * .75:.1f} s of the model's own; "
          f"took {time.time() - started:.0f} s")
    print("\nrecall of landmarks outside the sink, by seconds of absence (right / events; ceiling: the policy still held it)")
    for name in events:
        print(f"  {name:9} chance {world.chance(readings[name]):.0%}")
        for until in (20, 999):
            some = [(e, h) for e, h, when in events[name] if when < until]
            six = [(e.recall, h) for e, h in some if 5.4 <= e.seconds <= 6.6]
            print(f"    due in the first {until} s:" if until < 999 else "    all:",
                  *(f"{lo}-{hi} s {np.mean([e.recall for e, _ in b]):.0%} ({len(b)}; {np.mean([h for _, h in b]):.0%})"
                    for lo, hi in zip(ABSENCES, ABSENCES[1:]) if (b := [(e, h) for e, h in some if lo <= e.seconds < hi])),
                  f"| at 6 s {np.mean([r for r, _ in six]):.0%} ({len(six)}; {np.mean([h for _, h in six]):.0%})" if six else "")
    print("\nvalidity (dB against the nearest renderable frame), autoencoder's ceiling "
          f"{np.mean([r['ceiling'] for r in rows]):.1f}, landmark boxes {np.mean([r['box_ceiling'] for r in rows]):.1f}")
    for name in events:
        mine = [r for r in rows if r["policy"] == name]
        print(f"  {name:9} " + ", ".join(f"{10 * i}-{10 * i + 10} s {np.mean([r[f'psnr_{10 * i}'] for r in mine]):.1f} "
                                         f"(boxes {np.nanmean([r[f'box_{10 * i}'] for r in mine]):.1f})" for i in own)
              + f"; turning rate within 10 %: {np.mean([abs(r['turning'] - 1) < .1 for r in mine]):.0%}")


if __name__ == "__main__":
    run(main)
