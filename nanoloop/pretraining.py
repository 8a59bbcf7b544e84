"""
Pretraining: builds model, batches and validation of a run on windows of a data set.
"""

import functools
import os
import subprocess
import sys
from dataclasses import asdict, fields
from typing import Any, NamedTuple

from model import GPT, GPTConfig
from nanoloop import LOCAL_RANK, PLACE
from nanoloop.added_tokens import extends, split_spec
from nanoloop.batches import row_batches, steps_of_epochs, steps_per_epoch, window_batches
from nanoloop.checkpoint import (
    configure_checkpoint,
    find_from_flags,
    load_checkpoint,
    tokenizer_dict,
    translate,
)
from nanoloop.checkpoint_files import checkpoint_paths
from nanoloop.checks import check
from nanoloop.datasets import describe, find_data, identify, open_split, read_meta
from nanoloop.evaluate import evaluate
from nanoloop.generated import Generated
from nanoloop.growth import plan_growth
from nanoloop.machine import prepare_training
from nanoloop.objective import check_loops
from nanoloop.parallel import max_over_ranks
from nanoloop.run_folder import check_out_dir, earlier_runs
from nanoloop.sizes import check_sizes
from nanoloop.text_files import count


class Task(NamedTuple):
    """The inputs of the training loop."""

    model: Any  # a GPT, on its device
    batches: Any  # a source of batches, see nanoloop/batches.py
    evaluate: Any  # () -> {split: {loss, ...}}, val at least, or None if a signal came first
    checkpoint_extra: dict  # further entries of the checkpoint: tokenizer and data, see datasets.identify
    origin: str = ''  # where the weights come from; '' = random
    row_tokens: int | None = None  # tokens of a row of a batch; None = block_size
    dropout: bool = True  # False: the model trains in eval mode, without dropout, as it samples


def pretraining(c, m, checkpoint, stopped, say):
    """Returns the Task of training on c.dataset, and settles c's keys of the model.

    checkpoint: the weights to begin with, or None. say: a report.Teller. Raises UserError.
    """
    check_micro_batches(c, m)
    folder, meta = prepare_data(c, m, say)
    config = settle_config(c, meta, checkpoint)
    sizes = c.block_size, c.vocab_size
    splits = {name: open_split(folder, meta, name, *sizes) for name in ('train', 'val')}
    check_sizes(c, m, config)
    # only now is memory taken: what a user can get wrong has been refused before
    model = build_model(c, m, config, checkpoint)
    say(describe(folder, meta))
    if c.vocab_size > 2 * meta['vocab_size']:
        say(f'vocab_size={c.vocab_size} is far above the {meta["vocab_size"]} of the data')
    batches = (row_batches if c.epochs else window_batches)(splits['train'], c, m)
    validate = functools.partial(evaluate, model, splits, c, m, meta['token_bytes'], stopped, say.now)
    kept = dict(tokenizer=meta['tokenizer'], data=identify(folder, meta))
    number = int(kept['data']['sha256'][:15], 16)
    same = max_over_ranks(m, number) == -max_over_ranks(m, -number)
    check(same, 'dataset', c.dataset, 'the same data on all machines, prepare it on each in the same way')
    return Task(model, batches, validate, kept, origin(c, checkpoint))


