"""
Checkpoints: one way from a name to a model. The files: nanoloop/checkpoint_files.py.

    model, checkpoint = load_checkpoint('out-quickstart')

A name is the folder of a run, the path of a checkpoint, a folder written by export.py, or a name that
pretrained.py knows. A checkpoint is a dict as train.py saves it: model (the weights), model_args (values of
GPTConfig), tokenizer, config (the keys of the run), iter_num and more, with the path that it was read from.
"""

import warnings
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

from model import GPT, GPTConfig
from nanoloop.checkpoint_files import BEST, LATEST, checkpoint_paths, read_export, read_first
from nanoloop.checks import UserError, check
from nanoloop.datasets import find_data, read_meta
from nanoloop.growth import grow_rows
from nanoloop.pretrained import find_pretrained, from_nanogpt, from_nanoloop, ouro_tokenizer, read_config
from nanoloop.tokenizer import make_tokenizer

NAME_KINDS = 'the folder of a run with a checkpoint', 'a checkpoint', 'an export', 'gpt2 to gpt2-xl'
NAME_KINDS += "a folder of transformers' GPT-2", 'ouro:FOLDER'

WEIGHTS = 'raw', 'ema'  # which weights of a checkpoint are loaded: its own, or their average

# the keys of GPTConfig that may differ from the checkpoint's: the weights keep their meaning
CHANGEABLE = 'dropout bptt_k n_loop state_init state_std update_alpha rope_base block_size recompute'.split()


# -----------------------------------------------------------------------------
# from a name to a checkpoint


def find_checkpoint(name, given=None, prefer=LATEST, say=None, key='checkpoint', words=()):
    """Returns the checkpoint that a name stands for.

    given: {key: value} of GPTConfig, for GPT-2 only, see read_gpt2. prefer: files of a run's folder, tried in
    this order. say: called with a line about each broken file. key, words: for the error message: the key
    that has the name, and its values that are not names.
    Raises UserError if there is no such checkpoint, or none that loads.
    """
    name = str(name)
    if paths := checkpoint_paths(name, prefer):
        return read_first(paths, say)
    config = read_config(name)
    if config is not None and 'n_loop' in config:
        return read_export(Path(name), config)
    checkpoint = find_pretrained(name, given or {})
    if not checkpoint:
        fault = f'{name} holds no model' if Path(name).exists() else f'there is no folder {name}'
        raise UserError(f'{key}={name!r}: {fault}, expected {", ".join((*words, *NAME_KINDS))}')
    return checkpoint


def find_from_flags(
    init_from,
    out_dir,
    given=None,
    prefer=LATEST,
    say=None,
    words=('scratch', 'resume', 'auto'),
    weights='raw',
):
    """Returns the checkpoint that a script's --init_from and --out_dir name, None for random weights.

    weights: see take_weights.
    given, prefer, say: see find_checkpoint. words: the values of init_from that are no names, some of scratch
    (random weights), resume (out_dir has the name) and auto (resume if out_dir is the folder of a run with a
    checkpoint, else scratch).
    """
    if init_from not in words:
        checkpoint = find_checkpoint(init_from, given, prefer, say, 'init_from', words)
    elif init_from == 'scratch' or (init_from == 'auto' and not checkpoint_paths(out_dir, prefer)):
        check(weights != 'ema', 'weights', weights, f'raw with init_from={init_from}: there is no checkpoint')
        return None
    else:
        checkpoint = find_checkpoint(out_dir, given, prefer, say, 'out_dir')
    return take_weights(checkpoint, weights)


def find_model(c, say):
    """Returns the checkpoint with the model that a script's keys init_from, out_dir and weights name.

    say: called with a line about each broken file.
    """
    return find_from_flags(c.init_from, c.out_dir, None, BEST, say, words=('resume',), weights=c.weights)


