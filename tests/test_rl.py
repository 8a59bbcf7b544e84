"""Rollouts and reinforcement learning: what is sampled, how it is weighed, and that a run resumes exactly."""

import itertools
import json
import math
import types
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from helpers import load, randomize, read_log, same
from test_recipes import RECIPES, build

import train
from model import GPT, GPTConfig
from nanoloop import rl
from nanoloop.added_tokens import chat_tokenizer
from nanoloop.generated import find_generated
from nanoloop.objective import TrainingLoss, set_trained_parts
from nanoloop.questions import Question, find_questions
from nanoloop.randomness import random_generator
from nanoloop.rl import RLConfig, one_by_one, pass_at_k
from nanoloop.rollout import roll_out
from nanoloop.tokenizer import Bytes
from nanoloop.training_step import train_step
from train import TrainConfig

SIZES = dict(block_size=12, vocab_size=23, n_head=2, n_embd=12, n_prelude=1, n_block=2, n_coda=1, n_loop=3)
M = types.SimpleNamespace(
    rank=0, world=1, cpu_group=None, device='cpu', autocast=nullcontext, to_device=lambda x: x
)
CHAT = chat_tokenizer(Bytes())
PROMPTS = [[1, 2, 3], [4, 5, 6, 7, 8], [9]]
LOOPS = pytest.mark.parametrize('n_loop', [1, 2, 5])


def log_p_of(model, rollouts, n_loop):
    """log p of every token by full forward passes of the training, (B, N), 0 for the first."""
    idx = rollouts.ids[:, :-1]
    padded = torch.nn.functional.pad(idx, (0, model.config.block_size - idx.size(1)))
    targets = torch.nn.functional.pad(rollouts.ids[:, 1:], (0, padded.size(1) - idx.size(1)), value=-1)
    ce, _ = model.loss_table(padded, targets, n_loop)
    return torch.nn.functional.pad(-ce[-1, :, : idx.size(1)], (1, 0))


@LOOPS
@pytest.mark.parametrize('name', RECIPES)
def test_sampled_log_probabilities_are_those_of_the_training_forward(name, n_loop):
    sizes = ['--size=1'] if name == 'looped_nanochat' else ['--n_embd=24', '--n_head=2', '--n_block=2']
    model = build(name, *sizes)[0].float()
    rollouts = roll_out(model, PROMPTS, 8, generator=torch.Generator().manual_seed(0), n_loop=n_loop)
    expected = log_p_of(model, rollouts, n_loop).where(rollouts.sampled, 0.0)
    assert rollouts.sampled.sum() == 24 and torch.allclose(rollouts.log_p, expected, atol=1e-4)


def test_an_answer_ends_at_a_stop_token_and_forced_tokens_are_not_sampled():
    """Token 3 calls the tool, which forces two tokens; 5, 11 and 17 end an answer."""
    model = randomize(GPT(GPTConfig(**SIZES | dict(block_size=64)))).eval()
    with torch.no_grad():  # near a uniform distribution: every token comes
        model.lm_head.weight.mul_(0.01)
    tool = lambda ids: [20, 21] if ids[-1] == 3 else []  # noqa: E731
    prompts, stop = [*PROMPTS] * 20, (5, 11, 17)
    result = roll_out(model, prompts, 12, stop, tool, generator=torch.Generator().manual_seed(0))
    n_forced = 0
    for row, (prompt, answer, finished) in enumerate(
        zip(prompts, result.answers, result.finished, strict=True)
    ):
        ids, sampled = result.ids[row].tolist(), result.sampled[row].tolist()
        n = len(prompt) + len(answer) + finished
        assert ids[: len(prompt)] == prompt and not any(sampled[: len(prompt)])
        assert ids[len(prompt) : n] == answer + ids[n - 1 : n] * finished and not any(ids[n:] + sampled[n:])
        assert (
            finished == (ids[n - 1] in stop)
            and not set(stop) & set(answer)
            and (finished or len(answer) == 12)
        )
        for place in range(len(prompt), n):
            if sampled[place] and ids[place] == 3:
                assert ids[place + 1 : min(n, place + 3)] == [20, 21][: n - place - 1]
                assert not any(sampled[place + 1 : place + 3])
                n_forced += len(ids[place + 1 : min(n, place + 3)])
    assert n_forced > 10 and 0 < sum(result.finished) < len(prompts)
    assert (~result.sampled).sum() == n_forced + sum(map(len, prompts)) + sum(
        result.ids.size(1) - len(p) - len(a) - f
        for p, a, f in zip(prompts, result.answers, result.finished, strict=True)
    )
    # what follows a forced token is predicted from it
    expected = log_p_of(model, result, 3).where(result.sampled, 0.0)
    assert torch.allclose(result.log_p, expected, atol=1e-5)


