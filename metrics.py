"""
Scores of real videos: the paper's, and two of VBench's, by DINO and CLIP.

    python metrics.py --videos DIR --dino DIR --clip DIR --prompts FILE    # out/videos.csv, out/videos.md

The first has a line a video, the second the means under the paper's tables, column by column.

Nothing is downloaded by itself: hf download facebook/dinov2-base --local-dir DIR and, for CLIP,
openai/clip-vit-large-patch14. VBench's own are facebook/dino-vitb16 and openai/clip-vit-base-patch32.

    dino_t, clip_f_t       Context Forcing's, table 1: cosine with the first frame, within half a second of t
    clip_t_t               the same, with the prompt
    subject, background    VBench's, of DINO's and of CLIP's features f_i of frame i (norm 1):
                           mean over i > 0 of [max(0, f_i f_i-1) + max(0, f_i f_0)] / 2

References: Context Forcing, arXiv 2602.06028; VBench, arXiv 2311.17982 (resizing and colours are its own).
Leaves out: motion, aesthetics and imaging quality: in VBench's repository, for any folder of mp4,
python evaluate.py --mode custom_input --videos_path DIR --dimension motion_smoothness aesthetic_quality ..
"""
import csv
import re
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from config import (BadInput, check_writable, in_one_line, parse, pick_device, run, tell,  # first
                    whole_or_absent, within, write_text)

import torch
import torch.nn.functional as F
from einops import rearrange
from tqdm import tqdm

from paper import beside
from records import read_json
from report import counts, markdown, mean
from text import read_prompts
from video import find_ffmpeg, open_clip, read_manifest

BATCH = 16  # frames
SECONDS = range(10, 70, 10)  # 10, .., 60: where the paper reads its scores
NO_VIDEOS = {".png", ".jpg", ".txt", ".csv", ".md", ".json", ".jsonl", ".safetensors"}
DINO_COLOURS = (.485, .456, .406), (.229, .224, .225)  # mean and deviation
CLIP_COLOURS = (.48145466, .4578275, .40821073), (.26862954, .26130258, .27577711)


@dataclass
class Config:
    videos: str = ""   # a folder of videos of any kind
    dino: str = ""     # a folder with DINOv2 or DINO
    clip: str = ""     # a folder with CLIP
    prompts: str = ""  # only videos of its lines (default: all, of the manifest's prompts or the file names)
    out: str = "out"   # folder for videos.csv
    device: str = ""   # cuda | mps | cpu (default: the best there is)


# ---- networks: from frames (b, 3, h, w) uint8 to features (b, d) of norm 1 ---------------------------------

def load_network(option, folder, kinds):
    """-> network, tokenizer or None. What a damaged folder makes transformers raise becomes one line."""
    remedy = "see the head of metrics.py, and pip install -r requirements-eval.txt"
    with in_one_line(f"cannot use {option} {folder}", remedy):
        from transformers import AutoModel, AutoTokenizer
        path = Path(folder).resolve(strict=True)
        # sizes that no such network has would be waited for
        told = read_json(path / "config.json", remedy)
        for part in (told, told.get("text_config", {}), told.get("vision_config", {})):
            within(f"{path}: num_hidden_layers", part.get("num_hidden_layers"), 1, 100)
            within(f"{path}: hidden_size", part.get("hidden_size"), 1, 10 ** 4)
        network, info = AutoModel.from_pretrained(path, local_files_only=True, output_loading_info=True)
        # transformers would put random weights for those that are missing; of DINO's pooler none is used
        missing = [name for name in info["missing_keys"] if not name.startswith("pooler.")]
        if missing or network.config.model_type not in kinds:
            raise ValueError(f"{network.config.model_type}: {len(missing)} weights are missing")
        words = AutoTokenizer.from_pretrained(path, local_files_only=True) if "clip" in kinds else None
        return network.eval(), words


