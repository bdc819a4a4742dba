"""Convert Hugging Face folders to FOLDER/model.gguf in fp32, without a vocabulary: `python THIS.py CHECKOUT FOLDER…`.

llama.cpp's converter accepts only tokenizers of published models, and tiny models have none. It runs in a process of its own,
because the `gguf` of its checkout is not the package that transformers imports. A failure is in FOLDER/error.txt.
"""

import logging
import sys
from pathlib import Path


def main() -> None:
    """Convert one folder after the other."""
    checkout, *folders = sys.argv[1:]
    sys.path[:0] = [f"{checkout}/gguf-py", checkout]
    import torch

    logging.disable(logging.WARNING)
    for folder in map(Path, folders):
        try:
            with torch.inference_mode():
                convert(folder)
        except Exception as error:
            (folder / "error.txt").write_text(f"{type(error).__name__}: {error}")


def convert(folder: Path) -> None:
    """Write one model, with the class that the converter has for it."""
    import gguf
    from conversion import get_model_class  # pyright: ignore[reportMissingImports]
    from conversion.base import ModelBase  # pyright: ignore[reportMissingImports]

    values = ModelBase.load_hparams(folder, False)
    base = get_model_class(values["architectures"][0])

    class WithoutVocabulary(base):
        model_arch = base.model_arch

        def set_vocab(self) -> None:
            self._set_vocab_none()
            key = gguf.Keys.LLM.VOCAB_SIZE.format(arch=gguf.MODEL_ARCH_NAMES[self.model_arch])
            if key not in self.gguf_writer.kv_data[0]:
                self.gguf_writer.add_vocab_size(values["vocab_size"])

    WithoutVocabulary(folder, gguf.LlamaFileType.ALL_F32, folder / "model.gguf").write()


if __name__ == "__main__":
    main()
