"""
The engine of chat: generates many answers at once, in one batch for each policy.

Answers with the same policy (number of loops and early exit) share a KV cache of max_batch rows, and compute
their next tokens together. The result of an answer does not depend on its neighbours, up to rounding. Between
two tokens of the others one new prompt is read.

    engine = Engine(model, max_batch=8)
    engine.submit(answer)            # raises Full if too many wait
    while not answer.finish:
        engine.step()                # or engine.run() in a thread of its own
"""

import collections
import threading
import traceback

import torch

from nanoloop.chat.rows import Rows
from nanoloop.machine import onednn_for

MAX_POLICIES = 3  # KV caches that are kept at once; the one that was idle for longest goes first


class Full(Exception):
    """Too many answers wait already."""


class Call:
    """A function that the engine calls, in turn with the answers. result: what it returned.

    notify, cancelled, finish, error: as in Answer.
    """

    policy = None

    def __init__(self, function, notify=lambda: None):
        self.function, self.notify = function, notify
        self.cancelled, self.finish, self.error, self.result = False, None, None, None

    def end(self, finish, error=None):
        self.finish, self.error = finish, error
        self.notify()


class Engine:
    """Generates Answers with a model in eval mode.

    max_batch: most answers at once. max_waiting: most answers that wait for a place, see submit. max_tokens:
    most tokens of a prompt with its answer; None = any number. say: called with the text of an error of the
    program. n_answers, n_tokens: how many have been generated.
    """

    def __init__(self, model, max_batch=8, max_waiting=32, max_tokens=None, say=lambda text: None):
        self.model, self.max_batch, self.max_waiting = model, max_batch, max_waiting
        self.max_tokens, self.say = max_tokens, say
        self.waiting, self.changed = collections.deque(), threading.Condition()
        self.active = []  # (answer, its row)
        self.rows = {}  # {policy: Rows}, the one that was used last comes last
        self.closed, self.n_answers, self.n_tokens = False, 0, 0

    def submit(self, job):
        """Takes an Answer or a Call. Raises Full if max_waiting wait already. Any thread may call it."""
        with self.changed:
            if self.closed or len(self.waiting) >= self.max_waiting:
                raise Full
            self.waiting.append(job)
            self.changed.notify()

    def run(self):
        """Generates until close() is called. For a thread of its own."""
        while not self.closed:
            if not self.step():
                with self.changed:
                    self.changed.wait_for(lambda: self.waiting or self.closed)
        for job in [*self.waiting, *(answer for answer, _ in self.active)]:
            job.end('cancelled')

    def close(self):
        """Ends run() after the step that it is in, and all answers with it."""
        with self.changed:
            self.closed = True
            self.changed.notify()

    def step(self):
        """Computes a token of every answer that has a place. Returns whether there is more to do."""
        self.end_cancelled()
        self.admit()
        for policy in list(dict.fromkeys(answer.policy for answer, _ in self.active)):
            group = [(answer, row) for answer, row in self.active if answer.policy == policy]
            try:
                self.advance(self.rows[policy], group)
            except Exception as error:  # out of memory, for instance: the other policies go on
                self.say(traceback.format_exc())
                for answer, _ in group:
                    answer.end('error', error)
            self.leave()
            if any(answer.error for answer, _ in group):
                del self.rows[policy]
        return bool(self.active or self.waiting)

    def advance(self, rows, group):
        """Computes a token of each answer of a group, [(answer, row)], but of one new text at most."""
        new = [(answer, row) for answer, row in group if not answer.appends][:1]
        old = [(answer, row) for answer, row in group if answer.appends]
        computed = [rows.read(row, answer.ids) for answer, row in new]
        x, loops = [x for x, _ in computed], [n for _, n in computed]
        if old:
            head_input, old_loops = rows.append(
                [row for _, row in old], [answer.ids[-1] for answer, _ in old]
            )
            x, loops = [*x, head_input], [*loops, *old_loops]
        with torch.inference_mode(), onednn_for(len(loops)):
            logits = self.model.logits(torch.cat(x))  # (n, V)
            for i, (answer, _) in enumerate(new + old):
                answer.add(int(answer.sampler.choose(logits[i : i + 1])), loops[i])
        self.n_tokens += len(loops)

    def admit(self):
        """Gives waiting answers a place, the first one first, and calls the Calls whose turn it is."""
        while self.waiting and len(self.active) < self.max_batch:
            job = self.waiting[0]
            try:
                if not self.start(job):
                    return
            except Exception as error:
                self.say(traceback.format_exc())
                job.end('error', error)
            self.waiting.popleft()

    def start(self, job):
        """Gives an answer a row, or calls a Call. Returns False if it has to wait."""
        if isinstance(job, Call):
            job.result = job.function()
            job.end('stop')
            return True
        rows = self.rows_for(job.policy)
        if rows is not None:
            self.active.append((job, rows.take(job.ids)))
        return rows is not None

    def rows_for(self, policy):
        """Returns the Rows of a policy, None if all MAX_POLICIES are at work for others."""
        if policy in self.rows:
            self.rows[policy] = self.rows.pop(policy)
            return self.rows[policy]
        if len(self.rows) >= MAX_POLICIES:
            busy = {answer.policy for answer, _ in self.active}
            idle = [other for other in self.rows if other not in busy]
            if not idle:
                return None
            del self.rows[idle[0]]
        early_exit = policy.early_exit(self.model)
        self.rows[policy] = Rows(self.model, self.max_batch, policy.n_loop, early_exit, self.max_tokens)
        return self.rows[policy]

    def end_cancelled(self):
        """Ends the jobs that were cancelled, the waiting ones too."""
        with self.changed:
            cancelled = [job for job in self.waiting if job.cancelled]
            for job in cancelled:
                self.waiting.remove(job)
        cancelled += [answer for answer, _ in self.active if answer.cancelled]
        for job in cancelled:
            job.end('cancelled')
        self.leave()

    def leave(self):
        """Frees the rows of answers that have ended."""
        for answer, row in self.active:
            if answer.finish:
                self.rows[answer.policy].release(row)
                self.n_answers += 1
        self.active = [(answer, row) for answer, row in self.active if not answer.finish]
