"""Generates, checks and lints the protobuf code: `generate`, `check`, `lint` or `breaking`.

`breaking` compares with protos/baseline.binpb, a compiled image of what clients and step logs rely
on, so that it works in any clone. `baseline` writes that image: for a release, and only then.

Generated code refuses runtimes older than the tools that wrote it, so it is written with the
oldest we support, in a small venv of its own (.venv-protos). Run from anywhere.
"""

from __future__ import annotations

import filecmp
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TOOLS = "grpcio-tools==1.78.0"  # protobuf 6.31.1
TOOLS_VENV = ROOT / ".venv-protos"
TOOL_LIMIT_S = 600
BASELINE = Path("protos") / "baseline.binpb"
GENERATED = ("*_pb2.py", "*_pb2.pyi", "*_pb2_grpc.py")


def main(arguments: list[str]) -> int:
    """Returns the exit status: 1 for drift or lint findings, 2 for a wrong argument."""
    match arguments:
        case ["generate"]:
            return generate_in_place()
        case ["check"]:
            return check()
        case ["lint"]:
            return lint()
        case ["breaking"]:
            return breaking(ROOT)
        case ["baseline"]:
            return buf(ROOT, "build", "--exclude-source-info", "--output", str(BASELINE))
    print("usage: protos.py generate|check|lint|breaking|baseline", file=sys.stderr)
    return 2


def generate_in_place() -> int:
    """Write the generated files beside their .proto files and remove those without one."""
    with tempfile.TemporaryDirectory() as folder:
        generate(Path(folder))
        for path in generated_files(ROOT):
            (ROOT / path).unlink()
        for path in generated_files(Path(folder)):
            shutil.copyfile(Path(folder) / path, ROOT / path)
            print(path)
    return 0


def check() -> int:
    """Compare the committed files with freshly generated ones, both ways."""
    with tempfile.TemporaryDirectory() as folder:
        fresh = Path(folder)
        generate(fresh)
        names = generated_files(fresh) | generated_files(ROOT)
        drifted = [name for name in sorted(names) if not same(fresh / name, ROOT / name)]
    for name in drifted:
        print(f"{name} is not what its .proto file gives: run `make protos`", file=sys.stderr)
    return 1 if drifted else 0


def lint() -> int:
    """buf's standard rules, as buf.yaml has them."""
    return buf(ROOT, "lint")


def breaking(root: Path) -> int:
    """What clients of the baseline could not read any more, as buf.yaml has the rules."""
    return buf(root, "breaking", "--against", str(BASELINE))


def buf(root: Path, *words: str) -> int:
    """Run buf in a checkout; returns its exit status."""
    command = [str(Path(sysconfig.get_path("scripts")) / "buf"), *words]
    return subprocess.run(command, cwd=root, timeout=TOOL_LIMIT_S).returncode


def generate(target: Path) -> None:
    """Write all generated files below `target`, at the paths they have in the repository."""
    protos = sorted(path.relative_to(ROOT) for path in (ROOT / "protos").rglob("*.proto"))
    services = [path for path in protos if has_service(ROOT / path)]
    python = tools_python()
    compiler = [str(python), "-m", "grpc_tools.protoc", "-I", "."]
    messages = [f"--python_out={target}", f"--pyi_out={target}"]
    run([*compiler, *messages, *map(str, protos)])
    run([*compiler, f"--grpc_python_out={target}", *map(str, services)])


def tools_python() -> Path:
    """Python of the venv with the compiler, made on first use."""
    python = TOOLS_VENV / "bin" / "python"
    stamp = TOOLS_VENV / "tools"
    if not (stamp.is_file() and stamp.read_text() == TOOLS):
        run([sys.executable, "-m", "venv", "--clear", str(TOOLS_VENV)])
        # setuptools below 81 has the pkg_resources that these tools import.
        run([str(python), "-m", "pip", "install", "--quiet", TOOLS, "setuptools<81"])
        stamp.write_text(TOOLS)
    return python


def run(command: list[str]) -> None:
    """Run a tool in the repository; raises CalledProcessError or TimeoutExpired."""
    subprocess.run(command, cwd=ROOT, check=True, timeout=TOOL_LIMIT_S)


def has_service(proto: Path) -> bool:
    """Whether the file declares a service, and so has gRPC code."""
    return any(line.startswith("service ") for line in proto.read_text().splitlines())


def generated_files(root: Path) -> set[Path]:
    """Generated files below root/protos, relative to root."""
    folder = root / "protos"
    return {path.relative_to(root) for kind in GENERATED for path in folder.rglob(kind)}


def same(left: Path, right: Path) -> bool:
    """Whether both files exist with the same bytes."""
    return left.is_file() and right.is_file() and filecmp.cmp(left, right, shallow=False)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