def test_the_entropy_is_that_of_the_distribution_a_token_is_drawn_from():
    model = randomize(GPT(GPTConfig(**SIZES))).eval()
    options = dict(generator=torch.Generator().manual_seed(0))
    result = roll_out(model, [[1, 2]], 1, temperature=0.5, top_k=4, **options)
    logits = model(torch.tensor([[1, 2]]))[0][0, -1].topk(4).values / 0.5
    p = logits.softmax(dim=-1)
    assert result.entropy[0, 2].item() == pytest.approx(-(p * p.log()).sum().item(), abs=1e-5)
    token = result.ids[0, 2]
    assert result.log_p[0, 2] == pytest.approx(
        (model(torch.tensor([[1, 2]]))[0][0, -1, token] / 0.5 - logits.logsumexp(0)).item(), abs=1e-5
    )


def test_rollouts_need_a_model_in_eval_mode():
    with pytest.raises(ValueError, match='eval mode'):
        roll_out(GPT(GPTConfig(**SIZES)), PROMPTS, 2)


class Coin:
    """Questions with prompts [1, 0] and [1, 1]; an answer of two tokens is worth its number of ones."""

    name, identity, stop, tool, max_new_tokens, longest_prompt = 'coin', [], (), None, 2, 9

    def train(self, step, number, n):
        return [Question([1, (step + i) % 2], lambda answer: float(sum(answer))) for i in range(n)]

    val = None


def test_a_step_is_the_policy_gradient_written_out():
    """On two tokens: sum of A (softmax - onehot) / n is the gradient at the logits."""
    sizes = SIZES | dict(vocab_size=2, block_size=4, tie_weights=False)
    model = randomize(GPT(GPTConfig(**sizes))).double()
    keys = vars(TrainConfig(batch_size=12, gradient_accumulation_steps=2, grad_clip=0.0))
    c = types.SimpleNamespace(**keys, **vars(RLConfig(rl_samples=4)), block_size=4, n_loop=3)
    set_trained_parts(model, rl.OBJECTIVE['end'], dropout=False)
    batches = [rl.make_batch(model, Coin(), c, M, 5, micro) for micro in range(2)]
    assert batches[0].idx.shape == (12, 4)
    assert batches[0].weights.is_contiguous()  # else it cannot be copied to pinned memory
    params = [p for p in model.parameters() if p.requires_grad]
    total = [torch.zeros_like(p) for p in params]
    for batch in batches:
        assert (batch.idx[:, 3:] == 0).all() and (batch.targets[:, 1:3] >= 0).all()
        assert (batch.targets[:, [0, 3]] == -1).all()  # the prompt and what is behind the answer
        rewards = batch.targets[:, 1:3].sum(dim=1).double().view(3, 4)
        advantages = (rewards - rewards.mean(dim=1, keepdim=True)).flatten()
        (state,), inputs = model.loop_states(batch.idx, 3)
        logits = model.logits(model.run_coda(state, inputs))[:, 1:3]  # (12, 2 tokens, 2)
        onehot = torch.nn.functional.one_hot(batch.targets[:, 1:3], 2)
        by_hand = advantages[:, None, None] * (logits.softmax(dim=-1) - onehot) / (2 * 12 * 2)
        for sum_, grad in zip(total, torch.autograd.grad(logits, params, by_hand.detach()), strict=True):
            sum_ += grad
        assert batch.values['reward'] == rewards.mean().item() and batch.values['answer_tokens'] == 2
    before = [p.detach().clone() for p in params]
    sgd, scaler = torch.optim.SGD(params, lr=1.0), torch.amp.GradScaler('cpu', enabled=False)
    result = train_step(TrainingLoss(model, c), [sgd], scaler, iter(batches), 3, c, M)
    assert any(grad.abs().max() > 1e-3 for grad in total)
    for old, p, grad in zip(before, params, total, strict=True):
        assert torch.allclose(old - p, grad, atol=1e-10)
    mean = sum(batch.values['reward'] for batch in batches) / 2
    assert result.extra['reward'] == pytest.approx(mean, abs=1e-12)


