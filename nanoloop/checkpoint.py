"""
Checkpoint files: find, read and save them; load_checkpoint turns a name into a model.
"""

import contextlib
import os
import pickle
import shutil
import sys
from dataclasses import asdict
from pathlib import Path

import torch

from model import GPT, GPTConfig
from nanoloop import RANK
from nanoloop.checks import UserError, check
from nanoloop.pretrained import GPT2, find_pretrained

PLACES = 'the folder of a run with a checkpoint, the path of one, of a model by export.py or of a GPT-2'


# what a run may change while the weights keep their meaning
FREE = 'dropout bptt_k n_loop state_init state_std rope_base block_size recompute'.split()


EPS = torch.finfo(torch.float32).eps  # of torch's RMSNorm where none is given


def replace_by_link(source, target):
    """Makes target the same file as source, at once; a copy where the file system has no links."""
    new = target.with_name(target.name + '.tmp')
    new.unlink(missing_ok=True)
    try:
        os.link(source, new)
    except OSError:
        shutil.copyfile(source, new)
    os.replace(new, target)
    new.unlink(missing_ok=True)  # replacing a file by itself leaves the other name behind


def save_checkpoint(out_dir, checkpoint, log, best):
    """Writes ckpt.pt, and best.pt if best, with the place in the log. Raises OSError with the reason."""
    path, prev, new = (out_dir / name for name in ('ckpt.pt', 'prev.pt', 'ckpt.pt.tmp'))
    try:
        os.fsync(log.file)
        place = dict(log_bytes=os.fstat(log.file.fileno()).st_size, wandb_id=log.wandb_id)
        with open(new, 'wb') as file:
            torch.save(checkpoint | place, file)
            file.flush()
            os.fsync(file.fileno())
        if path.exists():
            replace_by_link(path, prev)
        if best:  # before ckpt.pt: after a crash in between the evaluation is made again
            replace_by_link(new, out_dir / 'best.pt')
        os.replace(new, path)
        folder = os.open(out_dir, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)
    except (RuntimeError, OSError) as error:  # torch's zip writer tells a full disk as a RuntimeError
        with contextlib.suppress(OSError):
            new.unlink(missing_ok=True)
        kept = next((str(file) for file in (path, prev) if file.exists()), 'none')
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise OSError(f'the checkpoint cannot be saved: {reason}; the last good one: {kept}') from None


def find_paths(path, names=('ckpt.pt', 'prev.pt')):
    """The checkpoints there are at path: the file itself, or those of names in a run's folder."""
    path = Path(path)
    return [path] if path.is_file() else [path / name for name in names if (path / name).exists()]


def read_checkpoint(path):
    """The dict of a checkpoint, on the CPU, mapped. Runs no code. Raises ValueError if it is broken."""
    try:
        checkpoint = torch.load(path, map_location='cpu', mmap=True, weights_only=True)
    except FileNotFoundError:
        raise UserError(f'there is no checkpoint {path}') from None
    except pickle.UnpicklingError:
        raise UserError(f'the checkpoint {path} is broken, or more than tensors and plain values') from None
    except (RuntimeError, OSError, EOFError) as error:  # torch gives any of them for a file that was cut
        reason = getattr(error, 'strerror', None) or 'it was cut, or is no checkpoint'
        raise UserError(f'the checkpoint {path} cannot be read: {reason}') from None
    whole = isinstance(checkpoint, dict) and all(
        isinstance(checkpoint.get(k), dict) for k in ('model', 'model_args')
    )
    check(whole, 'checkpoint', str(path), 'a file with model and model_args')
    return checkpoint | dict(path=str(path))


def read_first(paths):
    """The first of these checkpoints that loads; of those before it is told why not."""
    *others, last = paths
    for path in others:
        try:
            return read_checkpoint(path)
        except ValueError as error:
            if RANK == 0:
                print(error, file=sys.stderr)
    return read_checkpoint(last)


