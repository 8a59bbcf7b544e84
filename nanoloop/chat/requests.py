"""
Requests of the server, checked: from JSON to a conversation and the settings of its answer.

The form is OpenAI's chat completions, with n_loop, exit, exit_threshold, min_loops and top_k besides. A key
that would change the answer and is not implemented is refused, as is an unknown one.
"""

import difflib
import json
from dataclasses import fields, replace
from typing import NamedTuple

from nanoloop.chat.conversation import Conversation
from nanoloop.chat.settings import Settings
from nanoloop.checks import UserError, check

MAX_BYTES = 2**20  # of a request
MAX_MESSAGES, MAX_CHARACTERS, MAX_MESSAGE_CHARACTERS = 500, 32_000, 8_000
MAX_TOKENS, MAX_TEMPERATURE, MAX_STOPS = 4_096, 2.0, 4
MAX_LOOPS = 4  # times the number of loops that the model was trained with

OTHER_NAMES = dict(max_tokens='max_new_tokens', max_completion_tokens='max_new_tokens')
KEYS = {*OTHER_NAMES, *(f.name for f in fields(Settings))} - {'max_new_tokens'}
REQUEST = {'messages', 'model', 'stop', 'stream', 'stream_options'}
# these change nothing here
IGNORED = set(
    'user metadata store service_tier safety_identifier prompt_cache_key parallel_tool_calls'.split()
)
# max_tokens decides how many turns are left out
LENS_KEYS = ('messages', 'tokens', 'n_loop', 'exit', 'exit_threshold', 'min_loops', 'max_tokens')
NEUTRAL = dict(  # the values of others that mean: without it
    n=(1,), frequency_penalty=(0,), presence_penalty=(0,), logit_bias=({},), logprobs=(False,),
    top_logprobs=(0,), tools=([],), functions=([],), tool_choice=('none', 'auto'),
    response_format=({'type': 'text'},), modalities=(['text'],),
)  # fmt: skip


class ChatRequest(NamedTuple):
    """A request for an answer."""

    conversation: Conversation
    settings: Settings
    stops: list  # texts that end the answer
    stream: bool
    include_usage: bool  # whether a stream ends with the numbers of tokens


def read_json(body):
    """Returns the object in the bytes of a request. Raises UserError if there is none."""

    def refuse(name):
        raise ValueError(f'{name} is no number in JSON')

    try:
        values = json.loads(body, parse_constant=refuse)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        raise UserError(f'the request is not JSON: {str(error)[:200]}') from None
    if not isinstance(values, dict):
        raise UserError(f'the request is a {type(values).__name__}, expected a JSON object')
    return values


def chat_request(values, defaults, config):
    """Returns the ChatRequest of an object. defaults: Settings. config: the model's GPTConfig.

    Raises UserError for the first key that is unknown or wrong.
    """
    check_keys(values, KEYS | REQUEST)
    stream, options = values.get('stream'), values.get('stream_options')
    check(stream is None or isinstance(stream, bool), 'stream', stream, 'true or false')
    known = options is None or (isinstance(options, dict) and options.keys() <= {'include_usage'})
    known = known and isinstance((options or {}).get('include_usage', False), bool)
    check(known, 'stream_options', options, '{"include_usage": true or false}')
    return ChatRequest(
        conversation=read_messages(values.get('messages'), config.vocab_size),
        settings=read_settings(values, defaults, config),
        stops=read_stops(values.get('stop')),
        stream=bool(stream),
        include_usage=bool((options or {}).get('include_usage')),
    )


def check_keys(values, known):
    """Raises UserError for a key that is not known, or that would change the answer and cannot."""
    for key, value in values.items():
        if key in NEUTRAL:
            expected = ' or '.join(json.dumps(neutral) for neutral in NEUTRAL[key])
            check(value is None or value in NEUTRAL[key], key, value, f'{expected}, it is not supported here')
        elif key not in known | IGNORED:
            close = difflib.get_close_matches(key, known, n=1, cutoff=0.7)
            hint = f'did you mean {close[0]!r}?' if close else f'the keys are {", ".join(sorted(known))}'
            raise UserError(f'unknown key {key[:100]!r}, {hint}')


