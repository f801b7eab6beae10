"""
Scores of real videos: the paper's and VBench's consistencies by DINO and CLIP, and a folder for VBench's own code.

    python metrics.py --videos DIR --dino DIR --clip DIR --prompts FILE    # out/videos.csv and a table
    python metrics.py --videos DIR --vbench DIR                            # links and prompts.json, for VBench

Nothing is downloaded by itself: hf download facebook/dinov2-base --local-dir DIR, openai/clip-vit-large-patch14.
Features f_i of frame i have norm 1, so a product is a cosine.

    dino_t, clip_f_t       mean of f_i f_0 over frames within half a second of t      Context Forcing, table 1
    clip_t_t               the same with the prompt's feature for f_0
    subject, background    mean over i > 0 of [max(0, f_i f_i-1) + max(0, f_i f_0)] / 2, of DINO and of CLIP    VBench

References: Context Forcing, arXiv 2602.06028, table 1; VBench, arXiv 2311.17982 (resizing and colours too; its own
networks are facebook/dino-vitb16 and openai/clip-vit-base-patch32).
Leaves out: motion, aesthetics, imaging quality: VBench's own code has them.
"""
import csv
import json
import math
import re
from collections import Counter
from contextlib import contextmanager
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


@dataclass
class Config:
    videos: str = ""   # a folder of videos (mp4, gif)
    dino: str = ""     # a folder with DINOv2, or DINO ViT-B/16 (VBench's)
    clip: str = ""     # a folder with CLIP (VBench's: ViT-B/32)
    prompts: str = ""  # the file of lines that sample.py took (default: the file names are the prompts)
    vbench: str = ""   # a new folder to lay the videos out in for VBench's own code
    out: str = "out"   # folder for videos.csv
    device: str = ""   # cuda | mps | cpu (default: the best there is)


# ---- networks -------------------------------------------------------------------------------------------------

@contextmanager
def from_folder(option, folder, source):
    """Whatever a damaged folder makes transformers raise becomes one line that says where to get a good one."""
    try:
        yield
    except Exception as error:
        reason = (str(error).strip() or repr(error)).splitlines()[0][:150]
        raise BadInput(f"cannot use {option} {folder} ({reason}): pip install -r requirements-eval.txt, "
                       f"hf download {source} --local-dir {folder}") from None


def load_network(folder, kinds):
    """-> a network of transformers; raises where weights are missing, for which transformers would put random ones"""
    from transformers import AutoModel
    path = Path(folder).resolve(strict=True)
    network, info = AutoModel.from_pretrained(path, local_files_only=True, output_loading_info=True)
    missing = [name for name in info["missing_keys"] if not name.startswith("pooler.")]  # DINO's, which is not used
    if missing:
        raise ValueError(f"{len(missing)} weights are missing, as {missing[0]}")
    if network.config.model_type not in kinds:
        raise ValueError(f"it holds a {network.config.model_type}, not one of {', '.join(kinds)}")
    return network.eval()


def prepare(frames, side, mode, colours):
    """(b, 3, h, w) uint8 -> float, the shorter side resized as VBench does (not antialiased), colours normalised"""
    h, w = frames.shape[-2:]
    size = [int(side * n / min(h, w)) for n in (h, w)]
    average, deviation = torch.tensor(colours, device=frames.device)[:, :, None, None]
    return (F.interpolate(frames.float(), size, mode=mode) / 255 - average) / deviation


class Dino:
    COLOURS = (.485, .456, .406), (.229, .224, .225)  # mean and deviation

    def __init__(self, folder, device):
        with from_folder("--dino", folder, "facebook/dinov2-base"):
            self.network = load_network(folder, ("vit", "dinov2")).to(device)
        # DINO's own positions are for 224 x 224 pixels; DINOv2 always fits them to the size
        self.more = {"interpolate_pos_encoding": True} if self.network.config.model_type == "vit" else {}

    def images(self, frames):
        """(b, 3, h, w) uint8 -> (b, d): the CLS token of the whole frame"""
        x = prepare(frames.to(self.network.device), 224, "bilinear", self.COLOURS)
        return F.normalize(self.network(x, **self.more).last_hidden_state[:, 0]).cpu()


