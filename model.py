"""
A looped (depth-recurrent) GPT in one file: a few layers are applied many times with the same weights.

    e = prelude(embed(idx))                    n_prelude blocks, once
    s = STATE[state_init](e)                   where the loop starts
    repeat n_loop times:
        u = INJECT[input_injection](e, s)      how the input enters every iteration
        s = norm_recur(recur(u))               n_block blocks, their weights shared by all iterations
    logits = lm_head(ln_f(coda(s)))            n_coda blocks, once

Only the last bptt_k iterations record a graph. Without prelude, coda and loop (n_loop 1) this is a plain GPT, GPT-2 included.

References: GPT-2 by way of nanoGPT, github.com/karpathy/nanoGPT; nanoLOOP, github.com/LoopedLMs/nanoLOOP;
recurrent depth, arXiv:2502.05171; RMSNorm, arXiv:1910.07467; RoPE, arXiv:2104.09864.

Shapes: B sequences, T positions, C = n_embd, H heads, D = C / H, V = vocab_size, R rows (loops that are read out).
"""

import math
import pickle
from dataclasses import asdict, dataclass, fields
from typing import get_args, get_type_hints

import torch
import torch.nn as nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint as recompute

HEAD_CHUNK = 2**25  # logits alive at a time (128 MiB in float32): more tokens are read out in chunks

# -----------------------------------------------------------------------------
# parts of a block

NORM = {
    'layernorm': lambda c, width: nn.LayerNorm(width, eps=c.norm_eps or 1e-5, bias=c.bias),
    'rmsnorm': lambda c, width: nn.RMSNorm(width, eps=c.norm_eps or 1e-6),
}
POS = {  # (is a learned embedding added, are q and k rotated)
    'learned': (True, False),
    'rope': (False, True),
}
MLP = {'gelu': lambda: nn.GELU(), 'gelu_tanh': lambda: nn.GELU('tanh')}  # GPT-2's weights want gelu_tanh


def rotary(pos, width, base):
    """Cosines and sines, each (T, width / 2), of the rotary embedding at positions pos (T,); always in float32."""
    angle = pos[:, None] * base ** (-torch.arange(0, width, 2, device=pos.device, dtype=torch.float32) / width)
    return angle.cos(), angle.sin()


def rotate(x, rope):
    """Rotates the two halves of each head of x (B, H, T, D) by plus the position. Keeps x's dtype."""
    cos, sin = rope
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


def attend(q, k, v, dropout):
    """Causal softmax attention, q, k, v and result (B, H, T, D)."""
    T, D = q.shape[-2:]
    if q.device.type == 'cpu' and T <= 256:  # the CPU's flash kernel doubles a training step at T = 64 (2 cores, bfloat16)
        hidden = torch.ones(T, T, dtype=torch.bool, device=q.device).triu(1)
        p = (q @ k.transpose(-2, -1) / math.sqrt(D)).masked_fill(hidden, -math.inf).softmax(dim=-1)
        return F.dropout(p, dropout).to(v.dtype) @ v
    return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)


class CausalSelfAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        width = config.n_embd // config.n_head
        self.n_head = config.n_head
        self.dropout = config.dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)  # the rows of q, of k, of v
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        rmsnorm = nn.RMSNorm(width, eps=config.norm_eps or 1e-6, elementwise_affine=False)
        self.qk_norm = rmsnorm if config.qk_norm else nn.Identity()
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(self, x, rope=None):
        B, T, C = x.shape
        q, k, v = (y.view(B, T, self.n_head, -1).transpose(1, 2) for y in self.c_attn(x).chunk(3, dim=-1))  # (B, H, T, D)
        if rope is not None:
            q, k = rotate(q, rope), rotate(k, rope)
        y = attend(self.qk_norm(q), self.qk_norm(k), v, self.dropout if self.training else 0.0)
        return self.resid_dropout(self.c_proj(y.transpose(1, 2).reshape(B, T, C)))


class FeedForward(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.act = MLP[config.mlp]()
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):
        return self.dropout(self.c_proj(self.act(self.c_fc(x))))


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln_1 = NORM[config.norm](config, config.n_embd)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = NORM[config.norm](config, config.n_embd)
        self.mlp = FeedForward(config)

    def forward(self, x, rope=None):
        x = x + self.attn(self.ln_1(x), rope)
        return x + self.mlp(self.ln_2(x))


# -----------------------------------------------------------------------------
# how the loop starts, and how the input enters it


