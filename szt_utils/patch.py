"""Put Safe-Zone Training into a Diffusers training script that you have.

    python -m szt_utils.patch train_dreambooth_lora.py > train_dreambooth_lora_szt.py

The patched script takes the flags of Safe-Zone Training, such as --szt and --loss_mask_dir; without them it
trains as before. Lines that are new or changed end in `# SZT`; szt_utils.patched says what they do. A script
in which a place for them is not found exactly as often as expected is refused, and nothing is written.
"""

import ast
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from .arguments import script_parser
from .errors import InputError, exit_on_input_error
from .files import read_text

__all__ = ["patch_script"]

_MARK = "  # SZT"
_COUNT = ".config.num_train_timesteps"
_MIX = re.compile(r"\(1(\.0)? - sigmas\) \* \w+ \+ sigmas \* noise$", re.MULTILINE)


def patch_script(source: str, name: str = "script") -> str:
    """The source of a Diffusers training script with Safe-Zone Training.

    InputError for a script of another kind, which names what was not found in it.
    """
    if _MARK in source:
        raise InputError(f"'{name}' is patched already.")
    try:
        script = _Script(source, name)
    except (SyntaxError, ValueError) as error:
        raise InputError(f"'{name}' is not a Python script ({error}).") from None
    loop = script.one("training loop", script.walk(ast.For), lambda node: (
        "train_dataloader" in _text(node.iter) and _step_of(node) is not None))
    main = script.one("function of the training loop", script.tree.body, lambda node: (
        isinstance(node, ast.FunctionDef) and loop in ast.walk(node)))
    scheduler = _patch_timesteps(script, loop)
    _patch_loss(script, loop)
    _patch_cache(script, loop)
    _patch_data(script, main)
    _add_object(script, main, scheduler)
    _add_flags(script)
    return script.patched()


class _Script:
    """A script's syntax tree, and edits of its text at the places of nodes."""

    def __init__(self, source: str, name: str):
        self.name, self.source, self.tree = name, source.encode(), ast.parse(source, name)
        self.lines = self.source.splitlines(keepends=True)
        self.starts = [0]
        for line in self.lines:
            self.starts.append(self.starts[-1] + len(line))
        self.edits: list[tuple[int, int, str]] = []

    def walk(self, kind: type, within: ast.AST | None = None) -> list:
        """The nodes of a kind, in the order of the text."""
        found = [node for node in ast.walk(within or self.tree) if isinstance(node, kind)]
        return sorted(found, key=lambda node: (node.lineno, node.col_offset))

    def assigns(self, name: str, within: ast.AST) -> list[ast.Assign]:
        """The assignments to a name alone."""
        return [node for node in self.walk(ast.Assign, within) if _text(node.targets[0]) == name]

    def one(self, what: str, nodes: Iterable, condition: Callable[[Any], bool] = lambda _: True) -> Any:
        """The only node that fulfils a condition; InputError when there is none, or more."""
        found = [node for node in nodes if condition(node)]
        if len(found) != 1:
            raise self.refuse(f"{len(found)} places look like its {what}, where 1 is expected", found)
        return found[0]

    def refuse(self, problem: str, nodes: Iterable = ()) -> InputError:
        """An error that names the problem and the lines of nodes."""
        lines = ", ".join(str(node.lineno) for node in nodes)
        where = f" (lines {lines})" if lines else ""
        return InputError(f"'{self.name}' cannot be patched: {problem}{where}. "
                          "Put Safe-Zone Training in by hand, as in examples/szt_in_your_loop.py.")

    def replace(self, node: ast.AST, text: str) -> None:
        """Put a text without line breaks in the place of a node."""
        self._edit(*self._span(node), text)
        self._mark(node.end_lineno)

    def wrap(self, node: ast.AST, before: str, after: str = ")") -> None:
        """Put text before and after a node."""
        start, end = self._span(node)
        self._edit(start, start, before)
        self._edit(end, end, after)
        self._mark(node.lineno)

    def insert(self, statement: ast.stmt, text: str, after: bool = False) -> None:
        """Put a line before or after a statement, indented like it."""
        at = self.starts[statement.end_lineno if after else statement.lineno - 1]
        indent = self.lines[statement.lineno - 1][:statement.col_offset].decode()
        self._edit(at, at, f"{indent}{text}{_MARK}\n")

    def patched(self) -> str:
        """The text with all edits; InputError when it is not Python."""
        text, edits = self.source, list(enumerate(dict.fromkeys(self.edits)))
        for _, (start, end, new) in sorted(edits, key=lambda edit: (edit[1][0], edit[0]), reverse=True):
            text = text[:start] + new.encode() + text[end:]  # from the end, so that offsets stay right
        try:
            compile(text, self.name, "exec")
        except SyntaxError as error:
            raise self.refuse(f"a change has broken line {error.lineno}") from None
        return text.decode()

    def _span(self, node: ast.AST) -> tuple[int, int]:
        return (self.starts[node.lineno - 1] + node.col_offset,
                self.starts[node.end_lineno - 1] + node.end_col_offset)

    def _edit(self, start: int, end: int, text: str) -> None:
        self.edits.append((start, end, text))

    def _mark(self, line: int) -> None:
        end = self.starts[line - 1] + len(self.lines[line - 1].rstrip())
        self._edit(end, end, _MARK)


