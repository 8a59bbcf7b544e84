"""
Speculation: tokens are drafted with few loops of the model and then verified together with all of its loops.

Greedy decoding gives the same tokens as without speculation, sampling the same distribution. It is faster,
because several tokens at once take hardly longer than one. Verification continues from the states of the
draft: prelude and first loops are not computed again.

Reference: speculative decoding, arXiv:2211.17192.
"""

import torch

from nanoloop.checks import check
from nanoloop.machine import onednn_for


def check_speculation(model, n_rows, speculate, draft_loops, n_loop=None, kv_budget=None, early_exit=None,
                      warm_start=False, compile=False, **others):  # fmt: skip
    """Raises UserError if the options of a Generation and its Decoder exclude speculation."""
    n_loop = model.config.n_loop if n_loop is None else n_loop
    check(speculate >= 0, 'speculate', speculate, 'at least 0')
    if speculate:
        check(n_rows == 1, 'speculate', speculate, '0 for several rows')
        check(n_loop > 1, 'speculate', speculate, '0 with n_loop=1, where there is nothing to save')
        check(early_exit is None, 'speculate', speculate, '0 with an exit')
        check(kv_budget in (None, n_loop), 'speculate', speculate, f'0 with kv_budget={kv_budget}')
        check(not warm_start, 'speculate', speculate, '0 with warm_start')
        check(not compile, 'compile', True, f'False with speculate={speculate}')
        check(1 <= draft_loops < n_loop, 'draft_loops', draft_loops, f'at least 1, below n_loop={n_loop}')


def draft_and_verify(decoder, sampler, token, n, draft_loops):
    """Returns the tokens that follow token (1,), 1 to n of them, a list of (1,).

    token: not in the decoder's cache yet. Afterwards it is, and so are the returned tokens except the last.
    """
    cache = decoder.cache
    (start,) = cache.lengths
    preludes, states, predictions, drafts = [], [], [], [token]
    for _ in range(n):
        with onednn_for(1):
            index = cache.reserve(1)
            e, s = decoder.run_prelude(drafts[-1][:, None], index)  # (1, 1, C) each
            s = decoder.run_loops(e, s, index, 0, draft_loops)
            q = sampler.probabilities(decoder.run_coda(s, index)[:, -1])  # (1, V)
        preludes.append(e)
        states.append(s)
        predictions.append(q)
        drafts.append(sampler.draw(q))
    cache.truncate(0, start)
    index = cache.reserve(n)  # of `token` and all drafts but the last
    e, s = torch.cat(preludes, dim=1), torch.cat(states, dim=1)  # (1, n, C) each
    s = decoder.run_loops(e, s, index, draft_loops, decoder.n_loop)
    p = sampler.probabilities(decoder.run_coda(s, index)[0])  # (n, V)
    tokens, n_accepted = verify(sampler, p, torch.cat(predictions), torch.cat(drafts[1:]))
    cache.truncate(0, start + len(tokens))
    decoder.stats.loops_taken[decoder.n_loop] += n
    decoder.stats.drafted += n
    decoder.stats.accepted += n_accepted
    return list(tokens[:, None])


def verify(sampler, p, q, drafts):
    """Turns tokens that were drafted from q into tokens that are drawn from p.

    p, q: (n, V) probabilities; drafts: (n,). A draft is accepted with probability min(1, p / q). The first
    one that is not accepted is replaced by a draw from max(0, p - q), and the drafts after it are dropped.
    Returns the tokens, 1 to n of them in a tensor, and the number of accepted drafts.
    """
    chance = torch.rand(len(drafts), device=p.device, dtype=p.dtype, generator=sampler.generator)
    at = drafts[:, None]  # (n, 1)
    accepted = chance * q.gather(1, at)[:, 0] < p.gather(1, at)[:, 0]  # (n,)
    n_accepted = int(accepted.int().cumprod(0).sum())
    if n_accepted == len(drafts):
        return drafts, n_accepted
    rest = (p[n_accepted] - q[n_accepted]).clamp(min=0)  # (V,)
    rest = rest if rest.any() else p[n_accepted]  # p and q differ in rounding only
    return torch.cat((drafts[:n_accepted], sampler.draw(rest[None]))), n_accepted
