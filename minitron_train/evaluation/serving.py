"""Whether inference servers (vLLM, TensorRT-LLM, and llama.cpp after its conversion) can load an exported folder."""

from pathlib import Path

from minitron_train.hf import HFFolder, read_json

DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
PARALLEL_SIZES = (1, 2, 4, 8)
NOT_CONVERTED = ("ministral", "cwm", "helium")  # llama.cpp's converter does not know their classes
SQUARE_ATTENTION = ("nemotron", "qwen2", "qwen2_moe", "phi3", "glm", "granite", "olmo2", "olmo3")
WITH_WINDOWS = ("gemma2", "gemma3_text", "olmo3")  # families whose attention windows llama.cpp applies
NOPE_INTERVAL = 4  # llama.cpp's constant for smollm3


def serving_problems(folder: Path, tensor_parallel_size: int = 1) -> list[str]:
    """Return one sentence per violated rule of the Hugging Face layout; an empty list if the folder can be served.

    The rules: head_dim is explicit unless it is hidden_size / heads. Query heads, KV heads, MLP and vocabulary are
    divisible by the tensor-parallel size. All tensors exist under their names, without others, in the config's dtype.

    Raises:
        UserError: the folder cannot be opened as a checkpoint.
    """
    checkpoint = HFFolder(folder)
    config, shape = checkpoint.config, checkpoint.shape
    problems = []
    says_head_dim = "head_dim" in config or "head_dim" in (config.get("text_config") or {})
    if not says_head_dim and shape.kv_channels * shape.num_attention_heads != shape.hidden_size:
        problems.append("config.json has no head_dim, and hidden_size / num_attention_heads gives a wrong value")
    for key in ("num_attention_heads", "num_query_groups", "ffn_hidden_size", "dense_ffn_hidden_size", "vocab_size"):
        if getattr(shape, key) % tensor_parallel_size:
            problems.append(
                f"{key}={getattr(shape, key)} is not divisible by the tensor-parallel size {tensor_parallel_size}"
            )
    if checkpoint.unexpected:
        problems.append(
            f"{len(checkpoint.unexpected)} tensors are unknown to loaders, such as {checkpoint.unexpected[0]}"
        )
    found = sorted({DTYPES.get(dtype, dtype) for dtype in checkpoint.dtypes.values()})
    wanted = config.get("dtype") or config.get("torch_dtype")
    if len(found) > 1:
        problems.append(f"the tensors have several dtypes: {', '.join(found)}")
    elif wanted is not None and [wanted] != found:
        problems.append(f"config.json has dtype {wanted}, but the tensors are {found[0]}")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if not (folder / name).exists():
            problems.append(f"{name} is missing")
    if (folder / "tokenizer_config.json").exists():
        read_json(folder / "tokenizer_config.json")
    return problems


def llama_cpp_problems(folder: Path) -> list[str]:
    """Return one sentence per known reason why llama.cpp rejects the folder, or computes other logits.

    The rules hold for the llama.cpp of llama-cpp-python 0.3.36 (tests/parity/test_llama_cpp.py).

    Raises:
        UserError: the folder cannot be opened as a checkpoint.
    """
    shape = HFFolder(folder).shape
    family, width = shape.architecture, shape.num_attention_heads * shape.kv_channels
    if family in NOT_CONVERTED:
        return [f"llama.cpp's converter does not support {family}"]
    problems = []
    if family in SQUARE_ATTENTION and width != shape.hidden_size:
        problems.append(
            f"llama.cpp requires of {family} that num_attention_heads x head_dim ({width}) equals hidden_size, "
            f"which is {shape.hidden_size}"
        )
    shortest = min((window for window in shape.windows if window is not None), default=shape.max_position_embeddings)
    if family not in WITH_WINDOWS and shortest < shape.max_position_embeddings:
        problems.append(f"llama.cpp ignores the attention windows of {family}: logits differ after {shortest} tokens")
    if family == "smollm3":
        unrotated = [kind.rope is None for kind in shape.layer_kinds]
        if unrotated != [(i + 1) % NOPE_INTERVAL == 0 for i in range(shape.num_layers)]:
            problems.append(
                "llama.cpp omits the rotary embedding in every fourth layer of smollm3, this model in others"
            )
    if family == "gemma2" and shape.query_scalar not in (None, shape.kv_channels):
        problems.append("llama.cpp scales the queries of gemma2 by head_dim, this model by query_pre_attn_scalar")
    return problems


def servable_sizes(folder: Path) -> tuple[list[int], list[str]]:
    """Return the tensor-parallel sizes among 1, 2, 4, 8 that satisfy all rules, and the problems at size 1."""
    return [size for size in PARALLEL_SIZES if not serving_problems(folder, size)], serving_problems(folder)
