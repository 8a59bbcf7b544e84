"""
A looped (depth-recurrent) GPT: a few layers are applied many times with the same weights.

    e = prelude(embed(idx))                n_prelude blocks, once
    s = start(e)                           s_0, the state before the first loop: a table, STATE
    for i in range(n_loop):
        u = inject(e, s, i)                how e and the state enter loop i: a table, INJECT
        y = norm_recur(recur(u))           n_block blocks, their weights shared by all loops
        s = update(s, y, i)                how the state leaves loop i: a table, UPDATE
    logits = lm_head(ln_f(coda(s)))        n_coda blocks, once

Only the last bptt_k loops record a graph. Every model of config/ is a choice of table entries, integers and
neutral values. With input_injection=passthrough, n_loop = 1, no prelude, no coda and no norm_loop it is a
plain GPT.

To add a variant, add an entry to a table below. CONTRIBUTING.md shows one of each kind.

References: nanoGPT, github.com/karpathy/nanoGPT; nanoLOOP and looped nanochat, github.com/LoopedLMs;
FLT and LT, github.com/FuRuF-11/FullyLoopedTransformer; Huginn, arXiv:2502.05171; Ouro, arXiv:2510.25741;
RMSNorm, arXiv:1910.07467; RoPE, arXiv:2104.09864; hashed n-grams, arXiv:2412.09871.

Shapes: B rows of a batch, T positions, C = n_embd, H heads, G = n_kv_head, D = C / H, V = vocab_size, R loops
that are read out.
"""

import functools
import itertools
import math
from collections import defaultdict, namedtuple
from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn as nn
from torch.nn import functional as F

from nanoloop import checks
from nanoloop.checks import Choice, Count, Fraction, Positive, PowerOfTwo, Share, Size, Window

HEAD_CHUNK = 2**25  # most logits that are computed at once, 128 MiB in float32


def upcast(x):
    """Casts x to float32. float64 stays: losses and probabilities are never taken in a low precision."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def identity(x):
    """Returns x. A plain function: calling nn.Identity costs microseconds, six times per block."""
    return x


def rms_norm(x, config):
    """Divides x (..., C) by its root mean square. This RMSNorm has no weight."""
    return F.rms_norm(x, x.shape[-1:], eps=config.norm_eps or 1e-6)


# -----------------------------------------------------------------------------
# norms, activations, positions


# fmt: off
NORM = dict(  # config -> a module; its constructor sets the initial values of its parameters
    layernorm=lambda c: nn.LayerNorm(c.n_embd, eps=c.norm_eps or 1e-5, bias=c.bias),
    rmsnorm=lambda c: nn.RMSNorm(c.n_embd, eps=c.norm_eps or 1e-6),
    rmsnorm_fixed=lambda c: nn.RMSNorm(c.n_embd, eps=c.norm_eps or 1e-6, elementwise_affine=False))
# fmt: on


def make_norm(config, exists, absent=identity):
    """Builds the norm named by config.norm if `exists`, else returns `absent`."""
    norm = NORM[config.norm](config) if exists else absent
    if exists:
        norm.entry = NORM[config.norm]  # for GPT.init_weights
    return norm


# which norms a block has: each of its two halves computes x = out(x + post(f(pre(x))))
NormPlace = namedtuple('NormPlace', 'pre post out')
# fmt: off
# pre: GPT-2; branch: Ouro; around: Huginn; post: the first transformer
NORM_PLACE = dict(pre=NormPlace(True, False, False), branch=NormPlace(True, True, False),
                  around=NormPlace(True, False, True), post=NormPlace(False, False, True))
# fmt: on


def swiglu(x):
    """Returns silu(gate) * up for x = [gate; up]: (..., 2 hidden) -> (..., hidden)."""
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


# the activation of the MLP. function: (..., n_parts * hidden) -> (..., hidden). hidden: C -> the default
# width inside the MLP
Act = namedtuple('Act', 'function n_parts hidden', defaults=(1, lambda C: 4 * C))
# fmt: off
MLP_ACT = dict(  # gelu_tanh: GPT-2's released weights; swiglu: 8/3 C, rounded up to 64s
    gelu=Act(F.gelu), gelu_tanh=Act(functools.partial(F.gelu, approximate='tanh')),
    relu2=Act(lambda x: F.relu(x).square()), swiglu=Act(swiglu, 2, lambda C: math.ceil(C / 24) * 64))
# fmt: on

# how a token's position enters the model: an embedding is added; queries and keys are rotated (RoPE);
# options: fields of GPTConfig that mean something with this entry only
Pos = namedtuple('Pos', 'learned rotary options', defaults=((),))
POS = dict(learned=Pos(True, False), rope=Pos(False, True, ('rope_base',)), none=Pos(False, False))

# -----------------------------------------------------------------------------
# the loop's variants: how the state starts, enters a loop, and leaves it


class LoopPart(nn.Module):
    """Base class of the entries of STATE, INJECT and UPDATE, which are built as entry(config).

    The constructor sets the initial values. A method init(rules), if there is one, then fills all parameters,
    by the rules of INIT or otherwise: rules[part] is a function that fills a tensor. AdamW trains the
    parameters without weight decay (optimizer group 'vectors'), unless `groups` names another group of
    nanoloop/optimizer.py.

    base_args: arguments of a further base class, such as nn.Linear.
    """

    vectors = {}  # {name: value}: learned vectors (C,) and the value that they start with
    groups = {}  # {name of a parameter: its optimizer group}
    reads_loop = False  # True: it reads the loop's index i; else i is None where rows are at different loops
    options = ()  # fields of GPTConfig that mean something with this entry only

    def __init__(self, config, **base_args):
        super().__init__(**base_args)
        self.config, self.entry = config, type(self)  # entry: for GPT.init_weights
        for name, value in self.vectors.items():
            self.register_parameter(name, nn.Parameter(torch.full((config.n_embd,), float(value))))


class FromPrelude(LoopPart):
    """s_0 = e."""

    def forward(self, e, pos):
        """Returns s_0 (B, T, C), or None. e: the prelude's output (B, T, C); pos: (T,) or (B, T)."""
        return e


