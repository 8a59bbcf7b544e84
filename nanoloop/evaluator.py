"""
Measures tasks: for every number of loops and policy the rows that an eval.csv does not have yet.
"""

import json
import time

from nanoloop.parallel import on_rank0
from nanoloop.results import KEY, VALUES
from nanoloop.scoring import score


class Evaluator:
    """Measures a model. All ranks call it together; rank 0 writes.

    policies: of scoring.py, a row of each Evaluation. results: a Results, the same on all ranks. base: the
    columns that all rows share. batch_tokens: see scoring.py. items: path of the file of JSON lines with a
    record per item, '' = none. progress: name -> a function (done, n) with a method close().
    """

    def __init__(self, model, m, policies, results, base, batch_tokens, items, progress):
        self.model, self.m, self.policies, self.results, self.base = model, m, policies, results, base
        self.batch_tokens, self.items, self.progress = batch_tokens, items, progress
        self.n_found = 0  # rows that were there already

    def run(self, name, task, evaluations):
        """Measures the Evaluations of a task. Returns its rows, also those that were there already."""
        measured = [self.measure(evaluation) for evaluation in evaluations]
        rows = [row for of_policies in measured for row in of_policies]
        if task.combine is not None:
            rows += [self.combine(name, task.combine, parts) for parts in zip(*measured, strict=True)]
        return rows

    def measure(self, evaluation):
        """Returns the rows of an Evaluation, one per policy: measures those that are missing."""
        rows = [
            dict(self.base, task=evaluation.name, settings=evaluation.settings)
            | dict(loops=policy.n_loop, policy=policy.name)
            for policy in self.policies
        ]
        found = [self.results.find(row) for row in rows]
        missing = [i for i, row in enumerate(found) if row is None]
        self.n_found += len(found) - len(missing)
        if not missing:
            return found
        start, progress = time.monotonic(), self.progress(evaluation.name)
        chosen = [self.policies[i] for i in missing]
        try:
            measure = evaluation.score or score
            results = measure(self.model, evaluation, chosen, self.m, self.batch_tokens, progress)
        finally:
            progress.close()
        seconds = round(time.monotonic() - start, 2)  # of all that were measured together
        for i, policy, result in zip(missing, chosen, results, strict=True):
            columns = dict(items=len(result.records)) | evaluation.summarise(result.records)
            loops = dict(
                mean_loops=result.mean_loops, flops_per_token=policy.flops(self.model, result.mean_loops)
            )
            self.write_items(rows[i], result.records)
            found[i] = self.add(rows[i] | columns | loops | dict(seconds=seconds))
        return found

    def combine(self, name, combine, parts):
        """Returns the row of a whole task, from the rows of its Evaluations with one policy."""
        columns = combine([{key: to_number(key, value) for key, value in row.items()} for row in parts])
        for key in ('mean_loops', 'flops_per_token'):
            columns[key] = sum(float(row[key]) for row in parts) / len(parts)
        columns['seconds'] = sum(float(row['seconds']) for row in parts)
        same = {key: parts[0][key] for key in ('loops', 'policy')}
        settings = '; '.join(dict.fromkeys(row['settings'] for row in parts))
        row = dict(self.base, task=name, settings=settings, **same) | columns
        found = self.results.find(row)
        return found if found and found['note'] == columns.get('note', '') else self.add(row)

    def add(self, row):
        """Adds a row to the results of every rank, and to the file. Returns it as a line."""
        line = self.results.add(row)
        on_rank0(self.m, lambda: self.results.write(line))
        return line

    def write_items(self, row, records):
        """Appends the records of a row's items, a JSON line each with what the row is of, in one write."""
        if not self.items or self.m.rank:
            return
        head = {key: row[key] for key in (*KEY, 'run')}
        lines = ''.join(json.dumps(head | record) + '\n' for record in records)
        with open(self.items, 'ab', buffering=0) as file:
            file.write(lines.encode())


def to_number(column, value):
    """Returns a column of values as a number, nan included; other columns as they are, None for ''."""
    if value == '':
        return None
    return float(value) if column in VALUES else value
