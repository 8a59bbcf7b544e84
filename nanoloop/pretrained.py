"""
Weights of other programs: GPT-2's through transformers, Ouro's safetensors, nanoGPT's and nanoLOOP's files.

Everything here ends in this program's names: model_args are values of GPTConfig, weights are named as in GPT.
References: github.com/karpathy/nanoGPT; nanoLOOP, github.com/LoopedLMs; Ouro, arXiv:2510.25741.
"""

import contextlib
import json
from pathlib import Path

import torch

from model import GPTConfig
from nanoloop.checks import UserError, check, missing_package
from nanoloop.tokenizer import tokenizer_file

GPT2 = ('gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl')

# If one of these keys is given, GPT-2's layers become the prelude, the loop and the coda of a looped model.
LOOP_KEYS = ('n_prelude', 'n_block', 'n_coda', 'n_loop', 'input_injection', 'state_update')

# prefixes of the parameters that a looped GPT has and GPT-2 lacks: they get a new model's initial values
ENTRY_PARAMETERS = ('start.', 'inject.', 'update.', 'exit_gate.')

# transformers' names of activations: ours
ACTIVATIONS = {'gelu_new': 'gelu_tanh', 'gelu_pytorch_tanh': 'gelu_tanh', 'gelu': 'gelu'}

OURO = {  # GPT's name of a matrix or norm in a block: Ouro's names, whose rows are stacked in this order
    'attn.c_attn': ('self_attn.q_proj', 'self_attn.k_proj', 'self_attn.v_proj'),
    'attn.c_proj': ('self_attn.o_proj',),
    'mlp.c_fc': ('mlp.gate_proj', 'mlp.up_proj'),
    'mlp.c_proj': ('mlp.down_proj',),
    'ln_1': ('input_layernorm',),
    'post_1': ('input_layernorm_2',),
    'ln_2': ('post_attention_layernorm',),
    'post_2': ('post_attention_layernorm_2',),
}


def read_config(folder):
    """Returns the content of a folder's config.json as a dict, None if there is no such file."""
    with contextlib.suppress(ValueError, OSError):
        config = json.loads((Path(folder) / 'config.json').read_bytes())
        return config if isinstance(config, dict) else None


def find_pretrained(name, given):
    """Returns the checkpoint of another program that name stands for, None if it stands for none.

    name: one of GPT2, a folder of GPT-2 saved by transformers, or ouro:FOLDER with Ouro's safetensors. given:
    {key: value} of GPTConfig, see read_gpt2. Raises UserError if the weights cannot be loaded.
    """
    if name.startswith('ouro:'):
        return read_ouro(Path(name.removeprefix('ouro:')))
    if name in GPT2 or read_config(name) is not None:
        return read_gpt2(name, given)
    return None


# -----------------------------------------------------------------------------
# GPT-2


def read_gpt2(name, given):
    """Reads GPT-2 as a plain model or, if one of LOOP_KEYS is given, as a looped one.

    Returns a checkpoint. Its `fresh` names the parameters that a looped model has and GPT-2 lacks. With an
    injection that starts as u = e, n_loop = 1 still computes GPT-2.
    """
    gpt2 = load_gpt2(name)
    c = gpt2.config
    sizes = split_layers(name, c.n_layer, given)
    sections = dict(prelude=sizes['n_prelude'], recur=sizes['n_block'], coda=sizes['n_coda'])
    layers = [f'{section}.{i}' for section, n in sections.items() for i in range(n)]
    model = {}
    for key, w in gpt2.state_dict().items():
        if key.startswith('transformer.h.'):
            i, part = key.removeprefix('transformer.h.').split('.', 1)
            key = f'transformer.{layers[int(i)]}.{part}'
            if part.endswith(('c_attn.weight', 'c_proj.weight', 'c_fc.weight')):
                w = w.t()  # transformers' Conv1D keeps (in, out), Linear has (out, in)
        model[key] = w
    args = dict(sizes, n_head=c.n_head, n_embd=c.n_embd, n_hidden=c.n_inner, block_size=c.n_positions)
    args.update(vocab_size=c.vocab_size, bias=True, tie_weights=c.tie_word_embeddings, norm='layernorm')
    args.update(norm_eps=c.layer_norm_epsilon, norm_loop=False, mlp=ACTIVATIONS[c.activation_function])
    tokenizer = dict(kind='tiktoken', name='gpt2') if c.vocab_size == 50257 else None
    checkpoint = dict(model=model, model_args=args, tokenizer=tokenizer, config={}, iter_num=0, path=name)
    return checkpoint | dict(fresh=ENTRY_PARAMETERS)


