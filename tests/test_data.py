import ast
import errno
import fcntl
import gzip
import hashlib
import io
import itertools
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import ROOT

import sample
import train
from nanoloop import datasets, hub, prepare, prepare_script, pretraining
from nanoloop.checks import UserError
from nanoloop.datasets import Split, identify, read_meta
from nanoloop.files import hash_json, lock_folder, replace_file
from nanoloop.hub import HubDocuments, local_documents, write_hub
from nanoloop.nanogpt_data import nanogpt_meta
from nanoloop.prepare import Writer, write_text
from nanoloop.tokenizer import Bytes, Characters, Tiktoken, make_tokenizer


def numbers(folder, *sizes, split='train', tokenizer=None, shard_tokens=1, **more):
    """A data set whose tokens are 0, 1, 2, ..., in files of the given sizes."""
    tokenizer = tokenizer or Characters(map(chr, range(200, 200 + sum(sizes))))
    writer, first = Writer(folder, tokenizer, 'numbers', shard_tokens), 0
    for size in sizes:
        writer.add(split, range(first, first + size))
        first += size
    writer.finish(**more)
    return Split(folder, read_meta(folder), split, 4, first)


def test_what_is_written_is_read(tmp_path):
    text = tmp_path / 'input.txt'
    text.write_text('hello world\n' * 10)
    write_text(tmp_path, [text], Characters(sorted(set('hello world\n'))), 'me')
    meta = read_meta(tmp_path)
    ids = np.concatenate([np.fromfile(tmp_path / f'{name}.bin', '<u2') for name in ('train', 'val')])
    assert make_tokenizer(meta['tokenizer']).decode_bytes(ids.tolist()).decode() == text.read_text()
    assert [meta['splits'][name]['tokens'] for name in ('train', 'val')] == [108, 12]
    assert meta['vocab_size'] == 9 and meta['max_id'] == 8 and meta['source'] == 'me'
    assert not (tmp_path / 'unfinished').exists()


def test_bytes_keep_any_file(tmp_path):
    (tmp_path / 'odd').write_bytes(bytes(range(256)))
    write_text(tmp_path, [tmp_path / 'odd'], Bytes(), 'odd')
    ids = np.concatenate([np.fromfile(tmp_path / f'{name}.bin', '<u2') for name in ('train', 'val')])
    assert Bytes().decode_bytes(ids.tolist()) == bytes(range(256))


def test_whole_files_are_held_out(tmp_path):
    paths = [tmp_path / f'{i}.txt' for i in range(40)]
    for path in paths:
        path.write_text('x' * 50)
    write_text(tmp_path, paths, Bytes(), 'many', val_share=0.3)
    counts = [read_meta(tmp_path)['splits'][name]['tokens'] for name in ('train', 'val')]
    assert sum(counts) == 40 * 51 and all(n % 51 == 0 for n in counts) and 5 * 51 <= counts[1] <= 20 * 51


@pytest.mark.parametrize('tokenizer', [Bytes(), Characters('\n\u00e9ab')])
def test_a_tokenizer_survives_json(tokenizer):
    again = make_tokenizer(json.loads(json.dumps(tokenizer.spec)))
    assert again.decode_bytes(again.encode('ab\u00e9')).decode() == 'ab\u00e9'
    assert again.token_bytes == tokenizer.token_bytes


def test_unknown_characters_are_named():
    with pytest.raises(ValueError, match="does not know: 'Z'"):
        Characters('abc').encode('aZb')


def test_training_windows_reach_every_token_and_never_cross_files(tmp_path):
    split = numbers(tmp_path, 5, 9, 4, 7)  # the third is too short for a window
    x, y = split.draw(np.random.default_rng(0), 2000)
    assert (y == x + 1).all() and (np.diff(x) == 1).all()
    starts = set(x[:, 0].tolist())
    assert starts == {0, *range(5, 10), *range(18, 21)}


