"""The chat page in a browser, with a server of a tiny random model: its text is random bytes."""

import contextlib
import json
import shutil
import time
import urllib.request

import pytest
import torch
from chatting import TOKENIZER, Served
from helpers import randomize

from model import GPT, GPTConfig
from nanoloop.chat.chat_model import ChatModel
from nanoloop.chat.settings import Settings

sync_api = pytest.importorskip('playwright.sync_api', reason='needs playwright')
CHROMIUM = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason='needs chromium or google-chrome')
ARGS = (
    '--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking '
    '--disable-component-update --disable-sync'
).split()

SIZES = dict(block_size=128, vocab_size=265, n_head=2, n_embd=32, n_prelude=0, n_block=2, n_coda=0, n_loop=4)
THRESHOLD = 0.5  # nats of kl, at which tokens of the random model take different numbers of loops
BAD = '<img src=x onerror=window.pwned=1><script>window.pwned=1</script>'
ENDED = '.answer[aria-busy=false]'


@pytest.fixture(scope='module')
def served():
    model = randomize(GPT(GPTConfig(**SIZES))).eval()
    with torch.no_grad():
        model.lm_head.weight[256:] = 0  # never among the most likely: answers end by their length
    served = Served(ChatModel(model, TOKENIZER), Settings(max_new_tokens=12, seed=1), max_batch=2)
    with served.running():
        yield served


def stats(served):
    with urllib.request.urlopen(f'{served.url}stats') as response:
        return json.load(response)


@pytest.fixture(scope='module')
def browser():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGS)
        yield browser
        browser.close()


def watched(page):
    """Returns the list to which errors on the console of a page will be added."""
    errors = []
    page.set_default_timeout(5000)
    page.on('console', lambda message: errors.append(message.text) if message.type == 'error' else None)
    page.on('pageerror', lambda error: errors.append(str(error)))
    return errors


def check_clean(page, errors, expected=()):
    """Checks that no text has run as a script, and that there are no errors but those with expected texts."""
    assert page.evaluate('window.pwned') is None
    assert [text for text in errors if not any(part in text for part in expected)] == []


@contextlib.contextmanager
def opened(browser, url, expected=(), **options):
    """Opens the page in a context of its own. expected: texts of errors on its console."""
    context = browser.new_context(**options)
    page = context.new_page()
    errors = watched(page)
    page.goto(url)
    yield page
    check_clean(page, errors, expected)
    context.close()


@pytest.fixture(scope='module')
def tab(browser):
    """A tab that tests share, and the errors on its console: a new one takes long."""
    context = browser.new_context(viewport=dict(width=700, height=500), reduced_motion='reduce')
    page = context.new_page()
    return page, watched(page)


@pytest.fixture
def page(served, tab):
    """The page, with nothing stored."""
    page, errors = tab
    served.delay_s, served.token = 0, ''
    errors.clear()
    page.goto(served.url)
    page.wait_for_selector('#send:enabled')
    yield page
    served.delay_s = 0
    page.unroute_all()
    page.evaluate("() => { removeEventListener('pagehide', save); save = () => {}; sessionStorage.clear(); }")
    check_clean(page, errors)


def start(page, question='Hi'):
    page.fill('#question', question)
    page.press('#question', 'Enter')


def ask(page, question='Hi'):
    """Asks and waits for the end of the answer, which is returned."""
    n = page.locator('.answer').count()
    start(page, question)
    page.wait_for_function('n => document.querySelectorAll(".answer[aria-busy=false]").length > n', arg=n)
    return page.locator('.answer').last


def texts(page, selector):
    return page.locator(selector).all_text_contents()


def use_exit(page, threshold=THRESHOLD):
    page.select_option('#exit', 'kl')
    page.fill('#exit_threshold', str(threshold))


def sse(*pieces, finish='stop', **report):
    """Returns the body of a stream. pieces: (kind, text, ids, loops)."""
    names = ('kind', 'text', 'tokens', 'loops')
    given = [dict(zip(names, piece, strict=True)) for piece in pieces]
    events = [dict(choices=[dict(delta={}, finish_reason=None)], nanoloop=dict(pieces=given))]
    events.append(dict(choices=[dict(delta={}, finish_reason=finish)], nanoloop=report))
    return ''.join(f'data: {json.dumps(event)}\n\n' for event in events) + 'data: [DONE]\n\n'


def fake(page, *bodies):
    """Answers the next requests for answers with these bodies; returns a list that their JSON is added to."""
    requests, bodies = [], list(bodies)

    def fulfill(route):
        requests.append(route.request.post_data_json)
        route.fulfill(content_type='text/event-stream', body=bodies.pop(0))

    page.route('**/completions', fulfill)
    return requests


