"""The demo runs to its end with every activation, and both networks learn the same; a step of it is measured at any scale."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

for needed in ("matplotlib", "sklearn", "tqdm"):
    pytest.importorskip(needed, reason="pip install 'fastact[demo]'")

EXAMPLES = Path(__file__).parents[1] / "examples"
DEMO = EXAMPLES / "digits_cnn.py"


@pytest.mark.parametrize("activation", ["relu", "leaky_relu", "sigmoid", "tanh", "scaled_sigmoid"])
def test_demo(activation: str, tmp_path: Path) -> None:
    plot = tmp_path / "loss.png"
    command = [sys.executable, str(DEMO), "--activation", activation, "--epochs", "1"]
    done = subprocess.run(
        [*command, "--threads", "1", "--output", str(plot)],
        cwd=tmp_path,
        env=os.environ | {"PYTHONUTF8": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert re.search(r"^step time, .*: \d+\.\d+ ", done.stdout, re.M), done.stdout

    accuracies = re.findall(r"^(torch\.nn|fastact) +([\d.]+)%", done.stdout, re.M)
    assert [name for name, _ in accuracies] == ["torch.nn", "fastact"], done.stdout
    native, fast = (float(value) for _, value in accuracies)
    assert abs(native - fast) <= 2, done.stdout
    # After so few steps accuracy may still be that of guessing; probabilities tell more.
    difference = re.search(r"^largest difference .*: ([\d.e-]+)$", done.stdout, re.M)
    assert difference, done.stdout
    assert float(difference[1]) < 0.003, done.stdout
    assert "more than rounding explains" not in done.stdout

    # A PNG is whole if it starts with its signature and ends with the IEND chunk.
    image = plot.read_bytes()
    assert image.startswith(b"\x89PNG\r\n\x1a\n")
    assert image.endswith(b"IEND\xaeB`\x82")


def test_classic_troubles(tmp_path: Path) -> None:
    """The one that is quickest; all have the same form."""
    command = [sys.executable, str(EXAMPLES / "classic_troubles.py"), "--only", "3", "--output", str(tmp_path / "figures")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "softmax over one unit" in done.stdout.lower(), done.stdout
    images = list((tmp_path / "figures").glob("*.png"))
    assert images
    for image in images:
        assert image.read_bytes().endswith(b"IEND\xaeB`\x82")


def test_training_step(tmp_path: Path) -> None:
    command = [sys.executable, str(EXAMPLES / "training_step.py"), "--activations", "relu", "scaled_sigmoid"]
    scale = ["--size", "6", "--channels", "3", "--batch", "16", "--steps", "2", "--threads", "1"]
    done = subprocess.run([*command, *scale, "--json", tmp_path / "step.json"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "more than rounding explains" not in done.stdout
    lines = {line.split()[0]: line for line in done.stdout.splitlines() if line}

    rows = json.loads((tmp_path / "step.json").read_text())["rows"]
    assert [row["activation"] for row in rows] == ["relu", "scaled_sigmoid"]
    for row in rows:
        assert [len(side) for side in row["seconds"]] == [2, 2]
        assert [len(side) for side in row["losses"]] == [4, 4]  # those of warming up too
        for peak, training in zip(row["peak_bytes"], row["training_bytes"], strict=True):
            # Most of it is torch: such a network needs next to nothing.
            assert 0 <= training < peak / 2
            assert 100 << 20 < peak < 2 << 30
            assert f"{peak / 2**20:,.0f}" in lines[row["activation"]]