def load_gpt2(name):
    """Returns transformers' GPT2LMHeadModel. Raises UserError for one that GPT cannot compute."""
    try:
        from transformers import GPT2LMHeadModel
    except ImportError:
        raise missing_package(name, 'pretrained', 'transformers') from None
    try:
        gpt2, info = GPT2LMHeadModel.from_pretrained(name, output_loading_info=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f'{name} cannot be loaded: {str(error).splitlines()[0]}') from None
    c, missing = gpt2.config, ', '.join(sorted(info['missing_keys']))
    check(not missing, 'model', name, f"all of GPT-2's weights, there is no {missing}")
    plain = c.scale_attn_weights and not c.scale_attn_by_inverse_layer_idx
    expected = f'attention scaled as in GPT-2, and an activation of {", ".join(ACTIVATIONS)}'
    check(plain and c.activation_function in ACTIVATIONS, 'model', name, expected)
    return gpt2


def split_layers(name, n_layer, given):
    """Returns the values of LOOP_KEYS: those given, GPTConfig's defaults, and n_block for all other layers.

    Without one of LOOP_KEYS in given: the values of a plain GPT. Raises UserError if the numbers of layers do
    not add up.
    """
    if not set(LOOP_KEYS) & set(given):
        return dict(n_prelude=0, n_block=n_layer, n_coda=0, n_loop=1, input_injection='passthrough')
    sizes = {key: given.get(key, getattr(GPTConfig, key)) for key in LOOP_KEYS}
    ends = f'n_prelude={sizes["n_prelude"]}, n_coda={sizes["n_coda"]}'
    n_block = n_layer - sizes['n_prelude'] - sizes['n_coda']
    check(n_block >= 1, 'n_layer', n_layer, f'more of {name}: {ends} leave none for the loop')
    sizes['n_block'] = given.get('n_block', n_block)
    expected = f'{n_block}: {name} has {n_layer} layers, of which {ends}'
    check(sizes['n_block'] == n_block, 'n_block', sizes['n_block'], expected)
    return sizes


# -----------------------------------------------------------------------------
# Ouro


def read_ouro(folder):
    """Reads Ouro from a folder with its config.json and safetensors; its tokenizer.json may be there, too."""
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError:
        raise missing_package(f'ouro:{folder}', 'pretrained', 'safetensors') from None
    files = sorted(folder.glob('*.safetensors'))
    whole = files and (folder / 'config.json').exists()
    check(whole, 'model', f'ouro:{folder}', 'a folder with config.json and *.safetensors')
    try:
        c = json.loads((folder / 'config.json').read_bytes())
        weights = {name: w for file in files for name, w in load_file(file).items()}
        model = rename_ouro(weights, c['num_hidden_layers'])
        args = ouro_args(c)
    except KeyError as error:
        raise UserError(f'ouro:{folder}: there is no {error} in it, it is no Ouro') from None
    except (ValueError, TypeError, RuntimeError, AttributeError, SafetensorError) as error:
        raise UserError(f'ouro:{folder} cannot be read: {str(error).splitlines()[0]}') from None
    unknown = [*weights, *(key for key in ('rope_scaling', 'tie_word_embeddings') if c.get(key))]
    if c.get('hidden_act', 'silu') != 'silu':
        unknown.append('hidden_act')
    if c.get('use_sliding_window') or 'sliding_attention' in c.get('layer_types', ()):
        unknown.append('sliding window')
    check(not unknown, 'model', f'ouro:{folder}', f'an Ouro, which has no {", ".join(sorted(unknown)[:3])}')
    checkpoint = dict(model=model, model_args=args, tokenizer=ouro_tokenizer(folder))
    return checkpoint | dict(config={}, iter_num=0, path=str(folder))