# -----------------------------------------------------------------------------
# answers


def test_an_answer_grows_before_it_ends_and_says_what_it_took(served, page):
    served.delay_s = 0.06
    start(page, 'What is this?')
    body, lengths = page.locator('.answer .body'), set()
    while page.locator(ENDED).count() == 0:
        lengths.add(len(body.text_content()))
    assert len(lengths - {0}) > 3 and len(body.text_content()) >= max(lengths)
    assert texts(page, '.question .body') == ['What is this?']
    foot = page.locator('.answer .foot').text_content()
    assert '12 tokens' in foot and 'mean loops 4.00 of 4' in foot and 'cut at 12 tokens' in foot
    assert 'tokens/s' in foot
    n_shown = page.evaluate('turns[0].answer.pieces.flatMap(piece => piece.tokens).length')
    assert n_shown == 12


def test_a_question_is_read_while_it_is_typed(served, page):
    before, deadline = stats(served), time.monotonic() + 5
    page.fill('#question', 'a question that no other test has')
    while stats(served)['computed_tokens'] == before['computed_tokens']:
        assert time.monotonic() < deadline
    assert stats(served)['answers'] == before['answers']


def test_events_are_read_across_boundaries_of_the_network_and_of_characters(page):
    script = """async size => {
      const text = 'data: {"a": "\\u20ac\\ud83d\\ude00"}\\n\\n: waiting\\r\\n\\r\\ndata: x\\ndata: y\\n\\n';
      const bytes = new TextEncoder().encode(text);
      const stream = new ReadableStream({ start(controller) {
        for (let i = 0; i < bytes.length; i += size) controller.enqueue(bytes.slice(i, i + size));
        controller.close();
      } });
      const events = [];
      for await (const event of eventsOf(new Response(stream))) events.push(event);
      return events;
    }"""
    for size in (1, 2, 7, 1000):
        assert page.evaluate(script, size) == ['{"a": "€😀"}', 'x\ny']


def test_the_slider_is_turned_by_keyboard_and_changes_the_loops_of_the_next_answer(page):
    assert 'mean loops 4.00 of 4' in ask(page).text_content()
    assert page.text_content('#trained') == 'trained with 4' and page.get_attribute('#n_loop', 'max') == '16'
    page.focus('#n_loop')
    for _ in range(3):
        page.keyboard.press('ArrowRight')
    assert page.text_content('#loops') == '7'
    assert 'mean loops 7.00 of 7' in ask(page).text_content()


def test_stop_by_escape_ends_the_answer_here_and_on_the_server(served, page):
    served.delay_s = 0.05
    page.evaluate("document.querySelector('#max_tokens').value = 2000")
    start(page)
    page.wait_for_selector('.answer .token')
    page.keyboard.press('Escape')
    page.wait_for_selector(ENDED)
    assert 'stopped' in page.text_content('.answer .foot') and page.is_visible('#send')
    for _ in range(60):
        if stats(served)['active'] == 0:
            break
        time.sleep(0.05)
    assert stats(served)['active'] == 0 and stats(served)['waiting'] == 0


def test_regenerate_replaces_the_last_answer(page):
    ask(page, 'one')
    ask(page, 'two')
    assert page.locator('text=Regenerate >> visible=true').count() == 1
    page.evaluate('turns[1].answer.old = true')
    page.click('text=Regenerate >> visible=true')
    page.wait_for_function('() => turns[1].answer.finish && !turns[1].answer.old')
    assert texts(page, '.question .body') == ['one', 'two'] and page.locator('.answer').count() == 2


def test_a_question_is_edited_and_what_follows_it_is_dropped(page):
    for question in ('one', 'two', 'three'):
        ask(page, question)
    page.locator('text=Edit').nth(1).click()
    page.keyboard.press('End')
    page.keyboard.type('!')
    page.keyboard.press('Enter')
    page.wait_for_function('() => turns.length === 2 && turns[1].answer.finish')
    assert texts(page, '.question .body') == ['one', 'two!'] and page.locator('.answer').count() == 2


def test_shift_and_enter_is_a_line_break_and_new_conversation_empties_the_page(page):
    page.focus('#question')
    for key in ('a', 'Shift+Enter', 'b', 'Enter'):
        page.keyboard.press(key)
    page.wait_for_selector(ENDED)
    assert page.inner_text('.question .body') == 'a\nb'
    page.click('#new')
    assert page.locator('article').count() == 0


