"""Convert an exported folder to GGUF, and compare llama.cpp with transformers: token ids, logits, greedy continuations.

    python benchmarks/serving/llama_cpp_equality.py outputs/smollm2/student --llama-cpp ~/llama.cpp

It needs the package llama-cpp-python, and a checkout of llama.cpp whose convert_hf_to_gguf.py can run in this Python. Weights,
keys and values are fp32 in both programs, and both use one thread. The exit code is 1 if any id differs.
"""

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

CONVERTER = "convert_hf_to_gguf.py"
CONTEXT = 256
PROMPTS = (
    "The capital of France is",
    "def fibonacci(n):\n    ",
    "Once upon a time, there was a",
    "1234567 + 7654321 =",
    "Crème brûlée — naïve café\n\n\t",
)


class InLlamaCpp:
    """A GGUF file in llama.cpp."""

    def __init__(self, file: Path) -> None:
        """Open it. llama.cpp's default for keys and values is fp16, which changes logits by up to 0.4.

        Raises:
            ValueError: llama.cpp rejects the file.
        """
        import llama_cpp  # pyright: ignore[reportMissingImports]

        fp32 = llama_cpp.GGML_TYPE_F32
        precise = {"type_k": fp32, "type_v": fp32, "flash_attn": False, "logits_all": True}
        alone = {"n_threads": 1, "n_threads_batch": 1, "verbose": False}
        self.version = llama_cpp.__version__
        self.model = llama_cpp.Llama(str(file), n_ctx=CONTEXT, **precise, **alone)

    def tokens(self, text: str) -> list[int]:
        """The ids of a text, without a token at its start."""
        return self.model.tokenize(text.encode(), add_bos=False, special=True)

    def logits(self, tokens: Sequence[int]) -> np.ndarray:
        """The logits [S, V] of a sequence."""
        self.model.reset()
        self.model.eval(tokens)
        return self.model.scores[: len(tokens)].copy()

    def greedy(self, tokens: Sequence[int], new_tokens: int) -> list[int]:
        """The most likely continuation, token by token with cached keys and values."""
        self.model.reset()
        self.model.eval(tokens)
        found: list[int] = []
        for _ in range(new_tokens):
            found.append(int(self.model.scores[self.model.n_tokens - 1].argmax()))
            self.model.eval(found[-1:])
        return found

    def close(self) -> None:
        """Free the model before Python ends; its own finaliser would fail there."""
        self.model.close()


class InTransformers:
    """A Hugging Face folder in transformers."""

    def __init__(self, folder: Path) -> None:
        torch.set_num_threads(1)
        self.folder = folder
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def tokens(self, text: str) -> list[int]:
        """The ids of a text, without a token at its start."""
        return AutoTokenizer.from_pretrained(self.folder).encode(text, add_special_tokens=False)

    def logits(self, tokens: Sequence[int]) -> np.ndarray:
        """The logits [S, V] of a sequence."""
        with torch.inference_mode():
            return self.model(torch.tensor([list(tokens)])).logits[0].numpy()

    def greedy(self, tokens: Sequence[int], new_tokens: int) -> list[int]:
        """The most likely continuation, token by token with cached keys and values."""
        found: list[int] = []
        following, cache = list(tokens), None
        with torch.inference_mode():
            for _ in range(new_tokens):
                output = self.model(torch.tensor([following]), past_key_values=cache, use_cache=True)
                following, cache = [int(output.logits[0, -1].argmax())], output.past_key_values
                found += following
        return found


@dataclass(frozen=True, slots=True)
class Compared:
    """One prompt in both programs."""

    same_ids: bool  # of the prompt's text
    difference: float  # largest of all logits of the prompt
    largest: float  # largest absolute logit in transformers
    same_greedy: int  # new tokens that are equal, from the first on

    def is_equal(self, new_tokens: int) -> bool:
        """Whether all ids are equal."""
        return self.same_ids and self.same_greedy == new_tokens


def convert(folder: Path, checkout: Path, file: Path) -> None:
    """Write a folder as GGUF in fp32, with the converter of a llama.cpp checkout.

    Raises:
        SystemExit: the converter fails; its last line is printed.
    """
    command = [sys.executable, str(checkout / CONVERTER), str(folder), "--outfile", str(file), "--outtype", "f32"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{CONVERTER}: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")


def compare(theirs: InLlamaCpp, ours: InTransformers, prompt: str, new_tokens: int) -> Compared:
    """Compare ids, logits and greedy continuations of one prompt."""
    tokens = ours.tokens(prompt)
    wanted = ours.logits(tokens)
    pairs = zip(ours.greedy(tokens, new_tokens), theirs.greedy(tokens, new_tokens), strict=True)
    unequal = [number for number, (own, other) in enumerate(pairs) if own != other]
    return Compared(
        same_ids=theirs.tokens(prompt) == tokens,
        difference=float(np.abs(theirs.logits(tokens) - wanted).max()),
        largest=float(np.abs(wanted).max()),
        same_greedy=unequal[0] if unequal else new_tokens,
    )


def main() -> int:
    """Print a line for each prompt; 1 if an id differs."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("folder", type=Path, help="Hugging Face folder, such as OUTPUT_DIR/student")
    parser.add_argument("--llama-cpp", type=Path, required=True, help=f"checkout of llama.cpp, with {CONVERTER}")
    parser.add_argument("--new-tokens", type=int, default=32, help="greedy tokens of each prompt")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch, "model.gguf")
        convert(chosen.folder, chosen.llama_cpp, file)
        theirs, ours = InLlamaCpp(file), InTransformers(chosen.folder)
        print(f"llama-cpp-python {theirs.version}, torch {torch.__version__}, {chosen.new_tokens} new tokens")
        print("prompt's ids  logit difference  largest logit  equal greedy tokens  prompt")
        found = []
        for prompt in PROMPTS:
            found.append(compare(theirs, ours, prompt, chosen.new_tokens))
            ids, row = "equal" if found[-1].same_ids else "DIFFER", found[-1]
            print(
                f"{ids:12}  {row.difference:16.1e}  {row.largest:13.1f}  {row.same_greedy:19}  {prompt!r}", flush=True
            )
        theirs.close()
    return 0 if all(row.is_equal(chosen.new_tokens) for row in found) else 1


if __name__ == "__main__":
    sys.exit(main())