class FromZero(LoopPart):
    """s_0 = 0."""

    def forward(self, e, pos):
        return torch.zeros_like(e)


class FromNothing(LoopPart):
    """No s_0: the input of the first loop is e, without injection."""

    def forward(self, e, pos):
        return None


class FromNoise(LoopPart):
    """s_0 ~ N(0, state_std^2).

    Training draws from torch's default generator. Evaluation reads a fixed table, indexed by position: it is
    repeatable, and a row does not depend on the other rows of its batch. The table is the same for all rows
    and seeds, and repeats every block_size positions.
    """

    options = ('state_std',)

    def __init__(self, config):
        super().__init__(config)
        self.register_buffer('noise', torch.empty(config.block_size, config.n_embd), persistent=False)

    def init(self, rules):
        # position by position, so that the table does not depend on block_size, device and dtype
        draw = dict(device='cpu', dtype=torch.float32, generator=torch.Generator('cpu').manual_seed(0))
        self.noise.copy_(torch.stack([torch.randn(self.config.n_embd, **draw) for _ in self.noise]))

    def forward(self, e, pos):
        x = torch.randn_like(e) if self.training else self.noise[pos % len(self.noise)].expand_as(e)
        return (self.config.state_std or self.config.n_embd**-0.5) * x


STATE = {'prelude': FromPrelude, 'random': FromNoise, 'zero': FromZero, 'none': FromNothing}


class Injection(LoopPart):
    """How the prelude's output e and the state s enter loop i.

    Its forward(e, s, i) returns u, the input of the first block. e, s, u: (B, T, C); i: the loop, from 0 on.
    Blocks can use the state, too: the first hooked_blocks blocks of the loop call block_hook(x, state) ->
    (x, query_source) on their input x, all (B, T, C). Attention computes its queries from query_source; None
    = from x.
    """

    states = ('prelude', 'random', 'zero')  # the values of state_init that are allowed
    hooked_blocks = None  # the number of blocks that call block_hook, if there is one; None = all
    needs_full_bptt = False  # True: e enters as s_0 only, so bptt_k < n_loop gives the prelude no gradient

    def hook_state(self, s):
        """Returns the argument `state` of block_hook for s, (B, T, C) each. It is called once per loop."""
        return s


class Passthrough(Injection):
    """u = s."""

    states = ('prelude',)
    needs_full_bptt = True

    def forward(self, e, s, i):
        return s


class Concat(Injection, nn.Linear):
    """u = W [e; s]. W (C, 2 C) starts as [I 0], so that u = e, except with init=huginn."""

    groups = {'weight': 'injection'}

    def __init__(self, config):
        super().__init__(config, in_features=2 * config.n_embd, out_features=config.n_embd, bias=config.bias)

    def init(self, rules):
        rules['concat'](self.weight)
        if self.bias is not None:
            rules['bias'](self.bias)

    def forward(self, e, s, i):
        # (B, T, 2C) -> (B, T, C); autocast must not lower the precision of the residual stream
        return super().forward(torch.cat((e, s), dim=-1)).to(e.dtype)


class Add(Injection):
    """u = rms_norm(e + s), whatever config.norm is."""

    states = ('prelude', 'random', 'zero', 'none')

    def forward(self, e, s, i):
        return rms_norm(e + s, self.config)


