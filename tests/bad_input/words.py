"""Mistakes on the command line: words, numbers, the order of the stages, shapes."""

from tests.bad_input.scene import MICRO, PRUNED, TAUGHT, TEACHER, TRAINED, Case, write

COMMAND_LINE = [
    Case("command misspelt", "prun +recipe=tiny", r"unknown command 'prun' \(did you mean 'prune'\?\)", quick=True),
    Case("recipe misspelt", "prune +recipe=tinny", r"unknown recipe 'tinny' \(did you mean 'tiny'\?\)", quick=True),
    Case("recipe without its plus", "prune recipe=tiny", r"\+recipe=tiny", quick=True),
    Case("key misspelt", "prune student.hiden_size=4", r"unknown key .* \(did you mean 'hidden_size'\?\)", quick=True),
    Case("key below a value", "prune seed.x=4", "seed is a value, not a section"),
    Case("word that is no setting", "prune fast", "settings look like key=value"),
    Case("misspelt preset", "prune prune=modelop", r"did you mean 'modelopt'\?", quick=True),
    Case("loss misspelt", "distill distill.loss=forward_lk", "distill.loss.*forward_kl", quick=True),
    Case("W&B mode misspelt", "distill tracking.wandb.mode=of", "tracking.wandb.mode.*offline"),
    Case("tracker misspelt", "distill tracking.trackers=[tensorbord]", "'tensorbord', expected one of .*tensorboard"),
    Case("tracker twice", "distill tracking.trackers=[wandb,wandb]", "names a tracker twice; name each once"),
    Case("repair misspelt", "prune prune.refit=al", "prune.refit.*outputs"),
    Case("activation misspelt", "prune prune.neuron_activation=mid", "prune.neuron_activation=mid.*one of .pre, post"),
    Case("word for a number", "prune student.hidden_size=big", "student.hidden_size", quick=True),
    Case("fraction for a count", "distill train.num_tokens=1.5", "train.num_tokens"),
    Case("word for yes or no", "prune force=perhaps", "force"),
    Case("list for a number", "prune seed=[1,2]", "seed"),
    Case("number for a list", "eval eval.tasks=hellaswag", "eval.tasks"),
    Case("bracket left open", "eval eval.tasks=[hellaswag", "eval.tasks"),
    Case("member without a family", "plan +recipe=micro member=a", "member=a: the recipe has no members"),
    Case(
        "member that is not there", "run +recipe=tiny_family member=big", "no such member; choose one of: small smaller"
    ),
    Case(
        "command without its member", "distill +recipe=tiny_family", "member is not set: distill works on one of small"
    ),
    Case("option that is not Hydra's", "prune --verbos", "verbos"),
]
NUMBERS = [
    Case("no layers", "prune student.num_layers=0", "student.num_layers=0: must be greater than 0", quick=True),
    Case("negative width", "prune student.hidden_size=-8", "student.hidden_size=-8: must be greater than 0"),
    Case("no tokens", "distill train.num_tokens=0", "train.num_tokens=0: must be greater than 0", quick=True),
    Case("negative learning rate", "distill train.lr=-1", "train.lr=-1.0: must be greater than 0"),
    Case("learning rate that is no number", "distill train.lr=nan", "train.lr=nan"),
    Case("final rate above the first", "distill train.lr=1e-4 train.min_lr=1e-3", "train.min_lr=0.001.*lower it"),
    Case("warm-up longer than the run", f"distill {MICRO} train.warmup_steps=99", "train.warmup_steps=99", PRUNED),
    Case("negative warm-up", "distill train.warmup_steps=-1", "train.warmup_steps=-1"),
    Case("batch that does not divide", "distill train.global_batch_size=9", "multiple of train.micro_batch_size"),
    Case("negative gradient limit", "distill train.clip_grad=-1", "train.clip_grad=-1"),
    Case("Adam's beta above one", "distill train.adam_beta2=1.5", "train.adam_beta2=1.5"),
    Case("temperature zero", "distill distill.temperature=0", "distill.temperature=0", quick=True),
    Case("top-k without its loss", "distill distill.top_k=5", "distill.top_k=5: is for distill.loss=top_k_kl"),
    Case(
        "top-k above the vocabulary",
        f"distill {MICRO} distill.loss=top_k_kl distill.top_k=5000",
        "top_k=5000: the vocabulary has 1024 entries",
        PRUNED,
    ),
    Case("layer pair without its half", "distill distill.hidden_layers=['3']", "distill.hidden_layers=3: must be"),
    Case("layer that is not there", f"distill {MICRO} distill.hidden_layers=['9/1']", "distill.hidden_layers", PRUNED),
    Case(
        "mixture outside its range",
        f"distill {MICRO} distill.loss=jsd distill.jsd_beta=2",
        "distill.jsd_beta=2",
        PRUNED,
    ),
    Case("no weight on any loss", f"distill {MICRO} distill.kd_weight=0", "distill.kd_weight", PRUNED),
    Case("no calibration samples", "score calibration.num_samples=0", "calibration.num_samples=0"),
    Case(
        "teacher's share above one",
        "score calibration.self_generated_fraction=2",
        "calibration.self_generated_fraction=2.0: must lie between 0 and 1",
    ),
    Case(
        "teacher's share of given tokens",
        "score calibration.self_generated_fraction=0.5 calibration.tokens_path=a.safetensors",
        "calibration.self_generated_fraction=0.5: must be 0 with calibration.tokens_path",
    ),
    Case(
        "streamed teacher that is to write",
        f"score {MICRO} calibration.self_generated_fraction=0.5 calibration.streamed=true",
        "streamed layer by layer cannot generate text",
        TAUGHT,
    ),
    Case("no checkpoint kept", "distill checkpoint.keep=0", "checkpoint.keep=0"),
    Case("share above one", "distill data.late_fraction=2", "data.late_fraction=2"),
    Case("negative weight of a source", "distill +data.sources={a:{path:x,weight:-1}}", "data.sources.a.weight"),
    Case("budget of no kind", "search search.budget=money", "search.budget=money.*one of .parameters"),
    Case("search without a target", "search +recipe=micro", "search.target"),
    Case("negative shots", "eval eval.num_fewshot=-1", "eval.num_fewshot=-1"),
    Case("utilisation above one", "plan cluster.gemm_efficiency=2", "cluster.gemm_efficiency=2"),
    Case("source of no kind", "fetch teacher.source=ftp", "teacher.source=ftp.*one of .hub, wheel, pretrain"),
]
ORDER = [
    Case(
        "prune without a teacher", "prune", "no teacher in outputs/custom/teacher; give teacher.path=FOLDER", quick=True
    ),
    Case("teacher that is not there", "prune teacher.path=nowhere", "teacher.path=nowhere: no such folder", quick=True),
    Case("teacher that is a file", "prune teacher.path=a", "a: ", (write("a", "x"),)),
    Case("teacher never published", "prune +recipe=4b", "was never published as a Hugging Face folder"),
    Case("distill before fetch", "distill +recipe=smollm2", r"minitron_train fetch \+recipe=smollm2` first"),
    Case("distill before prune", f"distill {MICRO}", "run prune first, or give student.path", TAUGHT),
    Case("student that is not there", f"distill {MICRO} student.path=nowhere", "nowhere", TAUGHT),
    Case("export before distill", f"export {MICRO}", "run distill first"),
    Case("export of a checkpoint that is not there", f"export {MICRO} export.checkpoint=nowhere", "nowhere"),
    Case("export in a type that is none", f"export {MICRO} export.dtype=float8", "export.dtype=float8", TRAINED),
    Case("eval with nothing there", "eval", "nothing to evaluate in outputs/custom", quick=True),
    Case("eval of a folder that is not there", f"eval {MICRO} eval.model=nowhere", "eval.model=nowhere: no folder"),
    Case(
        "eval of a folder that is no model",
        f"eval {MICRO} eval.model=a",
        "config.json: no such file",
        (write("a/x", ""),),
    ),
    Case("report of nothing", "report output_dir=nothing", "nothing"),
    Case("comparison of what was not evaluated", f"eval {MICRO} eval.compare=[a,b]", "eval.compare|a.json"),
    Case("pretrain without a shape", "pretrain", "model.architecture is not set"),
    Case("shape half given", "pretrain +recipe=micro model.hidden_size=null", "model.hidden_size is not set"),
    Case("plan without a shape", "plan", "teacher"),
    Case(
        "4b's corpus not given",
        f"score +recipe=4b output_dir=out teacher.path={TEACHER}",
        "these parts have no path",
        TAUGHT,
    ),
]
SHAPES = [
    Case(
        "target wider than the teacher",
        f"prune {MICRO} student.hidden_size=200",
        "larger than the teacher's 96",
        TAUGHT,
    ),
    Case("more layers than the teacher", f"prune {MICRO} student.num_layers=9", "larger than the teacher's 3", TAUGHT),
    Case(
        "heads that the groups do not divide",
        f"prune {MICRO} student.num_attention_heads=3",
        "multiple of num_query_groups=2",
        TAUGHT,
    ),
    Case(
        "groups that do not divide the heads", f"prune {MICRO} student.num_query_groups=3", "num_query_groups", TAUGHT
    ),
    Case(
        "width that is no multiple",
        f"prune {MICRO} prune.multiple_of=7",
        "must be a multiple of prune.multiple_of=7",
        TAUGHT,
    ),
    Case(
        "layers to drop that are not there",
        f"prune {MICRO} student.num_layers=2 prune.drop_layers=[7]",
        r"prune.drop_layers=\[7\]",
        TAUGHT,
    ),
    Case(
        "TP that does not divide the heads",
        f"prune {MICRO} parallel.tensor_model_parallel_size=3",
        "tensor_model_parallel_size=3: must divide",
        TAUGHT,
    ),
    Case(
        "EP of a dense model",
        f"prune {MICRO} parallel.expert_model_parallel_size=2",
        "expert_model_parallel_size=2: the teacher has no experts; set it to 1",
        TAUGHT,
    ),
    Case(
        "EP on too few processes",
        f"score {MICRO} parallel.expert_model_parallel_size=2",
        "must divide the number of data-parallel ranks, 1",
        TAUGHT,
    ),
    Case(
        "TP on too few processes",
        f"score {MICRO} parallel.tensor_model_parallel_size=2",
        "must divide the number of processes, 1",
        TAUGHT,
    ),
    Case(
        "batch that the memory cannot hold",
        f"distill {MICRO} train.micro_batch_size=8 train.seq_length=100000000",
        "GiB",
        PRUNED,
    ),
]
WORDS = [*COMMAND_LINE, *NUMBERS, *ORDER, *SHAPES]
