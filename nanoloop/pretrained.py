"""
Weights of others: GPT-2's through transformers, Ouro's safetensors, exports of this program.
"""

import contextlib
import json
from pathlib import Path

import torch

from model import GPTConfig
from nanoloop.checks import UserError, check

GPT2 = ('gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl')


CUT = ('n_prelude', 'n_block', 'n_coda', 'n_loop', 'input_injection')  # given: GPT-2 becomes a looped model


OURO = {  # GPT's names in a block, and Ouro's, stacked by rows
    'attn.c_attn': ('self_attn.q_proj', 'self_attn.k_proj', 'self_attn.v_proj'),
    'attn.c_proj': ('self_attn.o_proj',),
    'mlp.c_fc': ('mlp.gate_proj', 'mlp.up_proj'),
    'mlp.c_proj': ('mlp.down_proj',),
    'ln_1': ('input_layernorm',),
    'post_1': ('input_layernorm_2',),
    'ln_2': ('post_attention_layernorm',),
    'post_2': ('post_attention_layernorm_2',),
}


def find_pretrained(name, given):
    """The checkpoint of others' weights that name stands for, None if it is none of these.

    name: of GPT2, a folder of GPT-2 as transformers saves it, or ouro:FOLDER, of Ouro's safetensors. given:
    {key: value} of GPTConfig, see read_gpt2. Raises ValueError if it cannot be loaded.
    """
    if name.startswith('ouro:'):
        return read_ouro(Path(name.removeprefix('ouro:')))
    args = None
    with contextlib.suppress(ValueError, OSError):
        args = json.loads((Path(name) / 'config.json').read_text())
    there = isinstance(args, dict)
    if there and 'n_loop' in args:
        return read_export(Path(name), args)
    return read_gpt2(name, given) if there or name in GPT2 else None


def read_export(folder, args):
    """What export.py has written."""
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError:
        raise UserError(f'{folder} needs safetensors: pip install safetensors') from None
    try:
        with safe_open(folder / 'model.safetensors', 'pt') as file:
            model = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is no dict
            told = file.metadata() or {}
            trained = {key: json.loads(told[key]) for key in ('iter_num', 'loops_trained') if key in told}
        tokenizer = json.loads((folder / 'tokenizer.json').read_text())
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f'the exported model in {folder} cannot be read: {error}') from None
    if args.get('tie_weights', True):  # kept once, under either name
        ours, other = 'transformer.wte.weight', 'lm_head.weight'
        model[ours] = model[other] = model.get(ours, model.get(other))
    found = dict(model=model, model_args=args, tokenizer=tokenizer, config={}, iter_num=0, path=str(folder))
    return found | trained


def read_gpt2(name, given):
    """GPT-2 as a plain model or, if a key of CUT is given, cut into prelude, block and coda.

    A cut one has GPTConfig's values for the other keys of CUT, and n_block takes the layers that are left.
    With inject, which starts as u = e, n_loop 1 is GPT-2 still.
    """
    try:
        from transformers import GPT2LMHeadModel
    except ImportError:
        raise UserError(f'init_from={name!r} needs transformers: pip install transformers') from None
    try:
        theirs, info = GPT2LMHeadModel.from_pretrained(name, output_loading_info=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f'init_from={name!r} cannot be loaded: {str(error).splitlines()[0]}') from None
    c, model = theirs.config, {}
    missing = ', '.join(sorted(info['missing_keys']))
    check(not missing, 'init_from', name, f'all of GPT-2\'s weights, there is no {missing}')
    activations = {'gelu_new': 'gelu_tanh', 'gelu_pytorch_tanh': 'gelu_tanh', 'gelu': 'gelu'}
    plain = c.scale_attn_weights and not c.scale_attn_by_inverse_layer_idx
    wanted = f'attention scaled as in GPT-2, and an activation of {", ".join(activations)}'
    check(plain and c.activation_function in activations, 'init_from', name, wanted)
    if cut := {key: given[key] for key in CUT if key in given}:
        sizes = {key: cut.get(key, getattr(GPTConfig, key)) for key in CUT}
        ends = f'n_prelude={sizes["n_prelude"]}, n_coda={sizes["n_coda"]}'
        rest = c.n_layer - sizes['n_prelude'] - sizes['n_coda']
        check(rest >= 1, 'n_layer', c.n_layer, f'more of {name}: {ends} leave none for the loop')
        sizes['n_block'] = cut.get('n_block', rest)
        wanted = f'{rest}: it has {c.n_layer} layers, of which {ends}'
        check(sizes['n_block'] == rest, 'n_block', sizes['n_block'], wanted)
    else:
        sizes = dict(zip(CUT, (0, c.n_layer, 0, 1, 'passthrough'), strict=True))
    parts = dict(prelude=sizes['n_prelude'], recur=sizes['n_block'], coda=sizes['n_coda'])
    places = [f'{part}.{i}' for part, n in parts.items() for i in range(n)]
    for key, w in theirs.state_dict().items():
        if key.startswith('transformer.h.'):
            i, rest = key.removeprefix('transformer.h.').split('.', 1)
            key = f'transformer.{places[int(i)]}.{rest}'
            if rest.endswith(('c_attn.weight', 'c_proj.weight', 'c_fc.weight')):
                w = w.t()  # of a Conv1D
        model[key] = w
    if sizes['input_injection'] in ('inject', 'inject_random'):
        model['inject.weight'] = torch.eye(c.n_embd, 2 * c.n_embd)
        model['inject.bias'] = torch.zeros(c.n_embd)
    args = dict(sizes, n_head=c.n_head, n_embd=c.n_embd, n_hidden=c.n_inner, block_size=c.n_positions)
    args.update(vocab_size=c.vocab_size, bias=True, tie_weights=c.tie_word_embeddings, norm='layernorm')
    args.update(norm_eps=c.layer_norm_epsilon, norm_loop=False, mlp=activations[c.activation_function])
    tokenizer = dict(kind='tiktoken', name='gpt2') if c.vocab_size == 50257 else None
    return dict(model=model, model_args=args, tokenizer=tokenizer, config={}, iter_num=0, path=name)


