"""`kimi-vl`: ask about a picture, open the page, train and evaluate the study model.

Commands import what they need when they run, so that `kimi-vl --help` does not wait for torch.
"""

from __future__ import annotations

import importlib
import os
import socket
import sys
from collections.abc import Iterable
from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

try:
    import typer
except ModuleNotFoundError:  # `kimi_vl_ref` alone installs light, and this command comes with it
    sys.exit("kimi-vl needs the packages of the 'demos' group: pip install 'kimi-vl-workbench[demos]'")

if TYPE_CHECKING:
    from kimi_vl_ref import Reply

app = typer.Typer(
    help="A small, readable Kimi-VL: ask it, look inside it, train one.",
    add_completion=False,
    pretty_exceptions_enable=False,
)
study = typer.Typer(help="The small model that ships with this package.")
app.add_typer(study, name="study")

Model = Annotated[str, typer.Option(help="'study', or a checkpoint folder in the released layout")]
Budget = Annotated[int | None, typer.Option(min=0, help="tokens after which the thought is closed")]
Images = Annotated[list[Path] | None, typer.Option(help="a picture; repeat it for several")]
Temperature = Annotated[float, typer.Option(help="0 takes the likeliest token every time")]
MaxTokens = Annotated[int, typer.Option(help="stop after so many tokens, thought included")]
Seed = Annotated[int | None, typer.Option(min=0, max=2**31 - 1, help="makes sampling repeatable")]


@app.command()
def chat(
    question: Annotated[str, typer.Argument(help="what to ask")],
    image: Images = None,
    model: Model = "study",
    temperature: Temperature = 0.0,
    max_tokens: MaxTokens = 512,
    thought_budget: Budget = None,
    seed: Seed = None,
    fit: Annotated[str | None, typer.Option(help="auto (the usual for a folder), whole, int8, int4 or mapped")] = None,
    split: Annotated[int | None, typer.Option(min=1, help="spread the experts over so many processes, a GPU each")] = None,
) -> None:
    """Answer a question about pictures: the thought, dimmed, then the answer."""
    if not question.strip():
        raise ValueError("the question is empty; write what you want to know")
    from kimi_vl_ref import checkpoint_folder, choose_fit, load, stream_reply

    pictures = [{"type": "image", "image": path} for path in image or []]
    messages = [{"role": "user", "content": [*pictures, {"type": "text", "text": question}]}]
    settings: dict[str, Any] = {"max_new_tokens": max_tokens, "temperature": temperature}
    settings |= {"thought_budget": thought_budget, "seed": seed}
    if split is not None:
        if fit is not None:
            raise ValueError("--split holds weights as they are stored, and --fit says another way; give one of them")
        from .together import answer

        answer(model, split, messages, settings, to_the_end)
        return
    chosen = None
    if fit is not None or model != "study":
        chosen = choose_fit(checkpoint_folder(model), fit or "auto")
        typer.echo(f"({chosen.says})", err=True)
    loaded, its_chat = load(model, fit=chosen)
    to_the_end(stream_reply(loaded, its_chat, messages, **settings))


def to_the_end(replies: Iterable[Reply]) -> None:
    """Prints a reply as it grows, and whether it was cut off."""
    reply = show(replies)
    if reply is not None and not reply.finished:
        typer.echo(f"(cut off after {len(reply.token_ids)} tokens)", err=True)


def show(replies: Iterable[Reply]) -> Reply | None:
    """Prints a reply as it grows, its thought dimmed where the terminal can; returns it whole."""
    reply, shown = None, {"thought": 0, "answer": 0}
    for reply in replies:
        for part in ("thought", "answer"):
            text = getattr(reply, part).lstrip()
            new = text[shown[part] :]
            if new and part == "answer" and shown["thought"] and not shown["answer"]:
                typer.echo("\n")
            typer.secho(new, dim=part == "thought", nl=False)
            sys.stdout.flush()
            shown[part] = max(shown[part], len(text))  # the last reply may have lost trailing blanks
    typer.echo()
    return reply