class Clip:
    COLOURS = (.48145466, .4578275, .40821073), (.26862954, .26130258, .27577711)

    def __init__(self, folder, device):
        with from_folder("--clip", folder, "openai/clip-vit-large-patch14"):
            from transformers import AutoTokenizer
            self.network = load_network(folder, ("clip",)).to(device)
            self.words = AutoTokenizer.from_pretrained(Path(folder).resolve(), local_files_only=True)

    def images(self, frames):
        """(b, 3, h, w) uint8 -> (b, d) of the middle square"""
        side = self.network.config.vision_config.image_size
        x = prepare(frames.to(self.network.device), side, "bicubic", self.COLOURS)
        top, left = (round((n - side) / 2) for n in x.shape[-2:])
        x = x[..., top:top + side, left:left + side]
        pooled = self.network.vision_model(x).pooler_output
        return F.normalize(self.network.visual_projection(pooled)).cpu()

    def text(self, prompt):
        """-> (d,)"""
        longest = self.network.config.text_config.max_position_embeddings
        ids = self.words(prompt, truncation=True, max_length=longest, return_tensors="pt").to(self.network.device)
        pooled = self.network.text_model(**ids).pooler_output
        return F.normalize(self.network.text_projection(pooled))[0].cpu()


# ---- scores ---------------------------------------------------------------------------------------------------

def consistency(features):
    """VBench's, of (n, d) features of norm 1; NaN for one frame, which has no pair"""
    to_last = (features[1:] * features[:-1]).sum(1)
    to_first = features[1:] @ features[0]
    return ((to_last.clamp(min=0) + to_first.clamp(min=0)) / 2).mean().item()


def windows(name, cosines, fps):
    """The paper's: cosines (n,) of all frames -> {name_t: mean within half a second of t; NaN behind the end}"""
    seconds = torch.arange(len(cosines)) / fps
    near = {t: (seconds - t).abs() <= .5 + 1e-5 for t in SECONDS}
    return {f"{name}_{t}": cosines[near[t]].mean().item() for t in SECONDS}


def frame_features(path, encoders):
    """A file, 16 frames at a time -> frames a second, n frames, {name: (n, d)}. Raises OSError if it cannot be read."""
    fps = iio.immeta(path, plugin="FFMPEG")["fps"]
    count = 0
    found = {name: [] for name in encoders}
    frames = iio.imiter(path, plugin="FFMPEG")
    batch = list(islice(frames, BATCH))
    while batch:
        x = rearrange(torch.from_numpy(np.stack(batch)), "b h w c -> b c h w")
        count += len(batch)
        for name, encoder in encoders.items():
            found[name].append(encoder.images(x))
        batch = list(islice(frames, BATCH))
    return fps, count, {name: torch.cat(features) for name, features in found.items()}


def score_video(path, encoders, prompt):
    """-> a row of the CSV, cosines as they are"""
    fps, frames, features = frame_features(path, encoders)
    row = {"video": path.name, "prompt": prompt, "fps": fps, "frames": frames}
    if "dino" in features:
        f = features["dino"]
        row |= {"subject": consistency(f)} | windows("dino", f @ f[0], fps)
    if "clip" in features:
        f = features["clip"]
        row |= {"background": consistency(f)} | windows("clip_f", f @ f[0], fps)
        row |= windows("clip_t", f @ encoders["clip"].text(prompt), fps)
    return row


