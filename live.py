"""
A page on which a video is made while you steer it, and on which the memory is seen at work.

    python live.py             # opens http://127.0.0.1:8000
    python live.py --wan Wan2.1-T2V-1.3B --ckpt self_forcing_dmd.pt

The main thread makes chunk after chunk, each just in time. What it has to show is one message: frames, what
memory holds, what the judge has read. Only the newest is there, and each viewer's thread takes it when it
can: nobody waits for a viewer, nothing piles up, and for nobody no pictures are made. Orders (a prompt,
another memory) are merged in one dictionary, which the next chunk obeys.

The server is the standard library's: two files, one stream of server-sent events, one address for orders. A
framework would bring a dozen packages, and would have to be told what is refused here as well.

References: LongLive, arXiv 2509.22622 (the prompt changes while the video is made).
Leaves out: passwords and https, so that it listens on this machine alone unless --host says otherwise.
"""
import base64
import io
import json
import re
import sys
import tempfile
import threading
import time
import webbrowser
from collections import deque
from dataclasses import dataclass, replace
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from socketserver import ThreadingTCPServer

from config import STUDENT, BadInput, one_of, parse, pick_device, run, use_one_thread, within  # first

import numpy as np
import torch
from PIL import Image

import world
from flow import generate
from memory import CHUNK, PRESETS
from rope import MAX_POSITION
from score import Score, world_of
from text import check_prompt
from video import FPS, to_uint8, video_writer
from weights import check_options, load_networks

PAGE = {"/": ("live.html", "text/html"), "/live.js": ("live.js", "text/javascript")}
HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; connect-src 'self'; img-src data:; "
                               "style-src 'unsafe-inline'; frame-ancestors 'none'; base-uri 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
}
STALL = 10            # seconds after which a viewer that takes nothing is given up
BARS = 80             # chunks in the chart of surprisal
CHANGES = 20          # the newest changes of settings that a saved file names
THUMBNAIL = 128, 128  # pixels at most
MOTIONS = {           # a click each
    "turn": world.Motion("turn", 1, 12),
    "lingering turn": world.Motion("linger", 1, 18),
    "look aside": world.Motion("aside", 1, 8, 90),
}
SETTINGS = "prompt", "seed", "memory", "positions", "tau"
KINDS = {"seed": (int,), "tau": (int, float), "paused": (bool,)}  # of orders; all others are texts


@dataclass
class Config:
    prompt: str = "Grass. The camera turns right from north, one turn in 12 seconds."  # what to begin with
    seed: int = 0              # of the noise
    memory: str = "slowfast"   # slowfast | uniform1 | uniform2 | window | longlive | longlive21 | infinity
    positions: str = "bounded"  # bounded | unbounded, up to 255 s
    tau: float = None          # surprisal threshold in [-1, 1] (default: the weights' own)
    steps: int = None          # denoising steps (default: the weights' own)
    ckpt: str = ""             # weights of another student
    lora: str = ""             # with --wan: a LoRA to merge into them
    no_verify: bool = False    # take files as they are, without verifying their checksums
    wan: str = ""              # a raw Wan2.1-T2V-1.3B folder | random | random:DIMxLAYERS (default: tiny)
    size: str = ""             # with --wan: WIDTHxHEIGHT in pixels (default 832x480; random on cpu 192x128)
    vae: str = ""              # with --wan: wan | tae, which is faster (default wan)
    compile: bool = False      # torch.compile from the moment that memory is full
    out: str = "out"           # with --wan: folder for the text features of prompts
    device: str = ""           # cuda | mps | cpu (default: the best there is)
    dtype: str = ""            # bf16 | fp32 (default: bf16 on cuda, else fp32)
    host: str = "127.0.0.1"    # address to listen on; any but the default opens the page to others
    port: int = 8000           # 0 takes a free one
    no_browser: bool = False   # print the address, open nothing


# ---- the video under way -----------------------------------------------------------------------------------

