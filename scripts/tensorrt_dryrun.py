"""The real torch_tensorrt, on a machine without CUDA and TensorRT, asked what it would make of each piece: its own dry run.

    python scripts/tensorrt_dryrun.py --work /tmp/trt          # downloads 5 MB, wants gcc; its stdout stands in docs/exports.md

For developers: no part of the package, of its tests or of CI. Step by step:

1. torch_tensorrt, TensorRT's bindings and its Python package are downloaded without dependencies and unpacked beside each other.
   Their libraries (2 GB) are not: they come from another index and want a card.
2. compile()'s signature is read off the wheel's source and held against the keywords that runtime/tensorrt.py passes.
3. The bindings need nine C symbols of three libraries. Stubs that answer NULL to all let them load; torch_tensorrt's own libraries,
   which need CUDA, are moved away, and it goes on without them.
4. A process with these on its paths answers what torch_tensorrt asks of a card, imports it, compiles the tiny preset with
   lower="tensorrt", and dry-runs each piece. The step then runs the programs themselves and is compared with the model.
5. One piece is really built: on stubs that must end in an error, and does it end in ours?
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import platform
import subprocess
import sys
import tarfile
import zipfile
from datetime import date
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).parents[1]
WHEELS = ("torch-tensorrt==2.13.0", "tensorrt-cu13-bindings==11.0.0.114", "dllist==2.0.0")
SOURCES = ("tensorrt-cu13==11.0.0.114",)
RECORDED = ROOT / "tests/data/torch_tensorrt_compile.json"
STUBS = """
void *createInferBuilder_INTERNAL(void *a, int b) { return 0; }
void *createInferRefitter_INTERNAL(void *a, void *b, int c) { return 0; }
void *createInferRuntime_INTERNAL(void *a, int b) { return 0; }
void *getBuilderPluginRegistry(int a) { return 0; }
void *getPluginRegistry(void) { return 0; }
int initLibNvInferPlugins(void *a, const char *b) { return 0; }
void *createNvOnnxParser_INTERNAL(void *a, void *b, int c) { return 0; }
void *createNvOnnxParserRefitter_INTERNAL(void *a, void *b, int c) { return 0; }
int getNvOnnxParserVersion(void) { return 0; }
"""
LIBRARIES = ("libnvinfer.so.11", "libnvinfer_plugin.so.11", "libnvonnxparser.so.11")


def unpacked(work: Path) -> Path:
    """Step 1: a folder with torch_tensorrt, tensorrt and tensorrt_bindings in it."""
    archives, site = work / "archives", work / "site"
    if site.is_dir():
        return site
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(archives)]
    subprocess.run([*pip, *WHEELS], check=True)
    subprocess.run([*pip, "--no-binary", ":all:", "--no-build-isolation", *SOURCES], check=True)
    for wheel in archives.glob("*.whl"):
        with zipfile.ZipFile(wheel) as file:
            file.extractall(site)
    for source in archives.glob("*.tar.gz"):
        with tarfile.open(source) as file:
            file.extractall(work / "source", filter="data")
    (package,) = (work / "source").glob("*/tensorrt")
    package.rename(site / "tensorrt")
    (site / "torch_tensorrt/lib").rename(work / "lib-of-torch_tensorrt")  # step 3
    return site


def signature(site: Path) -> list[str]:
    """Names that compile() of the wheel takes, read off its source."""
    tree = ast.parse((site / "torch_tensorrt/dynamo/_compiler.py").read_text())
    (found,) = (node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "compile")
    return [argument.arg for argument in (*found.args.args, *found.args.kwonlyargs)]


def check_keywords(site: Path) -> None:
    """Step 2: what we pass is known to the wheel; what the tests take for its signature is its signature."""
    from helix_compile.runtime.tensorrt import COMPILE_KEYWORDS, OF_A_PIECE

    known, recorded = signature(site), json.loads(RECORDED.read_text())
    wanted = [*COMPILE_KEYWORDS, *OF_A_PIECE, "dryrun"]
    if lost := [name for name in wanted if name not in known]:
        raise SystemExit(f"compile() of the wheel has no {', '.join(lost)}")
    if known != recorded["compile"]:
        raise SystemExit(f"{RECORDED} is not the wheel's signature: {sorted(set(known) ^ set(recorded['compile']))}")
    print(f"2. compile() of {WHEELS[0]} takes {len(known)} arguments, all {len(wanted)} that are passed among them")


def stubs(work: Path) -> Path:
    """Step 3: the folder of the three libraries."""
    folder = work / "stubs"
    folder.mkdir(exist_ok=True)
    (folder / "stubs.c").write_text(STUBS)
    for name in LIBRARIES:
        command = ["gcc", "-shared", "-fPIC", "-w", f"-Wl,-soname,{name}", "-o", str(folder / name)]
        subprocess.run([*command, str(folder / "stubs.c")], check=True)
    print(f"3. {', '.join(LIBRARIES)}: stubs of {STUBS.count('{')} symbols")
    return folder


def answer_for_a_card() -> None:
    """What torch_tensorrt asks of a card, answered as an H100 would."""
    import torch

    card = SimpleNamespace(name="no card", major=9, minor=0, total_memory=80 << 30, multi_processor_count=132)
    torch._C._CudaDeviceProperties = SimpleNamespace  # an annotation; a build of torch for CPUs has none
    torch.cuda.is_available = lambda: False
    torch.cuda.current_device = lambda: 0
    torch.cuda.get_device_capability = lambda *_: (9, 0)
    torch.cuda.get_device_properties = lambda *_: card
    torch.cuda.mem_get_info = lambda *_: (80 << 30, 80 << 30)


def dry_run() -> None:
    """Steps 4 and 5."""
    import torch

    from helix_compile import LoweringError, helix_compile
    from helix_compile.models.presets import build_model, preset_config
    from helix_compile.runtime.tensorrt import TorchTensorRT

    answer_for_a_card()
    import tensorrt
    import torch_tensorrt
    from torch_tensorrt.dynamo import _compiler
    from torch_tensorrt.dynamo.conversion import DYNAMO_CONVERTERS

    named = torch_tensorrt.dynamo.runtime.TorchTensorRTModule(None, ["x"], ["y"])
    assert named.input_binding_names == ["x"]  # what is read of a built engine
    count = len(DYNAMO_CONVERTERS.unique_targets())
    print(
        f"4. torch_tensorrt {torch_tensorrt.__version__}, tensorrt {tensorrt.__version__}: {count} ops have converters"
    )
    trackers: list[Any] = []
    _compiler.dryrun_stats_display = lambda tracker, _: trackers.append(tracker)
    first: list[Any] = []
    seen: set[str] = set()

    class DryRun(TorchTensorRT):
        """Asks what would be built, and gives the program back."""

        def __call__(self, program: Any, inputs: Any, where: str) -> Any:
            key = f"{where.split('.')[1]} {[n.name for n in program.graph.nodes]}"
            if key not in seen:
                seen.add(key)
                first.append((program, inputs, where))
                try:
                    self.compiled(program, inputs, where, dryrun=True)
                except LoweringError as error:
                    print(f"   {where}: {error}")
                else:
                    got = trackers.pop()
                    taken = [len(graph.input_shapes) for graph in got.per_subgraph_data]
                    row = (
                        where,
                        f"{got.supported_ops_in_graph}/{got.total_ops_in_graph} ops",
                        f"{got.tensorrt_graph_count} engine",
                    )
                    print(
                        "   {:22} {:>12}  {}".format(*row),
                        f" {taken[0]} inputs of {len(inputs)}, {got.to_run_in_torch or 'none'} in torch",
                    )
            return program.module()

    torch.manual_seed(0)
    model = build_model(preset_config("tiny"))
    builder = DryRun(torch.device("cuda:0"))
    compiled = helix_compile(model, cp=4, lower="tensorrt", builder=builder, max_batch_size=4, max_seq_len=64)
    ids = torch.randint(0, 97, (3, 7))
    with torch.no_grad():
        expected = model(input_ids=ids).logits
    off = float((compiled(ids) - expected).abs().max() / expected.abs().max())
    print(f"   a step of these programs is off by {off:.1e} of the largest logit")
    try:
        TorchTensorRT(torch.device("cuda:0"))(*first[1])
    except LoweringError as error:
        print(f"5. a real build on stubs: LoweringError: {error}")
    else:
        raise SystemExit("5. a real build on stubs went through")


def main() -> None:
    """All steps; 4 and 5 in a process of their own."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--work", type=Path, required=True, help="a folder of its own; downloads in it are used again")
    parser.add_argument("--inner", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.inner:
        return dry_run()
    import torch

    asked.work.mkdir(parents=True, exist_ok=True)
    site = unpacked(asked.work)
    print(
        f"1. {date.today()}, Python {platform.python_version()}, torch {torch.__version__}: {', '.join((*WHEELS, *SOURCES))}"
    )
    check_keywords(site)
    libraries = stubs(asked.work)
    sys.stdout.flush()
    paths = [str(ROOT), str(site)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "LD_LIBRARY_PATH": str(libraries)}
    command = [sys.executable, __file__, "--work", str(asked.work), "--inner"]
    raise SystemExit(subprocess.run(command, env=environment).returncode)


if __name__ == "__main__":
    main()