def _text(node: ast.AST) -> str:
    return ast.unparse(node)


def _calls(node: ast.AST, function: str) -> bool:
    return isinstance(node, ast.Call) and _text(node.func) == function


def _step_of(loop: ast.For) -> ast.With | None:
    """The statement of a training loop that holds the step."""
    return next((node for node in loop.body if isinstance(node, ast.With)
                 and "accelerator.accumulate" in _text(node.items[0])), None)


def _patch_timesteps(script: _Script, loop: ast.For) -> str:
    """WHEN: every draw of timesteps; returns the name of the scheduler."""
    schedulers, draws = set(), []
    for node in script.walk(ast.Call, loop):
        patch = (_patch_numbers if _calls(node, "torch.randint") else
                 _patch_density if _calls(node, "compute_density_for_timestep_sampling") else None)
        if patch:
            assigned = script.one("assignment of a random draw", script.walk(ast.Assign, loop),
                                  lambda each, node=node: each.value is node)
            draws.append(_text(assigned.targets[0]))
            schedulers.add(patch(script, loop, node, draws[-1]))
    if len(schedulers) != 1 or len(draws) != len(set(draws)):
        raise script.refuse("its draw of timesteps is not found once")
    scheduler = schedulers.pop()
    unknown = [node for node in script.assigns("timesteps", loop) if not (
        _calls(node.value, "torch.randint") or _text(node.value) == "timesteps.long()"
        or _text(node.value).startswith(f"{scheduler}.timesteps["))]
    if unknown:
        raise script.refuse("it draws timesteps in a way that is not known", unknown)
    return scheduler


def _patch_numbers(script: _Script, loop: ast.For, node: ast.Call, name: str) -> str:
    """name = torch.randint(0, scheduler.config.num_train_timesteps, (count,), device=...)"""
    given = [_text(each) for each in node.args]
    device = [_text(each.value) for each in node.keywords if each.arg == "device"]
    count = re.fullmatch(r"\((\w+),\)", given[-1]) if len(given) == 3 else None
    known = count and given[0] == "0" and given[1].endswith(_COUNT) and len(device) == len(node.keywords)
    if not known:
        raise script.refuse("it draws random whole numbers that are not known as timesteps", [node])
    scheduler = given[1].removesuffix(_COUNT)
    if name == "timesteps":
        script.replace(node, f"szt.timesteps({scheduler}, {count[1]}, device={(device or ['None'])[0]})")
    else:
        _check_indices(script, loop, name, scheduler)
        script.replace(node, f"szt.indices({scheduler}, {count[1]})")
    return scheduler


