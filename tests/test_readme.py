"""The code in README.md runs."""

import pathlib
import re

ROOT = pathlib.Path(__file__).parents[1]


def test_usage_runs(monkeypatch):
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S)
    assert blocks
    monkeypatch.chdir(ROOT)
    scope: dict = {}
    exec("".join(blocks), scope)
    assert scope["y"].shape == (2, 24, 1536)
    assert scope["w"].shape == scope["gate"].shape
    assert scope["dx"].shape == scope["x"].shape
