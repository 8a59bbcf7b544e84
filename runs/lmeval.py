"""
The command lm-eval of EleutherAI's lm-evaluation-harness, for any model of this program.

    pip install -e ".[harness]"
    python runs/lmeval.py --model_args out_dir=out-quickstart,n_loop=8 --tasks lambada_openai
    python runs/lmeval.py --model_args init_from=gpt2 --tasks hellaswag --limit 100 --output_path results
    torchrun --standalone --nproc_per_node=8 runs/lmeval.py --model_args out_dir=out --tasks hellaswag

It has the flags of lm-eval (--help), of which --model is nanoloop, --batch_size and --device are auto unless
they are given. The keys of --model_args are out_dir, init_from, n_loop, exit, exit_threshold, min_loops,
kv_budget and dtype, see sample.py --help. A batch has 8192 tokens, or batch_size rows of the longest text.
"""

import sys
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from configurator import command
from nanoloop.checks import UserError

DEFAULTS = dict(model='nanoloop', batch_size='auto', device='auto')


def complete(args, EvaluatorConfig):  # noqa: N803, it is a class
    """Sets the flags that neither the command nor its file --config gives, and checks the model's."""
    from nanoloop.harness_args import ModelArgs, make

    given = EvaluatorConfig.load_yaml_config(args.config) if args.config else {}
    given |= {key: value for key, value in vars(args).items() if value}
    for key, value in DEFAULTS.items():
        setattr(args, key, given.setdefault(key, value))
    model_args = given.get('model_args') or {}
    if args.model == 'nanoloop' and isinstance(model_args, dict):  # before the harness reads all its tasks
        make(ModelArgs, 'model_args', model_args)


def is_refusal(error):
    """Returns whether the harness has refused what it was asked for, which has no class of its own."""
    frames = [Path(frame.filename).parts for frame in traceback.extract_tb(error.__traceback__)]
    return frames[-1][-3:-1] == ('lm_eval', 'config')


@lambda main: command(main, parallel=True)
def main(argv):
    import nanoloop.harness  # noqa: F401, it registers the model; first, since it says if a package is missing

    # isort: split
    from lm_eval.__main__ import HarnessCLI
    from lm_eval.config.evaluate_config import EvaluatorConfig
    from lm_eval.utils import setup_logging

    setup_logging()
    sys.argv[1:] = argv  # which the harness reads
    cli = HarnessCLI()
    args = cli.parse_args()
    try:
        if args.command == 'run':
            complete(args, EvaluatorConfig)
        cli.execute(args)
    except (ValueError, TypeError, FileNotFoundError) as error:
        if not isinstance(error, UserError) and is_refusal(error):
            raise UserError(str(error)) from None
        raise


if __name__ == '__main__':
    main()
