"""
Any model of this program as a model of EleutherAI's lm-evaluation-harness, under the name nanoloop.

    import nanoloop.harness
    lm_eval.simple_evaluate('nanoloop', dict(out_dir='out-quickstart', n_loop=8), tasks=['lambada_openai'])

Conventions, which are the harness's for causal models:

    first token   the end-of-text token of the tokenizer stands in front of a text without a context; for a
                  tokenizer of characters or bytes it is a newline, as in eval.py
    long texts    lose tokens at their beginning, so that the model reads block_size tokens; a rolling text,
                  or a continuation of more than block_size tokens, is cut into windows, see rolling_windows
    long prompts  lose tokens at their beginning, so that max_gen_toks more fit into block_size; if it is too
                  small for these, which the harness refuses, the text goes on beyond it as in generate.py
    end           a generated text ends before a text of `until`, before a special end-of-text token, or after
                  max_gen_toks tokens

Importing this file raises UserError without lm-eval. Reference: https://github.com/EleutherAI/lm-evaluation-harness
"""

import itertools
import logging
from dataclasses import astuple
from types import SimpleNamespace

import numpy as np
import torch

from nanoloop.checkpoint import (
    check_tokenizer,
    configure_checkpoint,
    find_model,
    find_tokenizer,
    load_checkpoint,
)
from nanoloop.checks import UserError, check, missing_package
from nanoloop.decode import Stats, prepare_linears_
from nanoloop.generate import Generation
from nanoloop.harness_args import GenerationArgs, ModelArgs, make
from nanoloop.machine import setup
from nanoloop.parallel import gather
from nanoloop.perplexity import rolling_windows
from nanoloop.scoring import Evaluation, Item, Text, interleave, score
from nanoloop.text_losses import batches, pad
from nanoloop.text_stream import TextStream

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import normalize_gen_kwargs
    from tqdm import tqdm
except ImportError:
    raise missing_package('lm-evaluation-harness', 'harness', 'lm-eval') from None

log = logging.getLogger('lm_eval.nanoloop')  # the harness shows its own loggers only
NO_CHAT = "False: this program's models have no chat template"
BATCH_TOKENS = 8192  # of a batch, padding included, for batch_size=auto


def read_generation(gen_kwargs):
    """Returns (GenerationArgs, a list of texts that end the generated text) of a request's gen_kwargs."""
    try:
        values = normalize_gen_kwargs(gen_kwargs, GenerationArgs.max_gen_toks)
    except (TypeError, ValueError) as error:
        raise UserError(f'gen_kwargs={gen_kwargs}: {error}') from None
    stops = [stop for stop in values.pop('until') if stop is not None]
    check(all(isinstance(stop, str) for stop in stops), 'until', stops, 'a text or a list of texts')
    return make(GenerationArgs, 'gen_kwargs', values), stops


def group_by_context(requests, texts):
    """Returns Items of the texts of requests, of each at least one; the Item's info has requests, a list.

    requests: (strings, context, continuation) each. texts: a list of Texts for each. Requests with the same
    context, one behind the other, are one Item, and so share its computation, unless it is the smaller part.
    """
    items, last, n_ends = [], None, 0
    for (strings, context, continuation), own in zip(requests, texts, strict=True):
        if not own:
            continue
        n_ends += len(continuation)
        whole = len(own) == 1 and len(own[0].ids) == len(context) + len(continuation)
        if not (whole and context == last and n_ends <= len(context)):
            items.append(Item([], dict(requests=[])))
            last, n_ends = context if whole else None, len(continuation)
        items[-1].texts.extend(own)
        items[-1].info['requests'].append((strings, len(own)))
    return items