def read_ouro(folder):
    """Ouro, from the config.json and the safetensors in folder; they know no tokenizer."""
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError:
        raise UserError(f'init_from=ouro:{folder} needs safetensors: pip install safetensors') from None
    files = sorted(folder.glob('*.safetensors'))
    wanted = 'a folder with config.json and *.safetensors'
    check(files and (folder / 'config.json').exists(), 'init_from', f'ouro:{folder}', wanted)
    try:
        c = json.loads((folder / 'config.json').read_text())
        weights = {name: w for file in files for name, w in load_file(file).items()}
        model = {'lm_head.weight': weights.pop('lm_head.weight')}
        model['transformer.wte.weight'] = weights.pop('model.embed_tokens.weight')
        model['norm_recur.weight'] = weights.pop('model.norm.weight')
        for name in ('weight', 'bias'):
            model[f'exit_gate.{name}'] = weights.pop(f'model.early_exit_gate.{name}')
        for i in range(c['num_hidden_layers']):
            for ours, theirs in OURO.items():
                rows = [weights.pop(f'model.layers.{i}.{name}.weight') for name in theirs]
                model[f'transformer.recur.{i}.{ours}.weight'] = torch.cat(rows)
        other = [*weights, *(key for key in ('rope_scaling', 'tie_word_embeddings') if c.get(key))]
        other += ['hidden_act'] * (c.get('hidden_act', 'silu') != 'silu')
        check(
            not other, 'init_from', f'ouro:{folder}', f'an Ouro, which has no {", ".join(sorted(other)[:3])}'
        )
        args = dict(n_prelude=0, n_block=c['num_hidden_layers'], n_coda=0, n_loop=c['total_ut_steps'])
        args.update(n_embd=c['hidden_size'], n_head=c['num_attention_heads'], mlp='swiglu')
        args.update(n_kv_head=c['num_key_value_heads'], n_hidden=c['intermediate_size'], pos='rope')
        args.update(rope_base=float(c['rope_theta']), norm_eps=c['rms_norm_eps'], vocab_size=c['vocab_size'])
        args.update(block_size=c['max_position_embeddings'], input_injection='passthrough')
    except KeyError as error:
        raise UserError(f'init_from=ouro:{folder}: there is no {error} in it, it is no Ouro') from None
    except UserError:
        raise
    except (ValueError, TypeError, RuntimeError, AttributeError, SafetensorError) as error:
        raise UserError(f'init_from=ouro:{folder} cannot be read: {str(error).splitlines()[0]}') from None
    args.update(norm='rmsnorm', norm_place='branch', norm_final=False, tie_weights=False, exit_gate=True)
    return dict(model=model, model_args=args, tokenizer=None, config={}, iter_num=0, path=str(folder))