def take_weights(checkpoint, weights):
    """Returns a checkpoint whose entry `model` has the weights that are to be loaded.

    weights: one of WEIGHTS. raw: the checkpoint as it is. ema: the average of those that were trained, see
    nanoloop/ema.py, beside the others; an entry `weights` says so. Raises UserError if there is no average.
    """
    if weights == 'raw':
        return checkpoint
    check(weights in WEIGHTS, 'weights', weights, f'one of {", ".join(WEIGHTS)}')
    expected = (
        f'raw: {checkpoint["path"]} has no average of the weights, which train.py saves with --ema=0.999'
    )
    check(checkpoint.get('ema'), 'weights', weights, expected)
    return checkpoint | dict(model=checkpoint['model'] | checkpoint['ema']['weights'], weights=weights)


def check_tokenizer(name):
    """Raises UserError if the model of that name has no tokenizer: before its weights are read."""
    folder = Path(name.removeprefix('ouro:'))
    if name.startswith('ouro:') and (folder / 'config.json').exists():
        spec = ouro_tokenizer(folder)
        check(spec, 'model', name, 'a folder with tokenizer.json, without it there is no text')
        make_tokenizer(spec)


def find_tokenizer(checkpoint):
    """Returns the tokenizer of a checkpoint. Raises UserError if nothing says which one it is."""
    plain = tokenizer_dict(checkpoint)
    dataset = checkpoint.get('config', {}).get('dataset', '')
    expected = f'one with a tokenizer, or with its data set in data/, which is {dataset!r}'
    check(plain is not None, 'checkpoint', checkpoint['path'], expected)
    return make_tokenizer(plain)


def describe_checkpoint(checkpoint, config, n_loop):
    """Returns a line on the checkpoint, the number of loops, and the numbers that it was trained with."""
    step, trained = int(checkpoint['iter_num']), checkpoint.get('loops_trained', [config.n_loop])
    at_step = f'step {step}, ' if step else ''
    at_step += 'the average of the weights, ' if checkpoint.get('weights') == 'ema' else ''
    note = '' if n_loop in trained else f', trained with {", ".join(map(str, trained))}'
    return f'{checkpoint["path"]}: {at_step}n_loop {n_loop}{note}'


def tokenizer_dict(checkpoint):
    """Returns the plain dict of a checkpoint's tokenizer, see make_tokenizer; None if nothing says which.

    A nanoGPT checkpoint has no tokenizer. It gets the one of its data set, or GPT-2's if vocab_size is
    GPT-2's.
    """
    if checkpoint.get('tokenizer') is not None:
        return checkpoint['tokenizer']
    dataset = checkpoint.get('config', {}).get('dataset', '')
    folder = find_data(dataset)
    is_folder = dataset and isinstance(folder, Path)  # others are generated, see datasets.find_data
    if is_folder and any((folder / name).exists() for name in ('meta.json', 'meta.pkl')):
        return read_meta(folder)['tokenizer']
    is_gpt2 = checkpoint['model_args']['vocab_size'] in (50257, 50304)  # 50304: padded to a multiple of 64
    return dict(kind='tiktoken', name='gpt2') if is_gpt2 else None


# -----------------------------------------------------------------------------
# from a checkpoint to a model


class Format(NamedTuple):
    """The way in which a program writes its checkpoints."""

    recognises: Callable  # model_args -> whether they are of this format
    translate: Callable  # (model_args, weights) -> values of GPTConfig, and weights with GPT's names


FORMATS = {  # the first that recognises model_args; each program has keys that those after it do not have
    'this program': Format(lambda args: 'norm' in args, lambda args, weights: (args, weights)),
    'the original nanoLOOP': Format(lambda args: 'n_prelude' in args, from_nanoloop),
    'nanoGPT': Format(lambda args: 'n_layer' in args, from_nanogpt),
}


def load_checkpoint(name, device='cpu', prefer=BEST, say=warnings.warn, weights='raw', **changes):
    """Returns (the model in eval mode, its checkpoint) of a name, or of a dict from find_checkpoint.

    prefer, say: see find_checkpoint. weights: see take_weights. changes: see configure_checkpoint. Raises
    UserError if the checkpoint is broken or does not fit, or if a change would give its weights another
    meaning.
    """
    checkpoint = name if isinstance(name, dict) else find_checkpoint(name, changes, prefer, say)
    checkpoint = take_weights(checkpoint, weights)
    config, values, fresh = configure_checkpoint(checkpoint, **changes)
    if growth := checkpoint.get('growth'):
        values = grow_rows(values, growth, config.tie_weights)
    model = GPT(config)
    load_weights(model, values | initial_values(model, fresh, values))
    return model.to(device).eval(), checkpoint


