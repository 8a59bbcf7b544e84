"""What test_chat.py, test_chat_terminal.py and test_chat_server.py share: a tiny chat model."""

import contextlib
import threading
import time

import torch
from decoding import make

from nanoloop.added_tokens import chat_tokenizer
from nanoloop.chat.chat_model import ChatModel
from nanoloop.chat.conversation import Conversation, Turn
from nanoloop.chat.engine import Engine
from nanoloop.chat.listen import make_server, open_socket, running, served_hosts
from nanoloop.chat.server import ChatServer
from nanoloop.chat.settings import Settings
from nanoloop.generate import generate
from nanoloop.tokenizer import Bytes

TOKENIZER = chat_tokenizer(Bytes())
GREEDY = Settings(max_new_tokens=12, temperature=0)


def chat_model(text=False, **keys):
    """Returns a ChatModel with random weights, in float32."""
    sizes = dict(vocab_size=len(TOKENIZER.token_bytes), block_size=64, pos='rope', tie_weights=False)
    model = make(double=False, **sizes | keys)
    with torch.no_grad():
        model.lm_head.weight[256:] = 0  # special tokens are never likely: answers end by their length
    return ChatModel(model, TOKENIZER, text)


def question(text):
    return Conversation(turns=[Turn('user', text)])


def run(engine, *answers):
    """Generates answers with an engine in this thread. Returns them."""
    for answer in answers:
        engine.submit(answer)
    while not all(answer.finish for answer in answers):
        engine.step()
    return answers


def from_the_beginning(chat, ids, settings=GREEDY):
    """Returns the greedy answer to a prompt's ids as sample.py computes it: one text, from its beginning."""
    policy = settings.policy(chat.model)
    options = dict(n_loop=policy.n_loop, early_exit=policy.early_exit(chat.model), temperature=0)
    tokens = generate(chat.model, torch.tensor([ids]), settings.max_new_tokens, **options)[
        0, len(ids) :
    ].tolist()
    ends = [i for i, token in enumerate(tokens) if token in chat.form.stop]
    return tokens[: ends[0] + 1] if ends else tokens


class Script:
    """A sampler that draws given tokens, one after the other, whatever the model predicts."""

    def __init__(self, tokens):
        self.tokens = iter(tokens)

    def choose(self, logits):
        return torch.tensor([next(self.tokens)])


class Served:
    """A chat server in threads of this process.

    hosts: check the header Host. system: of ChatServer. options: of the Engine. delay_s: seconds that every
    token takes longer; token: what requests have to carry; both can be changed while it serves.
    """

    def __init__(self, chat, settings=GREEDY, token='', hosts=True, delay_s=0.0, system='', **options):
        self.engine, self.token, self.delay_s = Engine(chat.model, **options), token, delay_s
        step = self.engine.step
        self.engine.step = lambda: time.sleep(self.delay_s) or step()
        self.listener = open_socket('127.0.0.1', 0)
        self.port = self.listener.getsockname()[1]
        self.url = f'http://127.0.0.1:{self.port}/'
        self.served_hosts = served_hosts('127.0.0.1', self.port) if hosts else None
        self.chat_server = ChatServer(chat, self.engine, settings, 'tiny', 'a tiny model', system)

    async def app(self, scope, receive, send):
        await self.chat_server.app(self.served_hosts, self.token)(scope, receive, send)

    @contextlib.contextmanager
    def running(self):
        """Serves inside the block."""
        server = make_server(self.app, self.engine)
        thread = threading.Thread(target=server.run, args=([self.listener],), daemon=True)
        with running(self.engine, self.engine.run):
            thread.start()
            try:
                yield self
            finally:
                self.engine.close()
                server.should_exit = True
                thread.join(10)
        assert not thread.is_alive()


@contextlib.contextmanager
def serving(chat, **options):
    """Serves a ChatModel inside the block. Yields the port and the Engine. options: of Served."""
    with Served(chat, **options).running() as served:
        yield served.port, served.engine
