"""Trains or resumes a run: `python run_pretraining.py configs/quickstart.py`."""

from flaxpretrain import program, supervisor

if __name__ == "__main__":
    supervisor.take_over()
    program.use_huge_pages()
    from flaxpretrain.main import main

    program.run(main)
