"""
Distribution matching distillation (DMD), and its contextual form: Stage 1 and Stage 2.

A few-step student makes a video; noise is added to it, and two networks say where the clean video lies: the frozen teacher
(real score) and a critic that is trained on the student's own videos (fake score). Their difference is the gradient of a
KL divergence, and moves the student's videos towards the teacher's. In Stage 2 the video is the continuation of a long
rollout of the student's own; teacher and critic see the context that the student's memory held when it began.

A rollout is made without a graph. The gradient reaches the weights in a second pass, chunk by chunk: only the exit step of
a target chunk is run again with a graph, and thrown away before the next. So training holds one chunk's graph whatever the
length; the gradient is the same. (Self-Forcing's checkpointed code lets part of the gradient cross chunks through the
cache; here keys and values in the memory are constants.)

    python dmd.py              # a Gaussian student pulled to a Gaussian teacher

References: DMD, arXiv 2311.18828; DMD2, arXiv 2405.14867; Self-Forcing, arXiv 2506.08009; Context Forcing, arXiv
2602.06028, eq. 5-6, algorithm 1 (read: all context fully denoised, losses after the loop).
Leaves out: the GAN and SiD losses of Self-Forcing.
"""
from dataclasses import dataclass

import torch

from flow import Rollout, add_noise, denoise, shifted, x0_from_v
from memory import CHUNK, Entries, join

LOW, HIGH = .02, .98     # noise levels of the scores are clamped to this


def score_level(u, shift=5.0):
    """Uniform u (b,) in [0, 1) -> noise level of the scores, shifted and clamped"""
    return shifted(u, shift).clamp(LOW, HIGH)


def dmd_gradient(x, fake, real):
    """
    x, fake, real  (b, f, c, h, w): the student's video, and the x0 that critic and teacher predict from it, noised
    returns  gradient in x, and (b,) its normaliser, the mean |x - real|: both of the target only, never of a context
    """
    norm = (x - real).abs().mean((1, 2, 3, 4), keepdim=True)
    return ((fake - real) / norm).nan_to_num(0., 0., 0.), norm.flatten()


def dmd_loss(x, gradient, mask=None):
    """
    A loss whose derivative in x is gradient / (number of elements in the loss): half the squared distance to x - gradient,
    in float64. mask, of x's shape, True = in the loss.
    """
    off = (x.double() - (x - gradient).detach().double()).pow(2)
    return .5 * (off if mask is None else off[mask]).mean()


def critic_loss(v, x, noise):
    """Flow matching of the critic on the student's video x (b, f, c, h, w), which gets no gradient."""
    return (v.float() - (noise - x.detach())).pow(2).mean()


# ---- algorithm 1 -------------------------------------------------------------------------------------------------------

def longest(update, first, last, ramp):
    """Chunks that a rollout of this generator update may have at most: from first to last, linearly over `ramp` updates."""
    return int(first + min(1, update / ramp) * (last - first))


@dataclass
class RolloutTrace:
    """What a rollout leaves behind for scores and backward: n context latents, a target of f, exit steps, kept cells."""
    context: torch.Tensor  # (b, n, c, h, w): what the memory held when the target began; n = 0 in Stage 1
    x: torch.Tensor        # (b, f, c, h, w): the target
    exits: list            # for each target chunk: x_t at its exit step, t (b, 3), frame numbers held (b, m) or None
    cells: Entries         # everything held during the target, once: at most n + f latents
    roll: Rollout


