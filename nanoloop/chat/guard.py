"""
What the chat server refuses before it reads a request, and what it lets a browser do with its page.
"""

import base64
import hashlib
import re
import secrets
from pathlib import Path

from starlette.responses import HTMLResponse, JSONResponse

PAGE = Path(__file__).parents[1] / 'chat.html'
OPEN_PATHS = ('/', '/health')  # need no token
MAX_MESSAGE = 500  # characters of an error


def error_response(status, message, headers=None):
    """Returns an error as a response, in OpenAI's form."""
    kind = 'invalid_request_error' if status < 500 else 'server_error'
    text = str(message)
    text = text if len(text) <= MAX_MESSAGE else f'{text[:MAX_MESSAGE]}...'  # it may repeat a long value
    error = dict(message=text, type=kind, param=None, code=status)
    return JSONResponse(dict(error=error), status, headers)


class Guard:
    """An ASGI application that refuses requests from elsewhere before `app` sees them.

    hosts: values of the header Host that are served, a set; None = all. token: what Authorization has to
    carry but for OPEN_PATHS; '' = nothing. A page of another site is refused by its header Origin, and one
    whose name was pointed to this machine by Host.
    """

    def __init__(self, app, hosts, token):
        self.app, self.hosts, self.token = app, hosts, token

    async def __call__(self, scope, receive, send):
        refusal = self.refusal(scope) if scope['type'] == 'http' else None
        await (refusal or self.app)(scope, receive, send)

    def refusal(self, scope):
        """Returns the response that refuses a request, None if it may pass."""
        headers = {name.decode('latin-1'): value.decode('latin-1') for name, value in scope['headers']}
        host, origin = headers.get('host', ''), headers.get('origin')
        if self.hosts is not None and host.lower() not in self.hosts:
            return error_response(403, f'the header Host is {host[:100]!r}, expected {sorted(self.hosts)[0]}')
        if origin is not None and origin.partition('://')[2].lower() != host.lower():
            return error_response(403, f'the header Origin is {origin[:100]!r}: other sites are not served')
        given = headers.get('authorization', '')
        if self.token and scope['path'] not in OPEN_PATHS:
            if not secrets.compare_digest(given.encode(), f'Bearer {self.token}'.encode()):
                return error_response(401, 'the header Authorization has to be: Bearer TOKEN')
        return None


def page_response():
    """Returns the page, with a policy under which a browser runs its own script and loads nothing else."""
    text = PAGE.read_text(encoding='utf-8')

    def hashes(tag):
        parts = re.findall(f'<{tag}>(.*?)</{tag}>', text, re.DOTALL)
        return ' '.join(
            f"'sha256-{base64.b64encode(hashlib.sha256(part.encode()).digest()).decode()}'" for part in parts
        )

    policy = (
        f"default-src 'none'; script-src {hashes('script')}; style-src {hashes('style')}; "
        "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    headers = {
        'Content-Security-Policy': policy, 'X-Content-Type-Options': 'nosniff',
        'Referrer-Policy': 'no-referrer', 'Cache-Control': 'no-store',
    }  # fmt: skip
    return HTMLResponse(text, headers=headers)
