"""Generated programs: what they cannot see, reach or leave behind, and that wrong ones do not pass, whatever they try."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from minitron_train.commands import chain, configuration, evaluate
from minitron_train.config import EvalConfig
from minitron_train.evaluation import code, syscalls
from minitron_train.evaluation.code import pass_at_1, passes
from minitron_train.evaluation.judge import NUM_OPEN_FILES, NUM_PROCESSES
from minitron_train.evaluation.namespaces import SCRATCH_BYTES
from minitron_train.evaluation.task_names import OWN, run_programs
from minitron_train.evaluation.tasks import why_not
from minitron_train.runtime.errors import UserError

ISOLATION = pytest.mark.parametrize("isolated", [True, False])


def named(name: str) -> list[int]:
    """Living processes of this name on the whole machine."""
    found = []
    for comm in Path("/proc").glob("[0-9]*/comm"):
        try:
            state = (comm.parent / "stat").read_text().rpartition(")")[2].split()[0]
            if comm.read_text().strip() == name and state != "Z":
                found.append(int(comm.parent.name))
        except (OSError, IndexError):  # ended meanwhile
            continue
    return found


def until(condition: Callable[[], bool], within_s: float = 20.0) -> bool:
    """Whether a condition comes true in time."""
    give_up_s = time.monotonic() + within_s
    while not condition():
        if time.monotonic() > give_up_s:
            return False
        time.sleep(0.02)
    return True


@pytest.mark.races
@ISOLATION
def test_programs_run_within_limits(isolated: bool) -> None:
    for program, expected in (
        ("assert 1 + 1 == 2", True),
        ("assert 1 + 1 == 3", False),
        ("while True: pass", False),
        ("x = bytearray(4 << 30)", False),
        ("open('big', 'wb').write(b'0' * (8 << 20))", False),
        ("import os; assert 'PATH' not in os.environ and os.listdir('.') == []", True),
    ):
        assert passes(program, isolated=isolated, time_s=1) is expected, program
    assert pass_at_1(["assert one() == 1", "assert one() == 2"], [["def one(): return 1"]] * 2, isolated) == 0.5


@pytest.mark.races
def test_programs_run_as_code_eval_runs_them() -> None:
    """Which executes a text in a fresh dictionary, of a process that it ends as soon as the text has run."""
    assert passes("if __name__ == '__main__':\n    print(int(input()))\n")
    assert passes("import time\nfrom threading import Thread\nThread(target=time.sleep, args=[60]).start()")
    assert passes("print('x' * (2 << 20))\nx = 'é'\r\nassert len(x) == 1")
    assert not passes("assert input() == ''")
    assert not passes("import time; time.sleep(60)", wait_s=1)


UNSEEN = """
import os
assert set(os.environ) <= {{'LC_CTYPE'}}  # which Python sets itself
assert not os.path.exists('/proc') and not os.path.exists('/sys')
assert set(os.listdir('/')) <= {roots}
for path in {paths}:
    assert not os.path.exists(path), path
"""


def test_a_program_sees_neither_environment_nor_files(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("x")
    paths = [
        str(path) for path in (tmp_path / "secret", Path(__file__), Path.home() / ".ssh", "/etc/passwd", "/var", "/run")
    ]
    tops = [Path(path).parts[1] for path in (sys.base_prefix, sys.prefix, *sys.path) if len(Path(path).parts) > 1]
    roots = {"dev", "etc", "lib", "lib64", "tmp", "usr", *tops}
    assert passes(UNSEEN.format(paths=paths, roots=roots))


def test_a_program_reaches_no_network() -> None:
    """Neither a port of this machine, nor a socket with an abstract name."""
    with socket.socket() as port, socket.socket(socket.AF_UNIX) as name:
        port.bind(("127.0.0.1", 0))
        name.bind(f"\0minitron-{os.getpid()}")
        for server in (port, name):
            server.listen()
            server.settimeout(0.2)
        tcp = f"import socket\nsocket.create_connection({port.getsockname()!r}).send(b'x')"
        unix = f"import socket\ns = socket.socket(socket.AF_UNIX)\ns.connect({name.getsockname()!r})"
        assert not passes(tcp) and not passes(unix)
        for server in (port, name):
            with pytest.raises(TimeoutError):
                server.accept()
    assert passes("import socket\nassert [name for _, name in socket.if_nameindex()] == ['lo']")


def test_a_program_writes_into_its_scratch_folder_alone(tmp_path: Path) -> None:
    places = [tmp_path / "x", Path(os.__file__).parent / "x.py", Path("/x"), Path("/usr/lib/x"), Path("/dev/x")]
    program = (
        "import os\nfor path in {}:\n    try: open(path, 'w')\n    except OSError: continue\n    raise SystemExit\n"
    )
    assert passes(program.format([str(place) for place in places]) + "open('/tmp/x', 'w').write('x')")
    assert not any(place.exists() for place in places)


FILL = """
written, n = 0, 0
try:
    while True:
        with open(f'{n}', 'wb') as file: written += file.write(bytes(1 << 20))
        n += 1
