"""
Reinforcement learning: a source of batches that the model writes itself, for the training loop of train.py.

A step asks questions. The model samples rl_samples answers to each, its group. An answer's advantage is its
reward minus the mean of its group, and weighs the loss of its sampled tokens:

    loss = sum over sampled tokens of  advantage * -log p(token)  /  number of sampled tokens of the step

This is GRPO without its division by the standard deviation, without a KL term and with one update per
rollout, so without ratio and clipping: REINFORCE with the mean of a group as baseline. Prompts, and tokens
that a tool has forced, are no targets. Source: chat_rl of github.com/LoopedLMs/looped_nanochat.

Questions, samples and loops are functions of (seed, step, micro-batch) and of the weights. So a resumed run
writes the same answers.
"""

import functools
import itertools
import math
import time
from dataclasses import dataclass, fields

import torch

from nanoloop.batches import Batch, batch_seed, micro_batch_number
from nanoloop.checkpoint import find_tokenizer
from nanoloop.checks import Choice, Count, Positive, check, settle_fields
from nanoloop.files import hash_json
from nanoloop.objective import OBJECTIVE, loops_at
from nanoloop.parallel import reduce_sum
from nanoloop.pretraining import Task, build_model, check_micro_batches, origin, settle_config
from nanoloop.questions import find_questions
from nanoloop.randomness import random_sequence
from nanoloop.rollout import roll_out
from nanoloop.sizes import check_sizes


@dataclass
class RLConfig:
    # reinforcement learning
    rl_task: str = ''  # train on the model's own answers to the questions of a task; '' = off
    gsm8k: str = ''  # rl_task=gsm8k: file or folder of its questions; '' = from the Hugging Face hub
    words: str = ''  # rl_task=spellingbee, simplespelling: file with a word on each line; '' = downloaded
    rl_samples: Count = 16  # answers to each question; batch_size is a multiple of it
    max_new_tokens: Count = 256  # most tokens of an answer
    temperature: Positive = 1.0  # of the samples; only 1 without top_k draws from what is trained
    top_k: Count | None = None  # sample from the k most likely tokens; None = from all
    reward_loops: Choice(('last', 'all')) = 'last'  # all: every loop's prediction is trained, objective=step

    def __post_init__(self):
        """Raises UserError for a value out of its bounds."""
        settle_fields(self)


def check_rl_keys(c):
    """Raises UserError for keys of RLConfig out of their bounds, and for those given without rl_task."""
    c.build(RLConfig)
    for field in fields(RLConfig):
        used = c.rl_task or field.name not in c.given or c[field.name] == field.default
        expected = f'{field.default!r} without rl_task=NAME, which says what is asked'
        check(used, field.name, c[field.name], expected)


def reinforcement(c, m, checkpoint, stopped, say):
    """Returns the Task of training on c.rl_task, and settles c's keys of the model.

    Arguments: as those of pretraining.pretraining. Raises UserError.
    """
    check_micro_batches(c, m)
    check_keys(c, checkpoint)
    tokenizer = find_tokenizer(checkpoint)
    config = settle_config(c, dict(tokenizer=tokenizer.spec), checkpoint)
    check(config.dropout == 0, 'dropout', config.dropout, '0 with rl_task: answers are sampled without it')
    questions = find_questions(c, tokenizer, config)
    check_sizes(c, m, config)
    model = build_model(c, m, config, checkpoint)
    say(questions.describe())
    if c.loop_sampling != 'fixed':
        say(f'answers are sampled with the loops of their step, which are drawn: {c.loop_sampling}')
    make = functools.partial(make_batch, model, questions, c, m)
    validate = functools.partial(evaluate, model, questions, c, m, stopped, say.now)
    data = dict(source=questions.name, sha256=hash_json(questions.identity))
    kept = dict(tokenizer=tokenizer.spec, data=data)
    batches = functools.partial(one_by_one, make, c, m)
    return Task(
        model, batches, validate, kept, origin(c, checkpoint), row_tokens(questions, c), dropout=False
    )


def row_tokens(questions, c):
    """Returns T of the batches: that of the longest prompt with the longest answer, at most block_size."""
    return min(c.block_size, questions.longest_prompt + questions.max_new_tokens - 1)


def check_keys(c, checkpoint):
    """Raises UserError for keys that mean nothing with rl_task. reward_loops=all sets the objective."""
    check(c.epochs is None, 'epochs', c.epochs, 'None with rl_task, whose questions are drawn')
    check(checkpoint is not None, 'init_from', c.init_from, 'a PATH with rl_task: weights to begin with')
    if c.reward_loops == 'all':
        fits = 'objective' not in c.given or c.objective == 'step'
        check(fits, 'objective', c.objective, 'step with reward_loops=all')
        c['objective'] = 'step'
    plain = ', '.join(name for name, rule in OBJECTIVE.items() if not rule.trains_gate)
    fits = not OBJECTIVE[c.objective].trains_gate
    check(fits, 'objective', c.objective, f'one without the exit gate with rl_task: {plain}')
    check(c.rl_samples > 1, 'rl_samples', c.rl_samples, 'at least 2: answers are compared with their group')
    expected = f'a multiple of rl_samples={c.rl_samples}'
    check(c.batch_size % c.rl_samples == 0, 'batch_size', c.batch_size, expected)
    check(not c.eval_loops, 'eval_loops', c.eval_loops, "'' with rl_task; eval.py measures other loops")
    check(c.eval_iters > 0, 'eval_iters', c.eval_iters, 'at least 1 with rl_task')