def test_evaluation_windows_hold_every_target_once(tmp_path):
    split = numbers(tmp_path, 5, 9, 4, 7)
    x, y = split.read_windows(split.eval_windows(), 10)
    assert sorted(y[y >= 0].tolist()) == [i for i in range(25) if i not in (0, 5, 14, 18)]
    assert (x[y >= 0] + 1 == y[y >= 0]).all()
    every = split.eval_windows()
    assert split.eval_windows(3) == [every[i * len(every) // 3] for i in range(3)]


def test_rows_are_taken_whole_and_masked_targets_are_left_out(tmp_path):
    tokenizer = Characters(map(chr, range(200, 230)))
    writer = Writer(tmp_path, tokenizer, 'rows')
    writer.add('train', range(30), mask=[i % 5 >= 3 for i in range(30)])
    writer.finish(row_len=5)
    split = Split(tmp_path, read_meta(tmp_path), 'train', 4, 30)
    x, y = split.draw(np.random.default_rng(0), 200)
    assert set(x[:, 0].tolist()) == {0, 5, 10, 15, 20, 25}
    assert (y[:, :2] == -1).all() and (y[:, 2:] == x[:, 2:] + 1).all()
    assert len(split.eval_windows()) == 6
    with pytest.raises(ValueError, match='block_size=8, expected 4: the data is rows of 5 tokens'):
        Split(tmp_path, read_meta(tmp_path), 'train', 8, 30)


def test_large_vocabularies_take_four_bytes(tmp_path):
    tokenizer = Bytes()
    tokenizer.token_bytes = [1] * 2**16
    assert Writer(tmp_path / 'small', tokenizer, 'x').dtype_name == 'uint16'
    tokenizer.token_bytes = [1] * (2**16 + 1)
    split = numbers(tmp_path, 10, tokenizer=tokenizer, shard_tokens=100)
    assert (tmp_path / 'train.bin').stat().st_size == 40
    assert split.draw(np.random.default_rng(0), 1)[0].shape == (1, 4)


def mixed_documents(writer, first, last, masks):
    """Adds documents first to last - 1 to train and val; with masks, some have one, from the fifth on."""
    for i in range(first, last):
        ids = np.arange(i, i + 3 + i % 4)
        mask = ids % 2 if masks and i > 3 and i % 4 != 3 else None
        writer.add('val' if i % 5 == 0 else 'train', ids, mask)


@pytest.mark.parametrize('masks', [False, True], ids=['plain', 'masks'])
@pytest.mark.parametrize('saved, lost', [(3, 0), (4, 3), (7, 1), (8, 4)])
def test_an_interrupted_preparation_goes_on_as_if_it_had_not_been(tmp_path, saved, lost, masks):
    tokenizer = Characters(map(chr, range(200, 240)))
    whole = Writer(tmp_path / 'whole', tokenizer, 'x', shard_tokens=10)
    mixed_documents(whole, 0, 12, masks)
    whole.finish()
    broken = Writer(tmp_path / 'broken', tokenizer, 'x', shard_tokens=10)
    mixed_documents(broken, 0, saved, masks)
    broken.save(saved)
    mixed_documents(broken, saved, saved + lost, masks)
    del broken
    with pytest.raises(ValueError, match='only half prepared: wait for its prepare.py, or run that again'):
        read_meta(tmp_path / 'broken')
    again = Writer(tmp_path / 'broken', tokenizer, 'x', shard_tokens=10)
    assert again.done == saved
    mixed_documents(again, again.done, 12, masks)
    again.finish()
    assert read_meta(tmp_path / 'broken') == read_meta(tmp_path / 'whole')
    assert len(read_meta(tmp_path / 'whole')['splits']['train']['files']) > 1
    names = sorted(path.name for path in (tmp_path / 'whole').iterdir())
    assert names == sorted(path.name for path in (tmp_path / 'broken').iterdir())
    assert any(name.endswith('.mask') for name in names) == masks
    for name in names:
        assert (tmp_path / 'whole' / name).read_bytes() == (tmp_path / 'broken' / name).read_bytes()


def test_an_unfinished_preparation_of_before_masks_goes_on(tmp_path):
    writer = Writer(tmp_path, Bytes(), 'x')
    writer.add('train', range(10))
    writer.save(1)
    path = tmp_path / 'unfinished' / 'state.json'
    state = json.loads(path.read_text())
    del writer, state['masked']
    path.write_text(json.dumps(state))
    again = Writer(tmp_path, Bytes(), 'x')
    assert again.done == 1
    again.finish()
    assert read_meta(tmp_path)['splits']['train']['tokens'] == 10


@pytest.mark.parametrize(
    'ids, told',
    [
        ([1.0, 2.5], 'ids=.float64.*, expected integers in one dimension'),
        (np.zeros((2, 2), np.int64), 'expected integers in one dimension'),
        ([3, -1], r'ids=\[-1, 3\], expected from 0 to 255, as its tokenizer has 256 ids'),
        (np.array([70000, 5]), r'ids=\[5, 70000\], expected from 0 to 255'),
        ([256], 'expected from 0 to 255'),
    ],
)
def test_ids_that_the_tokenizer_does_not_have_are_not_written(tmp_path, ids, told):
    writer = Writer(tmp_path, Bytes(), 'ids')
    with pytest.raises(ValueError, match=told):
        writer.add('train', ids)
    writer.add('train', [])
    writer.add('train', np.array([255, 0], np.uint8))
    writer.finish()
    assert np.fromfile(tmp_path / 'train.bin', '<u2').tolist() == [255, 0]


def test_masks_are_written_and_read_over_shards(tmp_path):
    writer = Writer(tmp_path, Characters(map(chr, range(200, 300))), 'x', shard_tokens=10)
    counts = {}  # token -> whether it counts; every token occurs once
    for i, size in enumerate((12, 5, 7, 3, 9, 14)):
        ids = range(len(counts), len(counts) + size)
        mask = [int(i == 4 or token % 3 == 0) for token in ids] if i in (2, 4) else None
        writer.add('train', ids, mask)
        counts |= dict(zip(ids, mask or [1] * size, strict=True))
    writer.add('val', range(5))
    writer.finish()
    meta = read_meta(tmp_path)
    files = meta['splits']['train']['files']
    assert len(files) == 4 and all((tmp_path / file['name']).with_suffix('.mask').exists() for file in files)
    for file in files:
        mask = (tmp_path / file['name']).with_suffix('.mask').read_bytes()
        assert hashlib.sha256(mask).hexdigest() == file['mask_sha256'] and len(mask) == file['tokens']
    assert not (tmp_path / 'val.mask').exists() and list(meta['splits']['val']['files'][0]) == [
        'name',
        'tokens',
        'sha256',
    ]
    split = Split(tmp_path, meta, 'train', 4, 100)
    _, targets = split.read_windows(split.eval_windows(), len(split.eval_windows()))
    starts = np.cumsum([0, *(file['tokens'] for file in files[:-1])])  # a file's first token is no target
    expected = [token for token, count in counts.items() if count and token not in starts]
    assert targets[targets != -1].tolist() == expected


@pytest.mark.parametrize(
    'mask, told',
    [
        ([1, 0], r'mask=\(2,\), expected the shape of the ids, \(3,\)'),
        ([[1, 0, 1]], r'mask=\(1, 3\), expected'),
        ([1, 0, 2], r'mask=\[0, 1, 2\], expected 0 or 1 for every token'),
        ([1, 0.5, 0], 'expected 0 or 1 for every token'),
    ],
)
def test_a_mask_that_does_not_fit_is_refused(tmp_path, mask, told):
    writer = Writer(tmp_path, Bytes(), 'x')
    with pytest.raises(ValueError, match=told):
        writer.add('train', [1, 2, 3], mask)
    writer.add('train', [1, 2, 3])
    writer.finish()
    assert not (tmp_path / 'train.mask').exists()
    assert read_meta(tmp_path)['splits']['train']['tokens'] == 3


def test_a_set_prepared_again_without_masks_has_none(tmp_path):
    for masks in (True, False):
        writer = Writer(tmp_path, Bytes(), 'x', shard_tokens=10)
        for _ in range(2 if masks else 1):  # in two shards, then in one
            writer.add('train', range(10), [0] * 10 if masks else None)
        writer.finish()
        assert len(list(tmp_path.glob('*.mask'))) == (2 if masks else 0)
    assert not Split(tmp_path, read_meta(tmp_path), 'train', 4, 256).masked


def test_a_mask_that_is_lost_is_missed(tmp_path):
    writer = Writer(tmp_path, Bytes(), 'x')
    writer.add('train', range(10), [0] * 10)
    writer.finish()
    (tmp_path / 'train.mask').unlink()
    with pytest.raises(ValueError, match='train.mask is missing, meta.json names it'):
        Split(tmp_path, read_meta(tmp_path), 'train', 4, 256)


def test_another_source_does_not_go_on_with_the_rest(tmp_path):
    writer = Writer(tmp_path, Bytes(), 'one')
    writer.add('train', [1, 2, 3])
    writer.save(1)
    with pytest.raises(ValueError, match='being prepared by another process'):
        Writer(tmp_path, Bytes(), 'two')
    del writer
    assert Writer(tmp_path, Characters('ab'), 'one').done == 0
    assert Writer(tmp_path, Bytes(), 'two').done == 0


def test_preparing_text_again_does_not_go_on_with_the_rest(tmp_path):
    (tmp_path / 'input.txt').write_text('0123456789' * 10)
    writer = Writer(tmp_path, Bytes(), 'me')
    writer.add('train', [1, 2, 3])
    writer.save(1)
    del writer
    write_text(tmp_path, [tmp_path / 'input.txt'], Bytes(), 'me')
    assert [split['tokens'] for split in read_meta(tmp_path)['splits'].values()] == [90, 10]


@pytest.mark.parametrize('size', [1, 7, 50, 1000])
def test_text_is_encoded_in_pieces_of_whole_lines(size):
    text = '\n'.join('x' * (i % 13) for i in range(40)) + '\nend'
    parts = list(prepare.split_text(text, size))
    assert ''.join(parts) == text and all(part.endswith('\n') for part in parts[:-1])
    assert len(parts) > 3 or size == 1000


def test_files_are_held_out_by_their_names_wherever_they_lie(tmp_path):
    held = []
    for place in ('a', 'b/c'):
        (tmp_path / place).mkdir(parents=True)
        paths = [tmp_path / place / f'{i}.txt' for i in range(30)]
        for i, path in enumerate(paths):
            path.write_text(chr(60 + i))
        write_text(tmp_path / place / 'out', paths, Bytes(), 'x', val_share=0.3)
        held.append((tmp_path / place / 'out' / 'val.bin').read_bytes())
    assert held[0] == held[1] != b''


def test_every_file_is_on_the_disk_before_the_set_counts(tmp_path, monkeypatch):
    synced, moved = {}, []
    real = os.replace

    def fsync(fd):
        synced[os.fstat(fd).st_ino] = os.fstat(fd).st_size

    def replace(source, target):
        moved.append(str(target))
        assert synced[os.stat(source).st_ino] == os.stat(source).st_size
        named = tmp_path.stat().st_ino in synced  # the files' names are, too
        assert not str(target).endswith('meta.json') or named
        real(source, target)

    monkeypatch.setattr(os, 'fsync', fsync)
    monkeypatch.setattr(os, 'replace', replace)
    writer = Writer(tmp_path, Characters(map(chr, range(200, 240))), 'x', shard_tokens=4)
    mixed_documents(writer, 0, 12, masks=True)
    writer.finish()
    shards = [path for path in moved if path.endswith(('.bin', '.mask'))]
    assert len(shards) == 18 and moved[-1].endswith('meta.json')


def test_what_the_files_hold_is_checked_when_it_is_drawn(tmp_path):
    numbers(tmp_path, 10, shard_tokens=100)
    np.full(10, 77, '<u2').tofile(tmp_path / 'train.bin')  # as long as before
    split = Split(tmp_path, read_meta(tmp_path), 'train', 4, 10)
    with pytest.raises(ValueError, match='expected at least 78'):
        split.draw(np.random.default_rng(0), 1)
    (tmp_path / 'train.mask').write_bytes(bytes(9))
    with pytest.raises(ValueError, match='train.mask has 9 bytes, meta.json says 10'):
        Split(tmp_path, read_meta(tmp_path), 'train', 4, 10)


def test_data_that_is_replaced_does_not_change_a_run_that_reads_it(tmp_path):
    split = numbers(tmp_path, 10, shard_tokens=100)
    draw = lambda: split.draw(np.random.default_rng(0), 3)  # noqa: E731
    before = draw()
    numbers(tmp_path, 20, shard_tokens=100)  # prepared anew: other files of the same names
    assert all((a == b).all() for a, b in zip(draw(), before, strict=True))
    again = Split(tmp_path, read_meta(tmp_path), 'train', 4, 20)
    content = again.files[0].read_bytes()
    time.sleep(0.01)
    again.files[0].write_bytes(content)  # the same, written over it
    again.draw(np.random.default_rng(0), 3)
    for other in (bytes(len(content)), content[:6]):
        again.files[0].write_bytes(other)
        with pytest.raises(ValueError, match='train.bin has changed while it was read'):
            again.draw(np.random.default_rng(0), 3)


def test_a_read_that_overlaps_a_copy_of_the_same_content_is_made_again(tmp_path, monkeypatch):
    split, real = numbers(tmp_path, 10, shard_tokens=100), os.pread
    content, calls = split.files[0].read_bytes(), []

    def pread(*args):
        calls.append(1)
        if len(calls) > 1:
            return real(*args)
        split.files[0].write_bytes(bytes(len(content)))
        half_way = real(*args)
        split.files[0].write_bytes(content)
        return half_way

    time.sleep(0.01)  # so that the copy has a time of its own
    monkeypatch.setattr(os, 'pread', pread)
    inputs, targets = split.read_window(0, 2)
    assert inputs.tolist() == [2, 3, 4, 5] and targets.tolist() == [3, 4, 5, 6] and len(calls) == 2


def test_a_data_set_is_known_by_its_content(tmp_path):
    numbers(tmp_path / 'a', 10, shard_tokens=100), numbers(tmp_path / 'b', 10, shard_tokens=100)
    numbers(tmp_path / 'c', 11, shard_tokens=100)
    a, b, c = (identify(tmp_path / name, read_meta(tmp_path / name))['sha256'] for name in 'abc')
    assert a == b != c
    for name, last in (('d', 1), ('e', 1), ('f', 2)):  # of nanoGPT
        (tmp_path / name).mkdir()
        for split in ('train', 'val'):
            np.array([0] * 99 + [last], '<u2').tofile(tmp_path / name / f'{split}.bin')
    d, e, f = (identify(tmp_path / name, nanogpt_meta(tmp_path / name))['sha256'] for name in 'def')
    assert d == e != f


def test_a_crash_while_files_are_moved_is_not_taken_for_a_finished_set(tmp_path, monkeypatch):
    numbers(tmp_path, 10, shard_tokens=100)
    real, calls = os.replace, []

    def replace(source, target):
        calls.append(target)
        if str(target).endswith('meta.json'):
            raise OSError('power cut')
        real(source, target)

    monkeypatch.setattr(os, 'replace', replace)
    with pytest.raises(OSError, match='power cut'):
        numbers(tmp_path, 20, shard_tokens=100)
    monkeypatch.undo()
    assert not (tmp_path / 'meta.json').exists()
    Writer(tmp_path, Bytes(), 'texts', resume=False).release_lock()  # another one that does not end
    with pytest.raises(ValueError, match='only half prepared'):  # nor for a folder of nanoGPT
        read_meta(tmp_path)
    assert numbers(tmp_path, 20, shard_tokens=100).tokens.tolist() == [20]


def test_hub_sets_are_tokenised_sharded_and_resumed(tmp_path, monkeypatch):
    datasets = pytest.importorskip('datasets')
    (tmp_path / 'tiktoken_ext').mkdir()
    (tmp_path / 'tiktoken_ext' / 'letters.py').write_text(
        "import os\ndef letters():\n    if 'ENDS_AT_ONCE' in os.environ:\n        os._exit(9)\n"
        "    ranks = {bytes([i]): i for i in range(256)}\n    return dict(name='letters', "
        "pat_str=r'\\s?\\w+|\\s+', mergeable_ranks=ranks, special_tokens={'<|endoftext|>': 256})\n"
        "ENCODING_CONSTRUCTORS = {'letters': letters}\n"
    )
    python_path = f'{tmp_path}{os.pathsep}{os.environ.get("PYTHONPATH", "")}'
    monkeypatch.setenv('PYTHONPATH', python_path)  # for the workers
    monkeypatch.syspath_prepend(tmp_path)
    registry = pytest.importorskip('tiktoken').registry
    registry._available_plugin_modules.cache_clear()  # another test may have filled it
    monkeypatch.setattr(registry, 'ENCODING_CONSTRUCTORS', None)
    texts = [f'document {i}' for i in range(40)]
    datasets.Dataset.from_dict(dict(text=texts)).to_parquet(tmp_path / 'a.parquet')
    options = dict(tokenizer=Tiktoken('letters'), val_share=0.2, processes=1, shard_tokens=100)
    source, splits = HubDocuments('parquet', data_files=[str(tmp_path / 'a.parquet')]), {'train': 'train'}
    write_hub(tmp_path / 'whole', source, splits, **options)
    meta = read_meta(tmp_path / 'whole')
    documents = []
    for split in meta['splits'].values():
        for file in split['files']:
            ids = np.fromfile(tmp_path / 'whole' / file['name'], '<u2')
            documents += bytes(np.where(ids == 256, 10, ids).astype(np.uint8)).decode().splitlines()
    assert sorted(documents) == sorted(texts) and set(meta['splits']) == {'train', 'val'}
    assert meta['token_bytes'][256] == 0

    few = HubDocuments('parquet', data_files=[str(tmp_path / 'a.parquet')], max_documents=30)
    write_hub(tmp_path / 'few', few, splits, **options)
    files = [np.fromfile(path, '<u2') for path in (tmp_path / 'few').glob('*.bin')]
    assert sum((ids == 256).sum() for ids in files) == 30

    real = Writer.save
    monkeypatch.setattr(hub, 'DOCUMENTS_PER_SAVE', 8)

    def dies(writer, done):
        real(writer, done)
        if done['train'] == 24:
            raise KeyboardInterrupt

    monkeypatch.setattr(Writer, 'save', dies)
    with pytest.raises(KeyboardInterrupt):
        write_hub(tmp_path / 'broken', source, splits, **options)
    monkeypatch.setattr(Writer, 'save', real)
    write_hub(tmp_path / 'broken', source, splits, **options)
    assert read_meta(tmp_path / 'broken') == meta
    monkeypatch.setenv('ENDS_AT_ONCE', '1')
    with pytest.raises(
        OSError, match='a process that encodes has ended.*goes on from document 0, .*--processes'
    ):
        write_hub(tmp_path / 'dead', source, splits, **options)
    (tmp_path / 'text.parquet').write_text('text')
    with pytest.raises(ValueError, match='text.parquet.* cannot be read'):
        HubDocuments('parquet', data_files=[str(tmp_path / 'text.parquet')]).read('train', 0)
    with pytest.raises(ValueError, match="column='words', expected one of text"):
        HubDocuments('parquet', 'words', data_files=[str(tmp_path / 'a.parquet')]).read('train', 0)


def tables(folder, **columns):
    """Writes a table as parquet, jsonl, compressed jsonl, json and csv. Returns {suffix: path}."""
    datasets = pytest.importorskip('datasets')
    table = datasets.Dataset.from_dict(columns)
    names = ['a.parquet', 'a[1].jsonl', 'a.jsonl.gz', 'a.json', 'a.csv']
    paths = {name.partition('.')[2]: folder / name for name in names}
    table.to_parquet(paths['parquet'])
    table.to_json(paths['jsonl'])
    table.to_csv(paths['csv'])
    paths['jsonl.gz'].write_bytes(gzip.compress(paths['jsonl'].read_bytes()))
    rows = [json.loads(line) for line in paths['jsonl'].read_text().splitlines()]
    paths['json'].write_text(json.dumps(rows))
    return paths


@pytest.mark.parametrize('suffix', ['parquet', 'jsonl', 'jsonl.gz', 'json', 'csv'])
def test_tables_of_all_formats_are_read_by_a_column_of_any_name(tmp_path, monkeypatch, suffix):
    monkeypatch.setenv('HF_HOME', str(tmp_path / 'hf'))
    path = tables(tmp_path, id=[1, 2, 3], body=['a b', None, 'c'])[suffix]
    documents = local_documents([path], 'body')
    texts, total = documents.read('train', 0)
    assert list(texts) == ['a b', None, 'c'] and total == 3
    assert list(documents.read('train', 2)[0]) == ['c'] and list(documents.texts(['train'])) == ['a b', 'c']
    assert list(local_documents([path], 'body', max_documents=1).read('train', 0)[0]) == ['a b']
    with pytest.raises(ValueError, match="column='text', expected one of id, body"):
        local_documents([path]).open('train')
    with pytest.raises(ValueError, match="column='id', expected a column of text, it has int64"):
        local_documents([path], 'id').open('train')


def test_what_is_no_table_is_told_before_the_work(tmp_path):
    paths = tables(tmp_path, body=['a', 'b'])
    for name in ('b.txt', 'b.csv.gz', '.hidden.jsonl', 'broken.parquet'):
        (tmp_path / name).write_text('x')
    (tmp_path / 'texts').mkdir()
    (tmp_path / 'texts' / 'a.txt').write_text('x')
    for given, told in [
        ([tmp_path / 'none.parquet'], 'none.parquet: there is no such file or folder'),
        (
            [tmp_path / 'b.txt'],
            r'b.txt., expected a table, .parquet, .*; a text is for data/text/prepare.py --input',
        ),
        ([tmp_path / 'b.csv.gz'], 'expected a table, .parquet'),
        (
            [tmp_path / 'texts'],
            r'texts: there is no table in it, .parquet.*left out: 1 text \(a.txt\); a text is for data/text',
        ),
        ([paths['csv'], paths['parquet']], r"input=\['csv', 'parquet'\], expected files of one format"),
        ([tmp_path / 'broken.parquet'], 'broken.parquet cannot be read'),
    ]:
        with pytest.raises(ValueError, match=told):
            local_documents(given, 'body')
    (tmp_path / 'b.txt').rename(tmp_path / 'b.jsonl')
    with pytest.raises(ValueError, match=f'^{tmp_path}/b.jsonl cannot be read'):
        local_documents([tmp_path / 'b.jsonl'], 'body').open('train')
    (tmp_path / 'folder').mkdir()
    for i in range(3):
        shutil.copy(paths['jsonl'], tmp_path / 'folder' / f'{i}.jsonl')
    for name in ('.hidden.jsonl', 'texts/a.txt'):
        shutil.copy(tmp_path / name, tmp_path / 'folder')
    shutil.copy(tmp_path / 'texts' / 'a.txt', tmp_path / 'folder' / 'b.txt')
    for name in ('folder', 'folder/*.jsonl'):
        lines = []
        assert local_documents([tmp_path / name], 'body', lines.append).read('train', 0)[1] == 6
        told = [f'{tmp_path}/folder: 3 tables; left out: 1 hidden (.hidden.jsonl), 2 texts (a.txt)']
        assert lines == (told if name == 'folder' else [])


def test_tables_may_differ_in_their_other_columns(tmp_path, monkeypatch):
    monkeypatch.setenv('HF_HOME', str(tmp_path / 'hf'))
    datasets = pytest.importorskip('datasets')
    for name, columns in dict(a=dict(body=['a'], id=[1]), b=dict(body=['b'], url=['x'])).items():
        datasets.Dataset.from_dict(columns).to_parquet(tmp_path / f'{name}.parquet')
    assert list(local_documents([tmp_path / '*.parquet'], 'body').texts(['train'])) == ['a', 'b']


def test_every_setting_that_changes_the_tokens_begins_anew(tmp_path, monkeypatch):
    paths, seen = tables(tmp_path, body=['a', 'b'], text=['c', 'd']), []

    def stop(*args, made_from, say):
        seen.append(hash_json(made_from))
        raise KeyboardInterrupt

    monkeypatch.setattr(hub, 'Writer', stop)
    changes = [{}, dict(eot=False), dict(special=True), dict(val_share=0.2), dict(shard_tokens=9)]
    inputs = [{}, dict(column='body'), dict(max_documents=1)]
    for change, given in [*((change, {}) for change in changes), *(({}, given) for given in inputs[1:])]:
        with pytest.raises(KeyboardInterrupt):
            documents = local_documents([paths['parquet']], **given)
            write_hub(tmp_path, documents, {'train': 'train'}, tokenizer=Bytes(), **change)
    os.utime(paths['parquet'], (0, 0))  # as if it had been written again
    with pytest.raises(KeyboardInterrupt):
        documents = local_documents([paths['parquet']])
        write_hub(tmp_path, documents, {'train': 'train'}, tokenizer=Bytes())
    assert len(set(seen)) == len(seen) == 8


@pytest.mark.parametrize('total', [1, 2, 30, 300, 20000, None])
@pytest.mark.parametrize('share', [None, 1e-6, 0.1, 0.6])
def test_any_number_of_documents_has_some_held_out(total, share):
    held_out = hub.choose_documents(share, total)
    count = sum(map(held_out, range(total or 10**5)))
    if share is None:
        expected = {1: 1, 2: 1, 30: 3, 300: 30, 20000: 50, None: 50}[total]
        assert count == expected if total else abs(count - expected) < 20
    elif total is not None:
        assert count == max(1, min(total - 1, round(share * total)))
    if share and total == 300:  # of many, each is chosen by itself
        many = hub.choose_documents(share, 10**6)
        assert all(many(i) == (hub.hash_fraction(str(i)) < share) for i in range(99))


class Stream:
    """HubDocuments that are read over the network."""

    column = 'text'

    def __init__(self, length, max_documents=None):
        self.length, self.max_documents = length, max_documents

    def read(self, split, first):
        return (str(i) for i in range(first, min(self.length, self.max_documents or self.length))), None


class Plain:
    """A pool of processes that encodes here, in tokens of one byte."""

    def map(self, function, texts, chunksize):
        return ((list(text.encode()) + [10], '') for text in texts)


@pytest.mark.parametrize(
    'length, most, share, expected',
    [
        (5000, None, None, 50),
        (5000, 9000, None, 50),
        (300, 9000, None, 30),
        (99999, 9000, None, 50),
        (99999, 20000, None, 50),
        (99999, 9000, 0.3, 2700),
        (8192, 8192, 0.1, 819),
    ],
)
def test_a_stream_has_the_documents_held_out_that_a_table_has(tmp_path, length, most, share, expected):
    writer = Writer(tmp_path, Bytes(), 'x')
    hub.add_documents(writer, Plain(), Stream(length, most), 'train', 'train', share, False, None)
    assert hub.sum_documents(writer) == min(length, most or length)
    hub.finish(writer, None)
    assert (np.fromfile(tmp_path / 'val.bin', '<u2') == 10).sum() == expected


def test_the_rest_of_a_stream_is_divided_as_its_start(tmp_path, monkeypatch):
    monkeypatch.setattr(hub, 'DOCUMENTS_PER_SAVE', 100)
    content = []
    for stops in (False, True):
        folder = tmp_path / str(stops)
        writer = Writer(folder, Bytes(), 'x')
        if stops:

            def save(self, done, real=Writer.save):
                real(self, done)
                if done['train'] == 200:
                    raise KeyboardInterrupt

            with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
                m.setattr(Writer, 'save', save)
                hub.add_documents(writer, Plain(), Stream(999, 500), 'train', 'train', None, False, None)
            writer.release_lock()
            writer = Writer(folder, Bytes(), 'x')
        hub.add_documents(writer, Plain(), Stream(999, 500), 'train', 'train', None, False, None)
        hub.finish(writer, None)
        content.append([(folder / f'{split}.bin').read_bytes() for split in ('train', 'val')])
    assert content[0] == content[1] and content[0][1].count(b'\n') == 50


@pytest.mark.parametrize('streaming', [False, True])
def test_a_broken_table_is_told_in_one_line(tmp_path, monkeypatch, capfd, streaming):
    monkeypatch.setenv('HF_HOME', str(tmp_path / 'hf'))
    pytest.importorskip('datasets')
    (tmp_path / 'a.jsonl').write_text('{"text": "a"}\n{"text": broken\n')
    capfd.readouterr()
    with pytest.raises(ValueError, match='a.jsonl cannot be read: JSON parse error') as caught:
        list(local_documents([tmp_path / 'a.jsonl'], streaming=streaming).texts(['train']))
    assert caught.type is UserError and capfd.readouterr() == ('', '')


def test_documents_without_text_and_those_that_cannot_be_encoded_are_counted(tmp_path):
    class Pool:
        def map(self, function, texts, chunksize):
            return [(None, 'too long') if text == 'long' else (list(text.encode()), '') for text in texts]

    class Documents:
        column, max_documents = 'text', None

        def read(self, split, first):
            return iter(['ab', None, 'long', 'cd', 'ef'][first:]), None

    writer, lines = Writer(tmp_path, Bytes(), 'x'), []
    hub.add_documents(writer, Pool(), Documents(), 'train', 'train', 0.5, False, None)
    hub.finish(writer, lines.append)
    assert lines[0] == '2 of 5 documents are left out: they are empty (null) or cannot be encoded'
    assert sum(split['tokens'] for split in read_meta(tmp_path)['splits'].values()) == 6
    Documents.read = lambda self, split, first: (iter(['ab', 3]), 2)
    with pytest.raises(ValueError, match="column='text', expected a column of text, it has int"):
        hub.add_documents(
            Writer(tmp_path, Bytes(), 'y'), Pool(), Documents(), 'train', 'train', 0.5, False, None
        )


def test_a_set_without_documents_for_a_split_is_told(tmp_path):
    writer = Writer(tmp_path, Bytes(), 'x')
    writer.add('val', [1, 2])
    writer.save(dict(train=1))
    with pytest.raises(ValueError, match='train would be empty with 1 documents: take more'):
        hub.finish(writer, None)


def test_another_input_or_setting_begins_anew_with_a_line(tmp_path):
    writer, lines = Writer(tmp_path, Bytes(), 'x', made_from=dict(size=1)), []
    writer.add('train', [1, 2, 3])
    writer.save(1)
    del writer
    again = Writer(tmp_path, Bytes(), 'x', made_from=dict(size=1), say=lines.append)
    assert again.done == 1 and not lines
    del again
    other = Writer(tmp_path, Bytes(), 'x', made_from=dict(size=2), say=lines.append)
    assert (
        other.done == 0 and len(lines) == 1 and 'another text or settings, this one begins anew' in lines[0]
    )


@pytest.mark.parametrize('size, finished', [(1, True), (2, False)])
def test_a_second_preparation_waits_and_takes_the_set_if_it_is_its_own(tmp_path, size, finished):
    first, lines = Writer(tmp_path, Bytes(), 'x', made_from=dict(size=1)), []

    def say(line):
        lines.append(line)
        if 'waiting' in line:  # the other one goes on meanwhile
            first.add('train', [1, 2, 3])
            first.finish()

    second = Writer(tmp_path, Bytes(), 'x', made_from=dict(size=size), say=say)
    assert lines[0] == f'{tmp_path} is being prepared by another process, waiting for it'
    assert second.done_by_another == finished and (tmp_path / 'unfinished').exists() != finished
    assert ('was prepared by the other process' in lines[-1]) == finished
    assert read_meta(tmp_path)['splits']['train']['tokens'] == 3


def test_a_file_system_without_locks_is_told_and_written_to(tmp_path, monkeypatch):
    def no_locks(file, operation):
        raise OSError(errno.ENOLCK, 'No locks available')

    monkeypatch.setattr(fcntl, 'flock', no_locks)
    lines = []
    writer = Writer(tmp_path, Bytes(), 'x', say=lines.append)
    writer.add('train', [1, 2, 3])
    writer.finish()
    assert lines == [f'{tmp_path} cannot be locked against a second preparation: No locks available']
    assert read_meta(tmp_path)['splits']['train']['tokens'] == 3


def test_a_process_that_encodes_ends_with_the_one_that_started_it(monkeypatch):
    ended = []
    monkeypatch.setattr(hub.os, '_exit', ended.append)
    monkeypatch.setattr(hub.os, 'setpgrp', lambda: ended.append('own group'))
    parent = SimpleNamespace(join=lambda: ended.append('parent'))
    monkeypatch.setattr(hub.multiprocessing, 'parent_process', lambda: parent)
    hub.start_worker(dict(kind='byte'), [10], False)
    while len(ended) < 3:
        time.sleep(0.01)
    assert ended == ['own group', 'parent', 1]
    assert hub.encode_document('ab')[0].tolist() == [97, 98, 10]
    hub.start_worker(dict(kind='char', chars=['a']), [], False)
    assert 'does not know' in hub.encode_document('b')[1]


def test_a_disk_that_is_too_small_is_told_before_the_work(tmp_path, monkeypatch):
    (tmp_path / 'a').write_text('text ' * 100)
    monkeypatch.setattr(prepare.shutil, 'disk_usage', lambda folder: shutil._ntuple_diskusage(0, 0, 999))
    with pytest.raises(OSError, match=r'needs about 0.0 GB, its disk has 0.0 GB left'):
        write_text(tmp_path, [tmp_path / 'a'], Bytes(), 'x')


@pytest.mark.parametrize('share', [0, 1, -0.1, 2])
def test_a_share_that_leaves_a_split_empty_is_refused(tmp_path, share):
    (tmp_path / 'a').write_text('text')
    with pytest.raises(ValueError, match=f'val_share={share}, expected a number above 0 and below 1'):
        write_text(tmp_path, [tmp_path / 'a'], Bytes(), 'x', val_share=share)
    with pytest.raises(ValueError, match=f'val_share={share}, expected'):
        write_hub(tmp_path, None, {}, tokenizer=None, val_share=share)
    with pytest.raises(ValueError, match='val_share=0.1, expected none: the set has a validation split'):
        write_hub(tmp_path, None, dict(validation='val'), tokenizer=None, val_share=0.1)
    with pytest.raises(ValueError, match='processes=0, expected at least 1'):
        write_hub(tmp_path, None, {}, tokenizer=None, processes=0)


class Odd:
    """Something in a meta.pkl that is no plain value."""


@pytest.mark.parametrize(
    'vocabulary, size, kind',
    [
        (dict(vocab_size=6), 6, 'ids'),
        (dict(vocab_size=np.int64(6), note=Odd()), 6, 'ids'),
        (dict(vocab_size=6, itos={i: 60 + i for i in range(6)}), 6, 'ids'),
        (dict(vocab_size=6, itos={i: bytes([i]) for i in range(6)}), 6, 'ids'),
        (dict(vocab_size=6, itos=np.arange(6)), 6, 'ids'),
        (dict(vocab_size=9, itos=dict(enumerate('abcdef'))), 9, 'char'),
        (dict(itos='a b c d e f'.split()), 6, 'char'),
        (dict(vocab_size=7, itos={i: f'w{i}' for i in range(7) if i != 2}), 7, 'char'),
    ],
)
def test_a_meta_pkl_of_any_shape_has_its_vocabulary(tmp_path, vocabulary, size, kind):
    np.arange(6, dtype='<u2').tofile(tmp_path / 'train.bin')
    for protocol in (0, 2, 4):
        (tmp_path / 'meta.pkl').write_bytes(pickle.dumps(vocabulary, protocol))
        meta = read_meta(tmp_path)
        assert (meta['vocab_size'], meta['tokenizer']['kind'], len(meta['token_bytes'])) == (size, kind, size)
        text = make_tokenizer(meta['tokenizer']).decode_bytes(list(range(size))).decode()
        assert text.startswith(' 0 1 2' if kind == 'ids' else vocabulary['itos'][0])


@pytest.mark.parametrize('vocabulary', [Odd(), [1], {}, dict(vocab_size=Odd()), dict(vocab_size='many')])
def test_a_meta_pkl_without_a_vocabulary_is_told(tmp_path, vocabulary):
    np.arange(6, dtype='<u2').tofile(tmp_path / 'train.bin')
    (tmp_path / 'meta.pkl').write_bytes(pickle.dumps(vocabulary))
    with pytest.raises(
        ValueError, match='meta.pkl has no vocabulary as nanoGPT writes it .*prepare the data'
    ):
        read_meta(tmp_path)


def test_nanogpts_folders_are_read(tmp_path):
    np.arange(6, dtype='<u2').tofile(tmp_path / 'train.bin')
    np.arange(3, dtype='<u2').tofile(tmp_path / 'val.bin')
    old = dict(vocab_size=6, itos=dict(enumerate('abcdef')), stoi={c: i for i, c in enumerate('abcdef')})
    (tmp_path / 'meta.pkl').write_bytes(pickle.dumps(old))
    meta = read_meta(tmp_path)
    assert meta['vocab_size'] == 6 and meta['max_id'] == 5 and meta['token_bytes'] == [1] * 6
    assert make_tokenizer(meta['tokenizer']).encode('fab') == [5, 0, 1]
    assert (tmp_path / 'max_id.json').exists() and read_meta(tmp_path) == meta
    np.arange(1, 7, dtype='<u2').tofile(tmp_path / 'train.bin')  # as long as before
    assert read_meta(tmp_path)['max_id'] == 6
    np.arange(9, dtype='<u2').tofile(tmp_path / 'train.bin')
    assert read_meta(tmp_path)['max_id'] == 8
    with pytest.raises(ValueError, match='vocab_size=6, expected at least 9'):
        Split(tmp_path, read_meta(tmp_path), 'train', 4, 6)


def test_a_pickle_never_runs_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / 'ran'), 'w'))

    np.arange(6, dtype='<u2').tofile(tmp_path / 'train.bin')
    (tmp_path / 'meta.pkl').write_bytes(pickle.dumps(Evil()))
    with pytest.raises(ValueError, match='has no vocabulary as nanoGPT writes it'):
        read_meta(tmp_path)
    assert not (tmp_path / 'ran').exists()