def test_tokens_that_a_tool_forces_are_no_targets():
    class Forced(Coin):
        tool = staticmethod(lambda ids: [1] if len(ids) == 1 else [])

    model = randomize(GPT(GPTConfig(**SIZES | dict(vocab_size=2)))).eval()
    c = types.SimpleNamespace(**vars(TrainConfig(batch_size=8)), **vars(RLConfig(rl_samples=4)))
    c.block_size, c.n_loop = 12, 3
    batch = rl.make_batch(model, Forced(), c, M, 5, 0)
    assert (batch.idx[:, 3] == 0).all() and (batch.targets[:, 1] >= 0).all()
    assert (batch.targets[:, [0, 2, 3]] == -1).all() and batch.values['answer_tokens'] == 1


def test_answers_are_made_with_the_newest_weights_and_a_seed_of_their_place():
    made = []
    source = one_by_one(
        lambda *place: made.append(place), types.SimpleNamespace(gradient_accumulation_steps=2), M, 7
    )
    for n in range(5):
        assert len(made) == n  # none is made before it is asked for
        next(source)
    assert made == [(7, 0), (7, 1), (8, 0), (8, 1), (9, 0)]


@pytest.mark.parametrize('n_questions', [1, 2, 5])
def test_an_evaluation_does_not_depend_on_the_number_of_processes(n_questions):
    """Also where a rank has no question. Without a group reduce_sum gives each rank's part of the means."""
    model = randomize(GPT(GPTConfig(**SIZES | dict(vocab_size=2))))
    c = types.SimpleNamespace(**vars(TrainConfig(batch_size=8)), **vars(RLConfig(rl_samples=4)), n_loop=3)
    c.eval_iters, questions = n_questions, Coin()
    questions.val = lambda n: Coin().train(0, 0, n)

    def rewards(rank, world):
        m = types.SimpleNamespace(**vars(M) | dict(rank=rank, world=world))
        val = rl.evaluate(model, questions, c, m, lambda: False, lambda *_: None)['val']
        assert list(val) == ['loss', 'reward', 'pass@1', 'pass@2', 'pass@4']
        return np.array([*val.values()][1:])

    alone, parts = rewards(0, 1), [rewards(rank, 2) for rank in range(2)]
    assert alone[0] > 0 and np.allclose(sum(parts), alone, rtol=0, atol=1e-12)
    assert not parts[1].any() == (n_questions < 3)


def test_pass_at_k_is_the_share_of_draws_of_k_answers_with_a_right_one():
    rewards = torch.tensor(np.random.default_rng(0).integers(0, 2, (3, 5)), dtype=torch.float64)
    rewards[0] = torch.tensor([0, 0, 1.5, 0, 0.9])
    values = pass_at_k(rewards)
    assert list(values) == ['pass@1', 'pass@2', 'pass@4']
    for name, value in values.items():
        draws = [itertools.combinations(row, int(name[5:])) for row in (rewards >= 1).tolist()]
        assert value == pytest.approx(
            np.mean([np.mean([any(draw) for draw in row]) for row in draws]), abs=1e-12
        )


@pytest.mark.parametrize('name', ['mano:2', 'p_hop:2'])
def test_questions_of_a_generated_task_are_its_rows(name):
    data = find_generated(name)
    questions = questions_of(name)
    rows, levels = data.draw(random_generator(3, 5, 1, stream='data'), 8, 'train')
    for row, level, question in zip(rows, levels, questions.train(5, 1, 8), strict=True):
        place = data.answer_places(np.array([level]))[0]
        assert question.prompt == row[:place].tolist() and question.prompt[-1] == data.ANSWER
        assert question.reward([row[place]]) == 1 and question.reward([row[place] - 1]) == 0
    val, more = questions.val(20), questions.val(30)
    assert [q.prompt for q in more[:20]] == [q.prompt for q in val]
    assert len({tuple(question.prompt) for question in more}) == 30
    if name == 'p_hop:2':  # mano's tables belong to both splits
        made = np.array([[*question.prompt, 0] for question in more])
        assert data.held_out(made, np.ones(30, int)).all()


