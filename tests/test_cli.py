"""The command line as people use it: answers on stdout, one sentence and exit code 2 for what can't be done."""

import io
import json
import os
import pty
import resource
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from cabochon.cli import main, verify
from cabochon.hub import BUNDLED
from support.speaking import save_speaking


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_speaking(tmp_path_factory.mktemp("speaking"))


@pytest.fixture
def cabochon(monkeypatch, capsys):
    """Run a command in this process: (exit code, stdout, stderr)."""

    def command(*words, stdin=b""):
        monkeypatch.setattr(sys, "argv", ["cabochon", *map(str, words)])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8"))
        code = 0
        try:
            main()
        except SystemExit as left:
            code = left.code or 0
        return SimpleNamespace(code=code, **capsys.readouterr()._asdict())

    return command


# Starting -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words", [["--help"], ["models"], ["--version"], ["chat", "--help"], ["plan", "26B-A4B", "--gpu", "h200"]]
)
def test_it_answers_at_once_and_without_torch(words):
    script = (
        "import sys, atexit; atexit.register(lambda: print('torch' in sys.modules, file=sys.stderr));"
        "from cabochon.cli import main; main()"
    )
    best = 9.0
    for _ in range(3):  # processor time, not the clock: the suite keeps every core busy
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run([sys.executable, "-c", script, *words], capture_output=True, text=True, timeout=60)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        best = min(best, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        assert done.returncode == 0
        assert done.stderr.strip() == "False", "torch was imported"
        if best < 0.5:
            break
    assert best < 0.5


def test_models_are_listed(cabochon):
    listed = cabochon("models")
    assert listed.code == 0
    for word in ("E2B", "gemma-4-26B-A4B-it", "256k", "random:E2B"):
        assert word in listed.out


@pytest.mark.parametrize("words", [(), ("bench",)])
def test_nothing_in_the_list_of_commands_is_cut(cabochon, words):
    listed = cabochon(*words, "--help").out.partition("Commands:")[2]
    assert len(listed.splitlines()) > 3 and "..." not in listed


def test_the_module_is_the_command():
    done = subprocess.run([sys.executable, "-m", "cabochon", "--version"], capture_output=True, text=True, timeout=60)
    assert done.stdout.startswith("cabochon ") and done.returncode == 0


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full here")
@pytest.mark.parametrize("words", [["models"], ["--version"]])
def test_a_full_disk_is_told_in_one_sentence(words):
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "cabochon", *words], stdout=full, stderr=subprocess.PIPE, text=True, timeout=60
        )
    assert (done.returncode, done.stderr) == (1, "cabochon: The output can't be written (No space left on device).\n")


def test_a_plan_that_cannot_be_drawn_is_not_printed_either(cabochon, tmp_path):
    told = cabochon("plan", "E2B", "--plot", tmp_path / "no" / "plan.png")
    assert (told.code, told.out) == (2, "") and "can't be written" in told.err


def test_the_bundled_model_has_a_name(cabochon):
    shown = [cabochon("show"), cabochon("show", "pebble")]
    assert shown[0] == shown[1] and shown[0].code == 0
    assert cabochon("plan", "pebble").out.startswith("Weights")
    assert "vision" in cabochon("inspect", "pebble").out


