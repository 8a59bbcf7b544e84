"""
Writes a model as files that anyone can read without running code: weights, configuration, tokenizer.

    python export.py --out_dir=out-quickstart --to=my-model

my-model gets model.safetensors, config.json and tokenizer.json; sample.py --init_from=my-model and train.py
--init_from=my-model take it, and so do model.py, tables.py and checks.py alone:

    model = GPT(GPTConfig(**json.load(open('my-model/config.json'))))
    safetensors.torch.load_model(model, 'my-model/model.safetensors')
"""

import json
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from configurator import command, configure
from nanoloop.checks import UserError, check
from sample import find_model, find_tokenizer


@dataclass
class ExportConfig:
    out_dir: str = 'out'  # the run: its best.pt, else its ckpt.pt; or the path of a checkpoint
    init_from: str = 'resume'  # resume: from out_dir; or another path, gpt2, gpt2-medium, ...
    to: str = ''  # the folder to write


def write(path, content):
    """Writes a file under another name first, so that it is whole when it is there."""
    path.with_name(path.name + '.tmp').write_text(json.dumps(content, indent=1))
    os.replace(path.with_name(path.name + '.tmp'), path)


@command
def main(argv):
    c = configure((ExportConfig,), argv, out=sys.stderr)
    check(c.to, 'to', c.to, 'a folder to write')
    try:
        from safetensors.torch import save_model
    except ImportError:
        raise UserError('exporting needs safetensors: pip install safetensors') from None
    folder = Path(c.to)
    free = not folder.exists() or (folder.is_dir() and not (folder / 'ckpt.pt').exists())
    check(free, 'to', c.to, 'a folder for the model alone')
    model, checkpoint = find_model(c, 'cpu')
    tokenizer = find_tokenizer(checkpoint)
    folder.mkdir(parents=True, exist_ok=True)
    trained = {key: json.dumps(checkpoint[key]) for key in ('iter_num', 'loops_trained') if key in checkpoint}
    save_model(model, str(folder / 'model.safetensors.tmp'), trained)
    write(folder / 'tokenizer.json', tokenizer.spec)
    write(folder / 'config.json', asdict(model.config))
    (folder / 'model.safetensors.tmp').chmod((folder / 'config.json').stat().st_mode)  # it was for us alone
    os.replace(folder / 'model.safetensors.tmp', folder / 'model.safetensors')
    size, path = (folder / 'model.safetensors').stat().st_size / 2**20, checkpoint['path']
    print(f'{path}: {model.get_num_params():,} parameters, {size:,.1f} MiB in {folder}')


if __name__ == '__main__':
    main()