class Gated(Injection):
    """u = a e + (1 - a) s; a is the sigmoid of a learned vector that starts at 0."""

    vectors = dict(gate=0.0)

    def forward(self, e, s, i):
        return torch.lerp(s, e, self.gate.sigmoid())  # lerp(s, e, a) = s + a (e - s)


class Unmixed(Injection):
    """u = e. A base class: the blocks use the state, by block_hook."""

    def forward(self, e, s, i):
        return e


class QueryFirst(Unmixed):
    """u = e; the first block takes its queries from rms_norm(s), without its ln_1. LT_ia."""

    states = ('none', 'prelude', 'random')
    hooked_blocks = 1

    def hook_state(self, s):
        return rms_norm(s, self.config)

    def block_hook(self, x, state):
        return x, state


class QueryAll(QueryFirst):
    """u = e; every block takes its queries from rms_norm(s), without its ln_1. FLT."""

    hooked_blocks = None


class ResidualAll(Unmixed):
    """u = e; every block first replaces its input x by rms_norm(x + s). FLT_res."""

    states = tuple(STATE)

    def block_hook(self, x, state):
        return rms_norm(x + state, self.config), None


# fmt: off
INJECT = dict(passthrough=Passthrough, inject=Concat, add=Add, gated=Gated,
              query_first=QueryFirst, query_all=QueryAll, residual_all=ResidualAll)
# fmt: on
ALIASES = dict(inject_random=dict(input_injection='inject', state_init='random'))  # the original nanoLOOP's


class Replace(LoopPart):
    """The new state is y."""

    def forward(self, s, y, i):
        """Returns the state after loop i. y: the loop's output; s: the state before, y if none; (B, T, C)."""
        return y


class Gate(LoopPart):
    """The new state is g s + (1 - g) y; g is the sigmoid of a learned vector that starts at 0."""

    vectors = dict(gate=0.0)

    def forward(self, s, y, i):
        return torch.lerp(y, s, self.gate.sigmoid())


class Damp(LoopPart):
    """The new state is s + update_alpha (y - s). For weights that were trained without loops."""

    options = ('update_alpha',)

    def forward(self, s, y, i):
        return torch.lerp(s, y, self.config.update_alpha)


UPDATE = {'replace': Replace, 'gate': Gate, 'damp': Damp}

# -----------------------------------------------------------------------------
# initial values


def normal(std):
    """Returns a function that fills a tensor from N(0, std^2)."""
    return functools.partial(nn.init.normal_, std=std)


def uniform(std):
    """Returns a function that fills a tensor uniformly, with mean 0 and standard deviation std."""
    return functools.partial(nn.init.uniform_, a=-math.sqrt(3) * std, b=math.sqrt(3) * std)


def truncated(std):
    """Returns a function that fills a tensor from N(0, std^2), cut at 3 std."""
    return functools.partial(nn.init.trunc_normal_, std=std, a=-3 * std, b=3 * std)


InitRules = namedtuple('InitRules', 'wte wpe ngrams c_attn c_fc c_proj concat exit_gate lm_head bias')


def init_rules(rest, **parts):
    """Returns {part: rule}: the rules in `parts`, 0 for biases, `rest` for the others."""
    return InitRules(**dict.fromkeys(InitRules._fields, rest) | dict(bias=nn.init.zeros_) | parts)._asdict()


def huginn(c):
    """Returns Huginn's rules: std sqrt(2 / (5 C)), divided by sqrt(2 depth) in c_proj and swiglu's up."""
    std = math.sqrt(2 / (5 * c.n_embd))
    wide, low = truncated(std), truncated(std / math.sqrt(2 * c.depth))

    def c_fc(weight):  # rows of the gate, then of up
        wide(weight)
        for up in weight.chunk(MLP_ACT[c.mlp].n_parts)[1:]:
            low(up)

    return init_rules(wide, c_proj=low, c_fc=c_fc, ngrams=nn.init.zeros_)


# config -> {part: a function that fills its weight}; biases start at 0. Embedding and head can be tied where
# they have the same rule. With nanochat's and norm_place=pre every block starts as the identity.
# fmt: off
INIT = dict(
    gpt2=lambda c: init_rules(normal(0.02), concat=nn.init.eye_, ngrams=nn.init.zeros_,
                              c_proj=normal(0.02 / math.sqrt(2 * c.depth))),
    nanochat=lambda c: init_rules(
        normal(0.02), wte=normal(1.0), lm_head=normal(0.001), concat=nn.init.eye_, ngrams=nn.init.zeros_,
        c_attn=uniform(c.n_embd**-0.5), c_fc=uniform(c.n_embd**-0.5), c_proj=nn.init.zeros_), huginn=huginn)
# fmt: on

# -----------------------------------------------------------------------------
# the configuration


# looped nanochat's dial: n_embd = 64 size, rounded up to heads of 128
NANOCHAT_SIZE = checks.Derives(lambda n: dict(n_embd=128 * math.ceil(n / 2), n_head=math.ceil(n / 2)))