def print_table(rows):
    print("mean times 100 [95 % bootstrap interval over videos] (videos so long)")
    for name in list(rows[0])[4:]:
        there = [row for row in rows if not math.isnan(row[name])]
        # VBench's totals are over pairs of frames, the paper's over videos
        pairs_of_frames = name in ("subject", "background")
        weights = [row["frames"] - 1 if pairs_of_frames else 1 for row in there]
        mean, low, high = 100 * estimate([(row[name] * n, n) for row, n in zip(there, weights)])
        print(f"  {name:14} {mean:6.2f} [{low:.2f}, {high:.2f}] ({len(there)})")


# ---- VBench's own code ----------------------------------------------------------------------------------------

def lay_out(prompts, folder):
    """path -> prompt. Links the videos as folder/videos/PROMPT-0.mp4, .. and writes folder/prompts.json."""
    (folder / "videos").mkdir(parents=True)
    count, names = Counter(), {}
    for path, prompt in prompts.items():
        stem = re.sub(r"[/\s]+", " ", prompt).encode()[:200].decode(errors="ignore")  # file systems take 255 bytes
        name = f"{stem}-{count[stem]}.mp4"
        count[stem] += 1
        names[name] = prompt
        (folder / "videos" / name).symlink_to(path.resolve())
    (folder / "prompts.json").write_text(json.dumps(names, indent=1))
    print(f"in VBench's repository (github.com/Vchitect/VBench):\npython evaluate.py --mode custom_input "
          f"--videos_path '{folder}/videos' --prompt_file '{folder}/prompts.json' --dimension subject_consistency "
          "background_consistency motion_smoothness dynamic_degree aesthetic_quality imaging_quality")


# ---- the command line -----------------------------------------------------------------------------------------

def read_prompts(paths, file):
    """The prompt of each video: the line of the file that sample.py named it after (a-cat-0.mp4), or its name."""
    names = {path: re.sub(r"-\d+$", "", path.stem) for path in paths}
    if not file:
        return names
    try:
        lines = Path(file).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"cannot read --prompts {file}: {error}") from None
    prompts = {re.sub(r"[^a-z0-9]+", "-", line.lower()).strip("-")[:120]: line.strip() for line in lines}
    unknown = [path.name for path, name in names.items() if name not in prompts]
    if unknown:
        raise BadInput(f"--prompts {file} has no line for {unknown[0]}")
    return {path: prompts[name] for path, name in names.items()}


@torch.no_grad()
def main():
    cfg = parse(Config)
    paths = sorted(Path(cfg.videos or ".none").glob("[!.]*.mp4"))
    if not paths:
        raise BadInput(f"no mp4 in --videos {cfg.videos or 'DIR'}: python sample.py --prompts FILE --seeds 5 makes some")
    if not (cfg.dino or cfg.clip or cfg.vbench):
        raise BadInput("give --dino DIR, --clip DIR or --vbench DIR: pip install -r requirements-eval.txt; "
                       "hf download facebook/dinov2-base --local-dir DIR")
    if cfg.vbench and Path(cfg.vbench, "videos").exists():
        raise BadInput(f"--vbench {cfg.vbench} holds videos already: give a new folder")
    prompts = read_prompts(paths, cfg.prompts)
    device = pick_device(cfg.device)
    encoders = {}
    if cfg.dino:
        encoders["dino"] = Dino(cfg.dino, device)
    if cfg.clip:
        encoders["clip"] = Clip(cfg.clip, device)
    # what cannot be read is named and left out
    rows = []
    for path in tqdm(paths, "videos"):
        try:
            rows.append(score_video(path, encoders, prompts[path]))
        except OSError as error:
            tqdm.write(f"skipped {path.name}: {str(error).splitlines()[-1]}")
            del prompts[path]
    if not rows:
        raise BadInput(f"none of the {len(paths)} files in {cfg.videos} can be read")
    Path(cfg.out).mkdir(parents=True, exist_ok=True)
    with open(Path(cfg.out, "videos.csv"), "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    print_table(rows)
    if cfg.vbench:
        lay_out(prompts, Path(cfg.vbench).resolve())


if __name__ == "__main__":
    run(main)
