"""Multi-head latent attention in 100 lines of plain torch, then the same weights through LatentKV: the same numbers.

Run it: python examples/mla_in_100_lines.py
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class PlainMLA(nn.Module):
    """One layer for one sequence, as in DeepSeek-V2 (arXiv 2405.04434, section 2.1), with the cache inside.

    H heads; L: rank of the latent; Dn and R: dimensions of a query or key head without and with position; Dv: of a
    value head. The cache is [tokens, L + R]: one latent and one rotated key per token, whatever H is.
    """

    def __init__(self, hidden: int, H: int, *, L: int, Dn: int, R: int, Dv: int) -> None:
        super().__init__()
        self.H, self.L, self.Dn, self.R, self.Dv = H, L, Dn, R, Dv
        self.q_proj = nn.Linear(hidden, H * (Dn + R), bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(hidden, L + R, bias=False)  # down to what is cached
        self.kv_a_layernorm = nn.RMSNorm(L, eps=1e-6)
        self.kv_b_proj = nn.Linear(L, H * (Dn + Dv), bias=False)  # up to each head's key and value
        self.o_proj = nn.Linear(H * Dv, hidden, bias=False)
        self.cache = torch.empty(0, L + R)

    def prefill(self, x: Tensor) -> Tensor:
        """Read a prompt [T, hidden] in the expanded form: keys and values of all heads, then ordinary attention."""
        q_nope, q_rope = self.queries(x)
        latent, k_rope = self.remember(x)
        w_uk, w_uv = self.up_projections()
        k_nope = torch.einsum("sl,hnl->shn", latent, w_uk)
        values = torch.einsum("sl,hvl->shv", latent, w_uv)
        keys = torch.cat([k_nope, k_rope[:, None].expand(-1, self.H, -1)], dim=-1)
        queries = torch.cat([q_nope, q_rope], dim=-1)
        scores = torch.einsum("thd,shd->hts", queries, keys)
        heads = torch.einsum("hts,shv->thv", self.softmax(scores), values)
        return self.o_proj(heads.flatten(1))

    def decode(self, x: Tensor) -> Tensor:
        """Read new tokens [T, hidden] in the absorbed form: queries meet the cached latents as they are.

        q . (W_UK c) = (W_UK^T q) . c, so W_UK goes to the query, once per new token instead of once per cached one;
        and sum_s a_s (W_UV c_s) = W_UV (sum_s a_s c_s), so W_UV waits until the sum is made.
        """
        q_nope, q_rope = self.queries(x)
        latent, _ = self.remember(x)
        w_uk, w_uv = self.up_projections()
        absorbed = torch.cat([torch.einsum("thn,hnl->thl", q_nope, w_uk), q_rope], dim=-1)
        scores = torch.einsum("thd,sd->hts", absorbed, self.cache)
        summed = torch.einsum("hts,sl->thl", self.softmax(scores), latent)
        heads = torch.einsum("thl,hvl->thv", summed, w_uv)
        return self.o_proj(heads.flatten(1))

    def queries(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Each head's query without position [T, H, Dn], and its rotated part [T, H, R]."""
        q_nope, q_rope = self.q_proj(x).unflatten(-1, (self.H, -1)).split([self.Dn, self.R], dim=-1)
        return q_nope, rotate(q_rope, first=len(self.cache))

    def remember(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Add the new tokens to the cache; latents [S, L] and shared keys [S, R] of all tokens so far."""
        latent, k_rope = self.kv_a_proj_with_mqa(x).split([self.L, self.R], dim=-1)
        k_rope = rotate(k_rope[:, None], first=len(self.cache))[:, 0]
        new = torch.cat([self.kv_a_layernorm(latent), k_rope], dim=-1)
        self.cache = torch.cat([self.cache.to(new), new])
        return self.cache[:, : self.L], self.cache[:, self.L :]

    def up_projections(self) -> tuple[Tensor, Tensor]:
        """W_UK [H, Dn, L] and W_UV [H, Dv, L], both in kv_b_proj."""
        w_uk, w_uv = self.kv_b_proj.weight.unflatten(0, (self.H, -1)).split([self.Dn, self.Dv], dim=1)
        return w_uk, w_uv

    def softmax(self, scores: Tensor) -> Tensor:
        """Of scores [H, T, S], in which the last T of S tokens do not see those after them."""
        new, tokens = scores.shape[1:]
        seen = torch.ones(new, tokens, dtype=torch.bool).tril(tokens - new)
        scores = scores * (self.Dn + self.R) ** -0.5
        return F.softmax(scores.masked_fill(~seen, float("-inf")), dim=-1)


def rotate(x: Tensor, first: int) -> Tensor:
    """RoPE of x [T, heads, R], neighbours paired, for the positions first, first + 1, ..."""
    pairs = x.shape[-1] // 2
    frequencies = 10000.0 ** -(torch.arange(pairs, dtype=torch.float64) / pairs)
    angles = torch.arange(first, first + len(x), dtype=torch.float64)[:, None, None] * frequencies
    turned = torch.view_as_complex(x.unflatten(-1, (pairs, 2)).double()) * torch.polar(torch.ones_like(angles), angles)
    return torch.view_as_real(turned).flatten(-2).to(x.dtype)


# The 100 lines end here. Now the same weights in the library, whose cache is paged and whose kernels are native.


@torch.inference_mode()
def outputs_of_both(tokens: int = 200, new: int = 3) -> tuple[Tensor, Tensor]:
    """What a prompt of `tokens` and `new` decoded ones give, [tokens + new, hidden]: of the plain layer, of ours."""
    from latentkv import MultiHeadLatentAttention, PagedCache
    from latentkv.models.batch import Batch
    from latentkv.models.rope import rotary
    from latentkv.state.spec import LatentSpec, LayerSpec

    torch.manual_seed(0)
    plain = PlainMLA(256, 8, L=128, Dn=32, R=16, Dv=32)
    library = MultiHeadLatentAttention(
        256, 8, kv_lora_rank=128, qk_nope_head_dim=32, qk_rope_head_dim=16, v_head_dim=32
    )
    library.load_state_dict(plain.state_dict())
    x = torch.randn(tokens + new, 256)
    steps = [x[:tokens], *x[tokens:].split(1)]

    expected = [plain.prefill(steps[0]), *(plain.decode(step) for step in steps[1:])]

    cache = PagedCache([LayerSpec(LatentSpec(latent_dim=128, rope_dim=16, format="fp32"))], num_pages=8)
    pages = cache.pool.allocate(cache.pages_for(len(x)))  # page numbers, in any order
    found, done = [], 0
    for step in steps:
        batch = Batch.build([[0] * len(step)], [done], [pages], page_size=cache.page_size)
        positions = rotary(library.rope, batch.positions, max_context=4096)
        # The form is chosen by its cost: expanded for the prompt, absorbed for each token after it.
        found.append(library.attend(step, positions, batch, cache.view(0)))
        done += len(step)
    mha = 4 * 8 * (32 + 16 + 32)
    print(f"cached: {plain.cache.shape[1]} numbers, {cache.bytes_per_token} bytes per token in fp32; as MHA: {mha}")
    return torch.cat(expected), torch.cat(found)


if __name__ == "__main__":
    expected, found = outputs_of_both()
    print(f"largest output {expected.abs().max():.3f}, largest difference {(expected - found).abs().max():.1e}")