@dataclass
class GPTConfig:
    # model
    block_size: Count = 1024  # context length in tokens
    vocab_size: Count = 50304  # number of token ids; if not set, train.py and bench.py take the data's
    n_head: Annotated[Count, checks.Divides('n_embd')] = 12  # number of attention heads
    n_kv_head: Annotated[Count, checks.Divides('n_head')] | None = None  # key/value heads; None = n_head
    n_embd: Count = 768  # width of the residual stream in channels
    size: Annotated[Count, NANOCHAT_SIZE] | None = None  # sets n_head = ceil(size/2), n_embd = 128 n_head
    dropout: Share = 0.0  # probability of dropout; 0 for pretraining, 0.1 or more for small data
    bias: bool = False  # biases in the blocks, the injection and LayerNorm, as in GPT-2; never in the head
    n_prelude: Size = 2  # number of layers before the loop
    n_block: Count = 2  # number of layers inside the loop
    n_coda: Size = 2  # number of layers after the loop
    n_loop: Count = 4  # number of loops: passes through the layers inside the loop
    bptt_k: Count | None = None  # number of loops, the last ones, that record a graph; None = all
    input_injection: Choice(INJECT, ALIASES) = 'inject'  # input of a loop: s, W [e; s], norm(e + s), ...
    state_init: Choice(STATE) = 'prelude'  # state s_0 before the first loop; none = no state
    state_std: Positive | None = None  # standard deviation of state_init=random; None = n_embd^-0.5
    state_update: Choice(UPDATE) = 'replace'  # the new state: y, g s + (1 - g) y, s + update_alpha (y - s)
    update_alpha: Positive = 1.0  # state_update=damp: s + update_alpha (output - s); 1 = replace
    norm: Choice(NORM) = 'rmsnorm'  # kind of norm; rmsnorm_fixed has no weight, as the norm in injections
    norm_eps: Fraction | None = None  # epsilon of all norms; None = 1e-5 of LayerNorm, 1e-6 of RMSNorm
    norm_place: Choice(NORM_PLACE) = 'pre'  # x+f(n(x)), x+n(f(n(x))), n(x+f(n(x))), n(x+f(x))
    norm_emb: bool = False  # norm after the embedding
    norm_loop: bool = True  # norm of the last block's output in every loop, before state_update
    norm_final: bool = True  # norm before the head
    res_scale: Positive = 1.0  # factor of what attention and MLP add to the residual stream; 1 = none
    pos: Choice(POS) = 'learned'  # how positions enter the model
    rope_base: Positive = 10000.0  # base of the rotation frequencies of pos=rope
    qk_norm: bool = False  # RMSNorm without weight on queries and keys, after RoPE
    mlp: Choice(MLP_ACT) = 'gelu'  # activation of the MLP
    n_hidden: Count | None = None  # MLP width; None = 4 n_embd, swiglu: 8/3 n_embd up to a multiple of 64
    window_pattern: Annotated[str, checks.Letters('LS')] = 'L'  # a letter per layer of prelude, loop, coda
    window_size: Window | None = None  # earlier tokens that a layer S sees; None = block_size // 2
    tie_weights: bool = True  # the head uses the embedding's weight
    softcap: Positive | None = None  # logits become softcap * tanh(logits / softcap); None = no cap
    emb_scale: Positive = 1.0  # factor of the token embedding, not of the n-grams'; 1 = none
    n_gram: Annotated[Count, checks.AtMost('block_size')] = 1  # embeds runs of 2 to n_gram tokens; 1 = none
    n_gram_rows: PowerOfTwo = 16384  # rows of their table, a power of two
    exit_gate: bool = False  # linear layer that predicts from the state whether to exit after a loop
    init: Choice(INIT) = 'gpt2'  # scheme of the initial weights
    recompute: bool = False  # activation checkpointing of every loop: less memory for more time

    def __post_init__(self):
        """Sets the fields that other fields decide. Raises UserError for a combination without meaning."""
        checks.settle_fields(self)
        checks.check_model(self, INJECT[self.input_injection], POS[self.pos], INIT[self.init](self))

    @property
    def depth(self):
        """Returns the number of executed layers: the layers inside the loop count n_loop times."""
        return self.n_prelude + self.n_block * self.n_loop + self.n_coda


# -----------------------------------------------------------------------------
# embeddings of n-grams