@torch.no_grad()
def rollout(roll, levels, exit_step, fresh, chunks, target):
    """
    The student's own video, its target stopped early.
    roll     a fresh Rollout
    levels   noise levels; chunks before the target are denoised fully, the target's up to step `exit_step` (0-based)
    fresh    (chunk, step) -> noise (b, 3, c, h, w)
    chunks   length of the rollout; the last `target` of them are the target
    returns  RolloutTrace
    """
    context, cells, xs, exits = None, [], [], []
    for i in range(chunks):
        if i == chunks - target:
            cells = roll.memory.read()
            context = fresh(0, 0)[:, :0] if cells is None else cells.latent
        roll.read_context()
        held = roll.memory.frames()

        def predict(x, level):
            return roll.predict(x, torch.full(x.shape[:2], level, device=x.device))[0]

        inside = i >= chunks - target
        some = levels[:exit_step + 1] if inside else levels
        x0, xt = denoise(predict, fresh(i, 0), some, lambda step: fresh(i, step))
        roll.append(x0)
        if inside:
            xs.append(x0)
            exits.append((xt, torch.full(xt.shape[:2], some[-1], device=xt.device), held))
            cells = join(cells, roll.memory.fast[-CHUNK:])
    return RolloutTrace(context, torch.cat(xs, dim=1), exits, cells, roll)


def backward(trace, text, gradient):
    """
    Adds d(loss)/d(weights) to the student's .grad, chunk by chunk.
    text      () -> net.text(...) with a graph, made anew for every chunk
    gradient  (b, f, c, h, w): d(loss)/d(trace.x)
    """
    roll = trace.roll
    for (x, t, src), g in zip(trace.exits, gradient.split(CHUNK, dim=1)):
        if src is None:
            memory, rope = roll.rotated([])
        else:
            place = (trace.cells.frame[:, None] == src[..., None]).int().argmax(-1)  # (b, m): where each held latent lies
            rows = torch.arange(len(place), device=place.device)[:, None]
            memory, rope = roll.rotated([trace.cells.apply(lambda x: x[rows, place])])
        v = roll.net(x, t, text(), rope, memory)[0]
        x0_from_v(x, v, t).backward(g)


def predict_x0(predict, x, t, noise):
    """x0 that a network predicts from x noised to t (b,): predict (x_t, t (b, f)) -> v. float32, no graph wanted."""
    at = t[:, None].expand(x.shape[:2])
    xt = add_noise(x, noise, at)
    return x0_from_v(xt, predict(xt, at), at)


# ---- what to log --------------------------------------------------------------------------------------------------------

def by_level(name, error, t):
    """error, t (b,) -> dict: mean error in each quarter of the noise levels that was drawn, name_0 (little noise) .. name_3"""
    return {f"{name}_{i}": error[some].mean().item() for i in range(4) if (some := (4 * t).long() == i).any()}


def kept_and_oldest(roll, kinds):
    """
    What a finished rollout's memory did: kinds, a name a video, of its motion
    returns  dict: kept_KIND, share of the tested chunks that surprised; oldest, mean age of the oldest keyframe in s, if any
    """
    keeps = torch.stack(roll.kept, 1).float()[:, ::roll.memory.policy.interval].mean(1).tolist()
    found = {kind: [keep for keep, k in zip(keeps, kinds) if k == kind] for kind in kinds}
    ages = [(roll.chunk * CHUNK - roll.memory.slow.frame[:, 0]).float().mean().item() / 4] if roll.memory.slow else []
    return {f"kept_{kind}": sum(some) / len(some) for kind, some in found.items()} | {"oldest": age for age in ages}


if __name__ == "__main__":
    torch.manual_seed(0)
    mean = torch.zeros(1, requires_grad=True)  # student N(mean, 1), teacher N(2, 1): both scores are known in closed form
    for update in range(201):
        x = mean + torch.randn(256, 1, 1, 1, 1)
        t = score_level(torch.rand(256))

        def closed_form(center):
            def predict(xt, at):
                at = at[..., None, None, None]
                x0 = center + (1 - at) / ((1 - at) ** 2 + at ** 2) * (xt - (1 - at) * center)
                return (xt - x0) / at
            return predict

        noise = torch.randn_like(x)
        fake, real = (predict_x0(closed_form(m), x.detach(), t, noise) for m in (mean.detach(), 2.))
        dmd_loss(x, dmd_gradient(x.detach(), fake, real)[0]).backward()
        mean.data -= .02 * mean.grad
        mean.grad = None
        if update % 50 == 0:
            print(f"update {update:3d}: student mean {mean.item():.2f} (teacher 2), KL {(mean.item() - 2) ** 2 / 2:.3f}")
