"""
A looped (depth-recurrent) GPT in one file: a few layers are applied many times with the same weights.

    e = prelude(embed(idx))                    n_prelude blocks, once
    s = STATE[state_init](e)                   where the loop starts
    repeat n_loop times:
        u = INJECT[input_injection](e, s)      how the input enters every iteration
        s = norm_recur(recur(u))               n_block blocks, their weights shared by all iterations
    logits = lm_head(ln_f(coda(s)))            n_coda blocks, once

Only the last bptt_k iterations record a graph. With n_prelude = n_coda = 0 and n_loop = 1 it is a plain GPT.

References: GPT-2 as in nanoGPT, github.com/karpathy/nanoGPT; nanoLOOP, github.com/LoopedLMs/nanoLOOP;
recurrent depth, arXiv:2502.05171; RMSNorm, arXiv:1910.07467; RoPE, arXiv:2104.09864.

Shapes: B sequences, T positions, C = n_embd, H heads, D = C / H, V = vocab_size, R rows (loops read out).
"""

import math
import pickle
from dataclasses import asdict, dataclass
from typing import get_args, get_type_hints

import torch
import torch.nn as nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint as recompute

HEAD_CHUNK = 2**25  # logits alive at a time, 128 MiB in float32: more tokens are read out in chunks

# -----------------------------------------------------------------------------
# a block

# fmt: off
NORM = {
    'layernorm': lambda c, width: nn.LayerNorm(width, eps=c.norm_eps or 1e-5, bias=c.bias),
    'rmsnorm': lambda c, width: nn.RMSNorm(width, eps=c.norm_eps or 1e-6),
}
POS = {'learned': (True, False), 'rope': (False, True)}  # (an embedding is added, q and k are rotated)
MLP = {'gelu': lambda: nn.GELU(), 'gelu_tanh': lambda: nn.GELU('tanh')}  # GPT-2's weights want gelu_tanh
# fmt: on


def rotary(pos, width, base):
    """Cosines and sines (T, width / 2) of the rotary embedding at positions pos (T,), always in float32."""
    freq = base ** (-torch.arange(0, width, 2, device=pos.device, dtype=torch.float32) / width)
    angle = pos[:, None] * freq
    return angle.cos(), angle.sin()


def rotate(x, rope):
    """Rotates the two halves of each head of x (B, H, T, D) by plus the position; keeps x's dtype."""
    cos, sin = rope
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


def attend(q, k, v, dropout):
    """Causal softmax attention; q, k, v and the result are (B, H, T, D)."""
    if q.device.type == 'cpu' and q.size(-2) <= 256:
        # short: the low precisions' backward takes up to 5 times float32's
        with torch.autocast('cpu', enabled=False):
            q, k, v = upcast(q), upcast(k), upcast(v)
            return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
    return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)


class CausalSelfAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.n_head, self.dropout = config.n_head, config.dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)  # rows of q, of k, of v
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        D, eps = config.n_embd // config.n_head, config.norm_eps or 1e-6
        self.qk_norm = nn.RMSNorm(D, eps, elementwise_affine=False) if config.qk_norm else nn.Identity()
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(self, x, rope=None):
        B, T, C = x.shape
        heads = self.c_attn(x).view(B, T, 3 * self.n_head, -1).transpose(1, 2)
        qk, v = heads.split([2 * self.n_head, self.n_head], dim=1)
        if rope is not None:
            qk = rotate(qk, rope)
        q, k = self.qk_norm(qk).chunk(2, dim=1)
        y = attend(q, k, v, self.dropout if self.training else 0.0)
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
# where the loop starts, s_0 of e, and how the input enters it, u of e and s; all (B, T, C)


class Zero(nn.Identity):
    """s_0 = 0."""

    def forward(self, e):
        return torch.zeros_like(e)


class Noise(nn.Module):
    """s_0 ~ N(0, state_std^2): in training from the default generator, else from one fixed table read by
    position, so that evaluation repeats and a row does not depend on its batch."""

    def __init__(self, config):
        super().__init__()
        self.std = config.n_embd**-0.5 if config.state_std is None else config.state_std
        fixed = torch.Generator('cpu').manual_seed(0)
        table = torch.randn(config.block_size, config.n_embd, device='cpu', generator=fixed)
        self.register_buffer('table', table, persistent=False)

    def forward(self, e):
        noise = torch.randn_like(e) if self.training else self.table[: e.size(1)].to(e.dtype).expand_as(e)
        return self.std * noise


