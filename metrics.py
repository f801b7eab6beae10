"""
The paper's and VBench's scores of real videos: DINO and CLIP from local folders, and a layout for VBench's own code.

    python metrics.py --videos DIR --dino DIR --clip DIR --vbench DIR    # nothing is downloaded by itself

References: Context Forcing, arXiv 2602.06028, table 1; VBench, arXiv 2311.17982.
"""
import csv
import json
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from config import BadInput, one_of, parse, pick_device, run
from report import SECONDS, ratio


@dataclass
class Config:
    videos: str = ""   # a folder of real videos (mp4, gif) to score
    dino: str = ""     # a folder with DINOv2 (its score), or DINO ViT-B/16 (VBench's subject consistency)
    clip: str = ""     # a folder with CLIP (frame to frame, frame to text; ViT-B/32: VBench's background)
    prompts: str = ""  # a .json, name -> prompt, or the file of lines that sample.py took (default: the file names)
    vbench: str = ""   # a new folder to lay them out in for VBench's own code
    out: str = "out"   # folder for videos.csv
    device: str = ""   # cuda | mps | cpu (default: the best there is)


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
    """(n, d) of norm 1 -> mean over i > 0 of [max(0, cos(f_i, f_i-1)) + max(0, cos(f_i, f_0))] / 2: VBench, arXiv 2311.17982"""
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


def score_video(path, images, text):
    """A row of the CSV, with plain cosines. images: dino, clip -> encoder, either may be absent; text (d,). Raises OSError"""
    images = {"grey": lambda z: F.interpolate(z.float(),
                                              scale_factor=64 / min(z.shape[2:]), mode="area").mean(1).byte()} | images
    parts = [(fps, {name: f(frames) for name, f in images.items()}) for fps, frames in read_batches(path)]
    fps, got = parts[0][0], {name: torch.cat([part[name] for _, part in parts]) for name in images}  # some kB a frame
    row = {"video": path.name, "frames": len(got["grey"]), "fps": fps, "dynamic_approx": int(dynamic(got["grey"], fps))}
    if "dino" in got:
        row |= {"subject": consistency(f := got["dino"])} | windows("dino", f @ f[0], fps)
    if "clip" in got:
        row |= {"background": consistency(f := got["clip"])}
        row |= windows("clip_f", f @ f[0], fps) | windows("clip_t", f @ text, fps)
    return row


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
def main():
    """Every mp4 and gif of --videos -> out/videos.csv, a table, VBench's layout"""
    cfg = parse(Config)
    paths = sorted(p for p in Path(cfg.videos or ".none").glob("*") if p.suffix in (".mp4", ".gif") and p.name[0] != ".")
    if not paths:
        raise BadInput(f"no mp4 or gif in --videos {cfg.videos or 'DIR'}: python sample.py --prompts FILE --seeds 5 makes some")
    if not cfg.dino + cfg.clip + cfg.vbench:
        raise BadInput(f"give --dino, --clip DIR: pip install -r requirements-eval.txt; hf download {NETWORKS['--dino'][0]}")
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
            rows.append(score_video(path, images, texts.get(prompts[path])) | {"prompt": prompts[path]})
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
        mean, low, high = 100 * np.array(ratio(there * there[:, 1:] ** [1, 0])) if len(there) else [np.nan] * 3
        print(f"  {name:14} {mean:6.2f} [{low:.2f}, {high:.2f}] ({len(there)})")
    if cfg.vbench:
        print(f"\nin VBench's repository (github.com/Vchitect/VBench):\n{lay_out(prompts, Path(cfg.vbench).resolve())}")


if __name__ == "__main__":
    run(main)
