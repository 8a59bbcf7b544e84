"""
Talks with a trained model, in the terminal or on a page in the browser.

    python chat.py --out_dir=out-sft
    python chat.py --out_dir=out-sft --prompt="Who are you?"
    python chat.py --out_dir=out-sft --web=True

In the terminal /help lists the commands; Ctrl-C ends an answer, Ctrl-D the program. The answers go to stdout,
everything else to stderr. A chat model is one whose tokenizer has the special tokens of conversations; every
other model continues the text. Models have the names that sample.py takes.
"""

import contextlib
import socket
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated
from urllib.parse import quote

sys.path.insert(0, str(Path(__file__).resolve().parent))  # ours come first, also with python -P
from configurator import command, configure, print_error, printable

# a Ctrl-C while the rest is imported is handled from here on
# isort: split
import torch

from nanoloop.chat.chat_model import ChatModel
from nanoloop.chat.engine import Engine
from nanoloop.chat.settings import Settings
from nanoloop.chat.terminal import Terminal
from nanoloop.checkpoint import (
    WEIGHTS,
    check_tokenizer,
    describe_checkpoint,
    find_model,
    find_tokenizer,
    load_checkpoint,
)
from nanoloop.checks import AtLeast, AtMost, Choice, Count, Name, Size, check, settle_fields
from nanoloop.decode import prepare_linears_
from nanoloop.machine import autocast, choose_device, choose_dtype
from nanoloop.shared_cpu import hand_over_threads, share_cpu


@dataclass
class ChatConfig:
    # model
    out_dir: Name = 'out'  # folder of a run (its best.pt, else its ckpt.pt), or another name as in init_from
    init_from: Name = 'resume'  # resume (the model in out_dir), a folder, a file, gpt2..gpt2-xl, ouro:FOLDER
    weights: Choice(WEIGHTS) = 'raw'  # ema: load the average of the weights, which train.py saves with --ema
    text: bool = False  # continue the bare text, as a base model, even if the tokenizer knows conversations
    # conversation
    prompt: str = ''  # a question: prints the answer and ends; '' = a conversation
    context: Annotated[int, AtLeast(16)] | None = None  # most tokens of it; None = it has no end
    system: str = ''  # text in front of the conversation, which stays when old turns leave the view
    # server
    web: bool = False  # serve a page and OpenAI's chat completions instead of the terminal
    host: Name = '127.0.0.1'  # address to listen on; other than this machine's own, requests need the token
    port: Annotated[Size, AtMost(65535)] = 8000  # 0 = any free port
    token: str = ''  # what requests have to carry (Authorization: Bearer); '' = none, or a new one for `host`
    max_batch: Count = 8  # most answers that are generated at once
    max_waiting: Count = 32  # most answers that wait for a place; a further one is refused
    # machine
    device: str = 'auto'  # auto (cuda, else mps, else cpu), cpu, cuda, cuda:N or mps
    dtype: str = 'auto'  # type of matrix products: auto, float32, bfloat16 or float16

    def __post_init__(self):
        """Raises UserError for a value out of its bounds, and for values that do not go together."""
        settle_fields(self)
        check(not (self.web and self.prompt), 'prompt', self.prompt, "'' with web=True")
        for key in ('host', 'port', 'token', 'max_batch', 'max_waiting'):
            default = getattr(type(self), key)
            fits = self.web or getattr(self, key) == default
            check(fits, key, getattr(self, key), f'{default!r} without web=True')


def write(text):
    """Prints a part of an answer."""
    print(text, end='', flush=True)


def read_line():
    """Returns the next line of the user, None at the end. Ctrl-C in a terminal drops the line."""
    asks = sys.stdin.isatty()
    if asks:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401, lines can be edited and called up again
    while True:
        try:
            return input('> ' if asks and sys.stdout.isatty() else '')
        except EOFError:
            if asks:
                print_error('')
            return None
        except KeyboardInterrupt:
            if not asks:
                raise
            print_error('\n(Ctrl-D or /quit ends)')


def serve_page(c, settings, chat, about, trained, threads, under_autocast):
    """Serves the page until a signal ends it.

    about: a line on the model. trained: its numbers of loops in training. threads: number of CPU
    threads that compute. under_autocast: returns the context in which the model runs.
    """
    from nanoloop.chat.listen import choose_token, open_socket, serve, served_hosts
    from nanoloop.chat.server import ChatServer

    token = choose_token(c.host, c.token)
    listener = open_socket(c.host, c.port)
    port = listener.getsockname()[1]
    engine = Engine(chat.model, c.max_batch, c.max_waiting, chat.context, say=print_error)
    name = Path(c.out_dir if c.init_from == 'resume' else c.init_from).name

    def run_engine():
        torch.set_num_threads(threads)
        with under_autocast():
            engine.run()

    server = ChatServer(chat, engine, settings, name, about, c.system, trained)
    host = socket.gethostname() if c.host in ('0.0.0.0', '::') else c.host  # what others may call it
    host = f'[{host}]' if ':' in host else host
    print_error(f'http://{host}:{port}/{f"#token={quote(token)}" if token else ""}  (Ctrl-C ends)')
    serve(listener, server.app(served_hosts(c.host, port), token), engine, run_engine)


@command
def main(argv):
    keys = configure((ChatConfig, Settings), argv, say=print_error)
    c, settings = keys.build(ChatConfig), keys.build(Settings)
    if c.web:
        from nanoloop.chat.listen import check_packages

        check_packages()
        threads = hand_over_threads()
    else:
        share_cpu()
    device, _ = choose_device(c.device)
    dtype, _ = choose_dtype(c.dtype, device.type)
    check_tokenizer(c.out_dir if c.init_from == 'resume' else c.init_from)
    checkpoint = find_model(c, print_error)
    tokenizer = find_tokenizer(checkpoint)
    model, _ = load_checkpoint(checkpoint, device)
    settings.policy(model)
    about = describe_checkpoint(checkpoint, model.config, settings.n_loop or model.config.n_loop)
    print_error(about)
    if tokenizer.note:
        print_error(tokenizer.note)
    prepare_linears_(model, dtype)
    chat = ChatModel(model, tokenizer, c.text, c.context)

    def under_autocast():
        return autocast(device.type, dtype)

    if c.web:
        trained = sorted(checkpoint.get('loops_trained', [model.config.n_loop]))
        return serve_page(c, settings, chat, about, trained, threads, under_autocast)
    colours = sys.stdout.isatty()
    terminal = Terminal(chat, settings, c.system, write, print_error, clean=printable, colours=colours)
    with under_autocast():
        if not c.prompt:
            if chat.form.name == 'text':
                print_error('a base model: it continues the text; an empty line lets it go on')
            if sys.stdin.isatty():
                print_error('/help lists the commands, Ctrl-C ends an answer, Ctrl-D the program')
            terminal.talk(read_line)
        elif terminal.answer(c.prompt).finish == 'cancelled':
            raise KeyboardInterrupt


if __name__ == '__main__':
    main()