def test_a_narrow_terminal_cuts_no_figures(cabochon, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    card = cabochon("eval", "--task", "add", "--limit", "1")
    listed = cabochon("models")
    assert "100.0%" in card.out and "without thinking" in card.out
    assert "…" not in card.out + listed.out


# Talking --------------------------------------------------------------------------------------------------------------


def test_chat_takes_lines_from_a_pipe(cabochon):
    talked = cabochon(
        "chat", "--max-tokens", "8", stdin=b"Hello\n\nWhat is 1 + 2?\n/think off\nHello\n/quit\nnever said\n"
    )
    assert (talked.code, talked.err) == (0, "")
    assert talked.out.startswith("pebble, a small demonstration model made for this package, without Google's weights")
    assert "Thinking is off." in talked.out
    assert len(talked.out.splitlines()) >= 5


def test_the_answer_alone_goes_to_stdout(cabochon):
    asked = ["What is 12 + 13?", "--think", "--temperature", "0"]
    answered = cabochon("run", *asked)
    whole = json.loads(cabochon("run", *asked, "--json").out)
    assert answered.code == 0
    assert answered.out.rstrip("\n") == whole["text"]
    assert answered.err.rstrip("\n") == (whole["thinking"] or "").rstrip("\n")
    assert whole["thinking"], "the bundled model thinks when it may"
    assert whole["usage"]["completion_tokens"] > whole["usage"]["reasoning_tokens"] > 0
    assert cabochon("run", *asked[1:], stdin=b"What is 12 + 13?").out == answered.out


def test_seeds_repeat_a_reply(cabochon):
    asked = [
        "run",
        "Hello",
        "--temperature",
        "2",
        "--top-p",
        "1",
        "--top-k",
        "0",
        "--max-tokens",
        "12",
        "--json",
        "--seed",
    ]
    once, twice, other = (cabochon(*asked, seed).out for seed in (1, 1, 2))
    assert once == twice != other


def test_an_answer_that_must_fit_a_schema(cabochon, checkpoint, tmp_path):
    schema = {
        "type": "object",
        "properties": {"n": {"type": "integer", "maximum": 99, "minimum": 0}},
        "required": ["n"],
    }
    (tmp_path / "schema.json").write_text(json.dumps({**schema, "additionalProperties": False}))
    answered = cabochon("run", checkpoint, "A number", "--schema", tmp_path / "schema.json", "--max-tokens", "60")
    assert answered.code == 0, answered.err
    assert 0 <= json.loads(answered.out)["n"] <= 99


def test_a_reply_that_is_cut_says_so(cabochon, checkpoint, tmp_path):
    cut = cabochon("run", "What is 12 + 13?", "--think", "--max-tokens", "3")
    assert cut.code == 0
    assert cut.err.endswith(
        "The reply is cut: it took as many tokens as it may have (--max-tokens) or as the context has.\n"
    )
    (tmp_path / "schema.json").write_text('{"type": "string", "minLength": 60}')
    asked = ["run", checkpoint, "Write", "--schema", tmp_path / "schema.json", "--max-tokens", "9"]
    assert cabochon(*asked).code == 1, "half a JSON text looks like a whole one"


def test_a_drawing_that_cannot_be_saved_is_told_before_the_model_runs(cabochon, tmp_path):
    Image.new("RGB", (64, 64), "red").save(tmp_path / "red.png")
    asked = ["run", "Where?", "--image", tmp_path / "red.png", "--draw"]
    for out, words in (("nowhere/out.png", "nothing can be written there"), ("out.xyz", "the ending must be")):
        told = cabochon(*asked, tmp_path / out)
        assert (told.code, told.out) == (2, "")
        assert words in told.err and "Errno" not in told.err


def test_a_context_in_thousands(cabochon):
    assert cabochon("run", "Hello", "--max-model-len", "4k", "--max-tokens", "4").code == 0


def test_files_go_into_the_prompt(cabochon, tmp_path):
    (tmp_path / "notes.txt").write_text("Nothing much.")
    answered = cabochon("run", "Sum it up", "-f", tmp_path / "notes.txt", "--max-tokens", "4", "--json")
    alone = cabochon("run", "Sum it up", "--max-tokens", "4", "--json")
    assert prompt_tokens(answered) > prompt_tokens(alone)


def prompt_tokens(answered):
    return json.loads(answered.out)["usage"]["prompt_tokens"]


def test_a_template_of_ones_own(cabochon, tmp_path):
    (tmp_path / "plain.jinja").write_text("{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}")
    plain = cabochon("run", "Hello", "--chat-template", tmp_path / "plain.jinja", "--max-tokens", "4", "--json")
    assert prompt_tokens(plain) < prompt_tokens(cabochon("run", "Hello", "--max-tokens", "4", "--json"))


def test_a_terminal(checkpoint, tmp_path):
    """A chat in a pseudo-terminal: prompt, colour for what isn't the answer, history, /quit."""
    child, terminal = chat_in_a_terminal(checkpoint, tmp_path)
    assert b"/help lists the commands." in terminal.until(b"> ")
    terminal.type(b"/nonsense\n")
    assert b"There is no command /nonsense; /help lists them." in terminal.until(b"> ")
    terminal.type(b"Hello\n")
    terminal.until(b"> ")
    terminal.type(b"/quit\n")
    assert child.wait(30) == 0
    os.close(terminal.screen)
    assert (tmp_path / "cabochon" / "history").read_text().split() == ["/nonsense", "Hello", "/quit"]


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="What a process waits for is read from /proc.")
def test_ctrl_c_at_the_prompt(checkpoint, tmp_path):
    child, terminal = chat_in_a_terminal(checkpoint, tmp_path)
    terminal.until(b"> ")
    wait_until_asleep(child)
    terminal.type(b"\x03")
    assert b"/quit leaves." in terminal.until(b"> ")
    wait_until_asleep(child)
    terminal.type(b"/quit\n")
    assert child.wait(30) == 0
    os.close(terminal.screen)


