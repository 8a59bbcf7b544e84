"""
Windows of attention by flex attention (arXiv:2412.05496), which skips the scores that a window hides. With a
dense mask all T x T scores are computed, and most of them are dropped.

The T x T scores are blocks of BLOCK queries and BLOCK keys. Where a query sees its own key and `window` keys
before it, query block i sees keys of the blocks

    i - (window + BLOCK - 1) // BLOCK  to  i

so that the number of blocks grows with T as window * T, not as T * T. Blocks i - (window + 1) // BLOCK + 1 to
i - 1 are seen whole: the kernel applies no mask inside them.

It is an entry of the table WINDOWS of model.py, which machine.py makes.
"""

import functools

import torch

from model import attend, make_window_mask

BLOCK = 128  # queries and keys of a block: torch's default, for which its kernels are tuned
MIN_LENGTH = 4 * BLOCK  # shorter rows have little to leave out
HEAD_DIMS = range(16, 257)  # channels of a head: below, there is no kernel; above, the kernels are slow


def flex_windows(model, T, window, works=lambda: True):
    """Returns (make_mask, attend) for T positions and the smallest window, see WINDOWS of model.py.

    Dense masks remain where nothing is hidden, and where flex attention cannot serve: with dropout, in
    float64, for other widths of a head, for short rows and for T that is no multiple of BLOCK (such lengths
    are many, and would need kernels of their own), and where everything runs eagerly (flex attention would
    then store all scores). works: returns whether kernels can be compiled; only asked where one is needed.
    """
    c = model.config
    head_dim, dropout = c.n_embd // c.n_head, c.dropout if model.training else 0.0
    pays = T >= MIN_LENGTH and T % BLOCK == 0 and T - 1 > window
    served = head_dim in HEAD_DIMS and not dropout and model.lm_head.weight.dtype != torch.float64
    if pays and served and not runs_eagerly() and works():
        return block_mask, flex_attend()
    return make_window_mask, attend


def runs_eagerly():
    """Returns whether torch.compiler.set_stance('force_eager') is in force. torch has no public question."""
    return torch._dynamo.eval_frame._stance.stance == 'force_eager'


def block_mask(pos, window):
    """Returns the BlockMask of queries that see their own key and the `window` keys before it.

    pos: (T,) positions in a row, T a multiple of BLOCK. It takes the place of model.make_window_mask.
    """
    return cached_block_mask(len(pos), window, pos.device)


@functools.lru_cache(maxsize=16)
def cached_block_mask(T, window, device):
    """See block_mask. The masks of the last lengths and windows are kept, for the next steps."""
    from torch.nn.attention.flex_attention import BlockMask

    def sees(row, head, query, key):  # indices, tensors () each
        return (query >= key) & (query - key <= window)

    # a mask that is made in inference mode could not be used in training
    with torch.inference_mode(False):
        i = torch.arange(T // BLOCK, device=device)  # (n,)
        behind = i[:, None] - i  # (n, n), of query block and key block
        seen = (behind >= 0) & (behind <= (window + BLOCK - 1) // BLOCK)
        whole = (behind > 0) & (behind < (window + 1) // BLOCK)
        lists = [*block_lists(seen & ~whole), *block_lists(whole)]
        return BlockMask.from_kv_blocks(*lists, BLOCK_SIZE=BLOCK, mask_mod=sees, seq_lengths=(T, T))


def block_lists(table):
    """Returns how many True each row has, (1, 1, n), and their columns, the first ones in (1, 1, n, n).

    table: (n, n). The first two dimensions stand for all rows of the batch and all heads.
    """
    columns = table.int().argsort(dim=-1, descending=True, stable=True)  # (n, n)
    return table.sum(dim=-1, dtype=torch.int32)[None, None], columns.int()[None, None]


@functools.cache
def flex_attend():
    """Returns a function that takes the place of model.attend, with masks from block_mask."""
    from torch.nn.attention.flex_attention import flex_attention

    compiled = torch.compile(flex_attention)  # not compiled, it would store all T x T scores

    def flex_or_plain(q, k, v, mask, dropout):
        """Computes softmax attention, see model.attend. mask: a BlockMask; None = causal."""
        if mask is None:
            return attend(q, k, v, None, dropout)
        # a block that is compiled compiles this as a part of it
        flex = flex_attention if torch.compiler.is_compiling() else compiled
        # under autocast a norm can leave queries and keys in float32; the kernels want one dtype
        return flex(q.to(v.dtype), k.to(v.dtype), v, block_mask=mask, enable_gqa=q.size(1) != k.size(1))

    return flex_or_plain