class Passthrough(nn.Identity):
    """u = s."""

    def forward(self, e, s):
        return s


class Concat(nn.Linear):
    """u = W [e; s]; the first half of W's columns is for e."""

    def __init__(self, config):
        super().__init__(2 * config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, e, s):
        return super().forward(torch.cat((e, s), dim=-1)).to(e.dtype)  # autocast must not lower the stream


STATE = {'prelude': nn.Identity, 'random': Noise, 'zero': Zero}
INJECT = {'passthrough': Passthrough, 'inject': Concat}
STATES_OF = {'passthrough': ['prelude'], 'inject': ['prelude', 'random', 'zero']}  # the pairs that make sense

# -----------------------------------------------------------------------------
# the configuration


@dataclass
class GPTConfig:
    # model
    block_size: int = 1024  # context length, tokens
    vocab_size: int = 50304  # replaced by the data's unless given; GPT-2's 50257 padded to a multiple of 64
    n_head: int = 12  # attention heads
    n_embd: int = 768  # width
    dropout: float = 0.0  # 0 for pretraining, 0.1 and more for small data
    bias: bool = False  # biases in Linear and LayerNorm, as in GPT-2
    n_prelude: int = 2  # layers before the loop
    n_block: int = 2  # layers inside the loop
    n_coda: int = 2  # layers after the loop
    n_loop: int = 4  # iterations of the loop
    bptt_k: int | None = None  # only the last bptt_k iterations carry gradient; None = all
    input_injection: str = 'inject'  # inject u = W[e; s], passthrough u = s; inject_random = inject, random
    state_init: str = 'prelude'  # the loop starts from: prelude s = e, random N(0, state_std^2), zero
    state_std: float | None = None  # of state_init random; None = n_embd^-0.5
    norm: str = 'rmsnorm'  # rmsnorm or layernorm
    norm_eps: float | None = None  # None = 1e-5 for layernorm, 1e-6 for rmsnorm
    norm_emb: bool = False  # a norm after the embedding
    norm_loop: bool = True  # a norm at the end of each iteration
    norm_final: bool = True  # a norm before the head
    pos: str = 'learned'  # positions: learned (an embedding) or rope (q and k rotated)
    rope_base: float = 10000.0  # of pos rope
    qk_norm: bool = False  # RMSNorm without weight on q and k
    mlp: str = 'gelu'  # gelu or gelu_tanh; the hidden width is 4 n_embd

    def __post_init__(self):
        """Raises ValueError for a value of the wrong type or outside its table, and for dead ones."""
        check_types(self)
        if self.input_injection == 'inject_random':  # nanoLOOP's name
            self.input_injection, self.state_init = 'inject', 'random'
        for key, table in dict(input_injection=INJECT, state_init=STATE, norm=NORM, pos=POS, mlp=MLP).items():
            check(getattr(self, key) in table, key, getattr(self, key), f'one of {", ".join(table)}')
        check_least(self, 1, 'block_size', 'vocab_size', 'n_head', 'n_embd', 'n_block', 'n_loop', 'bptt_k')
        check_least(self, 0, 'n_prelude', 'n_coda')
        D, states = self.n_embd / self.n_head, STATES_OF[self.input_injection]
        noisy, rotated = self.state_init == 'random', POS[self.pos][1]
        truncated = self.bptt_k is not None and self.bptt_k < self.n_loop
        # fmt: off
        for holds, key, wanted in (
            (0 <= self.dropout < 1, 'dropout', 'at least 0 and below 1'),
            (self.norm_eps is None or 0 < self.norm_eps < 1, 'norm_eps', 'above 0 and below 1'),
            (D == int(D), 'n_head', f'a divisor of n_embd={self.n_embd}'),
            (not rotated or D % 2 == 0, 'pos', f'learned: rope rotates pairs, a head is {D:g} wide'),
            (0 < self.rope_base < math.inf, 'rope_base', 'above 0'),
            (rotated or self.rope_base == GPTConfig.rope_base, 'rope_base', f'none with pos={self.pos!r}'),
            (self.state_init in states, 'state_init', f'{" or ".join(states)} with {self.input_injection}'),
            (self.state_std is None or 0 < self.state_std < math.inf, 'state_std', 'above 0, or None'),
            (self.state_std is None or noisy, 'state_std', f'None with state_init={self.state_init!r}'),
            (self.input_injection != 'passthrough' or not truncated, 'bptt_k',
             f'None or at least n_loop={self.n_loop}: with passthrough the prelude would get no gradient'),
        ):
            check(holds, key, getattr(self, key), wanted)
        # fmt: on

    @property
    def depth(self):
        """Executed layers."""
        return self.n_prelude + self.n_block * self.n_loop + self.n_coda


