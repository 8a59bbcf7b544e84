"""
The chat server: a page for people, and OpenAI's chat completions for programs.

    GET  /                      the page, nanoloop/chat.html
    GET  /health /stats /info   whether it lives; what it has done; what the model can do
    GET  /v1/models             the one model
    POST /v1/chat/completions   an answer, whole or as server-sent events
    POST /lens                  what each loop predicted for the tokens of an answer
    POST /read                  reads a question that is still being typed: its answer then begins sooner

Every error is JSON: {"error": {"message": ..., "type": ..., "code": the status}}. Nothing of a conversation
is logged or kept, but in the KV cache. A closed connection ends its answer.
"""

import asyncio
import contextlib
import functools
import json
import secrets
import time
from dataclasses import asdict

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Route

from nanoloop.chat.engine import Call, Full
from nanoloop.chat.guard import Guard, error_response, page_response
from nanoloop.chat.requests import MAX_BYTES, MAX_LOOPS, MAX_TOKENS, chat_request, lens_request, read_json
from nanoloop.checks import UserError
from nanoloop.early_exit import EXIT

RETRY_S = 5  # after which a client that was refused may come again
KEEP_ALIVE_S = 10  # a stream without tokens sends a comment so often
GATHER_S = 0.05  # tokens of this time go into one event: each costs the browser time
READ_S = 30  # a request has to arrive in


