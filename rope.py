"""
Wan's three-axis rotary position embedding, and the one rule that bounds it.

A token stands at (time, row, column). The head's dims are split into three runs, one an axis, and pairs of
dims are rotated by angle = position * 10000 ** (-i / n). Keys are cached un-rotated and rotated when they are
read, because an entry's position changes as it ages: bounded positions number whatever the KV cache holds
compactly, so that the student's time never leaves 0..20 however long the video is. (The teacher's 21 latents
stand at 21..41, behind its context at 0..20.)

    Context Forcing, eq. 8 as it is meant, with N_s, N_c, N_l = 3, 12, 6 latents, phi = time:
        sink  phi in [0, N_s - 1]                          here 0..2
        slow  phi in [N_s, N_s + N_c - 1]                  here 3..14
        fast  phi in [N_s + N_c, N_s + N_c + N_l - 1]      here 15..20, the last 3 are the current chunk

As printed, the equation gives slow memory [3, 11], 9 places for its 12 entries, and fast memory [12, 17],
which is not the 0..20 of the text. Compact numbering is the reading that fills 0..20 exactly, also before
memory is full.

    python rope.py             # draws what distance in time does to a score, and prints bounded positions

References: RoFormer, arXiv 2104.09864; Wan 2.1 (split d - 4(d//6) | 2(d//6) | 2(d//6), interleaved pairs);
Context Forcing, arXiv 2602.06028, eq. 8.
Leaves out: complex128 (float32 angles differ by 1e-6), interpolation and other stretching.
"""
import torch

MAX_POSITION = 1024  # Wan's table ends here: 1,024 latents = 256 s of absolute positions


def bounded_positions(held, new):
    """Positions in time of `held` latents in the KV cache, and of the `new` after them: (held,), (new,)"""
    return torch.arange(held), torch.arange(held, held + new)


def absolute_positions(held, new):
    """
    Frame numbers as positions: held (b, m) of the latents in the KV cache, new (b, f) of those after them.
    Raises ValueError beyond the 1,024 positions of Wan's table.
    """
    latents = int(new.max()) + 1
    if latents > MAX_POSITION:
        raise ValueError(f"unbounded positions end at {MAX_POSITION} latents (256 s), "
                         f"latent {latents} asked for: use bounded positions")
    return held, new


def rope_cos_sin(time, h, w, d):
    """
    time     (f,) or (b, f) temporal positions
    h, w     latent rows and columns after patching
    d        head dim, even
    returns  what apply_rope() takes, two float32 tables (1 or b, f h w, 1, d), the same for every head: cos
             of each pair twice; -sin and sin of each pair. Tokens in the order (f h w), pairs time, row,
             column
    """
    time = torch.atleast_2d(time)
    b, f = time.shape
    # Made on the CPU in float64, which not every device has, and moved once as float32.
    home = "meta" if time.is_meta else "cpu"
    rows = torch.arange(h, device=home)
    columns = torch.arange(w, device=home)

    def angles(position, n):
        exponent = torch.arange(0, n, 2, dtype=torch.float64, device=home) / n
        frequency = 10000.0 ** -exponent
        return position[..., None] * frequency

    # Wan's split: a row and a column get a third of the dims each, rounded down to pairs; time gets the rest.
    side = 2 * (d // 6)
    by_time = angles(time.to(home), d - 2 * side)[:, :, None, None]
    by_row = angles(rows, side)[:, None]
    by_column = angles(columns, side)
    # (b, f, h, w, p) each
    by_axis = [pairs.expand(b, f, h, w, -1) for pairs in (by_time, by_row, by_column)]
    # (b, f h w, 1, d / 2)
    angle = torch.cat(by_axis, dim=-1).flatten(1, 3).unsqueeze(2)
    angle = angle.float().to(time.device)
    sin = angle.sin()
    for_pair = angle.cos().repeat_interleave(2, dim=-1)
    for_swapped = torch.stack([-sin, sin], dim=-1).flatten(-2)
    return for_pair, for_swapped


def apply_rope(x, cos_sin):
    """
    x (b, n, heads, d): each pair (p, q) becomes (p cos - q sin, q cos + p sin), in float32
    returns  (b, n, heads, d) in x's dtype
    """
    cos, sin = cos_sin
    pairs = x.float()
    # (q, p)
    swapped = pairs.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    return torch.addcmul(pairs * cos, swapped, sin).type_as(x)


if __name__ == "__main__":
    # A query at position 20 meets its own copy at each position: the mean over 512 random unit vectors.
    torch.manual_seed(0)
    unit = torch.randn(512, 1, 1, 128)
    unit = unit / unit.norm(dim=-1, keepdim=True)
    query = apply_rope(unit, rope_cos_sin(torch.tensor([20]), 1, 1, 128))
    copies = unit.expand(-1, 21, -1, -1)
    keys = apply_rope(copies, rope_cos_sin(torch.arange(21), 1, 1, 128))
    score = (query * keys).sum(-1).mean(dim=(0, 2))  # (21,)
    segments = ["sink"] * 3 + ["slow"] * 12 + ["fast"] * 6
    for position, value in enumerate(score.tolist()):
        bar = "#" * round(200 * (value - .8))
        print(f"position {position:2d} {segments[position]} {value:.2f} {bar}")
    # However long the video is, its positions are these.
    held, new = bounded_positions(18, 3)
    print("any length, 18 held + 3 new:", held.tolist(), new.tolist())