def read_settings(values, defaults, config):
    """Returns the Settings of a request: defaults, and what it sets.

    null = the default; of top_k, which is no key of OpenAI: draw from all tokens.
    """
    given = {}
    for key in sorted(KEYS & values.keys()):
        if values[key] is not None or key == 'top_k':
            name, expected = OTHER_NAMES.get(key, key), 'only one of max_tokens and max_completion_tokens'
            check(name not in given, key, values[key], expected)
            given[name] = values[key]
    if 'exit' in given:  # the threshold of another exit means nothing for it
        given = dict(exit_threshold=None, min_loops=1) | given
    try:
        settings = replace(defaults, **given)
    except UserError as error:
        raise UserError(str(error).replace('max_new_tokens', 'max_tokens')) from None
    most_loops = max(MAX_LOOPS * config.n_loop, defaults.n_loop or 1)
    for key, value, most in (
        ('max_tokens', settings.max_new_tokens, max(MAX_TOKENS, defaults.max_new_tokens)),
        ('temperature', settings.temperature, max(MAX_TEMPERATURE, defaults.temperature)),
        ('n_loop', settings.n_loop or 1, most_loops),
    ):
        check(value <= most, key, value, f'at most {most}')
    return settings


def read_stops(stop):
    """Returns the texts of the key stop, a list."""
    stops = [stop] if isinstance(stop, str) else [] if stop is None else stop
    fits = isinstance(stops, list) and len(stops) <= MAX_STOPS
    fits = fits and all(isinstance(text, str) and 0 < len(text) <= 100 for text in stops)
    check(
        fits,
        'stop',
        shorten(stop),
        f'a text or a list of at most {MAX_STOPS} texts, up to 100 characters each',
    )
    return stops


def read_messages(messages, vocab_size):
    """Returns the Conversation of the key messages. Its last message is the user's."""
    check(isinstance(messages, list) and messages, 'messages', shorten(messages), 'a list of messages')
    check(len(messages) <= MAX_MESSAGES, 'messages', len(messages), f'at most {MAX_MESSAGES} messages')
    plain = [read_message(number, message, vocab_size) for number, message in enumerate(messages, 1)]
    total = sum(len_of(message) for message in plain)
    check(
        total <= MAX_CHARACTERS, 'messages', total, f'at most {MAX_CHARACTERS:,} characters in all messages'
    )
    conversation = Conversation.of_messages(plain)
    check(conversation.turns[-1].role == 'user', 'messages', 'an answer at the end', "the user's message")
    return conversation


def read_message(number, message, vocab_size):
    """Returns a message with OpenAI's variants removed: the role developer, and a content in parts.

    A message of the assistant may have the key tokens: the ids that the model wrote for its content.
    """
    key = f'message {number}'
    check(isinstance(message, dict), key, shorten(message), '{"role": ..., "content": ...}')
    role, content = message.get('role'), message.get('content')
    role = 'system' if role == 'developer' else role
    if role in ('system', 'user') and isinstance(content, list):
        fits = all(
            isinstance(part, dict) and part.get('type') == 'text' and isinstance(part.get('text'), str)
            for part in content
        )
        check(fits, f'{key}: content', shorten(content), 'a text, or parts {"type": "text", "text": ...}')
        content = ''.join(part['text'] for part in content)
    plain = dict(role=role, content=content)
    if role == 'assistant' and message.get('tokens') is not None:
        plain['tokens'] = read_tokens(f'{key}: tokens', message['tokens'], vocab_size)
    n, most = len_of(plain), MAX_CHARACTERS if role == 'assistant' else MAX_MESSAGE_CHARACTERS
    check(n <= most, f'{key}: characters', n, f'at most {most:,}')  # what the model wrote may be sent back
    return plain


def texts_of(message):
    """Returns the texts of a message's content, of whatever form it is."""
    content = message['content']
    parts = content if isinstance(content, list) else [dict(text=content)]
    texts = [part.get('text') for part in parts if isinstance(part, dict)]
    return [text for text in texts if isinstance(text, str)]


def len_of(message):
    """Returns the number of characters of a message. Raises UserError for what is no Unicode text."""
    for text in texts_of(message):
        try:
            text.encode()
        except UnicodeEncodeError:
            raise UserError('messages: half of a surrogate pair, expected Unicode text') from None
    return sum(map(len, texts_of(message)))


def lens_request(values, defaults, config):
    """Returns (conversation, ids of the answer, Settings) of a request for an answer's predictions."""
    check_keys(values, set(LENS_KEYS))
    tokens = read_tokens('tokens', values.get('tokens'), config.vocab_size)
    conversation = read_messages(values.get('messages'), config.vocab_size)
    return conversation, tokens, read_settings(values, defaults, config)


def read_tokens(key, tokens, vocab_size):
    """Returns a list of token ids."""
    fits = isinstance(tokens, list) and 0 < len(tokens) <= MAX_TOKENS
    fits = fits and all(type(token) is int and 0 <= token < vocab_size for token in tokens)
    check(fits, key, shorten(tokens), f'1 to {MAX_TOKENS:,} token ids below {vocab_size:,}')
    return tokens


def shorten(value):
    """Returns a value for a message, cut if it is long."""
    text = repr(value)
    return value if len(text) <= 100 else f'{text[:100]}...'
