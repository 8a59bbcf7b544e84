"""
Reads the files of checkpoints, and finds those of a run's folder. nanoloop/saving.py writes them.
"""

import json
import pickle
import re
import zipfile
from pathlib import Path

import torch

from nanoloop.checks import UserError, check, missing_package
from nanoloop.files import is_utf8

# which file of a run's folder is read: the first of these that is not broken
LATEST = ('ckpt.pt', 'prev.pt')  # to resume training
BEST = ('best.pt', 'ckpt.pt', 'prev.pt')  # to use the model

EXPORTED = ('iter_num', 'loops_trained')  # further keys of a checkpoint that export.py writes


def checkpoint_paths(name, prefer=LATEST):
    """Returns the paths of the checkpoints that name stands for: of itself, or of files in a run's folder."""
    path = Path(name)
    return [path] if path.is_file() else [path / file for file in prefer if (path / file).exists()]


def read_first(paths, say=None):
    """Returns the first checkpoint that is not broken. say: called with the error of each broken one."""
    *others, last = paths
    for path in others:
        try:
            return read_checkpoint(path)
        except UserError as error:
            if say:
                say(str(error))
    return read_checkpoint(last)


def read_checkpoint(path):
    """Reads a checkpoint's file, memory-mapped if possible, on the CPU. No code in it is run.

    Raises UserError if it is broken: also if a byte has changed, for which torch does not look.
    """
    try:
        with open(path, 'rb') as file:
            is_pickle = file.read(1) == b'\x80'  # as torch before 1.6 wrote: it cannot be mapped
        damaged = None if is_pickle else find_damage(path)
        expected = f'a file without damage, the checksum of {damaged} is wrong'
        check(not damaged, 'checkpoint', str(path), expected)
        options = dict(map_location='cpu', weights_only=True)
        if is_pickle or not is_utf8(path):
            with open(path, 'rb') as file:
                checkpoint = torch.load(file, **options)
        else:
            checkpoint = torch.load(path, mmap=True, **options)
    except pickle.UnpicklingError as error:
        found = re.search(r'GLOBAL (\S+)', str(error))
        more = f', such as {found[1]}' if found else ''
        expected = f'is broken, or holds more than tensors and plain values{more}'
        raise UserError(f'the checkpoint {path} {expected}') from None
    except (RuntimeError, OSError, EOFError, zipfile.BadZipFile) as error:  # any of these if it was cut
        reason = getattr(error, 'strerror', None) or 'it was cut, or is no checkpoint'
        raise UserError(f'the checkpoint {path} cannot be read: {reason}') from None
    complete = isinstance(checkpoint, dict) and all(
        isinstance(checkpoint.get(key), dict) for key in ('model', 'model_args')
    )
    check(complete, 'checkpoint', str(path), 'a file with model and model_args')
    return checkpoint | dict(path=str(path))


def find_damage(path):
    """Returns the name of a record of a zip file whose checksum is wrong. It reads 2 GB/s.

    None if all are right, and also if all are wrong: then torch was told not to compute any.
    """
    wrong = []
    with zipfile.ZipFile(path) as file:
        for name in file.namelist():
            try:
                with file.open(name) as record:
                    while record.read(2**20):
                        pass
            except zipfile.BadZipFile:
                wrong.append(name)
        return wrong[0] if 0 < len(wrong) < len(file.namelist()) else None


def read_export(folder, args):
    """Reads a folder written by export.py as a checkpoint; args: its config.json, the values of GPTConfig."""
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError:
        raise missing_package(folder, 'pretrained', 'safetensors') from None
    try:
        with safe_open(folder / 'model.safetensors', 'pt') as file:
            model = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is no dict
            metadata = file.metadata() or {}
        training = {key: json.loads(metadata[key]) for key in EXPORTED if key in metadata}
        tokenizer = json.loads((folder / 'tokenizer.json').read_bytes())
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f'the exported model in {folder} cannot be read: {error}') from None
    if args.get('tie_weights', True):  # the file holds the shared matrix once, under either name
        embedding, head = 'transformer.wte.weight', 'lm_head.weight'
        model[embedding] = model[head] = model.get(embedding, model.get(head))
    checkpoint = dict(model=model, model_args=args, tokenizer=tokenizer, config={}, iter_num=0)
    return checkpoint | training | dict(path=str(folder))