def wait_until_asleep(child):
    """The prompt is shown and the child waits for a key.

    Python notes a signal that comes after it has shown the prompt and before it waits, but acts on it only when the
    next key wakes it. Nobody presses Ctrl-C within those microseconds, except a test that the prompt has just woken.
    """
    while Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()[0] != "S":
        assert child.poll() is None
        time.sleep(0.001)


def chat_in_a_terminal(checkpoint, tmp_path):
    """`cabochon chat` on a pseudo-terminal of its own session, and the user's side of it.

    A suite that was started in the background hands an ignored SIGINT down; a person's shell does not.
    """
    screen, inside = pty.openpty()
    program = (
        "import fcntl, signal, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); "
        "signal.signal(signal.SIGINT, signal.default_int_handler); from cabochon.cli import main; main()"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", program, "chat", str(checkpoint), "--max-tokens", "3"],
        env=os.environ | {"XDG_STATE_HOME": str(tmp_path), "TERM": "xterm", "OMP_NUM_THREADS": "1"},
        stdin=inside,
        stdout=inside,
        stderr=inside,
        start_new_session=True,
    )
    os.close(inside)
    return child, Terminal(screen)


class Terminal:
    """The user's side of a pseudo-terminal."""

    def __init__(self, screen):
        self.screen = screen
        self.seen = b""

    def type(self, keys):
        os.write(self.screen, keys)

    def until(self, mark):
        """What was shown up to `mark`."""
        deadline = time.monotonic() + 60
        while mark not in self.seen:
            ready, _, _ = select.select([self.screen], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, f"{mark!r} did not come, only {self.seen!r}"
            self.seen += os.read(self.screen, 1024)
        shown, _, self.seen = self.seen.partition(mark)
        return shown


# What can't be done ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "stdin", "expected"),
    [
        (["run"], b"Hello \xff", "Standard input isn't UTF-8 text (byte 0xff at position 6)"),
        (["chat"], b"Hello \xc3(\n", "Standard input isn't UTF-8 text (byte 0xc3 at position 6)"),
        (["run"], b" \n", "There is no prompt"),
        (["run", "a", "b", "c"], b"", "run takes [MODEL] PROMPT, but 3 arguments came"),
        (["run", "no-such-model", "Hi"], b"", "There is no model 'no-such-model'; see: cabochon models"),
        (["run", "pebbel", "Hi"], b"", "There is no model 'pebbel'; did you mean pebble?"),
        (["pull", "gemma4:e2x"], b"", "There is no model 'gemma4:e2x'; did you mean google/gemma-4-E2B-it?"),
        (["eval", "--suite", "nowhere.jsonl"], b"", "nowhere.jsonl can't be read (No such file or directory)."),
        (["bench", "cpu", "--batches", "1,x"], b"", "--batches is '1,x', but must be numbers from 1 to"),
        (["bench", "cpu", "--prefill", "0"], b"", "--prefill is '0', but must be numbers from 1 to"),
        (["chat", "./nowhere"], b"", "There is no file or folder ./nowhere."),
        (["run", "Hi", "--tools", "nowhere.json"], b"", "nowhere.json can't be read (No such file or directory)."),
        (["run", "Hi", "--file", "nowhere.png"], b"", "There is no file nowhere.png."),
        (["run", "Hi", "--temperature", "-1"], b"", "temperature is -1.0, but must be between 0 and 100."),
        (["run", "Hi", "--device", "toaster"], b"", "device is 'toaster'"),
        (["run", "Hi", "--device", "cuda:99"], b"", "device is 'cuda:99', which torch"),
        (["run", "Hi", "--dtype", "float8"], b"", "dtype is 'float8', but must be auto or one of"),
        (["run", "Hi", "--quantization", "int3"], b"", "quantization is 'int3', but must be one of auto, none, int8"),
        (["run", "Hi", "--max-model-len", "0"], b"", "--max-model-len is '0', but must be a number of tokens"),
        (["run", "Hi", "--max-model-len", "9k"], b"", "A context of 9,000 tokens is more than the model's 8,192"),
        (["run", "Hi", "--chat-template", "no.jinja"], b"", "no.jinja can't be read (No such file or directory)."),
        (["create", "mine", "-f", "nowhere"], b"", "nowhere can't be read (No such file or directory); name the"),
        (["create", "pebble", "-f", "nowhere"], b"", "pebble is the name of another model already"),
        (["plan", "nowhere"], b"", "There is no model 'nowhere'"),
        (["plan", "--gpu", "toaster"], b"", "There is no data for the device 'toaster'"),
        (["quantize", "pebble", "out", "--format", "int9"], b"", "The format is 'int9', but must be one of int8"),
        (["quantize", "pebble", "out", "--calibrate", "nowhere.txt"], b"", "nowhere.txt can't be read"),
        (["quantize", "pebble", "out", "--calibrate", "a.csv"], b"", "The calibration file a.csv"),
        (
            ["quantize", "pebble", "out", "--calibrate", "pebble", "--format", "ct:fp8"],
            b"",
            "--calibrate is for int8 and int4, not for ct:fp8",
        ),
        (["run", "random:E9B", "Hi"], b"", "There is no model 'E9B'"),
        (["run", "word " * 300, "--max-model-len", "64"], b"", "tokens"),
        (["chat"], b"/fly\n", "There is no command /fly; /help lists them."),
        (["chat"], b"/load nowhere.json\n", "nowhere.json can't be read"),
        (["tokenize"], b"\xff", "Standard input isn't UTF-8"),
        (["rm", "E2B"], b"", "rm would delete E2B; confirm with --yes."),
    ],
)
def test_bad_input_is_told_in_one_sentence(cabochon, words, stdin, expected):
    told = cabochon(*words, stdin=stdin)
    assert told.code == 2
    assert told.err.startswith("cabochon: ")
    assert expected in told.err
    assert len(told.err.splitlines()) == 1


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda folder: truncate(folder / "model.safetensors", 0.5), "model.safetensors"),
        (lambda folder: truncate(folder / "model.safetensors", 0.0), "model.safetensors"),
        (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json"),
        (lambda folder: edit(folder / "config.json", model_type="llama"), "llama"),
        (lambda folder: edit(folder / "config.json", shiny_new_key=1), "shiny_new_key"),
        (lambda folder: (folder / "tokenizer.json").write_text("{}"), "tokenizer.json"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer.json"),
        (lambda folder: shard(folder), "model-00002-of-00002.safetensors"),
    ],
)
def test_a_damaged_checkpoint_is_told_in_one_sentence(cabochon, checkpoint, tmp_path, damage, expected):
    folder = tmp_path / "damaged"
    shutil.copytree(checkpoint, folder)
    damage(folder)
    told = cabochon("run", folder, "Hello")
    assert told.code == 2
    assert told.err.startswith("cabochon: ")
    assert expected in told.err
    assert len(told.err.splitlines()) == 1


