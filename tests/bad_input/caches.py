"""Mistakes with a teacher on disk: caches of another run, damaged files, losses that a cache cannot serve."""

from tests.bad_input.scene import (
    MICRO,
    TAUGHT,
    TEACHER,
    WEIGHTS,
    Case,
    change_tensors,
    cut_off,
    exchange_tokens,
    flip,
    have,
    remove,
    write,
)

CACHE = "out/teacher_cache"
PART = f"{CACHE}/training/000000000000-000000000064.00000-of-00001.safetensors"
CACHED = (have("teacher", "pruned", "teacher_cache"),)
DISTILL = f"distill {MICRO} teacher.cache={CACHE}"
OTHER = "teacher.cache=out/teacher_cache: does not belong to this run"
TRAINING = ("out/train",)  # damage that is found in a step leaves a training that can be resumed

OTHERS = [
    Case("cache of another seed", f"{DISTILL} seed=2", rf"{OTHER} \(.*seed", CACHED),
    Case(
        "cache of another text",
        f"{DISTILL} data.path=a.txt",
        rf"{OTHER} \(input",
        (*CACHED, write("a.txt", "some words and more\n\n" * 3000)),
    ),
    Case(
        "cache of another teacher",
        DISTILL,
        rf"{OTHER} \(input teacher",
        (*CACHED, change_tensors(WEIGHTS, lambda held: {name: 2 * tensor for name, tensor in held.items()})),
    ),
    Case(
        "cache of another tokenizer",
        DISTILL,
        rf"{OTHER} \(input",
        (
            *CACHED,
            exchange_tokens(f"{TEACHER}/tokenizer.json"),
            exchange_tokens("out/pruned/tokenizer.json"),
        ),
    ),
    Case("cache of another length", f"{DISTILL} train.seq_length=32", rf"{OTHER} \(seq_length was 64, is 32", CACHED),
    Case(
        "cache that ends before the training",
        f"{DISTILL} train.num_tokens=8192",
        "has 4,096 tokens, this run reads 8,192",
        CACHED,
    ),
    Case(
        "cache of draws for another loss",
        f"{DISTILL} distill.loss=reverse_kl",
        "distill.loss=reverse_kl: the cache",
        CACHED,
    ),
    Case("cache of another temperature", f"{DISTILL} distill.temperature=2", "distill.temperature=2", CACHED),
    Case("cache for inner layers", f"{DISTILL} distill.hidden_layers=['1/1']", "distill.hidden_layers: needs", CACHED),
]
DAMAGED = [
    Case("cache that is not there", f"{DISTILL}s", "out/teacher_caches: holds no teacher cache; run `teach`", CACHED),
    Case(
        "cache that is unfinished", DISTILL, "is unfinished; run `teach`", (*CACHED, remove(f"{CACHE}/provenance.json"))
    ),
    Case("cache without its format", DISTILL, "cache.json is missing", (*CACHED, remove(f"{CACHE}/cache.json"))),
    Case(
        "cache's format damaged", DISTILL, "cache.json: damaged", (*CACHED, write(f"{CACHE}/cache.json", '{"kind": "s'))
    ),
    Case("cache's file missing", DISTILL, "training: has 0 sequences of 64; restore", (*CACHED, remove(PART))),
    Case("cache's file cut off", DISTILL, r"of-00001.safetensors: damaged", (*CACHED, cut_off(PART)), keeps=TRAINING),
    Case("cache's file changed", DISTILL, r"damaged \(.*another checksum", (*CACHED, flip(PART, -24)), keeps=TRAINING),
    Case(
        "cache's position damaged",
        f"teach {MICRO}",
        "position.json: damaged",
        (*CACHED, remove(f"{CACHE}/provenance.json"), write(f"{CACHE}/position.json", "[]")),
    ),
]
TEACHING = [
    Case("cache of no draws", "teach teach.draws=0", "teach.draws=0: must be greater than 0"),
    Case(
        "draws for a loss that cannot use them", f"teach {MICRO} distill.loss=jsd", "teach.kind=samples: serves", TAUGHT
    ),
    Case(
        "cache of inner layers", f"teach {MICRO} distill.hidden_layers=['1/1']", "distill.hidden_layers: needs", TAUGHT
    ),
    Case("other draws into a finished cache", f"teach {MICRO} teach.draws=4", "teach.draws was 50, is 4", CACHED),
]
CACHES = [*OTHERS, *DAMAGED, *TEACHING]