def prepare(frames, side, mode, colours):
    """The shorter side resized as VBench does it, not antialiased; colours normalised"""
    size = [side * n // min(frames.shape[-2:]) for n in frames.shape[-2:]]
    mean, deviation = torch.tensor(colours, device=frames.device)[:, :, None, None]
    return (F.interpolate(frames.float(), size, mode=mode) / 255 - mean) / deviation


def dino_features(network, frames):
    """The CLS token of the whole frame"""
    x = prepare(frames, 224, "bilinear", DINO_COLOURS)
    # DINO's positions are those of 224 x 224 pixels; DINOv2 fits them to the size unasked
    more = {"interpolate_pos_encoding": True} if network.config.model_type == "vit" else {}
    return F.normalize(network(x, **more).last_hidden_state[:, 0]).cpu()


def clip_features(network, frames, ids):
    """Of the middle square; ids: the prompt's tokens -> features of the frames, of the prompt (1, d)"""
    side = network.config.vision_config.image_size
    x = prepare(frames, side, "bicubic", CLIP_COLOURS)
    top, left = (round((n - side) / 2) for n in x.shape[-2:])
    found = network(pixel_values=x[..., top:top + side, left:left + side], **ids)
    return found.image_embeds.cpu(), found.text_embeds.cpu()


# ---- scores ----------------------------------------------------------------------------------------------

def consistency(features):
    """VBench's, of (n, d); NaN for one frame, which has no pair"""
    now = features[1:]
    to_last, to_first = (now * features[:-1]).sum(1), now @ features[0]
    return (F.relu(to_last) + F.relu(to_first)).mean().item() / 2


def windows(name, cosines, seconds):
    """
    The paper's, of the cosines (n,) of all frames, shown at `seconds` (n,)
    returns  {name_t: mean around t, NaN behind the end}
    """
    return {f"{name}_{t}": cosines[(seconds - t).abs() <= .5 + 1e-5].mean().item() for t in SECONDS}


def score_video(path, prompt, dino, clip, words):
    """words: CLIP's tokenizer -> a row of the CSV, cosines as they are"""
    source = open_clip(path)
    longest = clip.config.text_config.max_position_embeddings
    ids = words(prompt, truncation=True, max_length=longest, return_tensors="pt").to(clip.device)
    # features, 16 frames at a time: some kB a frame stay
    f, g = [], []
    frames = source.read(source.width, source.height)
    while batch := list(islice(frames, BATCH)):
        x = torch.from_numpy(rearrange(batch, "b h w c -> b c h w")).to(dino.device)
        images, text = clip_features(clip, x, ids)
        f.extend(dino_features(dino, x))
        g.extend(images)
    if source.damage:
        raise BadInput(f"{path} is damaged ({source.damage})")
    # old versions of ffmpeg leave frames out, or repeat them
    if len(f) != len(source.seconds):
        raise BadInput(f"{path}: this ffmpeg cannot count its frames: pip install -U imageio-ffmpeg")
    f, g = torch.stack(f), torch.stack(g)
    seconds = torch.tensor(source.seconds) - source.seconds[0]
    # the table's columns: what it is, VBench's, the paper's
    row = {"video": path.name, "prompt": prompt, "subject": consistency(f), "background": consistency(g)}
    row |= windows("dino", f @ f[0], seconds)
    row |= windows("clip_f", g @ g[0], seconds)
    return row | windows("clip_t", g @ text[0], seconds)


# ---- the command line ------------------------------------------------------------------------------------

def words_of(text):
    """Its letters and digits, of any script, as in names of files"""
    return "-".join(re.findall(r"[^\W_]+", text.lower()))


def match_prompts(folder, lines):
    """
    What each video of a folder was made from: its manifest says so; else it is the line whose words are the
    name of the file, or that name (a-cat-0.mp4).
    lines    the prompts whose videos are wanted; none: all
    returns  path -> prompt; what is left out is listed
    """
    manifest = read_manifest(folder)
    named = {words_of(line): line for line in lines}
    prompts = {}
    for path in sorted(Path(folder).glob("[!.]*")):
        if path.is_dir() or path.suffix.lower() in NO_VIDEOS:
            continue
        name = words_of(re.sub(r"-\d+$", "", path.stem))
        prompt = named.get(name, name)
        if path.name in manifest:
            prompt = manifest[path.name]["prompt"]
        if lines and prompt not in lines:
            tell(f"skipped: {path}: no line of --prompts made it")
        else:
            prompts[path] = prompt
    if not prompts:
        raise BadInput(f"no video to score in --videos {folder}: sample.py --prompts FILE makes some")
    return prompts


@torch.no_grad()
def main():
    cfg = parse(Config)
    check_writable(cfg.out)
    find_ffmpeg()
    prompts = match_prompts(cfg.videos, read_prompts(cfg.prompts) if cfg.prompts else [])
    device = pick_device(cfg.device)
    dino, _ = load_network("--dino", cfg.dino, ("vit", "dinov2"))
    clip, words = load_network("--clip", cfg.clip, ("clip",))
    rows = []
    for path, prompt in tqdm(prompts.items(), "videos"):
        try:
            rows.append(score_video(path, prompt, dino.to(device), clip.to(device), words))
        except BadInput as reason:
            tell(f"skipped: {reason}")
    if not rows:
        raise BadInput(f"no video in --videos {cfg.videos} can be read")
    # a name that is no text, as Linux allows, is written with \\ in it
    path = Path(cfg.out, "videos.csv")
    with whole_or_absent(path) as part, open(part, "w", newline="", encoding="utf-8",
                                             errors="backslashreplace") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    # the scores stand behind video and prompt; how many videos are so long?
    scores = [{"score": name, "mean": 100 * mean(rows, name),
               "videos": int(counts(rows, name).sum(0)[1])} for name in list(rows[0])[2:]]
    means = {row["score"]: row["mean"][0] for row in scores}
    text = markdown({"Scores, times 100": scores} | beside(means), 2)
    write_text(path.with_suffix(".md"), text)
    print(text)


if __name__ == "__main__":
    run(main)