class Session:
    """One video for all viewers: the main thread makes it, the viewers' threads ask and take."""
    def __init__(self, cfg, networks):
        self.networks = networks
        self.tiny = not cfg.wan
        # settings, which orders replace by name
        self.prompt, self.text = cfg.prompt, networks.text(cfg.prompt)
        self.memory, self.tau, self.positions = cfg.memory, networks.policy.tau, cfg.positions
        self.seed = cfg.seed
        self.choices = {"memory": [*PRESETS], "positions": ["bounded", "unbounded"]}
        if self.tiny:
            self.choices |= {"ground": world.GROUNDS, "motion": [*MOTIONS]}
        # between the threads
        self.changed = threading.Condition()
        self.encoding, self.saving = threading.Lock(), threading.Lock()
        self.orders = {}
        self.paused, self.over = False, False
        self.message = {"rate": FPS, "choices": self.choices}
        self.number, self.data = 0, ""
        self.is_awaited = False  # does a viewer wait for the next message?
        self.begin()

    def begin(self):
        """A new video, of which nothing is remembered."""
        sampler, latent = self.networks.sampler, self.networks.latent
        uncond = self.networks.text("") if sampler.guidance != 1 else None
        self.rollout = self.networks.rollout(self.text)
        self.chunks = generate(self.rollout, [self.seed], sys.maxsize, sampler, latent, uncond)
        self.past = None    # of the autoencoder
        self.frames = 0
        self.pictures = {}  # latent -> its picture
        self.bars = deque(maxlen=BARS)
        self.score = Score()
        # latents go to disk, and a file is made of them: memory stays flat
        self.latents = tempfile.TemporaryFile()
        self.changes = deque(maxlen=CHANGES)

    # ---- orders

    def read_order(self, body):
        """The bytes of a request -> dict; raises BadInput"""
        try:
            order = json.loads(body)
        except (ValueError, RecursionError):
            order = None
        if not isinstance(order, dict):
            raise BadInput("an order is a JSON object")
        for name, value in order.items():
            is_known = name in {"paused", *SETTINGS, *self.choices}
            if not is_known or type(value) not in KINDS.get(name, (str,)):
                raise BadInput(f"{name[:40]!r} cannot be {str(value)[:40]!r}")
            if name in self.choices:
                one_of(name, value, self.choices[name])
        check_prompt(order.get("prompt", self.prompt))
        within("tau", order.get("tau"), -1, 1)
        within("seed", order.get("seed"), 0, 2 ** 63 - 1)
        return order

    @torch.no_grad()
    def ask(self, order):
        """What the next chunk is to obey; a prompt is encoded here, by a viewer's thread."""
        with self.encoding:
            if "ground" in order or "motion" in order:
                order["prompt"] = self.caption(order.pop("ground", None), order.pop("motion", None))
            if "prompt" in order:
                order["text"] = self.networks.text(order["prompt"])
            with self.changed:
                self.paused = order.pop("paused", self.paused)
                self.orders |= order
        self.publish(paused=self.paused)

    def caption(self, ground, motion):
        """The caption that was asked for last, with another ground or motion"""
        # from the compass point that is nearest to where the camera looks
        here = round(self.score.path[-1:].sum() / 64) * 64 % world.COLUMNS
        now = world_of(self.orders.get("prompt", self.prompt))
        now = now or world.World(self.score.ground, (), here, MOTIONS["turn"])
        if ground:
            now = replace(now, ground=world.GROUNDS.index(ground))
        if motion:
            now = replace(now, start=here, motion=replace(MOTIONS[motion], direction=now.motion.direction))
        return now.caption

    def obey(self):
        """What was asked for takes hold."""
        with self.changed:
            orders, self.orders = self.orders, {}
        vars(self).update(orders)
        if "seed" in orders or not self.frames:
            self.begin()
        if self.rollout.text is not self.text:
            self.rollout.recache(self.text)
        policy = replace(PRESETS[self.memory], tau=self.tau)
        if policy != self.rollout.memory.policy:
            self.rollout.memory.change_policy(policy)
        # absolute positions end with Wan's table
        if CHUNK * (self.rollout.chunk + 1) > MAX_POSITION:
            self.positions = "bounded"
        self.rollout.positions = self.positions
        # for a saved file
        if orders or not self.changes:
            told = f"{self.memory}, tau {self.tau:.4g}, {self.positions}"
            self.changes.append(f"{self.frames / FPS:g}: {self.prompt[:500]} [{told}]")

    # ---- chunks

    @torch.no_grad()
    def make_chunk(self):
        """The next chunk, kept and judged -> its frames (f, h, w, 3) uint8"""
        self.obey()
        # 1. frames
        started = time.perf_counter()
        x0 = next(self.chunks)
        video, self.past = self.networks.vae.decode(x0, self.past)
        frames = to_uint8(video)[0].cpu().numpy()
        self.speed = len(frames) / (time.perf_counter() - started)
        self.frames += len(frames)
        with self.changed:
            self.latents.seek(0, io.SEEK_END)
            np.save(self.latents, x0.cpu().numpy())
        # 2. surprisal
        similar, kept = self.rollout.similarities.pop(), self.rollout.kept.pop()
        policy = self.rollout.memory.policy
        tested = (self.rollout.chunk - 1) % policy.interval == 0
        self.bars.append((1 - similar.item(), tested, policy.slow > 0 and kept.item()))
        # 3. what came back, beside the latents that the chunk did not bring itself
        if self.tiny:
            held = self.rollout.memory.frames()[0, :-CHUNK]
            asked = world_of(self.prompt)
            self.score.read(frames, held.tolist(), asked and asked.motion)
        return frames

    @torch.no_grad()
    def tell(self, frames):
        """frames: of the newest chunk -> dict of what a page shows of it"""
        return {
            "first": self.frames - len(frames),
            "frames": len(frames),
            "size": [self.networks.width, self.networks.height],
            "strip": self.picture(np.concatenate(frames)),
            "speed": self.speed,
            "threshold": 1 - self.tau if PRESETS[self.memory].keep == "surprisal" else None,
            "held": self.tell_memory(),
            "bars": [*self.bars],
            **{name: getattr(self, name) for name in SETTINGS},
            **self.tell_score(),
        }

    def picture(self, frame):
        """(h, w, 3) uint8 -> text that a page shows as a picture"""
        kind = "png" if self.tiny else "jpeg"
        file = io.BytesIO()
        Image.fromarray(frame).save(file, kind, compress_level=1, quality=85)
        return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"

    def tell_memory(self):
        """-> number, segment, second and picture of each latent that is held"""
        held = []
        for name in ("sink", "slow", "fast"):
            segment = getattr(self.rollout.memory, name)
            entries = [] if segment is None else zip(segment.frame[0].tolist(), segment.latent[0])
            for number, latent in entries:
                picture = self.pictures.get(number) or self.thumbnail(latent)
                held.append((number, name, max(0, 4 * number - 3) / FPS, picture))
        self.pictures = {number: picture for number, *_, picture in held}
        return held

    def thumbnail(self, latent):
        """A latent (c, h, w), decoded alone"""
        decoded, _ = self.networks.vae.decode(latent[None, None])
        small = Image.fromarray(to_uint8(decoded)[0, -1].cpu().numpy())
        small.thumbnail(THUMBNAIL)
        return self.picture(np.asarray(small))

    def tell_score(self):
        """-> what came back, where the camera looks (1: once round), roof and wall of the house by sector"""
        if not self.tiny:
            return {}
        score = self.score
        kind = score.motion and score.motion.kind
        houses = [[world.COLOURS[c] for c in pair] for pair in world.PAIRS] + [None]
        return {
            "score": score.count(),
            "ground": world.GROUNDS[score.ground],
            "motion": [name for name, motion in MOTIONS.items() if motion.kind == kind],
            "heading": score.path[-1] / world.COLUMNS % 1,
            "at first": [houses[landmark] for landmark in score.first],
            "now": [houses[landmark] for landmark in score.now],
        }

    def run(self):
        """Chunk after chunk without end, at the rate of the video."""
        due = time.monotonic()
        while True:
            started = time.monotonic()
            frames = self.make_chunk()
            news = self.tell(frames) if self.is_awaited else {}
            made = time.monotonic()
            due = max(due, made)
            time.sleep(due - made)
            if news:
                self.publish(**news, at=time.time())
            due += len(frames) / FPS
            # the next one: late enough for what is asked meanwhile, early enough to be there in time
            time.sleep(max(0, due - 2 * (made - started) - time.monotonic()))
            while self.paused:
                time.sleep(.05)

    # ---- viewers

    def publish(self, **news):
        """The newest message is the only one."""
        with self.changed:
            self.message |= news
            self.number += 1
            self.data = json.dumps(self.message)
            self.is_awaited = False
            self.changed.notify_all()

    def newer(self, number):
        """Waits for a message after this number, though not for ever -> the newest number, its text"""
        with self.changed:
            if self.number == number:
                self.is_awaited = True
                self.changed.wait(STALL / 2)
            return self.number, self.data

    @torch.no_grad()
    def save(self, path):
        """All that was made so far, decoded once more into an mp4."""
        latents, past, at = self.latents, None, 0
        about = {"AI-generated": True, "prompt": " | ".join(self.changes), "seed": self.seed}
        about = json.dumps({**about, "model": self.networks.name})
        with self.changed:
            end = latents.seek(0, io.SEEK_END)
        with self.saving, video_writer(path, about, self.networks.scale) as file:
            while at < end:
                if self.over:
                    raise BadInput("the server has stopped")
                with self.changed:
                    latents.seek(at)
                    x0 = torch.from_numpy(np.load(latents))
                    at = latents.tell()
                decoded, past = self.networks.vae.decode(x0.to(self.rollout.text[0][0].device), past)
                for frame in to_uint8(decoded)[0].cpu().numpy():
                    file.append_data(frame)


