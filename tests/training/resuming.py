"""A run that is stopped and goes on."""

import json
import shutil


def as_it_was(workdir, folder, step):
    """A copy of a workdir, without what came after the checkpoint of a step."""
    shutil.copytree(workdir, folder)
    for path in (folder / "checkpoints").iterdir():
        if path.name.isdigit() and int(path.name) > step:
            shutil.rmtree(path)
    metrics = folder / "metrics.jsonl"
    lines = metrics.read_text().splitlines(keepends=True)
    metrics.write_text("".join(line for line in lines if json.loads(line)["step"] <= step))
    assert (folder / "checkpoints" / str(step)).is_dir() and len(lines) > step
    return folder