def test_broken_data_is_told_with_what_helps(tmp_path):
    with pytest.raises(ValueError, match='there is no folder.*expected one of .*pystdlib'):
        read_meta(tmp_path / 'nowhere')
    (tmp_path / 'mine').mkdir()
    with pytest.raises(ValueError, match='not prepared'):
        read_meta(tmp_path / 'mine')
    split = numbers(tmp_path / 'cut', 10, shard_tokens=100)
    with open(split.files[0], 'r+b') as file:
        file.truncate(10)
    with pytest.raises(ValueError, match='has 10 bytes, meta.json says 20: prepare the data again'):
        Split(tmp_path / 'cut', read_meta(tmp_path / 'cut'), 'train', 4, 10)
    with pytest.raises(ValueError, match='block_size=4 is too long for .*train.bin: it has 4 tokens'):
        numbers(tmp_path / 'short', 4, shard_tokens=100)


@pytest.mark.parametrize('share', [0.02, 0.1, 0.3, 0.6, 0.9])
@pytest.mark.parametrize(
    'sizes', [[1], [1, 1], [1, 1, 1], [100, 1, 1], [1, 2, 500, 30], [5] * 20 + [900], [3] * 90]
)
def test_the_validation_split_has_about_its_share_whatever_the_sizes_of_the_files(tmp_path, sizes, share):
    paths = [tmp_path / f'{i}.txt' for i in range(len(sizes))]
    for i, (path, size) in enumerate(zip(paths, sizes, strict=True)):
        path.write_text(chr(48 + i % 10) * 100 * size)
    write_text(tmp_path, paths, Bytes(), 'few', val_share=share)
    train, val = (np.fromfile(tmp_path / f'{split}.bin', '<u2') for split in ('train', 'val'))
    assert share / 2 <= len(val) / (len(train) + len(val)) <= min(2 * share, (1 + share) / 2) + 0.02
    digits = [int((train == 48 + i).sum() + (val == 48 + i).sum()) for i in range(10)]
    assert digits == [100 * sum(sizes[i::10]) for i in range(10)]