class ChatServer:
    """Answers requests with an Engine that runs in another thread.

    chat: a ChatModel. engine: its Engine. defaults: Settings of requests that do not say otherwise.
    system: text in front of conversations that have none. name: of the model. about: a line on it.
    trained: the numbers of loops that it was trained with.
    """

    def __init__(self, chat, engine, defaults, name, about, system='', trained=None):
        self.chat, self.engine, self.defaults, self.system = chat, engine, defaults, system
        self.name, self.about, self.trained = name, about, trained or [chat.config.n_loop]
        self.began, self.n_refused, self.response = time.time(), 0, page_response()

    def app(self, hosts, token=''):
        """Returns the ASGI application. hosts, token: see Guard."""
        routes = [
            Route('/', self.page),
            Route('/health', self.health),
            Route('/stats', self.stats),
            Route('/info', self.info),
            Route('/v1/models', self.models),
            Route('/v1/models/{name}', self.models),
            Route('/v1/chat/completions', self.completions, methods=['POST']),
            Route('/lens', self.lens, methods=['POST']),
            Route('/read', self.read, methods=['POST']),
        ]
        handlers = {
            UserError: lambda request, error: error_response(400, error),
            Full: self.refuse,
            HTTPException: lambda request, error: error_response(
                error.status_code, error.detail, error.headers
            ),
            Exception: lambda request, error: error_response(500, f'{type(error).__name__} in the server'),
        }
        return Guard(Starlette(routes=routes, exception_handlers=handlers), hosts, token)

    async def page(self, request):
        return self.response

    async def health(self, request):
        alive = not self.engine.closed
        return JSONResponse(dict(status='ok' if alive else 'stopping'), 200 if alive else 503)

    async def stats(self, request):
        engine = self.engine
        return JSONResponse(
            dict(
                uptime_s=round(time.time() - self.began, 1),
                active=len(engine.active),
                waiting=len(engine.waiting),
                answers=engine.n_answers,
                tokens=engine.n_tokens,
                computed_tokens=sum(rows.n_computed for rows in list(engine.rows.values())),
                refused=self.n_refused,
                cache_bytes=sum(rows.decoder.cache.bytes() for rows in list(engine.rows.values())),
            )  # fmt: skip
        )

    async def info(self, request):
        model, config = self.chat.model, self.chat.config
        exits = [
            dict(name=name, advised=rule.advised, unit=rule.unit, above=rule.above)
            for name, rule in EXIT.items()
            if model.exit_gate is not None or not rule.needs_gate
        ]
        n_loop = self.defaults.n_loop or config.n_loop
        defaults = asdict(self.defaults) | dict(n_loop=n_loop, system=self.system)
        return JSONResponse(
            dict(
                name=self.name,
                about=self.about,
                n_loop=config.n_loop,
                trained=self.trained,
                max_loops=MAX_LOOPS * config.n_loop,
                block_size=config.block_size,
                max_tokens=MAX_TOKENS,
                format=self.chat.form.name,
                exits=exits,
                defaults=defaults,
            )
        )

    async def models(self, request):
        model = dict(id=self.name, object='model', created=int(self.began), owned_by='nanoloop')
        if 'name' not in request.path_params:
            return JSONResponse(dict(object='list', data=[model]))
        if request.path_params['name'] != self.name:
            return error_response(404, f'the only model is {self.name}')
        return JSONResponse(model)

    async def refuse(self, request, error):
        self.n_refused += 1
        message = f'{len(self.engine.waiting)} other answers wait already, come again later'
        message = 'the server is stopping' if self.engine.closed else message
        return error_response(503, message, {'Retry-After': str(RETRY_S)})

    # -----------------------------------------------------------------------------
    # answers

    async def completions(self, request):
        """Answers a conversation."""
        asked = await self.asked(request)
        changed = Changed()
        answer, n_dropped = await asyncio.to_thread(
            self.chat.answer, asked.conversation, asked.settings, asked.stops, notify=changed.notify
        )
        changed.job = answer
        self.engine.submit(answer)
        events = self.events(answer, changed, request)
        head = dict(id=f'chatcmpl-{secrets.token_hex(12)}', created=int(time.time()), model=self.name)
        if asked.stream:
            texts = stream_texts(events, answer, head, asked.include_usage, n_dropped)
            headers = {'Cache-Control': 'no-store', 'X-Accel-Buffering': 'no'}
            return StreamingResponse(texts, media_type='text/event-stream', headers=headers)
        pieces = [piece async for some in events for piece in some or ()]
        if failure := failure_of(answer):
            return error_response(*failure)
        message = dict(role='assistant', content=content_of(pieces), refusal=None)
        choice = dict(index=0, message=message, logprobs=None, finish_reason=answer.finish)
        extra = dict(pieces=[piece._asdict() for piece in pieces], **report(answer, n_dropped))
        return JSONResponse(
            dict(head, object='chat.completion', choices=[choice], usage=usage_of(answer), nanoloop=extra)
        )

    async def asked(self, request):
        """Returns the ChatRequest of a request. Its conversation has a system text."""
        asked = await asyncio.to_thread(
            chat_request, await read_body(request), self.defaults, self.chat.config
        )
        self.add_system(asked.conversation)
        return asked

    def add_system(self, conversation):
        """Puts the server's system text in front of a conversation that has none, not even an empty one."""
        if conversation.system is None:
            conversation.system = self.system

    async def events(self, answer, changed, request):
        """Yields the Pieces of an answer, lists, as they come, and None where nothing came for a while.

        The answer is cancelled when the connection closes. changed: a Changed, whose notify the answer has.
        """
        watch = asyncio.create_task(cancel_when_closed(answer, request))
        try:
            while True:
                came = await changed.wait(KEEP_ALIVE_S)
                ended = answer.finish  # before the pieces: none comes after it
                pieces = answer.take_pieces()
                if pieces or not came:
                    yield pieces or None
                if ended:
                    return
                if pieces:
                    await changed.pause(GATHER_S)
        finally:
            answer.cancelled = True
            watch.cancel()

    async def lens(self, request):
        """Tells what every loop predicted for the tokens of an answer: the three most likely ones."""
        body = await read_body(request)
        conversation, tokens, settings = await asyncio.to_thread(
            lens_request, body, self.defaults, self.chat.config
        )
        self.add_system(conversation)
        ids, _ = await asyncio.to_thread(self.chat.prompt, conversation, settings)
        policy = settings.policy(self.chat.model)
        predictions = functools.partial(self.chat.predictions, [*ids, *tokens], len(ids), policy)
        return await self.call(predictions, request)

    async def read(self, request):
        """Reads the prompt of a request into the KV cache, and tells how many tokens it computed."""
        asked = await self.asked(request)
        ids, _ = await asyncio.to_thread(self.chat.prompt, asked.conversation, asked.settings)
        policy = asked.settings.policy(self.chat.model)
        return await self.call(functools.partial(self.engine.read_ahead, policy, ids), request)

    async def call(self, function, request):
        """Returns the response with the result of a function, which the engine calls between two steps."""
        changed = Changed()
        call = changed.job = Call(function, changed.notify)
        self.engine.submit(call)
        watch = asyncio.create_task(cancel_when_closed(call, request))
        try:
            await changed.wait()
        finally:
            call.cancelled = True
            watch.cancel()
        failure = failure_of(call)
        return error_response(*failure) if failure else JSONResponse(dict(tokens=call.result))


