"""
Baselines of a looped model: the same recipe without loops. They replace keys after all files and flags.

    same_params    one loop
    same_flops     the loops unrolled to layers with weights of their own; equal in forward FLOPs without the
                   injection's. Full backpropagation: with bptt_k < n_loop its training costs more.
"""

import itertools


def unrolled_windows(c):
    """Returns the window_pattern of a looped model's layers in the order of their execution."""
    layers = c.n_prelude + c.n_block + c.n_coda
    letters = ''.join(itertools.islice(itertools.cycle(c.window_pattern), layers))
    prelude, loop = letters[: c.n_prelude], letters[c.n_prelude : c.n_prelude + c.n_block]
    return prelude + loop * c.n_loop + letters[c.n_prelude + c.n_block :]


ONE_LOOP = dict(n_loop=1, bptt_k=None, objective='end', loop_sampling='fixed', loop_max=None, loop_warmup=0)
ONE_LOOP['loop_growth'] = 'sqrt'
PLAIN = dict(
    ONE_LOOP,
    input_injection='passthrough',
    state_init='prelude',
    state_std=None,
    state_update='replace',
    update_alpha=1.0,
)
BASELINE = {  # the run's keys -> {key: value} that replace some of them
    '': lambda c: {},
    'same_params': lambda c: ONE_LOOP,
    'same_flops': lambda c: dict(PLAIN, n_block=c.n_block * c.n_loop, window_pattern=unrolled_windows(c)),
}


def apply_baseline(c, say=None):
    """Replaces in c the keys that c.baseline changes. say: called with a line per key that changes."""
    for key, value in BASELINE[c.baseline](c).items():
        if c[key] != value and say:
            say(f'baseline {c.baseline}: {key} = {value!r}')
        c[key] = value
