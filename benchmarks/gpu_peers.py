"""GPT-2 and T5 of Transformers under torch.compile on one GPU: the peers of benchmarks/gpu.py.

Started by it. Compiles, prints `ready`, waits for a line on stdin, then times: forward pass,
backward pass and a fused AdamW, weights in float32, computing in bfloat16 (torch.autocast), the
library's scaled-dot-product attention, no dropout, on a batch that lies on the device. A JSON
line a model.
"""

import json
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from flaxpretrain.config import load

RECIPES = ROOT / "configs"
ROWS = {"gpt2": 32, "t5": 64}


def gpt2(torch, transformers):
    """The model and a batch."""
    config = transformers.GPT2Config(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    ids = torch.randint(0, 50257, (ROWS["gpt2"], 1024), device="cuda")
    return transformers.GPT2LMHeadModel(config), {"input_ids": ids, "labels": ids}, ids.numel()


def t5(torch, transformers):
    """The model and a batch of 512 inputs and 114 targets a row."""
    config = transformers.T5Config(**load(RECIPES / "t5_v1_1_base.py").model.to_hf())
    ids = torch.randint(0, 32000, (ROWS["t5"], 512), device="cuda")
    labels = torch.randint(0, 32000, (ROWS["t5"], 114), device="cuda")
    model = transformers.T5ForConditionalGeneration(config)
    return model, {"input_ids": ids, "labels": labels}, ids.numel() + labels.numel()


def prepared(name, torch, transformers):
    """A function that trains one step, compiled and warm, and the tokens of a step."""
    torch.manual_seed(0)
    model, batch, tokens = {"gpt2": gpt2, "t5": t5}[name](torch, transformers)
    model = model.cuda().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    compiled = torch.compile(model)

    def step():
        with torch.autocast("cuda", torch.bfloat16):
            loss = compiled(**batch, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    started = time.monotonic()
    for _ in range(3):
        step()
    torch.cuda.synchronize()
    return step, tokens, time.monotonic() - started


def main(names):
    """Compiles all, then times all."""
    import torch
    import transformers

    torch.set_float32_matmul_precision("high")
    transformers.logging.set_verbosity_error()
    ready = []
    for name in names:
        try:
            ready.append((name, *prepared(name, torch, transformers)))
            print(f"peer {name}: ready in {ready[-1][-1]:.0f} s", flush=True)
        except Exception as error:
            print(f"peer {name}: {type(error).__name__}: {str(error)[:300]}", flush=True)
    print("ready", flush=True)
    sys.stdin.readline()
    for name, step, tokens, compile_seconds in ready:
        seconds = []
        for _ in range(5):
            started = time.perf_counter()
            for _ in range(5):
                step()
            torch.cuda.synchronize()
            seconds.append((time.perf_counter() - started) / 5)
        middle = statistics.median(seconds)
        figures = {
            "peer": name,
            "step_seconds": middle,
            "rows_per_second": ROWS[name] / middle,
            "tokens_per_second": tokens / middle,
            "compile_seconds": compile_seconds,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        }
        print(json.dumps(figures), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
