"""Import direction inside the package: a room imports from itself and from the rooms above it in this list."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[1]
# a name ending in "." stands for every module below it that no other room names
ROOMS: list[tuple[str, str]] = [
    ("facts", "errors torch_logs ledger matches numerics models."),
    ("data", "config_file config_section own_config trtllm_config vllm_config config_dialects options options_schema layout mesh placement plan graph_digest"),
    ("checkpoints", "checkpoint_files checkpoint_names checkpoint_model checkpoint_weights checkpoint_load shard_boxes"),
    ("ops", "kernels. ops"),
    ("graph tools", "graph_pass leaves provenance graph_text graph_python graph_queries costs schedule graph_json output_folder staged_files passes.fx_edit passes.index_provenance "
                    "passes.evaluate passes.propagate passes.canonicalize"),
    ("capture", "capture capture_layers capture_body capture_equal capture_leaves capture_outer capture_paths capture_checks"),
    ("worlds", "exchange graph_walk process_groups peer_watch last_words rank_guard rank_agreement virtual_world distributed_world world"),
    ("decisions and passes", "planning param_plan passes. kernel_selection capture_program"),
    ("step", "params kv_cache step_inputs handover handover_file dynamic_cache prefix_import prefix_export ranks rank_claims"),
    ("views", "views."),
    ("run", "module inspection rank_share explain assisted_generation generation model_source saving saved_weights saved_checks"),
    ("spine", "compile"),
    ("verification", "verifier verifier. verification mutants mutants."),
    ("front door", "backend value_digest dynamo_frame dynamo_check dynamo_cache dynamo_model dynamo_session command_options kernels_command __main__ __init__"),
]  # fmt: skip
# the pipeline gives example shapes of the cache to the attention pass
EXCEPTIONS = {("passes.pipeline", "kv_cache")}


def modules() -> dict[str, Path]:
    """Name inside the package -> file."""
    package = ROOT / "helix_compile"
    files = package.rglob("*.py")
    return {".".join(f.relative_to(package).with_suffix("").parts): f for f in files}


def imports_of(path: Path) -> set[str]:
    """Modules of ours that a file imports when it is imported itself."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("helix_compile"):
            found.add(node.module or "")
        elif isinstance(node, ast.Import):
            found |= {a.name for a in node.names if a.name.startswith("helix_compile")}
    return found


def room_of(module: str) -> int:
    """Place of a module's room in ROOMS."""
    for exact in (True, False):
        for place, (_, names) in enumerate(ROOMS):
            for name in names.split():
                if module == name if exact else name.endswith(".") and module.startswith(name):
                    return place
    raise AssertionError(f"helix_compile.{module} is in no room of tests/test_imports.py: add it")


def test_no_room_imports_from_a_room_below_it() -> None:
    wrong = []
    for module, path in modules().items():
        for imported in (name.removeprefix("helix_compile.") for name in imports_of(path)):
            if (module, imported) not in EXCEPTIONS and room_of(imported) > room_of(module):
                below = ROOMS[room_of(imported)][0]
                wrong.append(f"{module} ({ROOMS[room_of(module)][0]}) imports {imported} ({below})")
    assert not wrong


def test_nothing_inside_imports_the_package_root() -> None:
    assert not [m for m, path in modules().items() if "helix_compile" in imports_of(path)]


def test_no_cycles() -> None:
    graph = {f"helix_compile.{m}": imports_of(path) for m, path in modules().items()}
    TopologicalSorter(graph).prepare()  # raises CycleError, naming the cycle


def test_models_know_nothing_of_ours_but_each_other() -> None:
    found = {i for m, p in modules().items() if m.startswith("models.") for i in imports_of(p)}
    assert all(i.startswith("helix_compile.models.") for i in found)


def test_only_the_worlds_know_processes() -> None:
    """One file asks torch.distributed who this process is; no pass and no model does."""
    asking = [
        m
        for m, path in modules().items()
        if "dist.get_rank" in path.read_text() or "get_world_size" in path.read_text()
    ]
    assert asking == ["process_groups"]


def test_no_file_over_350_lines() -> None:
    files = [*modules().values(), *ROOT.glob("tests/**/*.py"), *ROOT.glob("examples/*.py")]
    lengths = {str(f.relative_to(ROOT)): len(f.read_text().splitlines()) for f in files}
    assert not {name: length for name, length in lengths.items() if length > 350}