def test_an_answer_is_copied(served, browser):
    with opened(browser, served.url, permissions=['clipboard-read', 'clipboard-write']) as page:
        page.wait_for_selector('#send:enabled')
        fake(page, sse(('text', 'a <b>', [97], [1])))
        ask(page).get_by_text('Copy').click()
        page.wait_for_selector('text=Copied')
        assert page.evaluate('navigator.clipboard.readText()') == 'a <b>'


# -----------------------------------------------------------------------------
# loops of tokens


def backgrounds(page):
    tokens = page.locator('.answer .token')
    return tokens.evaluate_all('nodes => nodes.map(node => getComputedStyle(node).backgroundColor)')


def test_tokens_are_shaded_by_their_loops_until_the_switch_is_turned_off(page):
    use_exit(page)
    ask(page)
    loops = page.evaluate('turns[0].answer.pieces.map(piece => Math.max(...piece.loops))')
    colours = backgrounds(page)
    assert len(set(loops)) > 1
    assert len(set(zip(loops, colours, strict=True))) == len(set(loops)) == len(set(colours))
    assert texts(page, '.legend b') == ['1', '2', '3', '4']
    page.uncheck('#shade')
    assert set(backgrounds(page)) == {'rgba(0, 0, 0, 0)'} and not page.is_visible('.legend')


def tip_of(page, i):
    """Checks the tooltip of piece i against what the server predicts, and returns its text."""
    page.wait_for_selector('#tip tr')
    lens, loops, first = page.evaluate(
        """async i => {
          const { pieces } = turns[0].answer, before = pieces.slice(0, i).flatMap(piece => piece.tokens);
          return [await lensOf(turns[0]), pieces[i].loops, before.length];
        }""",
        i,
    )
    expected = []
    for token, n in zip(lens[first : first + len(loops)], loops, strict=True):
        assert len(token['loops']) == 4 and all(len(best) == 3 for best in token['loops'])
        expected.append(f'{token["text"]} {n} of 4 loops')
        expected += [
            f'loop {r}' + ''.join(text for text, _ in best) for r, best in enumerate(token['loops'], 1)
        ]
    lines = page.locator('#tip p, #tip tr').evaluate_all(
        """lines => lines.map(line => line.matches('p') ? line.textContent :
        [...line.querySelectorAll('th, bdi')].map(part => part.textContent).join(''))"""
    )
    assert lines == expected and page.locator('#tip tr.left').count() == len(loops)


def test_a_tooltip_shows_the_predictions_of_every_loop_by_mouse_keyboard_and_tap(served, browser):
    with opened(browser, served.url, has_touch=True) as page:
        page.wait_for_selector('#send:enabled')
        asked = []
        page.on('request', lambda request: asked.append(request.url) if 'lens' in request.url else None)
        use_exit(page)
        tokens = ask(page).locator('.token')
        tokens.nth(3).hover()
        tip_of(page, 3)
        page.hover('h1')
        assert not page.is_visible('#tip')
        page.focus('.answer .body')
        for key in ('ArrowRight', 'ArrowRight', 'ArrowRight', 'ArrowLeft'):
            page.keyboard.press(key)
        tip_of(page, 1)
        assert '2 of' in page.text_content('#status') or 'loop 4' in page.text_content('#status')
        page.keyboard.press('Escape')
        assert not page.is_visible('#tip')
        tokens.nth(5).tap()
        tip_of(page, 5)
        page.tap('h1')
        assert not page.is_visible('#tip')
        assert len(asked) == 1  # once per answer


def test_the_calculators_tokens_are_shown_as_forced_and_sent_back_as_parts(page):
    pieces = [('text', 'so ', [1], [2]), ('python', '1+', [261, 2], [1, 1]), ('python', '1', [3], [1])]
    pieces += [('python_output', '2', [4, 5], [0, 0]), ('text', '.', [6], [1])]
    requests = fake(page, sse(*pieces), sse(('text', 'b', [1], [1])))
    answer = ask(page)
    assert 'mean loops 1.20' in answer.text_content()
    answer.locator('.python_output').hover()
    assert 'forced by the calculator, not predicted' in page.text_content('#tip')
    ask(page, 'next')
    parts = [('text', 'so '), ('python', '1+1'), ('python_output', '2'), ('text', '.')]
    assert requests[1]['messages'] == [
        dict(role='system', content=''),
        dict(role='user', content='Hi'),
        dict(
            role='assistant',
            content=[dict(type=kind, text=text) for kind, text in parts],
            tokens=[1, 261, 2, 3, 4, 5, 6],
        ),
        dict(role='user', content='next'),
    ]


