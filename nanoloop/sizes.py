"""
Refuses sizes that no memory of this machine can hold, before anything is allocated.
"""

from nanoloop.checks import check
from nanoloop.machine import total_memory

FLOAT = 4  # bytes of a float32 number


def check_sizes(c, m, config):
    """Raises UserError for a key whose tensors alone take more memory than the device has.

    c: the run's keys; config: the model's GPTConfig. Counted are tables of embeddings, two matrices of
    attention in every layer, and a state for every token of a micro-batch. A run needs far more. So one that
    passes may still run out of memory.
    """
    layers, width = config.n_prelude + config.n_block + config.n_coda, config.n_embd
    tokens = c.batch_size * config.block_size
    memory = total_memory(m)
    # fmt: off
    for key, what, numbers in (
        ('vocab_size', 'the embeddings of all tokens', config.vocab_size * width),
        ('n_gram_rows', 'the embeddings of n-grams', config.n_gram_rows * width * (config.n_gram > 1)),
        ('n_embd', f'queries and outputs of attention in {layers:,} layers', 2 * width**2 * layers),
        ('batch_size', f'the states of {tokens:,} tokens', tokens * width),
    ):
        size = f'{what} take {FLOAT * numbers / 2**30:,.1f} GiB, this device has {memory / 2**30:,.1f}'
        check(FLOAT * numbers <= memory, key, c[key], f'fewer: {size}')
    # fmt: on
