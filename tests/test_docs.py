"""README and docs can't rot: every Python example and console session in them runs; every other `cabochon` command line
is at least parsed, so that no flag is named that does not exist."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FENCE = re.compile(r"^```(\w+)\n(.*?)^```", re.S | re.M)


def blocks(language):
    found_blocks = []
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        if page.name == "log.md":  # a record of what was run at the time
            continue
        text = page.read_text()
        for found in FENCE.finditer(text):
            if found[1] == language:
                line = text[: found.start()].count("\n") + 1
                found_blocks.append(pytest.param(found[2], id=f"{page.name}:{line}"))
    return found_blocks


def commands(block):
    """The command lines of a block; a trailing backslash continues one."""
    joined = block.replace("\\\n", " ")
    return [line.removeprefix("$ ") for line in joined.splitlines() if line.startswith(("$ ", "cabochon "))]


@pytest.mark.parametrize("code", blocks("python"))
def test_python_examples_run(code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "example", "exec"), {"__name__": "example"})


@pytest.mark.parametrize("block", blocks("console"))
def test_console_sessions_run(block, tmp_path):
    env = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "COLUMNS": "100"}
    for command in commands(block):
        done = subprocess.run(
            ["bash", "-c", command], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=200
        )
        assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"


@pytest.mark.parametrize("block", blocks("sh"))
def test_command_lines_parse(block):
    import typer

    from cabochon.cli import app

    root = typer.main.get_command(app)
    for command in commands(block):
        words = shlex.split(command, comments=True)
        if words[0] != "cabochon":
            continue
        with root.make_context("cabochon", words[1:], resilient_parsing=False) as context:
            name, sub, rest = root.resolve_command(context, context._protected_args + context.args)
            sub.make_context(name, rest, parent=context).close()


def test_every_fence_names_its_language():
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        fences = re.findall(r"^```(\w*)", page.read_text(), re.M)[::2]
        assert all(fences) or page.name == "architecture.md", f"{page.name}: a code block without a language"