def questions_of(name):
    data = find_generated(name)
    tokenizer = types.SimpleNamespace(spec=dict(words=data.words))
    c = types.SimpleNamespace(init_from='x', rl_task=name, gsm8k='', words='', seed=3)
    return find_questions(c, tokenizer, types.SimpleNamespace(block_size=data.row_len))


def gsm8k(tmp_path, n=40, **keys):
    """Questions of a made file of GSM8K in bytes, the answer to question i is i."""
    path = tmp_path / 'gsm8k.jsonl'
    lines = [
        dict(question='x' * (i % 9) + f'{i}?', answer=f'It is <<{i}+0={i}>>{i}.\n#### {i}') for i in range(n)
    ]
    path.write_text(''.join(json.dumps(line) + '\n' for line in lines))
    c = dict(
        rl_task='gsm8k', gsm8k=str(path), words='', seed=3, max_new_tokens=60, gradient_accumulation_steps=2
    )
    return find_questions(types.SimpleNamespace(**c | keys), CHAT, types.SimpleNamespace(block_size=72))


def test_an_epoch_asks_every_question_once_in_an_order_of_its_own(tmp_path):
    questions = gsm8k(tmp_path)
    n = len(questions.indices['train'])
    batches = [questions.train(step, number, 3) for step in range(n) for number in range(2)]  # six epochs
    prompts = [tuple(question.prompt) for batch in batches for question in batch]
    epochs = [prompts[i : i + n] for i in range(0, 6 * n, n)]
    assert all(len(set(epoch)) == n for epoch in epochs) and len(set(map(tuple, epochs))) == 6
    assert not {tuple(question.prompt) for question in questions.val(99)} & set(prompts)
    assert len(questions.val(99)) == len(questions.indices['test']) > 0


def test_an_answer_is_judged_as_text_and_long_prompts_are_left_out(tmp_path):
    questions = gsm8k(tmp_path)
    assert 'left out' in questions.describe() and questions.left_out > 0
    lengths = [len(question.prompt) for question in questions.train(0, 0, 50) + questions.val(9)]
    assert questions.longest_prompt == max(lengths) <= 73 - 60
    c = types.SimpleNamespace(block_size=72)
    assert rl.row_tokens(questions, c) == max(lengths) + 59  # the last token is a target only
    assert rl.row_tokens(questions, types.SimpleNamespace(block_size=8)) == 8
    for index in questions.indices['test'][:3]:
        question = questions.make('test', index)
        assert question.prompt[-1] == CHAT.special_ids['<|assistant_start|>']
        right = CHAT.encode(f'so\n#### {index}')
        assert question.reward(right) == 1 and question.reward(right + CHAT.encode('0')) == 0
    ids = [CHAT.special_ids[f'<|python_{edge}|>'] for edge in ('start', 'end')]
    outputs = [CHAT.special_ids[f'<|output_{edge}|>'] for edge in ('start', 'end')]
    call = [ids[0], *CHAT.encode('6*7'), ids[1]]
    assert questions.tool(call) == [outputs[0], *CHAT.encode('42'), outputs[1]] and not questions.tool(
        call[:-1]
    )
    assert questions.stop[0] == CHAT.special_ids['<|assistant_end|>']


def test_questions_that_leave_no_room_are_refused(tmp_path):
    for n, text in ((80, 'at most block_size'), (70, 'a lower max_new_tokens')):
        with pytest.raises(ValueError, match=text):
            gsm8k(tmp_path, max_new_tokens=n)
    with pytest.raises(ValueError, match='special|conversations'):
        c = dict(rl_task='gsm8k', gsm8k=str(tmp_path / 'gsm8k.jsonl'), words='', seed=3, max_new_tokens=9)
        c = types.SimpleNamespace(**c, gradient_accumulation_steps=1)
        find_questions(c, Bytes(), types.SimpleNamespace(block_size=72))


# -----------------------------------------------------------------------------
# runs