def configure_checkpoint(checkpoint, **changes):
    """Returns the GPTConfig of a checkpoint, its weights with GPT's names, and which parameters start anew.

    changes: values of GPTConfig that replace the checkpoint's. A smaller block_size keeps the first
    positions, exit_gate=True adds an untrained gate. The parameters that start anew are given by the
    beginnings of their names. Takes no memory for weights. Raises UserError if a change would give the
    weights another meaning. An entry `growth` of the checkpoint, see nanoloop/growth.py, sets vocab_size.
    """
    saved, weights = translate(checkpoint)
    if growth := checkpoint.get('growth'):
        saved.vocab_size = growth.size
    if 'S' in saved.window_pattern:  # half of the checkpoint's block_size, not of a smaller one given now
        window = saved.window_size or max(1, saved.block_size // 2)
        saved.window_size = min(window, changes.get('block_size', window))
    config = GPTConfig(**asdict(saved) | changes)
    new_gate = config.exit_gate and not saved.exit_gate
    for key, value in asdict(saved).items():
        changed = getattr(config, key)
        allowed = key in CHANGEABLE or (key == 'exit_gate' and new_gate)
        check(allowed or changed == value, key, changed, f'{value!r} as in the checkpoint')
    fresh = (*checkpoint.get('fresh', ()), *['exit_gate.'] * new_gate)
    return config, cut_positions(weights, config.block_size), fresh


def load_weights(model, weights):
    """Copies {name: tensor} into a model.

    Raises UserError unless names and shapes are the model's, and all weights finite.
    """
    own = model.state_dict()
    shared = own.keys() & weights.keys()
    for fault, names in (
        ('it lacks', own.keys() - shared),
        ('the model has no', weights.keys() - shared),
        (
            'the model has another shape of',
            {name for name in shared if own[name].shape != weights[name].shape},
        ),
    ):
        more = f' and {len(names) - 1} more' if len(names) > 1 else ''
        if names:
            raise UserError(f'the checkpoint does not fit: {fault} {min(names)}{more}')
    broken = next((name for name, weight in weights.items() if not weight.isfinite().all()), None)
    if broken:
        raise UserError(f'the checkpoint cannot be used: {broken} has values that are not finite')
    model.load_state_dict(weights)


def translate(checkpoint):
    """Returns the GPTConfig and the weights, with GPT's names, of a checkpoint in one of FORMATS."""
    args, weights = checkpoint['model_args'], checkpoint['model']
    form = next((form for form in FORMATS.values() if form.recognises(args)), None)
    check(form, 'checkpoint', checkpoint.get('path'), f'one of {", ".join(FORMATS)}')
    args, weights = form.translate(args, weights)
    try:
        return GPTConfig(**args), weights
    except TypeError as error:
        raise UserError(f'the checkpoint is of another program: {error}') from None


def cut_positions(weights, block_size):
    """Returns the weights with the first block_size position embeddings, if there are any."""
    name = 'transformer.wpe.weight'
    if name not in weights:
        return weights
    positions = len(weights[name])
    expected = f'at most {positions}: the checkpoint has no more positions'
    check(block_size <= positions, 'block_size', block_size, expected)
    return weights | {name: weights[name][:block_size]}


def initial_values(model, sections, weights):
    """Returns {name: value} of the parameters in `sections` that are missing in `weights`, from a new model.

    sections: beginnings of names, such as `inject.`.
    Only what a checkpoint cannot have starts anew. A parameter that is missing for another reason stays
    missing, and load_weights refuses the checkpoint.
    """
    state = model.state_dict().items()
    return {name: w for name, w in state if name not in weights and name.startswith(tuple(sections))}
