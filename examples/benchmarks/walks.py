"""How far one walks through the package to follow what it does: files, rooms, functions, and passages between files.

    python examples/benchmarks/walks.py [--json FILE]

Public entry points are traced on a Llama of two layers. Of each way it counts, of what runs in the package:

* files, and rooms: sub-folders of the package, where a module beside them is a room of its own;
* functions: those entered, without lambdas and comprehensions;
* passages: pairs (file, next file) that occur in the order in which code runs, be it by a call or a return;
* changes: how often the file changes.

A part of a way that belongs to one weight is what runs from entering a function with that weight's name among its
arguments, by itself or in an attribute of one, to leaving it. "One weight, adjusted" is the part that enters most
functions; "one weight, all" are all of them: also planning, checking and ordering.
"""

import argparse
import ast
import copy
import gc
import inspect
import json
import os
import sys
import tempfile
import threading
from collections import defaultdict
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import safedelta_hf
from safedelta_hf import SafeDelta, SafeDeltaCallback, adjust_checkpoint, collect_profile

PACKAGE = Path(safedelta_hf.__file__).parent
WEIGHT = "model.layers.0.self_attn.q_proj.weight"
VOCABULARY = 48
COLUMNS = ("files", "rooms", "functions", "passages", "changes")


class Walk:
    """What was entered, in the order of running."""

    def __init__(self) -> None:
        self.files: set[str] = set()
        self.functions: set[tuple[str, str, int]] = set()
        self.passages: set[tuple[str, str]] = set()
        self.changes = 0
        self._last: dict[int, str] = {}

    def enter(self, code: CodeType) -> None:
        """A function begins."""
        file = file_of(code)
        self.files.add(file)
        if not code.co_name.startswith("<"):
            self.functions.add((file, code.co_qualname, code.co_firstlineno))
        self.go_to(code)

    def go_to(self, code: CodeType) -> None:
        """A function runs, or runs on."""
        file, thread = file_of(code), threading.get_ident()
        last = self._last.get(thread, file)
        if last != file:
            self.passages.add((last, file))
            self.changes += 1
        self._last[thread] = file

    def counts(self) -> dict[str, int]:
        """The figures of the table."""
        rooms = {file.split("/")[0] for file in self.files}
        figures = (len(self.files), len(rooms), len(self.functions), len(self.passages), self.changes)
        return dict(zip(COLUMNS, figures, strict=True))


def joined(walks: list[Walk]) -> Walk:
    """What several walks entered together."""
    result = Walk()
    for walk in walks:
        result.files |= walk.files
        result.functions |= walk.functions
        result.passages |= walk.passages
        result.changes += walk.changes
    return result


class Tracer:
    """Follows what runs in the package: as a whole, and the parts that belong to one weight."""

    def __init__(self) -> None:
        self.whole = Walk()
        self.parts: list[Walk] = []
        self._stacks: dict[int, list[FrameType]] = defaultdict(list)
        self._roots: dict[int, FrameType] = {}

    def __enter__(self) -> "Tracer":
        gc.collect()
        gc.disable()  # or what it finalises would stand somewhere in the way
        threading.setprofile(self._follow)
        sys.setprofile(self._follow)
        return self

    def __exit__(self, *error: object) -> None:
        sys.setprofile(None)
        threading.setprofile(None)
        gc.enable()

    def _follow(self, frame: FrameType, event: str, argument: object) -> None:
        code = frame.f_code
        if event not in ("call", "return") or not is_function_of_package(code):
            return
        thread = threading.get_ident()
        stack = self._stacks[thread]
        if event == "call":
            stack.append(frame)
            if thread not in self._roots and names_weight(frame):
                self._roots[thread] = frame
                self.parts.append(Walk())
            for walk in self._walks(thread):
                walk.enter(code)
        elif stack and stack[-1] is frame:
            stack.pop()
            if self._roots.get(thread) is frame:
                del self._roots[thread]
            if stack:
                for walk in self._walks(thread):
                    walk.go_to(stack[-1].f_code)

    def _walks(self, thread: int) -> list[Walk]:
        return [self.whole, self.parts[-1]] if thread in self._roots else [self.whole]


def is_function_of_package(code: CodeType) -> bool:
    """Whether it is code of the package, and not the body of a module or class, which importing runs."""
    return code.co_filename.startswith(f"{PACKAGE}{os.sep}") and bool(code.co_flags & inspect.CO_OPTIMIZED)


def file_of(code: CodeType) -> str:
    """Path in the package."""
    return Path(code.co_filename).relative_to(PACKAGE).as_posix()


def names_weight(frame: FrameType) -> bool:
    """Whether an argument is the name of the weight, or has it in an attribute."""
    code = frame.f_code
    extra = bool(code.co_flags & inspect.CO_VARARGS) + bool(code.co_flags & inspect.CO_VARKEYWORDS)
    names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount + extra]
    values = frame.f_locals
    return any(is_weight(values.get(name)) for name in names)


