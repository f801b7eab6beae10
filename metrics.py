"""
Scores of real videos: the paper's and VBench's, by DINO and CLIP, and a folder for VBench's own code.

    python metrics.py --videos DIR --dino DIR --clip DIR --prompts FILE    # out/videos.csv, means, intervals
    python metrics.py --videos DIR --vbench DIR                            # links, prompts.json

Nothing is downloaded by itself: hf download facebook/dinov2-base --local-dir DIR and, for CLIP,
openai/clip-vit-large-patch14. VBench's own are facebook/dino-vitb16 and openai/clip-vit-base-patch32.

    dino_t, clip_f_t       Context Forcing's, table 1: cosine with the first frame, within half a second of t
    clip_t_t               the same, with the prompt
    subject, background    VBench's, of DINO's and of CLIP's features f_i of frame i (norm 1):
                           mean over i > 0 of [max(0, f_i f_i-1) + max(0, f_i f_0)] / 2

References: Context Forcing, arXiv 2602.06028; VBench, arXiv 2311.17982 (resizing and colours are its own).
Leaves out: motion, aesthetics and imaging quality, which VBench's own code has; files other than mp4.
"""
import csv
import json
import math
import re
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from tqdm import tqdm

from config import BadInput, parse, pick_device, run
from report import estimate

SECONDS = (10, 20, 30, 40, 50, 60)  # where the paper reads its scores
BATCH = 16  # frames
DINO_COLOURS = (.485, .456, .406), (.229, .224, .225)  # mean and deviation
CLIP_COLOURS = (.48145466, .4578275, .40821073), (.26862954, .26130258, .27577711)
VBENCH = """python evaluate.py --mode custom_input --videos_path '{folder}/videos' \\
    --prompt_file '{folder}/prompts.json' --dimension subject_consistency background_consistency \\
    motion_smoothness dynamic_degree aesthetic_quality imaging_quality"""


@dataclass
class Config:
    videos: str = ""   # a folder of mp4
    dino: str = ""     # a folder with DINOv2 or DINO
    clip: str = ""     # a folder with CLIP
    prompts: str = ""  # the file of lines that sample.py took (default: the file names are the prompts)
    vbench: str = ""   # a new folder to lay the videos out in
    out: str = "out"   # folder for videos.csv
    device: str = ""   # cuda | mps | cpu (default: the best there is)


# ---- networks: functions from (b, 3, h, w) uint8 to features (b, d) of norm 1 ----------------------------

def load_network(option, folder, kinds, source):
    """-> network, tokenizer or None. Whatever a damaged folder makes transformers raise becomes one line."""
    try:
        from transformers import AutoModel, AutoTokenizer
        path = Path(folder).resolve(strict=True)
        network, info = AutoModel.from_pretrained(path, local_files_only=True, output_loading_info=True)
        # transformers would put random weights for those that are missing; of DINO's pooler none is used
        missing = [name for name in info["missing_keys"] if not name.startswith("pooler.")]
        if missing or network.config.model_type not in kinds:
            raise ValueError(f"{network.config.model_type}: {len(missing)} weights are missing")
        words = AutoTokenizer.from_pretrained(path, local_files_only=True) if "clip" in kinds else None
        return network.eval(), words
    except Exception as error:
        reason = (str(error).strip() or repr(error)).splitlines()[0][:150]
        raise BadInput(f"cannot use {option} {folder} ({reason}): pip install -r requirements-eval.txt, "
                       f"hf download {source} --local-dir {folder}") from None


def prepare(frames, side, mode, colours, device):
    """The shorter side resized as VBench does it, not antialiased; colours normalised"""
    h, w = frames.shape[-2:]
    size = [int(side * n / min(h, w)) for n in (h, w)]
    mean, deviation = torch.tensor(colours, device=device)[:, :, None, None]
    return (F.interpolate(frames.to(device).float(), size, mode=mode) / 255 - mean) / deviation


def dino_features(network, frames):
    """The CLS token of the whole frame"""
    x = prepare(frames, 224, "bilinear", DINO_COLOURS, network.device)
    # DINO's positions are those of 224 x 224 pixels; DINOv2 fits them to the size unasked
    more = {"interpolate_pos_encoding": True} if network.config.model_type == "vit" else {}
    return F.normalize(network(x, **more).last_hidden_state[:, 0]).cpu()


def clip_features(network, frames):
    """Of the middle square"""
    side = network.config.vision_config.image_size
    x = prepare(frames, side, "bicubic", CLIP_COLOURS, network.device)
    top, left = (round((n - side) / 2) for n in x.shape[-2:])
    pooled = network.vision_model(x[..., top:top + side, left:left + side]).pooler_output
    return F.normalize(network.visual_projection(pooled)).cpu()


def clip_text(network, words, prompt):
    """-> (d,)"""
    longest = network.config.text_config.max_position_embeddings
    ids = words(prompt, truncation=True, max_length=longest, return_tensors="pt")
    pooled = network.text_model(**ids.to(network.device)).pooler_output
    return F.normalize(network.text_projection(pooled))[0].cpu()


# ---- scores ----------------------------------------------------------------------------------------------

def consistency(features):
    """VBench's, of (n, d); NaN for one frame, which has no pair"""
    to_last = (features[1:] * features[:-1]).sum(1)
    to_first = features[1:] @ features[0]
    return ((to_last.clamp(min=0) + to_first.clamp(min=0)) / 2).mean().item()


