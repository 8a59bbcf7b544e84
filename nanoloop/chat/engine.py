"""
The engine of chat: generates many answers at once, in one batch for each policy.

Answers with the same policy (number of loops and early exit) share a KV cache, which grows up to max_batch
rows, and compute their next tokens together. The result of an answer does not depend on its neighbours, up to
rounding. In a step every answer gets a token; of the new prompts one for each policy is read, and one Call is
made.

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
from nanoloop.onednn import onednn_for

MAX_POLICIES = 3  # KV caches that are kept at once; the one that was used last goes last
MAX_OVERTAKEN = 50  # answers that may begin before one that waits for a KV cache


class Full(Exception):
    """Too many answers wait already."""


class Call:
    """A function that the engine calls between two steps. result: what it returned.

    notify, cancelled, finish, error: as in Answer.
    """

    def __init__(self, function, notify=lambda: None):
        self.function, self.notify = function, notify
        self.cancelled, self.finish, self.error, self.result = False, None, None, None

    def end(self, finish, error=None):
        """Ends the call for a reason, see Answer."""
        self.error, self.finish = error, finish  # finish last: another thread waits for it
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
        """Takes an Answer or a Call. Any thread may call it.

        Raises Full if max_waiting jobs wait besides those for which there is a place, and after close().
        """
        with self.changed:
            n_free = max(0, self.max_batch - len(self.active))
            if self.closed or len(self.waiting) >= self.max_waiting + n_free:
                raise Full
            self.waiting.append(job)
            self.changed.notify()

    def run(self):
        """Generates until close() is called. For a thread of its own."""
        try:
            while not self.closed:
                if not self.step():
                    with self.changed:
                        self.changed.wait_for(lambda: self.waiting or self.closed)
        finally:  # also after an error of the program: nobody waits for an answer that will not come
            self.close()

    def close(self):
        """Ends all answers at once, and run() after the step that it is in. Any thread may call it."""
        with self.changed:
            self.closed = True
            for job in [*self.waiting, *(answer for answer, _ in self.active)]:
                job.finish = job.finish or 'cancelled'
                job.notify()
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
                for answer, _ in group:
                    self.fail(answer, error)
                self.leave()
                del self.rows[policy]
            self.leave()
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
            finite = logits.isfinite().all(dim=-1).tolist()
            for i, (answer, _) in enumerate(new + old):
                try:
                    if not finite[i]:
                        raise FloatingPointError('the prediction is not finite')
                    answer.add(int(answer.sampler.choose(logits[i : i + 1])), loops[i])
                except Exception as error:  # of this answer alone
                    self.fail(answer, error)
        self.n_tokens += len(loops)

    def read_ahead(self, policy, ids):
        """Reads a prompt into a free row, for an answer that may come. Returns the number of tokens computed.

        For a Call. It computes nothing while answers are generated or wait, and makes no room for a policy.
        """
        answers = self.active or any(not isinstance(job, Call) for job in self.waiting)
        if answers or (policy not in self.rows and len(self.rows) >= MAX_POLICIES):
            return 0
        rows = self.rows_for(policy)
        before, row = rows.n_computed, rows.take(ids)
        try:
            rows.read(row, ids)
        finally:
            rows.release(row)
        return rows.n_computed - before

    def fail(self, job, error):
        """Ends a job that has raised an error, and tells it."""
        self.say(''.join(traceback.format_exception(error)))
        job.end('error', error)

    def admit(self):
        """Gives waiting answers a place, in their order, and makes one Call.

        An answer that has to wait for a KV cache is overtaken by others, but not by too many.
        """
        n_calls = 0
        for job in list(self.waiting):
            call = isinstance(job, Call)
            if n_calls if call else len(self.active) == self.max_batch:
                continue
            n_calls += call
            try:
                started = self.start(job)
            except Exception as error:
                self.fail(job, error)
                started = True
            if started:
                self.waiting.remove(job)
                continue
            job.overtaken += 1
            if job.overtaken > MAX_OVERTAKEN:
                break

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