BASE = '--dataset=mano:1 --block_size=6 --n_embd=16 --n_head=2 --n_prelude=0 --n_block=1 --n_coda=0'.split()
BASE += '--n_loop=2 --pos=rope --input_injection=passthrough --max_iters=4 --batch_size=8'.split()
BASE += '--eval_interval=4 --eval_iters=1 --sample_tokens=0 --device=cpu --dtype=float32'.split()
BASE += ['--compile=False', '--warmup_iters=0']
RL = '--rl_task=mano:1 --rl_samples=4 --batch_size=8 --gradient_accumulation_steps=2 --max_iters=4'.split()
RL += '--eval_interval=2 --eval_iters=3 --log_interval=1 --learning_rate=1e-2 --warmup_iters=0'.split()
RL += '--sample_tokens=0 --device=cpu --dtype=float32 --compile=False --lr_decay_iters=4'.split()


@pytest.fixture(scope='module')
def weights(tmp_path_factory):
    """The folder of a run on mano:1, four steps long."""
    folder = tmp_path_factory.mktemp('base')
    train.main([*BASE, f'--out_dir={folder}'])
    return folder


@pytest.fixture
def base(weights, tmp_path):
    """Flags of a short run of reinforcement learning in tmp_path/out."""
    return [f'--init_from={weights}', f'--out_dir={tmp_path}/out', *RL]


@pytest.mark.parametrize('keys', [[], ['--loop_sampling=uniform', '--reward_loops=all', '--optimizer=muon']])
def test_a_run_logs_rewards_and_resumes_bit_for_bit(call, base, tmp_path, keys):
    status, out, err = call(train.main, *base, *keys)
    assert status == 0, err
    whole = load(tmp_path / 'out' / 'ckpt.pt')
    parts = [*base, *keys, f'--out_dir={tmp_path}/parts']
    assert call(train.main, *parts, '--max_iters=3')[0] == 0
    assert call(train.main, *parts, '--init_from=resume')[0] == 0
    assert same(whole['model'], load(tmp_path / 'parts' / 'ckpt.pt')['model'])
    steps = [record for record in read_log(tmp_path / 'out') if 'train/loss' in record]
    names = 'reward pass@1 pass@2 pass@4 no_advantage answer_tokens cut_off entropy rollout_ms'.split()
    assert len(steps) == 4 and all(f'train/{name}' in step for step in steps for name in names)
    assert all(0 < step['train/entropy'] < math.log(30) for step in steps)
    evaluations = [record for record in read_log(tmp_path / 'out') if 'val/loss' in record]
    assert [record['iter'] for record in evaluations] == [0, 2, 4]
    assert all(record['val/loss'] == pytest.approx(1 - record['val/reward']) for record in evaluations)
    assert ('which are drawn' in out) == bool(keys)
    if keys:
        assert whole['config']['objective'] == 'step' and 'train/loss/loop_00' in steps[0]


@pytest.mark.parametrize(
    'flags, expected',
    {
        ('--rl_task=gsm8',): 'gsm8k',
        ('--rl_task=', '--rl_samples=4'): 'rl_samples=4, expected 16 without rl_task=NAME',
        ('--rl_task=mano:0',): 'mano:0',
        ('--rl_task=mano:2',): 'mano:2, or with a larger number',
        ('--rl_samples=1',): 'at least 2',
        ('--rl_samples=3',): 'multiple of rl_samples=3',
        ('--init_from=scratch',): 'a PATH with rl_task',
        ('--dropout=0.1',): '0 with rl_task',
        ('--objective=exit', '--exit_gate=True'): 'end, step, few',
        ('--objective=few', '--reward_loops=all'): 'step with reward_loops=all',
        ('--temperature=0',): 'above 0',
        ('--eval_loops=1,2',): 'eval.py',
        ('--eval_iters=0',): 'at least 1',
    }.items(),
)
def test_what_means_nothing_is_refused(call, base, flags, expected):
    status, _, err = call(train.main, *base, *flags)
    assert status == 2 and expected in err.splitlines()[-1] and len(err.strip().splitlines()) < 3


def test_every_parameter_is_trained_without_dropout_in_eval_mode():
    model = GPT(GPTConfig(**SIZES))
    set_trained_parts(model, rl.OBJECTIVE['end'], dropout=False)
    assert not model.training and all(p.requires_grad for p in model.parameters())
