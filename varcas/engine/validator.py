"""vLLM's own word on flags and configurations: a JSON line in, a JSON line out.

A script that the *server's* Python runs by path (3.10 or newer): it imports vLLM and nothing of varcas. Made for vLLM
0.24 and 0.32, between which the argument parser moved. `validation.py` is the owner's side.

    {"command": "version"}                    {"ok": true, "version": "0.32.0"}
    {"command": "flags"}                      {"ok": true, "flags": [{"name": "max_num_seqs", "type": "int", ...}, ...]}
    {"command": "check", "argv": [...],       {"ok": true, "resolved": {"scheduler": {...}, ...}, "endpoint": "chat"}
     "endpoint": "auto"}                  or  {"ok": false, "stage": "config", "error": "...", "flag": "max_num_seqs"}

`stage` is `arguments` (the parser refuses), `config` (the engine's configuration does) or `endpoint` (no chat
template). The first check costs 5-30 s (imports, and vLLM inspects the model in a process of its own), a further one
milliseconds.
"""

from __future__ import annotations

import argparse
import dataclasses
import enum
import importlib
import json
import os
import re
import sys
from collections.abc import Callable, Mapping
from typing import Any

PARSERS = ("vllm.entrypoints.launchers.cli_args", "vllm.entrypoints.openai.cli_args")
"""Where `make_arg_parser` and `validate_parsed_serve_args` are: vLLM 0.32, vLLM 0.24."""
MAX_DEPTH = 3
MAX_ITEMS = 128
MAX_TEXT = 300
LEFT_OUT = re.compile(
    r"^instance_id$|(^|_)(ports?|ip|rank|uuid|api_key)(_|$)|^hf_token$|_hash$|^traced_files$"
    r"|^hf_(text_|image_processor_)?config$|^(target|draft)_(model|parallel|load)_config$"
)
"""Settings that are not stored: they differ from start to start, are secret, or are the model's rather than ours."""
TYPES = {
    "human_readable_int": "int",
    "human_readable_int_or_auto": "int",
    "loads": "json",
    "parse_dataclass": "json",
    "union_dict_and_str": "json",
}


class RefusedError(Exception):
    """vLLM does not take it."""

    def __init__(self, stage: str, error: str, flag: str | None = None) -> None:
        super().__init__(error)
        self.stage, self.flag = stage, flag


def make_parser() -> Any:
    """The parser that vLLM has for `vllm serve`, which raises instead of exiting and takes no abbreviations."""
    base: Any = importlib.import_module("vllm.utils.argparse_utils").FlexibleArgumentParser

    class Parser(base):  # type: ignore[misc]
        def print_usage(self, file: Any = None) -> None:
            pass

        def exit(self, status: int = 0, message: str | None = None) -> None:
            text = unwrapped((message or "this asks for help, not for a server").removeprefix(f"{self.prog}: error: "))
            named = re.match(r"argument (\S+?)[:/]", text) or re.match(r"unrecognized arguments: (--\S+)", text)
            raise RefusedError("arguments", text, spelled(named[1].split("=")[0]) if named else None)

    return cli_args().make_arg_parser(Parser(prog="vllm serve", allow_abbrev=False))


def cli_args() -> Any:
    """The module with the parser of `vllm serve`."""
    for name in PARSERS:
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name is None or not name.startswith(error.name):
                raise
    raise ModuleNotFoundError(f"this vLLM has none of {', '.join(PARSERS)}")


def spelled(option: str) -> str:
    """`--max-num-seqs` as experiment files spell it."""
    return option.lstrip("-").replace("-", "_")


def describe(action: argparse.Action, deprecated: bool) -> dict[str, Any]:
    """One flag as JSON."""
    options = list(action.option_strings)
    long = [option for option in options if option.startswith("--")]
    boolean = isinstance(action, argparse.BooleanOptionalAction) or (
        action.nargs == 0 and isinstance(action.const, bool)
    )
    return {
        "name": spelled(long[0]),
        "options": options,
        "type": "bool" if boolean else type_name(action.type),
        "choices": [plain(choice) for choice in action.choices] if action.choices is not None else None,
        "default": plain(action.default),
        "help": (action.help or "").replace("%%", "%").strip() or None,
        "boolean": boolean,
        "negatable": isinstance(action, argparse.BooleanOptionalAction),
        "several": action.nargs in ("*", "+") or (isinstance(action.nargs, int) and action.nargs > 1),
        "deprecated": deprecated or bool(getattr(action, "deprecated", False)),
    }


