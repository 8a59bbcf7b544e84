import itertools
import os
import re
from pathlib import Path

import numpy as np
import pytest

from nanoloop.prepare import write_text
from nanoloop.text_files import UNMARKED, find_texts, hold_out, kind_of_content
from nanoloop.tokenizer import Bytes

TEXT = 'to be or not to be\n' * 20


@pytest.fixture
def notes(tmp_path):
    """A folder with texts a.txt and sub/b.md, and with much that is none."""
    folder = tmp_path / 'notes'
    for name in ('.git', '__pycache__', 'sub', 'other', 'unfinished'):
        (folder / name).mkdir(parents=True)
    for name in ('a.txt', 'sub/b.md', '.git/config', '__pycache__/x.py', '.hidden', 'unfinished/draft.txt'):
        (folder / name).write_text(TEXT)
    (folder / 'picture.png').write_bytes(b'\x89PNG\r\n\x1a\n\0\0')
    (folder / 'packed').write_bytes(b'\x1f\x8b\x08\x01\xff')
    (folder / 'empty.txt').touch()
    (folder / 'gone').symlink_to('nowhere')
    np.arange(99, dtype='<u2').tofile(folder / 'other' / 'train.bin')
    (folder / 'other' / 'meta.json').write_text('{}')
    (folder / 'other' / 'input.txt').write_text(TEXT)
    return folder


def names(paths, folder):
    return [path.relative_to(folder).as_posix() for path in paths]


def test_a_folders_texts_are_found_and_the_rest_is_counted(notes):
    lines = []
    found = find_texts(notes, say=lines.append)
    assert names(found, notes) == ['a.txt', 'other/input.txt', 'sub/b.md', 'unfinished/draft.txt']
    (line,) = lines
    assert line.startswith(f'{notes}: 4 texts; left out: 2 binary (packed), 1 broken link (gone), 1 empty')
    assert '3 hidden (.git/config)' in line and '2 of a data set (other/meta.json)' in line
    assert names(find_texts(notes, '*.md'), notes) == ['sub/b.md']
    (notes / 'unfinished' / 'state.json').touch()  # of a preparation, after all
    assert names(find_texts(notes), notes) == ['a.txt', 'other/input.txt', 'sub/b.md']


def test_a_folder_that_is_the_data_set_gives_the_same_set_again(notes):
    for path in [*notes.glob('pi*'), *notes.glob('pa*')]:
        path.unlink()
    sets = []
    for _ in range(2):
        paths = find_texts(notes, data_folder=notes)
        write_text(notes, paths, Bytes(), 'notes')
        sets.append([(notes / f'{split}.bin').read_bytes() for split in ('train', 'val')])
        (notes / 'unfinished').mkdir()  # of a preparation that was interrupted
        (notes / 'unfinished' / 'train_00000.bin').write_bytes(b'old text')
        (notes / 'prepare.py').write_text('its own script')
    assert sets[0] == sets[1] and b'old' not in sets[1][0] + sets[1][1]


@pytest.mark.parametrize(
    'content, kind',
    [
        (b'', 'empty'),
        (TEXT.encode(), 'text'),
        (b'\t\n\v\f\r\x1b[0m', 'text'),
        ('\u00e9\u4e2d'.encode(), 'text'),
        (TEXT.encode('utf-16'), 'text'),
        (TEXT.encode('utf-32'), 'text'),
        (TEXT.encode('utf-8-sig'), 'text'),
        (TEXT.encode('utf-16-le'), UNMARKED),
        (TEXT.encode('utf-16-be'), UNMARKED),
        (np.array([3, 0, 27, 9, 65, 32, 11, 40], '<u2').tobytes() * 9, 'binary'),  # tokens of characters
        (np.array([65, 66, 129, 32], '>u2').tobytes() * 9, 'binary'),
        (bytes(range(256)) * 4, 'binary'),
        (b'caf\xe9', 'not UTF-8'),
        ('\u00e9'.encode()[:1], 'not UTF-8'),
        (b'caf\xe9\x01', 'binary'),
        (b'a\0b', 'binary'),
        (b'\xff\xfea', 'binary'),
        (TEXT.encode() * 9000 + b'\0', 'binary'),
        (b'a' * (2**20 - 1) + '\u00e9'.encode(), 'text'),
    ],
)
def test_what_is_in_a_file(tmp_path, content, kind):
    (tmp_path / 'a').write_bytes(content)
    assert kind_of_content(tmp_path / 'a') == kind


def test_what_is_not_utf8_is_taken_as_bytes_or_told(tmp_path):
    (tmp_path / 'a.txt').write_text(TEXT)
    (tmp_path / 'b.txt').write_bytes(b'caf\xe9')
    (tmp_path / 'c.bin').write_bytes(b'\0')
    lines = []
    assert len(find_texts(tmp_path, any_bytes=True, say=lines.append)) == 2
    assert lines[1] == f'{tmp_path}/b.txt: not UTF-8, taken as bytes'
    assert find_texts(tmp_path / 'c.bin', any_bytes=True, say=lines.append) and 'c.bin: not UTF-8' in lines[2]
    for path, told in [
        ('', 'b.txt is not UTF-8: save it so; data.text.prepare.py --tokenizer=byte takes'),
        ('b.txt', 'b.txt is not UTF-8'),
        ('c.bin', 'c.bin is a binary file'),
        ('d', 'there is no such file or folder'),
    ]:
        with pytest.raises(ValueError, match=told):
            find_texts(tmp_path / path)
    with pytest.raises(ValueError, match=r'no text \*.bin in it; left out: 1 binary \(c.bin\)'):
        find_texts(tmp_path, '*.bin')