# ---- the server --------------------------------------------------------------------------------------------

class Server(ThreadingTCPServer):
    """session: the Session; name: what it was told to listen on"""
    daemon_threads = True
    allow_reuse_address = sys.platform != "win32"  # there it means to share a port that is taken

    def handle_error(self, request, client_address):
        # a viewer that goes in the middle of an answer is no error
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)


class Handler(BaseHTTPRequestHandler):
    timeout = STALL

    error_message_format = "%(explain)s"  # one line of text
    error_content_type = "text/plain; charset=utf-8"

    def log_message(self, *about):
        pass

    def end_headers(self):
        for name, value in HEADERS.items():
            self.send_header(name, value)
        super().end_headers()

    def reply(self, body, kind):
        self.send_response(200)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.end_headers()
        self.wfile.write(body)

    def parse_request(self):
        """-> is it to be answered? A page of another site has another name, whatever that resolves to."""
        if not super().parse_request():
            return False
        address, port = self.connection.getsockname()
        known = {f"http://{name}:{port}" for name in (address, self.server.name, "localhost")}
        # browsers leave out http's own port
        known |= {name.removesuffix(":80") for name in known}
        host = f"http://{self.headers.get('Host')}"
        if {host, self.headers.get("Origin", host)} <= known:
            return True
        self.send_error(403, explain="this page answers to its own address only")
        return False

    def do_GET(self):
        if self.path in PAGE:
            name, kind = PAGE[self.path]
            self.reply(Path(__file__).with_name(name).read_bytes(), kind)
        elif self.path == "/events":
            self.stream()
        elif self.path == "/video.mp4":
            self.send_video()
        else:
            self.send_error(404, explain="no such page")

    def stream(self):
        self.reply(b"", "text/event-stream")
        number = 0
        while True:
            newest, data = self.server.session.newer(number)
            # a comment where there is nothing new: so a viewer that is gone is noticed
            text = f"data: {data}\n\n" if newest > number else ":\n\n"
            self.wfile.write(text.encode())
            number = newest

    def send_video(self):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "video.mp4")
            try:
                self.server.session.save(path)
                self.reply(path.read_bytes(), "video/mp4")
            except BadInput as error:
                self.send_error(500, explain=str(error))

    def do_POST(self):
        length = self.headers.get("Content-Length", "")
        if self.path != "/steer":
            self.send_error(404, explain="no such page")
        elif not re.fullmatch(r"\d{1,4}", length) or int(length) > 4096:
            self.send_error(413, explain="an order has at most 4 KB, and says how many")
        else:
            session = self.server.session
            try:
                session.ask(session.read_order(self.rfile.read(int(length))))
                self.send_response(204)
                self.end_headers()
            except BadInput as error:
                self.send_error(400, explain=str(error))