def _patch_density(script: _Script, loop: ast.For, node: ast.Call, name: str) -> str:
    """u = compute_density_for_timestep_sampling(..., batch_size=count), and the indices that follow."""
    start, end = f"({name} * ", f"{_COUNT}).long()"
    indices = script.one("use of a density of timesteps", script.walk(ast.Assign, loop), lambda each: (
        _text(each.value).startswith(start) and _text(each.value).endswith(end)))
    scheduler = _text(indices.value).removeprefix(start).removesuffix(end)
    _check_indices(script, loop, _text(indices.targets[0]), scheduler)
    if node.args or "batch_size" not in [each.arg for each in node.keywords]:
        raise script.refuse("its density of timesteps is called in a way that is not known", [node])
    if not _MIX.search(_text(loop)):  # Lumina's sigmas count the signal
        raise script.refuse("it does not mix latents and noise as its scheduler's sigmas say", [node])
    script.wrap(node.func, "szt.density(", f", {scheduler})")
    return scheduler


def _check_indices(script: _Script, loop: ast.For, name: str, scheduler: str) -> None:
    """The indices must lead to the scheduler's timesteps."""
    script.one("reading of the scheduler's timesteps", script.assigns("timesteps", loop), lambda node: (
        _text(node.value).startswith(f"{scheduler}.timesteps[{name}]")))


def _patch_loss(script: _Script, loop: ast.For) -> None:
    """WHERE: prediction and target lose what is outside the masks, before any loss is taken of them."""
    pairs, losses = set(), []
    for node in [*script.walk(ast.Call, loop), *script.walk(ast.BinOp, loop)]:
        pair = _pair_of(node)
        if pair:
            pairs.add(tuple(_text(each).removesuffix(".float()").removesuffix("_prior") for each in pair))
            losses.append(node)
    if len(pairs) != 1 or not all(name.isidentifier() for pair in pairs for name in pair):
        raise script.refuse("its loss of a prediction and a target is not found", losses)
    prediction, target = pairs.pop()
    chunks = [node for node in script.walk(ast.Call, loop)
              if _text(node) == f"torch.chunk({prediction}, 2, dim=0)"]
    if len(chunks) != ("with_prior_preservation" in _text(loop)):
        raise script.refuse("its class images of prior preservation are not found once", chunks)
    for node in script.assigns("loss", loop):
        if not any(part in losses or _text(part) == "loss" for part in ast.walk(node.value)):
            raise script.refuse("it takes a loss that is not known", [node])
    first = next(statement for statement in _step_of(loop).body
                 if any(part in losses or part in chunks for part in ast.walk(statement)))
    batch = ", ".join(_text(loop.target).strip("()").split(", ")[::-1])  # of batch, or step and batch
    script.insert(first, f"{prediction}, {target} = szt.mask({prediction}, {target}, {batch})")
    for node in script.assigns("snr", loop):
        if chunks and _calls(node.value, "compute_snr") and _text(node.value.args[1]) == "timesteps":
            script.insert(node, "timesteps = szt.instances(timesteps)")


def _pair_of(node: ast.AST) -> list[ast.AST] | None:
    """The prediction and the target of a squared error."""
    if _calls(node, "F.mse_loss"):
        return node.args[:2]
    power = isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow)
    if power and isinstance(node.left, ast.BinOp) and isinstance(node.left.op, ast.Sub):
        return [node.left.left, node.left.right]
    return None


def _patch_cache(script: _Script, loop: ast.For) -> None:
    """Latents that are cached by step: the masks are cached with them. By image, they need nothing."""
    step = _text(loop.target).strip("()").split(", ")[0]
    caches = {_text(node.value) for node in script.walk(ast.Subscript, loop)
              if _text(node.slice) == step and _text(node.value).endswith("latents_cache")}
    if caches:
        appended = script.one("cache of latents", script.walk(ast.Expr), lambda node: (
            _text(node).startswith(tuple(f"{cache}.append(" for cache in caches))
            and "['pixel_values']" in _text(node)))
        caching = [node for node in script.walk(ast.For) if appended in ast.walk(node)][-1]
        script.insert(appended, f"szt.remember({_text(caching.target)})", after=True)


