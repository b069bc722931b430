"""Conversations in the terminal: with a server, and with a model in this process."""

import io
import itertools

import pytest
from typer.testing import CliRunner

from nanoflow_compiler.cli import app, chat_session
from nanoflow_compiler.cli.chat_session import Session, typed_lines
from nanoflow_compiler.errors import NanoflowError
from server.fake_engine import FakeEngine
from server.live import serving, wait_until
from tiny_models import llama
from tiny_tokenizers import byte_tokenizer


def run(*arguments, **options):
    return CliRunner().invoke(app, ["chat", *arguments], **options)


class Answers:
    """Says how many messages there are, a word at a time; ``on_piece`` runs before each."""

    def __init__(self, on_piece=lambda: None):
        self.on_piece = on_piece
        self.asked = []
        self.num_closed = 0

    def __call__(self, messages):
        self.asked.append([message["content"] for message in messages])
        try:
            for piece in [f"{len(messages)} ", "messages"]:
                self.on_piece()
                yield piece
        finally:
            self.num_closed += 1


def test_history_is_kept_until_it_is_cleared(capsys):
    answers = Answers()
    Session(answers, system_prompt="be short").run(["a", "", " b ", "/clear", "c", "/exit", "d"])
    assert answers.asked == [
        ["be short", "a"],
        ["be short", "a", "2 messages", "b"],
        ["be short", "c"],
    ]
    assert capsys.readouterr().out == "2 messages\n4 messages\n2 messages\n"


def test_unknown_commands_are_explained(capsys):
    answers = Answers()
    Session(answers, system_prompt=None).run(["/help", "/etc/hosts is what?"])
    assert answers.asked == [["/etc/hosts is what?"]]
    assert "/clear forgets" in capsys.readouterr().err


def test_ctrl_c_stops_the_answer_and_keeps_what_was_said(capsys):
    pieces = itertools.count()

    def interrupt():
        if next(pieces) == 1:
            raise KeyboardInterrupt

    answers = Answers(interrupt)
    Session(answers, system_prompt=None).run(["a", "b"])
    assert answers.asked == [["a"], ["a", "1 ", "b"]]
    assert answers.num_closed == 2
    assert capsys.readouterr().out == "1 \n3 messages\n"


def test_another_ctrl_c_does_not_end_the_session(monkeypatch):
    def ask(_session, text):
        asked.append(text)
        raise KeyboardInterrupt

    asked = []
    monkeypatch.setattr(Session, "ask", ask)
    Session(Answers(), system_prompt=None).run(["a", "b"])
    assert asked == ["a", "b"]


def test_a_failure_ends_neither_the_session_nor_stays_in_it(capsys):
    pieces = itertools.count()

    def fail():
        if next(pieces) == 0:
            raise NanoflowError("no\n  luck")

    answers = Answers(fail)
    Session(answers, system_prompt=None).run(["a", "b"])
    assert answers.asked == [["a"], ["b"]]
    assert "nanoflow: no luck\n" in capsys.readouterr().err


def test_lines_of_a_terminal(monkeypatch, capsys):
    source = io.StringIO()
    source.isatty = lambda: True
    typed = iter(["a", KeyboardInterrupt(), "b", EOFError()])

    def read(_prompt):
        line = next(typed)
        if isinstance(line, BaseException):
            raise line
        return line

    monkeypatch.setattr(chat_session, "input", read, raising=False)
    assert list(typed_lines(source)) == ["a", "b"]
    assert "Ctrl-D ends" in capsys.readouterr().err


@pytest.fixture(scope="module")
def live():
    engine = FakeEngine(script=lambda prompt: f"{prompt.count('user:')} questions")
    with serving(engine, api_keys=("secret",)) as live:
        yield live


def test_server_answers_a_conversation(live):
    flags = ["--url", f"{live.url}/v1", "--api-key", "secret", "--system-prompt", "short"]
    flags += ["--temperature", "0.5", "--max-tokens", "50"]
    result = run(*flags, input="hello\nagain\n/clear\nonce\n")
    assert result.exit_code == 0, result.output
    assert result.stdout == "1 questions\n2 questions\n1 questions\n"
    _, prompt, params = live.engine.seen[-1]
    assert live.engine.tokenizer.decode(prompt) == "system: short\nuser: once\nassistant:"
    assert (params.temperature, params.max_tokens) == (0.5, 50)


def test_quick_answers_once(live):
    result = run("--url", f"{live.url}/v1", "--api-key", "secret", "-q", "hello")
    assert (result.exit_code, result.stdout) == (0, "1 questions\n")


def test_an_answer_that_is_stopped_is_aborted():
    with serving(FakeEngine(delay_s=0.05)) as live:
        server = chat_server(live)
        pieces = server.answer([{"role": "user", "content": "hello"}])
        assert next(pieces)
        pieces.close()
        wait_until(live.is_idle)
        assert not live.engine.active


def chat_server(live, **settings):
    from nanoflow_compiler.cli.chat_server import ServerChat

    return ServerChat(f"{live.url}/v1", model=None, api_key=None, sampling={}, **settings)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--api-key", "other"], "API key"),
        (["--api-key", "secret", "--model", "other"], "other"),
        (["--api-key", "secret", "--top-p", "7"], "top_p"),
    ],
)
def test_server_says_what_is_wrong(live, flags, message):
    result = run("--url", f"{live.url}/v1", *flags, "-q", "hello")
    assert result.exit_code == 2
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_no_server():
    result = run("--url", "http://127.0.0.1:1/v1", "-q", "hello")
    assert result.exit_code == 2
    assert "start it with nanoflow serve MODEL" in result.stderr


@pytest.mark.parametrize(
    "flags",
    [
        ["--max-num-seqs", "3"],
        ["--enforce-eager"],
        ["m", "--url", "http://x"],
        ["m", "--model", "x"],
    ],
)
def test_flags_without_effect_are_refused(flags):
    result = run(*flags, "-q", "hello")
    assert result.exit_code == 2
    assert "some of these flags are for" in result.stderr


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    llama(vocab_size=300, num_hidden_layers=1).save_pretrained(folder)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    tokenizer.save_pretrained(folder)
    return folder


def test_model_in_this_process(model):
    flags = ["--enforce-eager", "--temperature", "0", "--max-tokens", "9"]
    quick = run(str(model), *flags, "-q", "hello")
    assert quick.exit_code == 0, quick.output
    assert quick.stdout.strip()
    talk = run(str(model), *flags, input="hello\n/clear\nhello\n")
    assert talk.stdout == quick.stdout * 2


def test_model_that_cannot_chat(tmp_path):
    llama(num_hidden_layers=1).save_pretrained(tmp_path)
    result = run(str(tmp_path), "--enforce-eager", "-q", "hello")
    assert result.exit_code == 2
    assert "no chat template" in result.stderr