class Same(nn.Module):
    """Starts at the prelude's output: s_0 = e."""

    def __init__(self, config):
        super().__init__()

    def forward(self, e):
        return e


class Zero(Same):
    """Starts at s_0 = 0."""

    def forward(self, e):
        return torch.zeros_like(e)


class Noise(Same):
    """Starts at s_0 ~ N(0, state_std^2): in training fresh from the default generator, else a fixed table read by position,
    so that evaluation repeats and a row never depends on its batch."""

    def __init__(self, config):
        super().__init__(config)
        self.std = config.n_embd**-0.5 if config.state_std is None else config.state_std
        table = torch.randn(config.block_size, config.n_embd, device='cpu', generator=torch.Generator('cpu').manual_seed(0))
        self.register_buffer('table', table, persistent=False)

    def forward(self, e):
        noise = torch.randn_like(e) if self.training else self.table[: e.size(1)].to(e.dtype).expand_as(e)
        return self.std * noise


class Passthrough(Same):
    """No injection: u = s."""

    def forward(self, e, s):
        return s


class Concat(nn.Linear):
    """u = W [e; s], the first half of W's columns for e, the second for s."""

    def __init__(self, config):
        super().__init__(2 * config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, e, s):
        return super().forward(torch.cat((e, s), dim=-1)).to(e.dtype)  # autocast must not make the stream bfloat16


STATE = {'prelude': Same, 'zero': Zero, 'random': Noise}
INJECT = {'passthrough': Passthrough, 'inject': Concat}
STATES_OF = {'passthrough': ('prelude',), 'inject': ('prelude', 'random', 'zero')}  # what each injection can start from

# -----------------------------------------------------------------------------
# the configuration


@dataclass
class GPTConfig:
    block_size: int = 1024  # context length, tokens
    vocab_size: int = 50304  # GPT-2's 50257 padded to a multiple of 64 for speed; a data set's own size replaces it
    n_head: int = 12  # attention heads
    n_embd: int = 768  # width
    dropout: float = 0.0  # 0 for pretraining, 0.1 and more for small data
    bias: bool = False  # biases in Linear and LayerNorm, as in GPT-2
    n_prelude: int = 2  # layers before the loop
    n_block: int = 2  # layers inside the loop
    n_coda: int = 2  # layers after the loop
    n_loop: int = 4  # iterations of the loop
    bptt_k: int | None = None  # only the last bptt_k iterations carry gradient; None = all
    input_injection: str = 'inject'  # inject: u = W[e; s], passthrough: u = s; inject_random = inject + state_init random
    state_init: str = 'prelude'  # the loop starts from prelude: s = e, random: N(0, state_std^2), zero
    state_std: float | None = None  # of state_init random; None = n_embd^-0.5
    norm: str = 'rmsnorm'  # rmsnorm or layernorm
    norm_eps: float | None = None  # None = 1e-5 for layernorm, 1e-6 for rmsnorm
    norm_emb: bool = False  # a norm after the embedding
    norm_loop: bool = True  # a norm at the end of each iteration
    norm_final: bool = True  # a norm before the head
    pos: str = 'learned'  # positions: learned (added to the embedding) or rope (q and k rotated)
    rope_base: float = 10000.0  # of pos rope
    qk_norm: bool = False  # RMSNorm without weight on q and k
    mlp: str = 'gelu'  # gelu or gelu_tanh, hidden width 4 n_embd

    def __post_init__(self):
        """Raises ValueError for a value of the wrong type or outside its table, and for combinations without meaning."""
        typed_fields(self)
        if self.input_injection == 'inject_random':  # nanoLOOP's name
            self.input_injection, self.state_init = 'inject', 'random'
        for key, table in dict(input_injection=INJECT, state_init=STATE, norm=NORM, pos=POS, mlp=MLP).items():
            check(getattr(self, key) in table, key, getattr(self, key), f'one of {", ".join(table)}')
        for key in ('block_size', 'vocab_size', 'n_head', 'n_embd', 'n_block', 'n_loop'):
            check(getattr(self, key) >= 1, key, getattr(self, key), 'at least 1')
        for key in ('n_prelude', 'n_coda'):
            check(getattr(self, key) >= 0, key, getattr(self, key), 'at least 0')
        for key in ('norm_eps', 'state_std', 'rope_base'):
            check(getattr(self, key) is None or 0 < getattr(self, key) < math.inf, key, getattr(self, key), 'above 0')
        check(0 <= self.dropout < 1, 'dropout', self.dropout, 'at least 0 and below 1')
        check(self.bptt_k is None or self.bptt_k >= 1, 'bptt_k', self.bptt_k, 'at least 1, or None for all iterations')
        check(self.n_embd % self.n_head == 0, 'n_head', self.n_head, f'a divisor of n_embd={self.n_embd}')
        D = self.n_embd // self.n_head
        check(self.pos != 'rope' or D % 2 == 0, 'pos', self.pos, f'learned, since rope rotates pairs and a head is {D} wide')
        states = STATES_OF[self.input_injection]
        check(self.state_init in states, 'state_init', self.state_init, f'{" or ".join(states)} with {self.input_injection}')
        check(
            self.state_std is None or self.state_init == 'random',
            *('state_std', self.state_std, f'None with state_init={self.state_init!r}, only random draws noise'),
        )
        check(
            self.pos == 'rope' or self.rope_base == GPTConfig.rope_base,
            *('rope_base', self.rope_base, f'left out with pos={self.pos!r}, only rope rotates'),
        )
        check(
            self.input_injection != 'passthrough' or self.bptt_k is None or self.bptt_k >= self.n_loop,
            *('bptt_k', self.bptt_k, f'None or at least n_loop={self.n_loop}: passthrough would leave the prelude untrained'),
        )

    @property
    def depth(self):
        """Executed layers."""
        return self.n_prelude + self.n_block * self.n_loop + self.n_coda


