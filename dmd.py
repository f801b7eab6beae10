"""
Distribution matching distillation (DMD), and its contextual form: Stage 1 and Stage 2.

A few-step student makes a video; noise is added to it, and two networks say where the clean video lies: the
frozen teacher (real score) and a critic that is trained on the student's own videos (fake score). Their
difference is the gradient of a KL divergence, and moves the student's videos towards the teacher's.

    Context Forcing, eq. 5:  L = E_c KL( p_student(x | c) || p_teacher(x | c) ),  c of the student's rollout
    eq. 6:                   dL/dtheta = E_t,noise [ (s_fake(x_t, t, c) - s_real(x_t, t, c)) dx/dtheta ]

    x = trace.x, the last 7 chunks of a rollout
    c = trace.context, what the student's memory held when they began: nothing in Stage 1
    x_t = add_noise(x, noise, t)
    s_fake, s_real = critic and teacher, by the x0 that they predict; s_fake - s_real becomes dmd_gradient(),
                     (fake - real) / mean |x - real|
    dx/dtheta = backward()

    Algorithm 1:  draw the rollout's length L, in chunks, from the shortest up to longest_rollout(), all
    equally likely, and an exit step r. Chunks before the target are denoised in full, those of the target up
    to step r, and each enters the KV cache by a clean pass: rollout(). Then critic_step() or student_step():
    five updates of the critic (in the small world two) and one of the student, each on rollouts of its own,
    or the critic would learn one video instead of how the student makes them. (As printed, the paper's loss
    lies inside the loop over chunks, and some of the context is left noisy; the text is followed: losses
    after the loop, all of the context denoised in full.)

    The small world can afford more: all of its rollout is denoised in full, and the gradient passes through
    every step of a target chunk (all_steps). Then the critic learns from each 21 latents of a rollout that
    come after a full memory, targets_of(), and for some updates it learns alone: as long as it is no more
    than a copy of the teacher, fake - real is noise, which Adam scales up to full steps.

A rollout is made without a graph. The gradient reaches the weights in a second pass, chunk by chunk: only the
exit step of a target chunk is run again with a graph, and thrown away before the next. So training holds one
chunk's graph whatever the length; the gradient is the same. (Self-Forcing's checkpointed code lets part of
the gradient cross chunks through the cache; here keys and values in the memory are constants.)

    python dmd.py              # a Gaussian student pulled to a Gaussian teacher: its KL goes down

References: DMD, arXiv 2311.18828; DMD2, arXiv 2405.14867; Self-Forcing, arXiv 2506.08009; Context Forcing,
arXiv 2602.06028, eq. 5-6, algorithm 1.
Leaves out: the GAN and SiD losses of Self-Forcing.
"""
from dataclasses import dataclass
from functools import partial

import torch
from einops import rearrange

from erft import predict_velocity
from flow import Rollout, add_noise, denoise, flow_matching_loss, guide, shifted, x0_from_v
from memory import CHUNK, PRESETS, Entries, frames_in_memory


def score_level(u, shift=5.0):
    """Uniform u (b,) in [0, 1) -> noise level of the scores, shifted and clamped."""
    return shifted(u, shift).clamp(0.02, 0.98)


def dmd_gradient(x, fake, real):
    """
    x           (b, f, c, h, w) the student's video
    fake, real  (b, f, c, h, w) the x0 that critic and teacher predict from it, noised
    returns     gradient in x, and (b,) its normaliser, the mean |x - real|: both of the target only, never of
                a context
    """
    norm = (x - real).abs().mean((1, 2, 3, 4), keepdim=True)
    gradient = (fake - real) / norm
    return gradient.nan_to_num(0., 0., 0.), norm.flatten()


# ---- Algorithm 1: the rollout ------------------------------------------------------------------------------

def longest_rollout(done, first, last, ramp):
    """
    The curriculum: chunks that a rollout may have at most, from `first` to `last`.
    done  share of the updates that is done; from the share `ramp` on it is `last`
    """
    return int(first + min(1, done / ramp) * (last - first))


