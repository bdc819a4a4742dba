"""Mistakes in paths, recipes and environment variables."""

from tests.bad_input.scene import MICRO, TAUGHT, Case, folder, loop, write

DEEP = "a: " + "[" * 5000 + "]" * 5000
PATHS_TYPED = [
    Case("path whose link leads to itself", "prune teacher.path=loop", "its links form a circle", (loop("loop"),)),
    Case("name of 300 letters", f"prune teacher.path={'x' * 300}", "the name is too long for the file system"),
    Case("path with blanks and brackets", "prune", "no such folder", quick=True, words=("teacher.path=/a b (1)/x=y",)),
    Case("path with quotes and dollars", "prune", "no such folder", words=('teacher.path=it\'s "$HOME" & {x}',)),
    Case("path with a line feed", "prune", "no such folder", words=("teacher.path=a\nerror: b",)),
    Case(
        "path that is not UTF-8",
        "prune",
        "is not UTF-8; rename the file",
        quick=True,
        words=("teacher.path=/a/\udcff",),
    ),
    Case("path with a name that is not set", "prune", "nothing", words=("teacher.path=/${nothing}",)),
    Case("home of a user that is not there", "prune teacher.path=~nobody-here/x", "no such folder|nobody-here"),
    Case(
        "model beside its folder",
        "prune teacher.path=d",
        "d: holds no config.json; give the folder",
        (write("d/x/config.json", "{}"),),
    ),
]
RECIPES = [
    Case(
        "recipe that is no YAML",
        "prune +recipe=own",
        "own.yaml: damaged.*correct the file",
        (write("recipes/own.yaml", "a: [b"),),
        quick=True,
    ),
    Case("recipe that is a number", "prune +recipe=own", "own.yaml: damaged", (write("recipes/own.yaml", "7"),)),
    Case("recipe that is a list", "prune +recipe=own", "own.yaml: damaged", (write("recipes/own.yaml", "[a, b]"),)),
    Case(
        "recipe that is not UTF-8", "prune +recipe=own", "own.yaml: damaged", (write("recipes/own.yaml", b"a: \xff"),)
    ),
    Case("recipe nested too deeply", "prune +recipe=own", "own.yaml: damaged", (write("recipes/own.yaml", DEEP),)),
    Case("recipe that is a folder", "prune +recipe=own", "own.yaml", (folder("recipes/own.yaml"),)),
    Case(
        "recipe with an unknown key",
        "prune +recipe=own",
        "hiden_size",
        (write("recipes/own.yaml", "student: {hiden_size: 4}"),),
    ),
]
RANK = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
SLURM = {"SLURM_PROCID": "0", "SLURM_NTASKS": "1", "SLURM_LOCALID": "0", "SLURM_STEP_ID": "0", "SLURM_JOB_ID": "1"}
ENVIRONMENTS = [
    Case(
        "port that is no number",
        f"score {MICRO}",
        "MASTER_PORT=x: must be a whole number|MASTER_PORT",
        TAUGHT,
        environ={**RANK, "MASTER_PORT": "x"},
    ),
    Case("world that is no number", "score +recipe=micro", "WORLD_SIZE", environ={"RANK": "0", "WORLD_SIZE": "many"}),
    Case(
        "tasks that are no number",
        "score +recipe=micro",
        "SLURM_STEP_NUM_TASKS.*whole number",
        environ={**SLURM, "SLURM_STEP_NUM_TASKS": "x"},
    ),
    Case(
        "timeout of a hub that is no number",
        "fetch +recipe=4b_from_8b output_dir=out",
        "HF_HUB_ETAG_TIMEOUT.*whole number",
        environ={"HF_HUB_ETAG_TIMEOUT": "soon"},
    ),
    Case(
        "threads that are no number",
        f"score {MICRO}",
        "OMP_NUM_THREADS.*whole number",
        TAUGHT,
        environ={"OMP_NUM_THREADS": "x"},
    ),
    Case(
        "address of a hub that is none",
        "fetch +recipe=4b_from_8b output_dir=out",
        "HF_ENDPOINT",
        environ={"HF_ENDPOINT": "http://["},
    ),
    Case(
        "password in a hub's address",
        "fetch +recipe=4b_from_8b output_dir=out",
        r"http://\*\*\*@127.0.0.1:9",
        environ={"HF_ENDPOINT": "http://me:PASSWORD@127.0.0.1:9"},
    ),
]
PATHS = [*PATHS_TYPED, *RECIPES, *ENVIRONMENTS]