@pytest.mark.parametrize('length, whole', [(5, True), (9, False), (None, True)])
def test_a_download_that_ends_early_is_not_kept(tmp_path, monkeypatch, length, whole):
    class Answer(io.BytesIO):
        headers = {} if length is None else {'Content-Length': str(length)}

    monkeypatch.setattr(prepare_script.urllib.request, 'urlopen', lambda url, timeout: Answer(b'hello'))
    if whole:
        assert prepare_script.fetch('http://x', tmp_path / 'input.txt', print).read_bytes() == b'hello'
    else:
        with pytest.raises(ValueError, match='ended early.*--input'):
            prepare_script.fetch('http://x', tmp_path / 'input.txt', print)
    assert (tmp_path / 'input.txt').exists() == whole


def test_a_second_download_waits_with_a_line_and_a_preparation_does_not_stop_it(tmp_path, monkeypatch):
    path, lines = tmp_path / 'input.txt', []
    answer = io.BytesIO(b'hello')
    answer.headers = {}
    monkeypatch.setattr(prepare_script.urllib.request, 'urlopen', lambda url, timeout: answer)
    writer = Writer(tmp_path, Bytes(), 'x')  # another process prepares the folder meanwhile
    first = lock_folder(tmp_path, 'x', name='.download.lock')

    def say(line):
        lines.append(line)
        path.write_text('done by the other')
        first.close()

    assert prepare_script.fetch('http://x', path, say).read_text() == 'done by the other'
    assert lines == [f'{path} is being downloaded by another process, waiting for it']
    path.unlink()
    assert prepare_script.fetch('http://x', path, say).read_text() == 'hello' and len(lines) == 1
    writer.release_lock()