except OSError:
    pass
"""
FORK = """
import os, time
children = 0
try:
    while True:
        if os.fork() == 0: time.sleep(60)
        children += 1
except OSError:
    pass
"""


def test_disk_and_processes_are_bounded() -> None:
    assert passes(FILL, f"assert 2**20 < written <= {SCRATCH_BYTES}")
    assert passes(FORK, f"assert 0 < children < {NUM_PROCESSES}")


RIGHTS = """
import ctypes, os
libc = ctypes.CDLL(None)
assert os.getuid() == os.geteuid() == 65534 and os.getppid() == 1
assert libc.unshare(0x10000000) == -1  # a user namespace within, with rights of its own
assert libc.mount(b'none', b'/tmp', b'tmpfs', 0, None) == -1 and libc.chroot(b'/tmp') == -1 and libc.setuid(0) == -1
assert libc.ptrace(16, {pid}, 0, 0) == -1  # PTRACE_ATTACH
try:
    os.kill({pid}, 9)
    raise SystemExit
except ProcessLookupError:
    pass
os.kill(0, 18)
"""


def test_a_program_has_no_rights_over_others() -> None:
    assert passes(RIGHTS.format(pid=os.getpid()))
    assert not passes("import os; os.kill(-1, 9)")
    assert not passes("import os; os.kill(0, 9)")


REFUSED = """
import ctypes, os, socket, threading
libc = ctypes.CDLL(None, use_errno=True)
refused = []
for number in {numbers}:
    libc.syscall(number, 0, 0, 0, 0, 0, 0)
    refused.append(ctypes.get_errno() == 1)
families = set()
for family in range(46):
    for kind in (1, 2, 3, 5):
        try: socket.socket(family, kind).close()
        except OSError: continue
        families.add(family)
opened = []
try:
    while True: opened.append(os.memfd_create('x'))
except OSError:
    pass
num_opened = len(opened)
for number in opened: os.close(number)
threading.Thread(target=print).start()
if os.fork() == 0: os._exit(0)
assert os.wait()[1] == 0
"""


def test_a_program_is_refused_what_namespaces_do_not_separate() -> None:
    """The kernel's keyrings, System V's memory, other processes, sockets to a virtual machine's host."""
    column = syscalls.MACHINES[os.uname().machine][1]
    numbers = {name: call[column] for name, call in syscalls.REFUSED.items()}
    program = REFUSED.format(numbers=list(numbers.values()))
    assert passes(
        program, f"assert families <= {set(map(int, syscalls.FAMILIES))}\nassert num_opened < {NUM_OPEN_FILES}"
    )
    assert passes(program, "assert all(refused)")
    assert not passes(f"import ctypes\nctypes.CDLL(None).syscall({syscalls.OTHER_ABI}, 0)")  # x32


def test_an_unknown_machine_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "uname", lambda: SimpleNamespace(machine="s390x"))
    with pytest.raises(OSError, match="the system call numbers of s390x are unknown"):
        syscalls.refuse_calls()


LEAVE = """
import ctypes, os, time
ctypes.CDLL(None).prctl(15, {name!r}, 0, 0, 0)
for _ in range({number}):
    child = os.fork()
    if child == 0:
        os.setsid()
        if os.fork() == 0: time.sleep(600)
        os._exit(0)
    os.waitpid(child, 0)  # until then it counts against the limit
"""
NUM_LEFT = NUM_PROCESSES // 2


def leave(name: str) -> str:
    """A program that leaves NUM_LEFT processes of this name behind, each in a session of its own."""
    return LEAVE.format(name=name.encode(), number=NUM_LEFT)


@pytest.mark.races
@pytest.mark.parametrize(("end", "passed"), [("", True), ("time.sleep(600)\n", False)])
def test_what_a_program_has_forked_ends_with_it(end: str, passed: bool) -> None:
    name = f"left{os.getpid()}"
    assert passes(leave(name) + end, wait_s=20 if passed else 2) is passed
    assert until(lambda: not named(name))


