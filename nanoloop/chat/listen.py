"""
Runs the chat server on a port of this machine, until a signal ends it.
"""

import contextlib
import ipaddress
import secrets
import socket
import threading

from nanoloop.checks import UserError, check, missing_package
from nanoloop.signals import end_now, exit_on_sigterm

PATIENCE_S = 2  # for answers to end when the server stops


def is_loopback(host):
    """Returns whether a name or address can be reached from this machine only."""
    if host == 'localhost':
        return True
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return False


def open_socket(host, port):
    """Returns a socket that listens. Raises UserError if it cannot."""
    try:
        family = socket.AF_INET6 if ':' in host else socket.AF_INET
        listener = socket.create_server((host, port), family=family, backlog=128)
        # the connections inherit it: else each small answer waits 40 ms for the client's acknowledgement
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, True)
        return listener
    except (OSError, TypeError) as error:  # TypeError: a name that IDNA cannot encode
        reason = getattr(error, 'strerror', None) or error
        raise UserError(f'host={host!r}, port={port}: {reason}; --port=0 takes any free port') from None


def choose_token(host, token):
    """Returns the token that requests have to carry, '' for none: one is made for other than this machine."""
    check(token.isascii() and token.isprintable() and ' ' not in token, 'token', token, 'letters and digits')
    return token or ('' if is_loopback(host) else secrets.token_urlsafe(16))


def served_hosts(host, port):
    """Returns the values of the header Host that are served, None for all."""
    if not is_loopback(host):
        return None
    names = {'127.0.0.1', 'localhost', '[::1]', f'[{host}]' if ':' in host else host}
    return {f'{name}:{port}' for name in names} | (names if port == 80 else set())


def check_packages():
    """Raises UserError without the packages of the server."""
    try:
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise missing_package('web=True', 'chat', error.name) from None


@contextlib.contextmanager
def running(engine, run_engine):
    """Runs an engine in a thread of its own inside the block. run_engine: calls engine.run().

    Returns the thread, which may still be in its last step after the block.
    """
    thread = threading.Thread(target=run_engine, name='engine', daemon=True)
    thread.start()
    try:
        yield thread
    finally:
        engine.close()
        thread.join(PATIENCE_S)


def make_server(app, engine):
    """Returns the uvicorn.Server of an ASGI application. A signal that ends it ends the engine's answers."""
    import uvicorn

    class Server(uvicorn.Server):
        number = 0  # the signal that has ended it

        def handle_exit(self, number, frame):
            self.number = number
            engine.close()  # the answers end, and the connections with them
            super().handle_exit(number, frame)

    config = uvicorn.Config(
        app, interface='asgi3', ws='none', lifespan='off', log_level='warning', access_log=False,
        server_header=False, proxy_headers=False, timeout_graceful_shutdown=PATIENCE_S, timeout_keep_alive=30,
    )  # fmt: skip
    return Server(config)


def serve(listener, app, engine, run_engine):
    """Serves an ASGI application on a socket until SIGINT or SIGTERM, which then ends the process."""
    server = make_server(app, engine)
    try:
        with exit_on_sigterm(), running(engine, run_engine) as thread:
            server.run(sockets=[listener])
    finally:
        if server.number and thread.is_alive():  # in a long step: Python would abort when it ends
            end_now(server.number)