def test_a_meta_without_what_the_files_tell_is_completed(tmp_path):
    numbers(tmp_path, 10, shard_tokens=100)
    whole = read_meta(tmp_path)
    part = {key: value for key, value in whole.items() if key not in ('max_id', 'token_bytes')}
    (tmp_path / 'meta.json').write_text(json.dumps(part))
    assert read_meta(tmp_path) == whole and whole['max_id'] == 9


def test_ids_beyond_a_vocabulary_are_shown_as_such():
    assert Characters('ab').decode_bytes([0, 5]).decode() == 'a\ufffd'
    assert Bytes().decode_bytes([97, 300]) == b'a?'


def test_an_empty_text_is_refused(tmp_path):
    (tmp_path / 'input.txt').write_text('')
    with pytest.raises(ValueError, match='there is no text to learn from'):
        write_text(tmp_path, [tmp_path / 'input.txt'], Bytes(), 'nothing')
    assert not (tmp_path / 'meta.json').exists()


def test_a_tokenizer_that_cannot_be_downloaded_is_told_with_what_helps(monkeypatch):
    tiktoken = pytest.importorskip('tiktoken')

    def offline(name):
        raise ConnectionError('no network')

    monkeypatch.setattr(tiktoken, 'get_encoding', offline)
    with pytest.raises(ValueError, match='TIKTOKEN_CACHE_DIR=FOLDER'):
        make_tokenizer(dict(kind='tiktoken', name='gpt2'))


