"""
A page on which a video is made while you steer it, and on which the memory is seen at work.

    python live.py             # opens http://127.0.0.1:8000
    python live.py --wan Wan2.1-T2V-1.3B --ckpt self_forcing_dmd.pt

The main thread makes chunk after chunk and publishes one message: frames, what memory holds, what the judge
has read. Viewers' threads take the newest when they can: nobody waits for them, nothing piles up. What pages
ask for replaces settings, which the next chunk obeys; captions, ages and charts are the pages' own work.

The server is the standard library's: two files, one stream of events, one address for orders. A framework
would bring a dozen packages, and would have to be told what is refused here as well.

References: LongLive, arXiv 2509.22622 (the prompt changes while the video is made).
Leaves out: passwords and https, so that it listens on this machine alone unless --host says otherwise.
"""
import atexit
import json
import sys
import tempfile
import threading
import time
import webbrowser
from base64 import b64decode, b64encode
from contextlib import suppress
from dataclasses import dataclass, replace
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from socketserver import ThreadingTCPServer

from config import (STUDENT, BadInput, StopSignals, check_schema, in_one_line, one_line, parse,  # first
                    pick_device, run, use_one_thread, warn, within)

import imageio.v3 as iio
import numpy as np
import torch

from flow import generate
from memory import CHUNK, PRESETS, size
from rope import MAX_POSITION
from score import Score
from text import check_prompt
from video import FPS, chunks_of, to_uint8, video_writer
from weights import check_options, load_networks

# what a viewer may ask for; another number of the video begins a new one
SETTINGS = {"video": range(2 ** 63), "seed": range(2 ** 63), "paused": bool, "prompt": str, "tau": float,
            "memory": set(PRESETS), "positions": {"bounded", "unbounded"}}


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
    dtype: str = ""            # with --wan: bf16 | fp32 (default: bf16 on cuda, else fp32)
    host: str = "127.0.0.1"    # address to listen on; any but the default opens the page to others
    port: int = 8000           # 0 takes a free one
    no_browser: bool = False   # print the address, open nothing