def main():
    # 1. what is asked for, and the address, before anything is loaded
    cfg = parse(Config)
    check_options(cfg)
    check_prompt(cfg.prompt)
    within("--port", cfg.port, 0, 65535)
    device = pick_device(cfg.device)
    try:
        server = Server((cfg.host, cfg.port), Handler)
    except (OSError, UnicodeError) as error:
        raise BadInput(f"cannot listen on {cfg.host}:{cfg.port} ({error}): give another --port") from None
    # 2. networks
    if not cfg.wan:
        use_one_thread()
    bf16 = cfg.dtype == "bf16" if cfg.dtype else device.type == "cuda"
    dtype = torch.bfloat16 if bf16 else torch.float32
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=bf16 and not cfg.wan):
        networks = load_networks(cfg, STUDENT, [cfg.prompt], device, dtype)
        session = Session(cfg, networks)
        # 3. viewers
        server.session, server.name = session, cfg.host
        threading.Thread(target=server.serve_forever, daemon=True).start()
        host, port = server.server_address
        print(f"http://{host}:{port}", flush=True)
        if not host.startswith("127."):
            print(f"warning: whoever reaches {host} can watch and steer", file=sys.stderr)
        if not cfg.no_browser:
            webbrowser.open(f"http://{host}:{port}")
        # 4. the video, until Ctrl-C; a file that is being saved then is given up
        try:
            session.run()
        finally:
            session.over = True
            with session.saving, session.encoding:
                pass


if __name__ == "__main__":
    run(main)