@pytest.mark.parametrize('name', sorted(path.parent.name for path in (ROOT / 'data').glob('*/prepare.py')))
def test_preparing_data_needs_no_torch(name):
    """Its processes would take seconds and hundreds of MiB each to import it."""
    code = 'import runpy, sys; runpy.run_path(sys.argv[1]); sys.exit("torch" in sys.modules)'
    script = ROOT / 'data' / name / 'prepare.py'
    assert subprocess.run([sys.executable, '-c', code, script], cwd='/').returncode == 0


@pytest.fixture
def scripts(tmp_path):
    """run(name, *argv) -> (status, stdout, stderr): of the scripts that prepare data, in a copy of theirs."""
    repo = tmp_path / 'repo'
    shutil.copytree(ROOT / 'nanoloop', repo / 'nanoloop')
    for path in [ROOT / 'configurator.py', *ROOT.glob('data/*/prepare.py')]:
        copy = repo / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy)

    def run(name, *argv, **environment):
        command = [sys.executable, repo / 'data' / name / 'prepare.py', *argv]
        env = os.environ | environment
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=env)
        return done.returncode, done.stdout, done.stderr

    run.data = repo / 'data'
    return run


def test_a_script_prepares_a_text_from_any_directory(scripts, tmp_path):
    (tmp_path / 'input.txt').write_text('to be or not to be\n' * 10)
    status, out, err = scripts('shakespeare_char', '--input', 'input.txt')
    assert (status, err) == (0, '')
    enough = 'tokens (char), enough for block_size up to'
    expected = [f'shakespeare_char: train has 171 {enough} 170', f'shakespeare_char: val has 19 {enough} 18']
    assert out.splitlines() == expected
    assert read_meta(scripts.data / 'shakespeare_char')['vocab_size'] == 8
    foreign = tmp_path / 'foreign'  # packages of the same names, ahead of all others
    foreign.mkdir()
    for name in ('data', 'model', 'train', 'config', 'configurator', 'nanoloop'):
        (foreign / f'{name}.py').write_text('raise SystemExit(f"{__file__} is not ours")')
    argv = ['--input', 'input.txt', 'input.txt', '--name', 'mine', '--val_share', '0.5']
    status, out, err = scripts('text', *argv, PYTHONPATH=str(foreign), PYTHONSAFEPATH='1')
    assert status == 0, err
    meta = read_meta(scripts.data / 'mine')
    assert meta['source'] == 'input.txt, input.txt' and meta['splits']['val']['tokens'] == 95