def check(holds, key, got, wanted):
    if not holds:
        raise ValueError(f'{key}={got!r}, expected {wanted}')


def typed(key, value, hint):
    """value as what key's annotation says, 1 promoted to a float and 1e3 to an int. Raises ValueError if it is neither."""
    accepted = get_args(hint) or (hint,)  # int | None has two, int has none
    if type(value) in accepted:
        return value
    if float in accepted and type(value) is int:
        return float(value)
    if int in accepted and type(value) is float and value.is_integer():
        return int(value)
    raise ValueError(f'{key}={value!r}, expected {" or ".join(kind.__name__.replace("NoneType", "None") for kind in accepted)}')


def typed_fields(config):
    """typed for every field of a dataclass object, in place."""
    for key, hint in get_type_hints(type(config)).items():
        setattr(config, key, typed(key, getattr(config, key), hint))


# -----------------------------------------------------------------------------
# the model


class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        learned, rotated = POS[config.pos]
        self.rope_width = config.n_embd // config.n_head if rotated else None
        norm = lambda exists: NORM[config.norm](config, config.n_embd) if exists else nn.Identity()  # noqa: E731
        blocks = lambda n: nn.ModuleList(Block(config) for _ in range(n))  # noqa: E731
        self.transformer = nn.ModuleDict(
            dict(
                wte=nn.Embedding(config.vocab_size, config.n_embd),
                wpe=nn.Embedding(config.block_size, config.n_embd) if learned else None,
                norm_emb=norm(config.norm_emb),
                drop=nn.Dropout(config.dropout),
                prelude=blocks(config.n_prelude),
                recur=blocks(config.n_block),
                coda=blocks(config.n_coda),
                ln_f=norm(config.norm_final),
            )
        )
        self.state = STATE[config.state_init](config)
        self.inject = INJECT[config.input_injection](config)
        self.norm_recur = norm(config.norm_loop)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.lm_head.weight = self.transformer.wte.weight
        self.init_weights()

    def init_weights(self):
        """GPT-2's rule, residual projections scaled by the depth that is executed; the injection starts as u = e."""
        for name, p in self.named_parameters():
            if name.endswith('c_proj.weight'):
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * self.config.depth))
            elif name == 'inject.weight':
                nn.init.eye_(p)  # (C, 2C): [I 0]
            elif name.endswith('bias'):
                nn.init.zeros_(p)
            elif p.dim() == 1:  # norms
                nn.init.ones_(p)
            else:
                nn.init.normal_(p, std=0.02)

    def blocks(self):
        """Every block once, in the order of its first use."""
        return (*self.transformer.prelude, *self.transformer.recur, *self.transformer.coda)

    def states(self, idx, n_loop=None, rows=(-1,)):
        """The loop's state after each of the iterations named in rows (negative: from the end), with the rotary tables.

        idx: (B, T) token ids. Returns a list of R tensors (B, T, C) and rope. Raises ValueError for T > block_size.
        """
        n_loop = self.config.n_loop if n_loop is None else n_loop
        check(isinstance(n_loop, int) and n_loop >= 1, 'n_loop', n_loop, 'at least 1')
        check(all(-n_loop <= row < n_loop for row in rows), 'rows', rows, f'iterations of n_loop={n_loop}')
        T = idx.size(1)
        check(T <= self.config.block_size, 'length', T, f'at most block_size={self.config.block_size} tokens')
        pos = torch.arange(T, device=idx.device)
        rope = rotary(pos, self.rope_width, self.config.rope_base) if self.rope_width else None
        x = self.transformer.wte(idx)
        if self.transformer.wpe is not None:
            x = x + self.transformer.wpe(pos)
        e = self.transformer.drop(self.transformer.norm_emb(x))  # (B, T, C)
        for block in self.transformer.prelude:
            e = block(e, rope)
        s, read = self.state(e), dict.fromkeys(row % n_loop for row in rows)
        first = n_loop - (self.config.bptt_k or n_loop)  # iterations before this one record no graph
        for i in range(n_loop):
            with torch.set_grad_enabled(torch.is_grad_enabled() and i >= first):
                u = self.inject(e, s)
                for block in self.transformer.recur:
                    u = block(u, rope)
                s = self.norm_recur(u)
            if i in read:
                read[i] = s
        return [read[row % n_loop] for row in rows], rope

    def readout(self, s, rope):
        """What the head reads, (B, T, C), of a loop state s (B, T, C)."""
        for block in self.transformer.coda:
            s = block(s, rope)
        return self.transformer.ln_f(s)

    def cross_entropy(self, x, targets):
        """-log p of the targets given what the head reads: x (N, C), targets (N,) -> (N,) float32, 0 where a target is -1."""
        logits = self.lm_head(x)
        return F.cross_entropy(upcast(logits), targets, ignore_index=-1, reduction='none')

    def table(self, idx, targets, n_loop=None, rows=(-1,)):
        """The loss table: the cross-entropy of every token, read out after each of the iterations in rows.

        idx, targets: (B, T), -1 = ignored. Returns ce (R, B, T), differentiable, 0 where ignored, and gates (None: no exit gate).
        Never holds more than HEAD_CHUNK logits: beyond that each chunk is computed again in the backward pass. Under autocast
        give cache_enabled=False, or the head's gradient is summed over the chunks in the low precision.
        """
        states, rope = self.states(idx, n_loop, rows)
        tokens = max(1, HEAD_CHUNK // self.config.vocab_size)
        ce = []
        for s in states:
            chunks = list(zip(self.readout(s, rope).flatten(0, 1).split(tokens), targets.flatten().split(tokens)))
            if len(chunks) == 1:
                ce.append(self.cross_entropy(*chunks[0]))
            else:
                ce.append(torch.cat([recompute(self.cross_entropy, *chunk, use_reentrant=False) for chunk in chunks]))
        return torch.stack(ce).view(len(rows), *targets.shape), None

    def forward(self, idx, targets=None, n_loop=None):
        """nanoGPT's call. idx, targets: (B, T), -1 = ignored. Returns the logits after the last iteration, (B, T, V), and
        their mean loss; without targets the logits of the last position only, (B, 1, V), and None."""
        (s,), rope = self.states(idx, n_loop)
        x = self.readout(s, rope)
        if targets is None:
            return self.lm_head(x[:, [-1]]), None
        logits = self.lm_head(x)
        return logits, F.cross_entropy(upcast(logits).flatten(0, 1), targets.flatten(), ignore_index=-1)

    @torch.no_grad()
    def stream(self, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=None, n_loop=None, generator=None):
        """Yields max_new_tokens times the next token of every row of idx (B, T), as (B,). The window is the last block_size.

        temperature 0 takes the most likely token; top_k and top_p keep the k most likely and the smallest set that holds a
        share p of the probability. generator: on idx's device; the default one if None.
        """
        for _ in range(max_new_tokens):
            logits = upcast(self(idx[:, -self.config.block_size :], n_loop=n_loop)[0][:, -1])  # (B, V)
            token = choose(logits, temperature, top_k, top_p, generator)
            idx = torch.cat((idx, token[:, None]), dim=1)
            yield token

    def generate(self, idx, max_new_tokens, **options):
        """idx (B, T) with max_new_tokens more tokens in every row, (B, T + max_new_tokens); options as in stream."""
        return torch.cat((idx, *(token[:, None] for token in self.stream(idx, max_new_tokens, **options))), dim=1)

    def num_params(self):
        """Parameters, shared ones counted once; nanoGPT's figure leaves the position embedding out, this one does not."""
        return sum(p.numel() for p in self.parameters())

    def flops(self, n_loop=None):
        """(forward, training) FLOPs per token at T = block_size: 2 per weight of a matrix product, 4 C T for attention, and
        twice that again in the backward pass for every layer that carries gradient, which the last bptt_k iterations do."""
        n_loop = n_loop or self.config.n_loop
        carried = min(n_loop, self.config.bptt_k or n_loop)
        attention = 4 * self.config.n_embd * self.config.block_size

        def section(*modules):
            parts = [part for module in modules for part in module.modules()]
            weights = sum(part.weight.numel() for part in parts if isinstance(part, nn.Linear))
            return 2 * weights + attention * sum(isinstance(part, CausalSelfAttention) for part in parts)

        once = section(self.transformer.prelude, self.transformer.coda, self.lm_head)
        loop = section(self.transformer.recur, self.inject)
        return once + n_loop * loop, 3 * once + (n_loop + 2 * carried) * loop


def upcast(x):
    """At least float32: losses and probabilities are never taken in a low precision, and a double model stays double."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def choose(logits, temperature, top_k, top_p, generator):
    """Draws one token per row of logits (B, V); see GPT.stream."""
    if temperature == 0:
        return logits.argmax(dim=-1)
    logits = logits / temperature
    if top_k is not None:
        least = logits.topk(min(top_k, logits.size(-1))).values[:, [-1]]
        logits = logits.masked_fill(logits < least, -math.inf)
    if top_p is not None:
        ordered, place = logits.softmax(dim=-1).sort(dim=-1, descending=True)
        beyond = ordered.cumsum(dim=-1) - ordered >= top_p  # the share before a token: the first one always stays
        logits = logits.masked_fill(beyond.scatter(-1, place, beyond), -math.inf)
    return torch.multinomial(logits.softmax(dim=-1), 1, generator=generator)[:, 0]


# -----------------------------------------------------------------------------
# checkpoints

UNREADABLE = (RuntimeError, OSError, EOFError, pickle.UnpicklingError)  # what torch.load raises on a file that was cut
RUNTIME_KEYS = ('dropout', 'bptt_k', 'n_loop', 'state_init', 'state_std', 'rope_base', 'block_size')  # may differ from the file's


def read_checkpoint(path):
    """The checkpoint's dict on the CPU, mapped, not read. Never executes code. Raises ValueError if it does not load."""
    try:
        checkpoint = torch.load(path, map_location='cpu', mmap=True, weights_only=True)
    except FileNotFoundError:
        raise ValueError(f'there is no checkpoint {path}') from None
    except UNREADABLE as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f'the checkpoint {path} cannot be read: {reason[:200]}') from None
    check('model' in checkpoint and 'model_args' in checkpoint, 'path', str(path), 'a checkpoint with model and model_args')
    return checkpoint


