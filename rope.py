"""
Wan's three-axis rotary position embedding, and the one rule that bounds it.

A token stands at (time, row, column). The head's dims are split into three runs, one an axis, and pairs of dims are
rotated by angle = position * 10000 ** (-i / n). Bounded positions (Context Forcing, eq. 8) number whatever the memory holds
compactly, sink | slow | fast | current = 0, 1, 2, ..., so that time never leaves 0..20 however long the video is. Keys are
stored un-rotated and rotated when read: an entry's position changes as it ages.

    python rope.py             # draws how a score falls with distance, and prints bounded positions

References: RoFormer, arXiv 2104.09864; Wan 2.1 (split d - 4(d//6) | 2(d//6) | 2(d//6), interleaved pairs); Context
Forcing, arXiv 2602.06028, eq. 8. The equation as printed gives slow memory 9 places for 12 entries; compact numbering is
the reading that fills 0..20 exactly.
Leaves out: complex128 (float32 angles differ by 1e-6), interpolation and other stretching.
"""
import torch
from einops import rearrange, repeat

MAX_POSITION = 1024  # Wan's table ends here: 1,024 latents = 256 s of unbounded positions


def bounded(held, new):
    """Temporal positions of `held` memory latents and of the `new` latents after them: 0 .. held + new - 1."""
    return torch.arange(held), torch.arange(held, held + new)


def unbounded(src, start, new):
    """
    Absolute frame numbers: src (b, f) of the memory latents, and `new` latents from `start` on.
    Raises ValueError beyond the 1,024 positions of Wan's table.
    """
    if start + new > MAX_POSITION:
        raise ValueError(f"unbounded positions end at {MAX_POSITION} latents (256 s), latent {start + new} asked for: "
                         "use --positions bounded")
    return src, torch.arange(start, start + new, device=src.device)


def angles(time, h, w, d):
    """
    time     (f,) or (b, f)  temporal positions
    h, w     latent rows and columns after patching
    d        head dim, even
    returns  (f h w, d / 2) or (b, f h w, d / 2) float32 angles; token order is (f h w), pair order time, row, column
    """
    dims = (d - 4 * (d // 6), 2 * (d // 6), 2 * (d // 6))
    freq = [10000.0 ** (-torch.arange(0, n, 2, dtype=torch.float64, device=time.device) / n) for n in dims]
    rows, columns = torch.arange(h, device=time.device), torch.arange(w, device=time.device)
    lead = "b f" if time.ndim == 2 else "f"
    b = {"b": len(time)} if time.ndim == 2 else {}
    parts = [repeat(time[..., None] * freq[0], f"{lead} p -> {lead} h w p", h=h, w=w),
             repeat(rows[:, None] * freq[1], f"h p -> {lead} h w p", f=time.shape[-1], w=w, **b),
             repeat(columns[:, None] * freq[2], f"w p -> {lead} h w p", f=time.shape[-1], h=h, **b)]
    return rearrange(torch.cat(parts, dim=-1), f"{lead} h w p -> {lead.replace('f', '(f h w)')} p").float()


def table(time, h, w, d):
    """cos and sin, each (n, 1, d / 2) or (b, n, 1, d / 2): what rotate() takes."""
    a = angles(time, h, w, d)[..., None, :]
    return a.cos(), a.sin()


def rotate(x, cos_sin):
    """x (b, n, k, d): pairs (x[2i], x[2i+1]) turned by the table's angles, in float32; returned in x's dtype."""
    cos, sin = cos_sin
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2).to(x.dtype)


if __name__ == "__main__":
    q = rotate(torch.ones(1, 1, 1, 48), table(torch.tensor([20]), 1, 1, 48))
    k = rotate(torch.ones(1, 21, 1, 48), table(torch.arange(21), 1, 1, 48))
    score = torch.einsum("bqkd,bskd->s", q, k)
    for position, s in enumerate(score.tolist()):
        print(f"position {position:2d} {'sink' if position < 3 else 'slow' if position < 15 else 'fast'} {'#' * int(s)}")
    print("any length, 18 held + 3 new:", *(p.tolist() for p in bounded(18, 3)))
