"""Trains or resumes a run: `python run_pretraining.py configs/quickstart.py`."""

from flaxpretrain import program
from flaxpretrain.main import main

if __name__ == "__main__":
    program.run(main)