def truncate(path, share):
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def shard(folder):
    """Make it a checkpoint of two shards of which the second is missing."""
    from safetensors import safe_open

    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    with safe_open(folder / "model-00001-of-00002.safetensors", "pt") as opened:
        names = sorted(opened.keys())
    at = {name: f"model-0000{1 + (i == 0)}-of-00002.safetensors" for i, name in enumerate(names)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": at}))


@pytest.mark.parametrize("flag", ["--input-len", "--output-len", "--batch", "--repeats", "--max-num-batched-tokens"])
def test_a_benchmark_of_nothing_is_refused(cabochon, flag):
    told = cabochon("bench", "latency", flag, "0")
    assert told.code == 2 and f"Invalid value for '{flag}'" in told.err


def test_unknown_commands_and_options(cabochon):
    assert cabochon("fly").code == 2
    assert cabochon("run", "--fly").code == 2


# Looking --------------------------------------------------------------------------------------------------------------


def test_tokenize(cabochon):
    ids = json.loads(cabochon("tokenize", "Hi <|turn>", "--json").out)
    lines = cabochon("tokenize", stdin=b"Hi <|turn>").out.splitlines()
    assert [int(line.split("\t")[0]) for line in lines] == ids
    assert "".join(json.loads(line.split("\t")[1]) for line in lines) == "Hi <|turn>"
    assert cabochon("tokenize", "Hi <|turn>", "--count").out.strip() == str(len(ids))
    special = json.loads(cabochon("tokenize", "Hi <|turn>", "--json", "--special").out)
    assert special[-1] == 105
    assert len(special) < len(ids)


def test_show(cabochon, checkpoint):
    shown = cabochon("show", checkpoint)
    assert shown.code == 0
    for word in (str(checkpoint), "gemma4", "float32", "rendered natively"):
        assert word in shown.out
    assert str(BUNDLED) in cabochon("show").out


def test_verify(cabochon, monkeypatch):
    pytest.importorskip("transformers")
    equal = cabochon("verify", "--json", "--tokens", "70")
    figures = json.loads(equal.out)
    assert (equal.code, figures["equal"], figures["tokens"]) == (0, True, 70)
    assert set(figures["largest_difference"]) == {"embedding", "sliding layers", "global layers", "logits"}
    monkeypatch.setattr(verify, "TOLERANCE", 0.0)
    different = cabochon("verify", "--tokens", "20")
    assert different.code == 1
    assert "DIFFERENT" in different.out
    monkeypatch.setitem(sys.modules, "transformers", None)
    missing = cabochon("verify")
    assert (missing.code, missing.out) == (2, "")
    assert "pip install transformers" in missing.err