def test_a_table_is_prepared_under_a_name_and_a_tokenizer_of_ones_own(scripts, tmp_path):
    paths = tables(tmp_path, body=['to be'] * 30)
    tokenizers = pytest.importorskip('tokenizers')
    vocabulary = {name: i for i, name in enumerate(['</s>', *'tobe\u0120'])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens(['</s>'])
    tokenizer.save(str(tmp_path / 'tokenizer.json'))
    argv = ['--input', paths['jsonl'], '--column=body', '--name=mine', '--processes=1', '--val_share=0.2']
    status, out, err = scripts('text', *argv, f'--tokenizer={tmp_path}/tokenizer.json', HF_HOME=str(tmp_path))
    assert status == 0 and 'mine: val has 36 tokens (tokenizers)' in out, err
    meta = read_meta(scripts.data / 'mine')
    ids = np.fromfile(scripts.data / 'mine' / 'val.bin', '<u2').tolist()
    assert make_tokenizer(meta['tokenizer']).decode_bytes(ids[:6]) == b'to be</s>'
    assert meta['token_bytes'][ids[5]] == 0 and meta['splits']['train']['tokens'] == 144


def test_scripts_tell_their_flags_and_what_is_wrong_with_them(scripts):
    status, out, _ = scripts('openwebtext', '--help')
    assert status == 0 and '--max_documents' in out and 'the same command goes on' in out
    for path in ROOT.glob('data/*/prepare.py'):  # what --help begins with
        doc = ast.get_docstring(ast.parse(path.read_text()))
        assert f'python data/{path.parent.name}/prepare.py' in doc
        assert all(
            re.search(word, doc) for word in ('token', 'second|minutes|hours', '[MG]B|bytes of disk')
        ), path
    for name, argv, told in [
        ('pystdlib', ['now'], 'unrecognized arguments: now'),
        ('text', [], 'required: --input'),
        ('text', ['--inputt', 'x'], 'unrecognised option --inputt, did you mean --input? (see --help)'),
        ('text', ['--input=a.txt', '--name=shakespeare_char'], 'that set is made by '),
        (
            'text',
            ['--input=a.txt', '--name=../bad'],
            "name='../bad', expected a name, for the folder data/NAME",
        ),
        ('text', ['--input=nowhere.txt'], 'there is no such file'),
        ('wikitext103', ['--processes=few'], 'invalid int value'),
        ('wikitext103', ['--max_documents=0'], 'max_documents=0, expected at least 1'),
    ]:
        status, out, err = scripts(name, *argv)
        assert (status, out) == (2, '') and told in err, err
        assert err.startswith('prepare.py: ') and err.count('\n') == 1


@pytest.mark.parametrize(
    'argv, told',
    [
        (['--special-tokens'], 'unrecognised option --special-tokens, did you mean --special_tokens?'),
        (['-input', 'x'], 'unrecognised option -input, did you mean --input?'),
        (['--zzz=1'], r'unrecognised option --zzz \(see --help\)'),
        (['--inp=x'], ''),
        (['--input', '-'], ''),
        (['--input', 'x', '--n', '-3'], ''),
    ],
)
def test_an_option_that_is_not_known_is_told_first(argv, told):
    flags = dict(input=dict(required=True, nargs='+'), special_tokens=dict(action='store_true'), n={})
    if told:
        with pytest.raises(ValueError, match=told):
            prepare_script.parse(argv, '', flags)
    else:
        assert prepare_script.parse(argv, '', flags).input[0] in ('x', '-')


@pytest.mark.parametrize(
    'name, told',
    [
        ('pystdlib', 'expected another: that set is made by .*data/pystdlib/prepare.py'),
        ('../data/pystdlib', 'expected another'),
        ('', 'expected a name, for the folder data/NAME'),
        ('..', 'expected a name'),
        ('text', ''),
        ('mine', ''),
    ],
)
def test_a_text_does_not_become_the_set_of_another_script(name, told):
    script = ROOT / 'data' / 'text' / 'prepare.py'
    if told:
        with pytest.raises(ValueError, match=f'name=.{name}., {told}'):
            prepare_script.name_folder(script, name)
    else:
        assert prepare_script.name_folder(script, name) == ROOT / 'data' / name


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    with replace_file(tmp_path / 'a') as file:
        file.write('old')
        assert not (tmp_path / 'a').exists()
    with pytest.raises(KeyboardInterrupt), replace_file(tmp_path / 'a') as file:
        file.write('ne')
        raise KeyboardInterrupt
    assert [path.name for path in tmp_path.iterdir()] == ['a'] and (tmp_path / 'a').read_text() == 'old'


@pytest.mark.parametrize(
    'rank, local_rank, prepared, starts',
    [(0, 0, (), 1), (0, 0, (0,), 0), (1, 0, (), 1), (1, 0, (1,), 0), (1, 1, (), 0)],
)
def test_the_first_rank_prepares_the_data_then_the_first_of_a_machine_that_does_not_see_it(
    tmp_path, monkeypatch, rank, local_rank, prepared, starts
):
    """prepared: the rounds before which another rank has prepared the folder."""
    started, rounds = [], itertools.count()

    def barrier(m, status):
        if next(rounds) + 1 in prepared:
            (tmp_path / 'meta.json').touch()
        return status

    def run(command, env):
        started.append(env)
        (tmp_path / 'meta.json').touch()
        return SimpleNamespace(returncode=0)

    monkeypatch.setenv('RANK', str(rank))
    if 0 in prepared:
        (tmp_path / 'meta.json').touch()
    for name, value in dict(
        LOCAL_RANK=local_rank, max_over_ranks=barrier, read_meta=lambda folder: {}
    ).items():
        monkeypatch.setattr(pretraining, name, value)
    monkeypatch.setattr(pretraining, 'find_data', lambda dataset: tmp_path)
    monkeypatch.setattr(pretraining.subprocess, 'run', run)
    c, m = SimpleNamespace(dataset='pystdlib'), SimpleNamespace(rank=rank)
    assert pretraining.prepare_data(c, m, lambda line: None) == (tmp_path, {})
    assert len(started) == starts and not any('RANK' in env for env in started)
    (tmp_path / 'meta.json').unlink(missing_ok=True)
    monkeypatch.setattr(pretraining, 'max_over_ranks', lambda m, status: 2)  # it failed on some rank
    with pytest.raises(SystemExit, match='2'):
        pretraining.prepare_data(c, m, lambda line: None)


def test_data_and_weights_of_other_characters_are_told_with_the_characters(call, flags, tmp_path):
    assert call(train.main, *flags, '--max_iters=1')[0] == 0
    (tmp_path / 'a.txt').write_text('abcdefghi XYZ\n' * 30)
    write_text(tmp_path / 'others', [tmp_path / 'a.txt'], Characters(sorted(set('abcdefghi XYZ\n'))), 'x')
    argv = [f'--init_from={tmp_path}/out', f'--dataset={tmp_path}/others', f'--out_dir={tmp_path}/new']
    status, _, err = call(train.main, *argv, '--device=cpu', '--compile=False')
    assert status == 2 and "only the data has 'X' 'Y' 'Z'; only the checkpoint has 'j'" in err


def test_tokens_without_text_are_trained_on_and_shown_as_ids(call, flags, tmp_path):
    (tmp_path / 'notes').mkdir()
    (tmp_path / 'notes' / 'meta.pkl').write_bytes(pickle.dumps(dict(vocab_size=40)))
    for split in ('train', 'val'):
        (np.arange(999) % 40).astype('<u2').tofile(tmp_path / 'notes' / f'{split}.bin')
    argv = [*flags, f'--dataset={tmp_path}/notes', '--max_iters=1', '--sample_tokens=9']
    status, out, err = call(train.main, *argv)
    assert status == 0, err
    note = 'no text is known for the tokens of this data: they are written as their ids'
    assert re.search(rf'a sample of 9 tokens \({note}\):\n-+\n( \d+){{9}}\n', out)
    options = [f'--out_dir={tmp_path}/out', '--device=cpu', '--dtype=float32', '--max_new_tokens=5']
    status, out, err = call(sample.main, *options, '--start=3 14')
    assert status == 0 and re.match(r'3 14( \d+){5}\n---', out) and note in err
    assert call(sample.main, *options, '--start=la')[0] == 2


def test_a_set_that_replaces_a_larger_one_leaves_no_shard_of_it(tmp_path):
    lines = []
    for n, shard_tokens in ((40, 10), (12, 10)):
        writer = Writer(tmp_path, Bytes(), f'set of {n}', shard_tokens, say=lines.append)
        for _ in range(n // 4):
            writer.add('train', range(4))
        writer.finish()
    assert lines == [f'{tmp_path} holds a data set from set of 40, which will be replaced']
    assert sorted(path.name for path in tmp_path.glob('*.bin')) == ['train.bin']


def words_on(folder):
    """What a Writer and a preparation of 60 bytes tell of what lies in a folder."""
    (folder / 'a.txt').write_text('text, ' * 10)
    lines = []
    write_text(folder, [folder / 'a.txt'], Bytes(), 'a.txt', say=lines.append)
    assert read_meta(folder)['splits']['train']['tokens'] == 54
    return [line for line in lines if 'will be replaced' in line]


@pytest.mark.parametrize(
    'content',
    [
        '{"splits": {"train": {"num_examples": 3}}}',
        '{"splits": ["train"]}',
        '{"splits": {"train": {"files": [{"name": "../other.bin"}]}}}',
        '{"splits": {"train": {"files": [{"name": 3}]}}}',
        '{"splits": {}}',
        '[1]',
        'null',
        'no JSON',
    ],
)
def test_a_meta_json_of_another_program_costs_no_work(tmp_path, content):
    (tmp_path / 'other.bin').touch()
    folder = tmp_path / 'mine'
    folder.mkdir()
    (folder / 'meta.json').write_text(content)
    assert words_on(folder) == [f'{folder} holds a meta.json of another program, which will be replaced']
    assert (tmp_path / 'other.bin').exists()


@pytest.mark.parametrize('name', ['meta.json', 'train.bin', 'train.mask'])
def test_a_folder_in_the_way_is_told_before_anything_moves(tmp_path, name):
    numbers(tmp_path, 20, split='val')
    (tmp_path / 'meta.json').rename(tmp_path / 'old.json')
    (tmp_path / name).mkdir()
    writer = Writer(tmp_path, Bytes(), 'x')
    writer.add('train', range(9))
    with pytest.raises(ValueError, match=f'{name}., expected a file there: move this folder away'):
        writer.finish()
    assert not (tmp_path / 'unfinished' / 'moving').exists() and (tmp_path / 'val.bin').exists()
    (tmp_path / name).rmdir()
    del writer
    again = Writer(tmp_path, Bytes(), 'x')  # nothing was lost
    again.finish()
    assert read_meta(tmp_path)['splits']['train']['tokens'] == 9


def test_a_set_that_cannot_be_described_replaces_nothing(tmp_path):
    numbers(tmp_path, 20)
    writer = Writer(tmp_path, Bytes(), 'x')
    writer.add('train', range(9))
    with pytest.raises(TypeError):
        writer.finish(note=object())
    assert read_meta(tmp_path)['source'] == 'numbers' and (tmp_path / 'unfinished' / 'state.json').exists()


def test_a_set_of_nanogpt_is_replaced_whole_and_with_a_line(tmp_path):
    for split in ('train', 'val'):
        np.arange(9, dtype='<u2').tofile(tmp_path / f'{split}.bin')
    (tmp_path / 'meta.pkl').write_bytes(pickle.dumps(dict(vocab_size=9)))
    writer = Writer(tmp_path, Bytes(), 'x', shard_tokens=5)
    for _ in range(2):
        writer.add('train', range(5))
    writer.finish()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        '.lock',
        'meta.json',
        'train_00000.bin',
        'train_00001.bin',
    ]
    (tmp_path / 'other').mkdir()
    np.arange(9, dtype='<u2').tofile(tmp_path / 'other' / 'train.bin')
    assert words_on(tmp_path / 'other') == [
        f"{tmp_path}/other holds a data set in nanoGPT's form, which will be replaced"
    ]
    (tmp_path / 'meta').mkdir()
    (tmp_path / 'meta' / 'meta.pkl').write_text('of another program')
    assert words_on(tmp_path / 'meta') == [] and (tmp_path / 'meta' / 'meta.pkl').exists()


@pytest.mark.parametrize(
    'source, words',
    [
        (dict(path='json', data_files=['/d/a[[]1].jsonl', '/d/b.jsonl']), 'a[1].jsonl, b.jsonl'),
        (dict(path='json', data_files=list('abcde')), 'a, b, c and 2 more'),
        (dict(path='Salesforce/wikitext', name='raw'), 'Salesforce/wikitext raw'),
        ('a.txt', 'a.txt'),
        (None, 'another program'),
    ],
)
def test_the_source_of_a_set_is_told_in_words(tmp_path, source, words):
    lines = []
    for say in (None, lines.append):
        writer = Writer(tmp_path, Bytes(), source, say=say)
        writer.add('train', [1, 2])
        writer.finish()
    assert lines == [f'{tmp_path} holds a data set from {words}, which will be replaced']


def test_the_longest_file_limits_block_size(tmp_path):
    lines = []
    for sizes, more in (((5, 9, 6), {}), ((900, 900), {}), ((2000, 9), {}), ((6,), dict(row_len=3))):
        writer = Writer(tmp_path, Bytes(), 'x', shard_tokens=1)
        for size in sizes:
            writer.add('train', [1] * size)
        writer.finish(lines.append, **more)
    start, enough = f'{tmp_path.name}: train has', ', enough for block_size up to'
    assert lines == [
        f'{start} 20 tokens (byte){enough} 8',
        f'{start} 1,800 tokens (byte){enough} 899',
        f'{start} 2,009 tokens (byte)',
        f'{start} 6 tokens (byte)',
    ]


@pytest.mark.parametrize(
    'text, share, told',
    [
        ('0123456789', 0.1, '1 tokens of val, a window needs 2: take more text, or another --val_share'),
        ('01', 0.9, '0 tokens of train, a window needs 2'),
        ('0123', 0.5, ''),
    ],
)
def test_a_split_that_cannot_be_trained_on_replaces_nothing(tmp_path, text, share, told):
    numbers(tmp_path, 20)
    (tmp_path / 'a').write_text(text)
    if told:
        with pytest.raises(ValueError, match=told):
            write_text(tmp_path, [tmp_path / 'a'], Bytes(), 'x', share)
    else:
        write_text(tmp_path, [tmp_path / 'a'], Bytes(), 'x', share)
    assert read_meta(tmp_path)['source'] == ('numbers' if told else 'x')


def test_a_data_set_of_many_files_raises_the_limit_of_open_files(tmp_path):
    writer = Writer(tmp_path, Bytes(), 'x', shard_tokens=5)
    for _ in range(300):
        writer.add('train', range(5))
    writer.finish()
    code = (
        'import resource, sys\n'
        'from nanoloop.datasets import Split, read_meta\n'
        'resource.setrlimit(resource.RLIMIT_NOFILE, (200, int(sys.argv[2])))\n'
        'split = Split(sys.argv[1], read_meta(sys.argv[1]), "train", 4, 256)\n'
        'print(len(split.open_files))'
    )
    for hard, expected in ((1000, '300'), (310, '300'), (250, 'may open 250: see `ulimit -n`')):
        call = [sys.executable, '-c', code, str(tmp_path), str(hard)]
        run = subprocess.run(call, cwd=ROOT, capture_output=True, text=True)
        assert expected in run.stdout + run.stderr


@pytest.mark.parametrize(
    'n, soft, hard, kernel, limit',
    [
        (2, 64, 64, 999, 64),  # what is there is enough, if not for the spare ones
        (2, 100, 512, 999, 140),
        (100, 64, 512, 999, 238),
        (100, 64, 120, 999, 120),
        (100, 64, -1, 120, 110),
        (20, 64, -1, 64, 64),
        (100, 64, 109, 999, 'has 100 files, 10 others are open, and this process may open 109: see'),
        (100, 64, -1, 64, 'and this process may open 64'),
    ],
)
def test_the_limit_of_open_files_is_raised_as_far_as_it_can_be(monkeypatch, n, soft, hard, kernel, limit):
    limits = [soft]

    def setrlimit(kind, values):
        if not 0 <= values[0] <= kernel:
            raise ValueError('current limit exceeds maximum limit')
        limits.append(values[0])

    assert datasets.resource.RLIM_INFINITY == -1
    monkeypatch.setattr(datasets.resource, 'getrlimit', lambda kind: (soft, hard))
    monkeypatch.setattr(datasets.resource, 'setrlimit', setrlimit)
    monkeypatch.setattr(datasets.os, 'listdir', lambda path: range(11))
    if isinstance(limit, str):
        with pytest.raises(ValueError, match=limit):
            datasets.allow_open_files(n)
        return
    datasets.allow_open_files(n)
    assert limits[-1] == limit


def test_a_progress_bar_without_a_terminal_is_drawn_no_more():
    class Bar:
        n, disable = 3, False

        def update(self, more):
            raise OSError(errno.EIO, 'Input/output error')

    bar = Bar()
    hub.advance(bar, 5)
    assert bar.disable


def test_the_documents_of_a_stream_are_not_counted_before_they_are_read(tmp_path, monkeypatch):
    monkeypatch.setenv('HF_HOME', str(tmp_path / 'hf'))
    pytest.importorskip('datasets')
    path = tables(tmp_path, text=['a', 'b'])['jsonl']
    stream = local_documents([path], streaming=True, max_documents=9).read('train', 0)
    assert stream[1] is None and len(list(stream[0])) == 2