class Session:
    """One video for all viewers: the main thread makes it, the viewers' threads ask and take."""
    def __init__(self, cfg, networks):
        self.networks = networks
        self.kind = "jpeg" if cfg.wan else "png"  # of pictures; png: the small world, which is judged
        self.changed = threading.Condition()  # there is a newer message
        self.working = threading.Lock()       # held while a viewer's thread runs a network
        self.message = {"kind": self.kind, "rules": {name: policy.keep for name, policy in PRESETS.items()}}
        options = {"video": 0, "paused": False, **vars(cfg), "tau": networks.policy.tau}
        self.wanted = self.settings = {name: options[name] for name in SETTINGS}
        self.ask({})
        self.begin()

    def ask(self, order):
        """What the next chunk is to obey, a dict of some of SETTINGS; raises BadInput"""
        check_schema("an order", order, dict, fault="makes no sense")
        with self.working:
            wanted = {name: order.get(name, self.wanted[name]) for name in SETTINGS}
            check_schema("an order", wanted, SETTINGS, fault="makes no sense")
            check_prompt(wanted["prompt"])
            within("tau", wanted["tau"], -1, 1)
            # the prompt is encoded here, as the video does not wait
            self.text = self.networks.text(wanted["prompt"])
            self.wanted = wanted
            self.publish({"settings": wanted})

    def begin(self):
        """A new video, of which nothing is remembered."""
        m, seeds = self.networks, [self.settings["seed"]]
        uncond = m.text("") if m.sampler.guidance != 1 else None
        self.rollout = m.rollout(self.text)
        self.chunks = generate(self.rollout, seeds, sys.maxsize, m.sampler, m.latent, uncond)
        self.past = None    # of the autoencoder
        self.frames = 0     # made so far
        self.pictures = {}  # of each latent that is held
        self.bars = []      # of the chart
        self.score = Score()
        # for a saved file; pictures go to disk, so that memory stays flat
        self.changes = []
        self.folder = tempfile.TemporaryDirectory()

    def obey(self):
        """What was asked for last takes hold."""
        before, now = self.settings, self.wanted
        self.settings = now
        # another video; or the first, where other words came before its first frame
        if now["video"] != before["video"] or not self.frames and now != before:
            self.begin()
        elif now["prompt"] != before["prompt"]:
            self.rollout.recache(self.text)
        rollout, policy = self.rollout, replace(PRESETS[now["memory"]], tau=now["tau"])
        if policy != rollout.memory.policy:
            rollout.memory.change_policy(policy)
        # absolute positions end with Wan's table
        is_past = CHUNK * (rollout.chunk + 1) > MAX_POSITION
        rollout.positions = "bounded" if is_past else now["positions"]
        if now is not before or not self.changes:
            self.changes = [*self.changes[-14:], {"second": self.frames / FPS, **now}]

    def step(self):
        """Makes the next chunk -> dict of what a page shows of it"""
        self.obey()
        rollout, vae = self.rollout, self.networks.vae
        memory, chunk = rollout.memory, rollout.chunk
        # 1. frames
        x0 = next(self.chunks)
        video, self.past = vae.decode(x0, self.past)
        frames = to_uint8(video)[0].cpu().numpy()
        strip = self.picture(np.concatenate(frames))
        Path(self.folder.name, f"{chunk}").write_text(strip)
        self.frames += len(frames)
        # 2. surprisal: was it tested, and is the chunk kept?
        similar, kept = rollout.similarities.pop(), rollout.kept.pop()
        is_tested = chunk % memory.policy.interval == 0
        bar = 1 - similar.item(), is_tested, memory.policy.slow > 0 and kept.item()
        self.bars = [*self.bars[-79:], bar]
        # 3. a picture of each new latent, decoded alone
        alone, _ = vae.decode(x0.transpose(0, 1))
        small = to_uint8(torch.nn.functional.avg_pool2d(alone[:, -1], max(1, self.networks.width // 128)))
        for number, frame in enumerate(small.cpu().numpy(), CHUNK * chunk):
            self.pictures[number] = self.picture(frame)
        # 4. what memory holds; the pictures of all else go
        held = memory.frames()[0].tolist()
        self.pictures = {number: self.pictures[number] for number in held}
        news = {"made": self.frames, "frames": len(frames), "strip": strip, "bars": self.bars,
                "held": [*self.pictures.items()],
                "sizes": [size(segment) for segment in (memory.sink, memory.slow, memory.fast)]}
        # 5. what came back, beside the latents that the chunk did not bring itself
        if self.kind == "png":
            self.score.read(frames, held[:-CHUNK], self.settings["prompt"])
            news["score"] = self.score.told()
        return news

    def picture(self, frame):
        """(h, w, 3) uint8 -> a file's content, in base 64"""
        picture = iio.imwrite("<bytes>", frame, extension=f".{self.kind}", compress_level=1, quality=85)
        return b64encode(picture).decode()

    def run(self, stop):
        """Chunk after chunk at the rate of the video, until `stop` (StopSignals) has a code."""
        due, cost = time.monotonic(), 0
        while not stop.code:
            # late enough for what is asked meanwhile, early enough to be there in time
            time.sleep(max(0, due - 2 * cost - time.monotonic()))
            started = time.monotonic()
            news = self.step()
            cost = time.monotonic() - started
            time.sleep(max(0, due - time.monotonic()))
            self.publish(news | {"cost": cost, "at": time.time()})
            due = max(due, time.monotonic()) + news["frames"] / FPS
            while self.wanted["paused"] and not stop.code:
                time.sleep(.05)

    def publish(self, news):
        """The newest message is the only one."""
        with self.changed:
            self.message |= news
            self.data = json.dumps(self.message)
            self.changed.notify_all()

    def save(self):
        """-> bytes of an mp4 of all that was made so far; raises BadInput"""
        # another video may begin meanwhile
        folder, chunks = self.folder, chunks_of(self.frames)
        if not self.frames:
            raise BadInput("nothing is made yet")
        m = self.networks
        about = {"AI-generated": True, "model": m.name, "settings": self.changes}
        path = Path(folder.name, "live.mp4")
        with video_writer(path, m.width, m.height, json.dumps(about, ensure_ascii=False), m.scale) as write:
            for chunk in range(chunks):
                # frames below one another: their bytes come one after another
                write(iio.imread(b64decode(Path(folder.name, f"{chunk}").read_text())))
        return path.read_bytes()


class Server(ThreadingTCPServer):
    """session: the Session; name: what it was told to listen on"""
    daemon_threads = True
    allow_reuse_address = sys.platform != "win32"  # there it means to share a port that is taken


class Handler(BaseHTTPRequestHandler):
    timeout = 10  # seconds after which a viewer that takes nothing is given up

    def log_message(self, *about):
        pass

    def handle(self):
        with suppress(OSError):  # a viewer that goes in the middle of an answer is no error
            try:
                super().handle()
            except (ValueError, RecursionError) as error:  # BadInput, too
                self.reply(one_line(error).encode(), status=400)

    def reply(self, content=b"", kind="text/plain; charset=utf-8", status=200):
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("X-Frame-Options", "DENY")
        self.end_headers()
        self.wfile.write(content)

    def is_own(self):
        """Does the page itself ask? That of another site has another name, whatever that resolves to."""
        address, port = self.connection.getsockname()
        # browsers leave out http's own port
        names = address, self.server.name, "localhost"
        known = {f"http://{name}:{port}".removesuffix(":80") for name in names}
        host = f"http://{self.headers['Host']}"
        return {host, self.headers.get("Origin", host)} <= known

    def do_GET(self):
        session, length = self.server.session, int(self.headers["Content-Length"] or 0)
        match self.command, self.path:
            case _ if not self.is_own():
                self.reply(b"this page answers to its own address only", status=403)
            case _ if not 0 <= length <= 4096:
                self.reply(b"an order has at most 4 KB", status=413)
            case "GET", "/":
                self.reply(Path(__file__).with_suffix(".html").read_bytes(), "text/html")
            case "GET", "/live.js":
                self.reply(Path(__file__).with_suffix(".js").read_bytes(), "text/javascript")
            case "GET", "/video.mp4":
                self.reply(session.save(), "video/mp4")
            case "POST", "/steer":
                session.ask(json.loads(self.rfile.read(length)))
                self.reply()
            case "GET", "/events":
                self.reply(kind="text/event-stream")
                data = ""
                while True:
                    # the newest; where there is none the last one, so that one who is gone is noticed
                    with session.changed:
                        session.changed.wait_for(lambda: session.data is not data, self.timeout / 2)
                        data = session.data
                    self.wfile.write(f"data: {data}\n\n".encode())
            case _:
                self.reply(b"no such page", status=404)

    do_POST = do_GET


def main():
    # 1. what is asked for, and the address, before anything is loaded
    cfg = parse(Config)
    check_options(cfg)
    check_prompt(cfg.prompt)
    device = pick_device(cfg.device)
    with in_one_line(f"cannot listen on {cfg.host}:{cfg.port}", "give another --port"):
        server = Server((cfg.host, cfg.port), Handler)
    # 2. networks
    if not cfg.wan:
        use_one_thread()
    bf16 = cfg.dtype == "bf16" if cfg.dtype else device.type == "cuda"
    networks = load_networks(cfg, STUDENT, [cfg.prompt], device, torch.bfloat16 if bf16 else torch.float32)
    server.session, server.name = Session(cfg, networks), cfg.host
    # 3. viewers
    threading.Thread(target=server.serve_forever, daemon=True).start()
    host, port = server.server_address
    print(f"http://{host}:{port}", flush=True)
    if not host.startswith("127."):
        warn(f"whoever reaches {host} can watch and steer")
    if not cfg.no_browser:
        # 0.0.0.0 is all of this machine's addresses
        webbrowser.open(f"http://{host.replace('0.0.0.0', '127.0.0.1')}:{port}")
    # 4. the video, until Ctrl-C; then no viewer's thread may be within a network
    atexit.register(server.session.working.acquire)
    with StopSignals() as stop:
        stop.patient = True
        server.session.run(stop)
    sys.exit(stop.code)


if __name__ == "__main__":
    run(main)