def test_a_home_folder_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path))
    (tmp_path / 'a.txt').write_text(TEXT)
    assert find_texts('~/a.txt') == [tmp_path / 'a.txt'] == find_texts(os.path.join('~', 'a.txt'))


def test_files_of_several_encodings_become_one_text(tmp_path):
    for name in ('utf-8', 'utf-8-sig', 'utf-16'):
        (tmp_path / f'{name}.txt').write_text(TEXT, encoding=name)
    write_text(tmp_path / 'out', find_texts(tmp_path), Bytes(), 'x')
    ids = np.concatenate(
        [np.fromfile(tmp_path / 'out' / f'{split}.bin', '<u2') for split in ('train', 'val')]
    )
    assert sorted(bytes(ids.astype(np.uint8)).replace(b'\n', b'')) == sorted(
        3 * TEXT.replace('\n', '').encode()
    )


def test_files_given_in_two_ways_are_held_out_alike(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in 'ab':
        Path(name).write_text('text ' * 100)
    relative, absolute = (hold_out([Path('a'), folder / 'b'], 0.5) for folder in (Path('.'), tmp_path))
    assert [*relative.values()] == [*absolute.values()]


def write_sizes(folder, sizes):
    paths = [folder / f'{i}.txt' for i in range(len(sizes))]
    for path, size in zip(paths, sizes, strict=True):
        path.write_bytes(b'x' * size)
    return paths


def share_of(paths, parts):
    sizes = {path: path.stat().st_size for path in paths}
    return sum(sizes[path] * part for path, part in parts.items()) / sum(sizes.values())


@pytest.mark.parametrize('share', [0.1, 0.3, 0.5, 0.9])
@pytest.mark.parametrize('seed', range(3))
def test_of_few_files_those_closest_to_the_share_are_held_out(tmp_path, share, seed):
    sizes = np.random.default_rng(seed).integers(2000, 7000, 8).tolist()
    paths, lines = write_sizes(tmp_path, sizes), []
    parts = hold_out(paths, share, lines.append)
    held = share_of(paths, parts)
    sums = [sum(s) / sum(sizes) for n in range(1, 8) for s in itertools.combinations(sizes, n)]
    best = min(abs(s - share) for s in sums)
    if set(parts.values()) == {1.0}:
        assert abs(held - share) <= max(share / 10, best + 1e-9)
    told = f'asked for {100 * share:.3g} %, val has {100 * held:.3g} %: whole files are held out'
    assert lines == [told] * (abs(held - share) > share / 10)
    assert parts == hold_out(paths[::-1], share)


def test_the_share_of_six_equal_files_and_of_many_is_the_one_asked_for(tmp_path):
    paths = write_sizes(tmp_path, [500] * 6)
    assert share_of(paths, hold_out(paths, 0.5)) == 0.5
    lines = []
    assert share_of(paths, hold_out(paths, 0.27, lines.append)) == pytest.approx(1 / 3)
    assert lines == ['asked for 27 %, val has 33.3 %: whole files are held out']
    for share in (0.1, 0.5, 0.95):
        for sizes in ([100] * 40, [*range(1, 200)], [5000, *[10] * 30, 2000, 900]):
            paths = write_sizes(tmp_path, sizes)
            parts = hold_out(paths, share)
            assert abs(share_of(paths, parts) - share) <= share / 10 and len(parts) < len(paths), sizes


def test_what_a_folder_leaves_out_is_counted_with_a_hint(tmp_path):
    (tmp_path / 'a.txt').write_text(TEXT)
    (tmp_path / 'b.jsonl').write_text('{}')
    (tmp_path / 'c.txt').write_bytes(TEXT.encode('utf-16-le'))
    lines = []
    assert find_texts(tmp_path, any_bytes=True, say=lines.append) == [tmp_path / 'a.txt']
    left_out = '1 UTF-16 without a byte order mark (c.txt), 1 table (b.jsonl)'
    left_out += '; --column=NAME takes the tables instead'
    assert lines == [f'{tmp_path}: 1 text; left out: {left_out}']
    with pytest.raises(ValueError, match='c.txt is UTF-16 without a byte order mark'):
        find_texts(tmp_path / 'c.txt')
    (tmp_path / 'a.txt').unlink()
    with pytest.raises(
        ValueError, match='there is no text .* in it; .*; --column=NAME takes the tables instead'
    ):
        find_texts(tmp_path)


def test_files_that_a_pattern_leaves_out_are_counted(notes):
    told = r'no text \*.rst in it; left out: 3 hidden \(.git/config\), 10 not named \*.rst \(a.txt\)$'
    with pytest.raises(ValueError, match=told):
        find_texts(notes, '*.rst')
    for pattern in ('', '/tmp/*.txt'):
        with pytest.raises(
            ValueError, match=f'pattern=.{re.escape(pattern)}., expected names below the folder'
        ):
            find_texts(notes, pattern)
