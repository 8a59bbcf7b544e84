"""
Weights of others: the checkpoints of nanoGPT and of the original nanoLOOP.
"""

import torch

EPS = torch.finfo(torch.float32).eps  # of torch's RMSNorm where none is given


def translate(args, weights):
    """(model_args, model) of a checkpoint of nanoGPT or nanoLOOP: GPTConfig's values, GPT's state dict."""
    weights = {name.removeprefix('_orig_mod.').removeprefix('module.'): w for name, w in weights.items()}
    if 'n_layer' not in args:  # nanoLOOP
        return dict(args, norm='rmsnorm', norm_eps=EPS), weights
    args = dict(args, n_prelude=0, n_block=args['n_layer'], n_coda=0, n_loop=1, input_injection='passthrough')
    del args['n_layer']
    masks = '.attn.bias'  # in old files
    weights = {name.replace('.h.', '.recur.'): w for name, w in weights.items() if not name.endswith(masks)}
    return dict(args, norm='layernorm', norm_loop=False), weights