def is_weight(value: object) -> bool:
    """Whether a value is the name of the weight, or has it in an attribute."""
    if isinstance(value, str):
        return value == WEIGHT
    attributes = getattr(value, "__dict__", None)
    return isinstance(attributes, dict) and any(isinstance(v, str) and v == WEIGHT for v in attributes.values())


def llama() -> LlamaForCausalLM:
    """Two layers of random weights."""
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=32,
        )
    )


def rows(count: int, seed: int) -> list[dict[str, list[int]]]:
    """Random sequences."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(0, VOCABULARY, (count, 8), generator=generator).tolist()
    return [{"input_ids": row, "labels": row} for row in drawn]


def traced(way: Callable[[], Any]) -> Tracer:
    """Go one way."""
    with Tracer() as tracer:
        way()
    return tracer


class TracedCallback(SafeDeltaCallback):
    """Traces what the callback does when training has ended."""

    tracer: Tracer

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401
        """Adjust, and be followed."""
        with Tracer() as self.tracer:
            super().on_train_end(*args, **kwargs)


def end_of_training() -> Tracer:
    """`SafeDeltaCallback.on_train_end` of a short run."""
    callback = TracedCallback(rows(32, seed=1), SafeDelta())
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=2,
            per_device_train_batch_size=4,
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
        )
        Trainer(model=llama(), args=arguments, train_dataset=rows(16, seed=2), callbacks=[callback]).train()
    return callback.tracer


def files_to_files(folder: Path) -> dict[str, Tracer]:
    """Collecting a profile, and what is adjusted in files with it."""
    base = llama()
    profiles = []
    collecting = traced(lambda: profiles.append(collect_profile(base, rows(32, seed=1))))
    profiles[0].save(folder / "profile")
    base.save_pretrained(folder / "base")
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    tuned.save_pretrained(folder / "tuned")
    lora = LoraConfig(r=3, target_modules="all-linear", init_lora_weights=False)
    get_peft_model(base, lora).save_pretrained(folder / "adapter")
    (script,) = entry_points(group="console_scripts", name="safedelta")
    command = script.load()
    words = ["apply", "--rule", SafeDelta.name]
    folders = {"adapter": "adapter", "base": "base", "profile": "profile", "output": "adjusted-adapter"}
    for option, name in folders.items():
        words += [f"--{option}", str(folder / name)]
    return {
        "collect_profile": collecting,
        "safedelta apply --adapter": traced(lambda: command(words, standalone_mode=False)),
        "adjust_checkpoint": traced(
            lambda: adjust_checkpoint(
                base=folder / "base",
                tuned=folder / "tuned",
                profile=folder / "profile",
                output=folder / "adjusted",
                rule=SafeDelta(),
            )
        ),
    }


def size() -> dict[str, int]:
    """Files, lines, classes and protocols of the package."""
    files = sorted(PACKAGE.rglob("*.py"))
    texts = [file.read_text(encoding="utf-8") for file in files]
    classes = [node for text in texts for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ClassDef)]
    protocols = [node for node in classes if any(is_protocol(base) for base in node.bases)]
    lines = sum(len(text.splitlines()) for text in texts)
    return {"files": len(files), "lines": lines, "classes": len(classes), "protocols": len(protocols)}


def is_protocol(base: ast.expr) -> bool:
    """Whether a base class is `Protocol`, be it of parameters or by its full name."""
    base = base.value if isinstance(base, ast.Subscript) else base
    return (base.attr if isinstance(base, ast.Attribute) else getattr(base, "id", "")) == "Protocol"


def main() -> None:
    """Trace, count and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=None, help="File for the figures.")
    options = parser.parse_args()
    torch.set_num_threads(1)
    end = end_of_training()
    with tempfile.TemporaryDirectory() as folder:
        others = files_to_files(Path(folder))
    walks = {
        "SafeDeltaCallback.on_train_end": end.whole,
        "one weight, adjusted": max(end.parts, key=lambda walk: len(walk.functions)),
        "one weight, all": joined(end.parts),
        **{name: tracer.whole for name, tracer in others.items()},
    }
    figures = {"size": size(), "walks": {name: walk.counts() for name, walk in walks.items()}}
    print("\n" + "".join(f"| {column} " for column in ("way", *COLUMNS)) + "|")
    print("|---" * (1 + len(COLUMNS)) + "|")
    for name, counts in figures["walks"].items():
        print(f"| {name} | " + " | ".join(map(str, counts.values())) + " |")
    print("\n" + ", ".join(f"{count} {name}" for name, count in figures["size"].items()))
    if options.json is not None:
        options.json.write_text(json.dumps(figures, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