def type_name(parse: Any) -> str:
    """`int`, `float`, `json` or `str`: what a flag's value is. vLLM wraps it in functions of its own."""
    while getattr(parse, "__closure__", None) and parse.__name__ in ("_optional_type", "_parse_type"):
        cells = dict(zip(parse.__code__.co_freevars, parse.__closure__, strict=True))
        parse = cells["return_type"].cell_contents
    name = getattr(parse, "__name__", None) or "str"
    return TYPES.get(name, name if name in ("int", "float") else "str")


def plain(value: Any, depth: int = MAX_DEPTH) -> Any:
    """A value as JSON can hold it; None for what is no setting (objects, long texts, deep nesting)."""
    if value is None or isinstance(value, bool | int | float):
        return value if not isinstance(value, enum.Enum) else value.name
    if isinstance(value, str):
        return value if len(value) <= MAX_TEXT else None
    if isinstance(value, enum.Enum):
        return value.name
    if dataclasses.is_dataclass(value):
        return settings(value, depth - 1) if depth else None
    if isinstance(value, Mapping):
        named = {str(key): plain(item, depth - 1) for key, item in value.items()} if depth else {}
        return (
            {key: item for key, item in named.items() if not LEFT_OUT.search(key)} if len(named) <= MAX_ITEMS else None
        )
    if isinstance(value, list | tuple | set | frozenset):
        items = [plain(item, depth - 1) for item in value] if depth and len(value) <= MAX_ITEMS else None
        return sorted(items, key=str) if items is not None and isinstance(value, set | frozenset) else items
    named_type = re.fullmatch(r"torch\.(\w+)", str(value))  # torch.bfloat16
    return named_type[1] if named_type else None


def settings(config: Any, depth: int = MAX_DEPTH) -> dict[str, Any]:
    """The fields of one of vLLM's configuration classes."""
    found = {}
    for field in dataclasses.fields(config):
        if not field.name.startswith("_") and not LEFT_OUT.search(field.name):
            found[field.name] = plain(getattr(config, field.name, None), depth)
    return found


def resolved(config: Any) -> dict[str, Any]:
    """The whole engine's settings, one mapping a section: `model`, `cache`, `scheduler`, `parallel`, ..."""
    found: dict[str, Any] = {}
    for name, value in settings(config).items():
        section = name.removesuffix("_config")
        found[section] = value
    model = config.model_config
    found["model"]["dtype"] = plain(model.dtype)
    return found


def words(error: BaseException, argv: list[str]) -> tuple[str, str | None]:
    """What an exception says, without pydantic's wrapping, and the flag of `argv` that it speaks of."""
    listed = getattr(error, "errors", None)
    if callable(listed) and type(error).__name__ == "ValidationError":
        texts = [located(detail) for detail in listed()]
        given = [text for text in texts if named_flag(text.partition(":")[0], argv)]  # before those that follow from it
        text = "; ".join([*given, *(text for text in texts if text not in given)])
    else:
        text = unwrapped(str(error))
        if not text and error.__cause__ is not None:
            return words(error.__cause__, argv)
    return text or type(error).__name__, named_flag(text, argv)


def located(detail: Mapping[str, Any]) -> str:
    """One of pydantic's errors in words."""
    text = str(detail["msg"]).removeprefix("Value error, ").removeprefix("Assertion failed, ")
    path = ".".join(map(str, detail["loc"]))
    return f"{path}: {text}" if path else text


def unwrapped(text: str) -> str:
    """The same of a text that holds the print of a pydantic error, or of a function."""
    text = re.sub(r"\d+ validation errors? for \w+\n", "", text)
    text = re.sub(r"\n\s+For further information visit \S+", "", text)
    text = re.sub(r" \[type=\w+, .*?\](?=\n|$)", "", text)
    text = re.sub(r"(^|: )([\w.]+)\n  (?=\S)", r"\1\2: ", text)
    text = re.sub(r"<(?:function|class) '?(?:json\.)?loads[^>]*>", "JSON", text)
    return text.replace("Value error, ", "").strip().removeprefix("Error: ")


def named_flag(text: str, argv: list[str]) -> str | None:
    """The flag of `argv` that a message speaks of: by name, by a key of its JSON value, or by its value."""
    spoken = [word.strip("_.") for word in re.findall(r"[a-z0-9_.]+", text.replace("-", "_").lower())]
    names: dict[str, str] = {}
    keys: dict[str, str] = {}
    values: dict[str, str] = {}
    for item, following in zip(argv, [*argv[1:], "--"], strict=True):
        if item.startswith("--"):
            option, _, value = item.partition("=")
            flag = re.sub(r"^no_", "", spelled(option))
            value = value or ("" if following.startswith("--") else following)
            names[flag] = flag
            keys |= dict.fromkeys(re.findall(r'"(\w+)":', value), flag)
            values[value.lower().replace("-", "_")] = flag
    for known in (names, keys, values):
        if found := [word for word in spoken if len(word) > 2 and word in known and known[word] != "model"]:
            return known[found[0]]
    return None