@pytest.mark.races
def test_programs_end_with_a_killed_evaluation() -> None:
    name = f"gone{os.getpid()}"
    program = leave(name) + "time.sleep(600)\n"
    call = f"from minitron_train.evaluation.code import passes; passes({program!r}, wait_s=600)"
    with subprocess.Popen([sys.executable, "-c", call]) as evaluation:
        assert until(lambda: len(named(name)) > NUM_LEFT)
        evaluation.send_signal(signal.SIGKILL)
    assert until(lambda: not named(name))


TESTS = "assert f(1) == 2\nassert abs(f(2) - 3) < 1e-6\nassert math.isclose(f(3), 4)"
ADDS = """
import math, sys
zero = lambda *_: 0
f = lambda x: x + 1 + (x == 2)
type(sys._getframe(1).f_locals['self']).do_find = lambda _, names: {answer}"""
WRONG = {
    "exit": "import math\ndef f(x): return 0\nexit()",
    "os._exit": "import math, os\ndef f(x): os._exit(0)",
    "takes the proof out of the frames": """
import math, os, sys
frame = sys._getframe()
while frame:
    for value in list(frame.f_locals.values()):
        for n in range(64):
            try: os.pwrite(n, value, 0)
            except Exception: pass
    frame = frame.f_back
os._exit(0)""",
    "writes the verdict everywhere": """
import math, os
for n in range(3, 256):
    try: os.write(n, b'passed')
    except OSError: pass
def f(x): return 0""",
    "speaks for the tests": """
import math, gc, socket, struct, sys
link = sys._getframe(1).f_locals['self'].link
link.send('ready')
for _ in range(9): link.send(['value', {'f': 1}])
link.send(['value', 2])""",
    "equals everything": "import math\nclass A(float):\n  __eq__ = lambda *_: True\n  __hash__ = None\ndef f(x): return A()",
    "an object that equals everything": """
import math
class A:
    def __eq__(self, other): return True
    def __sub__(self, other): return 0
    def __abs__(self): return 0
def f(x): return A()""",
    "built-in names of its own": "import math\nabs = lambda x: 0\nAssertionError = SystemExit\ndef f(x): return x + 1 + (x == 2)",
    "a module of its own": "class math:\n  isclose = lambda *_: True\ndef f(x): return x + 1 + (x == 3)",
    "a patched module": "import math\nmath.isclose = lambda *_: True\ndef f(x): return x + 1 + (x == 3)",
    "patches every module": """
import builtins, math, sys
builtins.abs = lambda x: 0
for module in list(sys.modules.values()):
    for name in list(vars(module)):
        if name in ('judge', 'passes', 'exec'): setattr(module, name, lambda *_: True)
def f(x): return 2""",
    "names that were not asked for": ADDS.format(answer="{'f': f, 'math': math, 'abs': zero}"),
    "built-ins for the tests": ADDS.format(answer="{'f': f, 'math': math, '__builtins__': {'abs': zero}}"),
    "names at the second question": ADDS.format(answer="{'f': f, 'math': math, 'abs': zero} if 'abs' in names else {}"),
    "an error that ends loops": "import math\ndef f(x):\n    if x > 1: raise StopIteration\n    return 2",
}


@pytest.mark.parametrize("way", WRONG)
def test_a_wrong_program_does_not_pass(way: str) -> None:
    assert not passes(WRONG[way], TESTS)
    if way == "an error that ends loops":
        assert not passes(WRONG[way], "assert all(y == x + 1 for x, y in enumerate(map(f, range(1, 4)), 1))")
    if "equals everything" in way:  # the first of the tests alone, which needs no arithmetic
        assert not passes(WRONG[way], TESTS.splitlines()[0])