@app.command()
def demo(
    model: Model = "study",
    against: Annotated[str | None, typer.Option(help="other weights, to compare with; like --model")] = None,
    host: Annotated[str, typer.Option(help="0.0.0.0 lets other machines in")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 7860,
) -> None:
    """Open the page in which to ask and to look inside."""
    try:
        socket.create_server((host, port)).close()  # before a model is loaded for nothing
    except OSError as error:
        raise ValueError(
            f"port {port} at {host} cannot be opened ({error.strerror}); choose another with --port or --host"
        ) from error
    # The rooms open one way, workbench <- demos, so this is no import statement: the workbench needs nothing
    # of the page, and only this command starts it. The import test allows this one line.
    importlib.import_module("demos.app").main(model=model, against=against, host=host, port=port)


@app.command("run")
def record_run(
    question: Annotated[str, typer.Argument(help="what to ask")],
    out: Annotated[Path, typer.Option(help="the run file; name it like count-1.run to have 'count' as its domain")],
    image: Images = None,
    model: Model = "study",
    temperature: Temperature = 0.0,
    max_tokens: MaxTokens = 512,
    thought_budget: Budget = None,
    seed: Seed = None,
) -> None:
    """Answer a question and save what happened inside as a run file."""
    from .analyses.command import record_to_file

    run = record_to_file(
        question,
        image or [],
        out,
        model=model,
        show=show,
        temperature=temperature,
        max_new_tokens=max_tokens,
        thought_budget=thought_budget,
        seed=seed,
    )
    typer.echo(f"{out}: {len(run.token_ids)} tokens, {out.stat().st_size / 1e6:.1f} MB", err=True)


@app.command()
def analyse(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="an analysis; 'list' prints their names")],
    runs: Annotated[list[Path] | None, typer.Argument(help="run files, for analyses of recorded runs")] = None,
    out: Annotated[Path | None, typer.Option(help="folder for figure and numbers; default: the analysis' name")] = None,
    against: Annotated[list[Path] | None, typer.Option(help="a run to compare with; repeat it for several")] = None,
    model: Model = "study",
    family: Annotated[list[str] | None, typer.Option(help="ask scenes of this family; repeat it for several")] = None,
    scenes: Annotated[int | None, typer.Option(help="scenes of each family")] = None,
    image: Images = None,
    question: Annotated[str, typer.Option(help="what to ask about the picture")] = "",
    group: Annotated[str, typer.Option(help="which tokens: all, picture, question, thought, answer, ...")] = "all",
    layer: Annotated[int | None, typer.Option(help="a decoder layer")] = None,
    position: Annotated[int | None, typer.Option(help="a token; default: the first one written")] = None,
    picture: Annotated[int, typer.Option(help="which picture, counted from 0")] = 0,
    at: Annotated[str | None, typer.Option(help="x,y: a point of the picture in pixels, such as 120,40")] = None,
    expert: Annotated[list[str] | None, typer.Option(help="layer.expert, such as 3.7; repeat it for several")] = None,
    site: Annotated[str, typer.Option(help="what is patched: residual, attention, heads, experts, ...")] = "residual",
    label: Annotated[str, typer.Option(help="what a probe reads: colour, shape, character, row, column")] = "colour",
    samples: Annotated[int, typer.Option(min=1, help="sampled replies to one question")] = 8,
    max_tokens: MaxTokens = 160,
    workers: Annotated[int, typer.Option(min=1, help="processes of a sweep")] = 2,
    seed: Annotated[int, typer.Option(min=0, max=2**31 - 1, help="of scenes, shuffles and random controls")] = 0,
) -> None:
    """Write the figure (PNG, SVG) and the numbers (CSV, about.json) of an analysis of runs, or of a model and pictures."""
    from .analyses import command, registry

    if name == "list":
        typer.echo("\n".join(registry.listing()))
        return
    options = dict(
        model=model,
        families=family or [],
        scenes=scenes,
        images=image or [],
        question=question,
        group=group,
        layer=layer,
        position=position,
        picture=picture,
        at=None if at is None else command.point(at),
        experts=[command.expert(one) for one in expert or []],
        site=site,
        label=label,
        samples=samples,
        max_tokens=max_tokens,
        workers=workers,
        seed=seed,
    )
    # what was not typed is not passed on: an option that an analysis would not heed is refused
    typed = {one: value for one, value in options.items() if not left_out(context, one)}
    written = command.analyse(name, runs or [], out or Path(name), against=against or [], progress=sys.stderr.isatty(), **typed)
    typer.echo("\n".join(map(str, written)))