def one_by_one(make, c, m, step):
    """Yields make(step, micro) from a step on; each is made when it is asked for, with the newest weights."""
    micros = range(c.gradient_accumulation_steps // m.world)
    for later in itertools.count(step):
        for micro in micros:
            yield make(later, micro)


def make_batch(model, questions, c, m, step, micro):
    """Returns the Batch of answers to a micro-batch's questions, with advantages as weights."""
    began, number, T = time.monotonic(), micro_batch_number(m, micro), row_tokens(questions, c)
    asked = questions.train(step, number, c.batch_size // c.rl_samples)
    seed = random_sequence(c.seed, step, number, stream='rollouts')
    rollouts, rewards = ask(model, questions, asked, loops_at(step, c), seed, c, m)  # rewards: (n, samples)
    advantages = (rewards - rewards.mean(dim=1, keepdim=True)).flatten()  # (B,)
    n = rollouts.ids.size(1)
    idx = torch.zeros(c.batch_size, T, dtype=torch.int64)
    targets = torch.full_like(idx, -1)
    idx[:, : n - 1] = rollouts.ids[:, :-1]
    targets[:, : n - 1] = rollouts.ids[:, 1:].where(rollouts.sampled[:, 1:], -1)
    values = describe_answers(rollouts, rewards) | {'rollout_ms': 1000 * (time.monotonic() - began)}
    weights = advantages[:, None].repeat(1, T)
    return Batch(idx, targets, batch_seed(c, step, number), weights, values)


def ask(model, questions, asked, n_loop, seed, c, m):
    """Samples c.rl_samples answers to each question. Returns Rollouts and rewards (n, rl_samples), float64.

    seed: a numpy SeedSequence.
    """
    generator = torch.Generator(m.device).manual_seed(int(seed.generate_state(1)[0]))
    each = [question for question in asked for _ in range(c.rl_samples)]
    options = dict(stop=questions.stop, tool=questions.tool, temperature=c.temperature, top_k=c.top_k)
    with torch.compiler.set_stance('force_eager'), m.autocast():
        prompts, n = [question.prompt for question in each], questions.max_new_tokens
        rollouts = roll_out(model, prompts, n, generator=generator, n_loop=n_loop, **options)
    rewards = [question.reward(answer) for question, answer in zip(each, rollouts.answers, strict=True)]
    return rollouts, torch.tensor(rewards, dtype=torch.float64).view(-1, c.rl_samples)


def describe_answers(rollouts, rewards):
    """Returns what is logged of a micro-batch's answers, {name: mean}. rewards: (n, samples)."""
    sampled = rollouts.sampled
    return {
        'reward': rewards.mean().item(),
        **pass_at_k(rewards),
        'no_advantage': (rewards == rewards[:, :1]).all(dim=1).double().mean().item(),
        'answer_tokens': sampled.sum().item() / len(sampled),
        'cut_off': 1 - sum(rollouts.finished) / len(sampled),
        'entropy': rollouts.entropy.sum().item() / sampled.sum().item(),
    }


def pass_at_k(rewards):
    """Returns the probability that one of k answers is right, for k = 1, 2, 4, ...: {'pass@1': mean, ...}.

    rewards: (n, samples); an answer is right if its reward is 1 or more. With c of s answers right it is
    1 - C(s - c, k) / C(s, k), which is unbiased. Source: Chen et al., arXiv:2107.03374.
    """
    s, right, result, k = rewards.size(1), (rewards >= 1).sum(dim=1).tolist(), {}, 1
    while k <= s:
        result[f'pass@{k}'] = sum(1 - math.comb(s - n, k) / math.comb(s, k) for n in right) / len(right)
        k *= 2
    return result


def evaluate(model, questions, c, m, stopped, tell):
    """Returns {'val': {loss, reward, pass@1, ...}}, or None if stopped() became true. The mode is kept.

    The loss is 1 - reward. It asks c.eval_iters questions that are held out, always the same ones, with
    c.rl_samples answers of n_loop loops to each. tell: see evaluate.evaluate.
    """
    asked = questions.val(c.eval_iters)
    n, training = c.batch_size // c.rl_samples, model.training
    names = ['reward', *pass_at_k(torch.zeros(1, c.rl_samples))]
    sums = torch.zeros(len(names), dtype=torch.float64)  # a rank without a question adds nothing
    model.eval()
    try:
        for start in range(0, len(asked), n * m.world):  # as many rounds on every rank
            tell('evaluating the answers', f': {start:,} of {len(asked):,} questions')
            if stopped():
                return None
            number = start // n + m.rank
            own = asked[number * n : (number + 1) * n]
            if own:
                seed = random_sequence(0, number, stream='rollouts')
                _, rewards = ask(model, questions, own, c.n_loop, seed, c, m)
                means = [rewards.mean().item(), *pass_at_k(rewards).values()]
                sums += len(own) * torch.tensor(means, dtype=torch.float64)
    finally:
        model.train(training)
    means = dict(zip(names, (reduce_sum(m, sums) / len(asked)).tolist(), strict=True))
    return dict(val=dict(loss=1 - means['reward'], **means))
