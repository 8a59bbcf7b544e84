"""
An exponential moving average (EMA) of the trained weights, in float32.

It begins with the weights that a run begins with. After every step that changes the weights w, the average is

    e = d e + (1 - d) w,    d = min(ema, (1 + t) / (10 + t)),    t = number of updates before this one

Below ema, d is a warm-up: the weights in the average are then a tenth of the steps old, on average. So a
short run has a useful average, which has forgotten the initial weights. ema=0.999 is reached at t = 8990.
From then on they are 1 / (1 - ema) steps old. The factors of all weights sum to 1: there is no bias to
correct. Source of d: tf.train.ExponentialMovingAverage of TensorFlow, with num_updates.
"""

import contextlib

import torch

from nanoloop.parallel import local_parts, part_like, whole_weights

SUFFIX = '_ema'  # of the log's keys for results of the average


class Average:
    """The average of a model's trained weights. With sharded weights every rank has that of its parts.

    weights, averages: lists of tensors, a tied weight once. by_name: {name: average}, with all its names.
    """

    def __init__(self, model, decay):
        self.decay = decay
        trained = {name: p for name, p in model.state_dict(keep_vars=True).items() if p.requires_grad}
        self.weights = list({id(p): p for p in trained.values()}.values())
        average_of = {id(p): p.detach().clone() for p in self.weights}
        self.averages = list(average_of.values())
        self.by_name = {name: average_of[id(p)] for name, p in trained.items()}
        self.updates = torch.zeros((), dtype=torch.int64, device=self.weights[0].device)  # t

    @torch.no_grad()
    def update(self, changed):
        """Moves the averages towards the weights, after a step that has changed these.

        changed: tensor (), whether it has. If not, nothing changes; the host does not wait for the device.
        """
        share = changed * (9 / (10 + self.updates)).clamp(min=1 - self.decay)  # tensor (), (1 - d) or 0
        for average, weight in zip(local_parts(self.averages), local_parts(self.weights), strict=True):
            average.lerp_(weight, share.to(average.dtype))
        self.updates += changed

    def state_dict(self):
        """Returns the entry `ema` of a checkpoint: {name: average} as weights, and the number of updates."""
        return dict(weights=dict(self.by_name), updates=int(self.updates))

    @torch.no_grad()
    def load_state_dict(self, state):
        """Takes over averages and number of updates from an entry with whole tensors, see state_dict."""
        for name, average in self.by_name.items():
            average.copy_(part_like(state['weights'][name], average))
        self.updates.fill_(state['updates'])

    @contextlib.contextmanager
    def in_place_of_weights(self):
        """Gives the model the averages as weights inside the block, and then its own weights, to the bit.

        The copy of the weights takes the memory that gradients have during a step.
        """
        weights = local_parts([p.detach() for p in self.weights])
        own = [w.clone() for w in weights]
        try:
            torch._foreach_copy_(weights, local_parts(self.averages))
            yield
        finally:  # also after an exception, and wherever a signal's handler raises one
            torch._foreach_copy_(weights, own)


def make_average(model, c, state=None, say=None):
    """Returns the Average for the key ema, None without one. Sharded weights are sharded before.

    state: the checkpoint that is resumed, None for a new run. say: called with a line if the checkpoint's
    average ends here, or if it has none to go on with.
    """
    saved = state.get('ema') if state else None
    if not c.ema:
        if saved:
            say(f'ema={c.ema}: the average of the weights ends here, new checkpoints have none')
        return None
    average = Average(model, c.ema)
    if saved:
        average.load_state_dict(saved)
    elif state:
        say(f'ema={c.ema:g}: the checkpoint has no average, it begins with the weights of this step')
    return average


def evaluate_weights(evaluate, model, average, suffix=''):
    """Returns {suffix of the log's keys: result of evaluate()} of the weights, then of their average.

    average: an Average, or None. suffix: that of the weights. Returns None if a signal came first.
    """
    places = {suffix: contextlib.nullcontext()}
    if average is not None:
        places[SUFFIX] = average.in_place_of_weights()
    results = {}
    for suffix, place in places.items():
        with place, whole_weights(model):
            results[suffix] = evaluate()
        if results[suffix] is None:
            return None
    return results