def test_messages_that_were_left_out_are_told(page):
    fake(page, sse(('text', 'a', [1], [1]), turns_left_out=2))
    assert 'The oldest 2 messages did not fit' in ask(page).text_content()


# -----------------------------------------------------------------------------
# text is only text


def test_html_and_scripts_in_questions_and_answers_are_text(page):
    code = f'```html\n{BAD}\n```\nafter'
    parts = [code[i : i + 5] for i in range(0, len(code), 5)]
    fake(page, sse(('text', BAD, [1], [1])), sse(*(('text', part, [1], [1]) for part in parts)))
    ask(page, BAD)
    ask(page, code)
    page.wait_for_timeout(50)
    assert texts(page, '.question .body')[0] == texts(page, '.answer .body')[0] == BAD
    assert texts(page, '.question code') == texts(page, '.answer code') == [BAD + '\n']
    assert texts(page, '.answer pre + .plain') == ['after']
    assert page.locator('main img, main script').count() == 0


def test_a_policy_forbids_other_scripts_even_if_they_got_in(served, browser):
    with opened(browser, served.url, expected=['Content Security Policy']) as page:
        page.wait_for_selector('#send:enabled')
        page.evaluate(
            "document.body.append(Object.assign(document.createElement('script'), {text: 'pwned = 1'}))"
        )


# -----------------------------------------------------------------------------
# what can go wrong


def test_a_reload_keeps_conversation_settings_and_an_answer_that_was_streaming(served, page):
    use_exit(page, 0.25)
    page.evaluate("document.querySelector('#system').value = 'Be brief.'")
    ask(page, 'one')
    page.click('#theme')
    served.delay_s = 0.05
    start(page, 'two')
    page.wait_for_function('() => turns[1].answer.pieces.length > 3')
    before = texts(page, '.answer .body')
    page.reload()
    page.wait_for_selector('#send:enabled')
    after = texts(page, '.answer .body')
    assert texts(page, '.question .body') == ['one', 'two']
    assert after[0] == before[0] and after[1].startswith(before[1]) and len(before[1]) > 1
    assert 'reloaded' in page.locator('.answer').nth(1).text_content()
    values = [page.input_value(f'#{key}') for key in ('exit', 'exit_threshold', 'system')]
    assert values == ['kl', '0.25', 'Be brief.']
    assert page.get_attribute('html', 'data-theme') == 'dark'
    served.delay_s = 0
    assert '12 tokens' in ask(page, 'three').text_content()


def test_what_a_tab_saves_when_it_goes_while_an_answer_streams_is_shown_as_cut_off(served, browser, page):
    served.delay_s = 0.05
    start(page)
    page.wait_for_function('() => turns[0].answer.pieces.length > 3')
    saved, n = page.evaluate(
        """() => {
          sessionStorage.clear();
          dispatchEvent(new Event('pagehide'));
          return [sessionStorage.getItem('nanoloop-chat'), turns[0].answer.pieces.length];
        }"""
    )
    assert json.loads(saved)['turns'][0]['answer']['finish'] is None
    with opened(browser, served.url) as other:
        other.add_init_script(f"sessionStorage.setItem('nanoloop-chat', {json.dumps(saved)})")
        other.reload()
        assert other.evaluate('turns[0].answer.pieces.length') == n
        assert 'reloaded' in other.locator(ENDED).text_content()


def test_an_answer_without_a_token_is_left_out_of_the_next_request(served, page):
    served.delay_s = 0.3
    start(page, 'one')
    page.click('#stop')
    page.wait_for_selector(ENDED)
    served.delay_s = 0
    with page.expect_request('**/completions') as request:
        assert '12 tokens' in ask(page, 'two').text_content()
    assert request.value.post_data_json['messages'][1:] == [dict(role='user', content='two')]


def test_an_error_is_told_in_the_answer_and_does_not_stay_in_the_conversation(served, browser):
    with opened(browser, served.url, expected=['400']) as page:
        page.wait_for_selector('#send:enabled')
        assert 'expected at most' in ask(page, 'x' * 300).locator('.failed').text_content()
        assert '12 tokens' in ask(page, 'y').text_content()
        fake(page, 'data: {"error": {"message": "the answer failed"}}\n\n', 'data: {"choices": []}\n\n')
        assert ask(page).locator('.failed').text_content() == 'the answer failed'
        assert 'ended before' in ask(page).locator('.failed').text_content()