def ouro_tokenizer(folder):
    """Returns the spec of the tokenizer in a folder with an Ouro, None if it has no tokenizer.json."""
    path = folder / 'tokenizer.json'
    return tokenizer_file(path) if path.exists() else None


def rename_ouro(weights, n_layer):
    """Moves Ouro's weights out of the dict `weights` into a new one with GPT's names, which it returns."""
    model = {'lm_head.weight': weights.pop('lm_head.weight')}
    model['transformer.wte.weight'] = weights.pop('model.embed_tokens.weight')
    model['norm_recur.weight'] = weights.pop('model.norm.weight')
    for name in ('weight', 'bias'):
        model[f'exit_gate.{name}'] = weights.pop(f'model.early_exit_gate.{name}')
    for i in range(n_layer):
        for name, sources in OURO.items():
            rows = [weights.pop(f'model.layers.{i}.{source}.weight') for source in sources]
            model[f'transformer.recur.{i}.{name}.weight'] = torch.cat(rows)
    return model


def ouro_args(c):
    """Returns the values of GPTConfig for Ouro's config.json, a dict."""
    args = dict(n_prelude=0, n_block=c['num_hidden_layers'], n_coda=0, n_loop=c['total_ut_steps'])
    args.update(n_embd=c['hidden_size'], n_head=c['num_attention_heads'], n_kv_head=c['num_key_value_heads'])
    args.update(n_hidden=c['intermediate_size'], vocab_size=c['vocab_size'], norm_eps=c['rms_norm_eps'])
    args.update(rope_base=float(c['rope_theta']), block_size=c['max_position_embeddings'])
    args.update(input_injection='passthrough', pos='rope', mlp='swiglu', norm='rmsnorm', norm_place='branch')
    args.update(norm_final=False, tie_weights=False, exit_gate=True)
    return args


# -----------------------------------------------------------------------------
# checkpoint files of nanoGPT and of the original nanoLOOP: (model_args, weights) -> the same for GPT


def from_nanogpt(args, weights):
    """Translates a checkpoint of nanoGPT: its layers become the loop of a model that runs it once.

    Its first files have biases in the weights, but no entry bias in model_args.
    """
    weights = {
        name.replace('.h.', '.recur.'): w
        for name, w in without_wrappers(weights).items()
        if not name.endswith(('.attn.bias', '.attn.masked_bias'))  # the causal mask, which old files hold
    }
    args = dict(bias=any(name.endswith('.ln_1.bias') for name in weights)) | args
    args.update(n_prelude=0, n_block=args.pop('n_layer'), n_coda=0, n_loop=1, input_injection='passthrough')
    weights, tied = with_head(weights)
    return dict(args, norm='layernorm', norm_loop=False, tie_weights=tied), weights


def from_nanoloop(args, weights):
    """Translates a checkpoint of the original nanoLOOP, whose RMSNorm has torch's default epsilon.

    It truncates backpropagation even with passthrough, where the prelude then gets no gradient: GPTConfig
    refuses that, so all loops record a graph.
    """
    bptt_k = None if args.get('input_injection') == 'passthrough' else args.get('bptt_k')
    (weights, tied), eps = with_head(without_wrappers(weights)), torch.finfo(torch.float32).eps
    return dict(args, norm='rmsnorm', norm_eps=eps, bptt_k=bptt_k, tie_weights=tied), weights


# the parts of a weight's name that torch.compile, DDP and FSDP add, in any order
WRAPPERS = ('_orig_mod', 'module', '_fsdp_wrapped_module', '_checkpoint_wrapped_module')


def without_wrappers(weights):
    """Returns the weights without WRAPPERS in their names."""
    names = {name: '.'.join(part for part in name.split('.') if part not in WRAPPERS) for name in weights}
    return {names[name]: w for name, w in weights.items()}


def with_head(weights):
    """Returns the weights with a head, and whether it is the embedding: forks have heads of their own.

    A head that was not saved is the embedding.
    """
    name, embedding = 'lm_head.weight', weights.get('transformer.wte.weight')
    if embedding is None:  # load_weights will say so
        return weights, True
    head = weights.get(name, embedding)
    return weights | {name: head}, torch.equal(head, embedding)