class Changed:
    """Tells the running loop that a job has changed: notify() is called from another thread.

    The loop is woken once for all that comes until it looks, because each time both threads wait for Python's
    lock. job: the Answer or Call.
    """

    def __init__(self):
        self.event, self.loop, self.noted, self.job = asyncio.Event(), asyncio.get_running_loop(), False, None

    def notify(self):
        if not self.noted or (self.job and self.job.finish):
            self.noted = True
            with contextlib.suppress(RuntimeError):  # the loop has ended
                self.loop.call_soon_threadsafe(self.event.set)

    async def wait(self, seconds=None):
        """Waits for a notify() since the last wait, or for some seconds. Returns whether there was one."""
        came = await self.wait_for_event(seconds)
        self.event.clear()
        self.noted = False  # before the caller looks at what has changed: a later change notifies again
        return came

    async def pause(self, seconds):
        """Waits some seconds, or until the job has ended. The next wait() ends at once."""
        self.noted = True
        await self.wait_for_event(seconds)
        self.event.set()

    async def wait_for_event(self, seconds):
        try:
            await asyncio.wait_for(self.event.wait(), seconds)
        except asyncio.TimeoutError:
            return False
        return True


async def read_body(request):
    """Returns the JSON object of a request. Raises HTTPException for one that is too long or too slow."""
    kind = request.headers.get('content-type', '').partition(';')[0].strip().lower()
    if kind != 'application/json':
        raise HTTPException(415, f'the header Content-Type is {kind!r}, expected application/json')

    async def read():
        body = bytearray()
        async for chunk in request.stream():
            body += chunk
            if len(body) > MAX_BYTES:
                raise HTTPException(413, f'the request is longer than {MAX_BYTES:,} bytes')
        return bytes(body)

    try:
        return read_json(await asyncio.wait_for(read(), READ_S))
    except asyncio.TimeoutError:
        raise HTTPException(408, f'the request did not arrive within {READ_S} s') from None


async def cancel_when_closed(job, request):
    """Cancels a job when the client closes the connection: the engine then ends it, which notifies."""
    while (await request.receive())['type'] != 'http.disconnect':
        pass
    job.cancelled = True


def failure_of(job):
    """Returns (status, message) of a job that has failed, None for another."""
    if job.finish == 'error':
        return 500, f'the answer failed: {type(job.error).__name__}'
    return (503, 'the server is stopping') if job.finish == 'cancelled' else None


def content_of(pieces):
    """Returns the text of an answer without calls of the calculator and their results."""
    return ''.join(piece.text for piece in pieces if piece.kind == 'text')


def usage_of(answer):
    """Returns the numbers of tokens in OpenAI's form."""
    n = len(answer.loops)
    return dict(prompt_tokens=answer.n_prompt, completion_tokens=n, total_tokens=answer.n_prompt + n)


def report(answer, n_dropped):
    """Returns speed and depth of an answer, and how many turns did not fit in view."""
    return dict(
        mean_loops=round(answer.mean_loops(), 3),
        tokens_per_second=round(answer.tokens_per_second(), 2),
        first_token_ms=round(1000 * ((answer.first or answer.ended) - answer.began), 1),
        turns_left_out=n_dropped,
    )


async def stream_texts(events, answer, head, include_usage, n_dropped):
    """Yields an answer as server-sent events in OpenAI's form. events: see ChatServer.events."""

    def event(**values):
        return f'data: {json.dumps(dict(head, object="chat.completion.chunk", **values))}\n\n'

    def choices(delta, finish=None):
        return [dict(index=0, delta=delta, logprobs=None, finish_reason=finish)]

    async with contextlib.aclosing(events):
        yield event(choices=choices(dict(role='assistant', content='')))
        async for pieces in events:
            if pieces is None:
                yield ': waiting\n\n'
                continue
            extra = dict(pieces=[piece._asdict() for piece in pieces])
            yield event(choices=choices(dict(content=content_of(pieces))), nanoloop=extra)
        if failure := failure_of(answer):
            error = json.loads(error_response(*failure).body)
            yield f'data: {json.dumps(error)}\n\n'
            return
        extra = report(answer, n_dropped) | dict(usage=usage_of(answer))
        yield event(choices=choices({}, answer.finish), nanoloop=extra)
        if include_usage:
            yield event(choices=[], usage=usage_of(answer))
        yield 'data: [DONE]\n\n'