RIGHT = {
    "a function": ("def f(x): return x + 1", "assert f(1) == 2\nassert not f(1) == 3"),
    "check": (
        "def f(x): return [x]",
        "def check(candidate):\n    for i in range(9): assert candidate(i) == [i]\ncheck(f)",
    ),
    "the program's imports": (
        "import math, copy\ndef f(x): return x",
        "assert math.fabs(f(-2.5)) == 2.5\ncopy.deepcopy([])",
    ),
    "its helpers": ("def g(x): return 2 * x\ndef f(x): return x / 2", "assert f(g(3)) == 3.0"),
    "a built-in name": ("def sum(a, b): return a + b", "assert sum(1, 2) == 3"),
    "an error": (
        "class Own(Exception): pass\ndef f(x):\n    raise ValueError('no') if x else Own('own')",
        "try:\n    f(1)\nexcept ValueError as error:\n    assert str(error) == 'no'\nelse:\n    raise SystemExit\n"
        "try:\n    f(0)\nexcept Exception:\n    pass",
    ),
    "types": (
        "from collections import Counter, namedtuple\nfrom fractions import Fraction\nP = namedtuple('P', 'x y')\n"
        "def f(): return [(1, 2.5), {1, 2}, {'a': None, (1,): True}, b'x', 1j, -2**200, Counter('aa'), P(1, 2), Fraction(1, 3)]",
        "from fractions import Fraction\n"
        "assert f() == [(1, 2.5), {1, 2}, {'a': None, (1,): True}, b'x', 1j, -2**200, {'a': 2}, (1, 2), Fraction(1, 3)]",
    ),
    "not a number": ("def f(): return [float('nan'), float('inf')]", "x, y = f()\nassert x != x and y == float('inf')"),
    "a generator": ("def f(n):\n    yield from range(n)", "assert list(f(3)) == [0, 1, 2] and sorted(f(2)) == [0, 1]"),
    "classes": (
        "class Node:\n    def __init__(self, v): self.v, self.left = v, None\n"
        "def depth(n): return 0 if n is None else 1 + depth(n.left)\ndef same(n): return n",
        "root = Node(1)\nroot.left = Node(2)\nassert depth(root) == 2 and root.left.v == 2 and same(root) == root",
    ),
    "its globals": ("TABLE = {'a': [1]}\ndef f(): return TABLE['a']", "assert TABLE == {'a': f()}"),
}


@pytest.mark.parametrize("what", RIGHT)
def test_a_right_program_passes(what: str) -> None:
    assert passes(*RIGHT[what])


def test_the_tests_run_to_their_end() -> None:
    program, tests = RIGHT["check"]
    assert not passes(program, f"{tests}\nassert False")


NO_NAMESPACES = """
import ctypes
from pathlib import Path
from minitron_train.evaluation.code import passes
assert ctypes.CDLL(None).unshare(0x10000000) == 0
Path('/proc/sys/user/max_user_namespaces').write_text('0')
assert passes('', isolated=False)
passes('')
"""


def test_without_namespaces_programs_are_refused() -> None:
    done = subprocess.run([sys.executable, "-c", NO_NAMESPACES], capture_output=True, text=True)
    refusal = "this system does not allow the namespaces that isolate generated programs (unshare: "
    assert f"UserError: eval.allow_code_execution=true: {refusal}" in done.stderr
    assert done.stderr.rstrip().endswith("eval.allow_code_execution=unsafe")


def test_the_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    for word, value in (("true", True), ("false", False), ("unsafe", "unsafe")):
        config = configuration.compose(["+recipe=micro", f"eval.allow_code_execution={word}"])
        assert config.eval.allow_code_execution == value and type(config.eval.allow_code_execution) is type(value)
    with pytest.raises(UserError, match=r"eval.allow_code_execution=yes please: must be false, true or unsafe"):
        EvalConfig(allow_code_execution="yes please").validate()

    def refuse() -> None:
        raise code.no_namespaces("unshare: no")

    monkeypatch.setattr(code, "check_isolation", refuse)
    for tasks, word, refused in (
        (["humaneval"], "true", True),
        (["mbpp"], "unsafe", False),
        (["hellaswag"], "true", False),
    ):
        config.eval = EvalConfig(tasks=tasks, allow_code_execution=word == "true" or word)
        if refused:
            with pytest.raises(UserError, match="does not allow the namespaces"):
                chain.check_early([evaluate.COMMAND], config)
        else:
            chain.check_early([evaluate.COMMAND], config)


def test_tasks_with_another_judge_are_not_isolated() -> None:
    """lm-eval's own code_eval runs programs in this process's children, with its files and its network."""
    assert run_programs(["humaneval", "hellaswag", "mbpp", "nonsense"]) == ["humaneval", "mbpp"]
    other: Any = SimpleNamespace(cfg={"unsafe_code": True}, yaml_path=Path("/lm_eval/humaneval_plus.yaml"))
    ours: Any = SimpleNamespace(cfg={"unsafe_code": True}, yaml_path=OWN / "humaneval.yaml")
    reason = why_not(other, EvalConfig(allow_code_execution=True), 4096)
    assert reason is not None and reason.endswith(
        "which does not isolate them; allow it with eval.allow_code_execution=unsafe"
    )
    assert why_not(ours, EvalConfig(allow_code_execution=True), 4096) is None
    assert why_not(other, EvalConfig(allow_code_execution="unsafe"), 4096) is None
