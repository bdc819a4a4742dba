"""The output folder of a run: which stage writes where. Whoever reads a run asks here."""

TEACHER = "teacher"  # fetch or pretrain
EVAL_DATA = "eval_data"  # fetch
INITIAL = "pretrain/init"  # pretrain: the tokenizer and random weights
PRETRAINING = "pretrain/train"  # pretrain: checkpoints and metrics.jsonl
SCORES = "scores"
PRUNED = "pruned"
TEACHER_CACHE = "teacher_cache"  # teach
TRAINING = "train"  # distill: checkpoints and metrics.jsonl
STUDENT = "student"  # export
EVALUATION = "eval"
SPEED = "speed"
SPEED_FILE = "speed.json"  # in SPEED
SEARCH = "search"  # one output folder for each candidate
LATENCY_FILE = "latency.json"  # in SEARCH

STAGE_FOLDERS = (
    TEACHER,
    EVAL_DATA,
    "pretrain",
    SCORES,
    PRUNED,
    TEACHER_CACHE,
    TRAINING,
    EVALUATION,
    SPEED,
    SEARCH,
)  # export.path avoids these
MODELS = {TEACHER: "teacher", PRUNED: "student", STUDENT: "export"}  # folder -> the section whose `path` replaces it
TRAININGS = {"train": TRAINING, "pretrain": PRETRAINING}  # label in the report -> folder
