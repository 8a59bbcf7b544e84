"""
Writes a model as files that anyone can read without running code: weights, configuration, tokenizer.

    python export.py --out_dir=out-quickstart --to=my-model

my-model gets model.safetensors, config.json and tokenizer.json; sample.py --init_from=my-model and train.py
--init_from=my-model take it, and so do model.py and nanoloop/checks.py alone:

    model = GPT(GPTConfig(**json.load(open('my-model/config.json'))))
    safetensors.torch.load_model(model, 'my-model/model.safetensors')
"""

import json
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # ours come first, also with python -P
from configurator import command, configure, print_error
from nanoloop.checkpoint import WEIGHTS, find_model, load_checkpoint, tokenizer_dict
from nanoloop.checkpoint_files import EXPORTED
from nanoloop.checks import Choice, Name, check, missing_package, settle_fields
from nanoloop.files import replace_file, sync, write_json

FILES = 'model.safetensors', 'tokenizer.json', 'config.json'


@dataclass
class ExportConfig:
    out_dir: Name = 'out'  # folder of a run (its best.pt, else its ckpt.pt), or another name as in init_from
    init_from: Name = 'resume'  # resume (the model in out_dir), a folder, a file, gpt2..gpt2-xl, ouro:FOLDER
    weights: Choice(WEIGHTS) = 'raw'  # ema: load the average of the weights, which train.py saves with --ema
    to: str = ''  # folder to write to, created if missing; has to be given

    def __post_init__(self):
        """Raises UserError for an empty name."""
        settle_fields(self)


def write_weights(model, path, metadata):
    """Writes the model's weights as safetensors, with the access rights of any new file."""
    from safetensors.torch import save_model

    with replace_file(path, 'wb') as file:
        mode = os.fstat(file.fileno()).st_mode
        save_model(model, file.name, metadata)  # takes a path, and makes a new file for its owner alone
        os.chmod(file.name, mode)
        with open(file.name, 'rb') as written:
            sync(written)


@command
def main(argv):
    c = configure((ExportConfig,), argv, say=print_error)
    c.build(ExportConfig)
    check(c.to, 'to', c.to, 'a folder to write')
    try:
        import safetensors  # noqa: F401
    except ImportError:
        raise missing_package('exporting', 'pretrained', 'safetensors') from None
    folder = Path(c.to)
    check(folder.is_dir() or not folder.exists(), 'to', c.to, 'a folder, this is a file')
    present = {path.name.removesuffix('.tmp') for path in folder.glob('*')}  # .tmp: of an interrupted export
    others = sorted(present - set(FILES))
    check(not others, 'to', c.to, f'a folder for the model alone, there is {", ".join(others[:3])} in it')
    checkpoint = find_model(c, print_error)
    model, _ = load_checkpoint(checkpoint)
    tokenizer = tokenizer_dict(checkpoint)
    if tokenizer is None:
        print_error(f'{checkpoint["path"]} has no tokenizer: the exported model has none, either')
    if present:
        print_error(f'{folder} holds an earlier export, which is replaced')
    folder.mkdir(parents=True, exist_ok=True)
    metadata = {key: json.dumps(checkpoint[key]) for key in EXPORTED if key in checkpoint}
    weights, spec, config = (folder / name for name in FILES)
    write_weights(model, weights, metadata)
    write_json(spec, tokenizer, indent=1)
    write_json(config, asdict(model.config), indent=1)
    size, path = weights.stat().st_size / 2**20, checkpoint['path']
    path += ', the average of the weights' * (c.weights == 'ema')
    print(f'{path}: {model.get_num_params():,} parameters, {size:,.1f} MiB in {folder}')


if __name__ == '__main__':
    main()