def _patch_data(script: _Script, main: ast.FunctionDef) -> None:
    """HOW: the data set, whose images are compressed; their masks come along."""
    made = script.one("data set", script.assigns("train_dataset", main)).value
    if isinstance(made, ast.Call) and isinstance(made.func, ast.Name):
        kind = script.one("class of the data set", script.walk(ast.ClassDef), lambda node: (
            node.name == made.func.id))
        opened = [node.value for node in script.walk(ast.Assign, kind)
                  if _calls(node.value, "Image.open") and "class" not in _text(node)]
        listed = [node.iter for node in script.walk(ast.For, kind) if _text(node.iter) == "instance_images"]
        site = script.one("reading of the instance images", [*opened, *listed])
        script.wrap(site, "image_or_mask(" if opened else "map(image_or_mask, ")
        script.wrap(made.func, "szt.dataset(")
    else:
        made = script.one("transform of the data set", script.walk(ast.Call), lambda node: (
            isinstance(node.func, ast.Attribute) and node.func.attr == "with_transform"))
        transform = script.one("function that transforms examples", script.walk(ast.FunctionDef, main),
                               lambda node: node.name == _text(made.args[0]))
        examples = transform.args.args[0].arg
        read = [part.iter for node in script.walk(ast.ListComp, transform) for part in node.generators]
        columns = [node.slice for node in read
                   if isinstance(node, ast.Subscript) and _text(node.value) == examples]
        if len(set(map(_text, columns))) != 1:
            raise script.refuse("its column of images is not found", [transform])
        script.wrap(made.args[0], "szt.transform(", f", {_text(columns[0])})")
    loader = script.one("data loader", script.assigns("train_dataloader", main), lambda node: (
        isinstance(node.value, ast.Call) and _text(node.value.func).endswith("DataLoader")))
    for keyword in loader.value.keywords:
        if keyword.arg == "collate_fn":
            script.wrap(keyword.value, "szt.collate(")


def _add_object(script: _Script, main: ast.FunctionDef, scheduler: str) -> None:
    """`szt`, which the other lines call, before the data set is made."""
    made = script.one("data set", script.assigns("train_dataset", main))
    if not any(node.lineno < made.lineno for node in script.assigns(scheduler, main)):
        raise script.refuse(f"'{scheduler}' is not made before its data set")
    if not (script.assigns("args", main) or "args" in [each.arg for each in main.args.args]):
        raise script.refuse("its function of the training loop knows no 'args'", [main])
    first = next(statement for statement in main.body if made in ast.walk(statement))
    script.insert(first, f"szt = SafeZoneTraining(args, {scheduler})")


def _add_flags(script: _Script) -> None:
    """The import, and the flags before the command line is parsed."""
    parse = script.one("function parse_args", script.walk(ast.FunctionDef), lambda node: (
        node.name == "parse_args"))
    calls = [node for node in script.walk(ast.Call, parse) if _text(node.func).endswith(".parse_args")]
    if not calls or "'--resolution'" not in _text(parse):
        raise script.refuse("its flags, among them --resolution, are not found", [parse])
    first = next(statement for statement in parse.body if calls[0] in ast.walk(statement))
    script.insert(first, f"add_flags({_text(calls[0].func.value)})")
    names = ["SafeZoneTraining", "add_flags"]
    names += ["image_or_mask"] * any("image_or_mask" in text for _, _, text in script.edits)
    imports = [node for node in script.tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    script.insert(imports[-1], f"from szt_utils.patched import {', '.join(names)}", after=True)


def main(argv: list[str] | None = None) -> None:
    parser = script_parser(__doc__, prog="python -m szt_utils.patch")
    parser.usage = "%(prog)s SCRIPT > PATCHED_SCRIPT"
    parser.add_argument("script", help="a training script of Diffusers' examples")
    args = parser.parse_args(argv)
    with exit_on_input_error():
        print(patch_script(read_text(args.script, "script"), Path(args.script).name), end="")


if __name__ == "__main__":
    main()
