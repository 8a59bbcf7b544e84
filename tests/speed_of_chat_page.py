"""
Measures an answer on the chat page in a headless Chromium against sample.py's way, for one user.

    python tests/speed_of_chat_page.py CHECKPOINT [repeats]

As tests/speed_of_chat.py, but the seconds are those of the page: from the Enter key, which is pressed right
after the question was typed, to the first token, and from there to the last. The browser runs on the same
machine.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # tests/ is there already
from playwright.sync_api import sync_playwright
from speed_of_chat import QUESTION, compare
from test_chat_page import ARGS, CHROMIUM

TYPING_MS = 50  # for a character: 240 words a minute
FIGURES = """(() => {
  const { answer } = turns.at(-1), n = answer.pieces.flatMap(piece => piece.tokens).length;
  return [(answer.began - window.began) / 1000, (n - 1) / answer.seconds];
})()"""


def main(checkpoint, repeats='9'):
    with sync_playwright() as playwright:
        page = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGS).new_page()

        def answer(port, number):
            """Returns (seconds to the first token, tokens per second) as the page sees them."""
            if not page.url.startswith('http'):
                page.goto(f'http://127.0.0.1:{port}/')
                page.wait_for_selector('#send:enabled')
            page.click('#new')
            page.focus('#question')
            page.keyboard.type(f'{number} {QUESTION}', delay=TYPING_MS)
            page.evaluate('window.began = performance.now()')
            page.keyboard.press('Enter')
            page.wait_for_selector('.answer[aria-busy=false]', timeout=120_000)
            return page.evaluate(FIGURES)

        compare(checkpoint, int(repeats), 'page', answer)


if __name__ == '__main__':
    main(*sys.argv[1:])