class Mistake(ValueError):
    """What a user can get wrong: the scripts tell it in one line and end with status 2."""

    alike = True  # every rank makes it, the first one tells it


def check(holds, key, got, wanted):
    if not holds:
        raise Mistake(f'{key}={got!r}, expected {wanted}')


def check_least(config, least, *keys):
    """Raises ValueError for keys below least, or infinite; None passes."""
    for key in keys:
        value = getattr(config, key)
        check(value is None or least <= value < math.inf, key, value, f'at least {least}')


def check_types(config):
    """Makes every field of a dataclass object what its annotation says. Raises ValueError where it is not."""
    for key, hint in get_type_hints(type(config)).items():
        setattr(config, key, typed(key, getattr(config, key), hint))


def typed(key, value, hint):
    """value as the annotated type, 1 promoted to float and 1e3 to int. Raises ValueError if it is neither."""
    accepted = get_args(hint) or (hint,)  # of int | None: both
    if type(value) in accepted:
        return value
    if float in accepted and type(value) is int:
        return float(value)
    if int in accepted and type(value) is float and value.is_integer():
        return int(value)
    names = ' or '.join(kind.__name__.replace('NoneType', 'None') for kind in accepted)
    raise Mistake(f'{key}={value!r}, expected {names}')


# -----------------------------------------------------------------------------
# the model


