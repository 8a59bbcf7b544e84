import gc
import os

os.environ.setdefault('OMP_NUM_THREADS', '1')  # of every process: at these sizes threads wait for each other
import helpers
import pytest
import torch

torch.set_num_threads(1)
gc.freeze()  # torch's million objects need not be looked at again and again
gc.set_threshold(50_000)


@pytest.fixture(scope='session')
def tiny_data(tmp_path_factory):
    """A character data set of 3,000 tokens."""
    from nanoloop.prepare import write_text
    from nanoloop.tokenizer import Characters

    folder = tmp_path_factory.mktemp('tiny')
    text = folder / 'input.txt'
    letters = torch.randint(12, (3000,), generator=torch.Generator().manual_seed(0)).tolist()
    text.write_text(''.join('abcdefghij \n'[i] for i in letters))
    write_text(folder, [text], Characters('\n abcdefghij'), source='random letters')
    return folder


@pytest.fixture
def flags(tiny_data, tmp_path):
    """Flags of a run of a few seconds in tmp_path/out."""
    return [f'--dataset={tiny_data}', f'--out_dir={tmp_path}/out', *helpers.TINY]


@pytest.fixture
def call(capsys):
    """call(main, *argv) -> (exit status, stdout, stderr)."""

    def run(main, *argv):
        capsys.readouterr()
        try:
            status = main(list(argv))
        except SystemExit as stop:
            status = stop.code
        return (status or 0, *capsys.readouterr())

    return run