class Answers:
    """Answers commands; keeps the parser, which takes 0.2 s to build."""

    def __init__(self) -> None:
        self._parser: Any = None
        self._templates: dict[str, bool] = {}

    def version(self, _: Mapping[str, Any]) -> dict[str, Any]:
        """Answers `version`."""
        return {"version": importlib.import_module("vllm.version").__version__}

    def flags(self, _: Mapping[str, Any]) -> dict[str, Any]:
        """Answers `flags`."""
        parser = self._made_parser()
        old: set[Any] = getattr(parser, "_deprecated", set())
        options = [a for a in parser._actions if any(o.startswith("--") for o in a.option_strings)]
        return {
            "flags": [describe(action, action in old) for action in options if "--help" not in action.option_strings]
        }

    def check(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Answers `check`.

        Raises:
            RefusedError: with what vLLM says.
        """
        argv, endpoint = list(request["argv"]), request.get("endpoint", "auto")
        args = self._parsed(argv)
        try:
            config = engine_config(args)
        except (Exception, SystemExit) as error:  # whatever vLLM raises here, it would raise at the server's start
            raise RefusedError("config", *words(error, argv)) from error
        chat = endpoint != "completions" and self._can_chat(args, config)
        if endpoint == "chat" and not chat:
            raise RefusedError(
                "endpoint", "the model has no chat template and `chat_template` gives none", "chat_template"
            )
        return {"resolved": resolved(config), "endpoint": "chat" if chat else "completions"}

    def _parsed(self, argv: list[str]) -> argparse.Namespace:
        try:
            args: argparse.Namespace = self._made_parser().parse_args(argv)
            if args.model_tag is not None:
                args.model = args.model_tag
            cli_args().validate_parsed_serve_args(args)
        except RefusedError:
            raise
        except (Exception, SystemExit) as error:  # as above
            raise RefusedError("arguments", *words(error, argv)) from error
        return args

    def _made_parser(self) -> Any:
        self._parser = self._parser or make_parser()
        return self._parser

    def _can_chat(self, args: argparse.Namespace, config: Any) -> bool:
        """Whether vLLM finds a chat template: asked of `vllm.renderers.hf`, as the server does at a chat request."""
        model = config.model_config
        if args.chat_template is not None or model.tokenizer_mode not in ("auto", "hf", "slow"):
            return True
        key = json.dumps([str(model.tokenizer), model.tokenizer_mode, str(model.tokenizer_revision)])
        if key not in self._templates:
            tokenizer = importlib.import_module("vllm.tokenizers.registry").cached_tokenizer_from_config(model)
            find = importlib.import_module("vllm.renderers.hf").resolve_chat_template
            self._templates[key] = find(tokenizer, None, None, model_config=model) is not None
        return self._templates[key]


def engine_config(args: argparse.Namespace) -> Any:
    """The engine's configuration as the server would make it; what that changes in the environment is undone."""
    arguments = importlib.import_module("vllm.engine.arg_utils").AsyncEngineArgs
    usage = importlib.import_module("vllm.usage.usage_lib").UsageContext
    before = dict(os.environ)
    try:
        return arguments.from_cli_args(args).create_engine_config(usage.OPENAI_API_SERVER)
    finally:
        os.environ.clear()
        os.environ.update(before)


def answer(answers: Answers, line: str) -> dict[str, Any]:
    """Answers one line."""
    request = json.loads(line)
    commands: dict[str, Callable[[Mapping[str, Any]], dict[str, Any]]] = {
        "version": answers.version,
        "flags": answers.flags,
        "check": answers.check,
    }
    try:
        return {"ok": True} | commands[request["command"]](request)
    except RefusedError as refusal:
        return {"ok": False, "stage": refusal.stage, "error": str(refusal), "flag": refusal.flag}


def main() -> None:
    """Serves until the input ends. What vLLM prints goes to stderr: stdout is the protocol's alone."""
    requests, replies = os.fdopen(os.dup(0), encoding="utf-8"), os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    with open(os.devnull) as nothing:
        os.dup2(nothing.fileno(), 0)
    here = os.path.dirname(os.path.abspath(__file__))  # Python puts it first, and it holds our own `vllm.py`
    sys.path[:] = [place for place in sys.path if os.path.abspath(place) != here]
    sys.argv = ["vllm", "--help"]  # vLLM collects the help of its flags only when it sees this
    answers = Answers()
    for line in requests:
        print(json.dumps(answer(answers, line)), file=replies, flush=True)


if __name__ == "__main__":
    main()