def left_out(context: typer.Context, parameter: str) -> bool:
    """Whether a parameter of the command has its default since nothing was typed. Names that are no parameter's are not."""
    source = context.get_parameter_source(parameter)
    return source is not None and source.name == "DEFAULT"


@study.command("evaluate")
def study_evaluate(
    model: Model = "study",
    scenes: Annotated[int, typer.Option(help="scenes for each family, from seeds never trained on")] = 500,
    family: Annotated[list[str] | None, typer.Option(help="only this family; repeat it for several")] = None,
    split: Annotated[str, typer.Option(help="'report': published figures; 'choose': decisions")] = "report",
    thought_budget: Budget = None,
    json: Annotated[Path | None, typer.Option(help="also write the numbers to this file")] = None,
) -> None:
    """Print accuracy by family beside the best constant answer."""
    from .study.evaluate import main

    main(
        model=model,
        scenes=scenes,
        families=family,
        split=split,
        thought_budget=thought_budget,
        json_path=json,
    )


@study.command("claim")
def study_claim(
    names: Annotated[list[str], typer.Argument(help="thinking, native, rope, experts, landing, balance, needle, or all")],
    model: Model = "study",
    scenes: Annotated[int | None, typer.Option(min=2, help="scenes (balance: steps) in place of the usual number")] = None,
    json: Annotated[Path | None, typer.Option(help="also write the tables to this file")] = None,
) -> None:
    """Measure claims of the report in miniature, each beside its control."""
    from .study.claims import main

    main(names, model=model, scenes=scenes, json_path=json)


@study.command("train")
def study_train(
    out: Annotated[Path, typer.Option(help="a run's folder; one that is there goes on")] = Path("runs/study"),
    seed: Annotated[int, typer.Option(min=0, max=2**31 - 1, help="of the weights and the scenes")] = 0,
    ranks: Annotated[int, typer.Option(min=1, help="processes that share the work")] = 2,
    save_every: Annotated[int, typer.Option(min=1, help="steps from one saving to the next")] = 100,
    start: Annotated[str | None, typer.Option(help="go on from these weights, with the stages after the first three")] = None,
) -> None:
    """Train the study model, or go on with a run that was stopped."""
    from .study.train import main

    main(out=out, seed=seed, ranks=ranks, save_every=save_every, start=start)


@study.command("average")
def study_average(
    new: Annotated[str, typer.Argument(help="'study', or a checkpoint folder")],
    old: Annotated[str, typer.Argument(help="another of the same sizes, from which the new one was trained")],
    out: Annotated[Path, typer.Argument(help="a folder that is not there yet")],
    share: Annotated[float, typer.Option(help="of the new weights, 0 to 1")] = 0.75,
) -> None:
    """Average two sets of weights, stored as the shipped ones are."""
    from .study.average import main

    main(new, old, out, share)


@app.command()
def bench(
    work: Annotated[str, typer.Argument(help="prefill, decode, batch, vision, memory, load, long, or all")],
    config: Annotated[str, typer.Option(help="issue (random weights, heads of the released width), study or tiny")] = "issue",
    size: Annotated[list[int] | None, typer.Option(min=1, help="in place of the usual sizes; repeat it for several")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="alternating rounds of a row")] = 7,
    json: Annotated[Path | None, typer.Option(help="also write the numbers to this file")] = None,
    figure: Annotated[Path | None, typer.Option(help="of `long`: draw the time of a token over its context (PNG)")] = None,
) -> None:
    """Measure speed and memory beside transformers, ratios side by side, as Markdown tables."""
    # like `demo`, no import statement: benchmarks stand right of the workbench, and the import test allows this line
    checkout = str(Path(__file__).parents[1])
    if checkout not in sys.path:  # an editable install finds its packages only, and a script not its folder
        sys.path.append(checkout)
    try:
        speed = importlib.import_module("benchmarks.speed")
    except ModuleNotFoundError as error:
        if error.name not in ("benchmarks", "benchmarks.speed"):
            raise
        raise ValueError(
            "the benchmarks are part of the repository and not of an installed package; run this in a checkout of it"
        ) from None
    speed.main(work, config, size, rounds, json, figure)


