"""What is exported loads back, with the model's files alone, and is the same model."""

import json
import shutil
import subprocess
import sys
from dataclasses import asdict

import pytest
import torch
from helpers import TINY

import export
import sample
from model import GPT, GPTConfig
from nanoloop.checkpoint import load_checkpoint
from train import main


@pytest.mark.parametrize('keys', [[], ['--tie_weights=False', '--exit_gate=True', '--pos=rope']], ids=len)
def test_an_exported_model_is_the_same(call, flags, tmp_path, keys):
    safetensors = pytest.importorskip('safetensors.torch')
    out = call(main, *flags, *keys)[1]
    assert ('objective=end does not train the exit gate' in out) == bool(keys)
    status, out, err = call(export.main, f'--out_dir={tmp_path}/out', f'--to={tmp_path}/to')
    assert status == 0 and 'parameters' in out, err
    assert sorted(p.name for p in (tmp_path / 'to').iterdir()) == [
        'config.json',
        'model.safetensors',
        'tokenizer.json',
    ]
    before, _ = load_checkpoint(tmp_path / 'out' / 'best.pt')
    alone = GPT(GPTConfig(**json.loads((tmp_path / 'to' / 'config.json').read_text())))
    safetensors.load_model(alone, tmp_path / 'to' / 'model.safetensors')
    found, _ = load_checkpoint(tmp_path / 'to')
    idx = torch.randint(12, (2, 8), generator=torch.Generator().manual_seed(0))
    expected = before(idx, idx)[0]
    assert torch.equal(alone.eval()(idx, idx)[0], expected)
    assert torch.equal(found(idx, idx)[0], expected)
    assert json.loads((tmp_path / 'to' / 'config.json').read_text()) == asdict(before.config)
    status, _, err = call(export.main, f'--out_dir={tmp_path}/out', f'--to={tmp_path}/to')
    assert status == 0 and f'{tmp_path}/to holds an earlier export, which is replaced\n' in err
    options = ['--device=cpu', '--dtype=float32', '--max_new_tokens=20']
    text = call(sample.main, f'--out_dir={tmp_path}/out', *options)[1]
    for key in ('init_from', 'out_dir'):
        _, out, err = call(sample.main, f'--{key}={tmp_path}/to', *options, '--n_loop=2')
        assert out == text and 'step 4' in err and 'trained with' not in err
    small = [flag for flag in TINY if flag.startswith(('--device', '--compile', '--batch_size'))]
    status, out, err = call(
        main, *flags[:1], *small, f'--init_from={tmp_path}/to', f'--out_dir={tmp_path}/b', '--max_iters=1'
    )
    assert status == 0, err


def test_the_models_files_copied_alone_take_an_export(call, flags, tmp_path):
    pytest.importorskip('safetensors')
    call(main, *flags)
    call(export.main, f'--out_dir={tmp_path}/out', f'--to={tmp_path}/to')
    (tmp_path / 'to' / 'nanoloop').mkdir()
    for name in ('model.py', 'nanoloop/checks.py'):
        shutil.copy(export.__file__.replace('export.py', name), tmp_path / 'to' / name)
    code = """import json, safetensors.torch, torch, model
m = model.GPT(model.GPTConfig(**json.load(open('config.json')))).eval()
safetensors.torch.load_model(m, 'model.safetensors')
print(m(torch.tensor([[1, 2, 3]]))[0].argmax().item())"""
    found = subprocess.run([sys.executable, '-c', code], cwd=tmp_path / 'to', capture_output=True, text=True)
    best, _ = load_checkpoint(tmp_path / 'out' / 'best.pt')
    assert found.stdout == f'{best(torch.tensor([[1, 2, 3]]))[0].argmax().item()}\n', found.stderr


def test_a_broken_export_is_told(call, flags, tmp_path):
    pytest.importorskip('safetensors')
    call(main, *flags)
    (tmp_path / 'notes').mkdir(), (tmp_path / 'notes' / 'a.txt').touch()
    for target, told in (
        ('out', 'expected a folder for the model alone, there is .lock, best.pt, ckpt.pt in it'),
        ('notes', 'expected a folder for the model alone, there is a.txt in it'),
        ('out/ckpt.pt', 'expected a folder, this is a file'),
    ):
        status, _, err = call(export.main, f'--out_dir={tmp_path}/out', f'--to={tmp_path}/{target}')
        assert status == 2 and told in err
    call(export.main, f'--out_dir={tmp_path}/out', f'--to={tmp_path}/to')
    assert (
        len({(tmp_path / 'to' / name).stat().st_mode for name in ('config.json', 'model.safetensors')}) == 1
    )
    whole = (tmp_path / 'to' / 'model.safetensors').read_bytes()
    for name, content in (
        ('model.safetensors', whole[:-9]),
        ('model.safetensors', None),
        ('tokenizer.json', None),
    ):
        (tmp_path / 'to' / 'model.safetensors').write_bytes(whole)
        path = tmp_path / 'to' / name
        path.unlink() if content is None else path.write_bytes(content)
        status, _, err = call(sample.main, f'--init_from={tmp_path}/to', '--device=cpu')
        assert status == 2 and err.splitlines()[-1].startswith(
            f'sample.py: the exported model in {tmp_path}/to'
        )


def test_an_export_without_a_folder_is_refused(call, tmp_path):
    status, _, err = call(export.main, f'--out_dir={tmp_path}')
    assert status == 2 and "to='', expected a folder to write" in err
    status, _, err = call(export.main, f'--out_dir={tmp_path}', f'--to={tmp_path}/to')
    assert status == 2 and 'expected the folder of a run' in err and not (tmp_path / 'to').exists()
