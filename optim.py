"""
What moves the weights: optimizers, one step of them over all processes, and the averages (EMA) that follow.

Muon orthogonalises what AdamW would scale: the step of a matrix has all its singular values near one. It is
torch.optim.Muon in float32, as that one's bfloat16 takes longer than all the rest of a tiny network's update
on a CPU without units for it.

Small networks are whole in every process, and their gradients are averaged. At full size (--wan) parameters,
gradients, moments and averages lie spread over the processes, block by block, by FSDP.

References: Muon, https://kellerjordan.github.io/posts/muon.
"""
import math
from functools import partial

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grad_norm_

from checkpoint import any_process, get_processes
from model import DiT
from weights import load_state_dict_strict


def make_optimizers(cfg, preset, nets):
    """-> {"net": [optimizers], "critic": [optimizer]}: a critic moves alone, all other networks together"""
    matrices, others, critic = [], [], []
    for path, p in nets.named_parameters():
        # Muon for the transformers' matrices and the autoencoder's kernels; of one lr, steps are of one size
        is_matrix = p.ndim == 2 and "blocks" in path and "embedding" not in path
        use_muon = (is_matrix or p.ndim == 4) and not preset.teacher and not cfg.wan
        group = matrices if use_muon else others
        (critic if path.startswith("critic.") else group).append(p)
    betas = (0., preset.beta2) if preset.teacher else (.9, .95)
    # sharded parameters would be stepped one by one unless told otherwise
    adamw = partial(torch.optim.AdamW, weight_decay=.01, foreach=True if cfg.wan else None)
    optimizers = {"net": [adamw(others, betas=betas)], "critic": []}
    if matrices:
        optimizers["net"].append(Muon(matrices))
    if critic:
        optimizers["critic"] = [adamw(critic, betas=(preset.critic_beta1, preset.beta2))]
    return optimizers


class Muon(torch.optim.Optimizer):
    """For matrices, and kernels as matrices (out, in h w); a rate means as large a step as AdamW's."""
    def __init__(self, params, lr=1e-3, weight_decay=.01, momentum=.95):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure=None):  # which get_state_dict gives: None
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(p)
                # Nesterov's momentum
                buffer = state["momentum_buffer"].lerp_(p.grad, 1 - group["momentum"])
                update = orthogonalise(p.grad.lerp(buffer, group["momentum"]).flatten(1))
                # decay, and the step
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update.view_as(p), alpha=-.2 * group["lr"] * math.sqrt(max(update.shape)))


def orthogonalise(x, steps=5):
    """A matrix with its singular values brought near 1, by Newton-Schulz steps with Muon's coefficients"""
    is_tall = x.shape[0] > x.shape[1]
    x = x.T if is_tall else x
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.T if is_tall else x


def optimizer_step(optimizers, lr, loss, passes, clip):
    """
    Averages gradients over passes and processes, clips them, and moves the weights; it does not where a loss
    or a gradient is not finite in any process.
    returns  norm of the gradient before clipping, was all finite?
    """
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    params = [p for group in groups for p in group["params"]]
    # the mean over passes and processes
    for p in params:
        if dist.is_initialized() and not isinstance(p, DTensor):  # FSDP averages what is sharded
            dist.all_reduce(p.grad)
            p.grad /= get_processes()
        p.grad /= passes
    # clipped; FSDP's norm is a sharded tensor
    norm = clip_grad_norm_(params, clip)
    norm = norm.full_tensor().item() if isinstance(norm, DTensor) else norm.item()
    # a step, if all processes may take it
    is_finite = not any_process(not math.isfinite(norm + loss))
    for group in groups:
        group["lr"] = lr
    for optimizer in optimizers:
        if is_finite:
            optimizer.step()
        optimizer.zero_grad()
    return norm, is_finite


def shard(nets):
    """Spreads networks of Wan's form over the processes, if there are several."""
    if not dist.is_initialized():
        return
    # where the networks are: the default is a GPU, if there is one
    mesh = init_device_mesh(next(nets[0].parameters()).device.type, (get_processes(),))
    for net in nets:
        # not whole blocks: DiT itself reads their modulation, and asks for the text's keys and values
        for block in net.blocks:
            for part in (block.self_attn, block.cross_attn, block.ffn):
                fully_shard(part, mesh=mesh)
            register_fsdp_forward_method(block.cross_attn, "keys_values")
        fully_shard(net, mesh=mesh)
        register_fsdp_forward_method(net, "text")


@torch.no_grad()
def update_ema(ema, nets, decay):
    """average <- decay * average + (1 - decay) * weights"""
    for name, averaged in ema.items():
        for average, p in zip(averaged.parameters(), nets[name].parameters()):
            average.lerp_(p, 1 - decay)


def whole_networks(ema):
    """The averaged networks, each whole in every process: a collective."""
    whole = dict(ema)
    for name, net in ema.items():
        if isinstance(next(net.parameters()), DTensor):
            state = get_model_state_dict(net, options=StateDictOptions(full_state_dict=True))
            with torch.device("meta"):
                empty = DiT(net.config)
            whole[name] = load_state_dict_strict(empty, state)
    return whole