def find_checkpoint(init_from, out_dir, given=()):
    """The checkpoint init_from names, None for scratch. Raises ValueError if there is none that loads.

    given: {key: value} of GPTConfig, which decide how GPT-2's weights are used.
    """
    if init_from == 'scratch':
        return None
    named = init_from not in ('resume', 'auto')
    if paths := find_paths(init_from if named else out_dir):
        return read_first(paths)
    if init_from == 'auto':
        return None
    check(named, 'init_from', init_from, f'a checkpoint in {out_dir}, there is none')
    found = find_pretrained(init_from, given)
    check(found, 'init_from', init_from, f'scratch, resume, auto, {PLACES}, {", ".join(GPT2)}, ouro:FOLDER')
    return found


def quarantine_broken(out_dir):
    """Renames a ckpt.pt that cannot be read: the next save must not put it in the place of a good prev.pt."""
    path = out_dir / 'ckpt.pt'
    try:
        read_checkpoint(path)
    except ValueError:
        if path.exists():
            os.replace(path, out_dir / 'ckpt.pt.broken')


def load_checkpoint(path, device='cpu', **changes):
    """(GPT, checkpoint) from a file of this train.py, of nanoGPT, or of the original nanoLOOP.

    path: also what find_pretrained knows, or the dict that such a file holds. changes: GPTConfig values
    instead of the file's; a smaller block_size keeps the first positions, an exit_gate is added. Raises
    ValueError if it is broken, does not fit, or the changes give the weights another meaning.
    """
    checkpoint = path
    if not isinstance(path, dict):
        checkpoint = find_pretrained(str(path), changes) or read_checkpoint(path)
    args, weights = translate(checkpoint['model_args'], checkpoint['model'])
    try:
        config = GPTConfig(**args)
    except TypeError as error:
        raise UserError(f'the checkpoint is of another program: {error}') from None
    if 'S' in config.window_pattern:  # theirs, not half of a block_size given now, which may be shorter
        window = config.window_size or max(1, config.block_size // 2)
        config.window_size = min(window, changes.get('block_size', window))
    changed = GPTConfig(**dict(asdict(config), **changes))
    for key, theirs in asdict(config).items():
        value = getattr(changed, key)
        free = key in FREE or (key, value) == ('exit_gate', True)
        check(free or value == theirs, key, value, f'{theirs!r} as in the checkpoint')
    if (wpe := weights.get('transformer.wpe.weight')) is not None:
        wanted = f'at most {len(wpe)}: the checkpoint has no more positions'
        check(changed.block_size <= len(wpe), 'block_size', changed.block_size, wanted)
        weights = dict(weights, **{'transformer.wpe.weight': wpe[: changed.block_size]})
    model = GPT(changed)
    if changed.exit_gate and not config.exit_gate:
        gate = {name: w for name, w in model.state_dict().items() if name.startswith('exit_gate.')}
        weights = weights | gate
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise UserError(f'the checkpoint does not fit: {str(error).splitlines()[1].strip()}') from None
    return model.to(device), checkpoint


def translate(args, weights):
    """A checkpoint's (model_args, model) as values of GPTConfig and weights of GPT, even nanoGPT's."""
    if 'norm' in args:
        return args, weights
    weights = {name.removeprefix('_orig_mod.').removeprefix('module.'): w for name, w in weights.items()}
    if 'n_layer' not in args:  # nanoLOOP, which truncates even where the prelude then gets no gradient
        kept = None if args.get('input_injection') == 'passthrough' else args.get('bptt_k')
        return dict(args, norm='rmsnorm', norm_eps=EPS, bptt_k=kept), weights
    args = dict(args, n_prelude=0, n_block=args['n_layer'], n_coda=0, n_loop=1, input_injection='passthrough')
    del args['n_layer']
    masks = '.attn.bias'  # in old files
    weights = {name.replace('.h.', '.recur.'): w for name, w in weights.items() if not name.endswith(masks)}
    return dict(args, norm='layernorm', norm_loop=False), weights