def load_checkpoint(path, device='cpu', **changes):
    """(GPT, checkpoint) from a file of nanoLOOP's train.py here, of nanoGPT, or of the original nanoLOOP.

    changes: GPTConfig values to use instead of the file's, where the weights allow it. Raises ValueError otherwise.
    """
    checkpoint = path if isinstance(path, dict) else read_checkpoint(path)
    weights = {name.removeprefix('_orig_mod.').removeprefix('module.'): w for name, w in checkpoint['model'].items()}
    args = {key: value for key, value in checkpoint['model_args'].items()}
    if 'n_layer' in args:  # nanoGPT
        args = dict(args, n_prelude=0, n_block=args.pop('n_layer'), n_coda=0, n_loop=1, input_injection='passthrough')
        args.update(norm='layernorm', norm_loop=False)
        weights = {name.replace('transformer.h.', 'transformer.recur.'): w for name, w in weights.items()}
        weights = {name: w for name, w in weights.items() if not name.endswith('.attn.bias')}  # old causal masks
    elif 'norm' not in args:  # nanoLOOP leaves RMSNorm's eps to torch: float32's machine epsilon
        args.update(norm='rmsnorm', norm_eps=torch.finfo(torch.float32).eps)
    config = GPTConfig(**args)
    changed = GPTConfig(**dict(asdict(config), **changes))
    for key, value in asdict(changed).items():
        same = getattr(config, key) == value or key in RUNTIME_KEYS
        check(same, key, value, f'{getattr(config, key)!r} as in the checkpoint')
    model = GPT(changed)
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(f'the checkpoint does not fit its model_args: {str(error).splitlines()[1].strip()}') from None
    return model.to(device), checkpoint