@register_model('nanoloop')
class NanoLoop(TemplateLM):
    """A model as the harness sees it. args: see ModelArgs.

    Several processes, started by torchrun, share the requests of each call.
    """

    def __init__(self, **args):
        super().__init__()
        c = make(ModelArgs, 'model_args', args)
        check_tokenizer(c.out_dir if c.init_from == 'resume' else c.init_from)
        found = find_model(c, log.warning)
        config, *_ = configure_checkpoint(found)
        self.policy = c.policy(config)
        self.words = find_tokenizer(found)  # the harness expects chat templates of `tokenizer`
        machine = dict(backend='auto', compile=False, shard=False, deterministic=False, peak_flops=None)
        seed = torch.initial_seed()  # which the harness has set from its flag --seed
        self.m = m = setup(SimpleNamespace(device=c.device, dtype=c.dtype, seed=seed, **machine))
        self._device, self.batch_size, self.max_length = m.device, c.batch_size, config.block_size
        self.generator = torch.Generator(m.device).manual_seed((seed + m.rank) % 2**63)
        self.model, self.checkpoint = load_checkpoint(found, m.device)
        prepare_linears_(self.model, m.dtype)
        self.mean_loops = {}  # {kind of request: loops per token of the last call}
        about = ' '.join([f'n_loop={self.policy.n_loop}', self.policy.name]).strip()
        log.info('%s: %s; %s', found['path'], about, m.line)

    def get_model_info(self):
        """Returns what the harness writes into its file of results about the model."""
        return dict(
            checkpoint=self.checkpoint['path'],
            weights=self.checkpoint.get('weights', 'raw'),
            step=int(self.checkpoint['iter_num']),
            n_loop=self.policy.n_loop,
            policy=self.policy.name,
            mean_loops=self.mean_loops,
            dtype=str(self.m.dtype)[6:],
            model_num_parameters=sum(p.numel() for p in set(self.model.parameters())),
        )

    # tokens

    @property
    def eot_token_id(self):
        return self.words.eot_token

    def tok_encode(self, string, add_special_tokens=None, **kwargs):
        """Returns the ids of a text. None is added, and special tokens in it are ordinary text."""
        ids, size = self.words.encode(string), self.model.config.vocab_size
        check(max(ids, default=0) < size, 'text', string[:40], f'text in the {size} tokens of the model')
        return ids

    def apply_chat_template(self, chat_history, add_generation_prompt=True):
        raise UserError(f'apply_chat_template=True, expected {NO_CHAT}')

    @property
    def tokenizer_name(self):
        raise UserError(f'apply_chat_template=True, expected {NO_CHAT}')

    # requests

    def batch_tokens(self, longest):
        """Returns how many tokens a batch may have, of rows of at most `longest` tokens."""
        return self.batch_size * longest if isinstance(self.batch_size, int) else BATCH_TOKENS

    def progress(self, total, name, disable):
        return tqdm(total=total, desc=f'Running {name} requests', disable=disable or self.m.rank > 0)

    def loglikelihood_rolling(self, requests, disable_tqdm=False):
        """Returns log p of each request's whole text, as the class LM of the harness says."""
        whole = [(r.args, [self.prefix_token_id], self.tok_encode(r.args[0])) for r in requests]
        scores = self._loglikelihood_tokens(whole, disable_tqdm, name='loglikelihood_rolling')
        return [log_p for log_p, _ in scores]

    def _loglikelihood_tokens(self, requests, disable_tqdm=False, name='loglikelihood'):
        """Returns (log p of the continuation, whether its tokens are the most likely ones) of each request.

        requests: (strings, ids of the context, ids of the continuation) each. name: the method that is asked.
        """
        texts = [self.texts_of(context, continuation) for _, context, continuation in requests]
        items = group_by_context(requests, texts)

        def judge(item, ces, predicted):
            results = zip(item.texts, ces, predicted, strict=True)
            answers = []
            for strings, n in item.info['requests']:
                own = list(itertools.islice(results, n))
                log_p = -float(sum(ce.sum() for _, ce, _ in own))
                greedy = all(np.array_equal(np.array(text.ids)[text.scored], top) for text, _, top in own)
                answers.append((log_p, greedy))
                self.remember(name, strings, log_p if name == 'loglikelihood_rolling' else answers[-1])
            return dict(answers=answers)

        answers = iter(())
        if items:
            longest = max(len(text.ids) for item in items for text in item.texts)
            evaluation = Evaluation(name, '', items, judge, None)
            with self.progress(len(range(self.m.rank, len(items), self.m.world)), name, disable_tqdm) as bar:
                tell = lambda done, n: bar.update(done - bar.n)  # noqa: E731
                options = self.m, self.batch_tokens(longest), tell
                (result,) = score(self.model, evaluation, [self.policy], *options)
            self.mean_loops[name] = result.mean_loops
            answers = (answer for record in result.records for answer in record['answers'])
        return [next(answers) if own else (0.0, True) for own in texts]

    def texts_of(self, context, continuation):
        """Returns the Texts whose scored tokens are the continuation, none if it is empty."""
        context = context or [self.prefix_token_id]
        if len(continuation) > self.max_length:
            return rolling_windows(continuation, context[-1], self.max_length)
        ids = [*context, *continuation][-(self.max_length + 1) :]
        return [Text(ids, slice(len(ids) - len(continuation), len(ids)))] if continuation else []

    def generate_until(self, requests, disable_tqdm=False):
        """Returns the text behind each request's context, as the class LM of the harness says."""
        settings = [read_generation(request.args[1]) for request in requests]
        prompts = [self.prompt_of(r.args[0], args) for r, (args, _) in zip(requests, settings, strict=True)]
        own, answers, stats = range(self.m.rank, len(requests), self.m.world), {}, Stats()
        groups = {}  # {settings: indices of requests}: rows of a batch have the same
        for i in own:
            groups.setdefault(astuple(settings[i][0]), []).append(i)
        with self.progress(len(own), 'generate_until', disable_tqdm) as bar:
            for group in groups.values():
                args, _ = settings[group[0]]
                lengths = [len(prompts[i]) + args.max_gen_toks for i in group]
                for batch in batches(lengths, self.batch_tokens(max(lengths))):
                    rows = [group[i] for i in batch]
                    stops = [settings[i][1] for i in rows]
                    texts, new_stats = self.generate([prompts[i] for i in rows], stops, args)
                    stats += new_stats
                    for i, text in zip(rows, texts, strict=True):
                        answers[i] = text
                        self.remember('generate_until', requests[i].args, text)
                    bar.update(len(rows))
        ranks = gather(self.m, ([answers[i] for i in own], stats))
        if requests:
            self.mean_loops['generate_until'] = sum((part[1] for part in ranks), Stats()).mean_loops
        return interleave([part[0] for part in ranks])

    def prompt_of(self, context, args):
        """Returns the ids of a context, without those at its beginning that leave no room."""
        ids, room = self.tok_encode(context) or [self.prefix_token_id], self.max_length - args.max_gen_toks
        return ids[-room:] if room > 0 else ids

    def generate(self, prompts, stops, args):
        """Returns the texts behind a batch of prompts (ids), and the Stats.

        stops: the texts that end it, for each prompt. args: GenerationArgs.
        """
        special = self.words.special_ids and not self.words.token_bytes[self.eot_token_id]
        end = self.eot_token_id if special else None
        texts, lengths = [TextStream(self.words, *own) for own in stops], [len(ids) for ids in prompts]
        idx = pad([np.array(ids) for ids in prompts], 0, self.m)  # (B, T)
        options = dict(temperature=args.temperature, top_k=args.top_k or None, top_p=args.top_p)
        options |= dict(generator=self.generator, max_tokens=max(lengths) + args.max_gen_toks)
        with self.m.autocast():
            generation = Generation(self.model, idx, lengths, **options, **self.policy._asdict())
            for new in generation.stream(args.max_gen_toks):  # (B,)
                for text, token in zip(texts, new.tolist(), strict=True):
                    text.rest() if token == end else text.add(token)
                if all(text.done for text in texts):
                    break
        for text in texts:
            text.rest()
        return [text.text[: text.printed] for text in texts], generation.stats

    def remember(self, name, strings, answer):
        """Puts an answer into the file of the harness's flag --use_cache, from which a rerun continues.

        With several processes the harness alone does it, at the end: they always miss the same requests.
        """
        if self.m.world == 1:
            self.cache_hook.add_partial(name, strings, answer)