def windows(name, cosines, fps):
    """The paper's, of the cosines (n,) of all frames -> {name_t: mean around t, NaN behind the end}"""
    seconds = torch.arange(len(cosines)) / fps
    near = {t: (seconds - t).abs() <= .5 + 1e-5 for t in SECONDS}
    return {f"{name}_{t}": cosines[near[t]].mean().item() for t in SECONDS}


def read_batches(path):
    """Yields (b, 3, h, w) uint8; raises OSError where the file cannot be read."""
    frames = iio.imiter(path, plugin="FFMPEG")
    batch = list(islice(frames, BATCH))
    while batch:
        yield rearrange(torch.from_numpy(np.stack(batch)), "b h w c -> b c h w")
        batch = list(islice(frames, BATCH))


def score_video(path, prompt, dino, clip, words):
    """dino, clip: networks or None -> a row of the CSV, cosines as they are"""
    fps = iio.immeta(path, plugin="FFMPEG")["fps"]
    # features, 16 frames at a time: some kB a frame stay
    count, by_dino, by_clip = 0, [], []
    for frames in read_batches(path):
        count += len(frames)
        if dino:
            by_dino.append(dino_features(dino, frames))
        if clip:
            by_clip.append(clip_features(clip, frames))
    # the table's columns: what it is, VBench's, the paper's
    row = {"video": path.name, "prompt": prompt, "fps": fps, "frames": count}
    if dino:
        f = torch.cat(by_dino)
        row |= {"subject": consistency(f)} | windows("dino", f @ f[0], fps)
    if clip:
        f = torch.cat(by_clip)
        row |= {"background": consistency(f)} | windows("clip_f", f @ f[0], fps)
        row |= windows("clip_t", f @ clip_text(clip, words, prompt), fps)
    return row


def write_table(rows, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    # the scores stand behind video, prompt, fps and frames
    print("mean times 100 [95 % bootstrap interval over videos] (videos so long)")
    for name in list(rows[0])[4:]:
        there = [row[name] for row in rows if not math.isnan(row[name])]
        mean, low, high = 100 * estimate([(x, 1) for x in there])
        print(f"  {name:14} {mean:6.2f} [{low:.2f}, {high:.2f}] ({len(there)})")


def lay_out(prompts, folder):
    """path -> prompt. Links the videos, writes prompts.json beside them, prints VBench's command."""
    (folder / "videos").mkdir(parents=True)
    for path in prompts:
        (folder / "videos" / path.name).symlink_to(path.resolve())
    names = {path.name: prompt for path, prompt in prompts.items()}
    (folder / "prompts.json").write_text(json.dumps(names, indent=1), encoding="utf-8")
    print("in VBench's repository (github.com/Vchitect/VBench):", VBENCH.format(folder=folder), sep="\n")


# ---- the command line ------------------------------------------------------------------------------------

def sample_name(prompt):
    """As sample.py names its files"""
    return re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:120]


def read_prompts(paths, file):
    """-> path -> prompt: the line that sample.py named the video after (a-cat-0.mp4), or that name"""
    names = {path: re.sub(r"-\d+$", "", path.stem) for path in paths}
    if not file:
        return names
    try:
        lines = Path(file).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"cannot read --prompts {file}: {error}") from None
    prompts = {sample_name(line): line.strip() for line in lines}
    for path, name in names.items():
        if name not in prompts:
            raise BadInput(f"--prompts {file} has no line for {path.name}")
    return {path: prompts[name] for path, name in names.items()}


@torch.no_grad()
def main():
    cfg = parse(Config)
    # which videos, and what was asked for
    paths = sorted(Path(cfg.videos or ".none").glob("[!.]*.mp4"))
    if not paths:
        raise BadInput(f"no mp4 in --videos {cfg.videos or 'DIR'}: sample.py --prompts FILE makes some")
    if not (cfg.dino or cfg.clip or cfg.vbench):
        raise BadInput("give --dino DIR, --clip DIR or --vbench DIR (see --help)")
    if cfg.vbench and Path(cfg.vbench, "videos").exists():
        raise BadInput(f"--vbench {cfg.vbench} holds videos already: give a new folder")
    prompts = read_prompts(paths, cfg.prompts)
    # networks
    device = pick_device(cfg.device)
    dino = clip = words = None
    if cfg.dino:
        dino, _ = load_network("--dino", cfg.dino, ("vit", "dinov2"), "facebook/dinov2-base")
        dino.to(device)
    if cfg.clip:
        clip, words = load_network("--clip", cfg.clip, ("clip",), "openai/clip-vit-large-patch14")
        clip.to(device)
    # scores; what cannot be read is named and left out
    rows = []
    for path in tqdm(paths, "videos"):
        try:
            rows.append(score_video(path, prompts[path], dino, clip, words))
        except OSError as error:
            tqdm.write(f"skipped {path.name}: {str(error).splitlines()[-1]}")
            del prompts[path]
    if not rows:
        raise BadInput(f"none of the {len(paths)} files in {cfg.videos} can be read")
    write_table(rows, Path(cfg.out, "videos.csv"))
    if cfg.vbench:
        lay_out(prompts, Path(cfg.vbench).resolve())


if __name__ == "__main__":
    run(main)
