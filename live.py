"""
A page on which a video is made while you steer it, and on which the memory is seen at work.

    python live.py             # opens http://127.0.0.1:8000
    python live.py --wan Wan2.1-T2V-1.3B --ckpt self_forcing_dmd.pt

The main thread makes chunk after chunk, each just in time, and publishes it as one message: its frames, what
memory holds, what the judge has read. Only the newest message is there, and each viewer's thread takes it
when it can: nobody waits for a viewer and nothing piles up. Orders (a prompt, another memory) are merged in
one dictionary, which the next chunk obeys.

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
from einops import rearrange
from PIL import Image

import world
from flow import generate
from memory import CHUNK, PRESETS
from rope import MAX_POSITION
from score import Score, draw_map, motion_of
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
LARGEST = 4096        # bytes of an order
STALL = 10            # seconds after which a viewer that takes nothing is given up
BARS = 80             # chunks in the chart of surprisal
SETTINGS = 20         # the newest changes of settings that a saved file names
THUMBNAIL = 128, 128  # pixels at most
MOTIONS = {           # a click each
    "turn": world.Motion("turn", 1, 12),
    "lingering turn": world.Motion("linger", 1, 18),
    "look aside": world.Motion("aside", 1, 8, 90),
}


@dataclass
class Config:
    prompt: str = "Grass. The camera turns right, one turn in 12 seconds."  # what to begin with
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


def data_url(picture, kind="PNG"):
    """(h, w, 3) uint8 -> text that a page shows as a picture"""
    file = io.BytesIO()
    Image.fromarray(picture).save(file, kind, compress_level=1, quality=85)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"


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
        # what may be asked for
        self.ranges = {"tau": (float, -1, 1), "seed": (int, 0, 2 ** 63 - 1)}
        self.choices = {"memory": [*PRESETS], "positions": ["bounded", "unbounded"]}
        if self.tiny:
            self.choices |= {"ground": world.GROUNDS, "motion": [*MOTIONS]}
        # between the threads
        self.changed = threading.Condition()
        self.encoding, self.saving = threading.Lock(), threading.Lock()
        self.orders = {}
        self.paused, self.over = False, False
        self.message = {"id": 0, "rate": FPS, "choices": self.choices}
        self.number, self.data = 0, ""
        self.begin()

    @property
    def policy(self):
        return replace(PRESETS[self.memory], tau=self.tau)

    def begin(self):
        """A new video, of which nothing is remembered."""
        networks = replace(self.networks, policy=self.policy, positions=self.positions)
        sampler = networks.sampler
        uncond = networks.text("") if sampler.guidance != 1 else None
        self.rollout = networks.rollout(self.text)
        self.chunks = generate(self.rollout, [self.seed], sys.maxsize, sampler, networks.latent, uncond)
        self.past = None    # of the autoencoder
        self.frames = 0
        self.pictures = {}  # latent -> its picture
        self.bars = deque(maxlen=BARS)
        self.score = Score() if self.tiny else None
        # all latents go to disk: memory stays flat, and a saved video has the frames that were shown
        self.latents = tempfile.TemporaryFile()
        self.settings = deque(maxlen=SETTINGS)

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
            kind, low, high = self.ranges.get(name, (None, 0, 0))
            if name == "prompt" and isinstance(value, str):
                check_prompt(value)
            elif name in self.choices and isinstance(value, str):
                one_of(name, value, self.choices[name])
            elif kind and type(value) in (int, kind):
                within(name, value, low, high)
            elif name != "paused" or not isinstance(value, bool):
                raise BadInput(f"{name[:40]!r} cannot be {str(value)[:40]!r}")
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
        now = motion_of(self.orders.get("prompt", self.prompt)) or MOTIONS["turn"]
        if motion:
            now = replace(MOTIONS[motion], direction=now.direction)
        ground = world.GROUNDS.index(ground) if ground else self.score.ground
        # a look aside begins at the nearest compass point
        heading = round(self.score.path[-1:].sum() / 64) * 64 % world.COLUMNS
        return world.World(ground, (), heading, now).caption

    def obey(self):
        """What was asked for takes hold."""
        with self.changed:
            orders, self.orders = self.orders, {}
        vars(self).update(orders)
        if "seed" in orders:
            self.begin()
        if self.positions == "unbounded" and CHUNK * (self.rollout.chunk + 1) > MAX_POSITION:
            self.positions = "bounded"
        self.rollout.positions = self.positions
        if "memory" in orders or "tau" in orders:
            self.rollout.memory.change_policy(self.policy)
        if "text" in orders and self.rollout.chunk:
            self.rollout.recache(self.text)
        self.rollout.text = self.text
        # for a saved file
        policy = f"{self.memory}, tau {self.tau:.4g}, {self.positions}"
        if orders or not self.settings:
            self.settings.append(f"{self.frames / FPS:g}: {self.prompt[:500]} [{policy}]")

    # ---- chunks

    @torch.no_grad()
    def make_chunk(self):
        """-> what the next chunk has to say in the message"""
        self.obey()
        # 1. frames
        started = time.perf_counter()
        x0 = next(self.chunks)
        video, self.past = self.networks.vae.decode(x0, self.past)
        frames = to_uint8(video)[0].cpu().numpy()
        speed = len(frames) / (time.perf_counter() - started)
        with self.changed:
            self.latents.seek(0, io.SEEK_END)
            self.latents.write(x0.cpu().numpy().tobytes())
        # 2. memory and surprisal
        held = self.tell_memory(x0)
        policy = self.policy
        similar, kept = self.rollout.similarities.pop(), self.rollout.kept.pop()
        tested = (self.rollout.chunk - 1) % policy.interval == 0
        self.bars.append((1 - similar.item(), tested, policy.slow > 0 and kept.item()))
        # 3. what came back
        told = {}
        if self.tiny:
            beside = [number for number, *_ in held[:-CHUNK]]
            self.score.read(frames, beside, motion_of(self.prompt))
            told = self.tell_score()
        first, self.frames = self.frames, self.frames + len(frames)
        return {
            "id": self.message["id"] + 1,
            "first": first,
            "frames": len(frames),
            "size": [self.networks.width, self.networks.height],
            "strip": self.picture(np.concatenate(frames)),
            "speed": speed,
            "threshold": 1 - self.tau if policy.keep == "surprisal" else None,
            "held": held,
            "bars": [*self.bars],
            **{name: getattr(self, name) for name in ("prompt", "seed", "memory", "positions", "tau")},
            **told,
        }

    def picture(self, frame):
        return data_url(frame, "PNG" if self.tiny else "JPEG")

    def tell_memory(self, x0):
        """-> number, segment, second and picture of each latent that is held; x0: the newest three"""
        # the new ones, each decoded alone
        alone, _ = self.networks.vae.decode(rearrange(x0, "1 f c h w -> f 1 c h w"))
        for i, frame in enumerate(to_uint8(alone)[:, -1].cpu().numpy()):
            small = Image.fromarray(frame)
            small.thumbnail(THUMBNAIL)
            self.pictures[CHUNK * (self.rollout.chunk - 1) + i] = self.picture(np.asarray(small))
        # where each is now
        held = []
        for name in ("sink", "slow", "fast"):
            segment = getattr(self.rollout.memory, name)
            for number in [] if segment is None else segment.frame[0].tolist():
                held.append((number, name, max(0, 4 * number - 3) / FPS, self.pictures[number]))
        self.pictures = {number: picture for number, *_, picture in held}
        return held

    def tell_score(self):
        score = self.score
        return {
            "ground": world.GROUNDS[score.ground],
            "motion": [name for name in MOTIONS if score.motion and score.motion.kind == MOTIONS[name].kind],
            "score": score.count(),
            "heading": score.path[-1] / world.COLUMNS % 1,
            "first map": data_url(draw_map(score.ground, score.first)),
            "map now": data_url(draw_map(score.ground, score.now)),
            "another": ((score.first != score.now) & (score.now >= 0)).tolist(),
        }

    def run(self):
        """Chunk after chunk without end, at the rate of the video."""
        due = time.monotonic()
        ahead = 0
        while True:
            # late enough for what is asked meanwhile, early enough to be there in time
            time.sleep(max(0, due - ahead - time.monotonic()))
            while self.paused:
                time.sleep(.05)
            started = time.monotonic()
            chunk = self.make_chunk()
            made = time.monotonic()
            ahead = 2 * (made - started)
            due = max(due, made)
            time.sleep(due - made)
            self.publish(**chunk, at=time.time())
            due += chunk["frames"] / FPS

    # ---- viewers

    def publish(self, **news):
        """The newest message is the only one."""
        with self.changed:
            self.message |= news
            self.number += 1
            self.data = json.dumps(self.message)
            self.changed.notify_all()

    def newer(self, number):
        """Waits for a message after this number, though not for ever -> the newest number, its text"""
        with self.changed:
            self.changed.wait_for(lambda: self.number > number, STALL / 2)
            return self.number, self.data

    @torch.no_grad()
    def save(self, path):
        """All that was made so far, decoded once more into an mp4."""
        latents, shape = self.latents, (1, CHUNK, *self.networks.latent)
        size = 4 * int(np.prod(shape))
        about = {"AI-generated": True, "prompt": " | ".join(self.settings), "seed": self.seed}
        with self.changed:
            chunks = latents.seek(0, io.SEEK_END) // size
        past = None
        about = json.dumps({**about, "model": self.networks.name})
        with self.saving, video_writer(path, about, self.networks.scale) as file:
            for chunk in range(chunks):
                if self.over:
                    raise BadInput("the server has stopped")
                with self.changed:
                    latents.seek(chunk * size)
                    x0 = np.frombuffer(latents.read(size), np.float32).reshape(shape)
                x0 = torch.tensor(x0, device=self.rollout.text[0][0].device)
                decoded, past = self.networks.vae.decode(x0, past)
                for frame in to_uint8(decoded)[0].cpu().numpy():
                    file.append_data(frame)


# ---- the server --------------------------------------------------------------------------------------------

class Server(ThreadingTCPServer):
    """session: the Session; names: those that viewers may call it by"""
    daemon_threads = True
    allow_reuse_address = sys.platform != "win32"  # there it means to share a port that is taken

    def handle_error(self, request, client_address):
        # a viewer that goes in the middle of an answer is no error
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)

    def is_named(self, address):
        """Is 'name:port' this server? A page of another site has another name, whatever that resolves to."""
        match = re.fullmatch(r"([a-z0-9.-]+)(?::(\d{1,5}))?", address.lower())
        if not match or int(match[2] or 80) != self.server_address[1]:
            return False
        is_number = re.fullmatch(r"[0-9.]+", match[1])
        return match[1] in self.names or "0.0.0.0" in self.names and bool(is_number)


class Handler(BaseHTTPRequestHandler):
    timeout = STALL

    def log_message(self, *about):
        pass

    def reply(self, code, body=b"", kind="text/plain", more=()):
        self.send_response(code)
        headers = {**HEADERS, "Content-Type": f"{kind}; charset=utf-8", **dict(more)}
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def is_foreign(self):
        host = self.headers.get("Host", "")
        origin = self.headers.get("Origin", f"http://{host}").removeprefix("http://")
        if self.server.is_named(host) and self.server.is_named(origin):
            return False
        self.reply(403, b"this page answers to its own address only")
        return True

    def do_GET(self):
        if self.is_foreign():
            return
        if self.path in PAGE:
            name, kind = PAGE[self.path]
            self.reply(200, Path(__file__).with_name(name).read_bytes(), kind)
        elif self.path == "/events":
            self.stream()
        elif self.path == "/video.mp4":
            self.send_video()
        else:
            self.reply(404, b"no such page")

    def stream(self):
        self.reply(200, kind="text/event-stream")
        number = 0
        while True:
            newest, data = self.server.session.newer(number)
            # a comment where there is nothing new: so a viewer that is gone is noticed
            text = f"data: {data}\n\n" if newest > number else ":\n\n"
            self.wfile.write(text.encode())
            number = newest

    def send_video(self):
        session = self.server.session
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "video.mp4")
            try:
                session.save(path)
            except BadInput as error:
                return self.reply(500, str(error).encode())
            name = f'attachment; filename="live-{session.seed}.mp4"'
            self.reply(200, path.read_bytes(), "video/mp4", {"Content-Disposition": name})

    def do_POST(self):
        if self.is_foreign():
            return
        length = self.headers.get("Content-Length", "")
        if self.path != "/steer":
            self.reply(404, b"no such page")
        elif not length.isdecimal():
            self.reply(411, b"an order has a Content-Length")
        elif len(length) > 4 or int(length) > LARGEST:
            self.reply(413, b"an order has at most 4 KB")
        else:
            session = self.server.session
            try:
                session.ask(session.read_order(self.rfile.read(int(length))))
                self.reply(204)
            except BadInput as error:
                self.reply(400, str(error).encode())


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
        server.session = session
        server.names = {"localhost", "127.0.0.1", cfg.host}
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