def settle_epochs(c, say=None):
    """Sets c.max_iters to the steps of c.epochs, if there are any. say: called with a line about them.

    Raises UserError with max_iters given as well, and for data that is not rows in files.
    """
    if c.epochs is None:
        return
    expected = f'None with max_iters={c.max_iters}: give one of the two, say --epochs=None'
    check('max_iters' not in c.given, 'epochs', c.epochs, expected)
    folder = find_data(c.dataset)
    meta = {} if isinstance(folder, Generated) else read_meta(folder)
    expected = f'None with dataset={c.dataset}: only the rows of a folder, as data/sft has, are counted; '
    check('row_len' in meta, 'epochs', c.epochs, f'{expected}give max_iters')
    n_rows = sum(file['tokens'] // meta['row_len'] for file in meta['splits']['train']['files'])
    c['max_iters'] = steps_of_epochs(n_rows, c)
    if say:
        rows, steps = count(n_rows, 'row'), count(steps_per_epoch(n_rows, c), 'step')
        say(f'epochs = {c.epochs:g}: {rows} in {steps}, max_iters = {c.max_iters}')


def check_micro_batches(c, m):
    """Raises UserError unless the processes can share the micro-batches of a step evenly."""
    n, world = c.gradient_accumulation_steps, m.world
    expected = f'a multiple of the {world} processes: {world}, {2 * world}, {4 * world}, ...'
    check(n % world == 0, 'gradient_accumulation_steps', n, expected)


def build_model(c, m, config, checkpoint):
    """Returns the GPT of a GPTConfig on the device, with a checkpoint's weights or, for None, random ones."""
    changes = {key: c[key] for key in given_keys(c)}
    model = GPT(config) if checkpoint is None else load_checkpoint(checkpoint, **changes)[0]
    model.to(m.device)
    prepare_training(model, m)
    return model


def find_initial_checkpoint(c, say=None):
    """Returns the checkpoint that c.init_from names, or None, and whether the run that saved it is resumed.

    A resumed run has the checkpoint's values for the keys that were not given now. say: called with
    a line about each broken file. Raises UserError if there is no such checkpoint.
    """
    check_out_dir(c.out_dir)
    if c.init_from in ('resume', 'auto') and not checkpoint_paths(c.out_dir):
        earlier = earlier_runs(c.out_dir)
        expected = f'a checkpoint in {c.out_dir}, there is none{earlier and f"; {earlier}"}'
        check(c.init_from == 'auto', 'init_from', c.init_from, expected)
        if earlier and say:
            say(f'init_from=auto: a new run begins, there is no checkpoint in {c.out_dir}; {earlier}')
    goes_on = c.init_from in ('resume', 'auto') and not c.eval_only
    expected = f'raw with init_from={c.init_from}, which goes on with the weights; a PATH takes their average'
    check(c.weights == 'raw' or not goes_on, 'weights', c.weights, expected)
    given = {key: c[key] for key in c.given}
    checkpoint = find_from_flags(c.init_from, c.out_dir, given, say=say, weights=c.weights)
    resuming = checkpoint is not None and c.init_from in ('resume', 'auto')
    if resuming:
        complete = 'format_version' in checkpoint
        check(complete, 'init_from', c.init_from, 'a path: that file has no state to resume')
        free = c.keys() - c.given - {'init_from', 'weights', 'out_dir'}
        c.update({key: value for key, value in checkpoint['config'].items() if key in free})
    return checkpoint, resuming


def prepare_data(c, m, say):
    """Returns the data set's folder and meta. pystdlib needs no download: it is prepared if it is missing.

    Rank 0 prepares it first. The first process of another machine then does so, too, unless it sees the same
    folder.
    """
    folder = find_data(c.dataset)
    for prepares in (m.rank == 0, LOCAL_RANK == 0) if c.dataset == 'pystdlib' else ():
        status = 0
        if prepares and not (folder / 'meta.json').exists():
            say('preparing data/pystdlib, the standard library of this Python')
            # a program that is started by a rank is none itself
            alone = {key: value for key, value in os.environ.items() if key not in PLACE}
            status = subprocess.run([sys.executable, folder / 'prepare.py'], env=alone).returncode
        if status := max_over_ranks(m, abs(status)):
            sys.exit(status)
    return folder, read_meta(folder)


def check_tokenizers(c, meta, checkpoint, config):
    """Raises UserError, with the characters that differ, unless data and checkpoint have one tokenizer.

    The data's may have tokens that were added, if the checkpoint grows.
    """
    data, weights = meta['tokenizer'], checkpoint.get('tokenizer') or meta['tokenizer']
    if data == weights or checkpoint.get('growth'):
        return
    expected = f'one in the tokens of the checkpoint: {config.vocab_size} of kind {weights["kind"]}'
    expected += f', not {meta["vocab_size"]} of kind {data["kind"]}'
    kind, _ = split_spec(weights)
    if kind != split_spec(data)[0] and (name := kind.get('name', kind['kind'])) not in ('char', 'tokenizers'):
        expected += f'; prepare it with --tokenizer {name}'
    if data['kind'] == weights['kind'] == 'char':
        sets = [('data', set(data['chars'])), ('checkpoint', set(weights['chars']))]
        for (name, own), (_, others) in (sets, sets[::-1]):
            if more := sorted(own - others):
                expected += f'; only the {name} has {" ".join(map(repr, more[:20]))}'
    if extends(data, weights):
        expected += '; --init_from=PATH with another out_dir adds the new tokens to the model of PATH'
    check(False, 'dataset', c.dataset, expected)


def find_growth(c, meta, checkpoint):
    """Returns the Growth of a checkpoint for the data's tokens, None if there are no new ones.

    A run that is resumed does not grow: its optimizer has a state for every row.
    """
    data, weights = meta['tokenizer'], checkpoint.get('tokenizer')
    if c.init_from in ('resume', 'auto') or data['kind'] != 'added' or data == weights:
        return None
    weights = weights or tokenizer_dict(checkpoint)
    vocab_size = c.vocab_size if 'vocab_size' in c.given else None
    return weights and plan_growth(weights, data, translate(checkpoint)[0].vocab_size, c.seed, vocab_size)


def given_keys(c):
    """Returns the keys of GPTConfig that a file or a flag has set."""
    return {field.name for field in fields(GPTConfig)} & c.given


def settle_config(c, meta, checkpoint):
    """Returns the GPTConfig of c's keys, or of the checkpoint with the keys that were given; also updates c.

    A checkpoint that has to grow for the tokens of the data gets an entry `growth`.
    Raises UserError for one that does not go with the data, the checkpoint, or the objective.
    """
    if checkpoint is None:
        c['vocab_size'] = c.vocab_size if 'vocab_size' in c.given else meta['vocab_size']
        if 'row_len' in meta and 'block_size' not in c.given:
            c['block_size'] = meta['row_len'] - 1
        config = c.build(GPTConfig)
    else:
        checkpoint['growth'] = find_growth(c, meta, checkpoint)
        config, *_ = configure_checkpoint(checkpoint, **{key: c[key] for key in given_keys(c)})
        check_tokenizers(c, meta, checkpoint, config)
    c.update(asdict(config))
    check_loops(c, config)
    return config


def origin(c, checkpoint):
    """Returns the line that says where the weights come from, '' for random ones."""
    if checkpoint is None:
        return ''
    had_gate = any('exit_gate.' in name for name in checkpoint['model'])
    gate = ', with a new exit gate' if c.exit_gate and not had_gate else ''
    growth = checkpoint.get('growth')
    grown = f', {growth}' if growth else ''
    name = checkpoint['path'] if c.init_from in ('resume', 'auto') else c.init_from
    average = 'average of the ' if checkpoint.get('weights') == 'ema' else ''
    return f'{average}weights of {name}, step {int(checkpoint.get("iter_num", 0))}{gate}{grown}'
