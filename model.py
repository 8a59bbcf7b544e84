"""
A looped (depth-recurrent) GPT: a few layers are applied many times with the same weights.

    e = prelude(embed(idx))                    n_prelude blocks, once
    s = STATE[state_init](e)                   where the loop starts
    repeat n_loop times:
        u = INJECT[input_injection](e, s)      how the input enters every iteration
        s = norm_recur(recur(u, s))            n_block blocks, their weights shared by all iterations
    logits = lm_head(ln_f(coda(s)))            n_coda blocks, once

Only the last bptt_k iterations record a graph. Every model of config/ is a choice of entries of tables.py,
integers and neutral values; without prelude, coda, norm_loop and injection, once through, it is a plain GPT.

References: github.com/karpathy/nanoGPT; nanoLOOP and looped nanochat, github.com/LoopedLMs; FLT and LT,
github.com/FuRuF-11/FullyLoopedTransformer; Huginn, arXiv:2502.05171; Ouro, arXiv:2510.25741;
RMSNorm, arXiv:1910.07467; RoPE, arXiv:2104.09864.

Shapes: B sequences, T positions, C = n_embd, H heads, G = n_kv_head, D = C / H, V = vocab_size, R loops.
"""

import functools
import itertools
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn as nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from nanoloop.checks import check
from tables import ACT, INIT, INJECT, NORM, PLACE, POS, STATE, check_config, unit

HEAD_CHUNK = 2**25  # logits alive at a time, 128 MiB in float32: more tokens are read out in chunks


def upcast(x):
    """x in float32 at least: no loss or probability is taken in a low precision, and double stays double."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


# -----------------------------------------------------------------------------
# a block


class Context(NamedTuple):
    """What the blocks know of the tokens' positions."""

    rope: tuple | None  # cosines and sines of pos rope
    full: torch.Tensor | None  # which keys a query sees, as of attend
    narrow: torch.Tensor | None  # the same for blocks with a window


def rotary(pos, width, base):
    """Cosines and sines (..., T, width / 2) of the rotary embedding at positions pos (..., T), in float32."""
    freq = base ** (-torch.arange(0, width, 2, device=pos.device, dtype=torch.float32) / width)
    angle = pos[..., None] * freq
    return angle.cos(), angle.sin()


def rotate(x, rope):
    """Rotates the two halves of each head of x (B, H, T, D) by plus the position; keeps x's dtype."""
    cos, sin = rope
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


def band(pos, window):
    """(T, T), True where a query at pos (T,) sees a key: itself and the window keys before it."""
    back = pos[:, None] - pos
    return (back >= 0) & (back <= window)


def attend(q, k, v, mask, dropout):
    """Softmax attention, (B, H, T, D); k, v: (B, G, S, D).

    mask: (T, S) or (B, 1, T, S), True where a query sees a key. None: those up to its own if S = T, else all.
    """
    causal = mask is None and q.size(2) == k.size(2)
    options = dict(dropout_p=dropout, is_causal=causal, enable_gqa=q.size(1) != k.size(1))
    if q.device.type == 'cpu' and 1 < q.size(-2) <= 256:
        # the low precisions' backward takes up to 5 times float32's; a single token is decoded, not trained
        with torch.autocast('cpu', enabled=False):
            y = F.scaled_dot_product_attention(upcast(q), upcast(k), upcast(v), mask, **options)
        return y.to(q.dtype)
    return F.scaled_dot_product_attention(q, k, v, mask, **options)


def same(x):
    """Where a block has no norm: calling a module that does nothing takes microseconds."""
    return x


class CausalSelfAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        C, H, G = config.n_embd, config.n_head, config.n_kv_head or config.n_head
        self.heads, self.rows = [H, G], [C, 2 * G * C // H]
        self.c_attn = nn.Linear(C, sum(self.rows), bias=config.bias)  # rows of q, then of k and v
        self.c_proj = nn.Linear(C, C, bias=config.bias)
        self.qk_norm = functools.partial(unit, config=config) if config.qk_norm else same
        self.dropout = config.dropout

    def project(self, x, source):
        """c_attn(x), but its rows of q applied to source if there is one."""
        if source is None:
            return self.c_attn(x)
        weights = self.c_attn.weight.split(self.rows)
        biases = (None, None) if self.c_attn.bias is None else self.c_attn.bias.split(self.rows)
        return torch.cat([F.linear(*args) for args in zip((source, x), weights, biases, strict=True)], dim=-1)

    def forward(self, x, rope=None, mask=None, source=None, slot=None):
        (B, T, C), (H, G) = x.shape, self.heads
        heads = self.project(x, source).view(B, T, H + 2 * G, -1).transpose(1, 2)
        qk, v = heads.split([H + G, G], dim=1)
        if rope is not None:
            qk = rotate(qk, rope)
        q, k = self.qk_norm(qk).split([H, G], dim=1)
        if slot is not None:
            k, v = slot(k, v)
        y = attend(q, k, v, mask, self.dropout if self.training else 0.0)
        return F.dropout(self.c_proj(y.transpose(1, 2).reshape(B, T, C)), self.dropout, self.training)


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.act, parts, width = ACT[config.mlp]
        hidden = config.n_hidden or width(config.n_embd)
        self.c_fc = nn.Linear(config.n_embd, parts * hidden, bias=config.bias)  # swiglu: rows of gate, of up
        self.c_proj = nn.Linear(hidden, config.n_embd, bias=config.bias)
        self.dropout = config.dropout

    def forward(self, x):
        return F.dropout(self.c_proj(self.act(self.c_fc(x))), self.dropout, self.training)


class Block(nn.Module):
    """x = out(x + post(f(pre(x)))) with attention, then the MLP as f.

    take: of INJECT, what the block makes of x and the loop's state; None: it takes nothing of it.
    """

    def __init__(self, config, windowed, take=None):
        super().__init__()

        def norm(there):
            return NORM[config.norm](config) if there else same

        pre, post, out = PLACE[config.norm_place]
        self.windowed, self.take = windowed, take and functools.partial(take, config=config)
        self.ln_1, self.attn = norm(pre), CausalSelfAttention(config)
        self.ln_2, self.mlp = norm(pre), MLP(config)
        self.post_1, self.out_1, self.post_2, self.out_2 = map(norm, (post, out, post, out))

    def forward(self, x, rope=None, mask=None, s=None, slot=None):
        x, source = (x, None) if s is None else self.take(x, s)
        y = self.attn(self.ln_1(x), rope, mask, source, slot)
        x = self.out_1(x + self.post_1(y.to(x.dtype)))  # under autocast y is in the low precision
        return self.out_2(x + self.post_2(self.mlp(self.ln_2(x)).to(x.dtype)))


# -----------------------------------------------------------------------------
# the configuration


@dataclass
class GPTConfig:
    # model
    block_size: int = 1024  # context length, tokens
    vocab_size: int = 50304  # replaced by the data's unless given; GPT-2's 50257 padded to a multiple of 64
    n_head: int = 12  # attention heads
    n_kv_head: int | None = None  # heads of keys and values, a divisor of n_head; None = n_head
    n_embd: int = 768  # width
    size: int | None = None  # looped nanochat's dial: n_embd = 64 size rounded up to 128s, heads of 128
    dropout: float = 0.0  # 0 for pretraining, 0.1 and more for small data
    bias: bool = False  # biases in Linear and LayerNorm, as in GPT-2
    n_prelude: int = 2  # layers before the loop
    n_block: int = 2  # layers inside the loop
    n_coda: int = 2  # layers after the loop
    n_loop: int = 4  # iterations of the loop
    bptt_k: int | None = None  # only the last bptt_k iterations carry gradient; None = all
    input_injection: str = 'inject'  # or passthrough, add, query_first, query_all, residual_all: README.md
    state_init: str = 'prelude'  # the loop starts from: prelude s = e, random N(0, state_std^2), zero, none
    state_std: float | None = None  # of state_init random; None = n_embd^-0.5
    norm: str = 'rmsnorm'  # layernorm, rmsnorm, or rmsnorm_fixed, which has no weight
    norm_eps: float | None = None  # None = 1e-5 for layernorm, 1e-6 for the others
    norm_place: str = 'pre'  # pre, branch, around or post: which norms a block has, README.md
    norm_emb: bool = False  # a norm after the embedding
    norm_loop: bool = True  # a norm at the end of each iteration
    norm_final: bool = True  # a norm before the head
    pos: str = 'learned'  # positions: learned (an embedding), rope (q and k rotated) or none
    rope_base: float = 10000.0  # of pos rope
    qk_norm: bool = False  # RMSNorm without weight on q and k
    mlp: str = 'gelu'  # gelu, gelu_tanh, relu2 or swiglu
    n_hidden: int | None = None  # width inside the MLP; None = 4 n_embd, swiglu: 8/3 n_embd rounded up to 64s
    window_pattern: str = 'L'  # a letter per layer, repeated: L sees all keys, S window_size and itself
    window_size: int | None = None  # tokens; None = block_size // 2
    tie_weights: bool = True  # the head's weight is the embedding's
    softcap: float | None = None  # logits = softcap tanh(logits / softcap)
    emb_scale: float = 1.0  # the embedding times this
    exit_gate: bool = False  # a linear gate on the loop's state: the probability to stop after an iteration
    init: str = 'gpt2'  # how weights start: as GPT-2's, nanochat's or huginn's
    recompute: bool = False  # compute each iteration again in the backward pass: memory for time

    def __post_init__(self):
        """Raises ValueError for a value outside its table, and for one that would mean nothing."""
        check_config(self)

    @property
    def depth(self):
        """Executed layers."""
        return self.n_prelude + self.n_block * self.n_loop + self.n_coda


# -----------------------------------------------------------------------------
# the model


def hold(again, f, *args):
    """f(*args), of which args alone are held for the backward pass if that computes f again."""
    return checkpoint(f, *args, use_reentrant=False) if again and torch.is_grad_enabled() else f(*args)


class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = c = config
        injection, (learned, rotated) = INJECT[c.input_injection], POS[c.pos]
        windows = itertools.cycle(letter == 'S' for letter in c.window_pattern)  # a layer keeps its own

        def norm(exists):
            return NORM[c.norm](c) if exists else nn.Identity()

        def layers(*takes):
            return nn.ModuleList(Block(c, next(windows), take) for take in takes)

        # fmt: off
        self.transformer = nn.ModuleDict(dict(
            wte=nn.Embedding(c.vocab_size, c.n_embd),
            wpe=nn.Embedding(c.block_size, c.n_embd) if learned else None,
            norm_emb=norm(c.norm_emb), drop=nn.Dropout(c.dropout),
            prelude=layers(*[None] * c.n_prelude),
            recur=layers(injection.first, *[injection.others] * (c.n_block - 1)),
            coda=layers(*[None] * c.n_coda), ln_f=norm(c.norm_final),
        ))
        # fmt: on
        self.injection, self.start = injection, STATE[c.state_init]
        noise = torch.empty(c.block_size, c.n_embd) if c.state_init == 'random' else None
        self.register_buffer('noise', noise, persistent=False)
        self.inject = injection.module(c) if injection.module else None
        self.norm_recur = norm(c.norm_loop)
        self.exit_gate = nn.Linear(c.n_embd, 1) if c.exit_gate else None
        self.lm_head = nn.Linear(c.n_embd, c.vocab_size, bias=False)
        if c.tie_weights:
            self.lm_head.weight = self.transformer.wte.weight
        self.rope_width = c.n_embd // c.n_head if rotated else 0
        self.window = c.window_size or c.block_size // 2
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """Every parameter by one rule: norms 1, biases 0, the others as INIT says for their part; noise."""
        rules = INIT[self.config.init](self.config.n_embd, self.config.depth)
        for name, p in self.named_parameters():
            part = name.split('.')[-2:][0]
            if name.endswith('bias'):
                nn.init.zeros_(p)
            elif p.dim() == 1:
                nn.init.ones_(p)
            else:
                rules.get(part, rules['rest'])(p)
                if part == 'c_fc' and 'up' in rules and ACT[self.config.mlp][1] == 2:
                    rules['up'](p.chunk(2)[1])
        fixed = dict(device='cpu', dtype=torch.float32, generator=torch.Generator('cpu').manual_seed(0))
        for row in () if self.noise is None else self.noise:  # whatever block_size, device and dtype are
            row.copy_(torch.randn(self.config.n_embd, **fixed))

    def blocks(self):
        """Every block once, in the order of first use."""
        return (*self.transformer.prelude, *self.transformer.recur, *self.transformer.coda)

    def run(self, blocks, x, context, s=None, slots=None):
        """x (B, T, C) through blocks; s, what they get of the loop's state, goes to those that take it.

        slots: a function (k, v) -> (k, v) for every block, which keeps keys and values and adds earlier ones.
        """
        for block, slot in zip(blocks, slots or itertools.repeat(None), strict=False):
            mask = context.narrow if block.windowed else context.full
            x = block(x, context.rope, mask, s if block.take else None, slot)
        return x

    def context(self, pos):
        """The Context of whole sequences with positions pos (T,); None for masks that hide nothing."""
        rope = rotary(pos, self.rope_width, self.config.rope_base) if self.rope_width else None
        last, windowed = len(pos) - 1, any(block.windowed for block in self.blocks())
        full = band(pos, self.config.block_size - 1) if last >= self.config.block_size else None
        window = min(self.window, self.config.block_size - 1)
        return Context(rope, full, band(pos, window) if windowed and last > window else full)

    def embed(self, idx, pos):
        """(B, T, C), what enters the prelude, of tokens idx (B, T) at positions pos (T,) or (B, T)."""
        x = self.config.emb_scale * self.transformer.wte(idx)
        if self.transformer.wpe is not None:
            x = x + self.transformer.wpe(pos)
        return self.transformer.drop(self.transformer.norm_emb(x))

    def iterate(self, e, s, context, slots=None):
        """The loop's next state, (B, T, C). s: the last one; None before the first, of state_init none."""
        u, fed = e if s is None else self.injection.enter(self, e, s), self.injection.feed(self, s)
        return self.norm_recur(self.run(self.transformer.recur, u, context, fed, slots))

    def states(self, idx, n_loop=None, rows=(-1,)):
        """The loop's state after the iterations in rows (-1 = last): R tensors (B, T, C), and run's context.

        idx: (B, T) token ids. Beyond block_size a layer sees the last block_size keys; raises ValueError for
        learned positions, which end there.
        """
        c, T = self.config, idx.size(1)
        n_loop = c.n_loop if n_loop is None else n_loop
        check(isinstance(n_loop, int) and n_loop >= 1, 'n_loop', n_loop, 'an int, at least 1')
        there = len(rows) and all(-n_loop <= row < n_loop for row in rows)
        check(there, 'rows', rows, f'iterations of n_loop={n_loop}')
        fits = T <= c.block_size or self.transformer.wpe is None
        check(fits, 'length', T, f'at most block_size={c.block_size} tokens')
        pos = torch.arange(T, device=idx.device)
        context = self.context(pos)
        e = self.run(self.transformer.prelude, self.embed(idx, pos), context)
        s, read = self.start(self, e, pos), {}
        first = max(0, n_loop - (c.bptt_k or n_loop))  # iterations before this one record no graph
        reached = not (torch.is_grad_enabled() and self.training and self.injection.alone and first)
        check(reached, 'n_loop', n_loop, f'at most bptt_k={c.bptt_k}: the prelude would get no gradient')
        for i in range(n_loop):
            with torch.set_grad_enabled(torch.is_grad_enabled() and i >= first):
                s = hold(c.recompute, self.iterate, e, s, context)
            if i in rows or i - n_loop in rows:
                read[i] = s
        return [read[row % n_loop] for row in rows], context

    def readout(self, s, context, slots=None):
        """What the head reads, (B, T, C), of a state s (B, T, C)."""
        return self.transformer.ln_f(self.run(self.transformer.coda, s, context, slots=slots))

    def logits(self, x):
        """(..., V) of what the head reads, x (..., C)."""
        logits, cap = self.lm_head(x), self.config.softcap
        return logits if cap is None else cap * torch.tanh(upcast(logits) / cap)

    def halt(self, s):
        """The gate's probability (B, T) to stop after the iteration that left s (B, T, C)."""
        gate = self.exit_gate  # no matrix product: under autocast that would be in the low precision
        return torch.sigmoid((upcast(s) * gate.weight[0]).sum(-1) + gate.bias)

    def nll(self, x, targets):
        """-log p of targets (N,), -1 = ignored, given what the head reads, x (N, C): (N,)."""
        return F.cross_entropy(upcast(self.logits(x)), targets, ignore_index=-1, reduction='none')

    def cross_entropy(self, s, targets, context, again=False):
        """-log p of targets (B, T) read out of s (B, T, C): (B, T), 0 where a target is -1.

        Holds a chunk of HEAD_CHUNK logits at most: chunks are computed again in the backward pass. again: so
        are the coda and a single chunk.
        """
        x, y = hold(again, self.readout, s, context).flatten(0, 1), targets.flatten()
        n = max(1, HEAD_CHUNK // self.config.vocab_size)
        chunks = zip(x.split(n), y.split(n), strict=True)
        return torch.cat([hold(again or len(y) > n, self.nll, *chunk) for chunk in chunks]).view_as(targets)

    def table(self, idx, targets, n_loop=None, rows=(-1,)):
        """The loss table: the cross-entropy of every token, read out after each of the iterations in rows.

        idx, targets: (B, T), -1 = ignored. Returns ce (R, B, T), differentiable and 0 where ignored, and
        the exit gate's probabilities (R, B, T) or None. Of several rows each keeps its state and what the
        head reads: the rest is computed again in the backward pass. Under autocast use cache_enabled=False:
        gradients of chunks and rows would be summed in the low precision.
        """
        states, context = self.states(idx, n_loop, rows)
        ce = torch.stack([self.cross_entropy(s, targets, context, len(rows) > 1) for s in states])
        return ce, torch.stack([self.halt(s) for s in states]) if self.exit_gate else None

    def forward(self, idx, targets=None, n_loop=None):
        """(logits, loss) as in nanoGPT, of the last iteration. idx, targets: (B, T), -1 = ignored.

        With targets: the logits of all positions, (B, T, V), and the mean loss; without: those of the last
        position, (B, 1, V), and None.
        """
        (s,), context = self.states(idx, n_loop)
        x = self.readout(s, context)
        if targets is None:
            return self.logits(x[:, -1:]), None
        logits = self.logits(x)
        return logits, F.cross_entropy(upcast(logits).flatten(0, 1), targets.flatten(), ignore_index=-1)

    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, **options):
        """idx (B, T) continued by max_new_tokens tokens; options: as of generate.py's stream, but lengths."""
        from nanoloop.generate import stream

        check('lengths' not in options, 'lengths', options.get('lengths'), 'none: see stream')
        tokens = stream(self, idx, max_new_tokens, temperature, top_k, **options)
        return torch.cat((idx, *(token[:, None] for token in tokens)), dim=1)

    def get_num_params(self):
        """Parameters, shared ones once, position embeddings (which nanoGPT leaves out) included."""
        return sum(p.numel() for p in self.parameters())
