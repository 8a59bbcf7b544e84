"""
Measures an answer through the chat server against sample.py's way, for one user.

    python tests/speed_of_chat.py FOLDER [repeats]

In turns, the same prompts and the same greedy tokens: seconds to the first token, and tokens per second
after it. The server is a process of its own; its figures are what a client on this machine sees of a stream.
"""

import http.client
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import torch

from nanoloop import ROOT
from nanoloop.chat.chat_model import ChatModel
from nanoloop.chat.conversation import Conversation, Turn
from nanoloop.chat.settings import Settings
from nanoloop.checkpoint import find_tokenizer, load_checkpoint
from nanoloop.decode import prepare_linears_
from nanoloop.generate import Generation
from nanoloop.machine import autocast, choose_dtype

N_TOKENS = 200
QUESTION = 'How do you work? Tell me what happens inside you, from the first layer to the last.'


def direct(chat, ids, dtype):
    """Returns (seconds to the first token, tokens per second) of sample.py's way."""
    with autocast('cpu', dtype):
        began = time.perf_counter()
        generation = Generation(
            chat.model, torch.tensor([ids]), temperature=0, max_tokens=len(ids) + N_TOKENS
        )
        times = []
        for token in generation.stream(N_TOKENS):
            times.append(time.perf_counter())
            if int(token) in chat.form.stop:
                break
    return times[0] - began, (len(times) - 1) / (times[-1] - times[0])


def served(port, nonce):
    """Returns the same of an answer of the server. nonce: makes the conversation a new one for the cache."""
    connection = http.client.HTTPConnection('127.0.0.1', port)
    messages = [dict(role='user', content=f'{nonce} {QUESTION}')]
    body = json.dumps(dict(messages=messages, temperature=0, max_tokens=N_TOKENS, stream=True))
    began, times = time.perf_counter(), []
    connection.request('POST', '/v1/chat/completions', body, {'Content-Type': 'application/json'})
    for line in connection.getresponse():
        if b'"pieces"' in line:
            n = sum(len(piece['tokens']) for piece in json.loads(line[6:])['nanoloop']['pieces'])
            times += [time.perf_counter()] * n
    connection.close()
    return times[0] - began, (len(times) - 1) / (times[-1] - times[0])


def compare(folder, repeats, name, answer):
    """Prints the medians of sample.py's way and of another, and of their ratios.

    name: of the other way. answer: a function of a port and a number -> what served returns.
    """
    dtype, _ = choose_dtype('auto', 'cpu')
    model, checkpoint = load_checkpoint(folder)
    prepare_linears_(model, dtype)
    chat = ChatModel(model, find_tokenizer(checkpoint))
    command = [sys.executable, str(ROOT / 'chat.py'), f'--init_from={folder}', '--web=True', '--port=0']
    command += ['--temperature=0', f'--max_new_tokens={N_TOKENS}']
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        port = next(
            int(line.split(':')[2].split('/')[0]) for line in server.stderr if line.startswith('http')
        )
        ways = {'sample.py': [], name: []}
        for i in range(1 + repeats):
            ids = chat.prompt(Conversation(turns=[Turn('user', f'{i} {QUESTION}')]), Settings())[0]
            pair = direct(chat, ids, dtype), answer(port, i)
            if i:  # the first pair warms up
                for way, figures in zip(ways.values(), pair, strict=True):
                    way.append(figures)
    finally:
        server.terminate()
        server.wait()
    for way, figures in ways.items():
        first, rate = (statistics.median(column) for column in zip(*figures, strict=True))
        print(f'{way}: first token {1000 * first:.1f} ms, {rate:.1f} tokens/s')
    pairs = list(zip(*ways.values(), strict=True))
    first = statistics.median(theirs[0] / ours[0] for ours, theirs in pairs)
    rate = statistics.median(ours[1] / theirs[1] for ours, theirs in pairs)
    print(f'{name} / sample.py: first token {first:.2f} times, a token {rate:.2f} times, {len(pairs)} pairs')


def main(folder, repeats='9'):
    compare(folder, int(repeats), 'server', served)


if __name__ == '__main__':
    main(*sys.argv[1:])
