"""
The command lm-eval of EleutherAI's lm-evaluation-harness, for any model of this program.

    pip install -e ".[harness]"
    python runs/lmeval.py --model_args out_dir=out-quickstart,n_loop=8 --tasks lambada_openai
    python runs/lmeval.py --model_args init_from=gpt2 --tasks hellaswag --limit 100 --output_path results
    torchrun --standalone --nproc_per_node=8 runs/lmeval.py --model_args out_dir=out --tasks hellaswag

It has the flags of lm-eval (--help), of which --model is nanoloop, --batch_size and --device are auto unless
they are given. The keys of --model_args are out_dir, init_from, n_loop, exit, exit_threshold, min_loops,
kv_budget, dtype, batch_size and device, see sample.py --help. A batch has 8192 tokens, or batch_size rows of
the longest text.
"""

import sys
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from configurator import command
from nanoloop.checks import UserError, check

DEFAULTS = dict(model='nanoloop', batch_size='auto', device='auto')
REFUSING = (('lm_eval', 'config'), ('lm_eval', '_cli'))  # folders of the harness that read what a user gives


def complete(args, EvaluatorConfig):  # noqa: N803, it is a class
    """Sets the flags that neither the command nor its file --config gives, and checks those of the model."""
    from nanoloop.harness_args import ModelArgs, make

    given = EvaluatorConfig.load_yaml_config(args.config) if args.config else {}
    given |= {key: value for key, value in vars(args).items() if value}
    model_args = given.get('model_args')
    if given.get('model', 'nanoloop') == 'nanoloop' and isinstance(model_args, dict):
        for key in model_args.keys() & DEFAULTS.keys():  # which the harness takes as flags only
            check(key not in given, 'model_args', key, f'no flag --{key} beside it')
            given[key] = model_args[key]
        args.model_args = {key: value for key, value in model_args.items() if key not in DEFAULTS}
    for key, value in DEFAULTS.items():
        setattr(args, key, given.get(key, value))
    if args.model == 'nanoloop':  # the harness would first read all its tasks
        machine = dict(batch_size=args.batch_size, device=args.device)
        make(ModelArgs, 'model_args', (args.model_args or {}) | machine)


def is_refusal(error):
    """Returns whether the harness has refused what it was asked for, for which it has no class of its own."""
    *_, last = traceback.extract_tb(error.__traceback__)
    package, folder, _ = Path(last.filename).parts[-3:]
    return (package, folder) in REFUSING or (folder == 'lm_eval' and last.name == 'simple_evaluate')


@lambda main: command(main, parallel=True)
def main(argv):
    if {'--help', '-h'} & set(argv):
        print(__doc__)
    import nanoloop.harness  # noqa: F401, it registers the model; first, since it says if a package is missing

    # isort: split
    from lm_eval.__main__ import HarnessCLI
    from lm_eval.config.evaluate_config import EvaluatorConfig
    from lm_eval.utils import setup_logging

    setup_logging()
    sys.argv[1:] = argv  # which the harness reads
    try:
        cli = HarnessCLI()
        args = cli.parse_args()
        if args.command == 'run':
            complete(args, EvaluatorConfig)
        cli.execute(args)
    except (ValueError, TypeError, FileNotFoundError) as error:
        if not isinstance(error, UserError) and is_refusal(error):
            raise UserError(str(error)) from None
        raise


if __name__ == '__main__':
    main()