def keyframes(chunks, target):
    """
    Keyframes in slow memory when the target of a rollout of so many chunks begins, if every tested chunk is
    kept. Slow memory fills with chunks 1 to 4; chunks 6, 8, ... add one each, when they leave fast memory.
    """
    return min(PRESETS["slowfast"].slow, max(0, chunks - target - 7) // 2)


def keyframe_histogram(shortest, longest, ramp, target):
    """The curriculum -> [share of the rollouts whose target begins with 0, 1, .., 12 keyframes]"""
    shares = [0.] * (PRESETS["slowfast"].slow + 1)
    for percent in range(100):
        most = longest_rollout(percent / 100, shortest, longest, ramp)
        lengths = range(shortest, most + 1)
        for chunks in lengths:
            shares[keyframes(chunks, target)] += .01 / len(lengths)
    return shares


@dataclass
class Exit:
    """The exit step of one target chunk, or all of its steps: what backward() needs to run them again."""
    xt: torch.Tensor     # (b, 3, c, h, w) input of the first of them
    levels: list         # their noise levels
    fresh_noise: object  # step -> noise between them
    held: torch.Tensor   # (b, m) numbers of the frames that the KV cache held; None = none


@dataclass
class RolloutTrace:
    """What a rollout leaves behind: a video for the scores, and all that backward() needs."""
    # what the scores see; where a critic learns from several targets a video, there are more than b of each
    context: torch.Tensor  # (b, n, c, h, w): what the memory held when the target began; n = 0 in Stage 1
    x: torch.Tensor        # (b, f, c, h, w): the target, the video's end
    video: torch.Tensor    # (b, 3 chunks, c, h, w): all of it
    rollout: Rollout       # its memory knows frames and latents, but no keys any more
    exits: list            # an Exit for each target chunk
    entries: list          # Entries that hold, each once, all that the target's chunks saw


@torch.no_grad()
def rollout(roll, levels, exit_step, fresh_noise, chunks, target, for_backward=True):
    """
    The student's own video, its target stopped early.
    roll          a fresh Rollout, of bounded positions
    levels        noise levels of the student's steps
    exit_step     the target's chunks are denoised up to this step (0-based), those before it in full; None =
                  the target too, and backward() passes through all of its steps
    fresh_noise   (chunk, step) -> noise (b, 3, c, h, w)
    chunks        length of the rollout
    target        how many chunks at its end are scored
    for_backward  False: exits and entries stay empty, all that a critic needs
    returns       RolloutTrace
    """
    def predict(x, t, level):
        return roll.predict(x, t)[0]

    # every chunk before the target is denoised in full
    video = []
    for i in range(chunks - target):
        roll.read_context()
        x0, _ = denoise(predict, fresh_noise(i, 0), levels, partial(fresh_noise, i))
        roll.append(x0)
        video.append(x0)
    # what the memory holds now, before room is made for the target, is the context of teacher and critic
    held = roll.memory.segments()
    context = [segment.latent for segment in held]
    # uncopied, but held: backward() needs what is evicted later
    entries = [segment[:] for segment in held] if for_backward else []
    exits = []
    # the target's chunks leave at the exit step, and enter the KV cache as they are then
    last = len(levels) if exit_step is None else exit_step + 1
    for i in range(chunks - target, chunks):
        roll.read_context()
        noise, more_noise = fresh_noise(i, 0), partial(fresh_noise, i)
        x0, xt = denoise(predict, noise, levels[:last], more_noise)
        if for_backward:
            begin = (noise, levels) if exit_step is None else (xt, levels[exit_step:last])
            exits.append(Exit(*begin, more_noise, roll.memory.frames()))
        made = roll.append(x0)
        if for_backward:
            entries.append(made)
        video.append(x0)
    # 21 latents of keys and values at full size are 6 GB: nobody reads these again
    roll.view = None
    roll.memory.drop_keys()
    video = torch.cat(video, dim=1)
    context = torch.cat([video[:, :0], *context], dim=1)
    return RolloutTrace(context, video[:, -CHUNK * target:], video, roll, exits, entries)


def targets_of(latents, keep, policy, target):
    """
    The critic's share of a video that is denoised in full: the last `target` chunks, those before them, and
    so on, as long as what lies before fills the memory; of a video too short for that only the last ones.
    latents  (b, f, c, h, w); keep (b, chunks) bool: which of its chunks memory kept
    returns  context (n b, m, c, h, w), x (n b, 3 target, c, h, w)
    """
    last = keep.shape[1] - target
    full = policy.size // CHUNK
    # what the student's memory held at each chunk, before room was made for it
    held = frames_in_memory(policy, keep.cpu(), evict_first=False)
    videos = torch.arange(len(latents))[:, None]
    contexts, xs = [], []
    # from the end of the video backwards
    for first in range(last, min(last, full) - 1, -target):
        contexts.append(latents[videos, held[first]])
        xs.append(latents[:, CHUNK * first:CHUNK * (first + target)])
    return torch.cat(contexts), torch.cat(xs)


def entries_of(entries, frame):
    """Those of a list of Entries that have the frame numbers frame (b, m), video by video -> Entries"""
    numbers = torch.cat([some.frame for some in entries], dim=1)
    place = (numbers[:, None] == frame[..., None]).int().argmax(-1)  # (b, m): where each frame lies
    videos = torch.arange(len(place), device=place.device)[:, None]

    def pick(layers):
        return [torch.cat(layer, dim=1)[videos, place] for layer in zip(*layers)]

    keys = pick(some.keys for some in entries)
    return Entries(frame, keys=keys, values=pick(some.values for some in entries))


def backward(trace, features, gradient):
    """
    Adds d(loss)/d(weights) to the student's .grad, chunk by chunk.
    trace     RolloutTrace
    features  text features (b, m, text_dim) of its prompts: their keys and values get a graph in every chunk
    gradient  (b, f, c, h, w): d(loss)/d(trace.x)
    """
    for exit, chunk_gradient in zip(trace.exits, gradient.split(CHUNK, dim=1)):
        exit_x0(trace, exit, features).backward(chunk_gradient)


def exit_x0(trace, exit, features):
    """An Exit again, with a graph -> x0 (b, 3, c, h, w)"""
    net = trace.rollout.net
    # the same KV cache, constant, at the same bounded positions
    segments = [] if exit.held is None else [entries_of(trace.entries, exit.held)]
    memory, rope = trace.rollout.rotated(segments)
    del segments  # 5 GB at full size
    text = net.text(features)

    def predict(x, t, level):
        return net(x, t, text, rope, memory, with_kv=False)[0]

    # the same input, the same noise
    return denoise(predict, exit.xt, exit.levels, exit.fresh_noise)[0]


# ---- the updates: each adds to .grad, and leaves the step to the optimizer ---------------------------------

def predict_x0(net, features, context, xt, t, grid):
    """x0 (b, f, c, h, w) that teacher or critic predicts from xt, noised to t (b, f), behind a context."""
    v = predict_velocity(net, context, xt, t, net.text(features), grid)
    return x0_from_v(xt, v, t)


def squared_error(x0, x):
    return (x0 - x).square().mean((1, 2, 3, 4))  # (b,)


def critic_step(critic, features, trace, t, noise, grid):
    """
    The critic follows the student: flow matching on the student's video, behind what its memory held when
    the target began.
    features             text features (b, m, text_dim) of the prompts
    t, noise             (b,) noise levels from score_level(), and noise of trace.x's shape
    grid                 latent rows and columns after patching
    returns              loss, and (b,) squared error of the x0 that it predicts
    """
    t = t[:, None].expand(trace.x.shape[:2])
    xt = add_noise(trace.x, noise, t)
    v = predict_velocity(critic, trace.context, xt, t, critic.text(features), grid)
    loss = flow_matching_loss(v, noise - trace.x).mean()
    loss.backward()
    fake = x0_from_v(xt, v.detach(), t)
    return loss.item(), squared_error(fake, trace.x)


def student_step(student, teacher, critic, features, trace, t, noise, grid, guidance=1., negative=None):
    """
    The student's update, eq. 6: fake - real, normalised, pushed through the exit step of each target chunk.
    guidance, negative   of the real score: its weight, and the text features that it leads away from; 1 =
                         none
    the rest             as in critic_step
    returns              (b,) normaliser of the gradient, and (b,) squared error of the teacher's x0 to the
                         student's
    """
    t = t[:, None].expand(trace.x.shape[:2])
    xt = add_noise(trace.x, noise, t)
    # both scores see the same noised video behind the same context
    with torch.no_grad():
        fake = predict_x0(critic, features, trace.context, xt, t, grid)
        real = predict_x0(teacher, features, trace.context, xt, t, grid)
        if guidance != 1:
            away = predict_x0(teacher, negative, trace.context, xt, t, grid)
            real = guide(real, away, guidance)
    # eq. 6
    gradient, norm = dmd_gradient(trace.x, fake, real)
    backward(trace, features, gradient / gradient.numel())
    return norm, squared_error(real, trace.x)


if __name__ == "__main__":
    torch.manual_seed(0)
    # Student N(mean, 1) and teacher N(2, 1): the x0 that belongs to either score is known in closed form.
    mean = torch.tensor(-1., requires_grad=True)

    def posterior_mean(center, xt, t):
        t = rearrange(t, "b -> b 1 1 1 1")
        return center + (1 - t) / ((1 - t) ** 2 + t ** 2) * (xt - (1 - t) * center)

    for update in range(81):
        if update % 8 == 0:
            kl = (mean.item() - 2) ** 2 / 2
            bar = "#" * round(15 * kl)
            print(f"update {update:3d}: student mean {mean.item():5.2f} (teacher 2), KL {kl:4.2f} {bar}")
        x = mean + torch.randn(256, 1, 1, 1, 1)
        t = score_level(torch.rand(256))
        xt = add_noise(x.detach(), torch.randn_like(x), t[:, None])
        fake = posterior_mean(mean.detach(), xt, t)
        real = posterior_mean(2., xt, t)
        gradient, _ = dmd_gradient(x.detach(), fake, real)
        x.backward(gradient / gradient.numel())
        mean.data -= .02 * mean.grad
        mean.grad = None