def hash_ngrams(idx, earlier, n_rows):
    """Returns the table's rows of the runs of 2, 3, ... N tokens that end at idx (B, T), (N - 1, B, T).

    earlier: N - 1 tensors (B, T): the token before idx, the one before that, ...; -1 = there is none. A run
    has row (a r + t + 1) mod n_rows, where t is its first token and r the row of the others; a single token's
    is its id. With `a` near the golden section of n_rows few pairs of a small vocabulary share a row
    (Fibonacci hashing; Knuth, The Art of Computer Programming, 6.4).
    """
    a = round(0.618034 * n_rows) | 1  # odd: it has no factor in common with n_rows, a power of two
    rows = itertools.accumulate((idx, *earlier), lambda row, token: (a * row + token + 1) % n_rows)
    return torch.stack([*rows][1:])


# -----------------------------------------------------------------------------
# a block


def rope_table(pos, width, base):
    """Returns the RoPE table (cos, sin), each (..., T, width / 2), in float32. pos: (..., T) positions."""
    freq = base ** (-torch.arange(0, width, 2, device=pos.device, dtype=torch.float32) / width)
    angle = pos[..., None] * freq  # (..., T, width / 2)
    return angle.cos(), angle.sin()


def apply_rope(x, cos, sin):
    """Rotates channels i and i + D / 2 of every head by the position. x and the result: (B, H, T, D)."""
    a, b = x.chunk(2, dim=-1)  # (B, H, T, D / 2) each
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


def make_window_mask(pos, window):
    """Returns (T, T), True where a query sees a key: its own and the `window` keys before it. pos: (T,)."""
    distance = pos[:, None] - pos  # (T, T), of query and key
    return (distance >= 0) & (distance <= window)


def attend(q, k, v, mask, dropout):
    """Computes softmax attention. q: (B, H, T, D); k, v: (B, G, S, D). Returns (B, H, T, D).

    mask: (T, S) or (B, 1, T, S), True where a query sees a key. None: causal if S = T, else all keys.
    """
    # under torch.compile with a symbolic T the condition alone would be a SymBool, which the call refuses
    causal = True if mask is None and q.size(2) == k.size(2) else False
    options = dict(dropout_p=dropout, is_causal=causal, enable_gqa=q.size(1) != k.size(1))
    if q.device.type == 'cpu' and q.size(2) <= 256 and (torch.is_autocast_enabled('cpu') or q.itemsize != 4):
        # on a CPU bfloat16 takes up to 5 times as long as float32 in the backward pass, and 2 to 3 times for
        # a single decoded token, so short sequences run in float32
        with torch.autocast('cpu', enabled=False):
            return F.scaled_dot_product_attention(*map(upcast, (q, k, v)), mask, **options).to(q.dtype)
    return F.scaled_dot_product_attention(q, k, v, mask, **options)


# inputs of attention that depend on positions only. rope: table (cos, sin), each (..., T, D / 2); None = no
# RoPE. mask: (..., T, S), True where a query sees a key; None = causal, or all keys for a single decoded
# token. window_mask: the mask of layers with a window. attend: computes attention where no cache does it
AttnInputs = namedtuple('AttnInputs', 'rope mask window_mask attend', defaults=(attend,))

# how windows are computed: {kind of device: function (model, T, window) -> (make_mask, attend)}, for T
# positions and the smallest window. Its attend takes the masks that its make_mask makes. Without an entry
# masks are dense; nanoloop/machine.py makes one for GPUs
WINDOWS = defaultdict(lambda: lambda model, T, window: (make_window_mask, attend))


class CausalSelfAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        C, self.n_head, self.n_kv_head = config.n_embd, config.n_head, config.n_kv_head or config.n_head
        self.qkv_widths = [C, 2 * self.n_kv_head * C // self.n_head]  # rows of c_attn: q; k and v
        self.c_attn = nn.Linear(C, sum(self.qkv_widths), bias=config.bias)
        self.c_proj = nn.Linear(C, C, bias=config.bias)
        self.qk_norm = functools.partial(rms_norm, config=config) if config.qk_norm else identity
        self.dropout = config.dropout

    def project_qkv(self, x, query_source):
        """Returns queries, keys and values side by side, (B, T, (H + 2 G) D). query_source: None = x."""
        if query_source is None:
            return self.c_attn(x)
        w_q, w_kv = self.c_attn.weight.split(self.qkv_widths)
        b_q, b_kv = (None, None) if self.c_attn.bias is None else self.c_attn.bias.split(self.qkv_widths)
        return torch.cat((F.linear(query_source, w_q, b_q), F.linear(x, w_kv, b_kv)), dim=-1)

    def forward(self, x, rope=None, mask=None, query_source=None, attend=attend):
        """Returns (B, T, C). query_source (B, T, C): queries come from it, None = from x; rest: see Block."""
        (B, T, C), H, G = x.shape, self.n_head, self.n_kv_head
        qkv = self.project_qkv(x, query_source)  # (B, T, (H + 2 G) D)
        qkv = qkv.view(B, T, H + 2 * G, C // H).transpose(1, 2)  # (B, H + 2 G, T, D)
        # queries and keys stay one tensor until they are rotated and normed: one call for both
        qk, v = qkv.split([H + G, G], dim=1)  # (B, H + G, T, D), (B, G, T, D)
        qk = qk if rope is None else apply_rope(qk, *rope)
        q, k = self.qk_norm(qk).split([H, G], dim=1)  # (B, H, T, D), (B, G, T, D)
        y = attend(q, k, v, mask, self.dropout if self.training else 0.0)  # (B, H, T, D)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C))  # (B, T, C), heads side by side


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.act, n_parts, default = MLP_ACT[config.mlp]
        hidden = config.n_hidden or default(config.n_embd)
        self.c_fc = nn.Linear(config.n_embd, n_parts * hidden, bias=config.bias)  # swiglu: gate, up
        self.c_proj = nn.Linear(hidden, config.n_embd, bias=config.bias)

    def forward(self, x):
        return self.c_proj(self.act(self.c_fc(x)))  # (B, T, C)


class Block(nn.Module):
    """Computes x = out(x + res_scale post(dropout(f(pre(x))))), with attention and then with the MLP as f.

    state_hook: Injection.block_hook for blocks that use the loop's state, else None; set by GPT.
    """

    def __init__(self, config, windowed):
        super().__init__()
        self.windowed, self.dropout, self.state_hook = windowed, config.dropout, None
        self.res_scale = config.res_scale
        norm, place = functools.partial(make_norm, config), NORM_PLACE[config.norm_place]
        self.ln_1, self.attn = norm(place.pre), CausalSelfAttention(config)
        self.ln_2, self.mlp = norm(place.pre), MLP(config)
        self.post_1, self.out_1 = norm(place.post), norm(place.out)
        self.post_2, self.out_2 = norm(place.post), norm(place.out)

    def forward(self, x, rope=None, mask=None, state=None, attend=attend):
        """Returns (B, T, C). x, state: (B, T, C); rope, mask, attend: see AttnInputs."""
        x, query_source = (x, None) if state is None else self.state_hook(x, state)
        y = self.attn(self.ln_1(x), rope, mask, query_source, attend)
        y = self.post_1(torch.dropout(y, self.dropout, self.training).to(x.dtype))
        x = self.out_1(torch.add(x, y, alpha=self.res_scale))  # under autocast y comes in the low precision
        y = self.post_2(torch.dropout(self.mlp(self.ln_2(x)), self.dropout, self.training).to(x.dtype))
        return self.out_2(torch.add(x, y, alpha=self.res_scale))


# -----------------------------------------------------------------------------
# the model


def maybe_checkpoint(recompute, f, *args):
    """Returns f(*args); with recompute under activation checkpointing."""
    stored = not recompute or not torch.is_grad_enabled()
    return f(*args) if stored else torch.utils.checkpoint.checkpoint(f, *args, use_reentrant=False)


class GPT(nn.Module):
    """The looped GPT: embedding, prelude, loop, coda, head. config: a GPTConfig."""

    def __init__(self, config):
        super().__init__()
        self.config = c = config
        windowed = itertools.cycle(letter == 'S' for letter in c.window_pattern)  # layer by layer
        norm = functools.partial(make_norm, c, absent=nn.Identity())

        def layers(n):
            return nn.ModuleList(Block(c, next(windowed)) for _ in range(n))

        # fmt: off
        self.transformer = nn.ModuleDict(dict(
            wte=nn.Embedding(c.vocab_size, c.n_embd),
            wpe=nn.Embedding(c.block_size, c.n_embd) if POS[c.pos].learned else None,
            ngrams=nn.Embedding(c.n_gram_rows, c.n_embd) if c.n_gram > 1 else None,
            norm_emb=norm(c.norm_emb), drop=nn.Dropout(c.dropout),
            prelude=layers(c.n_prelude), recur=layers(c.n_block), coda=layers(c.n_coda),
            ln_f=norm(c.norm_final)))
        # fmt: on
        self.start, self.inject = STATE[c.state_init](c), INJECT[c.input_injection](c)
        self.norm_recur, self.update = norm(c.norm_loop), UPDATE[c.state_update](c)
        self.exit_gate = nn.Linear(c.n_embd, 1) if c.exit_gate else None
        self.lm_head = nn.Linear(c.n_embd, c.vocab_size, bias=False)
        if c.tie_weights:
            self.lm_head.weight = self.transformer.wte.weight
        for block in self.transformer.recur[: self.inject.hooked_blocks]:
            block.state_hook = getattr(self.inject, 'block_hook', None)
        self.rope_width = c.n_embd // c.n_head if POS[c.pos].rotary else 0
        self.window = c.window_size or c.block_size // 2
        self.head_chunk = max(1, HEAD_CHUNK // c.vocab_size)  # tokens whose logits are computed at once
        self.init_weights()
        checks.check_parts(self)

    @torch.no_grad()
    def init_weights(self):
        """Initialises every parameter by exactly one rule. Raises RuntimeError if a parameter has no rule.

        A module built from a table entry (norm, injection, ...) initialises itself: by its method init(rules)
        if it has one, else by its constructor. Every other weight follows its rule of INIT, and biases start
        at 0. It may be called again, for example after to_empty().
        """
        rules = INIT[self.config.init](self.config)
        own = {p for m in self.modules() if hasattr(m, 'init') or hasattr(m, 'entry') for p in m.parameters()}
        for name, p in self.named_parameters():  # a tied head is there once, as the embedding
            part = name.split('.')[-2 if name.endswith('.weight') else -1]
            if p not in own and part not in rules:
                raise RuntimeError(f'no rule says how {name} starts, see INIT')
            if p not in own:
                rules[part](p)
        for module in self.modules():
            if hasattr(module, 'init'):
                module.init(rules)
            elif hasattr(module, 'entry'):
                module.load_state_dict(module.entry(self.config).state_dict())

    def blocks(self):
        """Returns every block once, in the order of first use."""
        return (*self.transformer.prelude, *self.transformer.recur, *self.transformer.coda)

    def attn_inputs(self, pos):
        """Returns the AttnInputs of a forward pass without cache. pos: (T,); a plain causal mask is None."""
        rope = rope_table(pos, self.rope_width, self.config.rope_base) if self.rope_width else None
        widest = self.config.block_size - 1
        windows = [widest, min(self.window, widest) if any(b.windowed for b in self.blocks()) else widest]
        make_mask, attend = WINDOWS[pos.device.type](self, len(pos), min(windows))
        masks = {window: make_mask(pos, window) for window in windows if len(pos) - 1 > window}
        return AttnInputs(rope, *map(masks.get, windows), attend)

    def embed(self, idx, pos, earlier=None):
        """Returns the prelude's input (B, T, C). idx: (B, T) token ids; pos: (T,) or (B, T) positions.

        earlier: the n_gram - 1 tokens before each, see hash_ngrams. None: idx begins at position 0, and they
        are taken from it.
        """
        x, ngrams, T = self.config.emb_scale * self.transformer.wte(idx), self.transformer.ngrams, idx.size(1)
        if ngrams is not None:
            earlier = earlier or [F.pad(idx, (k, 0), value=-1)[:, :T] for k in range(1, self.config.n_gram)]
            x = x + ngrams(hash_ngrams(idx, earlier, len(ngrams.weight))).sum(dim=0)
        if self.transformer.wpe is not None:
            x = x + self.transformer.wpe(pos)
        return self.transformer.drop(self.transformer.norm_emb(x))

    def apply_blocks(self, blocks, x, attn_inputs, state=None, caches=None):
        """Returns x (B, T, C) after blocks. state (B, T, C): what inject.hook_state(s) returned;
        blocks with a hook get it.

        caches: for decoding, one function per block that takes the place of attend. It stores the new keys
        and values, and attends to them and to the earlier ones.
        """
        for block, attend in zip(blocks, caches or itertools.repeat(attn_inputs.attend), strict=False):
            mask = attn_inputs.window_mask if block.windowed else attn_inputs.mask
            x = block(x, attn_inputs.rope, mask, state if block.state_hook else None, attend)
        return x

    def iterate(self, e, s, i, attn_inputs, caches=None):
        """Runs loop i alone. Returns the new state. e, s, result: (B, T, C); s: None if there is no s_0."""
        u = e if s is None else self.inject(e, s, i)
        state = None if s is None else self.inject.hook_state(s)
        y = self.norm_recur(self.apply_blocks(self.transformer.recur, u, attn_inputs, state, caches))
        return self.update(y if s is None else s, y, i)

    def loop_states(self, idx, n_loop=None, loops=(-1,)):
        """Runs prelude and loop. Returns the states after the given loops, each (B, T, C), and AttnInputs.

        idx: (B, T) token ids. loops: indices from 0 on, -1 = the last. Beyond block_size a layer sees the
        last block_size keys. Raises UserError for an impossible n_loop, loops or length of idx.
        """
        c, with_graph = self.config, self.training and torch.is_grad_enabled()
        n_loop = c.n_loop if n_loop is None else n_loop
        checks.check_call(c, POS[c.pos], self.inject, idx.size(1), n_loop, loops, with_graph)
        pos = torch.arange(idx.size(1), device=idx.device)  # (T,)
        attn_inputs = self.attn_inputs(pos)
        e = self.apply_blocks(self.transformer.prelude, self.embed(idx, pos), attn_inputs)
        s, states = self.start(e, pos), {}
        first = n_loop - (self.config.bptt_k or n_loop)  # loops before `first` record no graph
        for i in range(n_loop):
            with torch.set_grad_enabled(torch.is_grad_enabled() and i >= first):
                s = maybe_checkpoint(self.config.recompute, self.iterate, e, s, i, attn_inputs)
            if i in loops or i - n_loop in loops:
                states[i] = s
        return [states[i % n_loop] for i in loops], attn_inputs

    def run_coda(self, s, attn_inputs, caches=None):
        """Runs coda and final norm on the state s. Returns the head's input, (B, T, C) as s."""
        return self.transformer.ln_f(self.apply_blocks(self.transformer.coda, s, attn_inputs, caches=caches))

    def logits(self, x):
        """Returns the logits (..., V) for the head's input x (..., C)."""
        logits, cap = self.lm_head(x), self.config.softcap
        return logits if cap is None else cap * torch.tanh(upcast(logits) / cap)

    def exit_probability(self, s):
        """Returns the gate's probability (B, T) to exit after the loop that ended in state s (B, T, C)."""
        # written as a sum: autocast would run a matrix product in the low precision
        return torch.sigmoid((upcast(s) * self.exit_gate.weight[0]).sum(-1) + self.exit_gate.bias)

    def nll(self, x, targets):
        """Returns -log p(targets), (N,), for the head's input x (N, C). targets: (N,); -1 gives 0."""
        return F.cross_entropy(upcast(self.logits(x)), targets, ignore_index=-1, reduction='none')

    def cross_entropy(self, s, targets, attn_inputs, recompute=False):
        """Returns -log p(targets), (B, T), predicted from the state s (B, T, C); 0 where a target is -1.

        The logits of head_chunk tokens exist at once: longer inputs are split, and every chunk is recomputed
        in the backward pass. With recompute coda and head are recomputed even if one chunk is enough.
        """
        x = maybe_checkpoint(recompute, self.run_coda, s, attn_inputs).flatten(0, 1)  # (B T, C)
        n = self.head_chunk
        chunks, recompute = zip(x.split(n), targets.flatten().split(n), strict=True), recompute or len(x) > n
        return torch.cat([maybe_checkpoint(recompute, self.nll, *chunk) for chunk in chunks]).view_as(targets)

    def loss_table(self, idx, targets, n_loop=None, loops=(-1,)):
        """Returns every token's cross-entropy after each of the given loops, and the exit probabilities.

        idx, targets: (B, T), -1 = ignored; n_loop, loops: see loop_states. Returns ce (R, B, T), 0 where
        ignored, and the probabilities (R, B, T), or None without a gate. Of a loop before the last bptt_k
        only coda and head get a gradient.

        With several loops coda and head are recomputed in the backward pass: only the states and head inputs
        of the loops are stored. Under autocast use cache_enabled=False: with autocast's cache the gradients
        of chunks and loops would be summed in the low precision.
        """
        states, attn_inputs = self.loop_states(idx, n_loop, loops)
        ce = torch.stack([self.cross_entropy(s, targets, attn_inputs, len(loops) > 1) for s in states])
        return ce, torch.stack([self.exit_probability(s) for s in states]) if self.exit_gate else None

    def forward(self, idx, targets=None, n_loop=None):
        """Returns (logits, loss) after the last loop, as nanoGPT does. idx, targets: (B, T), -1 = ignored.

        With targets: the logits of all positions, (B, T, V), and the mean loss. Without: the logits of the
        last position, (B, 1, V), and None.
        """
        (s,), attn_inputs = self.loop_states(idx, n_loop)
        x = self.run_coda(s, attn_inputs)
        if targets is None:
            return self.logits(x[:, -1:]), None
        logits = self.logits(x)
        return logits, F.cross_entropy(upcast(logits).flatten(0, 1), targets.flatten(), ignore_index=-1)

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, n_loop=None):
        """Appends max_new_tokens sampled tokens to idx (B, T), as nanoGPT does: every step is a forward pass.

        Temperature 0 takes the most likely token. nanoloop/generate.py generates with a KV cache, many times
        as fast, and with early exits or speculation.
        """
        for _ in range(max_new_tokens):
            logits = upcast(self(idx[:, -self.config.block_size :], n_loop=n_loop)[0][:, -1])  # (B, V)
            if top_k is not None:
                logits[logits < logits.topk(min(top_k, logits.size(-1))).values[:, [-1]]] = -math.inf
            p = (logits / max(temperature, 1e-6)).softmax(dim=-1)
            token = p.argmax(dim=-1, keepdim=True) if temperature == 0 else torch.multinomial(p, 1)  # (B, 1)
            idx = torch.cat((idx, token), dim=1)
        return idx

    def get_num_params(self):
        """Returns the number of parameters. Shared ones count once. Position embeddings count, too."""
        return sum(p.numel() for p in self.parameters())