def test_a_busy_server_is_asked_again_until_the_user_stops(served, browser):
    with opened(browser, served.url, expected=['503']) as page:
        page.wait_for_selector('#send:enabled')
        busy = [dict(status=503, headers={'Retry-After': wait}, json=dict(error={})) for wait in ('1', '60')]
        page.route('**/completions', lambda route: route.fulfill(**busy.pop(0)), times=1)
        start(page)
        page.wait_for_selector('text=busy, trying again in 1 s')
        page.wait_for_selector(ENDED)
        assert '12 tokens' in page.text_content('.answer .foot')
        page.route('**/completions', lambda route: route.fulfill(**busy.pop(0)), times=1)
        start(page)
        page.wait_for_selector('text=busy, trying again in 60 s')
        page.keyboard.press('Escape')
        page.wait_for_function('() => turns[1].answer.finish === "stopped"')


def test_the_token_comes_from_the_address_which_is_cleaned(served, browser):
    with opened(browser, served.url, expected=['401']) as page:
        served.token = 'secret'
        page.reload()
        page.wait_for_selector('#notice:has-text("#token=")')
        page.goto(f'{served.url}#token=secret')
        page.wait_for_selector('#send:enabled')
        assert page.url == served.url and not page.is_visible('#notice')
        assert '12 tokens' in ask(page).text_content()
        page.reload()
        page.wait_for_selector('#send:enabled')
    served.token = ''


def test_a_missing_server_is_told_and_asked_again(served, browser):
    with opened(browser, served.url, expected=['ERR_FAILED']) as page:
        page.wait_for_selector('#send:enabled')
        page.route('**/info', lambda route: route.abort(), times=1)
        page.reload()
        page.wait_for_selector('#notice:has-text("No server answers")')
        start(page)
        page.wait_for_selector('#send:enabled')
        assert not page.is_visible('#notice') and page.input_value('#question') == 'Hi'


def test_a_base_model_is_said_to_continue_text(page):
    assert not page.is_visible('#base')
    page.route('**/info', lambda route: route.fulfill(json=route.fetch().json() | dict(format='text')))
    page.reload()
    page.wait_for_selector('#base')


def test_wrong_settings_are_not_sent(page):
    page.evaluate("document.querySelector('#temperature').value = 3")
    start(page)
    assert page.locator('article').count() == 0 and page.is_visible('#temperature')


# -----------------------------------------------------------------------------
# the page itself


def test_the_page_fits_a_narrow_screen(served, browser):
    expected = ['400 (Bad Request)']  # the question is too long to be read while it is typed
    with opened(browser, served.url, expected, viewport=dict(width=360, height=740)) as page:
        page.wait_for_selector('#send:enabled')
        fake(page, sse(('text', 'x' * 300 + '\n```\n' + 'y' * 300 + '\n```', [1], [1])))
        ask(page, 'z' * 300)
        page.click('summary')
        assert page.evaluate('document.documentElement.scrollWidth') <= 360
        assert page.evaluate("document.querySelector('main').scrollWidth") <= 360


def test_the_theme_follows_the_system_and_the_switch(served, browser):
    with opened(browser, served.url, color_scheme='dark') as page:
        colour = 'getComputedStyle(document.body).backgroundColor'
        dark = page.evaluate(colour)
        page.click('#theme')
        assert page.evaluate(colour) == 'rgb(255, 255, 255)' != dark


def test_the_page_follows_the_stream_only_while_the_reader_is_at_its_end(served, page):
    fake(page, sse(('text', 'a\n' * 100, [1], [1])))
    ask(page)
    position = 'log.scrollHeight - log.scrollTop - log.clientHeight'
    assert page.evaluate(position) < 2
    page.unroute('**/completions')
    served.delay_s = 0.05
    start(page)
    page.wait_for_selector('.answer[aria-busy=true] .token')
    page.evaluate('log.scrollTop = 100')
    page.wait_for_function('() => turns[1].answer.finish')
    assert page.evaluate('log.scrollTop') == 100


def test_every_control_has_a_name_and_shows_the_focus(page):
    ask(page)
    nameless = page.evaluate(
        """[...document.querySelectorAll('input, select, textarea, button')].filter(node =>
        !(node.labels?.length || node.textContent.trim() || node.getAttribute('aria-label'))).length"""
    )
    assert nameless == 0
    page.focus('#new')
    page.keyboard.press('Shift+Tab')
    reached = set()
    for _ in range(20):
        page.keyboard.press('Tab')
        name, outline = page.evaluate(
            """[document.activeElement.id || document.activeElement.textContent ||
            document.activeElement.tagName, getComputedStyle(document.activeElement).outlineStyle]"""
        )
        reached.add(name)
        assert name == 'BODY' or outline != 'none', name
    assert {'new', 'theme', 'Edit', 'Copy', 'Regenerate', 'n_loop', 'exit', 'question', 'send'} <= reached
