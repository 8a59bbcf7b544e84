"""
Speculation: tokens are drafted with few loops of the model and then verified together with all of its loops.

Greedy decoding gives the same tokens as without speculation, sampling the same distribution. It is faster,
because several tokens at once take hardly longer than one. Verification continues from the states of the
draft: prelude and first loops are not computed again. With an early exit a token is verified with the loops
that it takes by itself; it can leave the loop during the draft.

Reference: speculative decoding, arXiv:2211.17192.
"""

import torch

from nanoloop.checks import check
from nanoloop.onednn import onednn_for
from nanoloop.tokens_in_loop import join_tokens, start_tokens


def check_speculation(model, n_rows, speculate, draft_loops, n_loop=None, kv_budget=None, warm_start=False,
                      **others):  # fmt: skip
    """Raises UserError if the options of a Generation and its Decoder exclude speculation."""
    n_loop = model.config.n_loop if n_loop is None else n_loop
    check(speculate >= 0, 'speculate', speculate, 'at least 0')
    if speculate:
        check(n_rows == 1, 'speculate', speculate, '0 for several rows')
        check(n_loop > 1, 'speculate', speculate, '0 with n_loop=1, where there is nothing to save')
        check(kv_budget in (None, n_loop), 'speculate', speculate, f'0 with kv_budget={kv_budget}')
        check(not warm_start, 'speculate', speculate, '0 with warm_start')
        check(1 <= draft_loops < n_loop, 'draft_loops', draft_loops, f'at least 1, below n_loop={n_loop}')


def draft_and_verify(decoder, sampler, token, n, draft_loops, compiled=False):
    """Returns the tokens that follow token (1,), 1 to n of them, a list of (1,).

    token: not in the decoder's cache yet. Afterwards it is, and so are the returned tokens except the last.
    compiled: n tokens are verified by a compiled step, if the decoder has any; with an exit as long as all of
    them run. Each n has a step of its own.
    """
    cache, with_exits = decoder.cache, decoder.early_exit is not None
    draft, verified = (draft_token, verify_tokens) if not with_exits else (draft_by_exits, verify_by_exits)
    (start,) = cache.lengths
    loops, predictions, drafts = [], [], [token]  # loops: what the verification goes on from
    for _ in range(n):
        with onednn_for(1):
            index = cache.reserve(1, compiled=decoder.compile)
            state, x = draft(decoder, drafts[-1][:, None], index, draft_loops)  # x: (1, 1, C)
            q = sampler.probabilities(x[:, -1])  # (1, V)
        loops.append(state)
        predictions.append(q)
        drafts.append(sampler.draw(q))
    cache.truncate(0, start)
    index = cache.reserve(n, compiled=compiled and decoder.compile)  # of `token` and all drafts but the last
    p = sampler.probabilities(verified(decoder, loops, index, draft_loops)[0])  # (n, V)
    tokens, n_accepted = verify(sampler, p, torch.cat(predictions), torch.cat(drafts[1:]))
    cache.truncate(0, start + len(tokens))
    decoder.stats.drafted += n
    decoder.stats.accepted += n_accepted
    return list(tokens[:, None])


def draft_token(decoder, idx, index, draft_loops):
    """Runs a token idx (1, 1) through draft_loops loops and the coda.

    Returns the prelude's output and the state, (1, 1, C) each, and the head's input (1, 1, C).
    """
    e, s, x = decoder.forward(idx, index, None, draft_loops)
    return (e, s), x


def verify_tokens(decoder, loops, index, draft_loops):
    """Runs the other loops of n tokens. Returns the head's input (1, n, C). loops: see draft_token."""
    e, s = (torch.cat(x, dim=1) for x in zip(*loops, strict=True))  # (1, n, C) each
    decoder.stats.loops_taken[decoder.n_loop] += len(loops)
    return decoder.go_on(e, s, index, draft_loops)


def draft_by_exits(decoder, idx, index, draft_loops):
    """Does what draft_token does where tokens exit: the token can leave within these loops.

    Returns its TokensInLoop and the head's input (1, 1, C).
    """
    tokens = start_tokens(decoder, idx, index)
    tokens.run(0, draft_loops)
    return tokens, tokens.draft()


def verify_by_exits(decoder, loops, index, draft_loops):
    """Does what verify_tokens does where tokens exit. loops: the TokensInLoop of n tokens."""
    tokens = join_tokens(loops, index)
    tokens.run(draft_loops, decoder.n_loop)
    return tokens.finish()[1]


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