class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        learned, rotated = POS[config.pos]
        self.rope_width = config.n_embd // config.n_head if rotated else 0

        def norm(exists):
            return NORM[config.norm](config, config.n_embd) if exists else nn.Identity()

        parts = dict(wte=nn.Embedding(config.vocab_size, config.n_embd))
        parts['wpe'] = nn.Embedding(config.block_size, config.n_embd) if learned else None
        parts.update(norm_emb=norm(config.norm_emb), drop=nn.Dropout(config.dropout))
        for name in ('prelude', 'recur', 'coda'):
            n = config.n_block if name == 'recur' else getattr(config, f'n_{name}')
            parts[name] = nn.ModuleList(Block(config) for _ in range(n))
        self.transformer = nn.ModuleDict(dict(parts, ln_f=norm(config.norm_final)))
        self.state = STATE[config.state_init](config)
        self.inject = INJECT[config.input_injection](config)
        self.norm_recur = norm(config.norm_loop)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.lm_head.weight = self.transformer.wte.weight
        self.init_weights()

    def init_weights(self):
        """GPT-2's rule, residual projections scaled by the layers executed; the injection starts as u = e."""
        for name, p in self.named_parameters():
            if name.endswith('c_proj.weight'):
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * self.config.depth))
            elif name == 'inject.weight':
                nn.init.eye_(p)  # [I 0]
            elif name.endswith('bias'):
                nn.init.zeros_(p)
            elif p.dim() == 1:  # of a norm
                nn.init.ones_(p)
            else:
                nn.init.normal_(p, std=0.02)

    def blocks(self):
        """Every block once, in the order of first use."""
        return (*self.transformer.prelude, *self.transformer.recur, *self.transformer.coda)

    def states(self, idx, n_loop=None, rows=(-1,)):
        """The loop's state after the iterations in rows (-1 is the last): R tensors (B, T, C), and rope.

        idx: (B, T) token ids. Raises ValueError for T > block_size.
        """
        n_loop = self.config.n_loop if n_loop is None else n_loop
        T, longest = idx.size(1), self.config.block_size
        check(isinstance(n_loop, int) and n_loop >= 1, 'n_loop', n_loop, 'at least 1')
        check(all(-n_loop <= row < n_loop for row in rows), 'rows', rows, f'iterations of n_loop={n_loop}')
        check(T <= longest, 'length', T, f'at most block_size={longest} tokens')
        pos = torch.arange(T, device=idx.device)
        rope = rotary(pos, self.rope_width, self.config.rope_base) if self.rope_width else None
        x = self.transformer.wte(idx)
        if self.transformer.wpe is not None:
            x = x + self.transformer.wpe(pos)
        e = self.transformer.drop(self.transformer.norm_emb(x))
        for block in self.transformer.prelude:
            e = block(e, rope)
        s, read = self.state(e), {}
        first = n_loop - (self.config.bptt_k or n_loop)  # iterations before this one record no graph
        for i in range(n_loop):
            with torch.set_grad_enabled(torch.is_grad_enabled() and i >= first):
                u = self.inject(e, s)
                for block in self.transformer.recur:
                    u = block(u, rope)
                s = self.norm_recur(u)
            if i in rows or i - n_loop in rows:
                read[i] = s
        return [read[row % n_loop] for row in rows], rope

    def readout(self, s, rope):
        """What the head reads, (B, T, C), of a state s (B, T, C)."""
        for block in self.transformer.coda:
            s = block(s, rope)
        return self.transformer.ln_f(s)

    def cross_entropy(self, x, targets):
        """-log p of targets (N,) given what the head reads, x (N, C): (N,), 0 where a target is -1."""
        return F.cross_entropy(upcast(self.lm_head(x)), targets, ignore_index=-1, reduction='none')

    def table(self, idx, targets, n_loop=None, rows=(-1,)):
        """The loss table: the cross-entropy of every token, read out after each of the iterations in rows.

        idx, targets: (B, T), -1 = ignored. Returns ce (R, B, T), differentiable and 0 where ignored, and
        gates (None: no exit gate). Never holds more than HEAD_CHUNK logits: chunks are computed again in the
        backward pass. Under autocast use cache_enabled=False, or gradients are summed in the low precision.
        """
        states, rope = self.states(idx, n_loop, rows)
        n, ce = max(1, HEAD_CHUNK // self.config.vocab_size), []
        for s in states:
            x, y = self.readout(s, rope).flatten(0, 1), targets.flatten()
            if len(y) <= n:
                ce.append(self.cross_entropy(x, y))
            else:
                chunks = zip(x.split(n), y.split(n), strict=True)
                ce.append(torch.cat([recompute(self.cross_entropy, *c, use_reentrant=False) for c in chunks]))
        return torch.stack(ce).view(len(rows), *targets.shape), None

    def forward(self, idx, targets=None, n_loop=None):
        """(logits, loss) as in nanoGPT, of the last iteration. idx, targets: (B, T), -1 = ignored.

        With targets: the logits of all positions, (B, T, V), and the mean loss; without: those of the last
        position, (B, 1, V), and None.
        """
        (s,), rope = self.states(idx, n_loop)
        x = self.readout(s, rope)
        if targets is None:
            return self.lm_head(x[:, [-1]]), None
        logits = self.lm_head(x)
        return logits, F.cross_entropy(upcast(logits).flatten(0, 1), targets.flatten(), ignore_index=-1)

    @torch.no_grad()
    def stream(
        self, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=None, n_loop=None, generator=None
    ):
        """Yields the next token of every row of idx (B, T), as (B,), max_new_tokens times.

        Sees the last block_size tokens. temperature 0 takes the most likely token; top_k keeps the k most
        likely, top_p the fewest that make up that share of the probability. generator: on idx's device.
        """
        for _ in range(max_new_tokens):
            logits, _ = self(idx[:, -self.config.block_size :], n_loop=n_loop)
            token = choose(upcast(logits[:, -1]), temperature, top_k, top_p, generator)
            idx = torch.cat((idx, token[:, None]), dim=1)
            yield token

    def generate(self, idx, max_new_tokens, **options):
        """idx (B, T) continued by max_new_tokens tokens; options: as of stream."""
        tokens = [token[:, None] for token in self.stream(idx, max_new_tokens, **options)]
        return torch.cat((idx, *tokens), dim=1)

    def num_params(self):
        """Parameters, shared ones once, position embeddings (which nanoGPT leaves out) included."""
        return sum(p.numel() for p in self.parameters())

    def flops(self, n_loop=None):
        """(forward, training) FLOPs per token at T = block_size: 2 per weight of a matrix product, 4 T C per
        attention; twice that backward, which in the loop only the last bptt_k iterations have."""
        n_loop = n_loop or self.config.n_loop
        carried = min(n_loop, self.config.bptt_k or n_loop)

        def cost(*sections):
            parts = [part for section in sections for part in section.modules()]
            weights = sum(part.weight.numel() for part in parts if isinstance(part, nn.Linear))
            layers = sum(isinstance(part, CausalSelfAttention) for part in parts)
            return 2 * weights + 4 * layers * self.config.block_size * self.config.n_embd

        once = cost(self.transformer.prelude, self.transformer.coda, self.lm_head)
        loop = cost(self.transformer.recur, self.inject)
        return once + n_loop * loop, 3 * once + (n_loop + 2 * carried) * loop


def upcast(x):
    """x in float32 at least: no loss or probability is taken in a low precision, and double stays double."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def choose(logits, temperature, top_k, top_p, generator):
    """One token per row of logits (B, V), as (B,); see GPT.stream."""
    if temperature == 0:
        return logits.argmax(dim=-1)
    logits = logits / temperature
    if top_k is not None:
        least = logits.topk(min(top_k, logits.size(-1))).values[:, [-1]]
        logits = logits.masked_fill(logits < least, -math.inf)
    if top_p is not None:
        p, place = logits.softmax(dim=-1).sort(dim=-1, descending=True)
        beyond = p.cumsum(dim=-1) - p >= top_p  # the share of the more likely: the first token always stays
        logits = logits.masked_fill(beyond.scatter(-1, place, beyond), -math.inf)
    return torch.multinomial(logits.softmax(dim=-1), 1, generator=generator)[:, 0]


# -----------------------------------------------------------------------------
# checkpoints

# what a run may change while the weights keep their meaning
FREE = ('dropout', 'bptt_k', 'n_loop', 'state_init', 'state_std', 'rope_base', 'block_size')


def read_checkpoint(path):
    """The dict of a checkpoint, on the CPU, mapped. Runs no code. Raises ValueError if it is broken."""
    try:
        checkpoint = torch.load(path, map_location='cpu', mmap=True, weights_only=True)
    except FileNotFoundError:
        raise Mistake(f'there is no checkpoint {path}') from None
    except pickle.UnpicklingError:
        raise Mistake(f'the checkpoint {path} is broken, or more than tensors and plain values') from None
    except (RuntimeError, OSError, EOFError) as error:  # torch gives any of them for a file that was cut
        reason = getattr(error, 'strerror', None) or 'it was cut, or is no checkpoint'
        raise Mistake(f'the checkpoint {path} cannot be read: {reason}') from None
    whole = isinstance(checkpoint, dict) and {'model', 'model_args'} <= set(checkpoint)
    check(whole, 'checkpoint', str(path), 'a file with model and model_args')
    return checkpoint


def load_checkpoint(path, device='cpu', **changes):
    """(GPT, checkpoint) from a file of this train.py, of nanoGPT, or of the original nanoLOOP.

    path: may be read_checkpoint's dict. changes: GPTConfig values to use instead of the file's. Raises
    ValueError if it is broken, does not fit, or the changes give the weights another meaning.
    """
    checkpoint = path if isinstance(path, dict) else read_checkpoint(path)
    args = dict(checkpoint['model_args'])
    weights = checkpoint['model']
    weights = {name.removeprefix('_orig_mod.').removeprefix('module.'): w for name, w in weights.items()}
    if 'n_layer' in args:  # nanoGPT; its old files hold causal masks, too
        args.update(n_prelude=0, n_block=args.pop('n_layer'), n_coda=0, n_loop=1)
        args.update(input_injection='passthrough', norm='layernorm', norm_loop=False)
        weights = {k.replace('.h.', '.recur.'): w for k, w in weights.items() if k[-10:] != '.attn.bias'}
    elif 'norm' not in args:  # nanoLOOP, which leaves the eps to torch: float32's machine epsilon
        args.update(norm='rmsnorm', norm_eps=torch.finfo(torch.float32).eps)
    try:
        config = GPTConfig(**args)
    except TypeError as error:
        raise Mistake(f'the checkpoint is of another program: {error}') from None
    changed = GPTConfig(**dict(asdict(config), **changes))
    for key, value in asdict(changed).items():
        theirs = getattr(config, key)
        check(value == theirs or key in FREE, key, value, f'{theirs!r} as in the checkpoint')
    model = GPT(changed)
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise Mistake(f'the checkpoint does not fit: {str(error).splitlines()[1].strip()}') from None
    return model.to(device), checkpoint