@app.command("sites")
def list_sites(
    glob: Annotated[str | None, typer.Argument(help="such as 'decoder.layers.1.ffn.**'; left out: every site once")] = None,
    model: Model = "study",
) -> None:
    """List what can be read, edited or swapped inside a model: name, axes, sizes."""
    from .sites import listing, skeleton

    typer.echo("\n".join(listing(skeleton(model), glob)))


@app.command()
def doctor(
    checkpoint: Annotated[str, typer.Argument(help="a checkpoint folder, a hub id in the local cache, or 'study'")],
    json: Annotated[bool, typer.Option("--json", help="print the findings as JSON")] = False,
    deep: Annotated[bool, typer.Option("--deep", help="also compare with transformers' modules, layer by layer")] = False,
    report: Annotated[Path | None, typer.Option(help="with --deep: write what was found to this file, to attach")] = None,
) -> None:
    """Check a checkpoint without loading it, and say what this machine can do with it; exit code 1 if something is wrong."""
    if report is not None and not deep:
        raise ValueError("--report belongs to --deep, which takes minutes and is worth a file; give both or neither")
    from .checkup import checkup

    found = checkup(checkpoint)
    if deep and not found.failed:
        from .checkup.deep import check_deep

        check_deep(found, checkpoint, report, progress=sys.stderr.isatty())
    typer.echo(dumps(found.to_dict(), indent=2) if json else "\n".join(found.lines()))
    if found.failed:
        raise typer.Exit(1)


@app.command()
def download(
    hub_id: Annotated[str, typer.Argument(help="such as moonshotai/Kimi-VL-A3B-Instruct")],
    to: Annotated[Path | None, typer.Option(help="a folder; default: the cache of the hub, shared with other programs")] = None,
    revision: Annotated[str, typer.Option(help="a branch, a tag or a commit")] = "main",
    endpoint: Annotated[str | None, typer.Option(help="another address of the hub; default: HF_ENDPOINT")] = None,
) -> None:
    """Fetch the files of a checkpoint that are needed, no code and no pickles; one that was cut off goes on."""
    from .checkup.download import fetch

    folder = fetch(hub_id, to, revision=revision, endpoint=endpoint)
    typer.echo(f"{folder}\nnext: kimi-vl doctor {folder}")


@app.command()
def parity(
    a: Annotated[str, typer.Argument(help="'study', or a checkpoint folder")],
    b: Annotated[str, typer.Argument(help="the same, or 'transformers:FOLDER' for its weights in transformers' modules")],
    dtype: Annotated[str, typer.Option(help="both compute in it: float32, float64, bfloat16, float16")] = "float32",
) -> None:
    """Compare two models site by site and name the first that differs; exit code 1 if one does."""
    from .parity import compare

    walk = compare(a, b, dtype)
    typer.echo("\n".join(walk.lines()))
    if walk.first is not None:
        raise typer.Exit(1)


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; the exit code. The one place where an error of the user's becomes a sentence.

    Bad input of every kind is one line on stderr and exit code 2. KIMI_VL_TRACEBACK=1 shows where from.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        # non-standalone: errors come here, and are not printed with a usage block around them
        return app(arguments or ["--help"], prog_name="kimi-vl", standalone_mode=False) or 0
    except (typer.TyperException, ModuleNotFoundError, OSError, ValueError) as error:
        ours = isinstance(error, ModuleNotFoundError) and (error.name or "").startswith(
            ("kimi_vl_ref", "workbench", "demos")
        )
        if ours or os.environ.get("KIMI_VL_TRACEBACK"):
            raise
        return refused(sentence(error))
    except (MemoryError, RuntimeError) as error:
        from .memory import ran_out

        if not ran_out(error) or os.environ.get("KIMI_VL_TRACEBACK"):
            raise
        return refused("memory ran out; use smaller or fewer pictures, a shorter reply, or close other programs")


def refused(told: str) -> int:
    """Says it on stderr in one line; the exit code of bad input."""
    print("kimi-vl:", " ".join(told.split()), file=sys.stderr)
    return 2


def sentence(error: Exception) -> str:
    """What went wrong, for a person."""
    if isinstance(error, typer.TyperException):
        return f"{error.format_message().rstrip('.')}; see kimi-vl --help"
    if isinstance(error, ModuleNotFoundError):
        return f"{error.name} is not installed: pip install 'kimi-vl-workbench[demos]'"
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return str(error) or type(error).__name__


if __name__ == "__main__":
    sys.exit(main())
